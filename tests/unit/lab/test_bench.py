"""What `tidegate bench` is to measure, and what it refuses before it builds anything."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.unit.conftest import CommandLine
from tidegate.cli.lab import BENCH_EXAMPLES
from tidegate.lab import bench, crowd
from tidegate.lab.figures import Results
from tidegate.lab.topology import LabError
from tidegate.lab.variants import TIDEGATE, VARIANTS
from tidegate.lab.workloads import TCP_1_DOWN, WORKLOADS

USAGE, FAILURE = 2, 1
EXAMPLES = [shlex.split(found) for found in re.findall(r"\[cyan\]tidegate (bench.*?)\[/\]", BENCH_EXAMPLES)]


class Measured:
    """The pairs of workload and variant that would have been measured."""

    def __init__(self) -> None:
        self.pairs: list[tuple[str, str]] = []

    def measure(self, _console: object, pairs: list[bench.Pair], _rounds: int) -> Results:
        self.pairs = [(workload.name, variant.name) for workload, variant in pairs]
        return {}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    """On a machine on which everything is installed."""
    measured = Measured()
    monkeypatch.setattr(bench, "_measure", measured.measure)
    monkeypatch.setattr(bench, "require_lab_abilities", lambda: None)
    monkeypatch.setattr("tidegate.lab.variants.Variant.missing", lambda _: [])
    monkeypatch.setattr(crowd, "COMMAND", Path("/bin/sh"))
    return measured


@pytest.mark.parametrize("example", EXAMPLES, ids=" ".join)
def test_every_example_measures_something(
    tidegate: CommandLine, measured: Measured, example: list[str]
) -> None:
    assert tidegate(*example).code == 0
    assert measured.pairs != []


def test_there_are_examples_and_the_quick_look_is_quick(tidegate: CommandLine, measured: Measured) -> None:
    whole, quick = EXAMPLES
    assert whole == ["bench"]
    tidegate(*quick)
    assert {workload for workload, _ in measured.pairs} == {TCP_1_DOWN}


@pytest.mark.parametrize(
    ("flag", "names"),
    [("--variant", [v.name for v in VARIANTS]), ("--workload", [w.name for w in WORKLOADS])],
)
def test_a_name_that_nothing_has_is_answered_with_those_that_there_are(
    tidegate: CommandLine, measured: Measured, flag: str, names: list[str]
) -> None:
    message = tidegate.refused(USAGE, "bench", flag, names[0], flag, "donwload")
    assert f"{flag}: no name contains 'donwload'" in message
    for name in names:
        assert f'"{name}"' in message
    assert measured.pairs == []


def test_what_is_never_measured_together_is_a_usage_error(tidegate: CommandLine, measured: Measured) -> None:
    message = tidegate.refused(USAGE, "bench", "--variant", "softether", "--workload", "1300")
    assert '"SoftEther with SecureNAT" is measured with "TCP, 1 flow, up", ' in message
    assert measured.pairs == []


def test_where_nothing_of_it_is_installed_that_is_said(
    tidegate: CommandLine, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate.lab.variants.Variant.missing", lambda variant: list(variant.needs))
    message = tidegate.refused(FAILURE, "bench", "--variant", "openvpn")
    assert "nothing can be measured here" in message
    assert "OpenVPN + kernel NAT (openvpn, openssl not installed)" in message
    assert "make bench" in message
    assert measured.pairs == []


@pytest.mark.parametrize(
    "make", [Path.touch, lambda path: path.symlink_to("/proc/nowhere")], ids=["file", "link"]
)
def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(
    tidegate: CommandLine, measured: Measured, tmp_path: Path, make: object
) -> None:
    blocked = tmp_path / "blocked"
    make(blocked)  # type: ignore[operator]
    for output in (blocked, blocked / "below"):
        message = tidegate.refused(FAILURE, "bench", "--output", output)
        assert f"--output {output}: cannot be written: " in message
        assert measured.pairs == []


def test_the_folder_is_made_and_nothing_else_left_in_it(
    tidegate: CommandLine, measured: Measured, tmp_path: Path
) -> None:
    output = tmp_path / "new" / "folder"
    assert tidegate("bench", "--output", output, "--variant", TIDEGATE).code == 0
    assert sorted(path.name for path in output.iterdir()) == ["benchmark.json", "benchmark.md"]


@pytest.mark.parametrize("command", ["bench", "demo"])
def test_a_machine_that_cannot_have_a_lab_is_told_on_standard_error(
    tidegate: CommandLine, measured: Measured, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def cannot() -> None:
        raise LabError("network namespaces need root", hint="run it with sudo")

    monkeypatch.setattr(bench, "require_lab_abilities", cannot)
    monkeypatch.setattr("tidegate.lab.topology.require_lab_abilities", cannot)
    outcome = tidegate(command)
    assert (outcome.code, outcome.out) == (FAILURE, "")
    assert outcome.err == "tidegate: network namespaces need root; run it with sudo\n"
    assert measured.pairs == []
