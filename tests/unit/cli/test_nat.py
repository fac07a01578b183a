"""``tidegate nat`` with a running gateway."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests.unit.conftest import CommandLine
from tests.unit.running import serving
from tidegate.settings import Settings

USAGE = 2


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["text", "json"])
def test_a_list_of_mappings_that_stops_early_says_so_to_programs_too(
    settings: Settings, capsys: pytest.CaptureFixture[str], form: tuple[str, ...]
) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            for name in ("alice", "bob"):
                await running.answer("peer", "add", name, "--endpoint", "a.b")
            code, out, err = await running.cli("nat", "list", "--limit", "1", *form)
            assert code == 0
            assert err.splitlines()[-1] == (
                "tidegate: there are more than these 1; raise --limit, or choose a --peer"
            )
            assert not form or json.loads(out)["truncated"] is True
            _, _, err = await running.cli("nat", "list", *form)
            assert "there are more" not in err

    asyncio.run(scenario())


@pytest.mark.parametrize("external", ["192.0.2.2:40001", "40001"])
def test_a_listing_says_who_has_an_external_port(
    settings: Settings, capsys: pytest.CaptureFixture[str], external: str
) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            for name in ("alice", "bob", "carol"):
                await running.answer("peer", "add", name, "--endpoint", "a.b")
            told = await running.answer("nat", "list", "--external", external)
            (mapping,) = told["mappings"]
            assert (mapping["peer"], mapping["external"]) == ("bob", "192.0.2.2:40001")
            assert told["truncated"] is False
            _, shown, _ = await running.cli("nat", "list", "--external", external)
            assert "bob" in shown and "alice" not in shown and "carol" not in shown
            told = await running.answer("nat", "list", "--external", external, "--peer", "alice")
            assert told["mappings"] == []
            told = await running.answer("nat", "list", "--external", "192.0.2.3:40001")
            assert told["mappings"] == []

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("external", "wrong"),
    [
        ("203.0.113.1", "'203.0.113.1' is not a port (1 to 65535)"),
        ("203.0.113.1:65536", "'65536' is not a port (1 to 65535)"),
        (":40001", "'' is not an IPv4 address"),
        ("example.com:40001", "'example.com' is not an IPv4 address"),
    ],
)
def test_an_external_port_that_is_none_is_refused(
    tidegate: CommandLine, tmp_path: Path, external: str, wrong: str
) -> None:
    message = tidegate.refused(USAGE, "nat", "list", "--external", external, "--state-dir", tmp_path)
    assert message == f"tidegate: --external: {wrong}; write ADDR:PORT, or PORT for any address"
