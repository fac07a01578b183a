"""What unit tests share."""

from __future__ import annotations

import contextlib
import signal
import socket
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import structlog

from tests.unit.fakes import FakeClientHost, FakeEngine, FakeHost
from tidegate.cli import main
from tidegate.cli.runtime import Runtime
from tidegate.settings import DnsSettings, GatewaySettings, Settings


@dataclass
class Outcome:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


@dataclass
class CommandLine:
    """Runs the real command line on a fake engine and a fake host."""

    capture: pytest.CaptureFixture[str]
    runtime: Runtime
    engine: FakeEngine = field(default_factory=FakeEngine)
    host: FakeHost = field(default_factory=FakeHost)
    client_host: FakeClientHost = field(default_factory=FakeClientHost)

    def __call__(self, *arguments: object) -> Outcome:
        code = main([str(argument) for argument in arguments], self.runtime)
        captured = self.capture.readouterr()
        return Outcome(code, captured.out, captured.err)

    def refused(self, code: int, *arguments: object) -> str:
        """Runs a command that must be refused, with `code` and in one line. Returns that line."""
        outcome = self(*arguments)
        assert outcome.code == code, outcome
        assert "Traceback" not in outcome.err
        lines = outcome.err.splitlines()
        assert len(lines) == 1, outcome.err
        assert lines[0].startswith("tidegate: ")
        return lines[0]


@pytest.fixture
def tidegate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> CommandLine:
    for name in ("TIDEGATE_CONFIG", "TIDEGATE_STATE_DIR", "TIDEGATE_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    engine, host, client_host = FakeEngine(), FakeHost(), FakeClientHost()
    runtime = Runtime(lambda: engine, lambda: host, lambda: client_host, tmp_path / "no-default.toml")
    return CommandLine(capsys, runtime, engine, host, client_host)


@pytest.fixture(autouse=True)
def _ordinary_logging() -> Iterator[None]:
    yield
    structlog.reset_defaults()


@pytest.fixture
def at_a_terminal(_signals_as_before: None) -> None:
    """Signals act as at a terminal, even if the tests were started with some ignored (`nohup make test &`)."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    """asyncio leaves signals that it handled with their default, and a hangup would end tests that should outlive
    it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody can enter; `tmp_path` is inside one that only its user can."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


@pytest.fixture
def free_port() -> int:
    """A UDP port that nobody has at the moment."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a settings file."""

    def write_settings(text: str) -> Path:
        path = tmp_path / "tidegate.toml"
        path.write_text(text)
        return path

    return write_settings


@pytest.fixture
def settings(tmp_path: Path, free_port: int) -> Settings:
    """Of a gateway with a state directory of the test's own, and without DNS."""
    return Settings(
        state_dir=tmp_path / "state",
        gateway=GatewaySettings.model_validate({"listen": f"127.0.0.1:{free_port}"}),
        dns=DnsSettings(enabled=False),
    )


def names_in_store(state: Path) -> list[str]:
    """Reads the store although the process that adds a peer holds the lock."""
    with contextlib.closing(sqlite3.connect(f"file:{state}/tidegate.db?mode=ro", uri=True)) as store:
        return [name for (name,) in store.execute("SELECT name FROM peers")]
