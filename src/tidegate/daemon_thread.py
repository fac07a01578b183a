"""Work that blocks and cannot be cancelled, in a thread that nothing waits for at the end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

T = TypeVar("T")


async def in_daemon_thread(name: str, work: Callable[[], T]) -> T:
    """As `asyncio.to_thread`, but neither `asyncio.run` nor the interpreter waits for the thread at the end. So `work`
    must change nothing that is undone there."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        settle: Callable[[], None]
        try:
            settle = partial(outcome.set_result, work())
        except Exception as cause:  # noqa: BLE001 -- whatever it is, it is raised where it is awaited
            settle = partial(outcome.set_exception, cause)

        def deliver() -> None:
            if not outcome.done():  # otherwise nobody is waiting any more
                settle()

        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(deliver)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await outcome
