"""The Supervisor's rules."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from tidegate.errors import TaskDiedError
from tidegate.lifecycle import Supervisor


async def forever() -> None:
    await asyncio.get_running_loop().create_future()


def test_a_task_is_started_once() -> None:
    async def scenario() -> None:
        supervisor = Supervisor()
        supervisor.start("dns", forever)
        with pytest.raises(RuntimeError, match="'dns' has already been started"):
            supervisor.start("dns", forever)
        await supervisor.stop()

    asyncio.run(scenario())


def test_a_task_that_fails_takes_the_process_down_with_name_and_cause() -> None:
    async def fails() -> None:
        raise OSError("the cable is out")

    async def scenario() -> None:
        supervisor = Supervisor()
        supervisor.start("bystander", forever)
        supervisor.start("dns", fails)
        with pytest.raises(TaskDiedError, match="'dns' died: OSError: the cable is out"):
            await supervisor.wait()
        await supervisor.stop()

    asyncio.run(scenario())


def test_a_task_that_just_ends_takes_the_process_down_too() -> None:
    async def ends() -> None:
        return

    async def scenario() -> None:
        supervisor = Supervisor()
        supervisor.start("control", ends)
        with pytest.raises(TaskDiedError, match="'control' died: it returned"):
            await supervisor.wait()
        await supervisor.stop()

    asyncio.run(scenario())


def test_stop_cancels_and_joins_every_task_and_stopping_twice_does_nothing() -> None:
    ended: list[str] = []

    async def tidy(name: str) -> None:
        try:
            await forever()
        finally:
            await asyncio.sleep(0)  # cleaning up may take a turn of the loop
            ended.append(name)

    async def scenario() -> None:
        supervisor = Supervisor()
        supervisor.start("first", lambda: tidy("first"))
        supervisor.start("second", lambda: tidy("second"))
        await asyncio.sleep(0)
        await supervisor.stop()
        assert sorted(ended) == ["first", "second"]
        await supervisor.stop()
        assert len(ended) == 2
        with pytest.raises(RuntimeError, match="the process is stopping"):
            supervisor.start("third", forever)

    asyncio.run(scenario())


def test_a_task_that_will_not_end_does_not_hold_up_the_stop() -> None:
    async def stubborn() -> None:
        while True:
            try:
                await forever()
            except asyncio.CancelledError:
                if release.is_set():
                    raise

    release = asyncio.Event()

    async def scenario() -> None:
        supervisor = Supervisor(stop_deadline=0.1)
        supervisor.start("stubborn", stubborn)
        await asyncio.sleep(0)
        async with asyncio.timeout(1):
            await supervisor.stop()
        release.set()

    asyncio.run(scenario())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_requests_the_stop_and_a_second_one_changes_nothing(number: signal.Signals) -> None:
    async def scenario() -> None:
        supervisor = Supervisor()
        supervisor.start("bystander", forever)
        with supervisor.stop_on_signals(signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            await supervisor.wait()
            assert supervisor.stop_signal == number
            await supervisor.stop()

    asyncio.run(scenario())


def test_a_pause_ends_at_once_when_the_process_is_to_stop() -> None:
    async def scenario() -> None:
        supervisor = Supervisor()
        assert await supervisor.wait_for_stop(0.01) is False
        asyncio.get_running_loop().call_later(0.01, supervisor.request_stop)
        async with asyncio.timeout(1):
            assert await supervisor.wait_for_stop(60) is True

    asyncio.run(scenario())
