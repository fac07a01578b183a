"""`tidegate serve`, on a fake engine and a fake host, until it is told to stop."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.unit.conftest import CommandLine
from tidegate.engine import AccessPolicy

pytestmark = pytest.mark.usefixtures("at_a_terminal")


def told(
    tidegate: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    port: int,
    log_format: str,
    meanwhile: Callable[[socket.socket], None] = lambda _: None,
) -> list[str]:
    """The lines that a gateway prints from its start to its stop. `meanwhile` is called with the service manager's
    socket while the gateway serves."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("TIDEGATE_LOG__FORMAT", log_format)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, ThreadPoolExecutor() as pool:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(10)

        def wait_and_stop() -> None:
            assert manager.recv(1000).startswith(b"READY=1")
            try:
                meanwhile(manager)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)

        stopper = pool.submit(wait_and_stop)
        outcome = tidegate(
            *("serve", "--state-dir", tmp_path / "state", "--listen", f"127.0.0.1:{port}", "--no-dns")
        )
        stopper.result()
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


def test_a_default_file_that_vanishes_opens_nothing_until_an_empty_one_says_so(
    tidegate: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free_port: int
) -> None:
    file = tidegate.runtime.default_config
    file.write_text('[gateway]\nbetween_clients = false\n[external]\ndeny = ["10.0.0.0/8"]\n')
    in_force: list[AccessPolicy] = []

    def reload(manager: socket.socket) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        assert manager.recv(1000).startswith(b"RELOADING=1")
        assert manager.recv(1000) == b"READY=1"
        in_force.append(tidegate.engine.gateways[-1].access)

    def vanish(manager: socket.socket) -> None:
        file.rename(tmp_path / "away.toml")
        reload(manager)
        file.touch()
        reload(manager)

    lines = told(tidegate, monkeypatch, tmp_path, free_port, "json", vanish)
    assert in_force == [AccessPolicy(between_clients=False, denied=("10.0.0.0/8",)), AccessPolicy()]
    refused, applied = (json.loads(line) for line in lines[1:3])
    assert refused["event"] == "settings not reloaded: the old ones stay in force"
    assert (
        refused["cause"].startswith(f"{file}: is gone since it was read; ")
        and "an empty file" in refused["cause"]
    )
    assert applied["applied"] == "gateway.between_clients,external.deny"
