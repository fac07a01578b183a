"""Logging: events with fields, on stderr; readable on a terminal, as logfmt or JSON elsewhere. What libraries log comes
here, too.

Secrets never get here: the `repr` of values that hold keys (`Peer`, `Profile`) does not show them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable

import structlog
from structlog.typing import Processor

from tidegate.settings import LogSettings
from tidegate.streams import is_terminal, say

log = structlog.get_logger("tidegate.log")


def configure_logging(settings: LogSettings) -> None:
    """Sets level and format. To be called before the first event, and again when the settings change."""
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    terminal = is_terminal(sys.stderr)
    for_people = settings.format == "console" or (settings.format == "auto" and terminal)
    renderer: Processor
    if for_people:
        renderer = structlog.dev.ConsoleRenderer(colors=terminal and _colours_are_wanted())
    elif settings.format == "json":
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"])
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S" if for_people else "iso", utc=not for_people),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: _StderrLogger(),
        cache_logger_on_first_use=False,
    )
    logging.getLogger().addHandler(_LIBRARIES)  # once: the second time, it is there


def report_lost_lines(count: int) -> None:
    """For `saying_in_background`. An error, so that every level shows it: lines of any level are missing."""
    log.error("lines were lost: nobody read them, or they could not be written", count=count)


def _colours_are_wanted() -> bool:
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"  # https://no-color.org


class _StderrLogger:
    """Prints to standard error. If nobody reads that any more, only the line is lost."""

    def msg(self, message: str) -> None:
        with contextlib.suppress(ValueError):  # a stream that this process itself has closed
            say(message, sys.stderr)

    debug = info = warning = error = critical = exception = msg


class RateLimit:
    """Lets at most `burst` events of each kind through per `period` seconds, and counts the rest.

    State: one entry per kind. Kinds come from a fixed vocabulary; `max_kinds` bounds it all the same.
    """

    def __init__(
        self, clock: Callable[[], float], *, burst: int = 5, period: float = 60.0, max_kinds: int = 64
    ) -> None:
        self._clock = clock
        self._burst = burst
        self._period = period
        self._max_kinds = max_kinds
        self._seen: dict[str, tuple[float, int]] = {}

    def admit(self, kind: str) -> int | None:
        """`None` if the event is to be dropped, otherwise how many were dropped in the period before."""
        now = self._clock()
        began, count = self._seen.get(kind, (now, 0))
        suppressed = 0
        if now - began >= self._period:
            suppressed, began, count = max(0, count - self._burst), now, 0
        if kind not in self._seen and len(self._seen) >= self._max_kinds:
            return None
        self._seen[kind] = (began, count + 1)
        return suppressed if count < self._burst else None


class _LibraryHandler(logging.Handler):
    """Takes the warnings and errors of libraries, asyncio above all, to our own log. At a bounded rate: it may be
    somebody outside who provokes them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._admit = RateLimit(time.monotonic).admit

    def emit(self, record: logging.LogRecord) -> None:
        suppressed = self._admit(f"{record.name} {record.levelname}")
        if suppressed is not None:
            complain = log.error if record.levelno >= logging.ERROR else log.warning
            fields = {"logger": record.name, "suppressed": suppressed}
            if record.exc_info:
                fields["exception"] = _printable(_FORMATTER.formatException(record.exc_info), keep="\n")
            complain(_printable(_message(record)), **fields)


_FORMATTER = logging.Formatter()


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001 -- the library's mistake (arguments that do not fit) must not become its failure
        return str(record.msg)


def _printable(text: str, keep: str = "") -> str:
    """The text with its control characters escaped: a library may repeat what somebody outside has sent, and the log is
    read on terminals."""
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


_LIBRARIES = _LibraryHandler()
