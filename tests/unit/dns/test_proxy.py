"""Queries and answers: whom the proxy asks, what counts as an answer, and what a client gets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from ipaddress import IPv4Address
from pathlib import Path

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.tsigkeyring
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.dns.loopback import (
    Answer,
    Resolver,
    ask,
    ask_over_tcp,
    big,
    good,
    proxy,
    query,
    run,
    servfail,
    silent,
)
from tests.unit.running import until
from tidegate.dns import DnsProxy, DnsServer, choose_upstreams, in_flight_within
from tidegate.dns.message import MalformedError, parse_query


def test_a_query_is_answered_with_its_own_id_and_asked_with_another() -> None:
    async def scenario() -> None:
        resolver = Resolver(good)
        async with proxy(resolver) as server:
            asked = [query() for _ in range(20)]
            for one in asked:
                wire = await ask(server, one.to_wire())
                assert wire is not None
                response = dns.message.from_wire(wire)
                assert response.id == one.id
                assert response.answer[0][0].address == "192.0.2.80"
            assert len(set(resolver.ids)) > 15, "ids are to be random"
            assert len(set(resolver.ports)) > 15, "source ports are to be random"
            assert [one.id for one in asked] != resolver.ids
            assert server.counters()["answered"] == 20

    run(scenario)


def test_a_silent_resolver_is_passed_over_for_the_next_and_remembered() -> None:
    async def scenario() -> None:
        dead, alive = Resolver(silent), Resolver(good)
        async with proxy(dead, alive, timeout=1) as server:
            for _ in range(3):
                wire = await ask(server, query().to_wire())
                assert wire is not None
                assert dns.message.from_wire(wire).rcode() == dns.rcode.NOERROR
            assert len(dead.ids) == 1, "it is passed over for a while"
            assert server.counters()["upstream_timeout"] == 1

    run(scenario)


def refused(asked: dns.message.Message) -> bytes:
    response = dns.message.make_response(asked)
    response.set_rcode(dns.rcode.REFUSED)
    return response.to_wire()


def not_implemented(asked: dns.message.Message) -> bytes:
    response = dns.message.make_response(asked)
    response.set_rcode(dns.rcode.NOTIMP)
    return response.to_wire()


def unknown(asked: dns.message.Message) -> bytes:
    response = dns.message.make_response(asked)
    response.set_rcode(dns.rcode.NXDOMAIN)
    return response.to_wire()


def only(name: str, otherwise: Answer) -> Answer:
    """Knows a name, and answers `otherwise` to all others."""
    return lambda asked: (good if str(asked.question[0].name) == name else otherwise)(asked)


async def rcode(server: DnsServer, name: str) -> dns.rcode.Rcode:
    wire = await ask(server, query(name).to_wire())
    assert wire is not None
    return dns.message.from_wire(wire).rcode()


@pytest.mark.parametrize("odd", [servfail, refused, not_implemented])
def test_what_a_resolver_answers_does_not_change_who_is_asked_first(odd: Answer) -> None:
    """A name for which the first one has an error must not take its own names from everybody."""

    async def scenario() -> None:
        internal = Resolver(only("intranet.corp.", odd))
        public = Resolver(only("odd.example.", unknown))
        async with proxy(internal, public) as server:
            assert await rcode(server, "odd.example.") == dns.rcode.NOERROR
            assert await rcode(server, "intranet.corp.") == dns.rcode.NOERROR
            assert (len(internal.ids), len(public.ids)) == (2, 1)

    run(scenario)


def test_an_error_of_the_one_after_a_silent_resolver_is_not_held_against_it() -> None:
    async def scenario() -> None:
        dead, internal, public = Resolver(silent), Resolver(only("intranet.corp.", refused)), Resolver(good)
        async with proxy(dead, internal, public, timeout=1) as server:
            assert await rcode(server, "odd.example.") == dns.rcode.NOERROR
            assert await rcode(server, "intranet.corp.") == dns.rcode.NOERROR
            assert [len(asked.ids) for asked in (dead, internal, public)] == [1, 2, 1]

    run(scenario)


def test_a_silent_resolver_is_asked_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        internal, public = Resolver(silent), Resolver(unknown)
        async with proxy(internal, public, timeout=1) as server:
            monkeypatch.setattr("tidegate.dns.proxy.PASSED_OVER", 1.0)
            assert await rcode(server, "intranet.corp.") == dns.rcode.NXDOMAIN
            internal.answer = good
            since = asyncio.get_running_loop().time()
            while await rcode(server, "intranet.corp.") == dns.rcode.NXDOMAIN:
                # Answers of the second one do not prolong it.
                assert asyncio.get_running_loop().time() - since < 5
                await asyncio.sleep(0.1)
            assert len(public.ids) > 1, "it was asked at once"

    run(scenario)


def test_a_resolver_that_answers_others_is_not_silent() -> None:
    async def scenario() -> None:
        internal, public = Resolver(only("intranet.corp.", silent)), Resolver(unknown)
        async with proxy(internal, public, timeout=1) as server:
            slow = asyncio.create_task(rcode(server, "slow.example."))
            await until(lambda: bool(internal.ids))
            assert await rcode(server, "intranet.corp.") == dns.rcode.NOERROR
            assert await slow == dns.rcode.NXDOMAIN
            assert await rcode(server, "intranet.corp.") == dns.rcode.NOERROR

    run(scenario)


def knows_the_root(otherwise: Answer) -> Answer:
    """Knows the name servers of the root, as any resolver does."""
    return lambda asked: (good if asked.question[0].name == dns.name.root else otherwise)(asked)


def test_a_name_whose_servers_are_silent_does_not_make_its_resolver_silent() -> None:
    """Any client can ask for one, when nobody else asks for anything."""

    async def scenario() -> None:
        internal = Resolver(knows_the_root(only("intranet.corp.", silent)))
        public = Resolver(unknown)
        async with proxy(internal, public, timeout=1) as server:
            slow = (rcode(server, f"{number}.slow.example.") for number in range(20))
            assert await asyncio.gather(*slow) == [dns.rcode.NXDOMAIN] * 20
            assert await rcode(server, "intranet.corp.") == dns.rcode.NOERROR
            assert internal.probes == 1, "for all of them"
            assert public.probes == 0, "nobody comes after it"
            assert server.counters()["upstream_timeout"] == 20

    run(scenario)


def test_a_resolver_is_probed_only_where_its_silence_matters() -> None:
    async def scenario() -> None:
        quick, alone = Resolver(good), Resolver(silent)
        async with proxy(quick, Resolver(good), timeout=0.2) as server:
            assert await rcode(server, "example.") == dns.rcode.NOERROR
            await asyncio.sleep(0.3)
        async with proxy(alone, timeout=0.2) as server:
            assert await rcode(server, "example.") == dns.rcode.SERVFAIL
        assert (quick.probes, alone.probes) == (0, 0)

    run(scenario)


def test_a_resolver_without_tcp_is_still_asked_first() -> None:
    async def scenario() -> None:
        internal, public = Resolver(good, tcp=False), Resolver(unknown)
        async with proxy(internal, public) as server:
            (answer,) = await ask_over_tcp(server, query("odd.example.").to_wire())
            assert dns.message.from_wire(answer).rcode() == dns.rcode.NXDOMAIN
            assert await rcode(server, "intranet.corp.") == dns.rcode.NOERROR

    run(scenario)


def test_a_resolver_that_refuses_the_connection_is_passed_over_at_once() -> None:
    async def scenario() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as closed:
            closed.bind(("127.0.0.1", 0))
            nobody = closed.getsockname()
        alive = Resolver(good)
        async with alive.running():
            inner = DnsProxy([nobody, alive.address], timeout=30)
            async with asyncio.timeout(5):
                wire = await inner.answer(query().to_wire(), "127.0.0.1", over_tcp=False)
            assert wire is not None
            assert inner.counters["upstream_error"] == 1

    run(scenario)


def test_when_nobody_answers_the_client_gets_servfail() -> None:
    async def scenario() -> None:
        async with proxy(Resolver(silent), Resolver(silent), timeout=0.05) as server:
            one = query()
            wire = await ask(server, one.to_wire())
            assert wire is not None
            response = dns.message.from_wire(wire)
            assert (response.id, response.rcode()) == (one.id, dns.rcode.SERVFAIL)
            assert response.question == one.question
        async with proxy() as server:  # no resolver is known at all
            wire = await ask(server, query().to_wire())
            assert wire is not None
            assert dns.message.from_wire(wire).rcode() == dns.rcode.SERVFAIL

    run(scenario)


def test_other_resolvers_are_asked_from_the_first_on() -> None:
    async def scenario() -> None:
        dead, alive, other = Resolver(silent), Resolver(good), Resolver(good)
        async with proxy(dead, alive, timeout=1) as server, other.running():
            assert await ask(server, query().to_wire()) is not None
            server._proxy.set_upstreams([other.address, alive.address])
            assert await ask(server, query().to_wire()) is not None
            assert (len(other.ids), len(alive.ids)) == (1, 1)

    run(scenario)


def test_a_query_under_way_says_nothing_about_resolvers_that_are_set_meanwhile() -> None:
    async def scenario() -> None:
        dead, alive, one, two = Resolver(silent), Resolver(good), Resolver(good), Resolver(good)
        async with proxy(dead, alive, timeout=1) as server, one.running(), two.running():
            under_way = asyncio.create_task(ask(server, query().to_wire()))
            await until(lambda: bool(dead.ids))
            server._proxy.set_upstreams([one.address, two.address])
            assert await under_way is not None
            assert len(alive.ids) == 1
            assert await ask(server, query().to_wire()) is not None
            assert (len(one.ids), len(two.ids)) == (1, 0)

    run(scenario)


@pytest.mark.parametrize("before", [[], [silent]], ids=["none known", "the old one is silent"])
def test_where_nobody_answers_the_resolvers_are_looked_up_anew(before: list[Answer]) -> None:
    async def scenario() -> None:
        new = Resolver(good)
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(new.running())
            old = [await stack.enter_async_context(Resolver(answer).running()) for answer in before]
            inner = DnsProxy(
                [resolver.address for resolver in old], find_upstreams=lambda: [new.address], timeout=1
            )
            for _ in range(3):
                wire = await inner.answer(query().to_wire(), "127.0.0.1", over_tcp=False)
                assert wire is not None
                assert dns.message.from_wire(wire).rcode() == dns.rcode.NOERROR
            assert len(new.ids) == 3
            assert inner.counters["answered"] == 3
            assert inner.counters["upstream_timeout"] == len(before), "the old one is asked no more"

    run(scenario)


def test_looking_up_resolvers_is_bounded() -> None:
    looks = 0

    def find() -> list[tuple[str, int]]:
        nonlocal looks
        looks += 1
        return []

    async def scenario() -> None:
        inner = DnsProxy([], find_upstreams=find)
        for _ in range(20):
            wire = await inner.answer(query().to_wire(), "127.0.0.1", over_tcp=False)
            assert wire is not None
            assert dns.message.from_wire(wire).rcode() == dns.rcode.SERVFAIL

    run(scenario)
    assert looks == 1


def test_servfail_of_one_resolver_is_not_the_last_word() -> None:
    async def scenario() -> None:
        async with proxy(Resolver(servfail), Resolver(good)) as server:
            wire = await ask(server, query().to_wire())
            assert wire is not None
            assert dns.message.from_wire(wire).rcode() == dns.rcode.NOERROR
        async with proxy(Resolver(servfail), Resolver(silent), timeout=0.2) as server:
            wire = await ask(server, query().to_wire())
            assert wire is not None
            assert dns.message.from_wire(wire).rcode() == dns.rcode.SERVFAIL

    run(scenario)


@pytest.mark.parametrize(
    "forge",
    [
        lambda asked: b"\xff\xff" + good(asked)[2:] if asked.id != 0xFFFF else b"\0\0" + good(asked)[2:],
        lambda asked: good(dns.message.make_query("evil.example.", "A", id=asked.id)),
        lambda asked: good(dns.message.make_query(asked.question[0].name, "AAAA", id=asked.id)),
        lambda asked: asked.to_wire(),
        lambda asked: asked.to_wire()[:2] + b"\x80",
        lambda asked: asked.to_wire()[:2] + b"\xa1" + good(asked)[3:],
        lambda asked: struct.pack("!HHHHHH", asked.id, 0x8180, 1, 1, 0, 0) + b"\xc0\x0c" * 9,
    ],
    ids=["other id", "other name", "other type", "a query", "too short", "other kind", "garbage"],
)
def test_an_answer_that_does_not_fit_the_question_does_not_count(forge: Answer) -> None:
    async def scenario() -> None:
        async with proxy(Resolver(good, before=forge)) as server:
            wire = await ask(server, query().to_wire())
            assert wire is not None
            assert dns.message.from_wire(wire).answer[0][0].address == "192.0.2.80"
            assert server.counters()["upstream_mismatch"] == 1

    run(scenario)


def test_case_of_names_does_not_matter_in_answers() -> None:
    async def scenario() -> None:
        upper: Answer = lambda asked: good(dns.message.make_query("EXAMPLE.com.", "A", id=asked.id))  # noqa: E731
        async with proxy(Resolver(upper)) as server:
            assert await ask(server, query().to_wire()) is not None

    run(scenario)


def test_an_answer_larger_than_the_client_takes_is_truncated_and_whole_over_tcp() -> None:
    async def scenario() -> None:
        async with proxy(Resolver(big)) as server:
            for one, limit in ((query(kind="TXT"), 512), (query(kind="TXT", use_edns=0, payload=1232), 1232)):
                wire = await ask(server, one.to_wire())
                assert wire is not None
                assert len(wire) <= limit
                response = dns.message.from_wire(wire)
                assert response.flags & dns.flags.TC
                assert response.id == one.id
                assert not response.answer
            large = query(kind="TXT", use_edns=0, payload=4096)
            wire = await ask(server, large.to_wire())
            assert wire is not None
            assert not dns.message.from_wire(wire).flags & dns.flags.TC
            assert server.counters()["truncated"] == 2
            (answer,) = await ask_over_tcp(server, query(kind="TXT").to_wire())
            assert len(dns.message.from_wire(answer).answer[0]) == 10

    run(scenario)


@pytest.mark.parametrize("checking_disabled", [0, dns.flags.CD], ids=["CD=0", "CD=1"])
def test_answers_that_are_made_here_give_back_the_cd_bit(checking_disabled: int) -> None:
    """RFC 4035 §3.2.2."""
    one = query(kind="TXT")
    one.flags |= checking_disabled

    async def scenario() -> None:
        for resolver, timeout, told in ((Resolver(big), 2, dns.flags.TC), (Resolver(silent), 0.05, 0)):
            async with proxy(resolver, timeout=timeout) as server:
                wire = await ask(server, one.to_wire())
                assert wire is not None
                flags = dns.message.from_wire(wire).flags
                assert flags & (dns.flags.CD | dns.flags.TC) == checking_disabled | told
        malformed = await DnsProxy([]).answer(one.to_wire()[:-1], "127.0.0.1", over_tcp=False)
        assert malformed is not None
        assert dns.message.from_wire(malformed).flags & dns.flags.CD == checking_disabled

    run(scenario)


def test_a_query_with_a_signature_is_forwarded_with_it() -> None:
    """RFC 8945 §5.5: the key is not ours, so it is not ours to check."""
    key = dns.tsigkeyring.from_text({"key.example.": "c2VjcmV0"})
    one = query()
    one.use_tsig(key)

    async def scenario() -> None:
        class Signing(Resolver):
            """Has the key; what it gets has another id, which a signature allows for."""

            keyring = key

        async with proxy(Signing(good)) as server:
            wire = await ask(server, one.to_wire())
            assert wire is not None
            answer = dns.message.from_wire(wire, keyring=key, request_mac=one.mac)
            assert answer.had_tsig
            assert answer.answer[0][0].address == "192.0.2.80"

    run(scenario)


def test_truncation_by_the_resolver_is_passed_to_the_client() -> None:
    def truncated(asked: dns.message.Message) -> bytes:
        response = dns.message.make_response(asked)
        response.flags |= dns.flags.TC
        return response.to_wire()

    async def scenario() -> None:
        async with proxy(Resolver(truncated)) as server:
            wire = await ask(server, query().to_wire())
            assert wire is not None
            assert dns.message.from_wire(wire).flags & dns.flags.TC

    run(scenario)


def test_queries_in_flight_are_bounded() -> None:
    async def scenario() -> None:
        async with proxy(Resolver(silent), timeout=1, max_in_flight=3) as server:
            sources = [f"127.0.0.{number}" for number in range(1, 6)]
            asked = (ask(server, query().to_wire(), 2.5, source) for source in sources)
            answers = await asyncio.gather(*asked)
            assert sum(answer is not None for answer in answers) == 3
            assert server.counters()["overloaded"] == 2

    run(scenario)


@pytest.mark.parametrize(
    ("open_files", "queries"),
    [(64, 64), (1024, 64), (2560, 64), (4096, 102), (20_000, 500), (524_288, 1024), (1 << 30, 1024)],
)
def test_queries_in_flight_leave_most_open_files_to_others(open_files: int, queries: int) -> None:
    assert in_flight_within(open_files) == queries


def test_one_source_cannot_hold_all_queries_in_flight() -> None:
    async def scenario() -> None:
        async with proxy(Resolver(silent), timeout=1, max_in_flight=16) as server:
            greedy = (ask(server, query().to_wire(), 2.5) for _ in range(20))
            *answers, others = await asyncio.gather(*greedy, ask(server, query().to_wire(), 2.5, "127.0.0.2"))
            assert others is not None
            assert sum(answer is not None for answer in answers) == 2
            assert server.counters()["over_share"] == 18
            assert await ask(server, query().to_wire(), 2.5) is not None, "its places are given back"

    run(scenario)


@pytest.mark.parametrize(
    ("wire", "rcode"),
    [
        (b"", None),
        (b"\x12\x34", None),
        (struct.pack("!HHHHHH", 7, 0x8180, 1, 0, 0, 0), None),  # a response
        (struct.pack("!HHHHHH", 7, 0x2800, 1, 0, 0, 0), dns.rcode.NOTIMP),  # UPDATE
        (struct.pack("!HHHHHH", 7, 0x0100, 0, 0, 0, 0), dns.rcode.FORMERR),  # no question
        (struct.pack("!HHHHHH", 7, 0x0100, 2, 0, 0, 0), dns.rcode.FORMERR),  # two
        (struct.pack("!HHHHHH", 7, 0x0100, 1, 0, 0, 0) + b"\xc0\x0c\0\1\0\1", dns.rcode.FORMERR),  # a loop
        (struct.pack("!HHHHHH", 7, 0x0100, 1, 0, 0, 0) + b"\x3fabc", dns.rcode.FORMERR),  # cut off
    ],
)
def test_a_malformed_query_gets_formerr_or_silence(wire: bytes, rcode: dns.rcode.Rcode | None) -> None:
    async def scenario() -> None:
        inner = DnsProxy([])
        answer = await inner.answer(wire, "127.0.0.1", over_tcp=False)
        assert inner.counters["malformed"] == 1
        if rcode is None:
            assert answer is None
        else:
            assert answer is not None
            response = dns.message.from_wire(answer)
            assert (response.id, response.rcode()) == (7, rcode)
            assert response.flags & dns.flags.QR

    run(scenario)


@given(st.binary(max_size=100) | st.binary(max_size=60).map(lambda tail: query().to_wire()[:12] + tail))
def test_any_bytes_are_a_query_or_malformed(wire: bytes) -> None:
    with contextlib.suppress(MalformedError):
        assert parse_query(wire).wire == wire


def test_resolvers_come_from_settings_or_resolv_conf_and_never_loop(tmp_path: Path) -> None:
    own = IPv4Address("10.66.77.1")
    file = tmp_path / "resolv.conf"
    file.write_text(
        "# comment\nsearch example.com\nnameserver 10.66.77.1\nnameserver 192.0.2.53\n"
        "nameserver 2001:db8::1\nnameserver nonsense\nnameserver 192.0.2.54\nnameserver 192.0.2.53\n"
    )
    assert choose_upstreams((), own=own, resolv_conf=file) == [("192.0.2.53", 53), ("192.0.2.54", 53)]
    assert choose_upstreams((IPv4Address("192.0.2.9"),), own=own, resolv_conf=file) == [("192.0.2.9", 53)]
    assert choose_upstreams((), own=own, resolv_conf=tmp_path / "none") == []
