"""The exit code of a command that a signal has interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from tidegate.interrupts import SignalInterrupt, Unwinding, interrupt_on_signals


@contextmanager
def interruptible() -> Iterator[Unwinding]:
    """Around work that is undone if a signal interrupts it. Exits with 128 + the signal's number; Typer by itself would
    exit with 130, as for Ctrl-C."""
    try:
        with interrupt_on_signals() as unwinding:
            yield unwinding
    except SignalInterrupt as interrupted:
        raise typer.Exit(128 + interrupted.number) from None
