"""What happens to a peer between its coming and its going: on a whole gateway with a fake engine, and on the store."""

from __future__ import annotations

import asyncio
import errno
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.conftest import CommandLine
from tests.unit.running import Running, only, serving
from tidegate.log import configure_logging
from tidegate.settings import LogSettings, NatSettings, Settings

ALICE = "10.66.77.2"
WEB = {("tcp", 80): (ALICE, 8080)}


def with_gre_for(settings: Settings, name: str) -> Settings:
    nat = NatSettings.model_validate({"other_protocols": {"gre": name}})
    return settings.model_copy(update={"nat": nat})


async def add_alice_and_her_port(running: Running) -> None:
    assert (await running.cli("peer", "add", "alice"))[0] == 0
    assert (await running.cli("publish", "add", "tcp/80", "--to", "alice:8080"))[0] == 0


async def port_of(running: Running) -> dict[str, Any]:
    return only((await running.answer("publish", "list"))["publications"])


def test_a_disabled_peer_is_out_at_once_and_after_a_restart_and_comes_back_with_all_it_had(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = with_gre_for(settings, "alice")

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            await add_alice_and_her_port(running)
            before = dict(running.packets.peers)
            done = (
                "tidegate: peer alice (10.66.77.2) is disabled; not published until it is enabled: tcp/80\n"
            )
            code, _, err = await running.cli("peer", "disable", "alice")
            assert (code, err.endswith(done)) == (0, True), err
            assert (running.packets.peers, running.packets.published, running.packets.passed) == ({}, {}, {})
            assert (await running.answer("peer", "show", "alice"))["enabled"] is False
            assert (await port_of(running))["state"] == "peer disabled"
            for command in (["status"], ["peer", "list"], ["peer", "show", "alice"]):
                assert "disabled" in (await running.cli(*command))[1]
            again = await running.answer("peer", "disable", "alice")
            assert again["publications"] == ["tcp/80"], "what is disabled already may be disabled"
        async with serving(settings, capsys) as running:
            assert running.said[0].endswith("0 peers (and 1 disabled)")
            assert (running.packets.peers, running.packets.published, running.packets.passed) == ({}, {}, {})
            reloaded = await running.answer("reload")
            assert reloaded["warnings"] == [
                "[nat] other_protocols: gre (47) goes to 'alice', but that peer is disabled"
            ]
            code, _, err = await running.cli("peer", "enable", "alice")
            assert (code, err.splitlines()[-1]) == (0, "tidegate: peer alice (10.66.77.2) is enabled")
            assert (running.packets.peers, running.packets.published) == (before, WEB)
            assert running.packets.passed == {47: ALICE}
            assert (await port_of(running))["state"] == "active"
            assert (await running.answer("peer", "enable", "alice"))["peer"]["enabled"] is True
        async with serving(settings, capsys) as running:
            assert running.packets.peers == before

    asyncio.run(scenario())


def test_a_port_for_a_disabled_peer_is_noted_and_published_once_it_is_enabled(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            assert (await running.cli("peer", "add", "alice"))[0] == 0
            assert (await running.cli("peer", "disable", "alice"))[0] == 0
            code, _, err = await running.cli("publish", "add", "tcp/80", "--to", "alice:8080")
            assert (code, err) == (
                0,
                "tidegate: tcp/80 will be published to alice:8080 once alice is enabled: "
                "`tidegate peer enable alice`\n",
            )
            assert running.packets.published == {}
            assert (await running.answer("peer", "enable", "alice"))["publications"] == ["tcp/80"]
            assert running.packets.published == WEB

    asyncio.run(scenario())


def test_a_peer_is_enabled_although_a_program_has_taken_its_port_and_that_is_told(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            await add_alice_and_her_port(running)
            assert (await running.cli("peer", "disable", "alice"))[0] == 0
            running.packets.held.add(80)
            code, _, err = await running.cli("peer", "enable", "alice")
            assert code == 0
            assert "tidegate: warning: tcp/80 cannot be published: 192.0.2.2: Address already in use" in err
            assert list(running.packets.peers.values()) == [ALICE]
            assert (await port_of(running))["state"] == "failed"

    asyncio.run(scenario())


@pytest.mark.parametrize("late", [False, True], ids=["peer refused", "port not answered"])
def test_a_peer_that_the_engine_refuses_stays_disabled(
    settings: Settings, capsys: pytest.CaptureFixture[str], late: bool
) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            await add_alice_and_her_port(running)
            assert (await running.cli("peer", "disable", "alice"))[0] == 0
            if late:
                running.packets.late_at = 80
            else:
                running.packets.refuse_peers = OSError(errno.ENOMEM, "no room for another peer")
            code, _, err = await running.cli("peer", "enable", "alice")
            assert (code, ("did not answer" if late else "no room") in err) == (1, True), err
            assert (running.packets.peers, running.packets.published) == ({}, {})
            assert (await running.answer("peer", "show", "alice"))["enabled"] is False

    asyncio.run(scenario())


def test_without_a_gateway_a_peer_is_disabled_and_enabled_in_the_store(
    tidegate: CommandLine, tmp_path: Path
) -> None:
    state = ["--state-dir", tmp_path]
    assert tidegate("peer", "add", "alice", *state).code == 0
    assert tidegate("publish", "add", "tcp/80", "--to", "alice", *state).code == 0
    assert "is disabled" in tidegate("peer", "disable", "alice", *state).err
    assert "disabled" in tidegate("peer", "list", *state).out
    assert "peer disabled" in tidegate("publish", "list", *state).out
    assert tidegate("peer", "enable", "alice", *state).err == "tidegate: peer alice (10.66.77.2) is enabled\n"
    assert "disabled" not in tidegate("peer", "list", *state).out
    for command in ("disable", "enable"):
        assert "no peer named 'eve'" in tidegate.refused(1, "peer", command, "eve", *state)


@pytest.mark.parametrize("renewed", [False, True], ids=["", "renewed"])
def test_a_peer_is_shown_with_its_date(
    tidegate: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renewed: bool
) -> None:
    state = ["--state-dir", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr("time.time", lambda: 1_700_000_000.5)
        assert tidegate("peer", "add", "alice", *state).code == 0
    if renewed:
        assert tidegate("peer", "renew", "alice", *state).code == 0
    assert re.search(r"created +2023-11-14 22:13:20 UTC", tidegate("peer", "show", "alice", *state).out)
    assert (
        json.loads(tidegate("peer", "show", "alice", *state, "--json").out)["created_at"] == 1_700_000_000.5
    )


def test_a_machine_without_aes_instructions_serves_if_the_peer_that_needs_them_is_disabled(
    settings: Settings, capsys: pytest.CaptureFixture[str], tidegate: CommandLine
) -> None:
    state = ["--state-dir", settings.state_dir]
    assert tidegate("peer", "add", "alice", "--cipher", "aes-256-gcm", *state).code == 0
    assert tidegate("peer", "disable", "alice", *state).code == 0
    tidegate.engine.aes = False
    assert "no AES instructions" in tidegate.refused(1, "peer", "enable", "alice", *state)

    async def scenario() -> None:
        async with serving(settings, capsys, tidegate.engine) as running:
            assert running.packets.peers == {}

    asyncio.run(scenario())


def test_a_renamed_peer_stays_connected_and_keeps_its_ports_and_protocols(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    before = with_gre_for(settings, "alice")
    wanted = [before]

    async def scenario() -> None:
        async with serving(before, capsys, reread=lambda: wanted[0]) as running:
            await add_alice_and_her_port(running)
            removals = running.packets.removals
            peers = dict(running.packets.peers)
            _, out, _ = await running.cli("peer", "rename", "alice", "bob", "--json")
            warning, _, answer = out.partition("{\n")
            assert "a setting still has a peer's former name" in warning, "in the log"
            renamed = json.loads("{" + answer)
            assert renamed["former_name"] == "alice"
            assert renamed["settings"] == ["nat.other_protocols.gre"]
            assert only((await running.answer("peer", "list"))["peers"])["name"] == "bob"
            assert (await port_of(running))["to"] == "bob:8080"
            assert (await running.cli("peer", "add", "carol"))[0] == 0
            assert running.packets.passed == {47: ALICE}, "also when it is looked up again"
            assert (await running.cli("peer", "remove", "carol"))[0] == 0
            assert (running.packets.peers, running.packets.published) == (peers, WEB)
            assert running.packets.removals == removals + 1, "of carol alone"
            wanted[0] = with_gre_for(settings, "bob")
            assert (await running.answer("reload"))["warnings"] == []
            assert running.packets.passed == {47: ALICE}
            wanted[0] = before
            assert "there is no such peer" in (await running.answer("reload"))["warnings"][0]
            assert running.packets.passed == {}
        async with serving(settings, capsys) as running:
            assert (running.packets.peers, running.packets.published) == (peers, WEB)

    asyncio.run(scenario())


def test_a_protocol_goes_to_whoever_has_the_name_that_the_settings_say(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with serving(with_gre_for(settings, "bob"), capsys) as running:
            assert (await running.cli("peer", "add", "alice"))[0] == 0
            assert running.packets.passed == {}
            assert (await running.answer("peer", "rename", "alice", "bob"))["settings"] == []
            assert running.packets.passed == {47: ALICE}
            assert (await running.cli("peer", "rename", "bob", "dave"))[0] == 0
            assert (await running.cli("peer", "add", "bob"))[0] == 0
            assert running.packets.passed == {47: "10.66.77.3"}, "a new bob"

    asyncio.run(scenario())


def test_a_renamed_peer_that_is_removed_or_disabled_loses_its_protocol(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with serving(with_gre_for(settings, "alice"), capsys) as running:
            for away in ("disable", "remove"):
                assert (await running.cli("peer", "add", "alice"))[0] == 0
                assert running.packets.passed != {}
                assert (await running.cli("peer", "rename", "alice", "bob"))[0] == 0
                assert (await running.cli("peer", away, "bob"))[0] == 0
                assert (await running.cli("peer", "add", "carol"))[0] == 0
                assert running.packets.passed == {}
                for name in ("bob", "carol"):
                    await running.cli("peer", "remove", name)

    asyncio.run(scenario())


def test_a_setting_that_has_the_former_name_is_told_with_file_line_and_what_to_write(
    tidegate: CommandLine, tmp_path: Path, write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write('[nat.other_protocols]\nsctp = "eve"\n47 = "alice"\n')
    gateway = ["--state-dir", tmp_path / "state", "--config", config]
    assert tidegate("peer", "add", "alice", *gateway).code == 0
    outcome = tidegate("peer", "rename", "alice", "bob", *gateway)
    assert (outcome.code, outcome.err.splitlines()) == (
        0,
        [
            "tidegate: peer alice (10.66.77.2) is now called bob",
            f"tidegate: warning: nat.other_protocols.gre still says alice: write bob in {config}:3, "
            "and run `tidegate reload`, or the next reload or restart takes the protocol from it",
        ],
    )
    monkeypatch.setenv("TIDEGATE_NAT__OTHER_PROTOCOLS__ESP", "bob")
    outcome = tidegate("peer", "rename", "bob", "dave", *gateway, "--json")
    assert json.loads(outcome.out)["settings"] == ["nat.other_protocols.esp"]
    assert "write dave in $TIDEGATE_NAT__OTHER_PROTOCOLS__ESP, and restart the gateway" in outcome.err
    assert "not a peer name" in tidegate.refused(2, "peer", "rename", "dave", "a/b", *gateway)
    assert "already exists" in tidegate.refused(1, "peer", "rename", "dave", "dave", *gateway)


def test_a_setting_that_only_the_gateway_knows_is_told_nevertheless(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with serving(with_gre_for(settings, "alice"), capsys) as running:
            assert (await running.cli("peer", "add", "alice"))[0] == 0
            _, _, err = await running.cli("peer", "rename", "alice", "bob")
            assert "warning: nat.other_protocols.gre still says alice" in err
            assert "write bob where the gateway's settings say so, and run `tidegate reload`" in err

    asyncio.run(scenario())


def test_each_upkeep_has_a_line_in_the_log(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            await add_alice_and_her_port(running)
            key = (await running.answer("peer", "show", "alice"))["public_key"]
            configure_logging(LogSettings(format="json"))

            async def logged(*command: str) -> dict[str, Any]:
                code, _, err = await running.cli(*command)
                assert code == 0, err
                line = only([json.loads(line) for line in err.splitlines() if line.startswith("{")])
                assert line.pop("level") == "info"
                del line["timestamp"]
                return line

            alice = {"name": "alice", "address": ALICE, "public_key": key}
            assert await logged("peer", "disable", "alice") == {
                "event": "peer disabled",
                **alice,
                "no_longer_published": "tcp/80",
            }
            assert await logged("peer", "enable", "alice") == {
                "event": "peer enabled",
                **alice,
                "published": "tcp/80",
            }
            assert await logged("peer", "rename", "alice", "bob") == {
                "event": "peer renamed",
                "former_name": "alice",
                **alice,
                "name": "bob",
            }
            renewed = await logged("peer", "renew", "bob", "--out", str(settings.state_dir / "bob.conf"))
            new = (await running.answer("peer", "show", "bob"))["public_key"]
            assert new != key
            assert renewed == {
                "event": "peer renewed",
                **alice,
                "name": "bob",
                "public_key": new,
                "former_public_key": key,
            }

    asyncio.run(scenario())
