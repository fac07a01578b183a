"""Carries one query to a resolver and its answer back.

Resolvers are asked in order, each for `timeout` seconds, beginning with the one that answered last; when none
answers, the client gets SERVFAIL. What is in flight is bounded, for each source and in all; beyond it queries
are dropped and counted: clients ask again.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import dns.rcode

from tidegate.dns.message import (
    RETRY_ELSEWHERE,
    MalformedError,
    Query,
    failure,
    parse_query,
    rcode_of,
    truncate,
)
from tidegate.dns.places import Places
from tidegate.dns.resolvers import Resolver
from tidegate.dns.upstream import ask_tcp, ask_udp

MAX_IN_FLIGHT = 1024
TIMEOUT = 2.0  # seconds for each resolver


class DnsProxy:
    """Answers queries, whatever they came over."""

    def __init__(
        self, upstreams: Sequence[Resolver], *, timeout: float = TIMEOUT, max_in_flight: int = MAX_IN_FLIGHT
    ) -> None:
        self._upstreams = list(upstreams)
        self._timeout = timeout
        self._in_flight = Places(max_in_flight)
        self._preferred = 0
        self.counters: Counter[str] = Counter()
        """queries_udp, queries_tcp, answered, malformed, servfail, truncated, overloaded, over_share,
        refused_source, upstream_timeout, upstream_error, upstream_mismatch, tcp_connections_refused,
        tcp_connections_over_share."""

    def set_upstreams(self, upstreams: Sequence[Resolver]) -> None:
        """Asks other resolvers from the next query on. May be called from another thread."""
        self._upstreams = list(upstreams)

    async def answer(self, wire: bytes, source: str, *, over_tcp: bool) -> bytes | None:
        """The answer to a query's bytes, which came from the address `source`; `None`: silence."""
        self.counters["queries_tcp" if over_tcp else "queries_udp"] += 1
        try:
            query = parse_query(wire)
        except MalformedError as malformed:
            self.counters["malformed"] += 1
            return malformed.answer
        if (refusal := self._in_flight.take(source)) is not None:
            self.counters["over_share" if refusal == "over_share" else "overloaded"] += 1
            return None
        try:
            found = await self._forward(query, over_tcp)
        finally:
            self._in_flight.give_back(source)
        if over_tcp:
            return found
        fitting = truncate(found, query)
        self.counters["truncated"] += fitting is not found
        return fitting

    async def _forward(self, query: Query, over_tcp: bool) -> bytes:
        ask = ask_tcp if over_tcp else ask_udp
        last: bytes | None = None
        upstreams, first = self._upstreams, self._preferred  # others may be set while this query waits
        for offset in range(len(upstreams)):
            index = (first + offset) % len(upstreams)
            try:
                async with asyncio.timeout(self._timeout):
                    found = await ask(query, upstreams[index], self.counters)
            except TimeoutError:
                self.counters["upstream_timeout"] += 1
            except OSError:
                self.counters["upstream_error"] += 1
            else:
                if rcode_of(found) not in RETRY_ELSEWHERE:
                    self._preferred = index
                    self.counters["answered"] += 1
                    return found
                last = last or found
        self.counters["servfail"] += 1
        return last or failure(query, dns.rcode.SERVFAIL)
