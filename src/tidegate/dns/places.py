"""Limits that no source can use up alone: one client must not keep all the others from DNS."""

from __future__ import annotations

import math
from typing import Literal

SHARES = 8
"""A source can hold at most one in this many of the places."""
FORGET_EVERY = 1.0
"""Seconds after which sources that have all their turns back are forgotten."""

Refusal = Literal["full", "over_share"]


class Places:
    """A fixed number of places, and which source holds how many. State: one entry for each source that holds any."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._share = max(1, total // SHARES)
        self._taken = 0
        self._held: dict[str, int] = {}

    def take(self, source: str) -> Refusal | None:
        """Takes a place, to be given back later. Returns why there is none to take, otherwise `None`."""
        held = self._held.get(source, 0)
        if held >= self._share:
            return "over_share"
        if self._taken >= self._total:
            return "full"
        self._taken += 1
        self._held[source] = held + 1
        return None

    def give_back(self, source: str) -> None:
        self._taken -= 1
        self._held[source] -= 1
        if not self._held[source]:
            del self._held[source]


class Turns:
    """At most `rate` turns a second for each source, and `burst` at once: a token bucket, as when the next token is due
    (GCRA, ITU-T I.371). State: one entry for each source that took a turn of late."""

    def __init__(self, rate: float, burst: int) -> None:
        self._interval = 1 / rate
        self._tolerance = (burst - 1) * self._interval
        self._due: dict[str, float] = {}
        self._forget_at = -math.inf

    def __len__(self) -> int:
        return len(self._due)

    def take(self, source: str, now: float) -> float:
        """Takes the source's next turn. Returns the seconds until it comes, mostly none."""
        if now >= self._forget_at:
            self._forget(now)
        due = max(self._due.get(source, now), now)
        self._due[source] = due + self._interval
        return max(0.0, due - self._tolerance - now)

    def _forget(self, now: float) -> None:
        self._due = {source: due for source, due in self._due.items() if due > now}
        self._forget_at = now + FORGET_EVERY
