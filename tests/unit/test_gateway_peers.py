"""Peers of a whole gateway on a fake engine: added, removed, and rolled back if something fails in between."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.unit.fakes import FakeEngine, FakeHost
from tests.unit.running import only, serving
from tidegate.control.client import ControlClient
from tidegate.control.commands import AnswerT, Command, PeerAdd, PeerList
from tidegate.errors import EngineError, StoreError, UnansweredError
from tidegate.gateway import Gateway
from tidegate.identity import encode_key, make_private_key, parse_profile, public_key_of, read_profile
from tidegate.log import configure_logging
from tidegate.net import Endpoint
from tidegate.settings import DnsSettings, LogSettings, Settings
from tidegate.store.sqlite import SqliteStore


def test_peers_are_added_listed_and_removed_at_once(
    settings: Settings, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            file = tmp_path / "alice.conf"
            code, out, err = await running.cli("peer", "add", "alice", "--out", str(file))
            assert (code, out) == (0, ""), err
            assert list(running.packets.peers.values()) == ["10.66.77.2"]
            profile = file.read_text()
            assert f"Endpoint = {settings.gateway.listen}" in profile
            assert "DNS" not in profile
            peer = only((await running.answer("peer", "list"))["peers"])
            assert peer["name"] == "alice"
            assert peer["received_bytes"] == 2048
            assert peer["last_handshake"] == 3.5
            assert (await running.answer("peer", "show", "alice"))["endpoint"] == "203.0.113.9:4000"
            code, _, err = await running.cli("peer", "add", "alice")
            assert code == 1
            assert "already exists" in err
            assert (await running.cli("peer", "remove", "alice"))[0] == 0
            assert running.packets.peers == {}
            assert (await running.cli("peer", "remove", "alice"))[0] == 1

    asyncio.run(scenario())


def test_a_profile_has_the_running_gateways_endpoint_and_port_and_not_what_the_command_line_knows(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    named = Endpoint("vpn.example.net", 443)
    settings = settings.model_copy(
        update={
            "gateway": settings.gateway.model_copy(update={"endpoint": named}),
            "dns": DnsSettings(enabled=False, profile_servers=(IPv4Address("192.0.2.53"),)),
        }
    )

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            code, out, err = await running.cli("peer", "add", "alice")
            assert (code, err) == (0, "")
            assert parse_profile(out).endpoint == named
            code, out, err = await running.cli("peer", "add", "bob", "--endpoint", "vpn.example.com")
            assert (code, err) == (0, "")
            assert parse_profile(out).endpoint == Endpoint("vpn.example.com", settings.gateway.listen.port)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "refusal", [OSError(errno.ENOMEM, "no room for another peer"), RuntimeError("the engine was stopped")]
)
def test_a_peer_that_the_engine_refuses_is_not_in_the_store(
    settings: Settings, capsys: pytest.CaptureFixture[str], tmp_path: Path, refusal: Exception
) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            running.packets.refuse_peers = refusal
            code, _, err = await running.cli("peer", "add", "alice", "--out", str(tmp_path / "alice.conf"))
            assert code == 1
            assert str(refusal.args[-1]) in err
            assert not (tmp_path / "alice.conf").exists()
            assert (await running.answer("peer", "list"))["peers"] == []

    asyncio.run(scenario())


def deafen(monkeypatch: pytest.MonkeyPatch, kinds: set[type], cause: BaseException) -> None:
    """Commands of these kinds are carried out, but the command line never gets the answer."""
    execute = ControlClient.execute

    def deaf(client: ControlClient, command: Command[AnswerT]) -> AnswerT:
        try:
            return execute(client, command)
        finally:
            if type(command) in kinds:
                raise cause

    monkeypatch.setattr(ControlClient, "execute", deaf)


@pytest.mark.parametrize(
    ("cause", "code", "told"),
    [
        (UnansweredError("no word", hint="is it well?"), 1, "tidegate: no word; alice was not added\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_a_peer_whose_adding_is_not_answered_is_taken_back(
    settings: Settings,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    cause: BaseException,
    code: int,
    told: str,
) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            out = tmp_path / "alice.conf"
            with monkeypatch.context() as patch:
                deafen(patch, {PeerAdd}, cause)
                assert await running.cli("peer", "add", "alice", "--out", str(out)) == (code, "", told)
            assert not out.exists()
            assert (await running.answer("peer", "list"))["peers"] == []
            assert running.packets.peers == {}
            assert (await running.cli("peer", "add", "alice"))[0] == 0
            with monkeypatch.context() as patch:
                deafen(patch, {PeerAdd}, cause)
                assert (await running.cli("peer", "add", "alice"))[0] == code
            assert len(running.packets.peers) == 1, "the alice of before has another key"

    asyncio.run(scenario())


def test_a_peer_with_a_key_that_was_given_is_not_taken_for_the_new_one(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been there before, with this very key."""
    command = ("peer", "add", "alice", "--public-key", encode_key(public_key_of(make_private_key())))

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            assert (await running.cli(*command))[0] == 0
            with monkeypatch.context() as patch:
                deafen(patch, {PeerAdd}, UnansweredError("no word"))
                told = "tidegate: no word; alice may have been added: see `tidegate peer show alice`\n"
                assert await running.cli(*command) == (1, "", told)
            assert len(running.packets.peers) == 1

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("cause", "code"), [(UnansweredError("no word"), 1), (KeyboardInterrupt(), 130)], ids=["", "Ctrl-C"]
)
def test_a_peer_that_cannot_be_taken_back_is_told_of(
    settings: Settings,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    cause: BaseException,
    code: int,
) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            with monkeypatch.context() as patch:
                deafen(patch, {PeerAdd, PeerList}, cause)
                exit_code, out, err = await running.cli("peer", "add", "alice")
            assert (exit_code, out) == (code, "")
            (line,) = err.splitlines()
            assert "alice may have been added" in line and "`tidegate peer show alice`" in line

    asyncio.run(scenario())


@pytest.mark.parametrize("taken_back", [True, False])
def test_a_profile_that_cannot_be_printed_leaves_one_thing_said_of_its_peer(
    settings: Settings,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    taken_back: bool,
) -> None:
    def full(_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            with monkeypatch.context() as patch:
                patch.setattr("tidegate.cli.output.Handout.print", full)
                if not taken_back:
                    deafen(patch, {PeerList}, UnansweredError("no word"))
                code, _, err = await running.cli("peer", "add", "alice")
            (line,) = err.splitlines()
            assert code == 1
            assert "the profile cannot be printed: No space left on device" in line
            assert ("alice was not added" in line) == taken_back
            assert ("alice may have been added" in line) != taken_back

    asyncio.run(scenario())


@pytest.mark.parametrize("given", [True, False], ids=["key given", "new key"])
def test_whether_anybody_has_the_key_of_a_peer_that_could_not_be_taken_back_is_told(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    def full(_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    option = ["--public-key", encode_key(public_key_of(make_private_key()))] if given else []

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            with monkeypatch.context() as patch:
                patch.setattr("tidegate.cli.output.Handout.print", full)
                deafen(patch, {PeerList}, UnansweredError("no word"))
                _, _, err = await running.cli("peer", "add", "alice", *option)
            assert "alice may have been added" in err and "`tidegate peer show alice`" in err
            assert ("a key that nobody has" in err) is not given

    asyncio.run(scenario())


def test_a_failure_with_advice_of_its_own_keeps_it_while_the_peer_is_taken_back(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def taken_meanwhile(*_: object) -> NoReturn:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            monkeypatch.setattr("tidegate.files.os.link", taken_meanwhile)
            code, _, err = await running.cli("peer", "add", "alice", "--out", str(tmp_path / "alice.conf"))
            (line,) = err.splitlines()
            assert code == 2
            assert line.endswith("choose another --out, or add --force")
            assert running.packets.peers == {}

    asyncio.run(scenario())


def test_one_of_more_peers_than_fit_in_an_answer_is_shown_and_taken_back(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate.control.server.MAX_ANSWER_BYTES", 2000)

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            for number in range(8):
                assert (await running.cli("peer", "add", f"peer-{number}"))[0] == 0
            for all_of_them in (["status"], ["peer", "list"]):
                code, _, err = await running.cli(*all_of_them)
                assert (code, "`tidegate peer show NAME`" in err) == (1, True), err
            assert (await running.answer("peer", "show", "peer-5"))["address"] == "10.66.77.7"
            assert "no peer named 'eve'" in (await running.cli("peer", "show", "eve"))[2]
            with monkeypatch.context() as patch:
                deafen(patch, {PeerAdd}, UnansweredError("no word"))
                assert "alice was not added" in (await running.cli("peer", "add", "alice"))[2]
            assert len(running.packets.peers) == 8

    asyncio.run(scenario())


def test_each_change_has_a_line_in_the_log_with_names_and_addresses_and_without_secrets(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            configure_logging(LogSettings(format="json"))

            async def logged(*command: str) -> dict[str, Any]:
                code, _, err = await running.cli(*command)
                assert code == 0, err
                line = only([json.loads(line) for line in err.splitlines() if line.startswith("{")])
                assert line.pop("level") == "info"
                del line["timestamp"]
                return line

            added = await logged("peer", "add", "alice")
            key = (await running.answer("peer", "show", "alice"))["public_key"]
            alice = {"name": "alice", "address": "10.66.77.2", "public_key": key}
            assert added == {"event": "peer added", **alice, "cipher": "chacha20-poly1305"}
            web, dns = (
                {"external": port, "to": f"alice:{inner}"}
                for port, inner in (("tcp/80", 8080), ("udp/53", 53))
            )
            assert await logged("publish", "add", "tcp/80", "--to", "alice:8080") == {
                "event": "port published",
                **web,
            }
            assert await logged("publish", "remove", "tcp/80") == {"event": "port no longer published", **web}
            assert await logged("publish", "add", "udp/53", "--to", "alice:53") == {
                "event": "port published",
                **dns,
            }
            removed = await logged("peer", "remove", "alice")
            assert removed == {"event": "peer removed", **alice, "no_longer_published": "udp/53"}

    asyncio.run(scenario())


HELD = StoreError("tidegate.db: is held by another process", hint="try again")


@contextmanager
def unreadable(monkeypatch: pytest.MonkeyPatch, cause: Exception = HELD) -> Iterator[None]:
    """The store cannot be read, as when another process holds it for a long time."""

    def held(_store: SqliteStore) -> NoReturn:
        raise cause

    with monkeypatch.context() as patch:
        patch.setattr(SqliteStore, "peers", held)
        patch.setattr(SqliteStore, "publications", held)
        yield


def test_a_store_that_fails_in_the_midst_of_a_command_leaves_no_half_of_it(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = with_gre_for_alice(settings)

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            with unreadable(monkeypatch):
                file = tmp_path / "alice.conf"
                assert (await running.cli("peer", "add", "alice", "--out", str(file)))[0] == 0
                assert read_profile(file).address == IPv4Interface("10.66.77.2/32")
                assert list(running.packets.peers.values()) == ["10.66.77.2"]
                assert (await running.cli("peer", "remove", "alice"))[0] == 0
                assert running.packets.peers == {}, "it cannot connect any more"
            assert (await running.cli("peer", "add", "alice"))[0] == 0
            assert running.packets.passed == {47: "10.66.77.2"}

    asyncio.run(scenario())


def test_a_peer_that_is_removed_connects_no_more_whatever_fails_then(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = with_gre_for_alice(settings)

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            assert (await running.cli("peer", "add", "alice"))[0] == 0
            with unreadable(monkeypatch, RuntimeError("nobody has thought of this")):
                assert (await running.cli("peer", "remove", "alice"))[0] == 1
            assert running.packets.peers == {}

    asyncio.run(scenario())


def with_gre_for_alice(settings: Settings) -> Settings:
    """So that adding or removing a peer has to look up in the store which peer the protocol belongs to."""
    nat = settings.nat.model_copy(update={"other_protocols": {47: "alice"}})
    return settings.model_copy(update={"nat": nat})


def test_the_engine_is_told_each_peers_cipher_at_once_and_after_a_restart(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = ["aes-256-gcm", "chacha20-poly1305"]

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            await running.cli("peer", "add", "alice", "--cipher", "aes-256-gcm")
            await running.cli("peer", "add", "bob")
            assert list(running.packets.ciphers.values()) == expected
            assert "aes-256-gcm" in (await running.cli("status"))[1]
        async with serving(settings, capsys) as running:
            assert list(running.packets.ciphers.values()) == expected
            running.engine.aes = False
            code, _, err = await running.cli("peer", "add", "carol", "--cipher", "aes-256-gcm")
            assert (code, len(running.packets.ciphers)) == (1, 2)
            assert "no AES instructions" in err

    asyncio.run(scenario())


def test_a_gateway_without_aes_instructions_does_not_serve_a_peer_that_needs_them(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            await running.cli("peer", "add", "alice", "--cipher", "aes-256-gcm")
        engine = FakeEngine()
        engine.aes = False
        with pytest.raises(EngineError, match="no AES instructions.*'alice'.*peer remove alice"):
            await Gateway(settings, engine, FakeHost()).run()
        assert (engine.gateways[0].started, engine.gateways[0].stopped) == (0, 1)

    asyncio.run(scenario())
