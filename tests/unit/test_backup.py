"""The commands of docs/operation.md that back a gateway up and restore it, run as they are written in other folders."""

from __future__ import annotations

import re
import shutil
import subprocess
from contextlib import closing
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from tidegate.identity import load_or_make_private_key
from tidegate.store import peer_names
from tidegate.store.sqlite import SqliteStore

SECTION = (
    (Path(__file__).parents[2] / "docs" / "operation.md")
    .read_text()
    .partition("\n## Backup\n")[2]
    .partition("\n## ")[0]
)
BACKUP, WITHOUT_SQLITE3, RESTORE = re.findall(r"```console\n(.*?)```", SECTION, re.DOTALL)


class Machine:
    """A machine with a gateway's state and settings, and the place of its backup."""

    def __init__(self, folder: Path, backup: Path) -> None:
        folder.mkdir()
        self.state, self.settings, self.backup = folder / "state", folder / "settings", backup
        self.file = self.settings / "tidegate.toml"

    def run(self, block: str) -> None:
        """Runs a block of commands, except for those that need an installed gateway."""
        for command in re.findall(r"^# ((?:.*\\\n)*.*)$", block, re.MULTILINE):
            if command.startswith(("systemctl ", "tidegate ")):
                continue
            for documented, here in (
                ("/var/lib/tidegate", self.state),
                ("/etc/tidegate", self.settings),
                ("/root/tidegate-backup", self.backup),
            ):
                command = command.replace(documented, str(here))  # noqa: PLW2901
            done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr) == (0, ""), command

    def set_up(self) -> None:
        self.state.mkdir(mode=0o700)
        with closing(self.store()):
            load_or_make_private_key(self.state / "gateway.key")

    def store(self) -> SqliteStore:
        return SqliteStore(self.state / "tidegate.db")

    def add_peer(self, store: SqliteStore, name: str) -> None:
        store.add_peer(
            name,
            public_key=name.encode().ljust(32),
            preshared_key=None,
            subnet=IPv4Network("10.66.77.0/24"),
            reserved=frozenset(),
            address=None,
            now=0,
        )

    def is_like(self, other: Machine, *peers: str) -> bool:
        with closing(self.store()) as store:
            return (
                tuple(peer_names(store)) == peers
                and (self.state / "gateway.key").read_text() == (other.state / "gateway.key").read_text()
                and (self.state / "gateway.key").stat().st_mode & 0o777 == 0o600
            )

    def has_settings(self) -> dict[str, str]:
        return {file.name: file.read_text() for file in self.settings.iterdir()}


def replacing_sqlite3(block: str) -> str:
    """The backup with the command that needs no `sqlite3`."""
    replaced, count = re.subn(r"^# sqlite3 .*\n", lambda _: WITHOUT_SQLITE3, block, flags=re.MULTILINE)
    assert count == 1
    return replaced


@pytest.fixture(
    params=[
        pytest.param(
            "sqlite3", marks=pytest.mark.skipif(shutil.which("sqlite3") is None, reason="there is no sqlite3")
        ),
        "without sqlite3",
    ]
)
def backup(request: pytest.FixtureRequest) -> str:
    return BACKUP if request.param == "sqlite3" else replacing_sqlite3(BACKUP)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    made = Machine(tmp_path / "machine", tmp_path / "backup")
    made.set_up()
    return made


def test_a_backup_that_is_made_again_has_what_is_there_now(
    machine: Machine, backup: str, tmp_path: Path
) -> None:
    machine.settings.mkdir()
    machine.file.write_text("[gateway]\nbetween_clients = true\n")
    (machine.settings / "former.conf").touch()
    with closing(machine.store()) as store:  # as while the gateway runs
        machine.add_peer(store, "alice")
        machine.run(backup)
        machine.file.write_text("[gateway]\nbetween_clients = false\n")
        (machine.settings / "former.conf").unlink()
        machine.add_peer(store, "bob")
        machine.run(backup)
    assert machine.backup.stat().st_mode & 0o777 == 0o700

    other = Machine(tmp_path / "other", machine.backup)
    for attempt in (1, 2):
        other.run(RESTORE)
        assert other.is_like(machine, "alice", "bob"), attempt
        assert other.has_settings() == {"tidegate.toml": "[gateway]\nbetween_clients = false\n"}


def test_a_gateway_without_settings_is_backed_up_and_restored_without_any(
    machine: Machine, backup: str, tmp_path: Path
) -> None:
    with closing(machine.store()) as store:
        machine.add_peer(store, "alice")
    machine.run(backup)
    machine.run(backup)
    assert not machine.settings.exists()

    other = Machine(tmp_path / "other", machine.backup)
    other.settings.mkdir()
    other.file.write_text("[gateway]\nbetween_clients = false\n")
    (other.settings / "mine.conf").write_text("a client's profile")
    other.run(RESTORE)
    assert other.is_like(machine, "alice")
    assert other.has_settings() == {"mine.conf": "a client's profile"}, "settings that the backup has not"
    other.run(RESTORE)
