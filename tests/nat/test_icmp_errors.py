"""ICMP errors (RFC 5508): their quotations are translated as the packets that they quote were."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.nat import packets
from tests.nat.packets import (
    ECHO,
    ECHO_REPLY,
    EXTERNAL,
    PARAMETER_PROBLEM,
    ROUTER,
    TIME_EXCEEDED,
    UNREACHABLE,
    Endpoint,
    Header,
)
from tidegate.engine import Dropped, Nat

ALICE = Endpoint("10.66.77.2", 5000)
SERVER = Endpoint("198.51.100.1", 443)

kinds = st.one_of(
    st.tuples(st.just(UNREACHABLE), st.integers(0, 15)),
    st.tuples(st.just(TIME_EXCEEDED), st.integers(0, 1)),
    st.tuples(st.just(PARAMETER_PROBLEM), st.integers(0, 2)),
)


lengths = st.integers(0, 600).filter(lambda length: length != 9)  # half a TCP checksum cannot be mended


class Flow(NamedTuple):
    """Alice's first packet, as she made it and as it left, and the server's answer, as it comes."""

    nat: Nat
    made: bytes
    sent: bytes
    answer: bytes


def flow(protocol: str, payload: bytes = b"", header: Header = packets.PLAIN) -> Flow:
    nat = Nat(external=[EXTERNAL], ports=(40000, 40100), seed=bytes(32))
    match protocol:
        case "udp" | "udp without checksum":
            made = packets.udp(ALICE, SERVER, payload, header, checksum=protocol == "udp")
        case "tcp":
            made = packets.tcp(ALICE, SERVER, "S", 1000, 0, payload, header)
        case _:
            made = packets.query(ECHO, ALICE.address, SERVER.address, ALICE.port, payload, header)
    sent = nat.translate_outbound(made, 1.0)
    external = packets.source(sent)
    match protocol:
        case "udp" | "udp without checksum":
            answer = packets.udp(SERVER, external, payload, header, checksum=protocol == "udp")
        case "tcp":
            answer = packets.tcp(SERVER, external, "SA", 5000, 1001 + len(payload), b"", header)
        case _:
            answer = packets.query(ECHO_REPLY, SERVER.address, EXTERNAL, external.port, payload, header)
    return Flow(nat, made, sent, answer)


PROTOCOLS = ("udp", "udp without checksum", "tcp", "icmp")
protocols = st.sampled_from(PROTOCOLS)


def quoted(packet: bytes, length: int, **fields: int) -> bytes:
    """What an ICMP error tells of `packet`: at least its header and 8 bytes (RFC 792)."""
    header_length = (packet[0] & 15) * 4
    return packets.with_fields(packet, **fields)[: header_length + 8 + length]


@given(
    protocols,
    packets.payloads,
    packets.headers,
    packets.headers,
    lengths,
    kinds,
    st.integers(1, 255),
)
def test_an_error_from_outside_quotes_what_the_client_sent(
    protocol: str,
    payload: bytes,
    header: Header,
    errors_header: Header,
    length: int,
    kind: tuple[int, int],
    ttl: int,
) -> None:
    nat, made, sent, _ = flow(protocol, payload, header)
    # The TTL is what routers left of it; the identification is the one that left (RFC 6864).
    theirs = quoted(sent, length, ttl=ttl)
    ours = quoted(made, length, ttl=ttl, id=packets.identification(sent))
    received = nat.translate_inbound(packets.error(ROUTER, EXTERNAL, theirs, *kind, errors_header), 2.0)
    assert received == packets.error(ROUTER, ALICE.address, ours, *kind, errors_header)


@given(protocols, packets.payloads, packets.headers, packets.headers, lengths, kinds)
def test_an_error_by_the_client_quotes_what_the_server_sent(
    protocol: str, payload: bytes, header: Header, errors_header: Header, length: int, kind: tuple[int, int]
) -> None:
    nat, _, _, answer = flow(protocol, payload, header)
    got = nat.translate_inbound(answer, 2.0)
    error = packets.error(ALICE.address, SERVER.address, quoted(got, length), *kind, errors_header)
    sent = nat.translate_outbound(error, 3.0)
    if not errors_header.dont_fragment:
        errors_header = errors_header._replace(identification=packets.identification(sent))
    assert sent == packets.error(EXTERNAL, SERVER.address, quoted(answer, length), *kind, errors_header)


def refused(nat: Nat, error: bytes) -> str:
    with pytest.raises(Dropped) as dropped:
        nat.translate_inbound(error, 2.0)
    return dropped.value.reason


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_wrong_checksum_of_the_error_or_of_the_quoted_header_is_dropped(protocol: str) -> None:
    nat, _, sent, _ = flow(protocol, b"payload")
    genuine = packets.error(ROUTER, EXTERNAL, sent)
    damaged = bytearray(genuine)
    damaged[-1] ^= 1
    assert refused(nat, bytes(damaged)) == "bad_transport_checksum"
    quotation = bytearray(sent)
    quotation[10] ^= 1  # the header checksum itself; the error's own is right
    assert refused(nat, packets.error(ROUTER, EXTERNAL, bytes(quotation))) == "bad_ip_checksum"
    assert nat.translate_inbound(genuine, 2.0), "the genuine one still passes"


def test_the_checksum_of_the_quoted_payload_is_nobodys_business() -> None:
    """RFC 5508 REQ-3 c: it is seldom there as a whole."""
    nat, made, sent, _ = flow("udp", b"payload")
    theirs, ours = bytearray(sent), bytearray(made)
    theirs[-1] ^= 1
    ours[-1] ^= 1
    received = nat.translate_inbound(packets.error(ROUTER, EXTERNAL, bytes(theirs)), 2.0)
    assert received == packets.error(ROUTER, ALICE.address, bytes(ours))


@pytest.mark.parametrize("length", range(28))
def test_a_quotation_without_ports_is_dropped(length: int) -> None:
    nat, _, sent, _ = flow("udp", b"payload")
    assert refused(nat, packets.error(ROUTER, EXTERNAL, sent[:length])) == "truncated"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_error_about_a_flow_that_does_not_live_is_dropped(protocol: str) -> None:
    nat, _, sent, _ = flow(protocol)
    error = packets.error(ROUTER, EXTERNAL, sent)
    nat.expire(10_000.0)
    assert refused(nat, error) == "icmp_error_unmatched"


@given(st.integers(0, 2**32 - 1).filter(lambda sequence: sequence != 1000))
def test_an_error_about_a_segment_that_is_not_in_flight_is_dropped(sequence: int) -> None:
    """RFC 5927 §4.1: who guesses the ports must guess the sequence number as well."""
    nat, _, sent, _ = flow("tcp")
    forged = packets.tcp(packets.source(sent), SERVER, "S", sequence)
    assert refused(nat, packets.error(ROUTER, EXTERNAL, forged)) == "icmp_error_unmatched"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_errors_keep_nothing_alive_and_end_nothing(protocol: str) -> None:
    nat, _, sent, _ = flow(protocol)
    before = nat.mappings(50.0)[0].expires_in
    nat.translate_inbound(packets.error(ROUTER, EXTERNAL, sent), 50.0)
    assert nat.mappings(50.0)[0].expires_in == before
