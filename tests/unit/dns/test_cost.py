"""No message takes the proxy long, whoever wrote it: everything else in the gateway's Python waits meanwhile."""

from __future__ import annotations

import asyncio
import struct

import dns.edns
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rrset
import dns.tsigkeyring
import pytest

from tests.unit.dns import costly
from tests.unit.dns.loopback import Answer, Resolver, ask, ask_over_tcp, good, proxy, query, run, silent
from tests.unit.running import until
from tidegate.dns import DnsProxy
from tidegate.dns.message import MAX_QUERY_BYTES, replace_id

CLIENT = "127.0.0.1"
LONG_NAME = b"\x01a" * 112 + b"\0"
ZEROES = b"\x01\0" * 127 + b"\0"
"""A name all of whose endings have the same hash in dnspython."""


@pytest.mark.parametrize("over_tcp", [False, True], ids=["UDP", "TCP"])
@pytest.mark.parametrize("section", [costly.ANSWER, costly.AUTHORITY, costly.ADDITIONAL])
@pytest.mark.parametrize(
    "records",
    [costly.colliding(350, LONG_NAME), costly.with_long_names(300, LONG_NAME)],
    ids=["names that collide", "long names"],
)
def test_a_query_full_of_records_is_refused_unread(
    records: list[bytes], section: int, over_tcp: bool
) -> None:
    wire = costly.message(costly.QUERY, LONG_NAME, records, section)

    async def scenario() -> None:
        inner = DnsProxy([])

        async def handle() -> None:
            answer = await inner.answer(wire, CLIENT, over_tcp=over_tcp)
            assert answer is not None
            response = dns.message.from_wire(answer)
            assert (response.id, response.rcode()) == (7, dns.rcode.FORMERR)

        assert await costly.cost(handle) < costly.PROMISED

    run(scenario)


@pytest.mark.parametrize(
    "counts",
    [(0, 0, 0, 0), (2, 0, 0, 0), (1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, 3), (1, 0, 0, 65535)],
    ids=str,
)
def test_a_query_with_counts_that_no_query_has_gets_formerr(counts: tuple[int, ...]) -> None:
    whole = query().to_wire()
    answer_of = struct.pack("!H", 7) + whole[2:4] + struct.pack("!HHHH", *counts) + whole[12:]

    async def scenario() -> None:
        inner = DnsProxy([])
        answer = await inner.answer(answer_of, CLIENT, over_tcp=False)
        assert answer is not None
        assert dns.message.from_wire(answer).rcode() == dns.rcode.FORMERR
        assert inner.counters["malformed"] == 1

    run(scenario)


def padded(length: int) -> bytes:
    def with_padding(size: int) -> bytes:
        padding = dns.edns.GenericOption(dns.edns.OptionType.PADDING, bytes(size))
        one = dns.message.make_query("example.com.", "A", use_edns=0, payload=1232, options=[padding])
        return one.to_wire(max_size=65535)

    return with_padding(length - len(with_padding(0)))


def test_the_largest_query_is_forwarded_and_a_larger_one_is_not() -> None:
    async def scenario() -> None:
        async with proxy(Resolver(good)) as server:
            for length, rcode in (
                (MAX_QUERY_BYTES, dns.rcode.NOERROR),
                (MAX_QUERY_BYTES + 1, dns.rcode.FORMERR),
            ):
                wire = padded(length)
                assert len(wire) == length
                answer = await ask(server, wire)
                assert answer is not None
                assert dns.message.from_wire(answer).rcode() == rcode

    run(scenario)


def test_a_query_with_both_edns_and_a_signature_is_forwarded() -> None:
    key = dns.tsigkeyring.from_text({"key.example.": "c2VjcmV0"})
    one = query(use_edns=0, payload=1232)
    one.use_tsig(key)

    async def scenario() -> None:
        class Signing(Resolver):
            keyring = key

        async with proxy(Signing(good)) as server:
            answer = await ask(server, one.to_wire())
            assert answer is not None
            assert dns.message.from_wire(answer, keyring=key, request_mac=one.mac).had_tsig

    run(scenario)


def test_a_source_without_a_place_gets_nothing_parsed() -> None:
    async def scenario() -> None:
        resolver = Resolver(silent)
        async with resolver.running():
            inner = DnsProxy([resolver.address], timeout=30, max_in_flight=8)  # one for each source
            waiting = asyncio.create_task(inner.answer(query().to_wire(), CLIENT, over_tcp=False))
            await until(lambda: bool(resolver.ids))
            cut_off = query().to_wire()[:-1]
            assert await inner.answer(cut_off, CLIENT, over_tcp=False) is None
            assert (inner.counters["over_share"], inner.counters["malformed"]) == (1, 0)
            assert await inner.answer(cut_off, "127.0.0.2", over_tcp=False) is not None
            assert await inner.answer(cut_off, "127.0.0.2", over_tcp=False) is not None, (
                "it gave its place back"
            )
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)

    run(scenario)


def answer_of(records: list[bytes], section: int) -> Answer:
    whole = costly.message(costly.RESPONSE, LONG_NAME, records, section)
    return lambda asked: replace_id(whole, asked.id)


def many_questions(asked: dns.message.Message) -> bytes:
    return costly.with_many_questions(asked.id, LONG_NAME, 10_000)


@pytest.mark.parametrize("over_tcp", [False, True], ids=["UDP", "TCP"])
@pytest.mark.parametrize(
    "told",
    [
        answer_of(costly.colliding(350, LONG_NAME), costly.ANSWER),
        answer_of(costly.colliding(1600, LONG_NAME), costly.ADDITIONAL),
        answer_of(costly.with_long_names(300, LONG_NAME), costly.AUTHORITY),
    ],
    ids=["names that collide", "64 KB of names that collide", "long names"],
)
def test_an_answer_full_of_records_passes_unread(told: Answer, over_tcp: bool) -> None:
    async def scenario() -> None:
        resolver = Resolver(told)
        async with resolver.running():
            inner = DnsProxy([resolver.address], timeout=30)
            asked = costly.message(costly.QUERY, LONG_NAME, [], costly.ANSWER)
            whole = told(dns.message.from_wire(asked))

            async def handle() -> None:
                answer = await inner.answer(asked, CLIENT, over_tcp=over_tcp)
                assert answer is not None
                assert answer == whole if over_tcp else dns.message.from_wire(answer).flags & dns.flags.TC

            assert await costly.cost(handle) < costly.PROMISED

    run(scenario)


@pytest.mark.parametrize("over_tcp", [False, True], ids=["UDP", "TCP"])
def test_an_answer_with_many_questions_is_none(over_tcp: bool) -> None:
    async def scenario() -> None:
        resolver = Resolver(many_questions)
        async with resolver.running():
            inner = DnsProxy([resolver.address], timeout=0.2)
            asked = costly.message(costly.QUERY, LONG_NAME, [], costly.ANSWER)

            async def handle() -> None:
                answer = await inner.answer(asked, CLIENT, over_tcp=over_tcp)
                assert answer is not None
                assert dns.message.from_wire(answer).rcode() == dns.rcode.SERVFAIL

            assert await costly.cost(handle) < costly.PROMISED
            assert inner.counters["upstream_mismatch"]

    run(scenario)


def too_big(asked: dns.message.Message) -> bytes:
    return replace_id(costly.message(costly.RESPONSE, ZEROES, [b"x" * 600], costly.ANSWER), asked.id)


@pytest.mark.parametrize(
    ("told", "flags"), [(silent, 0), (too_big, dns.flags.TC)], ids=["failed", "truncated"]
)
def test_an_answer_that_is_made_here_costs_no_more_for_an_odd_name(told: Answer, flags: int) -> None:
    async def scenario() -> None:
        resolver = Resolver(told)
        async with resolver.running():
            inner = DnsProxy([resolver.address], timeout=30 if flags else 0.05)
            asked = costly.message(costly.QUERY, ZEROES, [], costly.ANSWER)

            async def handle() -> None:
                answer = await inner.answer(asked, CLIENT, over_tcp=False)
                assert answer is not None
                response = dns.message.from_wire(answer)
                assert response.question == dns.message.from_wire(asked).question
                assert response.flags & dns.flags.TC == flags

            assert await costly.cost(handle) < costly.PROMISED

    run(scenario)


def signed_keys(asked: dns.message.Message) -> bytes:
    """As the answer for a zone's keys, with their signatures."""
    response = dns.message.make_response(asked)
    response.flags |= dns.flags.AD
    owner = asked.question[0].name
    keys = [
        f"{flags} 3 8 {letter * 344}" for flags, letter in ((257, "A"), (256, "B"), (256, "C"), (256, "D"))
    ]
    response.answer.append(dns.rrset.from_text(owner, 60, "IN", "DNSKEY", *keys))
    signatures = [f"DNSKEY 8 2 60 20300101000000 20200101000000 {n} {owner} {'s' * 344}" for n in range(4)]
    response.answer.append(dns.rrset.from_text(owner, 60, "IN", "RRSIG", *signatures))
    return response.to_wire(max_size=4096)


def texts(asked: dns.message.Message) -> bytes:
    """Almost as large as an answer can be."""
    response = dns.message.make_response(asked)
    strings = [f'"{"x" * 240}{number}"' for number in range(240)]
    response.answer.append(dns.rrset.from_text(asked.question[0].name, 60, "IN", "TXT", *strings))
    return response.to_wire(max_size=65535)


def test_ordinary_large_answers_pass_unchanged() -> None:
    async def scenario() -> None:
        one = query(kind="DNSKEY", use_edns=0, payload=4096, want_dnssec=True)
        keys = signed_keys(one)
        assert 2000 < len(keys) <= 4096
        async with proxy(Resolver(lambda asked: replace_id(keys, asked.id))) as server:
            assert await ask(server, one.to_wire()) == keys
            assert await ask_over_tcp(server, one.to_wire()) == [keys]
        one = query(kind="TXT", use_edns=0, payload=4096)
        whole = texts(one)
        assert len(whole) > 60_000
        async with proxy(Resolver(lambda asked: replace_id(whole, asked.id))) as server:
            assert await ask_over_tcp(server, one.to_wire()) == [whole]
            short = await ask(server, one.to_wire())
            assert short is not None
            response = dns.message.from_wire(short)
            assert response.flags & dns.flags.TC
            assert (response.question, response.edns) == (one.question, 0)

    run(scenario)
