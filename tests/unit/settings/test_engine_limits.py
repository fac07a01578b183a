"""Limits that the engine has as well: the settings must agree with it."""

from __future__ import annotations

import re
from pathlib import Path

from tidegate.host.netlink import TRAIN_BYTES, TRAIN_SEGMENTS
from tidegate.settings.model import MAX_SHARDS

SOURCE = Path(__file__).parents[3] / "engine" / "src"


def test_settings_allow_as_many_shards_as_the_engine() -> None:
    (limit,) = re.findall(r"const MAX_SHARDS: u8 = (\d+);", (SOURCE / "engine.rs").read_text())
    assert int(limit) == MAX_SHARDS


def test_superpackets_are_fitted_to_the_trains_that_the_engine_sends() -> None:
    transport = (SOURCE / "transport" / "mod.rs").read_text()
    limits = re.findall(r"const MAX_TRAIN_(BYTES|SEGMENTS): usize = ([\d_]+);", transport)
    assert {name: int(limit) for name, limit in limits} == {"BYTES": TRAIN_BYTES, "SEGMENTS": TRAIN_SEGMENTS}
