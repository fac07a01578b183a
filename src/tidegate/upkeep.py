"""Keeping something as it should be although others change it: the one loop that gateway and client follow the host's
network with.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Literal, TypeVar

from tidegate.daemon_thread import in_daemon_thread
from tidegate.lifecycle import Supervisor

T = TypeVar("T")

SETTLE = 0.2
"""Seconds from a notification of a change until it is looked at: a change rarely comes alone."""
LONGEST_SETTLE = 2.0
"""Maximum seconds until what others change again and again is restored again."""
FIRST_RETRY, LONGEST_RETRY = 0.5, 60.0
"""Seconds until what failed is tried again although nothing has changed: at first, doubled each time, and at most."""
REST, LONGEST_REST = 10, 60.0
"""How many times as long as a look read (`Reading`) there is none after it, and how many seconds at most: on a host
with very many routes it is work."""

Outcome = Literal["whole", "restored", "partly", "failed"]
"""What a look came to. *whole*: all is as it should be; *restored*: it was not, and is again; *partly*: something was
restored, perhaps, and something is left to be tried again; *failed*: nothing was changed, and something is left."""


class Reading:
    """Reads the host's state for looks, and notes what that costs."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """Of a processor. What a look waits for, as for a shard that hangs, costs nothing."""

    async def __call__(self, name: str, read: Callable[[], T]) -> T:
        """Calls `read` in a thread of that name (`in_daemon_thread`)."""

        def timed() -> T:
            began = time.thread_time()
            try:
                return read()
            finally:
                self.seconds += time.thread_time() - began

        return await in_daemon_thread(name, timed)


async def keep(
    look: Callable[[], Awaitable[Outcome]], changed: asyncio.Event, supervisor: Supervisor, reading: Reading
) -> None:
    """Calls `look` whenever `changed` is set, until `supervisor` is asked to stop; less and less often if another
    program changes again and again what `look` restores, and so that `reading` takes a small share of the time only.

    What failed is tried again on the next change, and now and then without one: what would make it succeed (memory,
    descriptors) may not cause a notification.
    """
    loop = asyncio.get_running_loop()
    pause, rested_at = SETTLE, 0.0
    retry: float | None = None
    while True:
        try:
            async with asyncio.timeout(retry):
                await changed.wait()
        except TimeoutError:
            pause = SETTLE  # it has been quiet
        else:
            retry = None
            if await supervisor.wait_for_stop(max(pause, rested_at - loop.time())):
                return
        changed.clear()
        read_before = reading.seconds
        outcome = await look()
        rest = min(REST * (reading.seconds - read_before), LONGEST_REST)
        rested_at = loop.time() + rest
        # What a look changes is notified of, too. Where it changes nothing, the next change may be the one to wait for.
        pause = min(2 * pause, LONGEST_SETTLE) if outcome in {"restored", "partly"} else SETTLE
        later = FIRST_RETRY if retry is None else min(2 * retry, LONGEST_RETRY)
        retry = max(later, rest) if outcome in {"partly", "failed"} else None
