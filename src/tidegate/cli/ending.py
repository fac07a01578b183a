"""Signals that end a command in the midst of something that is to be taken back then."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer


class _EndedError(KeyboardInterrupt):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def ended_like_by_ctrl_c() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP (the terminal was closed) raise where Ctrl-C does, for as long as the block lasts; the
    exit code is then what shells have for them. Who ignores one, as nohup(1) does, goes on ignoring it."""
    heeded = [
        number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL
    ]
    if threading.current_thread() is not threading.main_thread():
        heeded = []  # no other can handle signals

    heard = False

    def end(number: int, _frame: FrameType | None) -> None:
        nonlocal heard
        if not heard:  # they may come in pairs, and the second must not keep anything from being taken back
            heard = True
            raise _EndedError(number)

    try:
        for number in heeded:
            signal.signal(number, end)
        yield
    except _EndedError as ended:
        raise typer.Exit(128 + ended.number) from None
    finally:
        for number in heeded:
            signal.signal(number, signal.SIG_DFL)
