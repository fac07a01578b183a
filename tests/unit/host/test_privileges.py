"""The limit of open files, raised as far as the kernel allows."""

from __future__ import annotations

import resource

import pytest

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


# setrlimit(2): EPERM above fs.nr_open, of which Python makes a ValueError; containers also forbid the call itself.
@pytest.mark.parametrize(
    "refusal", [ValueError("not allowed to raise maximum limit"), PermissionError(1, "no")]
)
def test_a_limit_that_the_kernel_refuses_stays_as_it_is(
    limits: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, refusal: Exception
) -> None:
    def refuse(_: int, wanted: tuple[int, int]) -> None:
        raise refusal

    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert raise_open_file_limit() == 1024
    limits.append((4096, 4096))
    assert raise_open_file_limit() == 4096, "which needs no call"
