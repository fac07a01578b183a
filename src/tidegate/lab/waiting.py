"""Waiting with a deadline, interruptible by Ctrl-C."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class WaitTimeoutError(RuntimeError):
    """What was waited for did not happen in time."""


def pause(seconds: float) -> None:
    """Lets `seconds` pass; only for measurements over a fixed time, never to wait until something may be ready."""
    threading.Event().wait(seconds)


def wait_until(
    predicate: Callable[[], object], what: str, *, timeout: float = 10.0, interval: float = 0.02
) -> None:
    """Waits until `predicate` is true. Raises `WaitTimeoutError`, which names `what`, after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    tick = threading.Event()
    while not predicate():
        if time.monotonic() >= deadline:
            raise WaitTimeoutError(f"gave up waiting for {what} after {timeout:g} s")
        tick.wait(interval)
