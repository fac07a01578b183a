"""Standard output and standard error in whatever state we inherit them: closed, full, or without a reader."""

from __future__ import annotations

import os
from typing import TextIO


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
    if stream is None:  # closed before we were started; `print` would take standard output
        return
    try:
        print(text, file=stream, flush=True)
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
