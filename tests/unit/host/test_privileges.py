"""The limit of open files, raised as far as the kernel allows."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import structlog.testing

from tidegate.host.privileges import raise_open_file_limit


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The process's limits, soft and hard: the last one is in force."""
    known = [(1024, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: known[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: known.append(wanted))
    return known


def test_the_soft_limit_of_open_files_becomes_the_hard_one(limits: list[tuple[int, int]]) -> None:
    assert raise_open_file_limit() == 4096
    assert limits[1:] == [(4096, 4096)]


# setrlimit(2): EPERM above fs.nr_open, of which Python makes a ValueError.
def test_where_the_hard_limit_exceeds_what_the_kernel_gives_one_process_it_becomes_that(
    limits: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse_above(_: int, wanted: tuple[int, int]) -> None:
        if max(wanted) > 2048:
            raise ValueError("not allowed to raise maximum limit")
        limits.append(wanted)

    (tmp_path / "nr_open").write_text("2048\n")
    monkeypatch.setattr("tidegate.host.privileges.NR_OPEN", tmp_path / "nr_open")
    monkeypatch.setattr(resource, "setrlimit", refuse_above)
    with structlog.testing.capture_logs() as events:
        assert raise_open_file_limit() == 2048
    assert limits[1:] == [(2048, 2048)]
    assert events == []


# Containers also forbid the call itself.
@pytest.mark.parametrize(
    "refusal", [ValueError("not allowed to raise maximum limit"), PermissionError(1, "no")]
)
@pytest.mark.parametrize("nr_open", ["1000", "2048", "1048576", None])
def test_a_limit_that_the_kernel_refuses_stays_as_it_is(
    limits: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    refusal: Exception,
    nr_open: str | None,
) -> None:
    def refuse(_: int, wanted: tuple[int, int]) -> None:
        raise refusal

    if nr_open is not None:
        (tmp_path / "nr_open").write_text(f"{nr_open}\n")
    monkeypatch.setattr("tidegate.host.privileges.NR_OPEN", tmp_path / "nr_open")
    monkeypatch.setattr(resource, "setrlimit", refuse)
    with structlog.testing.capture_logs() as events:
        assert raise_open_file_limit() == 1024
    (warning,) = events
    assert warning["log_level"] == "warning"
    assert (warning["open_files"], warning["hard_limit"]) == (1024, 4096)
    limits.append((4096, 4096))
    assert raise_open_file_limit() == 4096, "which needs no call"
