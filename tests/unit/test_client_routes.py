"""A client whose host is changed by others: what was there before, and what they remove."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from itertools import pairwise
from typing import NoReturn

import pytest

from tests.unit.connecting import WHOLE, made, until_connected
from tests.unit.fakes import FakeClientHost, FakeEngine
from tests.unit.running import until
from tidegate.client import to_its_end
from tidegate.errors import HostNetworkError
from tidegate.host.routes import Renewal
from tidegate.upkeep import LONGEST_RETRY


def test_leftovers_that_cannot_be_removed_keep_nobody_from_connecting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise HostNetworkError("cannot remove an earlier client's rules: Operation not supported")

    host, events = FakeClientHost(), []  # type: ignore[var-annotated]
    monkeypatch.setattr(host, "remove_leftovers", refuse)

    async def scenario() -> None:
        client = made(FakeEngine(), host, events)
        task = await until_connected(client, events)
        client.request_stop()
        await task

    asyncio.run(scenario())
    assert "cannot remove what an earlier client" in "".join(capsys.readouterr())


def test_routes_are_not_renewed_after_they_have_been_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    host, events = FakeClientHost(), []  # type: ignore[var-annotated]
    looking = threading.Event()

    def renew(*_: object) -> Renewal:
        looking.set()
        threading.Event().wait(0.3)
        host.journal.append("routes renewed")
        return "renewed"

    monkeypatch.setattr(host, "renew_routes", renew)

    async def scenario() -> None:
        client = made(FakeEngine(), host, events)
        task = await until_connected(client, events)
        await asyncio.to_thread(looking.wait, 5)
        client.request_stop()
        await task

    asyncio.run(scenario())
    assert host.journal == [*WHOLE[:5], "routes renewed", *WHOLE[5:]]


def test_what_fails_after_its_caller_was_cancelled_is_nobodys_complaint() -> None:
    complaints: list[object] = []
    failing = threading.Event()

    def fail() -> None:
        failing.wait(5)
        raise HostNetworkError("too late")

    async def scenario() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        task = asyncio.create_task(to_its_end(fail))
        await asyncio.sleep(0.05)
        task.cancel()
        failing.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        del task
        gc.collect()

    asyncio.run(scenario())
    assert complaints == []


def test_a_program_that_takes_the_routes_away_each_time_is_told_of_once_and_given_some_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tidegate.upkeep.SETTLE", 0.01)
    monkeypatch.setattr("tidegate.upkeep.LONGEST_SETTLE", 0.1)
    host, events = FakeClientHost(), []  # type: ignore[var-annotated]
    renewed_at: list[float] = []

    async def scenario() -> None:
        loop = asyncio.get_running_loop()

        def renew(*_: object) -> Renewal:
            renewed_at.append(time.monotonic())
            loop.call_soon_threadsafe(host.changed)
            return "renewed"

        monkeypatch.setattr(host, "renew_routes", renew)
        client = made(FakeEngine(), host, events)
        task = await until_connected(client, events)
        await until(lambda: len(renewed_at) >= 6)
        client.request_stop()
        await task

    asyncio.run(scenario())
    assert renewed_at[5] - renewed_at[0] >= 0.3, "0.02, 0.04, 0.08 and two times 0.1 s"
    assert capsys.readouterr().out.count("they are restored") == 1


def test_routes_that_could_not_be_added_again_are_tried_again_without_another_notice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tidegate.upkeep.SETTLE", 0.01)
    monkeypatch.setattr("tidegate.upkeep.LONGEST_SETTLE", 0.1)
    host, events = FakeClientHost(), []  # type: ignore[var-annotated]
    outcomes: list[Renewal | HostNetworkError] = ["renewed", HostNetworkError("busy")]

    def renew(*_: object) -> Renewal:
        outcome = outcomes.pop() if outcomes else "whole"
        if isinstance(outcome, HostNetworkError):
            raise outcome
        return outcome

    monkeypatch.setattr(host, "renew_routes", renew)

    async def scenario() -> None:
        client = made(FakeEngine(), host, events)
        task = await until_connected(client, events)
        await until(lambda: not outcomes)
        client.request_stop()
        await task

    asyncio.run(scenario())


def test_routes_that_are_refused_are_tried_less_and_less_often_until_the_network_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if the host had got another route to the same network meanwhile."""
    monkeypatch.setattr("tidegate.upkeep.SETTLE", 0.02)
    monkeypatch.setattr("tidegate.upkeep.LONGEST_SETTLE", 0.04)
    monkeypatch.setattr("tidegate.upkeep.FIRST_RETRY", 0.04)
    host, events = FakeClientHost(), []  # type: ignore[var-annotated]
    tried_at: list[float] = []

    def refuse(*_: object) -> NoReturn:
        tried_at.append(time.monotonic())
        raise HostNetworkError("this host already has another route to 10.9.0.0/16")

    monkeypatch.setattr(host, "renew_routes", refuse)

    async def scenario() -> None:
        client = made(FakeEngine(), host, events)
        task = await until_connected(client, events)
        await until(lambda: len(tried_at) >= 6)
        pauses = [after - before for before, after in pairwise(tried_at[:6])]
        assert all(
            pause >= least for pause, least in zip(pauses, (0.04, 0.08, 0.16, 0.32, 0.64), strict=True)
        )
        tries = len(tried_at)
        host.changed()
        await until(lambda: len(tried_at) >= tries + 2)
        assert tried_at[tries + 1] - tried_at[tries - 1] < 1.28, (
            "or the next would have come then at the earliest"
        )
        client.request_stop()
        await task

    asyncio.run(scenario())


def test_routes_that_are_refused_are_tried_again_in_a_minute_at_the_latest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert LONGEST_RETRY == 60
    monkeypatch.setattr("tidegate.upkeep.SETTLE", 0.01)
    monkeypatch.setattr("tidegate.upkeep.LONGEST_RETRY", 0.02)
    host, events, tries = FakeClientHost(), [], 0  # type: ignore[var-annotated]

    def refuse(*_: object) -> NoReturn:
        nonlocal tries
        tries += 1
        raise HostNetworkError("no")

    monkeypatch.setattr(host, "renew_routes", refuse)

    async def scenario() -> None:
        client = made(FakeEngine(), host, events)
        task = await until_connected(client, events)
        await until(lambda: tries >= 20)
        client.request_stop()
        await task

    asyncio.run(scenario())


def test_routes_that_would_pull_traffic_out_of_the_tunnel_are_told_of_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tidegate.upkeep.SETTLE", 0.01)
    host, events, looks = FakeClientHost(), [], 0  # type: ignore[var-annotated]

    def look(_: object) -> tuple[str, ...]:
        nonlocal looks
        looks += 1
        return ("0.0.0.0/1 via 192.0.2.66 dev eth0", "128.0.0.0/1 via 192.0.2.66 dev eth0")

    monkeypatch.setattr(host, "wide_routes", look)

    async def scenario() -> None:
        client = made(FakeEngine(), host, events)
        task = await until_connected(client, events)
        for n in range(1, 4):
            await until(lambda: looks >= n)  # noqa: B023 -- called at once
            host.changed()
        client.request_stop()
        await task

    asyncio.run(scenario())
    told = capsys.readouterr().out
    assert told.count("too wide for a local network") == 1
    assert "0.0.0.0/1 via 192.0.2.66 dev eth0, 128.0.0.0/1 via 192.0.2.66 dev eth0" in told
