"""What commands print: tables for people and JSON for programs on standard output, remarks on standard error."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from tidegate.errors import TidegateError
from tidegate.streams import say

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

UNBOUNDED = 1 << 16
"""Width of output to a pipe or file, in columns: without a terminal to fit, tables are as wide as they need to be."""

NARROW = 8
"""The narrowest a folded text column may be, in screen columns: below this, folded text is hard to read."""
GAP = 2
"""Screen columns that a table's column needs in addition to its text."""

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def unwritable(cause: OSError, done: str | None = None) -> TidegateError:
    return TidegateError(
        f"standard output cannot be written: {cause.strerror}",
        hint=f"done nevertheless: {done}" if done is not None else None,
    )


def closed() -> OSError:
    """The error for a standard stream that was closed before we started: `print` would not complain."""
    return OSError(errno.EBADF, os.strerror(errno.EBADF))


@contextmanager
def written(done: str | None = None) -> Iterator[None]:
    """Around code that prints, and that can raise `OSError` for no other reason. Raises `TidegateError` if the output
    does not get through, with what the command has `done` before."""
    try:
        if sys.stdout is None:
            raise closed()
        yield
        sys.stdout.flush()
    except BrokenPipeError as cause:
        if done is None:
            raise  # the reader has seen enough
        raise unwritable(cause, done) from cause
    except OSError as cause:
        raise unwritable(cause, done) from cause


def print_json(answer: BaseModel, *, done: str | None = None) -> None:
    with written(done):
        # In ASCII, so that it is JSON whatever the encoding of the output is.
        print(answer.model_dump_json(indent=2, ensure_ascii=True))


class Handout:
    """Text that exists nowhere else, and how much of it has been printed."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._size: int | None = None
        self._written: list[int] = []
        """Bytes, write by write."""

    def print(self) -> None:
        """Prints the text at once, bypassing the buffer of standard output: text left in the buffer by a signal would
        still be printed afterwards. Raises `OSError` if it does not get through."""
        stdout: TextIO | None = sys.stdout
        if stdout is None:
            raise closed()
        stdout.flush()
        unbuffered = getattr(stdout.buffer, "raw", stdout.buffer)  # with `python -u` there is no buffer
        data = self._text.encode(stdout.encoding)
        self._size = len(data)
        while not self.is_out():
            left = data[sum(self._written) :]
            before = len(self._written)
            # Written and recorded in one step of C: between two steps of Python a signal handler could raise.
            self._written.extend(filter(None, map(unbuffered.write, (left,))))
            if len(self._written) == before:  # it was made non-blocking, and is full
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def is_out(self) -> bool:
        """Whether it has all been printed, whatever failed afterwards."""
        return sum(self._written) == self._size


def print_rich(*things: RenderableType) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.file.isatty():  # `is_terminal` is about colours, which variables can force in a pipe
        console.width = UNBOUNDED
    with written():
        for thing in things:
            console.print(thing)


def remark(text: str) -> None:
    """One line for people, apart from the actual output."""
    say(f"tidegate: {text}", sys.stderr)


def table(
    title: str | None, columns: Sequence[str], rows: Sequence[Sequence[str]], *, empty: str
) -> RenderableType:
    """A table; columns whose name ends with ``>`` are aligned to the right, those with ``!`` never fold. If the table
    is too wide, columns of text are folded, the widest first, and so are values with blanks in them. If that does not
    help, each row becomes lines of ``name: value``: nothing is ever cut."""
    from rich.markup import escape

    if not rows:
        return f"[dim]{escape(empty)}[/]"
    return _Fitted(title, columns, rows)


class _Fitted:
    """A table that is laid out when the terminal's width is known."""

    def __init__(self, title: str | None, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self._title = title
        self._names = [column.rstrip(">!") for column in columns]
        self._right = [column.endswith(">") for column in columns]
        self._rows = rows
        self._natural: list[int] = []
        self._least: list[int] = []
        for number, column in enumerate(columns):
            cells = [row[number] for row in rows]
            self._natural.append(_longest([self._names[number], *cells]))
            if column.endswith("!"):
                least = _longest(cells)
            else:
                least = _longest_word(cells) if self._right[number] else min(_longest_word(cells), NARROW)
            self._least.append(max(least, _longest_word([self._names[number]])))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = _fit(self._natural, self._least, options.max_width - GAP * len(self._names))
        if widths is None:
            yield from self._lines()
        else:
            yield self._table(widths)

    def _table(self, widths: Sequence[int]) -> RenderableType:
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        made = Table(
            title=self._title,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        for name, right, width in zip(self._names, self._right, widths, strict=True):
            made.add_column(name, justify="right" if right else "left", overflow="fold", width=width)
        for row in self._rows:
            made.add_row(*map(escape, row))
        return made

    def _lines(self) -> Iterator[RenderableType]:
        from rich.text import Text

        if self._title is not None:
            yield Text(self._title, overflow="fold")
        for row in self._rows:
            for name, value in zip(self._names, row, strict=True):
                yield Text(f"{name}: {value}" if name else value, overflow="fold")
            yield Text()


def _longest(texts: Iterable[str]) -> int:
    from rich.cells import cell_len

    return max(map(cell_len, texts))


def _longest_word(texts: Iterable[str]) -> int:
    return _longest([word for text in texts for word in (text.split() or [""])])


def _fit(natural: Sequence[int], least: Sequence[int], room: int) -> list[int] | None:
    """Column widths that add up to at most `room`; `None` if even the least widths do not fit."""
    if sum(least) > room:
        return None
    widths = list(natural)
    while sum(widths) > room:
        widest = max(
            (number for number, width in enumerate(widths) if width > least[number]), key=widths.__getitem__
        )
        widths[widest] -= 1
    return widths


def counted(count: int, thing: str) -> str:
    """A number of things, whose plural has an ``s``."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def amount(count: int) -> str:
    """A number of bytes, for people."""
    value = float(count)
    for unit in _UNITS[:-1]:
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} {_UNITS[-1]}"


def duration(seconds: float) -> str:
    """A time span for people, in its two largest units."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    parts = [(whole // 86_400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    first = next(index for index, (value, _) in enumerate(parts) if value)
    return " ".join(f"{value} {unit}" for value, unit in parts[first : first + 2] if value)


def moment(since_the_epoch: float) -> str:
    """A time for people, such as ``2026-11-28 06:30:00 UTC``: that of the log's lines, and not of some time zone."""
    from datetime import UTC, datetime

    return f"{datetime.fromtimestamp(since_the_epoch, UTC):%Y-%m-%d %H:%M:%S} UTC"


def ago(seconds: float | None) -> str:
    return "never" if seconds is None else f"{duration(seconds)} ago"
