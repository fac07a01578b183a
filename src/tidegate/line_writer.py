"""A thread that writes lines to one file, so that a reader that does not read holds nobody else up."""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple, TextIO

MAX_WAITING_LINES = 16_384
"""Lines that wait for a reader, beside as many that are being written; more are dropped and counted."""
MAX_WRITE = select.PIPE_BUF
"""Bytes that the thread writes at a time, if a single line is not longer: few, so that each write tells that there is a
reader, however slow; and a pipe takes so many whole or not at all (pipe(7))."""
PATIENCE = 0.1
"""Seconds that one who finds no room for a line waits for the thread, to which a busy event loop hardly ever leaves the
interpreter. If that was not enough, nobody waits again until the thread has come round."""
LAST_LINES = 0.2
"""Seconds without progress after which waiting lines are given up at the end."""


class _Line(NamedTuple):
    data: bytes
    stream: TextIO
    stands_for: int
    """How many lines are lost if this one is: it may say how many others were."""


class LineWriter:
    """A thread that writes lines to one file, in their order."""

    def __init__(self, on_loss: Callable[[int], None], discard: Callable[[], None]) -> None:
        self._on_loss = on_loss
        self._discard = discard
        self._changed = threading.Condition()
        self._waiting: list[_Line] = []
        self._taken: deque[_Line] = deque()
        """From those that waited, to be written before any other is taken."""
        self._writing: list[_Line] = []
        self._lost = 0
        self._late = False
        self._ending = False
        self._torn = False
        """Whether the file ends within a line."""
        self._moved_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="lines", daemon=True)
        self._thread.start()

    def add(self, text: str, stream: TextIO, stands_for: int) -> None:
        """`stands_for` is how many lines are lost if this one is: it may say how many others were."""
        with self._changed:
            if not (self._has_room() or self._late):
                self._late = not self._changed.wait_for(self._has_room, PATIENCE)
            if not self._has_room():
                self._lost += stands_for
                return
            self._waiting.append(_Line(encoded(text, stream), stream, stands_for))
            self._changed.notify_all()

    def _has_room(self) -> bool:
        return len(self._waiting) < MAX_WAITING_LINES

    def finish(self) -> None:
        """Lets the thread end, once it has written everything."""
        with self._changed:
            self._ending = True
            self._moved_at = time.monotonic()
            self._changed.notify_all()

    def join(self, until: float) -> None:
        """Waits for the end of the thread as long as it makes progress, and no longer than `until`."""
        while self.is_alive() and (left := min(self._moved_at + LAST_LINES, until) - time.monotonic()) > 0:
            self._thread.join(left)

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def give_up_the_rest(self) -> None:
        """Leaves out all lines but those of a write that is under way."""
        with self._changed:
            self._lost += _count(self._taken) + _count(self._waiting)
            self._taken.clear()
            self._waiting.clear()

    @property
    def lost(self) -> int:
        """Lines that were lost and not reported yet; also those of a write that hangs."""
        with self._changed:
            return self._lost + _count(self._writing)

    def _run(self) -> None:
        while lines := self._next():
            self._write(lines)

    def _next(self) -> list[_Line]:
        """Waits for lines, and returns as many as are written at a time. None at the end."""
        with self._changed:
            self._writing = []
            if not self._taken:
                self._take()
            size = 0
            while self._taken and (not self._writing or self._taken[0].stream is self._writing[0].stream):
                size += len(self._taken[0].data)
                if self._writing and size > MAX_WRITE:
                    break
                self._writing.append(self._taken.popleft())
            return self._writing

    def _take(self) -> None:
        """Takes all lines that wait: the thread may not come round again before hundreds more were said."""
        self._changed.wait_for(lambda: self._waiting or self._ending)
        self._take_waiting()
        self._late = False
        self._changed.notify_all()
        if self._taken and self._lost:
            lost, self._lost = self._lost, 0
            self._on_loss(lost)
            self._take_waiting()

    def _take_waiting(self) -> None:
        self._taken.extend(self._waiting)
        self._waiting.clear()

    def _write(self, lines: list[_Line]) -> None:
        stream = lines[0].stream
        data = b"".join([b"\n" * self._torn, *(line.data for line in lines)])
        written = 0
        try:
            while written < len(data):
                written += write(memoryview(data)[written:], stream)
                self._moved_at = time.monotonic()
        except BrokenPipeError:
            self._discard()
        except OSError:  # a full disk, which may have room again for the next lines
            self._account(lines, data, written)
        except ValueError:  # we closed it ourselves
            pass
        else:
            self._torn = False

    def _account(self, lines: list[_Line], data: bytes, written: int) -> None:
        """Counts the lines of which no more than `written` bytes of `data` were written."""
        end = len(data)
        with self._changed:
            for line in reversed(lines):
                if end <= written:
                    break
                self._lost += line.stands_for
                end -= len(line.data)
            self._writing = []
        if written:
            self._torn = not data[:written].endswith(b"\n")


def _count(lines: Iterable[_Line]) -> int:
    return sum(line.stands_for for line in lines)


def encoded(text: str, stream: TextIO) -> bytes:
    return f"{text}\n".encode(stream.encoding or "utf-8", "backslashreplace")


def write(data: memoryview, stream: TextIO) -> int:
    """Writes to the stream's descriptor, past its buffer: a thread that hangs in a write to the buffer keeps it locked,
    so that the interpreter could not end; and a buffer cannot wait where the descriptor is non-blocking. Returns how
    many bytes were written; zero if there was no room."""
    try:
        descriptor = stream.fileno()
    except OSError:  # in memory, as in tests
        stream.write(bytes(data).decode(stream.encoding or "utf-8"))
        stream.flush()
        return len(data)
    try:
        return os.write(descriptor, data)
    except BlockingIOError:  # whoever shares the stream has made it non-blocking
        select.select((), (descriptor,), ())
        return 0
