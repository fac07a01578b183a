"""``tidegate nat`` with a running gateway."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.unit.running import serving
from tidegate.settings import Settings


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
