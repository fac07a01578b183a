"""What ``tidegate demo`` and ``tidegate bench`` have in common: their output, and how they end."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TextIO, cast

from rich.console import Console

from tidegate.errors import TidegateError
from tidegate.interrupts import SignalInterrupt, interrupt_on_signals
from tidegate.streams import discard, say

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as in shells


def make_console(*, json_output: bool) -> Console:
    """A console on standard output, or, if that is for JSON, on standard error."""
    stream = sys.stderr if json_output else sys.stdout
    return Console(file=cast(TextIO, _Screen(stream)) if stream is not None else None, stderr=json_output)


class _Screen:
    """A stream for somebody who watches. If the terminal is closed, only the output is lost: the lab must still be
    taken down, and the exit code must still be that of the signal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._if_there(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._if_there(self._stream.flush)

    def _if_there(self, show: Callable[[], object]) -> None:
        try:
            show()
        except OSError as cause:
            if cause.errno != errno.EIO:  # the terminal is gone
                raise
            discard(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def until_interrupted(console: Console, run: Callable[[], int]) -> int:
    """The exit code of `run`, or, if a signal interrupted it, 128 + the signal's number. `run` undoes whatever it has
    begun before it ends."""
    try:
        with interrupt_on_signals():
            return run()
    except SignalInterrupt as interrupted:  # SIGTERM, SIGHUP
        code = 128 + interrupted.number
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    console.print("\n[yellow]Interrupted; everything is cleaned up.[/]")
    return code


def end_with(run: Callable[[], int]) -> NoReturn:
    """Runs `run` and exits with its code. Prints a `TidegateError`, as the command line of the package would."""
    try:
        code = run()
    except TidegateError as refused:
        say(f"tidegate: {refused}", sys.stderr)
        code = refused.exit_code
    sys.exit(code)
