"""The Containerfile, against what it is built from, the settings' defaults, and what the documentation says of it."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from tidegate.settings import Settings

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "docs" / "operation.md").read_text().partition("## In a container")[2].partition("\n## ")[0]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


def instructions() -> list[tuple[str, str]]:
    """Keyword and argument of each, in their order, with continued lines joined."""
    text = (ROOT / "Containerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(keyword, rest.strip()) for keyword, _, rest in (line.partition(" ") for line in lines)]


def arguments(keyword: str) -> list[str]:
    return [argument for found, argument in instructions() if found == keyword]


def is_sent(file: str) -> bool:
    """Whether an engine gets the file to build from: of the patterns that match it or a folder of it, the last one
    decides (Docker's "Building best practices", .dockerignore)."""
    path = PurePosixPath(file)
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = re.escape(line.removeprefix("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if any(re.fullmatch(pattern, str(part)) for part in (path, *path.parents)):
            sent = line.startswith("!")
    return sent


def test_the_image_offers_what_the_gateway_uses_by_default() -> None:
    defaults = Settings()
    assert arguments("EXPOSE") == [f"{defaults.gateway.listen.port}/udp"]
    assert arguments("VOLUME") == [str(defaults.state_dir)]
    (entry,), (command,) = arguments("ENTRYPOINT"), arguments("CMD")
    assert (json.loads(entry), json.loads(command)) == (["tidegate"], ["serve"])


def test_a_new_volume_is_closed_to_others() -> None:
    (volume,) = arguments("VOLUME")
    assert f"install -d -m 700 {volume}" in arguments("RUN")[-1]


def test_the_environment_is_where_it_was_installed_and_has_the_interpreter_that_it_was_made_with() -> None:
    script = (ROOT / "scripts" / "install").read_text()
    prefix = re.search(r"\$\{PREFIX:-(/[^}]+)\}", script)
    assert prefix is not None
    assert f"--from=build {prefix[1]} {prefix[1]}" in arguments("COPY")
    assert f"ln -s {prefix[1]}/bin/tidegate " in arguments("RUN")[-1]
    bases = {base.partition(" ")[0] for base in arguments("FROM")}
    assert len(bases) == 1, "another release of Debian has another Python"


def test_the_labels_are_true() -> None:
    (label,) = arguments("LABEL")
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', label))
    assert labels["version"] == PROJECT["project"]["version"]
    assert PROJECT["project"]["license"] in labels["licenses"]


def test_all_that_a_build_reads_is_sent() -> None:
    workspace = tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]
    needed = [
        *("Cargo.toml", "Cargo.lock", "pyproject.toml", PROJECT["project"]["readme"]),
        *PROJECT["project"]["license-files"],
        *(f"{member}/Cargo.toml" for member in workspace["members"]),
        *("requirements.lock", "requirements-runtime.lock", "scripts/bootstrap", "scripts/install"),
    ]
    for folder in ("engine/src", "engine/benches", "ipsec-mb", "src"):
        files = [file for file in (ROOT / folder).rglob("*") if file.suffix in {".rs", ".c", ".py", ".pyi"}]
        needed += [str(file.relative_to(ROOT)) for file in files]
    assert len(needed) > 100
    assert all((ROOT / file).exists() for file in needed)
    assert [file for file in needed if not is_sent(file)] == []
    copied = [argument.split()[:-1] for argument in arguments("COPY") if not argument.startswith("--from")]
    assert copied == [["scripts/bootstrap"], ["."]]


@pytest.mark.parametrize(
    "file",
    [
        *("alice.conf", "tidegate.toml", ".git/config", ".venv/bin/python", "target/wheels/tidegate.whl"),
        *("src/tidegate/_engine.abi3.so", "src/tidegate/dns/__pycache__/proxy.cpython-311.pyc"),
        *("engine/fuzz/target/debug/deps", "tests/unit/test_container.py"),
    ],
)
def test_what_else_lies_in_a_checkout_is_not_sent(file: str) -> None:
    assert not is_sent(file)


def test_the_documented_commands_fit_the_image_and_the_capabilities_are_those_of_the_unit() -> None:
    (volume,), (port,) = arguments("VOLUME"), arguments("EXPOSE")
    assert set(re.findall(r"--volume tidegate:(/\S+)", SECTION)) == {volume}
    assert set(re.findall(r"--publish (\S+)", SECTION)) == {f"{port.partition('/')[0]}:{port}"}
    unit = (ROOT / "packaging" / "tidegate.service").read_text()
    granted = re.search(r"^CapabilityBoundingSet=(.*)$", unit, re.MULTILINE)
    assert granted is not None
    named = set(re.findall(r"`(?:CAP_)?(NET_\w+|BPF)`", SECTION))
    assert {f"CAP_{name}" for name in named} == set(granted[1].split())
