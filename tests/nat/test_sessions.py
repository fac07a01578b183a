"""Mappings and sessions over time: whom they belong to, whom they admit, when they end, and when their ports may be
used again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.nat import packets
from tests.nat.packets import ECHO, ECHO_REPLY, EXTERNAL, Endpoint
from tidegate.engine import Dropped, Nat, NatOptions

ALICE, BOB = Endpoint("10.66.77.2", 5000), Endpoint("10.66.77.3", 5000)
SERVER = Endpoint("198.51.100.1", 443)
REST = 120.0  # seconds, RFC 6888 REQ-8
UDP_TIMEOUT, ICMP_TIMEOUT, TCP_OPENING, TCP_ESTABLISHED, TCP_CLOSING = 300.0, 60.0, 240.0, 7440.0, 240.0


def first_packet(protocol: str, inside: Endpoint, outside: Endpoint) -> bytes:
    match protocol:
        case "udp":
            return packets.udp(inside, outside, b"hello")
        case "tcp":
            return packets.tcp(inside, outside, "S", 1000)
        case _:
            return packets.query(ECHO, inside.address, outside.address, inside.port, b"hello")


def answer(protocol: str, outside: Endpoint, external: Endpoint) -> bytes:
    match protocol:
        case "udp":
            return packets.udp(outside, external, b"hello yourself")
        case "tcp":
            return packets.tcp(outside, external, "S", 9000)  # of a simultaneous open: fits any state
        case _:
            return packets.query(ECHO_REPLY, outside.address, external.address, external.port, b"hello")


def refused(translate: Callable[[bytes, float], bytes], packet: bytes, now: float) -> str:
    with pytest.raises(Dropped) as dropped:
        translate(packet, now)
    return dropped.value.reason


# ---- Whom a packet from outside reaches (RFC 4787 §5)


@pytest.mark.parametrize(
    ("filtering", "same_address", "stranger"),
    [
        ("endpoint-independent", True, True),
        ("address-dependent", True, False),
        ("address-and-port-dependent", False, False),
    ],
)
@pytest.mark.parametrize("protocol", ["udp", "tcp"])
def test_filtering(filtering: str, same_address: bool, stranger: bool, protocol: str) -> None:
    nat = Nat(external=[EXTERNAL], options=NatOptions(filtering=filtering), ports=(40000, 40100))
    external = packets.source(nat.translate_outbound(first_packet(protocol, ALICE, SERVER), 1.0))
    expected = {
        SERVER: True,
        Endpoint(SERVER.address, 9): same_address,
        Endpoint("198.51.100.2", SERVER.port): stranger,
    }
    for remote, admitted in expected.items():
        packet = answer(protocol, remote, external)
        if admitted:
            assert packets.destination(nat.translate_inbound(packet, 2.0)) == ALICE
        else:
            assert refused(nat.translate_inbound, packet, 2.0) == "filtered"
    nobodys = Endpoint(EXTERNAL, external.port ^ 1)
    assert refused(nat.translate_inbound, answer(protocol, SERVER, nobodys), 2.0) == "no_mapping"


def test_the_mapping_does_not_depend_on_the_destination() -> None:
    """RFC 4787 REQ-1."""
    nat = Nat(external=[EXTERNAL], ports=(40000, 40100))
    for protocol in ("udp", "tcp", "icmp"):
        external = {
            packets.source(
                nat.translate_outbound(first_packet(protocol, ALICE, Endpoint(f"198.51.100.{host}", 80)), 1.0)
            )
            for host in range(1, 20)
        }
        assert len(external) == 1
    assert nat.counts["sessions"] == 3 * 19


# ---- When they end


@pytest.mark.parametrize(
    ("protocol", "timeout"), [("udp", UDP_TIMEOUT), ("icmp", ICMP_TIMEOUT), ("tcp", TCP_OPENING)]
)
def test_a_mapping_lives_as_long_as_it_should(protocol: str, timeout: float) -> None:
    nat = Nat(external=[EXTERNAL], ports=(40000, 40100))
    assert nat.next_expiry() is None
    external = packets.source(nat.translate_outbound(first_packet(protocol, ALICE, SERVER), 1000.0))
    due = nat.next_expiry()
    assert due is not None
    assert 0 < due - (1000.0 + timeout) <= 2, "to the second, and not too early"
    nat.expire(1000.0 + timeout)
    (mapping,) = nat.mappings(1000.0 + timeout)
    assert (mapping.protocol, mapping.internal, mapping.external) == (protocol, ALICE, external)
    assert (mapping.age, mapping.idle, mapping.expires_in) == (timeout, timeout, 0.0)
    nat.expire(due)
    assert nat.mappings(due) == []
    assert refused(nat.translate_inbound, answer(protocol, SERVER, external), due) == "no_mapping"


def test_a_connection_may_be_idle_for_two_hours_and_four_minutes() -> None:
    """RFC 5382 REQ-5."""
    nat = Nat(external=[EXTERNAL], ports=(40000, 40100))
    external = packets.source(nat.translate_outbound(packets.tcp(ALICE, SERVER, "S", 1000), 0.0))
    nat.translate_inbound(packets.tcp(SERVER, external, "SA", 5000, 1001), 0.0)
    nat.translate_outbound(packets.tcp(ALICE, SERVER, "A", 1001, 5001), 0.0)
    nat.expire(TCP_ESTABLISHED)
    assert nat.mappings(TCP_ESTABLISHED)[0].state == "established"
    nat.translate_inbound(packets.tcp(SERVER, external, "FA", 5001, 1001), TCP_ESTABLISHED)
    nat.translate_outbound(packets.tcp(ALICE, SERVER, "FA", 1001, 5002), TCP_ESTABLISHED)
    nat.expire(TCP_ESTABLISHED + TCP_CLOSING)
    assert nat.mappings(TCP_ESTABLISHED)[0].state == "closing"
    nat.expire(TCP_ESTABLISHED + TCP_CLOSING + 2)
    assert nat.counts["tcp_mappings"] == 0


def test_nothing_is_left_when_everything_has_ended() -> None:
    nat = Nat(external=[EXTERNAL], ports=(40000, 40500))
    for port in range(1, 400):
        for protocol in ("udp", "tcp", "icmp"):
            nat.translate_outbound(first_packet(protocol, Endpoint("10.66.77.2", 1024 + port), SERVER), 1.0)
    assert nat.counts["sessions"] == 3 * 399
    nat.expire(400.0)
    assert nat.counts["resting_ports"] == 399, "those of UDP"
    nat.expire(400.0 + REST)
    assert set(nat.counts.values()) == {0}
    assert nat.next_expiry() is None


# ---- When a port may be used again


def test_a_port_rests_before_another_client_gets_it() -> None:
    """RFC 6888 REQ-8."""
    nat = Nat(external=[EXTERNAL], ports=(40000, 40000))
    packet = packets.udp(BOB, SERVER)
    nat.translate_outbound(packets.udp(ALICE, SERVER), 0.0)
    assert refused(nat.translate_outbound, packet, 1.0) == "ports_exhausted"
    nat.expire(302.0)
    assert nat.counts["resting_ports"] == 1
    assert refused(nat.translate_outbound, packet, 302.0) == "ports_exhausted"
    nat.expire(302.0 + REST - 1)
    assert refused(nat.translate_outbound, packet, 302.0 + REST - 1) == "ports_exhausted"
    nat.expire(302.0 + REST)
    assert packets.source(nat.translate_outbound(packet, 302.0 + REST)) == (EXTERNAL, 40000)


def test_the_ports_of_a_removed_client_rest_as_well() -> None:
    nat = Nat(external=[EXTERNAL], ports=(40000, 40000))
    nat.translate_outbound(packets.tcp(ALICE, SERVER, "S", 1), 0.0)
    nat.remove_client(ALICE.address, 1.0)
    assert (nat.counts["tcp_mappings"], nat.counts["resting_ports"]) == (0, 1)
    assert refused(nat.translate_outbound, packets.tcp(BOB, SERVER, "S", 1), 2.0) == "ports_exhausted"
    nat.expire(1.0 + REST)
    assert nat.translate_outbound(packets.tcp(BOB, SERVER, "S", 1), 1.0 + REST)


def test_a_tcp_port_is_shared_towards_different_servers_only_when_all_are_taken() -> None:
    """RFC 7857 §3."""
    nat = Nat(external=[EXTERNAL], ports=(40000, 40000))
    other = Endpoint("198.51.100.2", SERVER.port)
    external = packets.source(nat.translate_outbound(packets.tcp(ALICE, SERVER, "S", 1), 0.0))
    assert refused(nat.translate_outbound, packets.tcp(BOB, SERVER, "S", 1), 0.0) == "ports_exhausted"
    assert packets.source(nat.translate_outbound(packets.tcp(BOB, other, "S", 1), 0.0)) == external
    for remote, inside in ((SERVER, ALICE), (other, BOB)):
        received = nat.translate_inbound(packets.tcp(remote, external, "SA", 9, 2), 0.0)
        assert packets.destination(received) == inside


# ---- Everything at once, for any sequence of operations

hosts = st.integers(2, 4).map(lambda host: f"10.66.77.{host}")
insides = st.builds(Endpoint, hosts, st.integers(5000, 5003))
outsides = st.builds(Endpoint, st.integers(1, 2).map(lambda host: f"198.51.100.{host}"), st.integers(80, 81))
protocols = st.sampled_from(["udp", "tcp", "icmp"])
PORTS = (40000, 40003)
SHORTEST_TIMEOUT = {"udp": UDP_TIMEOUT, "icmp": ICMP_TIMEOUT, "tcp": TCP_OPENING}


class Sessions(RuleBasedStateMachine):
    """Clients that talk, servers that answer, time that passes, clients that leave: with 4 ports for 12 endpoints."""

    @initialize(seed=st.binary(min_size=32, max_size=32))
    def begin(self, seed: bytes) -> None:
        self.now = 1000.0
        self.nat = Nat(external=[EXTERNAL], ports=PORTS, seed=seed)
        self.live: dict[tuple[str, Endpoint], Endpoint] = {}
        """The NAT's own list: (protocol, inside) → external."""
        self.owners: dict[tuple[str, Endpoint, Endpoint], Endpoint] = {}
        """(protocol, external, outside) → inside: who showed that external endpoint to that server last."""
        self.sessions: dict[tuple[str, Endpoint, Endpoint], tuple[Endpoint, float]] = {}
        """The same while its mapping lives, with the time of its last packet."""
        self.rests: dict[tuple[str, int], tuple[str, float]] = {}
        """(protocol, port) → the client that had it, and until when it rests."""

    @rule(protocol=protocols, inside=insides, outside=outsides)
    def a_client_sends(self, protocol: str, inside: Endpoint, outside: Endpoint) -> None:
        if protocol == "icmp":
            outside = Endpoint(outside.address, 0)
        known = self.live.get((protocol, inside))
        try:
            external = packets.source(
                self.nat.translate_outbound(first_packet(protocol, inside, outside), self.now)
            )
        except Dropped as dropped:
            assert dropped.reason in ("ports_exhausted", "shared_port_taken")
            assert protocol != "icmp", "of identifiers there are 65,536"
            return
        self.look()
        assert known in (None, external), "the mapping is independent of the destination"
        if known is None:
            _, until = self.rests.get((protocol, external.port), ("", 0.0))
            assert until <= self.now, "the port had not rested"
        key = (protocol, external, outside)
        assert self.owner_in_session(key) in (None, inside), "two live sessions collide"
        self.owners[key] = inside
        self.sessions[key] = (inside, self.now)

    @rule(data=st.data())
    @precondition(lambda self: self.owners)
    def a_server_answers(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.owners)))
        protocol, external, outside = key
        owner = self.owner_in_session(key)
        try:
            received = self.nat.translate_inbound(answer(protocol, outside, external), self.now)
        except Dropped as dropped:
            assert dropped.reason in {"no_mapping", "filtered"}
            assert owner is None, "an answer must not be lost"
            return
        reached = packets.destination(received)
        assert self.live[protocol, reached] == external
        assert owner in (None, reached), "an answer must not reach anybody else"

    @rule(seconds=st.integers(0, 130) | st.sampled_from([60, 61, 120, 240, 241, 300, 301, 1000]))
    def time_passes(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1
            due = self.nat.next_expiry()
            if due is not None and due <= self.now:
                self.nat.expire(self.now)
                self.look(rest=("udp",))

    @rule(host=hosts)
    def a_client_leaves(self, host: str) -> None:
        self.nat.remove_client(host, self.now)
        self.look(rest=("udp", "tcp", "icmp"))

    def owner_in_session(self, key: tuple[str, Endpoint, Endpoint]) -> Endpoint | None:
        """Whose session it is, if it cannot have ended yet."""
        inside, at = self.sessions.get(key, (None, 0.0))
        return inside if self.now - at <= SHORTEST_TIMEOUT[key[0]] else None

    def look(self, rest: tuple[str, ...] = ()) -> None:
        """Reads the list of mappings; ports of these protocols that are on it no more rest from now on."""
        after = {
            (entry.protocol, Endpoint(*entry.internal)): Endpoint(*entry.external)
            for entry in self.nat.mappings(self.now)
        }
        still_used = {(protocol, external) for (protocol, _), external in after.items()}
        for (protocol, inside), external in self.live.items():
            if (
                (protocol, inside) not in after
                and protocol in rest
                and (protocol, external) not in still_used
            ):
                self.rests[protocol, external.port] = (inside.address, self.now + REST)
        self.live = after
        self.sessions = {
            (protocol, external, outside): (inside, at)
            for (protocol, external, outside), (inside, at) in self.sessions.items()
            if after.get((protocol, inside)) == external
        }

    @invariant()
    def counts_are_those_of_the_list(self) -> None:
        if hasattr(self, "nat"):
            counts = self.nat.counts
            listed = [protocol for protocol, _ in self.live]
            assert [counts[f"{name}_mappings"] for name in ("udp", "tcp", "icmp")] == [
                listed.count(name) for name in ("udp", "tcp", "icmp")
            ]
            assert counts["clients"] == len({inside.address for _, inside in self.live})

    @invariant()
    def no_two_live_mappings_have_the_same_external_endpoint(self) -> None:
        """RFC 4787 REQ-3; except for TCP, whose ports are shared towards different servers when they have run out."""
        if hasattr(self, "live"):
            taken = [
                (protocol, external) for (protocol, _), external in self.live.items() if protocol != "tcp"
            ]
            assert len(taken) == len(set(taken))

    def teardown(self) -> None:
        if not hasattr(self, "nat"):
            return
        self.nat.expire(self.now + 400)
        self.nat.expire(self.now + 400 + REST)
        assert set(self.nat.counts.values()) == {0}, "memory returns to its floor"


Sessions.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestSessions = Sessions.TestCase
