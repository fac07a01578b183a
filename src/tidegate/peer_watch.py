"""Who is connected: the log of it, and what the store remembers of it over a restart.

WireGuard knows sessions, not connections. A peer counts as *connected* from a handshake until its last session is over,
`REJECT_AFTER_TIME` after the last handshake; then it is *silent*, whether it was switched off or has nothing to say.

Only a handshake makes a peer appear or renew its session, and the engine tells of each; only time makes one vanish. So
this looks at the peers when it is told to, at most once in `LOOK_INTERVAL`, and when the next session is over: where
nobody connects and nobody is connected, it never runs. That bounds the log, too: two lines per peer in
`REJECT_AFTER_TIME`, however often it begins anew. Where a peer is, its data messages tell as well, without a word of
the engine's: a move is noticed at the next look.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from tidegate.engine import EngineGateway, PeerStatus
from tidegate.errors import EngineUnresponsiveError, StoreError
from tidegate.lifecycle import Supervisor
from tidegate.store import LastSeen, Store

log = structlog.get_logger("tidegate.peers")

REJECT_AFTER_TIME = 180.0
"""Seconds after which a session is over (WireGuard whitepaper, 6.1)."""
LOOK_INTERVAL = 5.0
"""Least seconds between two looks at the peers."""
SAVE_INTERVAL = 60.0
"""Least seconds between two writes to the store while the gateway runs. The last is at its stop; one that is killed
forgets what it has seen since the last."""
SAME_HANDSHAKE = 1.0
"""Seconds by which the time of one handshake may differ between two looks: it is told as an age."""


@dataclass(slots=True)
class _Connection:
    """Of a connected peer. Bytes are its counters when it was noticed first."""

    since: float
    """When it was noticed first, in seconds of the clock."""
    endpoint: tuple[str, int]
    received_bytes: int
    sent_bytes: int

    def goes_on_in(self, peer: PeerStatus) -> bool:
        """Whether it can be this one still. A peer that was disabled and enabled, or removed and added, counts anew."""
        return peer.received_bytes >= self.received_bytes and peer.sent_bytes >= self.sent_bytes


class PeerWatch:
    """Looks at a gateway's peers."""

    def __init__(
        self,
        engine: EngineGateway,
        store: Store,
        name_at: Callable[[str], str | None],
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`name_at` gives the name of the peer that holds an address. `now`: seconds since the epoch."""
        self._engine = engine
        self._store = store
        self._name_at = name_at
        self._clock = clock
        self._now = now
        self._completed = asyncio.Event()
        self._connections: dict[bytes, _Connection] = {}
        self._next_expiry = math.inf
        self._saved: dict[bytes, LastSeen] = {}
        self._unsaved: dict[bytes, LastSeen] = {}
        self._may_save_at = -math.inf
        self._save_failed = False

    def handshake_completed(self) -> None:
        """Makes `run` look at the peers."""
        self._completed.set()

    async def run(self, supervisor: Supervisor) -> None:
        """Logs who comes and who goes, and saves what was seen, until `supervisor` is asked to stop."""
        while True:
            due = min(self._next_expiry, self._may_save_at if self._unsaved else math.inf)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if due == math.inf else max(0.0, due - self._clock())):
                    await self._completed.wait()
            self._completed.clear()
            peers = await self._look()
            if peers is None:
                self._next_expiry = self._clock() + SAVE_INTERVAL
            else:
                self._follow_connections(peers)
                self._note_seen(peers)
            if self._clock() >= self._may_save_at:
                await self._save()
            if await supervisor.wait_for_stop(LOOK_INTERVAL):
                return

    async def finish(self) -> None:
        """Saves what was seen, a last time: when `run` has ended, and before the engine stops."""
        peers = await self._look()
        if peers is not None:
            self._note_seen(peers)
        await self._save()

    async def _look(self) -> Sequence[PeerStatus] | None:
        try:
            return (await asyncio.to_thread(self._engine.status)).peers
        except EngineUnresponsiveError as cause:
            log.warning("it is not known who is connected", cause=cause.message)
            return None

    def _follow_connections(self, peers: Sequence[PeerStatus]) -> None:
        clock = self._clock()
        connected: dict[bytes, _Connection] = {}
        self._next_expiry = math.inf
        for peer in peers:
            if peer.last_handshake is None or peer.endpoint is None:
                continue
            known = self._connections.get(peer.public_key)
            if known is not None and not known.goes_on_in(peer):
                known = None
            remaining = REJECT_AFTER_TIME - peer.last_handshake
            if remaining > 0:
                # An expiry that comes a moment early would find the session still alive.
                self._next_expiry = min(self._next_expiry, clock + remaining + 1.0)
                connected[peer.public_key] = self._still_or_newly_connected(peer, peer.endpoint, known)
            elif known is not None:
                log.info(
                    "peer silent",
                    name=self._name_of(peer),
                    endpoint=_text(peer.endpoint),
                    connected_seconds=round(clock - known.since),
                    received_bytes=peer.received_bytes - known.received_bytes,
                    sent_bytes=peer.sent_bytes - known.sent_bytes,
                )
        self._connections = connected  # a peer that was removed is in the log already

    def _still_or_newly_connected(
        self, peer: PeerStatus, endpoint: tuple[str, int], known: _Connection | None
    ) -> _Connection:
        if known is None:
            log.info("peer connected", name=self._name_of(peer), endpoint=_text(endpoint))
            return _Connection(self._clock(), endpoint, peer.received_bytes, peer.sent_bytes)
        if known.endpoint != endpoint:
            # Some networks give each flow, or each minute, another port: nothing that everybody wants to know.
            log.debug(
                "peer moved", name=self._name_of(peer), endpoint=_text(endpoint), was=_text(known.endpoint)
            )
            known.endpoint = endpoint
        return known

    def _name_of(self, peer: PeerStatus) -> str | None:
        return self._name_at(peer.address) if peer.address is not None else None

    def _note_seen(self, peers: Sequence[PeerStatus]) -> None:
        """Notes what of the peers differs from what the store has."""
        now = self._now()
        present = {peer.public_key for peer in peers}
        for noted in (self._saved, self._unsaved):
            for gone in noted.keys() - present:
                del noted[gone]
        for peer in peers:
            if peer.last_handshake is None or peer.endpoint is None:
                continue
            # Where the wall clock has been set, so is this: it is right for a handshake before that, too.
            seen = LastSeen(now - peer.last_handshake, peer.endpoint)
            saved = self._saved.get(peer.public_key)
            if (
                saved is None
                or saved.endpoint != seen.endpoint
                or abs(saved.handshake_at - seen.handshake_at) > SAME_HANDSHAKE
            ):
                self._unsaved[peer.public_key] = seen

    async def _save(self) -> None:
        unsaved = dict(self._unsaved)
        if not unsaved:
            return
        self._may_save_at = self._clock() + SAVE_INTERVAL
        try:
            await asyncio.to_thread(self._store.set_last_seen, unsaved)
        except StoreError as cause:
            if not self._save_failed:
                log.warning(
                    "when peers were last seen is not saved; tried again each minute", cause=str(cause)
                )
            self._save_failed = True
        else:
            self._save_failed = False
            self._saved |= unsaved
            self._unsaved.clear()


def _text(endpoint: tuple[str, int]) -> str:
    return f"{endpoint[0]}:{endpoint[1]}"
