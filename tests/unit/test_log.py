"""How events look on standard error."""

from __future__ import annotations

import io

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
