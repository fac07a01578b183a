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


class Ending:
    """Of a command, which takes back then what it has begun."""

    def __init__(self) -> None:
        self.has_begun = False

    def begin(self) -> None:
        """From now on SIGTERM and SIGHUP do nothing more: the command ends anyway, and they must not keep anything from
        being taken back. They come in pairs, and after Ctrl-C. Another Ctrl-C breaks it off: somebody means it."""
        self.has_begun = True


@contextmanager
def ended_like_by_ctrl_c() -> Iterator[Ending]:
    """Lets SIGTERM and SIGHUP (the terminal was closed) raise where Ctrl-C does, for as long as the block lasts; the
    exit code is then what shells have for them. Who ignores one, as nohup(1) does, goes on ignoring it."""
    ordinary: dict[signal.Signals, signal._HANDLER] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    heeded = [number for number, handler in ordinary.items() if signal.getsignal(number) is handler]
    if threading.current_thread() is not threading.main_thread():
        heeded = []  # no other can handle signals
    ending = Ending()

    def end(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            ending.begin()
            signal.default_int_handler(number, frame)
        elif not ending.has_begun:
            ending.begin()
            raise _EndedError(number)

    try:
        for number in heeded:
            signal.signal(number, end)
        yield ending
    except _EndedError as ended:
        raise typer.Exit(128 + ended.number) from None
    finally:
        for number in heeded:
            signal.signal(number, ordinary[number])
