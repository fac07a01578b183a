"""The DNS proxy on loopback, between clients and resolvers that answer as a test tells them."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from ipaddress import IPv4Address, IPv4Network
from typing import cast

import dns.message
import dns.name
import dns.rcode
import dns.rrset
import dns.tsig

from tidegate.dns import DnsProxy, DnsServer

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
    """A resolver that answers as instructed, over UDP and TCP; over UDP somebody may answer `before`."""

    keyring: dict[dns.name.Name, dns.tsig.Key] | None = None

    def __init__(self, answer: Answer, before: Answer = silent, *, tcp: bool = True) -> None:
        self.answer = answer
        self.tcp = tcp
        self.before = before
        self.gate = asyncio.Event()
        """Closed, it holds back what is answered over TCP."""
        self.gate.set()
        self.probes = 0
        """How often it was asked whether it is there. What follows is of clients' queries."""
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
                if query.question[0].name == dns.name.root:
                    resolver.probes += 1
                else:
                    resolver.ids.append(query.id)
                    resolver.ports.append(source[1])
                for told in (resolver.before(query), resolver.answer(query)):
                    if told is not None:
                        self.transport.sendto(told, source)

        async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            (length,) = struct.unpack("!H", await reader.readexactly(2))
            told = resolver.answer(dns.message.from_wire(await reader.readexactly(length)))
            await resolver.gate.wait()
            if told is not None:
                writer.write(struct.pack("!H", len(told)) + told)
            writer.close()

        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            Udp, local_addr=("127.0.0.1", 0)
        )
        self.address = transport.get_extra_info("sockname")
        server = await asyncio.start_server(converse, *self.address)
        if not self.tcp:
            server.close()
        try:
            yield self
        finally:
            transport.close()
            server.close()


@asynccontextmanager
async def proxy(
    *resolvers: Resolver, timeout: float = 2.0, clients: IPv4Network = LOOPBACK, max_in_flight: int = 1024
) -> AsyncIterator[DnsServer]:
    """The proxy on a port of its own, in front of the resolvers. Where none of them is to answer, `timeout` may be
    short; else it is nothing that a busy machine takes."""
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
    server: DnsServer, wire: bytes, patience: float = 5.0, source: str = "127.0.0.1"
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


def query(name: str = "example.com.", kind: str = "A", **arguments: int) -> dns.message.Message:
    return dns.message.make_query(name, kind, **arguments)  # type: ignore[arg-type]


def run(scenario: Callable[[], object]) -> None:
    asyncio.run(scenario())  # type: ignore[arg-type]
