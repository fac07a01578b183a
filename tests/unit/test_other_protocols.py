"""Protocols without ports, each given to one peer by a setting."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from tests.unit.fakes import FakeEngine
from tests.unit.running import serving, until
from tidegate.settings import NatSettings, Settings


def with_protocols(settings: Settings, **protocols: str) -> Settings:
    nat = NatSettings.model_validate({"other_protocols": protocols})
    return settings.model_copy(update={"nat": nat})


def test_protocols_have_names_and_numbers() -> None:
    nat = NatSettings.model_validate({"other_protocols": {"gre": "alice", "ESP": "bob", "99": "carol"}})
    assert nat.other_protocols == {47: "alice", 50: "bob", 99: "carol"}
    assert NatSettings().other_protocols == {}


def test_a_protocol_goes_to_its_peer_as_soon_as_that_is_there_and_no_longer(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        wanted = with_protocols(settings, gre="alice", esp="bob")
        async with serving(wanted, capsys) as running:
            said = capsys.readouterr()
            assert "gre (47) goes to 'alice', but there is no such peer" in said.out + said.err
            assert running.packets.passed == {}
            assert (await running.cli("peer", "add", "alice"))[0] == 0
            assert running.packets.passed == {47: "10.66.77.2"}
            assert (await running.cli("peer", "add", "bob"))[0] == 0
            assert running.packets.passed == {47: "10.66.77.2", 50: "10.66.77.3"}
            assert (await running.cli("peer", "remove", "alice"))[0] == 0
            assert running.packets.passed == {50: "10.66.77.3"}
        async with serving(wanted, capsys) as again:
            assert again.packets.passed == {50: "10.66.77.3"}, "after a restart, too"

    asyncio.run(scenario())


def test_a_reload_gives_a_protocol_to_another_peer(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = [settings]

    async def scenario() -> None:
        async with serving(settings, capsys, reread=lambda: wanted[0]) as running:
            for name in ("alice", "bob"):
                assert (await running.cli("peer", "add", name))[0] == 0
            wanted[0] = with_protocols(settings, gre="bob", sctp="nobody")
            answer = await running.answer("reload")
            assert answer["applied"] == ["nat.other_protocols"]
            assert "sctp (132) goes to 'nobody'" in answer["warnings"][0]
            assert running.packets.passed == {47: "10.66.77.3"}
            wanted[0] = settings
            assert (await running.answer("reload"))["warnings"] == []
            assert running.packets.passed == {}

    asyncio.run(scenario())


def test_a_protocol_for_nobody_is_told_in_the_log_of_a_gateway_that_reloads_by_signal(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = with_protocols(settings, sctp="nobody")
    logged = ""

    def is_logged() -> bool:
        nonlocal logged
        said = capsys.readouterr()
        logged += said.out + said.err
        return "settings reloaded" in logged and "sctp (132) goes to 'nobody'" in logged

    async def scenario() -> None:
        async with serving(settings, capsys, reread=lambda: wanted):
            os.kill(os.getpid(), signal.SIGHUP)
            await until(is_logged)

    asyncio.run(scenario())


def test_an_engine_that_cannot_keep_the_host_silent_is_told_of_and_the_gateway_serves(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = FakeEngine()
    engine.prepare = lambda gateway: setattr(gateway, "refuse_passing", True)

    async def scenario() -> None:
        async with serving(with_protocols(settings, gre="alice"), capsys, engine) as running:
            assert (await running.cli("peer", "add", "alice"))[0] == 0
            answer = await running.answer("reload")
            assert "no raw sockets here" in answer["warnings"][0]
            assert not running.task.done()

    asyncio.run(scenario())
