"""The client's routes: the plan, and the kernel's view of it in a network namespace."""

from __future__ import annotations

import json
import subprocess
import sys
from ipaddress import IPv4Address, ip_network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.host.veth import setup
from tidegate.host import MAIN_TABLE
from tidegate.host.routes import FWMARK, TABLE, Rule, TunnelRoute, plan_routes, remove_leftovers

ENDPOINT, PORT = IPv4Address("192.0.2.7"), 51820


def test_the_whole_internet_goes_through_a_table_of_its_own_and_ipv6_nowhere() -> None:
    plan = plan_routes((ip_network("0.0.0.0/0"), ip_network("::/0")), ENDPOINT, PORT)
    assert plan.fwmark == FWMARK
    assert plan.routes == (
        TunnelRoute(ip_network("0.0.0.0/0"), TABLE),
        TunnelRoute(ip_network("::/0"), TABLE, unreachable=True),
    )
    assert plan.rules == (
        Rule(4, TABLE - 2, MAIN_TABLE, gateway=(ENDPOINT, PORT)),
        Rule(4, TABLE - 1, MAIN_TABLE, suppress_prefixlength=7),
        Rule(4, TABLE, TABLE, unless_fwmark=FWMARK),
        Rule(6, TABLE - 1, MAIN_TABLE, suppress_prefixlength=31),
        Rule(6, TABLE, TABLE, unless_fwmark=FWMARK),
    )


def test_single_prefixes_are_plain_routes() -> None:
    plan = plan_routes((ip_network("10.66.77.0/24"), ip_network("198.51.100.0/24")), ENDPOINT, PORT)
    assert plan.fwmark == 0
    assert plan.towards(IPv4Address("203.0.113.7"), PORT) == plan
    assert plan.rules == ()
    assert {route.table for route in plan.routes} == {MAIN_TABLE}


@given(
    st.lists(
        st.builds(lambda a, n: ip_network((a, n), strict=False), st.ip_addresses(v=4), st.integers(0, 32)),
        min_size=1,
        unique=True,
    )
)
def test_the_tunnels_own_datagrams_never_enter_the_tunnel(allowed: list[object]) -> None:
    plan = plan_routes(tuple(allowed), ENDPOINT, PORT)  # type: ignore[arg-type]
    swallowed = any(ENDPOINT in route.destination and route.table == MAIN_TABLE for route in plan.routes)
    assert not swallowed
    assert (plan.fwmark != 0) == plan.has_policy


def test_leftovers_are_no_matter_where_nobody_can_tell_whose_they_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The lock may not be visible, and a client that routes only some networks does not need it."""
    monkeypatch.setattr("tidegate.host.full_tunnel_lock.LOCK_FILE", tmp_path / "missing")
    remove_leftovers()


SETUP = f"""
{setup("tun9")}
ip -6 addr add 2001:db8::2/64 dev eth0 nodad
ip -6 route add default via 2001:db8::1
ip addr add 10.66.77.2/32 dev tun9
ip link set tun9 up
"""

GOING = [
    (4, "rule del priority 29797"),
    (4, "rule del priority 29798"),
    (4, "rule del priority 29799"),
    (6, "rule del priority 29798"),
    (6, "rule del priority 29799"),
    (4, "route del 0.0.0.0/0 table 29799"),
    (6, "route del unreachable ::/0 table 29799"),
]
"""What another program may remove, as systemd-networkd does when it starts."""

INSIDE = '''
import fcntl, json, os, struct, subprocess, sys, tempfile, time
from contextlib import contextmanager
from ipaddress import *
from pathlib import Path
from tests.unit.host.veth import sh
from tidegate.host import routes, full_tunnel_lock
from tidegate.errors import TidegateError
from tidegate.host.routes import apply_routes, plan_routes, remove_leftovers, renew_routes, wide_routes

def state():
    return [sh(f"ip {v} {w}") for v in ("-4", "-6") for w in ("rule", "route show table all")] + [
        sh("cat /proc/sys/net/ipv4/conf/all/src_valid_mark")]

def way(target):
    return sh(f"ip route get {target} 2>&1")

plan = plan_routes((ip_network("0.0.0.0/0"), ip_network("::/0")), IPv4Address("192.0.2.7"), 51820)
told = {"before": state()}

@contextmanager
def out_of_sight_of_the_lock():
    """As behind another mount of /proc."""
    there = full_tunnel_lock.LOCK_FILE
    with tempfile.NamedTemporaryFile() as elsewhere:
        full_tunnel_lock.LOCK_FILE = Path(elsewhere.name)
        yield
    full_tunnel_lock.LOCK_FILE = there

def client_that_is_killed(plan=plan):
    pid = os.fork()
    if pid == 0:
        applied = apply_routes(plan, "tun9")
        applied.__enter__()
        os._exit(0)
    os.waitpid(pid, 0)

client_that_is_killed()
told["killed"] = state()
remove_leftovers()
told["cleared"] = state()
client_that_is_killed()
with apply_routes(plan, "tun9"):
    told["rules"] = sh("ip rule")
    told["internet"] = way("198.51.100.1")
    told["marked"] = way("198.51.100.1 mark 0x7467")
    told["neighbour"] = way("192.0.2.9")
    told["ipv6"] = way("2001:db8:1::1")
    told["ipv6 neighbour"] = way("2001:db8::9")
    told["src_valid_mark"] = state()[-1]
    told["tight"] = wide_routes(plan)
    attacks = {  # what a DHCP server or a router may say
        "ip route add 0.0.0.0/1 via 192.0.2.66": "8.8.8.8", "ip route add 128.0.0.0/1 via 192.0.2.66": "198.51.100.1",
        "ip route add 8.0.0.0/7 via 192.0.2.66": "8.8.8.8", "ip -6 route add 2000::/3 dev eth0": "2001:db8:1::1",
        "ip -6 route add 2600::/31 via 2001:db8::66": "2600::1"}
    for attack in attacks:
        sh(attack)
    told["attacked"] = [way(target) for target in attacks.values()]
    told["wide"] = wide_routes(plan)
    sh("ip route add 224.0.0.0/4 dev eth0; ip route add 10.0.0.0/8 via 192.0.2.3; ip route add 11.0.0.0/8 dev eth0")
    sh("ip -6 route add 2400::/32 dev eth0")
    told["local"] = [way("10.1.2.3"), way("11.1.2.3"), way("2400::1"), way("192.0.2.9"), way("2001:db8::9")]
    told["wide"] += wide_routes(plan)[len(told["wide"]):]
    for attack in (*attacks, "route add 224.0.0.0/4 ", "route add 10.0.0.0/8 ", "route add 11.0.0.0/8 ",
                   "-6 route add 2400::/32 "):
        sh("ip " + attack.removeprefix("ip ").replace("add", "del").split(" via")[0].split(" dev")[0])
    try:
        with apply_routes(plan, "tun9"):
            told["second"] = "was let in"
    except TidegateError as refused:
        told["second"] = str(refused)
    running = state()
    remove_leftovers()
    told["still running"] = state() == running
    with out_of_sight_of_the_lock(), open("/dev/net/tun", "r+b", buffering=0) as tun:
        fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", b"tun9", 0x1001))  # TUNSETIFF, IFF_TUN | IFF_NO_PI
        deadline = time.monotonic() + 10
        while "state DOWN" in sh("ip link show tun9") and time.monotonic() < deadline:
            time.sleep(0.01)  # the kernel tells of the new carrier later, and adds IPv6 routes then
        running = state()
        remove_leftovers()
        told["still running elsewhere"] = state() == running
        try:
            with apply_routes(plan, "tun8"):
                told["third"] = "was let in"
        except TidegateError as refused:
            told["third"] = str(refused)
    told["renewed"] = [renew_routes(plan, "tun9")]
    sh("ip link set tun9 down")
    told["renewed"] += [renew_routes(plan, "tun9"), way("198.51.100.1")]
    sh("ip link set tun9 up")
    told["renewed"] += [way("198.51.100.1"), renew_routes(plan, "tun9")]
    told["renewed"] += [way("198.51.100.1"), renew_routes(plan, "tun9")]
    whole = state()
    told["taken away"] = {}
    for version, what in json.loads(sys.argv[1]):
        sh(f"ip -{version} {what}")
        told["taken away"][f"{version} {what}"] = [
            state() != whole, renew_routes(plan, "tun9"), state() == whole, renew_routes(plan, "tun9")]
    moved = plan.towards(IPv4Address("198.51.100.7"), 51999)
    told["moved"] = [renew_routes(moved, "tun9"), sh("ip rule show priority 29797"), renew_routes(moved, "tun9")]
    told["moved"] += [way("198.51.100.7 ipproto " + what) for what in (
        "udp dport 51999", "udp dport 53", "tcp dport 51999", "udp sport 51999 dport 9")]
    try:
        renew_routes(moved.towards(IPv4Address("0.0.0.0"), 51820), "tun9")
    except TidegateError as refused:
        told["moved to nowhere"] = [str(refused), sh("ip rule show priority 29797"), renew_routes(moved, "tun9")]
    told["moved on"] = [renew_routes(moved.towards(IPv4Address("198.51.100.8"), 51820), "tun9"),
                        sh("ip rule show priority 29797")]
told["after"] = state()
client_that_is_killed(moved)
told["killed moved"] = state()
with apply_routes(plan, "tun9"):
    told["after killed moved"] = sh("ip rule show priority 29797")
try:
    with apply_routes(plan, "no-such-device"):
        pass
except TidegateError as refused:
    told["failed"] = str(refused)
told["after failure"] = state()
with apply_routes(plan_routes((ip_network("203.0.113.0/24"),), IPv4Address("192.0.2.7"), 51820), "tun9"):
    told["plain"] = way("203.0.113.5")
told["after plain"] = state()
sh("ip addr add 10.66.78.2/24 dev tun9")
told["before own"] = state()
own = plan_routes((ip_network("10.66.78.0/24"), ip_network("203.0.113.0/24")), IPv4Address("192.0.2.7"), 51820)
with apply_routes(own, "tun9"):
    told["own"] = [way("10.66.78.5"), way("203.0.113.5"), renew_routes(own, "tun9")]
told["after own"] = state()
try:
    with apply_routes(plan_routes((ip_network("192.0.2.0/24"),), IPv4Address("198.51.100.7"), 51820), "tun9"):
        pass
except TidegateError as refused:
    told["taken"] = str(refused)
ipv6_there, routes.INET6_PROC = routes.INET6_PROC, Path("/nonexistent")
with apply_routes(plan, "tun9") as in_force:
    routes.INET6_PROC = ipv6_there
    told["without IPv6"] = [renew_routes(in_force, "tun9"), sh("ip -6 rule")]
several = plan_routes((ip_network("203.0.113.0/25"), ip_network("203.0.113.128/25")), IPv4Address("192.0.2.7"), 51820)
with apply_routes(several, "tun9"):
    sh("ip route del 203.0.113.0/25; ip route del 203.0.113.128/25; ip route add 203.0.113.0/25 dev eth0")
    try:
        renew_routes(several, "tun9")
    except TidegateError as refused:
        told["refused"] = [str(refused), way("203.0.113.1"), way("203.0.113.129")]
    sh("ip route del 203.0.113.0/25 dev eth0")
blocked = plan_routes((ip_network("2001:db8:5::/48"), ip_network("2001:db8:6::/48")), IPv4Address("192.0.2.7"), 51820)
sh("ip -6 route add unreachable 2001:db8:6::/48")
told["before blocked"] = state()
client_that_is_killed(blocked)
told["killed blocked"] = state()
with apply_routes(blocked, "tun9"):
    told["blocked"] = [way("2001:db8:5::1"), way("2001:db8:6::1")]
told["after blocked"] = state()
print(json.dumps(told))
'''


@pytest.mark.namespaces
def test_the_kernel_routes_as_planned_and_forgets_everything_afterwards() -> None:
    script = f"set -e\n{SETUP}\nexec {sys.executable} -c '{INSIDE}' '{json.dumps(GOING)}'"
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert "dev tun9" in told["internet"]
    assert "via 192.0.2.1 dev eth0" in told["marked"]
    assert "dev eth0" in told["neighbour"]
    assert "No route to host" in told["ipv6"]
    assert "dev eth0" in told["ipv6 neighbour"]
    assert told["src_valid_mark"].strip() == "1"
    assert all("dev tun9" in way for way in told["attacked"][:3]), told["attacked"]
    assert all("No route to host" in way for way in told["attacked"][3:]), told["attacked"]
    assert told["tight"] == []
    assert told["wide"] == [
        "0.0.0.0/1 via 192.0.2.66 dev eth0",
        "8.0.0.0/7 via 192.0.2.66 dev eth0",
        "128.0.0.0/1 via 192.0.2.66 dev eth0",
        "2600::/31 via 2001:db8::66 dev eth0",
        "2000::/3 dev eth0",
    ]
    assert all("dev eth0" in way for way in told["local"]), "a large local network is still one"
    assert told["rules"].count("29799") == 2, "one rule, that names table and priority"
    assert "another client already routes" in told["second"]
    before, down, past, still, renewed, again, after = told["renewed"]
    assert (before, down, renewed, after) == ("whole", "down", "renewed", "whole")
    assert "dev eth0" in past and "dev eth0" in still, (
        "the kernel forgets the route, and does not bring it back"
    )
    assert "dev tun9" in again
    for what, (gone, renewed, as_before, then) in told["taken away"].items():
        assert (gone, renewed, as_before, then) == (True, "renewed", True, "whole"), what
    _check_moves(told)
    assert "198.51.100.7" in told["killed moved"][0]
    assert "198.51.100.7" not in told["after killed moved"] and "192.0.2.7" in told["after killed moved"]
    assert told["after"] == [*told["before"][:-1], "1\n"], "the killed one had set src_valid_mark"
    assert "no-such-device" in told["failed"]
    assert told["after failure"] == told["after"] == told["after plain"]
    assert told["killed"] != told["before"]
    assert told["cleared"] == told["after"]
    assert told["still running"], "nothing is removed from under a client that lives"
    assert told["still running elsewhere"]
    assert "another client already routes everything through its tunnel, tun9" in told["third"]
    assert "dev tun9" in told["plain"]
    network, added, renewal = told["own"]
    assert "dev tun9" in network and "dev tun9" in added and renewal == "whole"
    assert told["after own"] == told["before own"], "the kernel made the one route, and keeps it"
    renewal, rules = told["without IPv6"]
    assert renewal == "whole" and "29799" not in rules, "what is added later would not be taken back"
    refusal, other, ours = told["refused"]
    assert "another route to 203.0.113.0/25" in refusal
    assert "dev eth0" in other and "dev tun9" in ours, "one that cannot be added keeps no other out"
    assert all("No route to host" in way for way in told["blocked"])
    assert told["killed blocked"] != told["before blocked"]
    assert told["after blocked"] == told["before blocked"], (
        "the killed one's route has gone, the host's own has not"
    )
    assert "another route to 192.0.2.0/24" in told["taken"]
    assert "--no-routes" in told["taken"]


def _check_moves(told: dict[str, Any]) -> None:
    renewal, rule, again, to_gateway, *others = told["moved"]
    assert (renewal, again) == ("renewed", "whole")
    assert " ".join(rule.split()) == "29797: from all to 198.51.100.7 ipproto udp dport 51999 lookup main"
    assert "dev eth0" in to_gateway and all("dev tun9" in way for way in others), "only what it has to be"
    refusal, rule, renewal = told["moved to nowhere"]
    assert "cannot add rule 29797" in refusal and renewal == "whole"
    assert "198.51.100.7" in rule, "it stays until another one is there"
    renewal, rule = told["moved on"]
    assert renewal == "renewed" and rule.count("29797:") == 1 and "198.51.100.8" in rule
