"""Files that must be complete, even on file systems that can do little."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from tidegate.files import atomic_write, make_private


@pytest.fixture(params=["with hard links", "without"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a file is to appear, on an ordinary file system and on one like FAT."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    if request.param == "without":
        monkeypatch.setattr(os, "link", refuse)
    return tmp_path / "alice.conf"


def names_in(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()]


def test_a_file_appears_whole_and_for_its_owner_alone(place: Path) -> None:
    with atomic_write(place, replace=False) as file:
        file.write("whole")
        assert not place.exists()
    assert place.read_text() == "whole"
    assert place.stat().st_mode & 0o777 == 0o600
    assert names_in(place.parent) == [place.name]


def test_a_file_that_appeared_meanwhile_stays_as_it_is(place: Path) -> None:
    with pytest.raises(FileExistsError), atomic_write(place, replace=False) as file:
        file.write("late")
        place.write_text("somebody else's")
    assert place.read_text() == "somebody else's"
    assert names_in(place.parent) == [place.name]


def test_nothing_appears_where_the_block_fails(place: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_write(place, replace=False) as file:
        file.write("half")
        raise ZeroDivisionError
    assert names_in(place.parent) == []


def test_no_empty_file_is_left_where_the_last_step_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(Path, "replace", refuse)
    with (
        pytest.raises(OSError, match="Input/output"),
        atomic_write(tmp_path / "alice.conf", replace=False) as file,
    ):
        file.write("whole")
    assert names_in(tmp_path) == []


def test_a_file_in_its_place_is_no_failure_where_a_directory_cannot_be_synced(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    with atomic_write(place, replace=False) as file:
        file.write("whole")
    assert place.read_text() == "whole"
    assert names_in(place.parent) == [place.name]


@pytest.mark.parametrize(("mode", "then"), [(0o644, 0o600), (0o660, 0o600), (0o600, 0o600), (0o400, 0o400)])
def test_what_others_may_do_with_a_secret_is_taken_from_them(tmp_path: Path, mode: int, then: int) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.touch()
    file.chmod(mode)
    link.symlink_to(file)
    make_private(link)
    assert file.stat().st_mode & 0o777 == then


def test_what_is_no_file_stays_open_to_others(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"  # as /dev/null would be
    os.mkfifo(pipe)
    for other in (pipe, tmp_path):
        other.chmod(0o755)
        make_private(other)
        assert other.stat().st_mode & 0o777 == 0o755
