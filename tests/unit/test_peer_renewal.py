"""New keys for a peer: the former ones are good until the new profile is safe, and no longer."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.unit.conftest import CommandLine
from tests.unit.running import only, serving
from tests.unit.test_gateway_peers import deafen
from tests.unit.test_peer_upkeep import ALICE, WEB, add_alice_and_her_port, with_gre_for
from tidegate.control.client import ControlClient
from tidegate.control.commands import AnswerT, Command, PeerList, PeerRenew
from tidegate.errors import UnansweredError
from tidegate.identity import (
    Profile,
    encode_key,
    make_private_key,
    parse_profile,
    public_key_of,
    read_profile,
)
from tidegate.settings import Settings
from tidegate.store.sqlite import SqliteStore

RENEW = ["peer", "renew", "alice"]


def key_in(profile: Profile) -> bytes:
    assert profile.private_key is not None
    return public_key_of(profile.private_key)


def stored_keys(state: Path) -> tuple[bytes, bytes | None]:
    """Alice's."""
    store = SqliteStore(state / "tidegate.db")
    try:
        peer = store.peer("alice")
        return peer.public_key, peer.preshared_key
    finally:
        store.close()


def leftovers(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.name.startswith(".alice"))


def test_a_peer_gets_new_keys_and_keeps_its_address_cipher_ports_and_protocols(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with serving(with_gre_for(settings, "alice"), capsys) as running:
            former = parse_profile((await running.cli("peer", "add", "alice", "--cipher", "aes-256-gcm"))[1])
            assert (await running.cli("publish", "add", "tcp/80", "--to", "alice:8080"))[0] == 0
            assert (await running.cli("peer", "rename", "alice", "bob"))[0] == 0
            code, out, err = await running.cli("peer", "renew", "bob")
            assert (code, "aes-256-gcm works with" in err) == (0, True), err
            new = parse_profile(out)
            assert running.packets.peers == {key_in(new): ALICE}, "the former key is refused"
            assert list(running.packets.ciphers.values())[-1] == new.cipher == "aes-256-gcm"
            assert (running.packets.published, running.packets.passed) == (WEB, {47: ALICE})
            assert new.preshared_key not in (None, former.preshared_key)
            assert (new.address, new.peer_public_key) == (former.address, former.peer_public_key)
            assert only((await running.answer("peer", "list"))["peers"])["name"] == "bob"
        async with serving(settings, capsys) as running:
            assert running.packets.peers == {key_in(new): ALICE}

    asyncio.run(scenario())


def test_a_disabled_peer_is_renewed_and_stays_disabled(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            await add_alice_and_her_port(running)
            assert (await running.cli("peer", "disable", "alice"))[0] == 0
            code, out, err = await running.cli(*RENEW)
            assert (code, "alice is disabled, and cannot connect until" in err) == (0, True)
            assert running.packets.peers == {}
            assert (await running.cli("peer", "enable", "alice"))[0] == 0
            assert running.packets.peers == {key_in(parse_profile(out)): ALICE}

    asyncio.run(scenario())


def test_a_device_that_keeps_its_private_key_gives_its_new_public_key(
    tidegate: CommandLine, tmp_path: Path
) -> None:
    state = ["--state-dir", tmp_path]
    first, second = (public_key_of(make_private_key()) for _ in range(2))
    assert tidegate("peer", "add", "alice", "--public-key", encode_key(first), *state).code == 0
    assert tidegate("peer", "add", "bob", *state).code == 0
    outcome = tidegate(*RENEW, "--public-key", encode_key(second), *state)
    assert "# PrivateKey = (put the device's own private key here)" in outcome.out
    assert stored_keys(tmp_path)[0] == second
    bob = json.loads(tidegate("peer", "show", "bob", *state, "--json").out)["public_key"]
    for key, holder in ((encode_key(second), "alice"), (bob, "bob")):
        message = tidegate.refused(1, *RENEW, "--public-key", key, *state)
        assert message == f"tidegate: peer '{holder}' already has this public key"
    gateway = encode_key(parse_profile(tidegate("peer", "renew", "bob", *state).out).peer_public_key)
    assert "is the gateway's own" in tidegate.refused(2, *RENEW, "--public-key", gateway, *state)
    assert stored_keys(tmp_path)[0] == second


def test_programs_get_what_they_get_of_a_peer_that_is_added(tidegate: CommandLine, tmp_path: Path) -> None:
    state = ["--state-dir", tmp_path / "state", "--json"]
    added = json.loads(tidegate("peer", "add", "alice", *state).out)
    printed = json.loads(tidegate(*RENEW, *state).out)
    assert printed.keys() == added.keys()
    assert (
        printed["public_key"] == encode_key(key_in(parse_profile(printed["profile"]))) != added["public_key"]
    )
    out = tmp_path / "alice.conf"
    written = json.loads(tidegate(*RENEW, *state, "--out", out).out)
    assert (written["file"], written["profile"]) == (str(out), None)
    assert written["public_key"] == encode_key(key_in(read_profile(out)))


def test_a_new_profile_goes_to_a_file_and_takes_the_formers_place_only_by_force(
    tidegate: CommandLine, tmp_path: Path
) -> None:
    state, out = tmp_path / "state", tmp_path / "alice.conf"
    arguments = ["--state-dir", state, "--out", out, "--endpoint", "vpn.example.com"]
    assert tidegate("peer", "add", "alice", *arguments).code == 0
    former = out.read_text()
    assert "add --force" in tidegate.refused(2, *RENEW, *arguments)
    assert (out.read_text(), stored_keys(state)[0]) == (former, key_in(parse_profile(former)))
    outcome = tidegate(*RENEW, *arguments, "--force")
    assert outcome.err == f"tidegate: peer alice (10.66.77.2) is renewed; its new profile is in {out}\n"
    assert stored_keys(state) == (key_in(read_profile(out)), read_profile(out).preshared_key)
    assert out.read_text() != former
    assert out.stat().st_mode & 0o777 == 0o600
    assert leftovers(tmp_path) == []
    for nowhere, told in ((tmp_path, "is a directory"), (tmp_path / "no" / "a.conf", "cannot be written")):
        before = stored_keys(state)
        outcome = tidegate(*RENEW, "--state-dir", state, "--out", nowhere, "--force")
        assert (outcome.code != 0, told in outcome.err) == (True, True), outcome
        assert stored_keys(state) == before


def test_a_peer_or_endpoint_that_is_not_known_is_told(tidegate: CommandLine, tmp_path: Path) -> None:
    state = ["--state-dir", tmp_path]
    assert tidegate("peer", "add", "alice", *state).code == 0
    before = stored_keys(tmp_path)
    assert "no peer named 'eve'" in tidegate.refused(1, "peer", "renew", "eve", *state)
    inside = tidegate.refused(2, *RENEW, "--endpoint", "10.66.77.1:1", *state)
    assert "lies inside the VPN's own subnet" in inside
    from tests.unit.fakes import ordinary_network

    tidegate.host.network = ordinary_network(default=False)
    assert "--endpoint" in tidegate.refused(2, *RENEW, *state)
    assert stored_keys(tmp_path) == before


def _stdout_of_nobody() -> int:
    """A pipe whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize(
    "stdout", [lambda: os.open("/dev/full", os.O_WRONLY), _stdout_of_nobody], ids=["full", "nobody"]
)
def test_where_the_profile_cannot_be_printed_nothing_changes(
    tidegate: CommandLine, tmp_path: Path, stdout: Callable[[], int]
) -> None:
    assert tidegate("peer", "add", "alice", "--state-dir", tmp_path).code == 0
    before = stored_keys(tmp_path)
    descriptor = stdout()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tidegate", *RENEW, "--endpoint", "a.b", "--state-dir", str(tmp_path)],
            stdout=descriptor,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(descriptor)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert "the profile cannot be printed" in line and line.endswith("; alice was not renewed")
    assert stored_keys(tmp_path) == before


def test_where_the_profile_cannot_be_written_nothing_changes(
    tidegate: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    assert tidegate("peer", "add", "alice", "--state-dir", state).code == 0
    before = stored_keys(state)

    def disk_is_full(_: int) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk_is_full)
        message = tidegate.refused(1, *RENEW, "--state-dir", state, "--out", tmp_path / "alice.conf")
    assert message.endswith("cannot be written: No space left on device; alice was not renewed")
    assert stored_keys(state) == before
    assert leftovers(tmp_path) == [] and not (tmp_path / "alice.conf").exists()


def before_the_keys_are_renewed(monkeypatch: pytest.MonkeyPatch, then: Callable[[], None]) -> None:
    """What happens when everything is ready."""
    replace = SqliteStore.replace_keys

    def first(store: SqliteStore, *arguments: Any) -> object:
        then()
        return replace(store, *arguments)

    monkeypatch.setattr(SqliteStore, "replace_keys", first)


def test_the_profile_is_on_the_disk_and_the_former_one_in_its_place_when_the_keys_are_renewed(
    tidegate: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, out = tmp_path / "state", tmp_path / "alice.conf"
    arguments = ["--state-dir", state, "--out", out]
    assert tidegate("peer", "add", "alice", *arguments).code == 0
    former, seen = out.read_text(), []

    def look() -> None:
        (waiting,) = leftovers(tmp_path)
        seen.append((key_in(read_profile(tmp_path / waiting)), out.read_text()))

    before_the_keys_are_renewed(monkeypatch, look)
    assert tidegate(*RENEW, *arguments, "--force").code == 0
    assert seen == [(stored_keys(state)[0], former)]


@pytest.mark.usefixtures("at_a_terminal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_does_not_come_between_keys_and_profile(
    tidegate: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    state, out = tmp_path / "state", tmp_path / "alice.conf"
    assert tidegate("peer", "add", "alice", "--state-dir", state).code == 0
    before_the_keys_are_renewed(monkeypatch, lambda: os.kill(os.getpid(), number))
    assert tidegate(*RENEW, "--state-dir", state, "--out", out).code == 0
    assert stored_keys(state)[0] == key_in(read_profile(out))


def test_a_profile_that_cannot_take_its_place_is_kept_and_told_of(
    tidegate: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, out = tmp_path / "state", tmp_path / "alice.conf"
    assert tidegate("peer", "add", "alice", "--state-dir", state).code == 0

    def take_its_place() -> None:
        out.write_text("somebody else's")

    before_the_keys_are_renewed(monkeypatch, take_its_place)
    outcome = tidegate(*RENEW, "--state-dir", state, "--out", out)
    assert outcome.code == 2
    (waiting,) = leftovers(tmp_path)
    assert f"alice was renewed, and its new profile is in {tmp_path / waiting}" in outcome.err
    assert f"{out} exists" in outcome.err
    assert out.read_text() == "somebody else's"
    assert stored_keys(state)[0] == key_in(read_profile(tmp_path / waiting))


@pytest.mark.parametrize("late", [False, True], ids=["peer refused", "port not answered"])
def test_keys_that_the_engine_refuses_leave_the_former_ones_in_force(
    settings: Settings, capsys: pytest.CaptureFixture[str], tmp_path: Path, late: bool
) -> None:
    async def scenario() -> None:
        async with serving(with_gre_for(settings, "alice"), capsys) as running:
            await add_alice_and_her_port(running)
            before = dict(running.packets.peers)
            running.packets.refuse_once(80 if late else OSError(errno.ENOMEM, "no room for another peer"))
            out = tmp_path / "alice.conf"
            code, _, err = await running.cli(*RENEW, "--out", str(out))
            assert (code, ("did not answer" if late else "no room") in err) == (1, True), err
            assert err.endswith("alice was not renewed\n")
            assert (out.exists(), leftovers(tmp_path)) == (False, [])
            assert (running.packets.peers, running.packets.published) == (before, WEB)
            assert running.packets.passed == {47: ALICE}
            assert [stored_keys(settings.state_dir)[0]] == list(before)

    asyncio.run(scenario())


def lose_answers(monkeypatch: pytest.MonkeyPatch, cause: BaseException, *, carried_out: bool) -> None:
    """The gateway carries out what renews the keys, or does not, and nobody hears of it."""
    execute = ControlClient.execute

    def deaf(client: ControlClient, command: Command[AnswerT]) -> AnswerT:
        if isinstance(command, PeerRenew) and not command.dry_run:
            if carried_out:
                execute(client, command)
            raise cause
        return execute(client, command)

    monkeypatch.setattr(ControlClient, "execute", deaf)


@pytest.mark.parametrize("printed", [False, True], ids=["to a file", "printed"])
@pytest.mark.parametrize("carried_out", [False, True], ids=["not carried out", "carried out"])
@pytest.mark.parametrize(
    ("cause", "code"), [(UnansweredError("no word"), 1), (KeyboardInterrupt(), 130)], ids=["", "Ctrl-C"]
)
def test_a_renewal_that_is_not_answered_is_found_out_about(
    settings: Settings,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    printed: bool,
    carried_out: bool,
    cause: BaseException,
    code: int,
) -> None:
    out = tmp_path / "alice.conf"

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            assert (await running.cli("peer", "add", "alice"))[0] == 0
            former = stored_keys(settings.state_dir)[0]
            with monkeypatch.context() as patch:
                lose_answers(patch, cause, carried_out=carried_out)
                told = await running.cli(*RENEW, *([] if printed else ["--out", str(out)]))
            assert told[0] == code
            assert leftovers(tmp_path) == []
            if carried_out:
                new = parse_profile(told[1]) if printed else read_profile(out)
                assert running.packets.peers == {key_in(new): ALICE}
                where = "printed" if printed else f"in {out}"
                assert f"alice was renewed, and its new profile is {where}" in told[2]
            else:
                assert list(running.packets.peers) == [former]
                assert not out.exists()
                said = printed or code == 1  # after Ctrl-C nobody expects anything else
                assert ("alice was not renewed" in told[2]) == said
                assert ("the profile that was printed is good for nothing" in told[2]) == printed

    asyncio.run(scenario())


def test_both_profiles_are_kept_where_nobody_knows_which_is_good(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "alice.conf"

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            assert (await running.cli("peer", "add", "alice", "--out", str(out)))[0] == 0
            former = out.read_text()
            with monkeypatch.context() as patch:
                lose_answers(patch, UnansweredError("no word"), carried_out=True)
                deafen(patch, {PeerList}, UnansweredError("no word"))
                code, _, err = await running.cli(*RENEW, "--out", str(out), "--force")
            (waiting,) = leftovers(tmp_path)
            key = encode_key(key_in(read_profile(tmp_path / waiting)))
            assert code == 1
            assert err == (
                "tidegate: no word; alice may have been renewed: if `tidegate peer show alice` says public key "
                f"{key}, its new profile is in {tmp_path / waiting}\n"
            )
            assert out.read_text() == former

    asyncio.run(scenario())
