"""The Supervisor: every background task of a process, from its start to its end.

The rules: a task is started exactly once, under a name; it can be cancelled; it is joined at shutdown, within a
deadline; and if one ends unexpectedly, the process goes down loudly with the task's name and cause, rather than run on
with a part missing.

Tasks wait (on a descriptor, a queue, an event) and do not poll: with nothing to do, none of them runs.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import structlog

from tidegate.errors import TaskDiedError

log = structlog.get_logger("tidegate.lifecycle")

STOP_DEADLINE = 1.5
"""Seconds that cancelled tasks have to end: the process must be gone 2 s after SIGTERM."""


@contextmanager
def on_signal(number: signal.Signals, call: Callable[[], None]) -> Iterator[None]:
    """While the block lasts, calls `call` in the event loop whenever the signal arrives."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(number, call)
    try:
        yield
    finally:
        loop.remove_signal_handler(number)


class Supervisor:
    """Starts background tasks, watches over them, and ends them. For use in one event loop."""

    def __init__(self, *, stop_deadline: float = STOP_DEADLINE) -> None:
        self._stop_deadline = stop_deadline
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
        self._failure: BaseException | None = None
        self._stopping = False
        self.stop_signal: signal.Signals | None = None
        """The signal that asked for the stop, if one did."""

    def start(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Starts a task. Raises `RuntimeError` if one of that name has been started already, or after `stop`."""
        if self._stopping:
            raise RuntimeError(f"background task {name!r} cannot be started: the process is stopping")
        if name in self._tasks:
            raise RuntimeError(
                f"background task {name!r} has already been started and cannot be started again"
            )
        task = asyncio.get_running_loop().create_task(work(), name=name)
        self._tasks[name] = task
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if self._stopping or (self._wake.is_set() and not task.cancelled() and task.exception() is None):
            return
        cause = None if task.cancelled() else task.exception()
        self.fail(TaskDiedError(task.get_name(), asyncio.CancelledError() if task.cancelled() else cause))

    def fail(self, failure: BaseException) -> None:
        """Makes `wait` raise `failure`, if it is the first."""
        self._failure = self._failure or failure
        self._wake.set()

    def request_stop(self, signal_number: signal.Signals | None = None) -> None:
        """Makes `wait` return. Idempotent."""
        self.stop_signal = self.stop_signal or signal_number
        self._wake.set()

    @contextmanager
    def stop_on_signals(self, *signals: signal.Signals) -> Iterator[None]:
        """While the block lasts, the signals request the stop."""
        with ExitStack() as undo:
            for number in signals:
                undo.enter_context(on_signal(number, partial(self.request_stop, number)))
            yield

    @property
    def stop_requested(self) -> bool:
        return self._wake.is_set()

    async def wait(self) -> None:
        """Waits until a stop is requested. Raises the cause if a task died or something called `fail`."""
        await self._wake.wait()
        if self._failure is not None:
            raise self._failure

    async def stopped(self) -> None:
        """Waits until a stop is requested, whatever the reason. For tasks that have nothing left to do."""
        await self._wake.wait()

    async def wait_for_stop(self, seconds: float) -> bool:
        """Pauses for at most `seconds`; returns `True` at once if a stop is requested. For periodic tasks."""
        try:
            await asyncio.wait_for(self._wake.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """Cancels every task and joins it. Idempotent. Tasks that miss the deadline are named in the log, and left to
        the end of the process."""
        if self._stopping:
            return
        self._stopping = True
        for task in reversed(self._tasks.values()):
            task.cancel()
        if self._tasks:
            done, late = await asyncio.wait(self._tasks.values(), timeout=self._stop_deadline)
            for task in done:
                if not task.cancelled() and (cause := task.exception()) is not None and self._failure is None:
                    log.warning("task failed while stopping", task=task.get_name(), cause=repr(cause))
            for task in late:
                log.error("task did not stop in time", task=task.get_name(), seconds=self._stop_deadline)
