"""What a process that lacks a permission is told, and the limit of open files, raised as far as the kernel allows."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import structlog.testing

from tidegate.errors import PrivilegeError
from tidegate.host.privileges import CAP_NET_ADMIN, CAP_NET_RAW, check_privileges, raise_open_file_limit


@pytest.fixture
def granted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Root with both capabilities and a TUN device, whatever runs the tests. Returns the device."""
    device = tmp_path / "tun"
    device.touch()
    monkeypatch.setattr("tidegate.host.privileges.TUN_DEVICE", device)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(
        "tidegate.host.privileges.effective_capabilities", lambda: 1 << CAP_NET_ADMIN | 1 << CAP_NET_RAW
    )
    return device


def refusal() -> str:
    with pytest.raises(PrivilegeError) as refused:
        check_privileges()
    return str(refused.value)


@pytest.mark.usefixtures("granted")
def test_root_that_lacks_a_capability_is_told_how_a_container_gets_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_privileges()
    monkeypatch.setattr("tidegate.host.privileges.effective_capabilities", lambda: 1 << CAP_NET_ADMIN)
    assert (
        refusal()
        == "this needs CAP_NET_RAW, which root lacks here; in a container, start it with --cap-add NET_RAW"
    )
    monkeypatch.setattr("tidegate.host.privileges.effective_capabilities", lambda: 0)
    assert refusal() == (
        "this needs CAP_NET_ADMIN and CAP_NET_RAW, which root lacks here; "
        "in a container, start it with --cap-add NET_ADMIN --cap-add NET_RAW"
    )


@pytest.mark.usefixtures("granted")
def test_another_user_that_lacks_a_capability_is_told_to_become_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr("tidegate.host.privileges.effective_capabilities", lambda: 0)
    assert refusal() == "this needs CAP_NET_ADMIN and CAP_NET_RAW; run as root, or grant the capability"


def test_a_missing_tun_device_is_told_with_how_a_container_gets_it(granted: Path) -> None:
    granted.unlink()
    assert refusal() == (
        f"{granted} does not exist; run `modprobe tun`, or start the container with --device {granted}"
    )


# A device that is mounted as a volume is there, but its cgroup forbids to open it.
def test_root_that_may_not_open_the_tun_device_is_told_how_a_container_may(
    granted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert refusal() == (
        f"{granted} cannot be opened: permission denied; in a container, start it with --device {granted}"
    )
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert refusal() == f"{granted} cannot be opened: permission denied; run as root"


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
