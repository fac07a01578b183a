"""Standard output and standard error in whatever state we inherit them: closed, full, without a reader, or with one
that does not read."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import groupby
from operator import itemgetter
from typing import TextIO

MAX_WAITING_LINES = 4_096
"""Lines that wait for a reader, beside as many that are being written; more are dropped and counted."""
PATIENCE = 0.1
"""Seconds that one who finds no room for a line waits for the thread, to which a busy event loop hardly ever leaves the
interpreter. If that was not enough, nobody waits again until the thread has come round."""
LAST_LINES = 0.2
"""Seconds that waiting lines have at the end: the process must be gone 2 s after SIGTERM, and the Supervisor may have
taken its `STOP_DEADLINE` by then."""

_writer: _LineWriter | None = None


def occupy_closed_descriptors() -> None:
    """Opens /dev/null in place of standard streams that are closed (`2>&-`), before a socket gets their number: what C
    or Rust code prints to descriptor 2 would go into that socket."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


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
    if _writer is not None:
        _writer.add(text, stream)
        return
    with _losing_only_lines(stream):
        stream.flush()
        _write(f"{text}\n", stream)


@contextmanager
def saying_in_background(on_loss: Callable[[int], None]) -> Iterator[None]:
    """While the block lasts, a thread prints what is said, so that a reader that lives but does not read (a paused
    pager, a log driver that hangs) holds nobody up. The lines keep their order, across both streams. Those that find no
    room are dropped; once there is room again `on_loss` is called with their number, and can say it in their place. At
    the end of the block all are out; but a stream that takes none for `LAST_LINES` is given up, for good."""
    global _writer  # noqa: PLW0603 -- as the standard streams themselves, it is the process's
    if _writer is not None:
        raise RuntimeError("the process's lines are written in the background already")
    _writer = _LineWriter(on_loss)
    try:
        yield
    finally:
        _writer.end()
        _writer = None


class _LineWriter:
    """A thread that writes lines, in their order."""

    def __init__(self, on_loss: Callable[[int], None]) -> None:
        self._on_loss = on_loss
        self._changed = threading.Condition()
        self._lines: list[tuple[str, TextIO]] = []
        self._lost = 0
        self._late = False
        self._ending = False
        self._writing_to: TextIO | None = None
        self._thread = threading.Thread(target=self._run, name="lines", daemon=True)
        self._thread.start()

    def add(self, text: str, stream: TextIO) -> None:
        with self._changed:
            if not (self._has_room() or self._late):
                self._late = not self._changed.wait_for(self._has_room, PATIENCE)
            if not self._has_room():
                self._lost += 1
                return
            self._lines.append((text, stream))
            self._changed.notify_all()

    def _has_room(self) -> bool:
        return len(self._lines) < MAX_WAITING_LINES

    def end(self) -> None:
        """Joins the thread once everything is written, or leaves it to the end of the process if it hangs."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        self._thread.join(LAST_LINES)
        if self._thread.is_alive() and self._writing_to is not None:
            discard(self._writing_to)  # nothing that is still to be said must hang on it

    def _run(self) -> None:
        while lines := self._take():
            for stream, together in groupby(lines, key=itemgetter(1)):
                self._writing_to = stream
                with suppress(ValueError), _losing_only_lines(stream):  # ValueError: we closed it ourselves
                    _write("".join(f"{text}\n" for text, _ in together), stream)

    def _take(self) -> list[tuple[str, TextIO]]:
        """Waits for lines, and takes all of them: it may not come round again before hundreds more were said. None at
        the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._ending)
            taken, self._lines, self._late = self._lines, [], False
            self._changed.notify_all()
            lost, self._lost = self._lost, 0
            if lost:
                self._on_loss(lost)
            return taken


def _write(text: str, stream: TextIO) -> None:
    """Writes to the stream's descriptor, past its buffer: a thread that hangs in a write to the buffer keeps it locked,
    so that the interpreter could not end; and a buffer cannot wait where the descriptor is non-blocking."""
    try:
        descriptor = stream.fileno()
    except OSError:  # in memory, as in tests
        stream.write(text)
        stream.flush()
        return
    left = memoryview(text.encode(stream.encoding, "backslashreplace"))
    while left:
        try:
            left = left[os.write(descriptor, left) :]
        except BlockingIOError:  # whoever shares the stream has made it non-blocking
            select.select((), (descriptor,), ())


@contextmanager
def _losing_only_lines(stream: TextIO) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        discard(stream)
    except OSError:
        pass  # a full disk, which may have room again for the next line


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
