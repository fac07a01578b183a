"""docs/settings.md against the settings themselves."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from annotated_types import Ge, Le
from pydantic import BaseModel

from tidegate.settings import Settings, load_settings
from tidegate.settings.changes import is_live
from tidegate.settings.sources import DEFAULT_PATH

TEXT = (Path(__file__).parents[3] / "docs" / "settings.md").read_text()

Row = tuple[str, str, str]
"""Value, default, and when it takes effect, as on the page."""


def documented() -> dict[tuple[str, ...], Row]:
    """The rows of the tables, in their order."""
    rows: dict[tuple[str, ...], Row] = {}
    section: tuple[str, ...] = ()
    for line in TEXT.splitlines():
        if line.startswith("#"):
            heading = re.match(r"### `\[(\w+)\]`", line)
            section = (heading[1],) if heading else ()
        elif row := re.match(r"\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \|", line):
            key = (*section, row[1])
            assert key not in rows, f"{key} is there twice"
            rows[key] = (row[2], row[3], row[4])
    return rows


def existing(model: type[BaseModel], above: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Every setting of the model with its field."""
    found: dict[tuple[str, ...], Any] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= existing(field.annotation, (*above, name))
        else:
            found[*above, name] = field
    return found


FIELDS = existing(Settings)
BY_NAME = {".".join(key): key for key in FIELDS}


def test_every_setting_is_described_and_nothing_that_is_none() -> None:
    assert set(documented()) == set(FIELDS)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_setting_is_described_as_it_is(name: str) -> None:
    key = BY_NAME[name]
    value, default, effect = documented()[key]
    field = FIELDS[key]
    if default == "unset":
        assert field.default is None
    else:
        tree: Any = tomllib.loads(f"x = {default.strip('`')}")["x"]
        for part in reversed(key):
            tree = {part: tree}
        said: Any = Settings.model_validate(tree)
        for part in key:
            said = getattr(said, part)
        assert said == field.default
    assert effect == ("reload" if is_live(key) else "restart")
    least = [rule.ge for rule in field.metadata if isinstance(rule, Ge)]
    most = [rule.le for rule in field.metadata if isinstance(rule, Le)]
    if least and most:
        assert value.endswith(f", {least[0]} to {most[0]}")


def test_the_example_is_accepted(tmp_path: Path) -> None:
    file = tmp_path / "example.toml"
    file.write_text(TEXT.partition("```toml\n")[2].partition("```")[0])
    assert load_settings(config=file).nat.other_protocols == {47: "alice"}


def test_the_default_file_is_named() -> None:
    assert f"`{DEFAULT_PATH}`" in TEXT
