"""The host's routes as the kernel dumps them, in a network namespace, and what reading very many of them costs."""

from __future__ import annotations

import errno
import json
import socket
import struct
import subprocess
import sys

import pytest

from tidegate.host.route_dump import DumpInterruptedError, dump_routes

SETUP = """
ip link set lo up
ip link add eth0 type veth peer name other
ip link set eth0 addrgenmode none
ip link set other addrgenmode none
ip addr add 192.0.2.2/24 dev eth0
ip addr add 192.0.2.3/24 dev eth0
ip link set eth0 up
ip link set other up
ip tuntap add mode tun name tun9
ip addr add 10.66.77.2/32 dev tun9
ip link set tun9 up
"""

INSIDE = '''
import json, subprocess, sys, time
from ipaddress import *
from tidegate.host import routes
from tidegate.host.netlink import read_network
from tidegate.host.routes import apply_routes, plan_routes, renew_routes, wide_routes

def sh(command):
    subprocess.run(command, shell=True, check=True)

def seconds(work, *arguments):
    began = time.process_time()
    work(*arguments)
    return time.process_time() - began

told = {}
for route in """default via 192.0.2.1 dev eth0 src 192.0.2.3 metric 7
    198.51.100.0/25 via 192.0.2.1 dev eth0 table 29900
    198.51.100.128/25 nexthop via 192.0.2.1 dev eth0 nexthop via 192.0.2.4 dev other onlink
    203.0.113.0/25 via inet6 fe80::1 dev eth0
    blackhole 203.0.113.128/26
    unreachable 203.0.113.192/26""".splitlines():
    sh(f"ip route add {route}")
network = read_network()
names = {interface.index: interface.name for interface in network.interfaces}
told["routes"] = [
    [str(r.destination), r.gateway and str(r.gateway), names[r.index], r.metric, r.table, r.source and str(r.source)]
    for r in network.routes
]
MANY = 4000
batch = "".join(f"route add {IPv4Address('198.18.0.0') + 4 * n}/30 via 192.0.2.1 dev eth0\\n" for n in range(MANY))
subprocess.run("ip -batch -", shell=True, input=batch, text=True, check=True)
read_network()
told["reading"] = seconds(read_network)
everything = plan_routes((ip_network("0.0.0.0/0"), ip_network("::/0")), IPv4Address("192.0.2.7"), 51820)
split = plan_routes((ip_network("203.0.113.0/27"),), IPv4Address("192.0.2.7"), 51820)
told["wide"] = seconds(wide_routes, everything)
for name, plan in (("everything", everything), ("split", split)):
    client = apply_routes(plan, "tun9")
    told[f"apply {name}"] = seconds(client.__enter__)
    told[f"renew {name}"] = seconds(renew_routes, plan, "tun9")
    client.__exit__(None, None, None)
told["leftovers"] = seconds(routes.remove_leftovers)
print(json.dumps(told))
'''


@pytest.mark.namespaces
def test_routes_of_every_kind_are_read_and_very_many_cost_little() -> None:
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", f"set -e\n{SETUP}\nexec {sys.executable} -"],
        input=INSIDE,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert sorted(told.pop("routes"), key=str) == sorted(
        [
            ["0.0.0.0/0", "192.0.2.1", "eth0", 7, 254, "192.0.2.3"],
            ["192.0.2.0/24", None, "eth0", 0, 254, "192.0.2.2"],
            ["198.51.100.0/25", "192.0.2.1", "eth0", 0, 29900, None],
            ["198.51.100.128/25", "192.0.2.1", "eth0", 0, 254, None],
            ["198.51.100.128/25", "192.0.2.4", "other", 0, 254, None],
        ],
        key=str,
    )
    assert {what: spent for what, spent in told.items() if spent > 0.3} == {}, (
        "a decoder of every message took 0.5 s and more, several times for some of these"
    )


class Kernel:
    """Answers a dump with what a test says."""

    def __init__(self, *datagrams: bytes) -> None:
        self._datagrams = iter(datagrams)

    def recvfrom(self, _: int) -> tuple[bytes, tuple[int, int]]:
        return next(self._datagrams), (0, 0)

    def setsockopt(self, *_: int) -> None:
        raise OSError(errno.ENOPROTOOPT, "as before Linux 4.20")

    def sendto(self, *_: object) -> None: ...
    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *_: object) -> None: ...


def message(kind: int, content: bytes, flags: int = 2) -> bytes:
    header = struct.pack("=IHHII", 16 + len(content), kind, flags, 1, 7)
    return header + content + bytes(-len(content) % 4)


def route(family: int, *attributes: bytes) -> bytes:
    return message(24, struct.pack("=BBBBBBBBI", family, 0, 0, 0, 254, 4, 0, 1, 0) + b"".join(attributes))


def answers(monkeypatch: pytest.MonkeyPatch, *datagrams: bytes) -> None:
    monkeypatch.setattr(socket, "socket", lambda *_: Kernel(*datagrams))


DONE = message(3, bytes(4))


def test_a_dump_that_a_change_interrupted_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, route(2), message(3, bytes(4), flags=2 | 0x10))
    with pytest.raises(DumpInterruptedError):
        list(dump_routes(socket.AF_INET))


@pytest.mark.parametrize("kind", [2, 3], ids=["NLMSG_ERROR", "NLMSG_DONE"])
def test_a_refusal_is_an_error_but_a_table_that_is_not_there_is_empty(
    monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    answers(monkeypatch, message(kind, struct.pack("=i", -errno.ENOENT)))
    assert list(dump_routes(socket.AF_INET, table=29799)) == []
    answers(monkeypatch, message(kind, struct.pack("=i", -errno.EPERM)))
    with pytest.raises(PermissionError):
        list(dump_routes(socket.AF_INET, table=29799))


def test_routes_of_another_family_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where IPv6 is switched off, the kernel may dump what it has."""
    answers(monkeypatch, route(2) + route(10), DONE)
    (found,) = dump_routes(socket.AF_INET6)
    assert str(found.destination(found.attributes())) == "::/0"


@pytest.mark.parametrize("attribute", [b"", b"\x01", b"\0\0\1\0", b"\xff\xff\1\0\1\2\3\4"])
def test_an_attribute_that_is_cut_off_is_no_endless_one(
    monkeypatch: pytest.MonkeyPatch, attribute: bytes
) -> None:
    answers(monkeypatch, route(2, attribute) + DONE)
    (found,) = dump_routes(socket.AF_INET)
    assert len(found.attributes()) <= 1
