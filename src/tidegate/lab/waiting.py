"""Waiting with a deadline, interruptible by Ctrl-C, without sleeping a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class WaitTimeoutError(RuntimeError):
    """What was waited for did not happen in time."""


def pause(seconds: float) -> None:
    """Lets `seconds` pass; for measurements over a fixed time only, never to hope that something is ready."""
    threading.Event().wait(seconds)


def wait_until(
    predicate: Callable[[], object], what: str, *, timeout: float = 10.0, interval: float = 0.02
) -> None:
    """Asks `predicate` until it says yes; raises `WaitTimeoutError`, which names `what`, after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    tick = threading.Event()
    while not predicate():
        if time.monotonic() >= deadline:
            raise WaitTimeoutError(f"gave up waiting for {what} after {timeout:g} s")
        tick.wait(interval)
