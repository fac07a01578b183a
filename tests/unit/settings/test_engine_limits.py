"""Limits that the engine has, too: a setting beyond them is refused with its file and line, before anything starts."""

from __future__ import annotations

import re
from pathlib import Path

from tidegate.settings.model import MAX_SHARDS

ENGINE = Path(__file__).parents[3] / "engine" / "src" / "engine.rs"


def test_settings_allow_as_many_shards_as_the_engine() -> None:
    (limit,) = re.findall(r"const MAX_SHARDS: u8 = (\d+);", ENGINE.read_text())
    assert int(limit) == MAX_SHARDS
