"""The gateway host's kernel never answers for a port of the NAT, and no program of the host shares one with it.

::

    client ─── tunnel ─── gateway ═══ internet
                          203.0.113.1  203.0.113.9 (tcpdump here sees all that the gateway says)
"""

from __future__ import annotations

import re
import resource
import socket
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP

from tidegate.lab import checks, udpecho
from tidegate.lab.stacks import Client
from tidegate.lab.topology import GATEWAY_EXTERNAL, INTERNET, Lab
from tidegate.lab.waiting import pause

from .conftest import MakeWorld, Scale, World

pytestmark = pytest.mark.namespaces

FROM_GATEWAY = f"src host {GATEWAY_EXTERNAL}"
RST = "tcp[tcpflags] & tcp-rst != 0"
HEADERS = 128  # bytes of each packet that a capture keeps
UNREACHABLE = "icmp[icmptype] = icmp-unreach"
_RST_LINE = re.compile(r"> ([\d.]+): Flags \[R\.?\], (?:seq|cksum[^,]*, seq) (\d+)")


Port = tuple[socket.SocketKind, int]


@dataclass
class Scene:
    world: World
    client: Client


@pytest.fixture(scope="module")
def scene(make_world: MakeWorld) -> Iterator[Scene]:
    world = make_world()
    yield Scene(world, world.connect(world.lab.client))
    world.gateway.stop()


def test_what_the_internet_gets_is_what_the_client_sent(scene: Scene) -> None:
    lab = scene.world.lab
    # What tcpdump on the client's own tunnel sees is what the client said; nobody else may say more.
    tunnel = (lab.client.interfaces() - {"lo", "access"}).pop()
    with (
        lab.internet.capture("external", FROM_GATEWAY, snaplen=HEADERS) as outside,
        lab.client.capture(tunnel, f"({RST}) or ({UNREACHABLE})", snaplen=HEADERS) as inside,
    ):
        traffic(lab)
        pause(1.0)
    assert outside.lost == inside.lost == 0
    assert len(outside.lines(f"{FROM_GATEWAY} and tcp")) > 20, "the capture did not see the traffic"

    said_by_client = {resets(line) for line in inside.lines(f"dst host {INTERNET} and {RST}")}
    said_by_gateway = {resets(line) for line in outside.lines(f"{FROM_GATEWAY} and {RST}")}
    assert said_by_gateway <= said_by_client, "RSTs that no client sent"

    unreachable_inside = inside.lines(f"dst host {INTERNET} and {UNREACHABLE}")
    unreachable_outside = outside.lines(f"{FROM_GATEWAY} and {UNREACHABLE}")
    assert len(unreachable_outside) <= len(unreachable_inside), unreachable_outside

    echo_requests = outside.lines(f"{FROM_GATEWAY} and icmp[icmptype] = icmp-echo")
    assert len(echo_requests) == len(set(echo_numbers(echo_requests))), "a request arrived twice"


@pytest.mark.timeout(240)
def test_after_the_traffic_a_port_of_the_nat_stays_silent_to_anything(scene: Scene, scale: Scale) -> None:
    lab = scene.world.lab
    with lab.internet.capture("external", FROM_GATEWAY, snaplen=HEADERS) as outside:
        traffic(lab)
    ports = external_ports(outside.lines(f"{FROM_GATEWAY} and (tcp or udp)"))
    assert len(ports["tcp"]) >= 3
    assert len(ports["udp"]) >= 3
    scene.client.stop()  # now nobody but the gateway itself could answer

    with lab.internet.capture("external", "ip") as after:
        send(scene, stray_packets(ports))
        pause(scale.silence_seconds)
        send(scene, stray_packets(ports))
        pause(1.0)
    assert len(after.lines(f"dst host {GATEWAY_EXTERNAL}")) >= 2 * len(ports["tcp"]), "nothing was sent"
    assert after.lines(FROM_GATEWAY) == []

    # The control: the kernel is as talkative as ever about a port that is not the NAT's.
    unused = next(port for port in range(2_000, 60_000) if port not in ports["tcp"])
    with lab.internet.capture("external", "ip") as control:
        send(
            scene,
            [
                IP(src=INTERNET, dst=GATEWAY_EXTERNAL) / TCP(sport=80, dport=port, flags="S")
                for port in range(unused, unused + 500)
            ],
        )
        pause(0.5)
    assert control.lines(f"{FROM_GATEWAY} and {RST}") != []


def test_programs_of_the_host_and_the_nat_never_share_a_port(make_world: MakeWorld) -> None:
    world = make_world()
    world.connect(world.lab.client)
    lab = world.lab
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = min(6_000, hard - 1_500)  # of them 500 are for connections, the rest for the tests' own needs
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        # Programs hold every second port of a wide range before the NAT asks for one.
        every_second = product(range(20_000, 40_000, 2), (socket.SOCK_STREAM, socket.SOCK_DGRAM))
        held = lab.gateway.call(lambda: hold(((kind, port) for port, kind in every_second), enough))
        for holder in held.values():
            stack.enter_context(holder)
        with lab.internet.capture("external", FROM_GATEWAY, snaplen=HEADERS) as outside:
            for _ in range(10):
                traffic(lab)
        ports = external_ports(outside.lines(f"{FROM_GATEWAY} and (tcp or udp)"))
        taken = {(socket.SOCK_STREAM, port) for port in ports["tcp"]}
        taken |= {(socket.SOCK_DGRAM, port) for port in ports["udp"]}
        assert len(taken) > 40
        assert not held.keys() & taken

        # And what the NAT has, no program gets: neither by asking for it, nor by connecting from any port.
        got = lab.gateway.call(lambda: hold(taken, len(taken)))
        assert got.keys() == set(), "a program of the host got ports that the NAT uses"

        def connect_out() -> list[int]:
            local = []
            for _ in range(500):
                connection = stack.enter_context(socket.create_connection((INTERNET, 80), timeout=5))
                local.append(connection.getsockname()[1])
            return local

        own = {(socket.SOCK_STREAM, port) for port in lab.gateway.call(connect_out)}
        assert len(own) == 500
        assert not own & taken
    world.gateway.stop()


def traffic(lab: Lab) -> None:
    """Some of everything, closed in all the usual ways."""
    host = lab.client
    checks.download(host, f"http://{INTERNET}/blob/silence/4000000")
    for _ in range(3):
        host.run(["curl", "-sS", "--fail", f"http://{INTERNET}/"])
    # Given up in the middle: the server goes on sending for a while.
    host.run(
        ["curl", "-sS", "--max-time", "0.3", "-o", "/dev/null", f"http://{INTERNET}/blob/x/9000000000"],
        check=False,
    )
    checks.ping(host, INTERNET, count=10, interval=0.02)

    def datagrams() -> None:
        for _ in range(5):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.settimeout(5)
                client.sendto(b"hello", (INTERNET, udpecho.PORT))
                client.recv(100)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.sendto(b"nobody waits for the answer", (INTERNET, udpecho.PORT))
            client.sendto(b"nobody serves this", (INTERNET, 9))

    host.call(datagrams)


def stray_packets(ports: dict[str, set[int]]) -> list[IP]:
    """What a port could be provoked with."""
    packets = []
    for port in ports["tcp"]:
        for sport in (80, 4242):
            for flags in ("S", "SA", "A", "PA", "FA", "R", "FPU", ""):
                packets.append(
                    IP(src=INTERNET, dst=GATEWAY_EXTERNAL)
                    / TCP(sport=sport, dport=port, flags=flags, seq=1_000_000, ack=2_000_000)
                    / (b"data" if "P" in flags else b"")
                )
    for port in ports["udp"]:
        for sport in (udpecho.PORT, 4242):
            packets.append(IP(src=INTERNET, dst=GATEWAY_EXTERNAL) / UDP(sport=sport, dport=port) / b"stray")
    packets.append(IP(src=INTERNET, dst=GATEWAY_EXTERNAL) / ICMP(type=0, id=77) / b"an echo reply to nobody")
    return packets


def send(scene: Scene, packets: list[IP]) -> None:
    """Sends whole IP packets from the internet host."""

    def raw() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sender:
            for packet in packets:
                sender.sendto(bytes(packet), (GATEWAY_EXTERNAL, 0))

    scene.world.lab.internet.call(raw)


def resets(line: str) -> tuple[str, str]:
    """Where a RST goes and its sequence number: what the NAT leaves as it is."""
    found = _RST_LINE.search(line)
    assert found is not None, line
    return found[1], found[2]


def echo_numbers(lines: list[str]) -> list[tuple[str, str]]:
    found = [re.search(r"id (\d+), seq (\d+)", line) for line in lines]
    return [(match[1], match[2]) for match in found if match]


def external_ports(lines: list[str]) -> dict[str, set[int]]:
    """The gateway's source ports by protocol, from tcpdump's lines."""
    ports: dict[str, set[int]] = {"tcp": set(), "udp": set()}
    for line in lines:
        if found := re.search(rf"IP {re.escape(GATEWAY_EXTERNAL)}\.(\d+) > [\d.]+: (Flags|UDP)", line):
            ports["tcp" if found[2] == "Flags" else "udp"].add(int(found[1]))
    return ports


def hold(ports: Iterable[Port], enough: int) -> dict[Port, socket.socket]:
    """Sockets bound to `ports`, without those that somebody has, until there are `enough`."""
    held = {}
    for kind, port in ports:
        if holder := bound(kind, port):
            held[kind, port] = holder
        if len(held) >= enough:
            break
    return held


def bound(kind: socket.SocketKind, port: int) -> socket.socket | None:
    """A socket bound to `port` on all addresses; None if somebody has it."""
    holder = socket.socket(socket.AF_INET, kind)
    try:
        holder.bind(("", port))
    except OSError:
        holder.close()
        return None
    return holder
