"""The loop that keeps something as it should be: how long it waits before it looks."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise

import pytest

from tidegate.lifecycle import Supervisor
from tidegate.upkeep import Outcome, Reading, keep


def looked_at(
    outcomes: list[Outcome], *, notified: bool, waiting: float = 0, reading: float = 0
) -> list[float]:
    """When `keep` looked, in seconds, if the looks come to `outcomes`; a change is notified of right after each look,
    or only before the first one. Each look waits and reads for so many seconds."""
    times: list[float] = []

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        changed, supervisor, read = asyncio.Event(), Supervisor(), Reading()

        def work() -> None:
            while time.thread_time() < reading:
                pass

        async def look() -> Outcome:
            times.append(loop.time())
            await asyncio.sleep(waiting)
            await read("host", work)
            if len(times) == len(outcomes):
                supervisor.request_stop()
            if notified or len(times) == len(outcomes):
                changed.set()
            return outcomes[len(times) - 1]

        changed.set()
        async with asyncio.timeout(20):
            await keep(look, changed, supervisor, read)

    asyncio.run(scenario())
    assert len(times) == len(outcomes)
    return times


def pauses(
    outcomes: list[Outcome], *, notified: bool = True, waiting: float = 0, reading: float = 0
) -> list[float]:
    times = looked_at(outcomes, notified=notified, waiting=waiting, reading=reading)
    return [after - before for before, after in pairwise(times)]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidegate.upkeep.SETTLE", 0.02)
    monkeypatch.setattr("tidegate.upkeep.LONGEST_SETTLE", 5.0)
    monkeypatch.setattr("tidegate.upkeep.FIRST_RETRY", 0.05)
    monkeypatch.setattr("tidegate.upkeep.LONGEST_RETRY", 0.1)


@pytest.mark.parametrize("outcome", ["restored", "partly"])
def test_what_another_program_changes_again_and_again_is_looked_at_ever_later(outcome: Outcome) -> None:
    waited = pauses([outcome] * 5)
    assert all(pause >= least for pause, least in zip(waited, (0.04, 0.08, 0.16, 0.32), strict=True))


@pytest.mark.parametrize("outcome", ["whole", "failed"])
def test_a_network_that_comes_back_after_many_changes_is_looked_at_at_once(outcome: Outcome) -> None:
    """As with DHCP: link, address and routes come one after another, and only the last makes it usable."""
    waited = pauses([outcome] * 8)
    assert waited[-1] < 1, "2.56 s if each look had doubled it"


@pytest.mark.parametrize("outcome", ["partly", "failed"])
def test_what_failed_is_tried_again_without_a_change(outcome: Outcome) -> None:
    waited = pauses([outcome] * 4, notified=False)
    assert all(pause >= least for pause, least in zip(waited, (0.05, 0.1, 0.1), strict=True))


@pytest.mark.parametrize("notified", [False, True])
def test_looks_that_read_for_long_are_ten_times_as_far_apart(*, notified: bool) -> None:
    """On a host with very many routes, one of which changes all the time, looks would take a processor otherwise."""
    waited = pauses(["failed"] * 3, notified=notified, reading=0.1)
    assert all(pause >= 1.1 for pause in waited), waited


def test_looks_that_wait_for_others_are_no_further_apart_than_any() -> None:
    """As for a shard that hangs: what it kept from being done is done as soon as it goes on."""
    waited = pauses(["whole"] * 3, waiting=0.1)
    assert all(pause < 0.9 for pause in waited), waited
