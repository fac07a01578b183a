"""SIGTERM and SIGHUP as interrupts, like Ctrl-C: for commands that have something to undo when they are ended."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class SignalInterrupt(KeyboardInterrupt):
    """SIGTERM or SIGHUP arrived. Shells expect exit code 128 + `number` then."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Unwinding:
    """Whether a command has begun to undo what it did."""

    def __init__(self) -> None:
        self.has_begun = False

    def begin(self) -> None:
        """From now on SIGTERM and SIGHUP have no effect: the command is ending anyway, and they must not cut the
        undoing short. They come in pairs, and after Ctrl-C. Another Ctrl-C does cut it short: somebody means it."""
        self.has_begun = True


@contextmanager
def interrupt_on_signals() -> Iterator[Unwinding]:
    """While the block lasts, SIGTERM and SIGHUP (the terminal was closed) raise `SignalInterrupt` where Ctrl-C would
    raise `KeyboardInterrupt`. A signal that is ignored, as under nohup(1), or handled already is left alone."""
    defaults: dict[signal.Signals, signal._HANDLER] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    ours = [number for number, handler in defaults.items() if signal.getsignal(number) is handler]
    if threading.current_thread() is not threading.main_thread():
        ours = []  # only the main thread can handle signals
    unwinding = Unwinding()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            unwinding.begin()
            signal.default_int_handler(number, frame)
        elif not unwinding.has_begun:
            unwinding.begin()
            raise SignalInterrupt(number)

    try:
        for number in ours:
            signal.signal(number, interrupt)
        yield unwinding
    finally:
        for number in ours:
            signal.signal(number, defaults[number])
