"""What is not welcome is counted by reason, answered with silence, and does not fill the log.

::

    client  198.51.100.2 ──┐
    client2 198.51.100.3 ──┴ switch ── gateway ── internet 203.0.113.9 ── beyond 192.0.2.9
      (no peer: an attacker)
"""

from __future__ import annotations

import json
import random
import re
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tidegate.control.commands import NatList
from tidegate.lab import checks, udpecho
from tidegate.lab.stacks import INNER_GATEWAY, LISTEN_PORT, TidegateGateway, WireguardGoClient
from tidegate.lab.topology import BEYOND, GATEWAY_ACCESS, GATEWAY_EXTERNAL, INTERNET, Lab, Namespace
from tidegate.lab.waiting import WaitTimeoutError, pause, wait_until

from .conftest import MakeWorld
from .lab import forge

pytestmark = pytest.mark.namespaces

FLOOD = 5_000
ETH_P_ALL = 0x0003  # linux/if_ether.h
DATA_MESSAGE = bytes([4, 0, 0, 0])  # WireGuard whitepaper §5.4.6
LOG_LINES = 20  # that a flood may add to the log


@dataclass
class Siege:
    lab: Lab
    gateway: TidegateGateway
    client: WireguardGoClient

    def drops(self) -> dict[str, int]:
        counted: dict[str, int] = self.gateway.status()["drops"]
        return counted

    def inner(self) -> str:
        """The client's address inside the VPN."""
        listed = self.lab.client.run(["ip", "-o", "-4", "address"]).stdout
        found = re.search(r"inet (10\.66\.77\.\d+)", listed)
        assert found is not None, listed
        return found[1]

    def packets(self) -> int:
        """All that the gateway has moved."""
        return sum(self.gateway.status()["packets"].values())

    def steal_datagram(self) -> bytes:
        """A fresh datagram of the client's session, which never arrived."""
        host = self.lab.client
        host.ip(f"neighbour replace {GATEWAY_ACCESS} lladdr 02:00:00:00:00:99 dev access")  # nobody's
        with host.call(
            lambda: socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
        ) as wire:
            wire.settimeout(5)
            host.run(["ping", "-c", "1", "-W", "0.3", INNER_GATEWAY], check=False)
            while True:
                packet, about = wire.recvfrom(2_000)
                is_datagram = packet[9] == socket.IPPROTO_UDP and packet[28:32] == DATA_MESSAGE
                if is_datagram and about[2] == socket.PACKET_OUTGOING:
                    host.ip(f"neighbour delete {GATEWAY_ACCESS} dev access")
                    return packet[28:]

    def grows(self, before: dict[str, int], *reasons: str, by: int = 1) -> None:
        """Asserts that `reasons` together were counted at least `by` times more than `before`."""

        def growth() -> int:
            now = self.drops()
            return sum(now.get(reason, 0) - before.get(reason, 0) for reason in reasons)

        try:
            wait_until(lambda: growth() >= by, "drops to be counted", timeout=5, interval=0.3)
        except WaitTimeoutError:
            pytest.fail(f"{' + '.join(reasons)} grew by {growth()}, not {by}: {before} to {self.drops()}")


@pytest.fixture(scope="module")
def siege(make_world: MakeWorld) -> Iterator[Siege]:
    world = make_world(clients=2)
    gateway = world.tidegate
    client = WireguardGoClient(world.lab.client, gateway.add_peer("alice"))
    client.start()
    yield Siege(world.lab, gateway, client)
    gateway.stop()


def test_garbage_on_the_tunnel_port_is_counted_and_answered_with_silence(siege: Siege) -> None:
    attacker, chance = siege.lab.clients[1], random.Random(7)
    before, log_before = siege.drops(), len(siege.gateway.process.output().splitlines())

    def flood() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for n in range(FLOOD):
                size = chance.choice([0, 1, 3, 4, 16, 31, 32, 33, 91, 92, 93, 147, 148, 149, 1400, 1472])
                data = bytearray(chance.randbytes(size))
                if size >= 4 and n % 2:  # a type that exists: initiation, response, cookie, data
                    data[:4] = bytes([chance.randint(1, 4), 0, 0, 0])
                sender.sendto(data, (GATEWAY_ACCESS, LISTEN_PORT))
            for size in (9_000, 65_507):  # fragments of what no tunnel sends
                sender.sendto(chance.randbytes(size), (GATEWAY_ACCESS, LISTEN_PORT))

    with attacker.capture("access", "ip") as seen:
        attacker.call(flood)
        siege.grows(before, "not_wireguard", "bad_mac", "truncated", "unknown_session", by=FLOOD // 2)
    assert seen.lines(f"src host {GATEWAY_ACCESS}") == []
    added = len(siege.gateway.process.output().splitlines()) - log_before
    assert added <= LOG_LINES, f"{added} lines in the log"
    assert checks.ping(siege.lab.client, INTERNET, count=5).complete


def test_a_flood_of_empty_datagrams_beside_a_busy_client_stops_nobody(siege: Siege) -> None:
    attacker, before = siege.lab.clients[1], siege.drops()
    flood = (
        "import socket, sys, time\n"
        "sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        f"sender.connect(({GATEWAY_ACCESS!r}, {LISTEN_PORT}))\n"
        "end = time.monotonic() + 3\n"
        "while time.monotonic() < end:\n"
        "    for _ in range(100): sender.send(b'')\n"
    )
    upload = siege.lab.client.popen(["iperf3", "-c", INTERNET, "-t", "8", "--json"])
    floods = [attacker.popen([sys.executable, "-c", flood]) for _ in range(3)]
    assert [process.wait(20) for process in floods] == [0] * len(floods)
    assert upload.running, "the upload was over before the flood"
    assert upload.wait(30) == 0, upload.output()[-500:]
    assert json.loads(upload.output())["end"]["sum_received"]["bytes"] > 0
    siege.grows(before, "not_wireguard", by=FLOOD)
    assert checks.ping(siege.lab.client, INTERNET, count=5).complete


def test_a_peer_inside_the_vpn_makes_no_storm(siege: Siege) -> None:
    """An attacker on the path lets a datagram come from an inner address. Were it believed, what is sealed for the
    peer would go into the gateway's own TUN device, come back, and be sealed again.
    """
    lab, before = siege.lab, siege.drops()
    attacker, inner = lab.clients[1], siege.inner()
    stolen = siege.steal_datagram()
    sources = ((inner, 9_999), (Lab.client_address(0), 0))
    packets = [forge.udp(source, (GATEWAY_ACCESS, LISTEN_PORT), stolen) for source in sources]
    assert attacker.call(lambda: forge.send(packets)) == len(packets)

    cpu, sent = siege.gateway.process.cpu_seconds(), siege.packets()
    pause(1)
    assert siege.packets() - sent < 100, "packets go round"
    assert siege.gateway.process.cpu_seconds() - cpu < 0.3
    siege.grows(before, "bogon_source", by=len(sources))
    assert checks.ping(lab.client, INTERNET, count=5).complete, "the peer is where it was"


def sealed_for(host: Namespace) -> bytes:
    """A datagram that the gateway has sealed for the client at `host`."""
    with host.call(
        lambda: socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
    ) as wire:
        wire.settimeout(5)
        host.run(["ping", "-c", "1", "-W", "1", INNER_GATEWAY])
        while True:
            packet, about = wire.recvfrom(2_000)
            is_datagram = packet[9] == socket.IPPROTO_UDP and packet[28:32] == DATA_MESSAGE
            if is_datagram and about[2] == socket.PACKET_HOST:
                return packet[28:]


def test_what_is_sealed_for_a_client_of_one_shard_is_known_on_the_other(make_world: MakeWorld) -> None:
    """What comes back as a client's packet, as through a router that sends it back, would be sealed anew each time."""
    world = make_world(clients=2, config="[gateway]\nshards = 2\n")
    alice, bob = world.lab.clients
    world.connect(alice, name="alice")
    world.connect(bob, name="bob")

    def died() -> int:
        return int(world.tidegate.status()["drops"].get("own_datagram", 0))

    def comes_back(host: Namespace, other: str) -> None:
        before, own = died(), sealed_for(host)
        with host.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sender:
            sender.sendto(own, (other, 9))
        wait_until(lambda: died() == before + 1, "the gateway to know its own datagram")

    comes_back(alice, "10.66.77.3")
    comes_back(bob, "10.66.77.2")
    world.tidegate.stop()


def test_an_inner_source_that_is_not_the_peers_own_is_dropped(siege: Siege) -> None:
    host, before = siege.lab.client, siege.drops()
    for wrong in ("10.66.77.200", "192.0.2.77"):
        host.ip(f"address add {wrong}/32 dev {siege.client.interface}")
    with siege.lab.internet.capture("external", "icmp") as seen:
        for wrong in ("10.66.77.200", "192.0.2.77"):
            for target in (INTERNET, INNER_GATEWAY):
                host.run(
                    ["ping", "-n", "-c", "3", "-i", "0.02", "-W", "0.3", "-I", wrong, target], check=False
                )
    siege.grows(before, "wrong_inner_source", by=12)
    assert seen.lines() == []
    for wrong in ("10.66.77.200", "192.0.2.77"):
        host.ip(f"address delete {wrong}/32 dev {siege.client.interface}")


def test_ipv6_inside_the_tunnel_is_counted_and_dropped(siege: Siege) -> None:
    host, before = siege.lab.client, siege.drops()
    host.ip(f"-6 address add fd00::2/64 dev {siege.client.interface} nodad")
    peer = host.run(["wg", "show", siege.client.interface, "peers"]).stdout.strip()
    host.run(["wg", "set", siege.client.interface, "peer", peer, "allowed-ips", "0.0.0.0/0,::/0"])
    host.run(["ping", "-6", "-n", "-c", "3", "-i", "0.02", "-W", "0.3", "fd00::1"], check=False)
    siege.grows(before, "ipv6", by=3)


def test_unsolicited_packets_from_the_internet_are_counted_and_answered_with_silence(siege: Siege) -> None:
    lab, before = siege.lab, siege.drops()
    with lab.client.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as client:
        client.settimeout(2)
        client.sendto(udpecho.WHOAMI, (INTERNET, udpecho.PORT))
        mapped = int(client.recv(100).decode().split(":")[1])

        def knock() -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
                for _ in range(50):
                    stranger.sendto(b"knock", (GATEWAY_EXTERNAL, mapped))

        with lab.beyond.capture("beyond", "ip") as seen:
            lab.beyond.call(knock)
            siege.grows(before, "filtered", by=50)  # address-dependent filtering: it never sent to `beyond`
        assert seen.lines(f"src host {GATEWAY_EXTERNAL}") == []
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(100)


def test_a_knock_on_a_reserved_port_without_a_mapping_is_counted(siege: Siege) -> None:
    lab, status = siege.lab, siege.gateway.status()
    # The NAT holds each of its ports with a socket.
    bound = [line.split()[3] for line in lab.gateway.run(["ss", "-Huln"]).stdout.splitlines()]
    reserved = {face for face in bound if face.startswith(f"{GATEWAY_EXTERNAL}:")}
    assert len(reserved) == status["reserved_ports"]["udp"]
    mappings = siege.gateway.ask(NatList()).mappings
    mapped = {mapping.external for mapping in mappings if mapping.protocol == "udp"}
    assert len(mapped) == status["mappings"]["udp"]
    unmapped = [int(face.rpartition(":")[2]) for face in reserved - mapped]
    assert unmapped, "no port is reserved beyond those in use"

    def knock() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            for port in unmapped:
                stranger.sendto(b"", (GATEWAY_EXTERNAL, port))

    with lab.beyond.capture("beyond", f"src host {GATEWAY_EXTERNAL}") as answers:
        lab.beyond.call(knock)
        siege.grows(status["drops"], "no_mapping", by=len(unmapped))
    assert answers.lines() == []


def test_inner_addresses_that_arrive_from_outside_do_not_get_in(siege: Siege) -> None:
    siege.lab.internet.ip(f"route add 10.66.77.0/24 via {GATEWAY_EXTERNAL}")
    with siege.lab.client.capture(siege.client.interface, "icmp") as seen:
        assert checks.ping(siege.lab.internet, siege.inner(), count=3).round_trips == []
    assert seen.lines(f"src host {INTERNET}") == []
    siege.lab.internet.ip(f"route delete 10.66.77.0/24 via {GATEWAY_EXTERNAL}")


def test_destinations_that_must_not_be_forwarded_are_dropped(siege: Siege) -> None:
    before = siege.drops()
    with siege.lab.internet.capture("external", "udp") as seen:

        def send_out() -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
                interface = siege.client.interface.encode()
                sender.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface)
                for destination in ("224.0.0.251", "255.255.255.255", "169.254.1.1", "240.0.0.1"):
                    sender.sendto(b"bogon", (destination, 4242))

        siege.lab.client.call(send_out)
        siege.grows(before, "bogon_destination", by=3)
    assert seen.lines("dst port 4242") == []


def test_the_command_line_tells_of_the_same_drops(siege: Siege) -> None:
    before = siege.gateway.status()
    shown = json.loads(siege.gateway.command("status", "--json"))
    after = siege.gateway.status()
    assert before.keys() == shown.keys() == after.keys()
    assert before["drops"].keys() == shown["drops"].keys() == after["drops"].keys()
    for reason, count in shown["drops"].items():
        assert before["drops"][reason] <= count <= after["drops"][reason]


def test_after_all_this_the_client_is_served_as_ever(siege: Siege) -> None:
    assert checks.ping(siege.lab.client, INTERNET, count=20, interval=0.02).complete
    assert checks.ping(siege.lab.client, BEYOND, count=5).complete
