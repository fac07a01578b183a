"""Where a client's gateway is now: its name may have come to mean another address (dynamic DNS).

A dead tunnel must not keep its client from finding that out. The host's own resolver is asked first, but it is often
the tunnel's, or behind the tunnel. So the resolvers that the host has outside the tunnel, or had before it, are asked
next; their queries carry the mark that makes packets bypass the tunnel.
"""

from __future__ import annotations

import asyncio
import struct
from collections import Counter
from collections.abc import Sequence
from ipaddress import IPv4Address

import dns.exception
import dns.message
import dns.rdatatype

from tidegate.dns.message import HEADER_BYTES, MINIMUM_UDP_PAYLOAD, parse_query
from tidegate.dns.proxy import TIMEOUT
from tidegate.dns.resolvers import Resolver
from tidegate.dns.upstream import ask_udp
from tidegate.errors import HostNetworkError
from tidegate.host.names import can_be_a_gateway, resolve
from tidegate.net import Endpoint

SocketAddress = tuple[str, int]

MAX_ANSWER_BYTES = MINIMUM_UDP_PAYLOAD
"""What a server may send to a query without EDNS."""
MAX_ANSWER_RECORDS = 32
"""Aliases and addresses; as many addresses as there is room for."""


class EndpointCandidates:
    """The addresses at which to try a gateway that does not answer. Pure.

    There are two: the one its name resolves to, and the one it was last heard from (roaming, WireGuard whitepaper
    §2.1). Either may be out of date, so they take turns; but a name that resolves to a new address is believed.
    """

    def __init__(self, named: SocketAddress) -> None:
        self._named = named
        self._heard: SocketAddress | None = None

    def next(self, named: SocketAddress, called: SocketAddress | None) -> SocketAddress:
        """The address to try. `named` is what the name resolves to now, `called` where the last attempt went without an
        answer (`None`: unknown)."""
        if named != self._named:
            self._named, self._heard = named, None
        elif called == named and self._heard is not None:
            return self._heard
        elif called not in (None, named):
            self._heard = called
        return named


async def resolve_again(
    endpoint: Endpoint, resolvers: Sequence[Resolver], fwmark: int, own: IPv4Address
) -> IPv4Address:
    """The endpoint's current address. `own` is the tunnel's. May be cancelled. Raises `HostNetworkError`."""
    try:
        return await resolve(endpoint, own)
    except HostNetworkError:
        for resolver in resolvers:
            found = await _ask(endpoint.host, resolver, fwmark, own)
            if found is not None:
                return found
        raise


async def _ask(name: str, resolver: Resolver, fwmark: int, own: IPv4Address) -> IPv4Address | None:
    try:
        query = parse_query(dns.message.make_query(name, dns.rdatatype.A).to_wire())
        async with asyncio.timeout(TIMEOUT):
            wire = await ask_udp(query, resolver, Counter(), fwmark)
    except (OSError, TimeoutError, dns.exception.DNSException):
        return None
    return next((found for found in _addresses_in(wire) if can_be_a_gateway(found, own)), None)


def _addresses_in(wire: bytes) -> list[IPv4Address]:
    """The addresses in an answer. Never raises, and takes little time (see `tidegate.dns.message`):
    anybody on the path may have written the answer."""
    if not HEADER_BYTES <= len(wire) <= MAX_ANSWER_BYTES:
        return []
    questions, records = struct.unpack_from("!HH", wire, 4)
    if questions != 1 or records > MAX_ANSWER_RECORDS:
        return []
    alone = wire[:8] + bytes(4) + wire[HEADER_BYTES:]  # no other sections are counted, so none are parsed
    try:
        answer = dns.message.from_wire(alone, ignore_trailing=True)
        if not isinstance(answer, dns.message.QueryMessage):
            return []
        found = answer.resolve_chaining().answer  # past CNAMEs
    except (dns.exception.DNSException, ValueError, struct.error):  # as in `parse_query`
        return []
    return [IPv4Address(record.address) for record in found or ()]
