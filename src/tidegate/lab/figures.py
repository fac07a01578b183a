"""The benchmark's results, and what follows from them: medians, spreads, ratios, goals. Pure arithmetic."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from tidegate.lab.variants import (
    KERNEL,
    TIDEGATE,
    TIDEGATE_AES,
    TIDEGATE_BARE,
    TIDEGATE_STOCK_CLIENT,
    WIREGUARD_GO,
)
from tidegate.lab.workloads import (
    BULK,
    CONNECTIONS,
    CPU,
    CROWD_MEMORY,
    LOADED_PING,
    PING,
    TCP_BOTH,
    UDP_64,
    UDP_1300,
)

_SPREAD_QUARTILES = 4
RATIO = "×"


@dataclass
class Series:
    """The figures of one workload with one variant."""

    values: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def median(self) -> float | None:
        return statistics.median(self.values) if self.values else None

    @property
    def spread(self) -> tuple[float, float] | None:
        """The first and third quartile."""
        if len(self.values) < _SPREAD_QUARTILES:
            return (min(self.values), max(self.values)) if self.values else None
        first, _, third = statistics.quantiles(self.values, n=_SPREAD_QUARTILES)
        return first, third


Results = dict[str, dict[str, Series]]
"""Series by workload, then by variant; pairs that are not measured are absent."""


def has_failed(results: Results) -> bool:
    """Whether the run is unreliable: something of ours failed, or something was never measured.

    If another program fails now and then, that is a finding about it: it is in the report, with the rounds that worked.
    """
    return any(
        series.errors and (variant.startswith(TIDEGATE) or not series.values)
        for by_variant in results.values()
        for variant, series in by_variant.items()
    )


def median_of(results: Results, workload: str, variant: str) -> float | None:
    series = results.get(workload, {}).get(variant)
    return series.median if series else None


def ratio(results: Results, workload: str, variant: str, reference: str) -> float | None:
    """The median of a variant divided by that of another; None if either was not measured."""
    above, below = median_of(results, workload, variant), median_of(results, workload, reference)
    return above / below if above is not None and below else None


@dataclass(frozen=True)
class Goal:
    """What a variant should reach with each of some workloads."""

    variant: str
    workloads: Sequence[str]
    bound: float
    to: str | None = None
    """The variant to which the bound is a ratio, or from which it is a difference; None: the figure itself."""
    at_least: bool = True
    """Otherwise at most."""
    unit: str = RATIO
    """Of the bound. With `to`, any unit other than `RATIO` means a difference."""

    def verdicts(self, results: Results) -> list[Verdict]:
        return [Verdict(self, workload, self._measured(results, workload)) for workload in self.workloads]

    def _measured(self, results: Results, workload: str) -> float | None:
        own = median_of(results, workload, self.variant)
        if self.to is None or own is None:
            return own
        if self.unit == RATIO:
            return ratio(results, workload, self.variant, self.to)
        other = median_of(results, workload, self.to)
        return None if other is None else own - other


@dataclass(frozen=True)
class Verdict:
    """A goal, and its outcome with one workload."""

    goal: Goal
    workload: str
    measured: float | None

    @property
    def met(self) -> bool | None:
        """None: not measured in this run."""
        if self.measured is None:
            return None
        return self.measured >= self.goal.bound if self.goal.at_least else self.measured <= self.goal.bound


GOALS = [
    Goal(TIDEGATE, BULK, 0.27, KERNEL),
    Goal(TIDEGATE, BULK, 12, WIREGUARD_GO),
    Goal(TIDEGATE_AES, BULK, 0.42, KERNEL),
    Goal(TIDEGATE_AES, BULK, 20, WIREGUARD_GO),
    Goal(TIDEGATE_STOCK_CLIENT, BULK, 1.5, WIREGUARD_GO),
    Goal(TIDEGATE_BARE, BULK, 1.0, WIREGUARD_GO),
    Goal(TIDEGATE, (TCP_BOTH,), 1.0, WIREGUARD_GO),
    Goal(TIDEGATE, (UDP_64, UDP_1300), 1.0, KERNEL),
    Goal(TIDEGATE, (UDP_64, UDP_1300), 5, WIREGUARD_GO),
    Goal(TIDEGATE, (CONNECTIONS,), 0.5, KERNEL),
    Goal(TIDEGATE, (CONNECTIONS,), 3, WIREGUARD_GO),
    Goal(TIDEGATE, (PING,), 0.25, KERNEL, at_least=False, unit=" ms"),
    Goal(TIDEGATE, (PING,), 0.5, WIREGUARD_GO, at_least=False),
    Goal(TIDEGATE, (LOADED_PING,), 2, KERNEL, at_least=False, unit=" ms"),
    Goal(TIDEGATE, (LOADED_PING,), 0.3, WIREGUARD_GO, at_least=False),
    Goal(TIDEGATE, (CPU,), 0.1, WIREGUARD_GO, at_least=False),
    Goal(TIDEGATE, (CROWD_MEMORY,), 200, at_least=False, unit=" MiB"),
]
"""Ratios and differences of medians that must hold within one interleaved run."""


def verdicts(results: Results) -> list[Verdict]:
    """Every goal, for each of its workloads."""
    return [verdict for goal in GOALS for verdict in goal.verdicts(results)]
