"""The log of mappings, as it is written."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.unit.fakes import FakeRecord
from tests.unit.running import serving, until
from tidegate.log import configure_logging
from tidegate.mapping_log import BATCH
from tidegate.settings import LogSettings, Settings


def test_each_mapping_has_a_line_at_its_beginning_and_its_end_with_its_peers_name(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[dict[str, object]] = []

    def heard() -> int:
        for line in capsys.readouterr().err.splitlines():
            if line.startswith("{"):
                lines.append(json.loads(line))
        return len(lines)

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            added = await running.cli("peer", "add", "alice")
            assert added[0] == 0, added
            configure_logging(LogSettings(format="json"))
            engine = running.packets
            engine.log_mappings(FakeRecord("created", ("10.66.77.2", 5000)))
            await until(lambda: heard() == 1)
            removed = await running.cli("peer", "remove", "alice")
            assert removed[0] == 0, removed
            engine.log_mappings(FakeRecord("ended", ("10.66.77.2", 5000), age=61.5), missing=3)
            await until(lambda: heard() == 3)

    asyncio.run(scenario())
    created, ended, missing = lines
    expected = {
        "at": "2023-11-14T22:13:20.250+00:00",
        "protocol": "udp",
        "peer": "alice",
        "internal": "10.66.77.2:5000",
        "external": "192.0.2.2:40000",
    }
    assert {key: created[key] for key in created if key not in {"level", "timestamp"}} == expected | {
        "event": "mapping created"
    }
    assert {key: ended[key] for key in ended if key not in {"level", "timestamp"}} == expected | {
        "event": "mapping ended",
        "seconds": 61.5,
    }, "also when the peer is gone"
    assert (missing["event"], missing["count"]) == ("mapping records were not logged", 3)


def test_many_records_are_logged_a_few_at_a_time_and_all_of_them(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            configure_logging(LogSettings(format="json"))
            engine = running.packets
            engine.log_mappings(*(FakeRecord("created", ("10.66.77.9", n)) for n in range(3 * BATCH + 1)))
            said = ""

            def heard() -> int:
                nonlocal said
                said += capsys.readouterr().err
                return said.count("mapping created")

            await until(lambda: heard() > 3 * BATCH)
            assert heard() == 3 * BATCH + 1
            assert '"peer": null' in said

    asyncio.run(scenario())
