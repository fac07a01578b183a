"""Standard output and standard error in whatever state we inherit them: closed, full, without a reader, or with one
that does not read."""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from io import TextIOWrapper
from typing import TextIO

from tidegate.line_writer import LineWriter, encoded, write

LAST_LINES_OF_A_STOP = 0.2
"""Seconds that waiting lines have in all when the process was asked to stop: it must be gone 2 s after SIGTERM, and the
Supervisor may have taken its `STOP_DEADLINE` by then."""
LAST_LINES_OF_A_FAILURE = 10.0
"""Seconds that they have in all when something failed: the last of them say why. SIGTERM still ends it at once."""
LAST_REPORT = 0.05
"""Seconds that standard error has at least, to say what was lost elsewhere."""
LAST_WRITE = 0.1
"""Seconds that a write has to come back, once the lines behind it are given up because that time is over."""

_background: _Background | None = None


def occupy_closed_descriptors() -> None:
    """Opens /dev/null in place of standard streams that are closed (`2>&-`), before a socket gets their number: what C
    or Rust code prints to descriptor 2 would go into that socket."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def escape_unencodable(stream: TextIO | None) -> None:
    """Makes the stream print an escape such as ``\\xe9`` for a character that its encoding lacks, as standard error
    does, and not raise `UnicodeEncodeError`: the name of an interface or a file may have any."""
    if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
        stream.reconfigure(errors="backslashreplace")


def is_terminal(stream: TextIO | None) -> bool:
    """A closed stream is `None`."""
    return stream is not None and stream.isatty()


def discard(stream: TextIO) -> None:
    """Drops what is stuck in a stream: Python would complain about it again when it closes the stream."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def say(text: str, stream: TextIO | None) -> None:
    """Prints one line, unbuffered. If nobody reads the stream any more, only the line is lost: the work goes on."""
    if stream is None:  # closed before we were started
        return
    if _background is not None:
        _background.add(text, stream)
        return
    try:
        stream.flush()
        left = memoryview(encoded(text, stream))
        while left:
            left = left[write(left, stream) :]
    except BrokenPipeError:
        discard(stream)
    except OSError:
        pass  # a full disk, which may have room again for the next line


@contextmanager
def saying_in_background(on_loss: Callable[[int], None]) -> Iterator[None]:
    """While the block lasts, threads print what is said, so that a reader that lives but does not read (a paused pager,
    a log driver that hangs) holds nobody up: one for each file that streams lead to, so that it does not hold up the
    other stream either. Lines for the same file keep their order, across both streams.

    Lines that find no room are dropped, and those that cannot be written (a full disk) are lost; `on_loss` is called
    with their number once it can be said, in their place if there is one. At the end of the block all lines are out,
    unless their reader takes none for `line_writer.LAST_LINES`, or they take longer than the end of a process may. Then
    they are lost, too; and a stream that is stuck is given up, for good."""
    global _background  # noqa: PLW0603 -- as the standard streams themselves, it is the process's
    if _background is not None:
        raise RuntimeError("the process's lines are written in the background already")
    background = _background = _Background(on_loss)
    seconds = LAST_LINES_OF_A_STOP
    try:
        yield
    except Exception:
        seconds = LAST_LINES_OF_A_FAILURE
        raise
    finally:
        try:
            background.end(seconds)
        finally:
            _background = None
        if lost := background.unreported():
            on_loss(lost)


class _Background:
    """A `LineWriter` for each file that streams lead to."""

    def __init__(self, on_loss: Callable[[int], None]) -> None:
        self._on_loss = on_loss
        self._reporting = threading.local()
        """In `lines`: how many lines one stands for that this thread adds now: more while it reports a loss."""
        self._unreported = 0
        self._nowhere = os.open(os.devnull, os.O_WRONLY)  # now: later the process may have no descriptor left
        # Re-entrant: whatever runs within it, a library may log in its destructors, when Python collects garbage.
        self._lock = threading.RLock()
        self._files: dict[TextIO, object] = {}
        """Where each stream leads; as it was at first: afterwards it may have been discarded."""
        self._writers: dict[object, LineWriter] = {}
        """By file."""
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                self._files[stream] = _file_of(stream)

    def add(self, text: str, stream: TextIO) -> None:
        self._writer_for(stream).add(text, stream, getattr(self._reporting, "lines", 1))

    def _report(self, lost: int) -> None:
        self._reporting.lines = lost
        try:
            self._on_loss(lost)
        finally:
            self._reporting.lines = 1

    def _writer_for(self, stream: TextIO) -> LineWriter:
        with self._lock:
            file = self._files.get(stream)
            if file is None:
                file = self._files[stream] = _file_of(stream)
            if file not in self._writers:
                self._writers[file] = LineWriter(self._report, partial(self._discard, file))
            return self._writers[file]

    def _discard(self, file: object) -> None:
        """Nothing that is still to be said must hang on a file that is stuck, or complain about one without a reader,
        whichever stream leads there."""
        for stream, its_file in list(self._files.items()):
            if its_file == file:
                with suppress(OSError, ValueError):  # in memory, or closed
                    os.dup2(self._nowhere, stream.fileno())

    def end(self, seconds: float) -> None:
        """Joins the threads once everything is written, or leaves those that hang to the end of the process. Standard
        error, where losses are reported, is the last to end."""
        until = time.monotonic() + seconds
        errors = self._files.get(sys.stderr) if sys.stderr is not None else None
        try:
            others = [writer for file, writer in list(self._writers.items()) if file != errors]
            self._finish(others, until)
            if lost := sum(writer.lost for writer in others):
                self._report(lost)
            last = [writer for writer in self._writers.values() if writer not in others]
            self._finish(last, max(until, time.monotonic() + LAST_REPORT))
            until = time.monotonic() + LAST_WRITE
            for writer in (*others, *last):
                writer.join(until)
            self._unreported = sum(writer.lost for writer in last)
        finally:  # also if Ctrl-C cuts it short
            stuck = [file for file, writer in self._writers.items() if writer.is_alive()]
            for file in stuck:
                self._discard(file)
            if not stuck:  # one that comes back may still need it
                os.close(self._nowhere)

    @staticmethod
    def _finish(writers: Sequence[LineWriter], until: float) -> None:
        for writer in writers:
            writer.finish()
        for writer in writers:
            writer.join(until)
        for writer in writers:
            writer.give_up_the_rest()

    def unreported(self) -> int:
        """After `end`: how many lines were lost on standard error that can be reported there now."""
        with suppress(OSError, ValueError):  # in memory, or closed
            if self._unreported and not select.select((), (sys.stderr.fileno(),), (), LAST_WRITE)[1]:
                return 0
        return self._unreported


def _file_of(stream: TextIO) -> object:
    """The same for all streams that lead to the same file."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):  # in memory, as in tests, or closed
        return stream
    return status.st_dev, status.st_ino


def flush(stream: TextIO | None) -> OSError | None:
    """Flushes the stream. Returns why that failed, if it did; what was stuck in it is dropped then."""
    if stream is None:
        return None
    try:
        stream.flush()
    except OSError as cause:
        discard(stream)
        return cause
    return None
