"""The sockets in front of the proxy: TCP connections and their bounds, whose queries are heard, and ports."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from functools import cache
from ipaddress import IPv4Address, IPv4Network

import dns.message
import dns.rrset
import pytest

from tests.unit.dns.loopback import LOOPBACK, Resolver, ask, ask_over_tcp, good, proxy, query, run
from tests.unit.running import open_sockets, until
from tidegate.dns import DnsProxy, DnsServer
from tidegate.dns.events import DNS_EVENTS
from tidegate.dns.message import replace_id
from tidegate.dns.places import SHARES
from tidegate.dns.server import DATAGRAMS_PER_TURN, MAX_PIPELINED, _enlarge
from tidegate.errors import ConflictError, HostNetworkError


@pytest.mark.parametrize("close_early", [False, True])
def test_queries_are_pipelined_on_one_tcp_connection(close_early: bool) -> None:
    async def scenario() -> None:
        async with proxy(Resolver(good)) as server:
            asked = [query(f"host{number}.example.") for number in range(40)]
            answers = await ask_over_tcp(server, *(one.to_wire() for one in asked), close_early=close_early)
            assert {dns.message.from_wire(wire).id for wire in answers} == {one.id for one in asked}
            assert server.counters()["queries_tcp"] == 40

    run(scenario)


def test_every_event_is_counted_from_zero_on() -> None:
    async def scenario() -> None:
        async with proxy(Resolver(good)) as server:
            assert server.counters() == dict.fromkeys(DNS_EVENTS, 0)

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


def test_there_are_no_more_tcp_connections_than_queries() -> None:
    """Where few files may be open, connections take no more of them."""

    async def scenario() -> None:
        async with proxy(Resolver(good), max_in_flight=2) as server:
            held = [await connect(server, f"127.0.0.{number}") for number in (1, 2)]
            await asyncio.sleep(0.05)
            assert await is_refused(server, "127.0.0.3")
            for _, writer in held:
                writer.close()

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


@cache
def enormous_answer() -> bytes:
    """Almost as large as an answer can be."""
    response = dns.message.make_response(query(kind="TXT"))
    texts = [f'"{"x" * 240}{number}"' for number in range(240)]
    response.answer.append(dns.rrset.from_text("example.com.", 60, "IN", "TXT", *texts))
    return response.to_wire(max_size=65535)


def enormous(asked: dns.message.Message) -> bytes:
    return replace_id(enormous_answer(), asked.id)


@pytest.mark.parametrize(
    ("count", "then"),
    [(16, "waits"), (1, "waits"), (1, "says that it is done")],
    ids=["many answers", "one answer", "the last answer"],
)
def test_a_client_that_does_not_take_its_answers_is_gone_before_its_place_is_anothers(
    monkeypatch: pytest.MonkeyPatch, count: int, then: str
) -> None:
    monkeypatch.setattr("tidegate.dns.server.MAX_TCP_CONNECTIONS", SHARES)  # one for each source
    monkeypatch.setattr("tidegate.dns.server.TCP_IDLE_TIMEOUT", 3)  # `is_refused` waits for less

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with proxy(Resolver(enormous), timeout=2) as server:
            assert server._tcp is not None
            server._tcp.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least there is
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as deaf:
                deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
                before = open_sockets()
                await loop.sock_connect(deaf, ("127.0.0.1", server.port))
                for _ in range(count):
                    wire = query(kind="TXT").to_wire()
                    await loop.sock_sendall(deaf, struct.pack("!H", len(wire)) + wire)
                if then != "waits":
                    deaf.shutdown(socket.SHUT_WR)

                def has_answers_to_read() -> bool:
                    counted = server.counters()
                    return counted.get("queries_tcp") == count and counted.get("answered", 0) > 0

                await until(has_answers_to_read)
                assert await is_refused(server, "127.0.0.1")
                await until(lambda: open_sockets() <= before, seconds=20)
                assert not await is_refused(server, "127.0.0.1")

    run(scenario)


def test_answers_to_a_client_that_has_reset_its_connection_are_no_news(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """For each of them, asyncio would have a line in the log, which any client could have filled with these."""

    async def scenario() -> None:
        resolver = Resolver(good)
        resolver.gate.clear()
        async with proxy(resolver) as server:
            before = open_sockets()
            _, writer = await connect(server, "127.0.0.1")
            wire = query().to_wire()
            writer.write((struct.pack("!H", len(wire)) + wire) * MAX_PIPELINED)
            await until(lambda: server.counters().get("queries_tcp") == MAX_PIPELINED)
            await asyncio.sleep(0.1)  # and they have reached the resolver
            at_once = struct.pack("ii", 1, 0)  # with RST (SO_LINGER, socket(7))
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
            writer.transport.abort()
            await asyncio.sleep(0.05)
            resolver.gate.set()
            await until(lambda: open_sockets() <= before)
            assert server.counters()["answered"] > 0

    run(scenario)
    assert caplog.messages == []


def test_bursts_of_several_clients_wait_for_the_proxy() -> None:
    clients, burst = 8, 128

    async def scenario() -> None:
        server = DnsServer(DnsProxy([]), IPv4Address("127.0.0.1"), LOOPBACK, port=0)
        server.open()
        with contextlib.closing(server):
            for number in range(clients):
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                    client.bind((f"127.0.0.{2 + number}", 0))
                    for _ in range(burst):
                        client.sendto(b"no query", ("127.0.0.1", server.port))
            task = asyncio.create_task(server.run())
            try:
                await until(lambda: server.counters().get("queries_udp") == clients * burst)
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    run(scenario)


def test_a_process_without_privileges_gets_as_large_a_buffer_as_it_may() -> None:
    class Unprivileged(socket.socket):
        def setsockopt(self, level: int, option: int, value: int) -> None:  # type: ignore[override]
            if option != socket.SO_RCVBUF:
                raise PermissionError("Operation not permitted")
            super().setsockopt(level, option, value)

    with Unprivileged(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        before = udp.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        _enlarge(udp)
        assert udp.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) > before


def test_an_answer_that_the_kernel_refuses_is_counted() -> None:
    async def scenario() -> None:
        async with proxy(Resolver(good)) as server:
            assert server._udp is not None
            nowhere = ("127.0.0.1", 0)
            assert server._proxy.admit(nowhere[0], over_tcp=False)
            await server._answer_datagram(query().to_wire(), nowhere, server._udp)
            assert server.counters()["unsent"] == 1

    run(scenario)


async def turns_until(holds: Callable[[], bool]) -> int:
    """How many turns of the event loop it takes until the condition holds."""
    turns = 0
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0)
            turns += 1
    return turns


def test_datagrams_do_not_wait_for_a_turn_of_the_loop_each() -> None:
    """What one client asks over TCP can make turns long."""

    async def scenario() -> None:
        async with proxy() as server:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                for _ in range(2 * DATAGRAMS_PER_TURN):
                    client.sendto(b"no query", ("127.0.0.1", server.port))
            sent = 2 * DATAGRAMS_PER_TURN
            turns = await turns_until(lambda: server.counters().get("queries_udp") == sent)
            assert 2 <= turns <= 4, "all that have come, but a bounded number"

    run(scenario)


def test_a_tcp_connection_takes_a_turn_of_the_loop_for_each_query() -> None:
    async def scenario() -> None:
        async with proxy() as server:
            _, writer = await connect(server, "127.0.0.1")
            await asyncio.sleep(0.05)
            wire = b"\0" * 12  # answered at once
            writer.write((struct.pack("!H", len(wire)) + wire) * MAX_PIPELINED)
            turns = await turns_until(lambda: server.counters().get("queries_tcp") == MAX_PIPELINED)
            assert turns >= MAX_PIPELINED
            writer.close()

    run(scenario)


def test_the_tcp_connections_of_one_source_ask_no_faster_than_it_may_and_lose_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engine sees their connections, not their queries."""
    monkeypatch.setattr("tidegate.dns.server.TCP_QUERY_RATE", 100.0)
    monkeypatch.setattr("tidegate.dns.server.TCP_QUERY_BURST", 10)

    async def scenario() -> None:
        async with proxy(Resolver(good)) as server:
            began = asyncio.get_running_loop().time()
            wires = [query(f"host{number}.example.").to_wire() for number in range(30)]
            greedy = asyncio.gather(*(ask_over_tcp(server, *wires) for _ in range(2)))
            await until(lambda: server.counters().get("queries_tcp", 0) >= 10)
            _, writer = await connect(server, "127.0.0.2")
            writer.write((struct.pack("!H", 12) + b"\0" * 12) * 10)
            await until(
                lambda: server.counters().get("malformed") == 10
            )  # who is another, and waits for nobody
            assert not greedy.done()
            assert [len(answers) for answers in await greedy] == [30, 30]
            assert asyncio.get_running_loop().time() - began >= (60 - 10) / 100
            writer.close()

    run(scenario)


def test_sources_outside_the_vpn_get_silence() -> None:
    async def scenario() -> None:
        async with proxy(Resolver(good), clients=IPv4Network("10.66.77.0/24")) as server:
            assert await ask(server, query().to_wire(), 0.3) is None
            assert server.counters()["refused_source"] == 1

    run(scenario)


def test_a_port_that_is_taken_is_named_with_the_remedy() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        server = DnsServer(DnsProxy([]), IPv4Address("127.0.0.1"), LOOPBACK, port=other.getsockname()[1])
        with pytest.raises(ConflictError, match=r"is in use: TCP .*stop it, or .*\[dns\] enabled = false"):
            server.open()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.bind(other.getsockname())  # the UDP one was given back


def test_an_address_that_is_gone_is_told_as_such() -> None:
    server = DnsServer(DnsProxy([]), IPv4Address("198.51.100.1"), LOOPBACK, port=0)
    with pytest.raises(HostNetworkError) as told:
        server.open()
    assert "198.51.100.1 is not an address of this host; it is the gateway's own" in str(told.value)
    assert "stop it" not in str(told.value)
