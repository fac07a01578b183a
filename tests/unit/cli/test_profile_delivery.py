"""Handing over a new peer's profile, to a file or printed: if it fails or is interrupted, the peer is taken back."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from tests.unit.conftest import CommandLine, names_in_store
from tidegate.errors import StoreError
from tidegate.identity import Profile, encode_key, parse_profile, public_key_of, read_profile
from tidegate.state_dir import StateDir
from tidegate.store.sqlite import SqliteStore


def test_a_profile_is_printed_alone_and_can_be_redirected(tidegate: CommandLine, tmp_path: Path) -> None:
    outcome = tidegate("peer", "add", "alice", "--state-dir", tmp_path)
    profile = parse_profile(outcome.out)
    assert str(profile.address) == "10.66.77.2/32"
    assert str(profile.endpoint) == "192.0.2.2:51820", "as the host's network suggests"
    assert [str(prefix) for prefix in profile.allowed_ips] == ["0.0.0.0/0", "::/0"]
    assert [str(server) for server in profile.dns] == ["10.66.77.1"]
    assert (profile.mtu, profile.persistent_keepalive) == (1420, 25)
    assert profile.preshared_key is not None


def test_a_profile_names_the_resolvers_that_are_set_instead_of_the_proxy(
    tidegate: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEGATE_DNS__PROFILE_SERVERS", "192.0.2.53,10.66.77.9")
    outcome = tidegate("peer", "add", "alice", "--state-dir", tmp_path, "--endpoint", "a.b")
    assert outcome.err == ""
    assert [str(server) for server in parse_profile(outcome.out).dns] == ["192.0.2.53", "10.66.77.9"]


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["text", "json"])
def test_a_profile_for_a_file_called_minus_is_printed(
    tidegate: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = tidegate("peer", "add", "alice", "--state-dir", "state", "--out", "-", *form)
    profile = parse_profile(json.loads(outcome.out)["profile"] if form else outcome.out)
    assert str(profile.address) == "10.66.77.2/32"
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]


def test_a_profile_names_the_address_that_the_gateway_is_to_listen_on(
    tidegate: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEGATE_GATEWAY__LISTEN", "192.0.2.77:443")
    profile = parse_profile(tidegate("peer", "add", "alice", "--state-dir", tmp_path).out)
    assert str(profile.endpoint) == "192.0.2.77:443"


def test_a_profile_goes_to_a_file_that_only_its_owner_reads(tidegate: CommandLine, tmp_path: Path) -> None:
    out = tmp_path / "alice.conf"
    arguments = ["--state-dir", tmp_path / "state", "--endpoint", "vpn.example.com", "--out", out]
    outcome = tidegate("peer", "add", "alice", *arguments)
    assert (outcome.code, outcome.out) == (0, "")
    assert out.stat().st_mode & 0o777 == 0o600
    assert str(read_profile(out).endpoint) == "vpn.example.com:51820"
    before = out.read_text()
    assert "--force" in tidegate.refused(2, "peer", "add", "bob", *arguments)
    assert out.read_text() == before
    assert tidegate("peer", "add", "bob", *arguments, "--force").code == 0
    assert out.read_text() != before
    listed = json.loads(tidegate("peer", "list", "--state-dir", tmp_path / "state", "--json").out)
    assert [peer["name"] for peer in listed["peers"]] == ["alice", "bob"]


def test_a_profile_that_cannot_be_written_adds_no_peer(tidegate: CommandLine, tmp_path: Path) -> None:
    message = tidegate.refused(
        1, "peer", "add", "alice", "--state-dir", tmp_path / "state", "--out", tmp_path / "no" / "alice.conf"
    )
    assert "cannot be written" in message
    assert not (tmp_path / "state").exists()


def _stdout_of_nobody() -> int:
    """A pipe whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("json_too", [(), ("--json",)], ids=["text", "json"])
@pytest.mark.parametrize(
    "stdout", [lambda: os.open("/dev/full", os.O_WRONLY), _stdout_of_nobody], ids=["full", "nobody"]
)
def test_a_profile_that_cannot_be_printed_adds_no_peer(
    tidegate: CommandLine, tmp_path: Path, stdout: Callable[[], int], json_too: tuple[str, ...]
) -> None:
    command = [sys.executable, "-m", "tidegate", "peer", "add", "alice", "--endpoint", "192.0.2.1:1"]
    descriptor = stdout()
    try:
        done = subprocess.run(
            [*command, "--state-dir", str(tmp_path), *json_too],
            stdout=descriptor,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(descriptor)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "the profile cannot be printed" in line and "alice was not added" in line
    assert json.loads(tidegate("peer", "list", "--state-dir", tmp_path, "--json").out)["peers"] == []


def test_a_profile_that_cannot_get_to_its_place_adds_no_peer(
    tidegate: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = ["--state-dir", tmp_path / "state", "--endpoint", "192.0.2.1"]
    for force in ([], ["--force"]):
        message = tidegate.refused(2, "peer", "add", "alice", *state, "--out", tmp_path, *force)
        assert f"{tmp_path} is a directory" in message
    assert not (tmp_path / "state").exists()

    def disk_is_full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        assert tidegate("peer", "add", "first", *state).code == 0  # and the gateway has its key
        patch.setattr(os, "fsync", disk_is_full)
        out = tmp_path / "alice.conf"
        message = tidegate.refused(1, "peer", "add", "alice", *state, "--out", out)
    assert f"{out}: cannot be written: No space left on device" in message
    assert list(tmp_path.glob("*alice*")) == []
    listed = json.loads(tidegate("peer", "list", *state[:2], "--json").out)
    assert [peer["name"] for peer in listed["peers"]] == ["first"]


@pytest.mark.usefixtures("at_a_terminal")
@pytest.mark.parametrize("late", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_keeps_no_peer_from_being_taken_back_whose_profile_cannot_be_written(
    tidegate: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: signal.Signals
) -> None:
    remove = SqliteStore.remove_peer

    def disk_is_full(_: int) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def remove_at_a_bad_moment(store: SqliteStore, name: str) -> object:
        os.kill(os.getpid(), late)
        return remove(store, name)

    state, out = tmp_path / "state", tmp_path / "alice.conf"
    assert tidegate("peer", "add", "first", "--endpoint", "a.b", "--state-dir", state).code == 0
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk_is_full)
        patch.setattr(SqliteStore, "remove_peer", remove_at_a_bad_moment)
        message = tidegate.refused(
            1, "peer", "add", "alice", "--endpoint", "a.b", "--state-dir", state, "--out", out
        )
    assert message.endswith("cannot be written: No space left on device; alice was not added")
    assert len(_keys_in_list(tidegate, state)) == 1


def _keys_in_list(tidegate: CommandLine, state: Path) -> list[str]:
    listed = json.loads(tidegate("peer", "list", "--state-dir", state, "--json").out)
    return [peer["public_key"] for peer in listed["peers"]]


def _key_of(profile: Profile) -> str:
    assert profile.private_key is not None
    return encode_key(public_key_of(profile.private_key))


@pytest.mark.parametrize("force", [(), ("--force",)], ids=["", "force"])
@pytest.mark.parametrize(
    ("failure", "code"),
    [(OSError(errno.EINVAL, os.strerror(errno.EINVAL)), 0), (KeyboardInterrupt(), 130)],
    ids=["a file system that syncs no directories", "Ctrl-C"],
)
def test_a_peer_whose_profile_is_in_its_place_stays(
    tidegate: CommandLine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    code: int,
    force: tuple[str, ...],
) -> None:
    def fail(_: Path) -> NoReturn:
        raise failure

    state, out = tmp_path / "state", tmp_path / "alice.conf"
    assert tidegate("peer", "add", "first", "--endpoint", "a.b", "--state-dir", state).code == 0
    with monkeypatch.context() as patch:
        patch.setattr("tidegate.files._sync_directory", fail)
        added = tidegate(
            "peer", "add", "alice", "--endpoint", "a.b", "--state-dir", state, "--out", out, *force
        )
    assert added.code == code
    (line,) = added.err.splitlines()
    assert f"its profile is in {out}" in line
    assert list(tmp_path.glob("*alice*")) == [out]
    assert _keys_in_list(tidegate, state)[1:] == [_key_of(read_profile(out))]


@pytest.mark.parametrize("printed", [False, True], ids=["to a file", "printed"])
def test_a_peer_whose_profile_was_handed_out_stays_whatever_fails_then(
    tidegate: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: bool
) -> None:
    state, out = tmp_path / "state", tmp_path / "alice.conf"

    close = SqliteStore.close

    def fail(store: SqliteStore) -> NoReturn:
        close(store)
        raise StoreError("tidegate.db: Input/output error")

    to_file = () if printed else ("--out", out)
    with monkeypatch.context() as patch:
        patch.setattr(SqliteStore, "close", fail)
        added = tidegate("peer", "add", "alice", "--endpoint", "a.b", "--state-dir", state, *to_file)
    assert added.code == 1
    where = "printed" if printed else f"in {out}"
    assert (
        added.err
        == f"tidegate: tidegate.db: Input/output error; alice was added, and its profile is {where}\n"
    )
    profile = parse_profile(added.out) if printed else read_profile(out)
    assert _keys_in_list(tidegate, state) == [_key_of(profile)]


@pytest.mark.parametrize("force", [(), ("--force",)], ids=["", "force"])
def test_a_profile_does_not_take_the_place_of_a_device_or_pipe(
    tidegate: CommandLine, tmp_path: Path, force: tuple[str, ...]
) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to("/dev/null")
    for out in (pipe, link):
        message = _refusal_of_out(tidegate, out, *force)
        assert message == f"tidegate: {out} is not a regular file; omit --out to print the profile"
    assert pipe.is_fifo()
    assert link.is_symlink()
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("force", [(), ("--force",)], ids=["", "force"])
def test_a_profile_does_not_take_the_place_of_a_link(
    tidegate: CommandLine, tmp_path: Path, force: tuple[str, ...]
) -> None:
    """As /dev/stdout is one, into a file where `>` leads there."""
    stdout, to_nowhere = tmp_path / "stdout", tmp_path / "to nowhere"
    to_nowhere.symlink_to(tmp_path / "missing")
    with (tmp_path / "bob.conf").open("w") as file:
        stdout.symlink_to(f"/proc/self/fd/{file.fileno()}")
        for out in (stdout, to_nowhere):
            message = _refusal_of_out(tidegate, out, *force)
            assert message.startswith(f"tidegate: {out} is a symbolic link; name the file itself"), message
            assert out.is_symlink()
    assert not (tmp_path / "state").exists()


def _refusal_of_out(tidegate: CommandLine, out: Path, *flags: str) -> str:
    state = out.with_name("state")
    return tidegate.refused(
        2, "peer", "add", "alice", "--endpoint", "a.b:1", "--state-dir", state, "--out", out, *flags
    )


def _adding(
    state: Path, *flags: object, stdout: int | None = None, under: str = "", unbuffered: str = ""
) -> subprocess.Popen[str]:
    """A process that adds alice, with the buffer that standard output has elsewhere, if not `unbuffered`. `under` is a
    command that runs it."""
    command = [*under.split(), sys.executable, "-m", "tidegate", "peer", "add", "alice", "--endpoint", "a.b"]
    return subprocess.Popen(
        [*command, "--state-dir", str(state), *map(str, flags)],
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


def _until(holds: Callable[[], bool]) -> None:
    for _ in range(1000):
        if holds():
            return
        threading.Event().wait(0.01)
    raise TimeoutError


def _full_pipe() -> tuple[int, int]:
    """A full pipe: its reader and its writer."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"." * 4096)
    os.set_blocking(writer, True)
    return reader, writer


def _wait_until_it_prints(process: subprocess.Popen[str]) -> None:
    """It prints into a full pipe."""
    _until(lambda: "pipe_write" in Path(f"/proc/{process.pid}/wchan").read_text())


def _opened_by(process: subprocess.Popen[str]) -> set[Path]:
    files = set()
    for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            files.add(descriptor.readlink())
    return files


ENDINGS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.usefixtures("at_a_terminal")
@pytest.mark.parametrize(("number", "code"), ENDINGS)
def test_a_peer_whose_adding_is_ended_by_a_signal_is_taken_back(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    reader, writer = _full_pipe()
    process = _adding(tmp_path, stdout=writer)
    os.close(writer)
    try:
        _wait_until_it_prints(process)
        assert names_in_store(tmp_path) == ["alice"]
        process.send_signal(number)
        _, err = process.communicate(timeout=10)
        assert (process.returncode, err) == (code, "")
        assert names_in_store(tmp_path) == []
        with open(reader, closefd=False) as pipe:
            assert set(pipe.read()) == {"."}, "no profile of a peer that is no more"
    finally:
        process.kill()
        os.close(reader)


@pytest.mark.usefixtures("at_a_terminal")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(("number", "code"), ENDINGS)
def test_a_peer_whose_profile_gets_out_in_the_moment_of_a_signal_stays(
    tmp_path: Path, number: signal.Signals, code: int, unbuffered: str
) -> None:
    """The pipe itself sends the signal (fcntl(2), F_SETSIG): it has arrived by the time the write returns."""
    reader, writer = _full_pipe()
    process = _adding(tmp_path, stdout=writer, unbuffered=unbuffered)
    os.close(writer)
    try:
        _wait_until_it_prints(process)
        fcntl.fcntl(reader, fcntl.F_SETOWN, process.pid)
        fcntl.fcntl(reader, fcntl.F_SETSIG, number)
        fcntl.fcntl(reader, fcntl.F_SETFL, os.O_ASYNC)
        with open(reader, closefd=False) as pipe:
            profile = parse_profile(pipe.read().lstrip("."))
        _, err = process.communicate(timeout=10)
        assert (process.returncode, err) == (code, "tidegate: alice was added, and its profile is printed\n")
        assert str(profile.address) == "10.66.77.2/32"
        assert names_in_store(tmp_path) == ["alice"]
    finally:
        process.kill()
        os.close(reader)


@pytest.mark.usefixtures("at_a_terminal")
@pytest.mark.parametrize(("number", "code"), ENDINGS)
def test_a_signal_before_a_peer_is_added_leaves_no_file(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    state = StateDir(tmp_path / "state")
    state.prepare()
    with state.lock("command"):  # is waited for
        process = _adding(state.path, "--out", tmp_path / "alice.conf")
        try:
            _until(lambda: state.lock_file in _opened_by(process))
            assert len(list(tmp_path.glob(".alice.conf.*"))) == 1
            process.send_signal(number)
            _, err = process.communicate(timeout=10)
        finally:
            process.kill()
    assert (process.returncode, err) == (code, "")
    assert list(tmp_path.glob("*alice*")) == []


def test_a_hangup_that_is_ignored_as_under_nohup_takes_no_peer_back(tmp_path: Path) -> None:
    reader, writer = _full_pipe()
    process = _adding(tmp_path, stdout=writer, under="nohup")
    os.close(writer)
    try:
        _wait_until_it_prints(process)
        process.send_signal(signal.SIGHUP)
        with open(reader, closefd=False) as pipe:
            profile = parse_profile(pipe.read().lstrip("."))
        assert process.wait(10) == 0
        assert str(profile.address) == "10.66.77.2/32"
        assert names_in_store(tmp_path) == ["alice"]
    finally:
        process.kill()
        process.communicate()
        os.close(reader)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("office-laptop-of-alice.conf", True),
        ("sixteen-letters-.conf", True),
        ("alice's.conf", True),
        ("Alice_1=+.-x.conf", False),
        ("fifteen-letters.conf", False),
        ("sixteen-letters-.conf --cipher aes-256-gcm", False),
    ],
)
def test_a_file_whose_name_importers_refuse_is_remarked_on(
    tidegate: CommandLine, tmp_path: Path, file: str, said: bool
) -> None:
    name, *flags = file.split(" ")
    state = ["--state-dir", tmp_path / "state", "--endpoint", "vpn.example:1"]
    added = tidegate("peer", "add", "alice", "--out", tmp_path / name, *flags, *state)
    assert added.code == 0
    remark = f"{tmp_path / name} cannot be imported under this name"
    assert (remark in added.err) == said, added.err
    assert ("a name of 1 to 15 letters, digits or _=+.- before .conf" in added.err) == said


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("my_vpn.example.com", "an underscore"),
        ("vpn.1", "a last label that begins with a digit"),
        ("vpn.1st.", "a last label that begins with a digit"),
        ("vpn.example.com.", None),
        ("1.vpn-2.example", None),
        ("vpn", None),
        ("192.0.2.1", None),
    ],
)
def test_an_endpoint_that_is_no_host_of_a_uri_is_remarked_on(
    tidegate: CommandLine, tmp_path: Path, host: str, said: str | None
) -> None:
    """WireGuard's app for Android has java.net.URI parse it (RFC 2396 §3.2.2), which finds no port then."""
    added = tidegate("peer", "add", "alice", "--state-dir", tmp_path, "--endpoint", f"{host}:51820")
    assert added.code == 0
    expected = f"tidegate: the endpoint {host}:51820 has {said}; WireGuard's app for Android refuses it\n"
    assert added.err == (expected if said else "")
