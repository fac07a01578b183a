"""A gateway's name is looked up although the tunnel's resolver is out of reach."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from ipaddress import IPv4Address

import dns.message
import dns.rrset
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.unit.dns import costly
from tests.unit.dns.loopback import Resolver, good, servfail, silent
from tidegate.endpoint_search import EndpointCandidates, _addresses_in, resolve_again
from tidegate.errors import HostNetworkError
from tidegate.host.names import resolve
from tidegate.net import Endpoint

NAME = Endpoint("vpn.example", 51820)
OWN = IPv4Address("10.66.77.2")
Answer = Callable[[dns.message.Message], "bytes | None"]


@pytest.fixture(autouse=True)
def _the_hosts_own_look_up_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidegate.endpoint_search.TIMEOUT", 1.0)

    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", fail)


def alias(query: dns.message.Message) -> bytes:
    response = dns.message.make_response(query)
    name = query.question[0].name
    response.answer.append(dns.rrset.from_text(name, 60, "IN", "CNAME", "host.example."))
    response.answer.append(dns.rrset.from_text("host.example.", 60, "IN", "A", "192.0.2.81"))
    return response.to_wire()


def empty(query: dns.message.Message) -> bytes:
    return dns.message.make_response(query).to_wire()


def of_another_kind(query: dns.message.Message) -> bytes:
    """An answer to a NOTIFY (opcode 4, RFC 1996), with the question of the query."""
    wire = bytearray(good(query))
    wire[2] |= 4 << 3
    return bytes(wire)


def cut_off(query: dns.message.Message) -> bytes:
    return good(query)[:-3]


def saying(*addresses: str) -> Answer:
    def answer(query: dns.message.Message) -> bytes:
        response = dns.message.make_response(query)
        response.answer.append(dns.rrset.from_text(query.question[0].name, 60, "IN", "A", *addresses))
        return response.to_wire()

    return answer


def find(*answers: Answer) -> IPv4Address:
    async def scenario() -> IPv4Address:
        resolvers = [Resolver(answer) for answer in answers]
        async with contextlib.AsyncExitStack() as stack:
            for resolver in resolvers:
                await stack.enter_async_context(resolver.running())
            return await resolve_again(NAME, [resolver.address for resolver in resolvers], 0, OWN)

    return asyncio.run(scenario())


def test_the_resolvers_of_before_are_asked_one_after_the_other() -> None:
    assert find(good) == IPv4Address("192.0.2.80")
    assert find(silent, servfail, empty, alias) == IPv4Address("192.0.2.81")


@pytest.mark.parametrize("odd", [of_another_kind, cut_off], ids=["another kind", "cut off"])
def test_an_odd_answer_is_none_and_the_next_resolver_is_asked(odd: Answer) -> None:
    assert find(odd, good) == IPv4Address("192.0.2.80")
    with pytest.raises(HostNetworkError, match=r"vpn\.example cannot be resolved"):
        find(odd)


NOWHERE = ["0.0.0.0", "224.0.0.1", "255.255.255.255", str(OWN)]


@pytest.mark.parametrize("address", NOWHERE)
def test_an_address_at_which_no_gateway_can_be_is_no_answer(address: str) -> None:
    """As a DNS filter gives it: another resolver may have none."""
    assert find(saying(address), good) == IPv4Address("192.0.2.80")
    assert find(saying(address, "192.0.2.80")) == IPv4Address("192.0.2.80")
    with pytest.raises(HostNetworkError, match="Temporary failure"):
        find(saying(address))


@pytest.mark.parametrize("address", NOWHERE)
def test_nor_is_it_one_of_the_hosts_own_resolver(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    answers = [address]

    def look_up(*_: object, **__: object) -> list[object]:
        return [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", (each, NAME.port)) for each in answers]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    refused = rf"vpn\.example resolves to {address}, which is no gateway's address"
    with pytest.raises(HostNetworkError, match=refused):
        asyncio.run(resolve(NAME, OWN))
    with pytest.raises(HostNetworkError, match=refused):
        find()
    assert find(good) == IPv4Address("192.0.2.80"), "another resolver may know better"
    answers.append("127.0.0.1")
    assert asyncio.run(resolve(NAME, OWN)) == IPv4Address("127.0.0.1"), (
        "a relay may be there (udp2raw, wstunnel)"
    )


GOOD = good(dns.message.make_query(NAME.host, "A"))


@given(st.binary() | st.tuples(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=4)))
@example((2, b"\xa0"))
def test_whatever_is_written_in_an_answer_raises_nothing(written: bytes | tuple[int, bytes]) -> None:
    if isinstance(written, bytes):
        wire = written
    else:
        at, damage = written
        wire = GOOD[:at] + damage + GOOD[at + len(damage) :]
    assert all(isinstance(address, IPv4Address) for address in _addresses_in(wire))


QUESTION = costly.name(NAME.host)


@pytest.mark.parametrize("section", [costly.ANSWER, costly.AUTHORITY, costly.ADDITIONAL])
@pytest.mark.parametrize(
    ("records", "promised"),
    [
        (costly.colliding(350, QUESTION), costly.PROMISED),
        (costly.with_long_names(300, QUESTION), costly.PROMISED),
        (costly.colliding(10, QUESTION, letters=8), 4 * costly.PROMISED),
        (costly.with_long_names(14, QUESTION), 4 * costly.PROMISED),
    ],
    ids=["names that collide", "long names", "as many that collide as fit", "as many that are long as fit"],
)
def test_an_answer_full_of_records_does_not_hold_the_client_up(
    records: list[bytes], promised: float, section: int
) -> None:
    wire = costly.message(costly.RESPONSE, QUESTION, records, section)

    async def handle() -> None:
        assert _addresses_in(wire) == []

    assert asyncio.run(costly.cost(handle)) < promised


def test_as_many_addresses_as_there_is_room_for_are_an_answer() -> None:
    def crowded(query: dns.message.Message) -> bytes:
        response = dns.message.make_response(query)
        addresses = [f"192.0.2.{number}" for number in range(100, 129)]
        response.answer.append(dns.rrset.from_text(query.question[0].name, 60, "IN", "A", *addresses))
        wire = response.to_wire(max_size=512)
        assert len(wire) > 490
        return wire

    assert IPv4Address("192.0.2.100") <= find(crowded) <= IPv4Address("192.0.2.128")


def test_other_sections_do_not_matter() -> None:
    def complete(query: dns.message.Message) -> bytes:
        response = dns.message.from_wire(good(query))
        response.authority.append(dns.rrset.from_text("example.", 60, "IN", "NS", "ns.example."))
        response.additional.append(dns.rrset.from_text("ns.example.", 60, "IN", "A", "192.0.2.53"))
        return response.to_wire()

    assert find(complete) == IPv4Address("192.0.2.80")


def test_where_nobody_knows_it_the_hosts_own_refusal_is_told() -> None:
    with pytest.raises(HostNetworkError, match=r"vpn\.example cannot be resolved: Temporary failure"):
        find(silent, empty)
    with pytest.raises(HostNetworkError):
        find()


OLD, NEW, HEARD, AGAIN = (f"192.0.2.{number}" for number in (2, 3, 9, 10))


@pytest.mark.parametrize(
    ("steps", "targets"),
    [
        ([(OLD, OLD), (OLD, OLD)], [OLD, OLD]),
        ([(OLD, OLD), (NEW, OLD), (NEW, NEW)], [OLD, NEW, NEW]),
        ([(OLD, HEARD), (OLD, OLD), (OLD, HEARD), (OLD, OLD)], [OLD, HEARD, OLD, HEARD]),
        ([(OLD, HEARD), (NEW, OLD), (NEW, NEW)], [OLD, NEW, NEW]),
        ([(OLD, HEARD), (OLD, AGAIN), (OLD, OLD)], [OLD, OLD, AGAIN]),
        ([(OLD, None), (OLD, HEARD), (OLD, None), (OLD, OLD)], [OLD, OLD, OLD, HEARD]),
    ],
    ids=["one place", "moved", "in turns", "the name has news", "roamed again", "unknown"],
)
def test_a_gateway_is_called_where_its_name_says_and_where_it_was_heard_in_turns(
    steps: list[tuple[str, str | None]], targets: list[str]
) -> None:
    """Steps are what the name resolves to, and where the last attempt went without an answer."""
    candidates = EndpointCandidates((OLD, 1))
    found = [candidates.next((named, 1), (called, 1) if called else None) for named, called in steps]
    assert [host for host, _ in found] == targets
