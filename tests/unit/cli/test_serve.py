"""`tidegate serve`, on a fake engine and a fake host, until it is told to stop."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from pathlib import Path

import pytest

from tests.unit.conftest import CommandLine

pytestmark = pytest.mark.usefixtures("at_a_terminal")


def told(
    tidegate: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, port: int, log_format: str
) -> list[str]:
    """The lines that a gateway prints from its start to its stop."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("TIDEGATE_LOG__FORMAT", log_format)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(10)

        def stop_when_ready() -> None:
            assert manager.recv(1000).startswith(b"READY=1")
            os.kill(os.getpid(), signal.SIGTERM)

        stopper = threading.Thread(target=stop_when_ready)
        stopper.start()
        outcome = tidegate(
            *("serve", "--state-dir", tmp_path / "state", "--listen", f"127.0.0.1:{port}", "--no-dns")
        )
        stopper.join()
    assert (outcome.code, outcome.out) == (0, "")
    return outcome.err.splitlines()


def test_a_log_in_json_is_json_from_its_first_line_on(
    tidegate: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free_port: int
) -> None:
    events = [json.loads(line) for line in told(tidegate, monkeypatch, tmp_path, free_port, "json")]
    assert events[0]["event"] == (
        f"listening on 127.0.0.1:{free_port} (UDP), external eth0 192.0.2.2, 0 peers"
    )
    assert [event["event"] for event in events[1:]] == ["stopping"]


def test_otherwise_its_first_line_is_for_people(
    tidegate: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free_port: int
) -> None:
    first, *_ = told(tidegate, monkeypatch, tmp_path, free_port, "logfmt")
    assert first.startswith(f"tidegate: listening on 127.0.0.1:{free_port} (UDP), ")
