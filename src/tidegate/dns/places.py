"""Limits that no source can use up alone: one client must not keep all the others from DNS."""

from __future__ import annotations

from typing import Literal

SHARES = 8
"""A source can hold at most one in this many of the places."""

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
