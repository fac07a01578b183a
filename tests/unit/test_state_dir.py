"""One process at a time in a state directory."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.unit.conftest import CommandLine
from tests.unit.running import serving
from tidegate.errors import LockedError, StoreError
from tidegate.settings import Settings
from tidegate.state_dir import StateDir

WARNING = "others can write here, and so give the gateway another key or other peers; chmod 700 it"

HOLD = """
import sys
from pathlib import Path
from tidegate.state_dir import StateDir
with StateDir(Path(sys.argv[1])).lock(sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(path: Path, holder: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), holder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_running_gateway_is_named_at_once(tmp_path: Path) -> None:
    with hold(tmp_path, "gateway") as other:
        with (
            pytest.raises(LockedError, match=rf"already running .*\(pid {other.pid}\)"),
            StateDir(tmp_path).lock("gateway"),
        ):
            pass
        other.kill()


def test_a_full_disk_is_told_with_the_lock_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    state = StateDir(tmp_path)
    with (
        pytest.raises(StoreError, match=f"{state.lock_file}: cannot be written: No space left"),
        state.lock("command"),
    ):
        pass


def test_a_lock_that_cannot_be_made_names_the_way_to_another_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(path: Path, *_: int) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "open", read_only)
    with (
        pytest.raises(StoreError, match="lock: Read-only file system; name another with --state-dir"),
        StateDir(tmp_path).lock("command"),
    ):
        pass


def test_a_killed_holder_leaves_no_lock(tmp_path: Path) -> None:
    with hold(tmp_path, "gateway") as other:
        other.kill()
    with StateDir(tmp_path).lock("gateway"):
        assert (tmp_path / "lock").read_text() == f"gateway {os.getpid()}\n"


def test_a_command_is_waited_for(tmp_path: Path) -> None:
    with hold(tmp_path, "command") as other:
        assert other.stdin is not None
        threading.Timer(0.3, other.stdin.close).start()
        with StateDir(tmp_path).lock("gateway"):
            assert other.wait(10) == 0


def test_what_a_gateway_has_left_in_the_lock_is_not_taken_for_one_that_runs(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.write_text("gateway 1\n")
    with lock.open() as of_a_command:
        fcntl.flock(of_a_command, fcntl.LOCK_EX)

        class CommandBeginsMeanwhile(threading.Event):
            def wait(self, timeout: float | None = None) -> bool:
                lock.write_text("command 2\n")
                return super().wait(timeout)

        threading.Timer(0.2, fcntl.flock, [of_a_command, fcntl.LOCK_UN]).start()
        with StateDir(tmp_path).lock("gateway", given_up=CommandBeginsMeanwhile()):
            assert lock.read_text() == f"gateway {os.getpid()}\n"


def test_a_command_that_does_not_end_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    with hold(tmp_path, "command") as other:
        with (
            pytest.raises(LockedError, match="another command still holds"),
            StateDir(tmp_path).lock("command", patience=0.1),
        ):
            pass
        other.kill()


def test_the_directory_is_for_its_owner_only(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "a" / "b")
    state.prepare()
    state.prepare()
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700


OPEN = [(0o700, False), (0o755, False), (0o775, True), (0o1777, True)]


@pytest.mark.parametrize(("mode", "said"), OPEN)
def test_a_directory_that_others_can_write_to_is_mentioned_by_a_command(
    tidegate: CommandLine, tmp_path: Path, mode: int, said: bool
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    state.chmod(mode)
    outcome = tidegate("peer", "add", "alice", "--endpoint", "192.0.2.1:1", "--state-dir", state)
    assert outcome.code == 0
    assert (outcome.err == f"tidegate: warning: {state}: {WARNING}\n") == said
    assert (outcome.err == "") != said


@pytest.mark.parametrize(("mode", "said"), OPEN)
def test_a_directory_that_others_can_write_to_is_mentioned_by_the_gateway(
    settings: Settings, capsys: pytest.CaptureFixture[str], mode: int, said: bool
) -> None:
    settings.state_dir.mkdir()
    settings.state_dir.chmod(mode)
    logged = []

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            logged.append(capsys.readouterr().out)
            assert (await running.cli("peer", "list"))[2] == "", "once is enough"

    asyncio.run(scenario())
    assert (f"{settings.state_dir}: {WARNING}" in logged[0]) == said
