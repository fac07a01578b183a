"""What a client sends comes out with another source and is otherwise as it was; what is answered comes back to the
client as if there were no NAT."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.nat import packets
from tests.nat.packets import ECHO, ECHO_REPLY, EXTERNAL, TIMESTAMP, TIMESTAMP_REPLY, Endpoint, Header
from tidegate.engine import Dropped, Nat

SEED = bytes(range(32))


def fresh() -> Nat:
    """A NAT with few ports: there are many examples, and handing in 64,512 ports takes a while."""
    return Nat(external=[EXTERNAL], ports=(900, 1200), seed=SEED)


def kept(header: Header, translated: bytes) -> Header:
    """The header that the NAT should have produced: datagrams that may be fragmented get another identification
    (RFC 6864 §4.3), for they now share their source address with others."""
    if header.dont_fragment:
        return header
    return header._replace(identification=packets.identification(translated))


@given(
    packets.clients, packets.ports, packets.remotes, packets.ports, packets.payloads, packets.headers,
    packets.headers, st.booleans(),
)  # fmt: skip
def test_udp(
    client: str,
    port: int,
    remote: str,
    remote_port: int,
    payload: bytes,
    header: Header,
    answers_header: Header,
    checksum: bool,
) -> None:
    nat, inside, outside = fresh(), Endpoint(client, port), Endpoint(remote, remote_port)
    sent = nat.translate_outbound(packets.udp(inside, outside, payload, header, checksum=checksum), 1.0)
    external = packets.source(sent)
    assert external.address == EXTERNAL
    assert (external.port < 1024) == (port < 1024), "RFC 4787 REQ-3 a"
    assert sent == packets.udp(external, outside, payload, kept(header, sent), checksum=checksum)
    assert packets.remade(sent) == sent
    answer = packets.udp(outside, external, payload[::-1], answers_header, checksum=checksum)
    received = nat.translate_inbound(answer, 2.0)
    assert received == packets.udp(outside, inside, payload[::-1], answers_header, checksum=checksum)


@given(
    packets.clients, packets.ports, packets.remotes, packets.ports, packets.payloads, packets.headers,
    st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_a_tcp_connection_from_syn_to_fin(
    client: str,
    port: int,
    remote: str,
    remote_port: int,
    payload: bytes,
    header: Header,
    ours: int,
    theirs: int,
) -> None:
    nat, inside, outside = fresh(), Endpoint(client, port), Endpoint(remote, remote_port)

    def after(number: int, count: int) -> int:
        return (number + count) % 2**32

    segments = [  # whether the client sends it, flags, sequence, acknowledgment, payload
        (True, "S", ours, 0, b""),
        (False, "SA", theirs, after(ours, 1), b""),
        (True, "A", after(ours, 1), after(theirs, 1), b""),
        (True, "PA", after(ours, 1), after(theirs, 1), payload[:1000]),
        (False, "A", after(theirs, 1), after(ours, 1 + len(payload[:1000])), b"x"),
        (True, "FA", after(ours, 1 + len(payload[:1000])), after(theirs, 2), b""),
        (False, "FA", after(theirs, 2), after(ours, 2 + len(payload[:1000])), b""),
        (True, "A", after(ours, 2 + len(payload[:1000])), after(theirs, 3), b""),
    ]
    external = None
    for outbound, flags, sequence, acknowledgment, data in segments:
        if outbound:
            segment = packets.tcp(inside, outside, flags, sequence, acknowledgment, data, header)
            sent = nat.translate_outbound(segment, 1.0)
            external = external or packets.source(sent)
            expected = packets.tcp(
                external, outside, flags, sequence, acknowledgment, data, kept(header, sent)
            )
            assert sent == expected == packets.remade(sent)
        else:
            assert external is not None
            segment = packets.tcp(outside, external, flags, sequence, acknowledgment, data, header)
            received = nat.translate_inbound(segment, 1.0)
            assert received == packets.tcp(outside, inside, flags, sequence, acknowledgment, data, header)
    (mapping,) = nat.mappings(1.0)
    assert (mapping.state, mapping.internal) == ("closing", (client, port))


@given(
    packets.clients, st.integers(0, 65535), packets.remotes, packets.payloads, packets.headers,
    st.sampled_from([(ECHO, ECHO_REPLY), (TIMESTAMP, TIMESTAMP_REPLY)]),
)  # fmt: skip
@example("10.66.77.2", 65534, "198.51.100.9", b"", packets.PLAIN, (ECHO, ECHO_REPLY))  # adds up to all ones
def test_icmp_queries(
    client: str, identifier: int, remote: str, payload: bytes, header: Header, kinds: tuple[int, int]
) -> None:
    nat, (question, answer) = fresh(), kinds
    sent = nat.translate_outbound(packets.query(question, client, remote, identifier, payload, header), 1.0)
    external = packets.source(sent)
    expected = packets.query(question, EXTERNAL, remote, external.port, payload, kept(header, sent))
    assert sent == expected == packets.remade(sent)
    received = nat.translate_inbound(
        packets.query(answer, remote, EXTERNAL, external.port, payload, header), 2.0
    )
    assert received == packets.query(answer, remote, client, identifier, payload, header)


@given(packets.payloads, packets.payloads, packets.headers)
def test_a_hairpinned_datagram_comes_from_the_senders_external_endpoint(
    first: bytes, second: bytes, header: Header
) -> None:
    nat = fresh()
    alice, bob = Endpoint("10.66.77.2", 5000), Endpoint("10.66.77.3", 6000)
    bobs = packets.source(nat.translate_outbound(packets.udp(bob, Endpoint(EXTERNAL, 1)), 1.0))
    on_the_turn = nat.translate_outbound(packets.udp(alice, bobs, first, header), 1.0)
    alices = packets.source(on_the_turn)
    header = kept(header, on_the_turn)
    assert nat.translate_inbound(on_the_turn, 1.0) == packets.udp(alices, bob, first, header)
    back = nat.translate_inbound(nat.translate_outbound(packets.udp(bob, alices, second), 1.0), 1.0)
    assert back == packets.udp(bobs, alice, second)


@given(packets.payloads.filter(bool), st.integers(1, 65535))
def test_a_wrong_checksum_is_as_wrong_afterwards(payload: bytes, difference: int) -> None:
    inside, outside = Endpoint("10.66.77.2", 5000), Endpoint("198.51.100.1", 53)
    wrong = bytearray(packets.udp(inside, outside, payload))
    checksum = (int.from_bytes(wrong[26:28], "big") + difference) % 65535 or 65535
    right = int.from_bytes(wrong[26:28], "big") % 65535 == checksum % 65535
    wrong[26:28] = checksum.to_bytes(2, "big")
    sent = fresh().translate_outbound(bytes(wrong), 1.0)
    assert (packets.remade(sent) == sent) == right, "so that the receiver can tell"


@given(st.binary(max_size=120), st.booleans())
def test_arbitrary_bytes_are_translated_or_dropped_with_a_reason(junk: bytes, plausible: bool) -> None:
    nat = fresh()
    nat.translate_outbound(packets.udp(Endpoint("10.66.77.2", 5000), Endpoint("198.51.100.1", 53)), 1.0)
    packet = junk
    if plausible and len(junk) >= 20:
        packet = packets.with_fields(b"\x45" + junk[1:], version=4, ihl=5, len=len(junk))
    for translate in (nat.translate_outbound, nat.translate_inbound):
        try:
            translate(packet, 2.0)
        except Dropped as dropped:
            assert dropped.reason == str(dropped)
            assert dropped.reason.replace("_", "").isalnum()


def test_what_follows_the_datagram_is_cut_off() -> None:
    packet = packets.udp(Endpoint("10.66.77.2", 5000), Endpoint("198.51.100.1", 53), b"abc")
    sent = fresh().translate_outbound(packet + b"padding", 1.0)
    assert len(sent) == len(packet)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"external": ["203.0.113"]}, "203.0.113"),
        ({"external": [EXTERNAL], "ports": (5, 4)}, "ports must go upwards"),
        ({"external": [EXTERNAL], "ports": (0, 4)}, "from at least 1"),
        ({"external": [EXTERNAL], "seed": b"short"}, "seed must be 32 bytes, not 5"),
    ],
)
def test_what_makes_no_sense_is_a_value_error(keywords: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Nat(**keywords)  # type: ignore[arg-type]


@pytest.mark.parametrize("now", [-1.0, float("nan"), float("inf")])
def test_a_time_that_is_none_is_a_value_error(now: float) -> None:
    with pytest.raises(ValueError, match="now must be a number of seconds"):
        fresh().expire(now)


def test_the_same_seed_draws_the_same_ports_and_no_seed_draws_others() -> None:
    def drawn(seed: bytes | None) -> list[Endpoint]:
        nat = Nat(external=[EXTERNAL], ports=(40000, 41000), seed=seed)
        remote = Endpoint("198.51.100.1", 53)
        return [
            packets.source(nat.translate_outbound(packets.udp(Endpoint("10.66.77.2", port), remote), 1.0))
            for port in range(5000, 5010)
        ]

    assert drawn(SEED) == drawn(SEED)
    assert drawn(None) != drawn(None)
