"""How events look on standard error."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from typing import Literal
from uuid import uuid4

import pytest
import structlog

from tidegate.log import configure_logging
from tidegate.settings import LogSettings


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def logged_on_a_terminal(monkeypatch: pytest.MonkeyPatch, **variables: str) -> str:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    configure_logging(LogSettings())
    structlog.get_logger().warning("the tide", height=3)
    assert "the tide" in terminal.getvalue()
    return terminal.getvalue()


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_a_terminal_without_colours_gets_none(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    assert "\x1b" not in logged_on_a_terminal(monkeypatch, **variables)


@pytest.mark.parametrize("variables", [{}, {"NO_COLOR": ""}], ids=str)
def test_any_other_gets_colours(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    # https://no-color.org: "when present and not an empty string"
    assert "\x1b" in logged_on_a_terminal(monkeypatch, **variables)


LIBRARY = """
import asyncio, logging
from tidegate.log import configure_logging
from tidegate.settings import LogSettings

for level in ("info", "warning"):  # set again, as by a reload
    configure_logging(LogSettings(level=level, format="json"))
asyncio_log = logging.getLogger("asyncio")
asyncio_log.info("no news")
for _ in range(100):
    asyncio_log.warning("%s() raised exception.", "socket.send")
try:
    raise ZeroDivisionError("of nothing")
except ZeroDivisionError:
    asyncio_log.exception("a task failed")
"""


def test_what_libraries_log_is_logged_as_our_own_and_at_a_bounded_rate() -> None:
    """Without a handler, `logging` prints it past the log, as often as a client may provoke it."""
    done = subprocess.run([sys.executable, "-c", LIBRARY], capture_output=True, text=True, check=True)
    *warnings, failed = map(json.loads, done.stderr.splitlines())
    assert len(warnings) == 5
    for line in warnings:
        assert (line["event"], line["level"]) == ("socket.send() raised exception.", "warning")
        assert line["logger"] == "asyncio"
    assert (failed["event"], failed["level"]) == ("a task failed", "error")
    assert "ZeroDivisionError: of nothing" in failed["exception"]


def library_says(
    monkeypatch: pytest.MonkeyPatch, form: Literal["console", "logfmt", "json"], *message: object
) -> str:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own is strict
    configure_logging(LogSettings(format=form))
    try:
        raise ValueError("of \x1b[31mcolour")
    except ValueError:
        logging.getLogger(f"library.{uuid4()}").warning(*message, exc_info=True)  # each at a rate of its own
    return stream.getvalue()


@pytest.mark.parametrize("form", ["console", "logfmt", "json"])
def test_a_librarys_message_whose_arguments_do_not_fit_is_logged_without_them(
    monkeypatch: pytest.MonkeyPatch, form: Literal["console", "logfmt", "json"]
) -> None:
    assert "%d low tides" in library_says(monkeypatch, form, "%d low tides", "three")


@pytest.mark.parametrize("form", ["console", "logfmt", "json"])
def test_control_characters_in_what_a_library_logs_reach_no_terminal(
    monkeypatch: pytest.MonkeyPatch, form: Literal["console", "logfmt", "json"]
) -> None:
    said = library_says(monkeypatch, form, "bad request: %s", "\x1b[2J\n12:00:00 [info] all is well\x9b")
    assert "\x1b" not in said and "\x9b" not in said
    assert "all is well" in said.splitlines()[0]
    assert "[31mcolour" in said
