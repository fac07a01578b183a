"""Protocols without ports, such as GRE: one client's both ways, nobody else's, and the host says nothing about them.

::

    client  (alice) ──┐
                      ├ switch ── gateway ── internet 203.0.113.9
    client2 (bob)   ──┘           203.0.113.1
"""

from __future__ import annotations

import socket

import pytest

from tidegate.lab.topology import GATEWAY_EXTERNAL, INTERNET, Namespace
from tidegate.lab.waiting import wait_until

from .conftest import MakeWorld

pytestmark = pytest.mark.namespaces

GRE = 47
UNREACHABLE = "icmp[0] == 3 and icmp[1] == 2"
HEADER = 20


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
