"""The DNS proxy between a client and fake resolvers on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import cast

import dns.edns
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rrset
import dns.tsig
import dns.tsigkeyring
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.dns import DnsProxy, DnsServer, choose_upstreams
from tidegate.dns.message import MalformedError, parse_query
from tidegate.errors import ConflictError

LOOPBACK = IPv4Network("127.0.0.0/8")
Answer = Callable[[dns.message.Message], "bytes | None"]


def good(query: dns.message.Message) -> bytes:
    response = dns.message.make_response(query)
    response.answer.append(dns.rrset.from_text(query.question[0].name, 60, "IN", "A", "192.0.2.80"))
    return response.to_wire()


def big(query: dns.message.Message) -> bytes:
    response = dns.message.make_response(query)
    texts = [f'"{"x" * 200}{number}"' for number in range(10)]
    response.answer.append(dns.rrset.from_text(query.question[0].name, 60, "IN", "TXT", *texts))
    return response.to_wire(max_size=65535)


def servfail(query: dns.message.Message) -> bytes:
    response = dns.message.make_response(query)
    response.set_rcode(dns.rcode.SERVFAIL)
    return response.to_wire()


def silent(_query: dns.message.Message) -> None:
    return None


class Resolver:
    """A resolver that answers as it is told, over UDP and TCP."""

    keyring: dict[dns.name.Name, dns.tsig.Key] | None = None

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.ids: list[int] = []
        self.ports: list[int] = []
        self.address: tuple[str, int] = ("127.0.0.1", 0)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Resolver]:
        resolver = self

        class Udp(asyncio.DatagramProtocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                self.transport = cast(asyncio.DatagramTransport, transport)  # no subclass of it in CPython

            def datagram_received(self, data: bytes, source: tuple[str, int]) -> None:
                query = dns.message.from_wire(data, keyring=resolver.keyring)
                resolver.ids.append(query.id)
                resolver.ports.append(source[1])
                told = resolver.answer(query)
                if told is not None:
                    self.transport.sendto(told, source)

        async def tcp(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            (length,) = struct.unpack("!H", await reader.readexactly(2))
            told = resolver.answer(dns.message.from_wire(await reader.readexactly(length)))
            if told is not None:
                writer.write(struct.pack("!H", len(told)) + told)
            writer.close()

        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            Udp, local_addr=("127.0.0.1", 0)
        )
        self.address = transport.get_extra_info("sockname")
        server = await asyncio.start_server(tcp, *self.address)
        try:
            yield self
        finally:
            transport.close()
            server.close()


@asynccontextmanager
async def proxy(
    *resolvers: Resolver, timeout: float = 0.2, clients: IPv4Network = LOOPBACK, max_in_flight: int = 1024
) -> AsyncIterator[DnsServer]:
    """The proxy on a port of its own, in front of the resolvers."""
    async with contextlib.AsyncExitStack() as stack:
        for resolver in resolvers:
            await stack.enter_async_context(resolver.running())
        upstreams = [resolver.address for resolver in resolvers]
        inner = DnsProxy(upstreams, timeout=timeout, max_in_flight=max_in_flight)
        server = DnsServer(inner, IPv4Address("127.0.0.1"), clients, port=0)
        server.open()
        stack.callback(server.close)
        task = asyncio.create_task(server.run())
        await asyncio.sleep(0.02)
        try:
            yield server
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class _Catch(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.got: asyncio.Queue[bytes] = asyncio.Queue()

    def datagram_received(self, data: bytes, _source: object) -> None:
        self.got.put_nowait(data)


async def ask(
    server: DnsServer, wire: bytes, patience: float = 2.0, source: str = "127.0.0.1"
) -> bytes | None:
    """One datagram to the proxy; what comes back."""
    transport, catch = await asyncio.get_running_loop().create_datagram_endpoint(
        _Catch, local_addr=(source, 0), remote_addr=("127.0.0.1", server.port)
    )
    try:
        transport.sendto(wire)
        async with asyncio.timeout(patience):
            return await catch.got.get()
    except TimeoutError:
        return None
    finally:
        transport.close()


def query(name: str = "example.com.", kind: str = "A", **arguments: int) -> dns.message.Message:
    return dns.message.make_query(name, kind, **arguments)  # type: ignore[arg-type]


def run(scenario: Callable[[], object]) -> None:
    asyncio.run(scenario())  # type: ignore[arg-type]


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
        async with proxy(dead, alive) as server:
            for _ in range(3):
                wire = await ask(server, query().to_wire())
                assert wire is not None
                assert dns.message.from_wire(wire).rcode() == dns.rcode.NOERROR
            assert len(dead.ids) == 1, "the one that answered last is asked first"
            assert server.counters()["upstream_timeout"] == 1

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
        async with proxy(dead, alive) as server, other.running():
            assert await ask(server, query().to_wire()) is not None
            server._proxy.set_upstreams([other.address, alive.address])
            assert await ask(server, query().to_wire()) is not None
            assert (len(other.ids), len(alive.ids)) == (1, 1)

    run(scenario)


def test_a_query_under_way_says_nothing_about_resolvers_that_are_set_meanwhile() -> None:
    async def scenario() -> None:
        dead, alive, one, two = Resolver(silent), Resolver(good), Resolver(good), Resolver(good)
        async with proxy(dead, alive, timeout=0.2) as server, one.running(), two.running():
            under_way = asyncio.create_task(ask(server, query().to_wire()))
            await asyncio.sleep(0.05)
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
                [resolver.address for resolver in old], find_upstreams=lambda: [new.address], timeout=0.1
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
        async with proxy(Resolver(servfail), Resolver(silent)) as server:
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
        lambda asked: struct.pack("!HHHHHH", asked.id, 0x8180, 1, 1, 0, 0) + b"\xc0\x0c" * 9,
    ],
    ids=["other id", "other name", "other type", "a query", "too short", "garbage"],
)
def test_an_answer_that_does_not_fit_the_question_does_not_count(forge: Answer) -> None:
    async def scenario() -> None:
        async with proxy(Resolver(forge), Resolver(good)) as server:
            wire = await ask(server, query().to_wire())
            assert wire is not None
            assert dns.message.from_wire(wire).answer[0][0].address == "192.0.2.80"
            assert server.counters()["upstream_mismatch"] == 1
            assert server.counters()["upstream_timeout"] == 1

    run(scenario)


def test_case_of_names_does_not_matter_in_answers() -> None:
    async def scenario() -> None:
        upper: Answer = lambda asked: good(dns.message.make_query("EXAMPLE.com.", "A", id=asked.id))  # noqa: E731
        async with proxy(Resolver(upper)) as server:
            assert await ask(server, query().to_wire(), 0.5) is not None

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
        for resolver, told in ((Resolver(big), dns.flags.TC), (Resolver(silent), 0)):
            async with proxy(resolver, timeout=0.05) as server:
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


async def ask_over_tcp(server: DnsServer, *wires: bytes, close_early: bool = False) -> list[bytes]:
    """Several queries on one connection, sent before the first answer is read."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        for wire in wires:
            writer.write(struct.pack("!H", len(wire)) + wire)
        if close_early:
            writer.write_eof()
        answers = []
        async with asyncio.timeout(3):
            for _ in wires:
                (length,) = struct.unpack("!H", await reader.readexactly(2))
                answers.append(await reader.readexactly(length))
        return answers
    finally:
        writer.close()


@pytest.mark.parametrize("close_early", [False, True])
def test_queries_are_pipelined_on_one_tcp_connection(close_early: bool) -> None:
    async def scenario() -> None:
        async with proxy(Resolver(good)) as server:
            asked = [query(f"host{number}.example.") for number in range(40)]
            answers = await ask_over_tcp(server, *(one.to_wire() for one in asked), close_early=close_early)
            assert {dns.message.from_wire(wire).id for wire in answers} == {one.id for one in asked}
            assert server.counters()["queries_tcp"] == 40

    run(scenario)


def test_an_idle_tcp_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidegate.dns.server.TCP_IDLE_TIMEOUT", 0.1)

    async def scenario() -> None:
        async with proxy(Resolver(good)) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            async with asyncio.timeout(2):
                assert await reader.read() == b""
            writer.close()

    run(scenario)


async def connect(server: DnsServer, source: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", server.port, local_addr=(source, 0))


async def is_refused(server: DnsServer, source: str) -> bool:
    """Whether a new connection is closed at once."""
    reader, writer = await connect(server, source)
    try:
        async with asyncio.timeout(0.5):
            return await reader.read() == b""
    except TimeoutError:
        return False
    finally:
        writer.close()


def test_tcp_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidegate.dns.server.MAX_TCP_CONNECTIONS", 2)

    async def scenario() -> None:
        async with proxy(Resolver(good)) as server:
            held = [await connect(server, f"127.0.0.{number}") for number in (1, 2)]
            await asyncio.sleep(0.05)
            assert await is_refused(server, "127.0.0.3")
            assert server.counters()["tcp_connections_refused"] == 1
            for _, writer in held:
                writer.close()
            await asyncio.sleep(0.05)
            assert not await is_refused(server, "127.0.0.3")

    run(scenario)


def test_an_open_tcp_connection_ends_with_the_server_and_without_complaint() -> None:
    complaints: list[object] = []

    async def scenario() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        async with proxy(Resolver(good)) as server:
            reader, writer = await connect(server, "127.0.0.1")
            await asyncio.sleep(0.02)
        async with asyncio.timeout(1):
            assert await reader.read() == b""
        writer.close()

    run(scenario)
    assert complaints == []


def test_one_source_cannot_hold_all_tcp_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidegate.dns.server.MAX_TCP_CONNECTIONS", 16)

    async def scenario() -> None:
        async with proxy(Resolver(good)) as server:
            held = [await connect(server, "127.0.0.1") for _ in range(2)]
            await asyncio.sleep(0.05)
            assert await is_refused(server, "127.0.0.1")
            assert not await is_refused(server, "127.0.0.2")
            assert server.counters()["tcp_connections_over_share"] == 1
            for _, writer in held:
                writer.close()

    run(scenario)


def test_queries_in_flight_are_bounded() -> None:
    async def scenario() -> None:
        async with proxy(Resolver(silent), timeout=0.5, max_in_flight=3) as server:
            sources = [f"127.0.0.{number}" for number in range(1, 6)]
            asked = (ask(server, query().to_wire(), 1.5, source) for source in sources)
            answers = await asyncio.gather(*asked)
            assert sum(answer is not None for answer in answers) == 3
            assert server.counters()["overloaded"] == 2

    run(scenario)


def test_one_source_cannot_hold_all_queries_in_flight() -> None:
    async def scenario() -> None:
        async with proxy(Resolver(silent), timeout=0.5, max_in_flight=16) as server:
            greedy = (ask(server, query().to_wire(), 1.5) for _ in range(20))
            *answers, others = await asyncio.gather(*greedy, ask(server, query().to_wire(), 1.5, "127.0.0.2"))
            assert others is not None
            assert sum(answer is not None for answer in answers) == 2
            assert server.counters()["over_share"] == 18
            assert await ask(server, query().to_wire(), 1.5) is not None, "its places are given back"

    run(scenario)


def test_sources_outside_the_vpn_get_silence() -> None:
    async def scenario() -> None:
        async with proxy(Resolver(good), clients=IPv4Network("10.66.77.0/24")) as server:
            assert await ask(server, query().to_wire(), 0.3) is None
            assert server.counters()["refused_source"] == 1

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


def test_a_port_that_is_taken_is_named_with_the_remedy() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        server = DnsServer(DnsProxy([]), IPv4Address("127.0.0.1"), LOOPBACK, port=other.getsockname()[1])
        with pytest.raises(ConflictError, match=r"is in use: TCP .* \[dns\] enabled = false"):
            server.open()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.bind(other.getsockname())  # the UDP one was given back


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
