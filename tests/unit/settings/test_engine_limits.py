"""Limits and defaults that the engine has as well: the settings must agree with it."""

from __future__ import annotations

import re
from pathlib import Path

from tidegate.host.netlink import TRAIN_BYTES, TRAIN_SEGMENTS
from tidegate.settings import NatSettings
from tidegate.settings.model import ALL_PORTS, MAX_SHARDS

SOURCE = Path(__file__).parents[3] / "engine" / "src"


def test_settings_allow_as_many_shards_as_the_engine() -> None:
    (limit,) = re.findall(r"const MAX_SHARDS: u8 = (\d+);", (SOURCE / "engine.rs").read_text())
    assert int(limit) == MAX_SHARDS


def test_superpackets_are_fitted_to_the_trains_that_the_engine_sends() -> None:
    transport = (SOURCE / "transport" / "mod.rs").read_text()
    limits = re.findall(r"const MAX_TRAIN_(BYTES|SEGMENTS): usize = ([\d_]+);", transport)
    assert {name: int(limit) for name, limit in limits} == {"BYTES": TRAIN_BYTES, "SEGMENTS": TRAIN_SEGMENTS}


def test_the_nat_does_the_same_by_default_whoever_makes_it() -> None:
    source = (SOURCE / "nat" / "config.rs").read_text()
    (defaults,) = re.findall(r"impl Default for NatConfig {(.*?)\n}", source, re.DOTALL)
    numbers = re.findall(r"(\w+): (?:Duration::from_secs\()?([\d_]+)\)?,", defaults)
    engine = {name: float(number) for name, number in numbers}
    settings = NatSettings().model_dump()
    assert engine.keys() == {
        name for name in settings if name.startswith("max_") or name.endswith("_timeout")
    } - {"tcp_transitory_timeout"}
    assert engine == {name: settings[name] for name in engine}
    (filtering,) = re.findall(r"filtering: Filtering::(\w+),", defaults)
    assert filtering == "".join(word.capitalize() for word in settings["filtering"].split("-"))
    (ports,) = re.findall(
        r"DEFAULT_PORT_RANGE: \(u16, u16\) = \(([\d_]+), ([\d_]+)\)",
        (SOURCE / "python" / "options.rs").read_text(),
    )
    assert tuple(map(int, ports)) == ALL_PORTS
