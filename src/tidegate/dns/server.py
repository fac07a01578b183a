"""Receives queries over UDP and TCP (RFC 7766) on the gateway's own address.

Only the VPN's own addresses get answers: the host accepts packets for the gateway's address from any interface, and a
proxy that answers everybody is an amplifier.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
from ipaddress import AddressValueError, IPv4Address, IPv4Network

import structlog

from tidegate.dns.places import Places, Turns
from tidegate.dns.proxy import DnsProxy
from tidegate.dns.resolvers import DNS_PORT
from tidegate.host.ports import explain_bind

log = structlog.get_logger("tidegate.dns")

TCP_IDLE_TIMEOUT = 10.0  # seconds, RFC 7766 §6.2.3: a few seconds
MAX_TCP_CONNECTIONS = 128
MAX_PIPELINED = 16
"""Queries of one TCP connection that are forwarded at the same time (RFC 7766 §6.2.1.1)."""
TCP_QUERY_RATE = 500.0
TCP_QUERY_BURST = 128
"""Queries that all TCP connections of a source ask, per second and at once; the others wait, and the client in the end
with them. The engine allows a client as many over UDP (`DNS_RATE`, engine/src/gateway/dns_rate.rs), but does not see
queries inside connections."""
DATAGRAMS_PER_TURN = 16
"""Datagrams that one turn of the event loop reads at most. asyncio's own transport reads one, and what a client asks
over TCP makes turns long."""
RECEIVE_BUFFER = 1 << 20
"""Bytes that the UDP socket asks for; the kernel doubles them, and charges a short query some 800. So some twenty
clients can ask for as much at once as the engine lets one (`DNS_BURST`, engine/src/gateway/dns_rate.rs)."""
MAX_DATAGRAM_BYTES = 65_535
_SO_RCVBUFFORCE = 33  # asm-generic/socket.h; Python has no name for it

_WITHOUT_DNS = "turn the DNS proxy off with --no-dns or [dns] enabled = false"
_HINTS = {
    errno.EADDRINUSE: f"stop it, or {_WITHOUT_DNS}",
    errno.EADDRNOTAVAIL: "it is the gateway's own, on its TUN device: does a network manager remove it?",
}
"""What to do about a socket that cannot be bound."""


class DnsServer:
    """Sockets around a `DnsProxy`. `run` is a task for the Supervisor; the sockets exist from `open` to
    `close`."""

    def __init__(
        self, proxy: DnsProxy, address: IPv4Address, clients: IPv4Network, *, port: int = DNS_PORT
    ) -> None:
        self._proxy = proxy
        self._address = address
        self._clients = clients
        self._port = port
        self._udp: socket.socket | None = None
        self._tcp: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        # The bound on queries says how many files may be open, and connections need some as well.
        self._connections = Places(min(MAX_TCP_CONNECTIONS, proxy.max_in_flight))
        self._turns = Turns(TCP_QUERY_RATE, TCP_QUERY_BURST)

    @property
    def port(self) -> int:
        return self._port

    def open(self) -> None:
        """Binds both sockets, or neither. Raises the error that `explain_bind` returns."""
        with contextlib.ExitStack() as undo:
            self._udp = undo.enter_context(self._bound(socket.SOCK_DGRAM))
            _enlarge(self._udp)
            self._port = self._udp.getsockname()[1]  # TCP uses the same one, even if the kernel chose it
            self._tcp = undo.enter_context(self._bound(socket.SOCK_STREAM))
            self._tcp.listen()
            undo.pop_all()

    def _bound(self, kind: socket.SocketKind) -> socket.socket:
        bound = socket.socket(socket.AF_INET, kind | socket.SOCK_NONBLOCK)
        try:
            if kind == socket.SOCK_STREAM:
                # Connections in TIME_WAIT do no harm.
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((str(self._address), self._port))
        except OSError as cause:
            bound.close()
            name = "TCP" if kind == socket.SOCK_STREAM else "UDP"
            hint = _HINTS.get(cause.errno or 0, _WITHOUT_DNS)
            raise explain_bind(cause, name, str(self._address), self._port, hint=hint) from cause
        return bound

    async def run(self) -> None:
        """Answers until cancelled."""
        if self._udp is None or self._tcp is None:
            raise RuntimeError("DnsServer.run before open")
        loop = asyncio.get_running_loop()
        server: asyncio.Server | None = None
        loop.add_reader(self._udp, self._receive, self._udp)
        try:
            server = await asyncio.start_server(self._accept, sock=self._tcp)
            await loop.create_future()  # until cancelled
        finally:
            loop.remove_reader(self._udp)
            if server is not None:
                server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def close(self) -> None:
        """Closes the sockets. Idempotent."""
        for bound in (self._udp, self._tcp):
            if bound is not None:
                bound.close()
        self._udp = self._tcp = None

    def counters(self) -> dict[str, int]:
        """How often each of `DNS_EVENTS` has occurred."""
        return dict(self._proxy.counters.items())

    def _is_client(self, address: str) -> bool:
        """Whether a source is one of the VPN's addresses; others are counted, and get no answer."""
        with contextlib.suppress(AddressValueError):
            if IPv4Address(address) in self._clients:
                return True
        self._proxy.counters["refused_source"] += 1
        return False

    def _receive(self, udp: socket.socket) -> None:
        """Takes up what has come over UDP; the proxy bounds how many queries there are."""
        for _ in range(DATAGRAMS_PER_TURN):
            try:
                query, source = udp.recvfrom(MAX_DATAGRAM_BYTES)
            except BlockingIOError:
                return
            except OSError as cause:
                log.debug("a DNS query could not be received", cause=str(cause))
                return
            if self._is_client(source[0]) and self._proxy.admit(source[0], over_tcp=False):
                self._keep(asyncio.create_task(self._answer_datagram(query, source, udp)))

    async def _answer_datagram(self, query: bytes, source: tuple[str, int], udp: socket.socket) -> None:
        answer = await self._proxy.answer_admitted(query, source[0], over_tcp=False)
        if answer is not None:
            try:
                udp.sendto(answer, source)
            except OSError as cause:  # its client asks again
                self._proxy.counters["unsent"] += 1
                log.debug("a DNS answer could not be sent", cause=str(cause))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (cause := task.exception()) is not None:
            self._proxy.counters["failed"] += 1
            log.error("a DNS query failed unexpectedly", cause=repr(cause))

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Not a coroutine: asyncio would make a task of it, and Python 3.11 logs an error for each one that is
        cancelled."""
        peer = writer.get_extra_info("peername")
        if not peer or not self._is_client(peer[0]):
            self._proxy.counters["tcp_connections_refused"] += 1
            writer.close()
            return
        source: str = peer[0]
        if (refusal := self._connections.take(source)) is not None:
            self._proxy.counters[
                "tcp_connections_over_share" if refusal == "over_share" else "tcp_connections_refused"
            ] += 1
            writer.close()
            return

        def hung_up(_task: object) -> None:
            writer.transport.abort()  # close would wait for ever for a client that reads nothing
            self._connections.give_back(source)

        task = asyncio.create_task(self._converse(source, reader, writer))
        task.add_done_callback(hung_up)
        self._keep(task)

    async def _converse(
        self, source: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """One TCP connection: several queries, answered as their answers come (RFC 7766 §7)."""
        pipeline = asyncio.Semaphore(MAX_PIPELINED)
        try:
            async with asyncio.TaskGroup() as answering:
                while (query := await _read_query(reader)) is not None:
                    await pipeline.acquire()
                    # Zero seconds are a turn of the event loop, too: no more than one query in each.
                    await asyncio.sleep(self._turns.take(source, asyncio.get_running_loop().time()))
                    answering.create_task(self._answer_over_tcp(query, source, writer, pipeline))
            writer.close()
            async with asyncio.timeout(TCP_IDLE_TIMEOUT):
                await writer.wait_closed()  # keeps its place while there are answers to be read
        except* (OSError, TimeoutError):
            pass  # the client does not read its answers

    async def _answer_over_tcp(
        self, query: bytes, source: str, writer: asyncio.StreamWriter, pipeline: asyncio.Semaphore
    ) -> None:
        try:
            answer = await self._proxy.answer(query, source, over_tcp=True)
            if answer is None:
                return
            if writer.transport.is_closing():
                # The client waits for the other answers no more than for this one, whose writing asyncio would log.
                raise ConnectionResetError("the client has reset the connection")
            writer.write(struct.pack("!H", len(answer)) + answer)
            async with asyncio.timeout(TCP_IDLE_TIMEOUT):
                await writer.drain()
        finally:
            pipeline.release()


def _enlarge(udp: socket.socket) -> None:
    """Gives the socket its receive buffer; no more than net.core.rmem_max where the process may not exceed that, as in
    a user namespace."""
    try:
        udp.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, RECEIVE_BUFFER)
    except PermissionError:
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)


async def _read_query(reader: asyncio.StreamReader) -> bytes | None:
    """The next query of a connection; `None` when the client is done, gone or silent. Pending answers are still sent: a
    client may close its own direction after its last query."""
    try:
        async with asyncio.timeout(TCP_IDLE_TIMEOUT):
            (length,) = struct.unpack("!H", await reader.readexactly(2))  # RFC 1035 §4.2.2
            return await reader.readexactly(length)
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        return None
