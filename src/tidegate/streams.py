"""Standard output and standard error in whatever state we inherit them: closed, full, without a reader, or with one
that does not read."""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import NamedTuple, TextIO

MAX_WAITING_LINES = 4_096
"""Lines that wait for a reader, beside as many that are being written; more are dropped and counted."""
MAX_WRITE = select.PIPE_BUF
"""Bytes that the thread writes at a time, if a single line is not longer: few, so that each write tells that there is a
reader, however slow; and a pipe takes so many whole or not at all (pipe(7))."""
PATIENCE = 0.1
"""Seconds that one who finds no room for a line waits for the thread, to which a busy event loop hardly ever leaves the
interpreter. If that was not enough, nobody waits again until the thread has come round."""
LAST_LINES = 0.2
"""Seconds without progress after which waiting lines are given up at the end."""
LAST_LINES_OF_A_STOP = 0.2
"""Seconds that they have in all when the process was asked to stop: it must be gone 2 s after SIGTERM, and the
Supervisor may have taken its `STOP_DEADLINE` by then."""
LAST_LINES_OF_A_FAILURE = 10.0
"""Seconds that they have in all when something failed: the last of them say why. SIGTERM still ends it at once."""
LAST_WRITE = 0.1
"""Seconds that a write has to come back, once the lines behind it are given up because that time is over."""

_background: _Background | None = None


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
    if _background is not None:
        _background.add(text, stream)
        return
    try:
        stream.flush()
        left = memoryview(_encoded(text, stream))
        while left:
            left = left[_write(left, stream) :]
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
    unless their reader takes none for `LAST_LINES`, or they take longer than the end of a process may. Then they are
    lost, too; and a stream that is stuck is given up, for good."""
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
        if lost := background.lost():
            on_loss(lost)


class _Background:
    """A `_LineWriter` for each file that streams lead to."""

    def __init__(self, on_loss: Callable[[int], None]) -> None:
        self._on_loss = on_loss
        self._nowhere = os.open(os.devnull, os.O_WRONLY)  # now: later the process may have no descriptor left
        self._lock = threading.Lock()
        self._files: dict[TextIO, object] = {}
        """Where each stream leads; as it was at first: afterwards it may have been discarded."""
        self._writers: dict[object, _LineWriter] = {}
        """By file."""
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                self._files[stream] = _file_of(stream)

    def add(self, text: str, stream: TextIO) -> None:
        self._writer_for(stream).add(text, stream)

    def _writer_for(self, stream: TextIO) -> _LineWriter:
        with self._lock:
            file = self._files.get(stream)
            if file is None:
                file = self._files[stream] = _file_of(stream)
            if file not in self._writers:
                self._writers[file] = _LineWriter(self._on_loss, partial(self._discard, file))
            return self._writers[file]

    def _discard(self, file: object) -> None:
        """Nothing that is still to be said must hang on a file that is stuck, or complain about one without a reader,
        whichever stream leads there."""
        for stream, its_file in list(self._files.items()):
            if its_file == file:
                with suppress(OSError, ValueError):  # in memory, or closed
                    os.dup2(self._nowhere, stream.fileno())

    def end(self, seconds: float) -> None:
        """Joins the threads once everything is written, or leaves those that hang to the end of the process."""
        writers = self._writers.values()
        until = time.monotonic() + seconds
        try:
            for writer in writers:
                writer.finish()
            for writer in writers:
                writer.join(until)
            for writer in writers:
                writer.give_up_the_rest()
            until = time.monotonic() + LAST_WRITE
            for writer in writers:
                writer.join(until)
        finally:  # also if Ctrl-C cuts it short
            stuck = [file for file, writer in self._writers.items() if writer.is_alive()]
            for file in stuck:
                self._discard(file)
            if not stuck:  # one that comes back may still need it
                os.close(self._nowhere)

    def lost(self) -> int:
        """How many lines were lost that `on_loss` does not know of. After `end`."""
        return sum(writer.lost for writer in self._writers.values())


class _Line(NamedTuple):
    data: bytes
    stream: TextIO
    stands_for: int
    """How many lines are lost if this one is: it may say how many others were."""


class _LineWriter:
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
        self._reporting = 1
        """What a line stands for that is added now: all those that were lost, while `on_loss` says so."""
        self._late = False
        self._ending = False
        self._torn = False
        """Whether the file ends within a line."""
        self._moved_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="lines", daemon=True)
        self._thread.start()

    def add(self, text: str, stream: TextIO) -> None:
        with self._changed:
            if not (self._has_room() or self._late):
                self._late = not self._changed.wait_for(self._has_room, PATIENCE)
            if not self._has_room():
                self._lost += 1
                return
            self._waiting.append(_Line(_encoded(text, stream), stream, self._reporting))
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
            self._reporting, self._lost = self._lost, 0
            self._on_loss(self._reporting)
            self._reporting = 1
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
                written += _write(memoryview(data)[written:], stream)
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


def _file_of(stream: TextIO) -> object:
    """The same for all streams that lead to the same file."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):  # in memory, as in tests, or closed
        return stream
    return status.st_dev, status.st_ino


def _encoded(text: str, stream: TextIO) -> bytes:
    return f"{text}\n".encode(stream.encoding or "utf-8", "backslashreplace")


def _write(data: memoryview, stream: TextIO) -> int:
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
