"""Asks one resolver one question, over UDP or TCP.

Each query leaves from a new socket (so from a port that the kernel picks at random) with a random id, and only an
answer from that resolver, with that id and that question, counts (RFC 5452 §9); others are ignored until the time is
up.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import struct

from tidegate.dns.events import DnsCounters
from tidegate.dns.message import Query, answers, replace_id
from tidegate.dns.resolvers import Resolver


class _UdpExchange(asyncio.DatagramProtocol):
    def __init__(self, query: Query, number: int, counters: DnsCounters) -> None:
        self._query = query
        self._number = number
        self._counters = counters
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, _address: object) -> None:
        if self.answer.done():
            return
        if answers(data, self._query, self._number):
            self.answer.set_result(data)
        else:
            self._counters["upstream_mismatch"] += 1

    def error_received(self, cause: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(cause)


async def ask_udp(query: Query, resolver: Resolver, counters: DnsCounters, fwmark: int = 0) -> bytes:
    """The resolver's answer, with the query's own id. The query carries `fwmark`, unless that is 0. Raises `OSError`
    (refused, unreachable, no permission for the mark); the caller sets the time limit."""
    number = secrets.randbelow(1 << 16)
    transport, exchange = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: _UdpExchange(query, number, counters), sock=_connected(resolver, fwmark)
    )
    try:
        transport.sendto(query.with_id(number))
        return replace_id(await exchange.answer, query.id)
    finally:
        transport.close()


def _connected(resolver: Resolver, fwmark: int) -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        if fwmark:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, fwmark)
        made.connect(resolver)
    except OSError:
        made.close()
        raise
    return made


async def ask_tcp(query: Query, resolver: Resolver, counters: DnsCounters) -> bytes:
    """As `ask_udp`, over TCP (RFC 7766)."""
    number = secrets.randbelow(1 << 16)
    reader, writer = await asyncio.open_connection(*resolver)
    try:
        wire = query.with_id(number)
        writer.write(struct.pack("!H", len(wire)) + wire)  # RFC 1035 §4.2.2
        (length,) = struct.unpack("!H", await reader.readexactly(2))
        answer = await reader.readexactly(length)
    except asyncio.IncompleteReadError as cause:
        raise ConnectionResetError("the resolver closed the connection") from cause
    finally:
        writer.close()
    if not answers(answer, query, number):
        counters["upstream_mismatch"] += 1
        raise ConnectionResetError("the resolver's answer does not fit the question")
    return replace_id(answer, query.id)
