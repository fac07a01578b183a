"""Attacks on the NAT and through it. Each is tried many times, and may not succeed once.

::

    client  alice ──┐
    client2 bob   ──┼ switch ── gateway ── internet 203.0.113.9 ── beyond 192.0.2.9
    client3 mallory ┘           203.0.113.1 (Eve: on the path, may      (the servers that
    (a peer of ours, who lies)               claim to be anybody)        alice talks to)

With two shards, alice and mallory live on the same one. What Eve may know: addresses, and the server's port. What she
may not: sequence numbers, and (unless a test says so) alice's external port.
"""

from __future__ import annotations

import json
import os
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import pytest

from tidegate.lab import checks, udpecho
from tidegate.lab.stacks import INNER_GATEWAY, TidegateClient, WireguardGoClient
from tidegate.lab.topology import BEYOND, GATEWAY_EXTERNAL, INTERNET
from tidegate.lab.waiting import pause, wait_until

from .battle import (
    ECHO,
    SWEEP,
    Battle,
    Line,
    flow_of,
    is_true,
    lie,
    line_of,
    mac_of,
    packets_of,
    start_echo,
    tcp_sweep,
    tunnel_of,
)
from .conftest import MakeWorld
from .lab import connections, forge

pytestmark = pytest.mark.namespaces

FLOOD = 50_000 if os.environ.get("TIDEGATE_E2E_FULL") == "1" else 10_000
SETTLE = 0.3
"""Seconds in which what was sent has arrived, if it arrives at all."""
RESIDENT_GROWTH = 48 << 20
"""What floods may cost the gateway in memory: bounded queues and buffers."""


@pytest.fixture(scope="module")
def battle(make_world: MakeWorld) -> Iterator[Battle]:
    config = "[gateway]\nshards = 2\n[nat]\nport_range = [40000, 41999]\nmax_mappings_per_client = 600\n"
    world = make_world(clients=3, config=config)
    gateway, lab = world.tidegate, world.lab
    for name, host in zip(("alice", "bob"), lab.clients, strict=False):
        TidegateClient(host, gateway.add_peer(name)).start()
    mallory = WireguardGoClient(lab.clients[2], gateway.add_peer("mallory"))
    mallory.start()
    lab.clients[2].ip(f"link set {mallory.interface} txqueuelen {2 * FLOOD}")  # so that no attack is lost
    start_echo(lab.beyond, BEYOND).wait_for(connections.READY)
    peers = json.loads(gateway.command("peer", "list", "--json"))["peers"]
    inner = {peer["name"]: peer["address"] for peer in peers}
    yield Battle(lab, gateway, inner, mallory.interface)
    gateway.stop()


@pytest.fixture(autouse=True)
def all_is_well_afterwards(battle: Battle) -> Iterator[None]:
    """After every attack the gateway lives, the clients are served, and no memory was taken."""
    before = battle.gateway.process.resident_bytes()
    yield
    assert battle.gateway.process.running
    for host in (battle.alice, battle.bob):
        assert checks.ping(host, BEYOND, count=5, interval=0.02).complete
    assert battle.gateway.process.resident_bytes() - before < RESIDENT_GROWTH


Record = Callable[[str, object], None]


# ---- TCP


def test_a_forged_rst_with_a_guessed_sequence_number_ends_no_connection(
    battle: Battle, record_property: Record
) -> None:
    # Eve knows both endpoints, alice's external port included, and sweeps all sequence numbers.
    with line_of(battle, battle.alice, "alice") as line:
        target = (GATEWAY_EXTERNAL, line.face)
        offset = random.randrange(SWEEP)
        for flags in (forge.RST, forge.RST | forge.ACK):
            with battle.counted_drops(SWEEP // 2, "tcp_out_of_state"):
                packets = tcp_sweep(ECHO, target, flags, offset)
                tries = battle.eve.call(lambda packets=packets: forge.send(packets))  # type: ignore[misc]
            record_property("tries", tries)
            assert battle.mappings("alice", "tcp")[line.face] == "established"
            assert line.answers()


def test_forged_syns_and_data_for_a_connection_end_or_corrupt_nothing(battle: Battle) -> None:
    with line_of(battle, battle.alice, "alice") as line:
        target = (GATEWAY_EXTERNAL, line.face)
        step = 1 << 18
        for flags in (forge.SYN, forge.SYN | forge.ACK, forge.FIN | forge.ACK, forge.PSH | forge.ACK):
            packets = tcp_sweep(ECHO, target, flags, random.randrange(SWEEP), step=step)
            with battle.seen_from_outside((1 << 32) // step // 2):
                tries = battle.eve.call(lambda packets=packets: forge.send(packets))  # type: ignore[misc]
            assert tries == (1 << 32) // step
        assert line.answers(), "what the client's own TCP does not believe changes nothing"
        assert battle.mappings("alice", "tcp")[line.face] == "established"


def test_a_forged_frag_needed_with_a_guessed_sequence_number_changes_no_path(battle: Battle) -> None:
    def path_mtu() -> str:
        return battle.alice.run(["ip", "route", "get", BEYOND]).stdout

    with line_of(battle, battle.alice, "alice") as line:
        quoted = tcp_sweep((GATEWAY_EXTERNAL, line.face), ECHO, forge.ACK, random.randrange(SWEEP))
        forged = (
            forge.fragmentation_needed(INTERNET, GATEWAY_EXTERNAL, 552, segment[:28]) for segment in quoted
        )
        with (
            battle.watched(battle.alice, expression="icmp[icmptype] = icmp-unreach") as (inside,),
            battle.counted_drops(SWEEP // 2, "icmp_error_unmatched", "tcp_out_of_state"),
        ):
            assert battle.eve.call(lambda: forge.send(forged)) == SWEEP
        assert inside.lines() == []
        assert "mtu 552" not in path_mtu()
        assert line.answers()


def test_a_forged_icmp_error_about_a_flow_that_does_not_exist_reaches_nobody(battle: Battle) -> None:
    with flow_of(battle.alice) as (_, face):
        mapped = battle.mappings("alice", "udp")
        assert face in mapped
        ports = [port for port in range(1024, 65_536) if port not in mapped]
        forged = (
            forge.fragmentation_needed(
                INTERNET,
                GATEWAY_EXTERNAL,
                552,
                forge.udp((GATEWAY_EXTERNAL, port), (BEYOND, udpecho.PORT), b"quoted"),
            )
            for port in ports
        )
        with battle.watched(
            battle.alice, battle.bob, battle.mallory, expression="icmp[icmptype] = icmp-unreach"
        ) as inside:
            assert battle.eve.call(lambda: forge.send(forged)) == len(ports)
            pause(SETTLE)
        assert [capture.lines() for capture in inside] == [[], [], []]


# ---- Addresses


def test_inner_sources_that_are_not_the_peers_own_get_nowhere(battle: Battle) -> None:
    own = battle.inner["mallory"]
    sources = [f"10.66.77.{n}" for n in range(1, 255)] + ["127.0.0.1", INTERNET, GATEWAY_EXTERNAL, "0.0.0.0"]
    targets = [(INTERNET, 4242), (battle.inner["alice"], 4242), (INNER_GATEWAY, 53), (GATEWAY_EXTERNAL, 4242)]
    lies = [
        forge.udp((source, 4242), target, b"lie") for source in sources if source != own for target in targets
    ]
    with (
        battle.eve.capture("external", "udp port 4242") as outside,
        battle.watched(battle.alice, expression="udp port 4242") as (inside,),
        battle.counted_drops(len(lies), "wrong_inner_source"),
    ):
        assert battle.mallory.call(lambda: forge.inject(battle.mallory_interface, lies)) == len(lies)
    assert outside.lines() == inside.lines() == []


@pytest.fixture(params=[False, True], ids=["host", "router"])
def forwarding(battle: Battle, request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether the gateway's host forwards, as for containers: in the lab it does not."""
    forwards = bool(request.param)
    battle.lab.gateway.sysctl("net.ipv4.ip_forward", str(int(forwards)))
    yield forwards
    battle.lab.gateway.sysctl("net.ipv4.ip_forward", "0")


def test_packets_from_outside_to_inner_addresses_reach_nobody(battle: Battle, forwarding: bool) -> None:
    battle.eve.ip(f"route add 10.66.77.0/24 via {GATEWAY_EXTERNAL}")
    inner = [f"10.66.77.{n}" for n in range(1, 255)]
    query = bytes.fromhex("4242010000010000000000000377777707657861 6d706c650000010001".replace(" ", ""))
    packets = [forge.udp((INTERNET, 4242), (address, 53), query) for address in inner]
    packets += [forge.tcp((INTERNET, 4242), (address, 80), forge.SYN) for address in inner]
    packets += [forge.echo_request(INTERNET, address, 4242) for address in inner]
    with flow_of(battle.alice) as (client, face):
        # And with inner sources, to a port behind which somebody listens.
        packets += [forge.udp((address, 4242), (GATEWAY_EXTERNAL, face), b"lie") for address in inner]
        with (
            battle.counted_drops(len(packets) * 9 // 10 if forwarding else 1, "bogon_source"),
            battle.watched(*battle.lab.clients) as inside,
            battle.eve.capture(
                "external", f"dst host {INTERNET} and (src host {INNER_GATEWAY} or udp)"
            ) as outside,
        ):
            assert battle.eve.call(lambda: forge.send(packets)) == len(packets)
            pause(SETTLE)
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(100)
    battle.eve.ip(f"route delete 10.66.77.0/24 via {GATEWAY_EXTERNAL}")
    strangers = [line for capture in inside for line in capture.lines() if "4242" in line or "ICMP" in line]
    assert strangers == []
    # To the gateway's own address the host's kernel may answer as it does for any address of the host; DNS does not.
    assert outside.lines("udp") == []


# ---- Ports


def test_ports_of_the_host_and_of_the_nat_never_meet(battle: Battle, record_property: Record) -> None:
    def hold() -> dict[int, socket.socket]:
        held = {}
        for port in range(41_000, 41_999):
            holder = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            try:
                holder.bind(("", port))
            except OSError:
                holder.close()
            else:
                held[port] = holder
        return held

    with ExitStack() as stack:
        faces = {}
        for host in (battle.alice, battle.bob):
            for _ in range(40):
                client, face = stack.enter_context(flow_of(host))
                faces[face] = client
        assert len(faces) == 80, "two flows share an external port"

        # A program of the host takes no port of the NAT's, however it asks.
        def steal() -> list[tuple[int, str, int]]:
            stolen = []
            for face in faces:
                for address in ("", GATEWAY_EXTERNAL):
                    for option in (0, socket.SO_REUSEADDR, socket.SO_REUSEPORT):
                        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as thief:
                            if option:
                                thief.setsockopt(socket.SOL_SOCKET, option, 1)
                            try:
                                thief.bind((address, face))
                            except OSError:
                                continue
                            stolen.append((face, address, option))
            return stolen

        assert battle.lab.gateway.call(steal) == []
        record_property("tries", len(faces) * 6)

        # Mallory sends from the very ports that others appear under, to where they talk.
        def shadow() -> list[int]:
            shadows = []
            for face in faces:
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                    client.settimeout(5)
                    client.bind(("", face))
                    client.sendto(udpecho.WHOAMI, (BEYOND, udpecho.PORT))
                    shadows.append(int(client.recv(100).decode().split(":")[1]))
            return shadows

        assert not set(battle.mallory.call(shadow)) & faces.keys()
        for client in faces.values():
            client.sendto(b"mine", (BEYOND, udpecho.PORT))
            assert client.recv(100) == b"mine"

        # A program of the host holds ports: none of them becomes the NAT's.
        held = battle.lab.gateway.call(hold)
        for holder in held.values():
            stack.enter_context(holder)
        lent = {stack.enter_context(flow_of(battle.bob))[1] for _ in range(40)}
        assert not lent & held.keys()


def test_scans_of_ports_that_clients_use_are_met_with_silence(battle: Battle) -> None:
    stranger = ("192.0.2.77", 4242)
    with line_of(battle, battle.alice, "alice") as line, flow_of(battle.alice) as (_, face):
        tcp, udp = battle.mappings("alice", "tcp"), battle.mappings("alice", "udp")
        assert line.face in tcp
        assert face in udp
        packets = [
            forge.udp(stranger, (GATEWAY_EXTERNAL, port), b"anybody?") for port in udp for _ in range(20)
        ]
        for flags in (forge.SYN, forge.ACK, forge.FIN, forge.RST, forge.SYN | forge.ACK, 0, 0x3F):
            for port in tcp:
                packets += [forge.tcp(stranger, (GATEWAY_EXTERNAL, port), flags, seq=n) for n in range(20)]
        with (
            battle.eve.capture("external", f"src host {GATEWAY_EXTERNAL}") as outside,
            battle.watched(battle.alice, expression=f"host {stranger[0]}") as (inside,),
            battle.counted_drops(len(packets) // 2, "filtered"),
        ):
            assert battle.eve.call(lambda: forge.send(packets)) == len(packets)
            pause(SETTLE)
        assert outside.lines(f"dst host {stranger[0]}") == []
        assert inside.lines() == []


def test_a_client_that_takes_all_it_can_get_takes_nothing_from_another(battle: Battle) -> None:
    def greed() -> None:
        with ExitStack() as stack:
            for port in range(10_000, 10_000 + 3_000):
                client = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                client.bind(("", port))
                client.sendto(b"mine", (INTERNET, 9))
                if port % 3 == 0:
                    caller = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
                    caller.setblocking(False)
                    caller.connect_ex((INTERNET, 9_999))

    with battle.counted_drops(1_000, "client_mapping_limit", "client_mapping_rate"):
        battle.mallory.call(greed)
    # Alice lives on the same shard, and draws from the same pools.
    failures = 0
    with ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(flow_of(battle.alice))
        for _ in range(50):
            connection = stack.enter_context(
                battle.alice.call(lambda: socket.create_connection(ECHO, timeout=10))
            )
            failures += not Line(connection, 0).answers()
    assert failures == 0
    held = battle.mappings("mallory", "udp") | battle.mappings("mallory", "tcp")
    assert len(held) <= 600


# ---- Floods and lies


@pytest.mark.parametrize("side", ["outside", "inside"])
def test_a_flood_of_fragments_holds_up_no_whole_packets(battle: Battle, side: str) -> None:
    chance = random.Random(5)

    def fragments(sources: list[str], destination: str) -> Iterator[bytes]:
        for n in range(FLOOD):
            offset = chance.choice([0, 0, 8, 185, 8_000, 8_190]) | forge.MORE_FRAGMENTS
            yield forge.ipv4(
                chance.choice(sources),
                destination,
                forge.UDP,
                chance.randbytes(64),
                identification=n & 0xFFFF,
                fragment=offset,
            )

    dropped = battle.drops("fragment_limit", "bad_fragment")
    with flow_of(battle.alice) as (client, _):
        pings = battle.bob.popen(["ping", "-n", "-i", "0.02", "-c", "60", "-W", "2", BEYOND])
        if side == "outside":
            sources = [f"192.0.2.{n}" for n in range(10, 250)]
            flood = fragments(sources, GATEWAY_EXTERNAL)
            assert battle.eve.call(lambda: forge.send(flood)) == FLOOD
        else:
            flood = fragments([battle.inner["mallory"]], BEYOND)
            sender = battle.mallory_interface
            assert battle.mallory.call(lambda: forge.inject(sender, flood)) == FLOOD
        client.sendto(b"whole", (BEYOND, udpecho.PORT))
        assert client.recv(100) == b"whole"
        pings.wait(20)
        assert "60 received" in pings.output(), pings.output()[-300:]
    assert battle.drops("fragment_limit", "bad_fragment") > dropped

    def fragmented() -> bool:
        with flow_of(battle.alice) as (client, _):
            client.settimeout(1)
            client.sendto(bytes(8192), (BEYOND, udpecho.PORT))
            try:
                return len(client.recv(65_535)) == 8192
            except TimeoutError:
                return False

    wait_until(fragmented, "fragments to pass again, when the flood's have expired", timeout=25, interval=0.5)


@pytest.mark.parametrize("side", ["outside", "inside"])
def test_truncated_and_lying_headers_neither_pass_nor_harm(battle: Battle, side: str) -> None:
    chance = random.Random(11)
    with line_of(battle, battle.alice, "alice") as line, flow_of(battle.alice) as (client, face):
        if side == "outside":
            to = (GATEWAY_EXTERNAL, face)
            models = [
                forge.udp((BEYOND, udpecho.PORT), to, b"a datagram of a flow that exists"),
                forge.tcp(ECHO, (GATEWAY_EXTERNAL, line.face), forge.ACK | forge.PSH, data=b"a segment"),
                forge.fragmentation_needed(
                    INTERNET, GATEWAY_EXTERNAL, 1280, forge.udp(to, (BEYOND, udpecho.PORT), bytes(8))
                ),
            ]
            mac = mac_of(battle.lab.gateway, "external")
            watcher, interface, sender = battle.alice, tunnel_of(battle.alice), battle.eve
            source: tuple[str, bytes] = ("external", mac)
        else:
            me = battle.inner["mallory"]
            models = [
                forge.udp((me, 5_000), (BEYOND, udpecho.PORT), b"a datagram of a client that lies"),
                forge.tcp((me, 5_001), ECHO, forge.SYN),
                forge.echo_request(me, BEYOND, 77),
                forge.udp((me, 5_002), (battle.inner["alice"], 7), b"to a neighbour"),
            ]
            watcher, interface, sender = battle.eve, "external", battle.mallory
            source = (battle.mallory_interface, bytes(6))
        lies = [lie(chance, chance.choice(models)) for _ in range(FLOOD)]
        with watcher.capture(interface, "ip", snaplen=200) as seen:
            sender.call(lambda: forge.inject(source[0], lies, to=source[1]))
            pause(SETTLE)
        ethernet = 14 if interface == "external" else 0
        damaged = [packet for packet in packets_of(seen.pcap) if not is_true(packet[ethernet:], from_us=side)]
        assert damaged == []
        # Some of the lies were about the payload alone, which is not the gateway's business.
        client.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                client.recv(2048)
        client.settimeout(5)
        client.sendto(b"unharmed", (BEYOND, udpecho.PORT))
        assert client.recv(2048) == b"unharmed"
    with line_of(battle, battle.alice, "alice") as line:
        assert line.answers()


def test_errors_of_the_gateway_itself_are_few(battle: Battle) -> None:
    # What a client can make the gateway say is no amplifier, and its rate no oracle (SAD DNS).
    me, chance = battle.inner["mallory"], random.Random(3)
    dying = [forge.udp((me, 5_000), (BEYOND, chance.randrange(1, 65_536)), b"", ttl=1) for _ in range(FLOOD)]
    with battle.watched(battle.mallory, expression="icmp[icmptype] = icmp-timxceed") as (inside,):
        battle.mallory.call(lambda: forge.inject(battle.mallory_interface, dying))
        pause(SETTLE)
    assert 0 < len(inside.lines()) <= FLOOD // 20
    # And nothing that comes from outside makes it say anything.
    scan = [
        forge.udp(("192.0.2.77", 4242), (GATEWAY_EXTERNAL, port), ttl=1) for port in range(40_000, 42_000)
    ]
    with (
        battle.eve.capture("external", f"src host {GATEWAY_EXTERNAL} and icmp[icmptype] = 11") as outside,
        battle.counted_drops(len(scan) // 2, "no_mapping", "filtered"),
    ):
        assert battle.eve.call(lambda: forge.send(scan)) == len(scan)
        pause(SETTLE)
    assert outside.lines() == []
