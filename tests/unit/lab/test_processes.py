"""How the lab finds and runs its tools."""

from __future__ import annotations

from pathlib import Path

import pytest

from tidegate.lab.processes import Process, run, which


@pytest.fixture
def without_sbin(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `su` without a dash on Debian."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")


@pytest.mark.usefixtures("without_sbin")
def test_tools_are_found_where_only_roots_path_leads(tmp_path: Path) -> None:
    shown = "/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
    assert which("sysctl") is not None
    assert run(["sysctl", "-n", "kernel.ostype"]).stdout == "Linux\n"
    assert run(["sh", "-c", "echo $PATH $EXTRA"], env={"EXTRA": "1"}).stdout == f"{shown} 1\n"
    process = Process("sh", ["sh", "-c", "echo $PATH"], tmp_path / "log")
    process.wait(5)
    assert process.output() == f"{shown}\n"


def test_a_path_with_everything_in_it_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "/sbin:/opt/bin:/usr/sbin:/usr/local/sbin:/usr/bin:/bin"
    monkeypatch.setenv("PATH", path)
    assert run(["sh", "-c", "echo $PATH"]).stdout == f"{path}\n"
