"""Protocols without ports, such as GRE: one client's both ways, nobody else's, and the host says nothing about them.

::

    client  (alice) ──┐
                      ├ switch ── gateway ── internet 203.0.113.9
    client2 (bob)   ──┘           203.0.113.1
"""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import GRE as Gre
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from tidegate.lab.topology import GATEWAY_EXTERNAL, INTERNET, Lab, Namespace
from tidegate.lab.waiting import wait_until

from .conftest import MakeWorld

pytestmark = pytest.mark.namespaces

GRE = 47
UNREACHABLE = "icmp[0] == 3 and icmp[1] == 2"
HEADER = 20
ONE_MAC, OTHER_MAC = "02:00:00:00:00:01", "02:00:00:00:00:02"


def raw(host: Namespace, protocol: int) -> socket.socket:
    made = host.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, protocol))
    made.settimeout(3)
    return made


def received(at: socket.socket) -> tuple[bytes, str] | None:
    """The next packet's payload and source."""
    try:
        packet, (source, _) = at.recvfrom(2000)
    except TimeoutError:
        return None
    return packet[HEADER:], source


@pytest.mark.parametrize(("name", "protocol"), [("gre", GRE), ("99", 99)])
def test_a_protocol_is_one_clients_and_the_host_stays_silent(
    make_world: MakeWorld, name: str, protocol: int
) -> None:
    world = make_world(clients=2, config="")
    lab, gateway = world.lab, world.tidegate
    alice, bob = lab.clients
    world.connect(alice, name="alice")
    world.connect(bob, name="bob")
    with (
        raw(lab.internet, protocol) as outside,
        raw(alice, protocol) as at_alice,
        raw(bob, protocol) as at_bob,
    ):
        with lab.internet.capture("external", UNREACHABLE) as complaints:
            outside.sendto(b"whose is this?", (GATEWAY_EXTERNAL, 0))
            wait_until(complaints.lines, "the host to say that it does not know the protocol")

        gateway.settings_file.write_text(f'[nat.other_protocols]\n{name} = "alice"\n')
        gateway.command("reload")
        with lab.internet.capture("external", UNREACHABLE) as complaints:
            at_alice.sendto(b"from alice", (INTERNET, 0))
            assert received(outside) == (b"from alice", GATEWAY_EXTERNAL)
            outside.sendto(b"to alice", (GATEWAY_EXTERNAL, 0))
            assert received(at_alice) == (b"to alice", INTERNET)
            large = bytes(range(256)) * 4
            at_alice.sendto(large, (INTERNET, 0))
            assert received(outside) == (large, GATEWAY_EXTERNAL)

            at_bob.sendto(b"from bob", (INTERNET, 0))
            dropped = gateway.status()["drops"]
            wait_until(
                lambda: gateway.status()["drops"].get("unsupported_protocol", 0) > 0, "bob's to be dropped"
            )
            outside.settimeout(0.5)
            assert received(outside) is None, dropped
        assert complaints.lines() == [], "the kernel takes it to be delivered"
        stats = gateway.command("nat", "stats")
        assert "unsupported_protocol" in stats and "A protocol that the NAT does not translate." in stats
    gateway.stop()


def merge_what_arrives(lab: Lab) -> None:
    """Makes the gateway's kernel merge the segments that arrive within some time, as behind a fast network card."""
    lab.internet.run(["ethtool", "-K", "external", "tso", "off"])  # a sender's offloads would go past it
    lab.gateway.run(["ethtool", "-K", "external", "gro", "on"])
    lab.gateway.run(["sh", "-c", "echo 200000000 > /sys/class/net/external/gro_flush_timeout"])


def inner_ipv4(n: int) -> Packet:
    return IP(src="172.16.0.1", dst="172.16.1.1", flags="DF", id=n)


def inner_ipv6(_n: int) -> Packet:
    return IPv6(src="fd00::1", dst="fd00:1::1")


@pytest.mark.parametrize(
    ("name", "protocol", "layers"),
    [
        ("gre", GRE, lambda n: Gre() / inner_ipv4(n)),
        ("gre", GRE, lambda n: Gre(key_present=1, key=7, proto=0x86DD) / inner_ipv6(n)),
        ("gre", GRE, lambda n: Gre(proto=0x6558) / Ether(src=ONE_MAC, dst=OTHER_MAC) / inner_ipv4(n)),
        ("ipip", 4, inner_ipv4),
        ("ipv6", 41, inner_ipv6),
    ],
    ids=["gre", "gre-key-ipv6", "gre-bridged", "ipip", "6in4"],
)
def test_tcp_that_the_kernel_merges_inside_a_tunnel_arrives_as_it_was_sent(
    make_world: MakeWorld, name: str, protocol: int, layers: Callable[[int], Packet]
) -> None:
    world = make_world(config="", prepare=merge_what_arrives)
    lab, gateway = world.lab, world.tidegate
    world.connect(lab.client, name="alice")
    gateway.settings_file.write_text(f'[nat.other_protocols]\n{name} = "alice"\n')
    gateway.command("reload")
    headers = [layers(n) / TCP(sport=443, dport=50_000, flags="A", seq=1_000 * n) for n in range(3)]
    segments = [bytes(header / Raw(bytes([n]) * 1_000)) for n, header in enumerate(headers)]
    with raw(lab.internet, protocol) as outside, raw(lab.client, protocol) as at_alice:
        with lab.gateway.capture("external", f"ip proto {protocol} and greater 2000") as merged:
            for segment in segments:
                outside.sendto(segment, (GATEWAY_EXTERNAL, 0))
            assert [received(at_alice) for _ in segments] == [(segment, INTERNET) for segment in segments]
        assert merged.lines(), "the kernel merged them"
    gateway.stop()
