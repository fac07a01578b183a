"""Forwards one query to a resolver, and its answer back.

Resolvers are asked in order, each for `timeout` seconds. Those that are silent or cannot be reached are passed over for
the next half minute; what one answers never changes whom others' queries go to: one client may ask for a name for which
the first resolver has only an error, and the second one need not know the names that the first one knows. Nor does one
name without an answer, whose servers may be to blame: silent is who answers nobody, and not our own probe either. (So
one that has lost its way out, and answers nothing but the probe, out of its cache, is not passed over: its names take
`timeout` longer. Otherwise one client's name could move everybody on a quiet gateway.) If none
answers, or none is known, the list is read again: the host may have moved to another network, or only just joined one.
If that does not help either, the client gets SERVFAIL. Queries in flight are bounded, per source and in total; those
beyond are dropped and counted: clients ask again.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager

import dns.rcode
import structlog

from tidegate.dns.events import none_yet
from tidegate.dns.message import (
    PROBE,
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

log = structlog.get_logger("tidegate.dns")

MAX_IN_FLIGHT = 1024
KEPT_FROM_PORTS = 256
"""Open files that the engine leaves to the rest of the process at least, beside the external ports; otherwise it leaves
a tenth (`budget`, engine/src/external/reservation.rs)."""
TIMEOUT = 2.0  # seconds for each resolver
LOOK_UP_PAUSE = 2.0
"""Minimum seconds from one reading of the resolver list until failed queries cause the next."""


PASSED_OVER = 30.0
"""Seconds after which a resolver that was silent is asked again."""


class _Upstreams:
    """The resolvers to ask, and which of them first. Kept together: a query that began with an older list must not
    change what is known about the new one."""

    def __init__(self, resolvers: Sequence[Resolver]) -> None:
        self.resolvers = list(resolvers)
        self._first = 0
        self._until = -math.inf
        self._heard_at = [-math.inf] * len(self.resolvers)
        self.probed: set[int] = set()
        """Those that a probe is under way to."""

    def in_turn(self, now: float) -> list[int]:
        """The indices of all, in the order in which to ask."""
        count, first = len(self.resolvers), self._first if now < self._until else 0
        return [(first + offset) % count for offset in range(count)]

    def heard(self, index: int, now: float) -> None:
        self._heard_at[index] = now

    def has_been_heard(self, index: int, since: float) -> bool:
        """Whether it answered anybody since."""
        return self._heard_at[index] >= since

    def begin_with(self, index: int, now: float) -> None:
        """Those before it are silent."""
        self._first, self._until = index, now + PASSED_OVER


def in_flight_within(open_files: int) -> int:
    """How many queries a process may have in flight that may have so many files open. Each needs a socket, and all
    together may use a quarter of what the external ports leave."""
    left = max(open_files // 10, KEPT_FROM_PORTS)
    return min(left // 4, MAX_IN_FLIGHT)


class DnsProxy:
    """Answers queries, whatever transport they came over."""

    def __init__(
        self,
        upstreams: Sequence[Resolver],
        *,
        find_upstreams: Callable[[], Sequence[Resolver]] | None = None,
        timeout: float = TIMEOUT,
        max_in_flight: int = MAX_IN_FLIGHT,
    ) -> None:
        """`find_upstreams` returns the current resolvers; it is called in a worker thread."""
        self._find_upstreams = find_upstreams
        self._looked_up_at = -math.inf
        self._timeout = timeout
        self.max_in_flight = max_in_flight
        self._in_flight = Places(max_in_flight)
        self.counters = none_yet()
        self.set_upstreams(upstreams)

    def set_upstreams(self, upstreams: Sequence[Resolver]) -> None:
        """Uses these resolvers from the next query on, in order. Can be called from another thread."""
        if not upstreams:
            log.warning("no DNS resolver is known: clients get SERVFAIL", hint="set [dns] upstreams")
        self._upstreams = _Upstreams(upstreams)

    async def look_up_upstreams(self) -> None:
        """Reads the list of resolvers again. If it is the same, nothing changes."""
        if self._find_upstreams is None:
            return
        self._looked_up_at = asyncio.get_running_loop().time()
        found = list(await asyncio.to_thread(self._find_upstreams))
        if found != self._upstreams.resolvers:
            log.info("the DNS resolvers have changed", resolvers=",".join(host for host, _ in found))
            self.set_upstreams(found)

    async def answer(self, wire: bytes, source: str, *, over_tcp: bool) -> bytes | None:
        """The answer to a query that came from the address `source`; `None`: send none."""
        if not self.admit(source, over_tcp=over_tcp):
            return None
        return await self.answer_admitted(wire, source, over_tcp=over_tcp)

    def admit(self, source: str, *, over_tcp: bool) -> bool:
        """Whether there is a place for a query from the address `source`; if so, `answer_admitted` has to follow, which
        gives it back. To be asked before anything is parsed or put off: that, too, is work for the one who asks."""
        self.counters["queries_tcp" if over_tcp else "queries_udp"] += 1
        refusal = self._in_flight.take(source)
        if refusal is not None:
            self.counters["over_share" if refusal == "over_share" else "overloaded"] += 1
        return refusal is None

    async def answer_admitted(self, wire: bytes, source: str, *, over_tcp: bool) -> bytes | None:
        """As `answer`, for a query that was admitted."""
        try:
            query = parse_query(wire)
            found = await self._forward(query, over_tcp)
        except MalformedError as malformed:
            self.counters["malformed"] += 1
            return malformed.answer
        finally:
            self._in_flight.give_back(source)
        if over_tcp:
            return found
        fitting = truncate(found, query)
        self.counters["truncated"] += fitting is not found
        return fitting

    async def _forward(self, query: Query, over_tcp: bool) -> bytes:
        asked = self._upstreams  # may be replaced while this query waits
        found = await self._ask_each(asked, query, over_tcp)
        if not _settles(found):
            if asyncio.get_running_loop().time() - self._looked_up_at >= LOOK_UP_PAUSE:
                await self.look_up_upstreams()
            if self._upstreams.resolvers != asked.resolvers:
                found = await self._ask_each(self._upstreams, query, over_tcp)
        self.counters["answered" if _settles(found) else "servfail"] += 1
        return found or failure(query, dns.rcode.SERVFAIL)

    async def _ask_each(self, upstreams: _Upstreams, query: Query, over_tcp: bool) -> bytes | None:
        """The first conclusive answer, otherwise the first one of any kind, otherwise `None`."""
        ask = ask_tcp if over_tcp else ask_udp
        now = asyncio.get_running_loop().time
        unsettling: bytes | None = None
        # Whether all that were asked so far are silent. A resolver need not serve TCP, so that says nothing; nor does a
        # query that stays without an answer where others get theirs.
        silent = not over_tcp
        order = upstreams.in_turn(now())
        for index in order:
            begun = now()
            matters = silent and index != order[-1]
            probe = self._probe(upstreams, index, begun) if matters else None
            try:
                async with asyncio.timeout(self._timeout), _beside(probe):
                    found = await ask(query, upstreams.resolvers[index], self.counters)
            except TimeoutError:
                self.counters["upstream_timeout"] += 1
            except OSError:
                self.counters["upstream_error"] += 1
            else:
                if silent and index != order[0]:
                    upstreams.begin_with(index, now())
                silent = False
                if not over_tcp:
                    upstreams.heard(index, now())
                if _settles(found):
                    return found
                unsettling = unsettling or found
                continue
            silent = silent and not upstreams.has_been_heard(index, begun)
        return unsettling

    async def _probe(self, upstreams: _Upstreams, index: int, begun: float) -> None:
        """Where a resolver has answered nothing since `begun`, for half of its time: asks it what it can answer by
        itself. One probe at a time is enough for all queries."""
        now = asyncio.get_running_loop().time
        await asyncio.sleep(begun + self._timeout / 2 - now())
        if upstreams.has_been_heard(index, begun) or index in upstreams.probed:
            return
        upstreams.probed.add(index)
        try:
            with contextlib.suppress(OSError):
                await ask_udp(PROBE, upstreams.resolvers[index], self.counters)
                upstreams.heard(index, now())
        finally:
            upstreams.probed.discard(index)


@asynccontextmanager
async def _beside(work: Coroutine[None, None, None] | None) -> AsyncIterator[None]:
    """Does the work, if there is any, beside the block, as long as that lasts."""
    if work is None:
        yield
        return
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _settles(answer: bytes | None) -> bool:
    return answer is not None and rcode_of(answer) not in RETRY_ELSEWHERE
