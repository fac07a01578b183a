"""Where a client's gateway is now: its name may have come to mean another address (dynamic DNS).

A tunnel that leads nowhere must not keep its client from finding that out. The host's own look-up is asked first; but
its resolver is often the tunnel's, or behind the tunnel. So those are asked next that the host has for what is outside,
or had before there was a tunnel, with the mark of what goes past it.
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

from tidegate.dns.message import parse_query
from tidegate.dns.proxy import TIMEOUT
from tidegate.dns.resolvers import Resolver
from tidegate.dns.upstream import ask_udp
from tidegate.errors import HostNetworkError
from tidegate.host.names import resolve
from tidegate.net import Endpoint

SocketAddress = tuple[str, int]


class Whereabouts:
    """Where to call a gateway that does not answer: pure.

    It may be where its name says, or where it was heard last (roaming, WireGuard whitepaper §2.1). Either may be out
    of date, so they take turns. A name that has come to mean another address has news, and is believed.
    """

    def __init__(self, named: SocketAddress) -> None:
        self._named = named
        self._heard: SocketAddress | None = None

    def next(self, named: SocketAddress, called: SocketAddress | None) -> SocketAddress:
        """`named` is what the name means now, `called` where the gateway was called in vain; `None`: unknown."""
        if named != self._named:
            self._named, self._heard = named, None
        elif called == named and self._heard is not None:
            return self._heard
        elif called not in (None, named):
            self._heard = called
        return named


async def find_anew(endpoint: Endpoint, resolvers: Sequence[Resolver], fwmark: int) -> IPv4Address:
    """The endpoint's address of this moment. May be cancelled. Raises `HostNetworkError`."""
    try:
        return await resolve(endpoint)
    except HostNetworkError:
        for resolver in resolvers:
            found = await _ask(endpoint.host, resolver, fwmark)
            if found is not None:
                return found
        raise


async def _ask(name: str, resolver: Resolver, fwmark: int) -> IPv4Address | None:
    try:
        query = parse_query(dns.message.make_query(name, dns.rdatatype.A).to_wire())
        async with asyncio.timeout(TIMEOUT):
            wire = await ask_udp(query, resolver, Counter(), fwmark)
    except (OSError, TimeoutError, dns.exception.DNSException):
        return None
    return _address_in(wire)


def _address_in(wire: bytes) -> IPv4Address | None:
    """The address that an answer gives. What a stranger on the way may have written raises nothing."""
    try:
        answer = dns.message.from_wire(wire)
        if not isinstance(answer, dns.message.QueryMessage):
            return None
        found = answer.resolve_chaining().answer  # past CNAMEs
    except (dns.exception.DNSException, ValueError, struct.error):  # as in `parse_query`
        return None
    return IPv4Address(found[0].address) if found else None
