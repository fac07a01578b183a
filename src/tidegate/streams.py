"""Standard output and standard error as whoever started us left them: closed, full, or without a reader."""

from __future__ import annotations

import os
from typing import TextIO


def occupy_closed_descriptors() -> None:
    """Puts /dev/null where standard streams were closed (`2>&-`), before a socket gets their number: what C or Rust
    print to descriptor 2 would go into it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def is_terminal(stream: TextIO | None) -> bool:
    """A closed stream is `None`."""
    return stream is not None and stream.isatty()


def discard(stream: TextIO) -> None:
    """Lets go of what is stuck in a stream: Python would complain once more when it closes it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def say(text: str, stream: TextIO | None) -> None:
    """One line, at once. Where nobody reads it any more it is lost, and nothing else: there is more to do than to
    tell."""
    if stream is None:  # closed by whoever started us; `print` would take standard output
        return
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        discard(stream)
    except OSError:
        pass  # a full disk, which may have room again for the next line


def flush(stream: TextIO | None) -> OSError | None:
    """Why what was printed does not get through; it is let go of then."""
    if stream is None:
        return None
    try:
        stream.flush()
    except OSError as cause:
        discard(stream)
        return cause
    return None
