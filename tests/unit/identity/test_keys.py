"""Keys and the gateway's key file."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.errors import StoreError
from tidegate.identity import (
    decode_key,
    encode_key,
    load_or_make_private_key,
    parse_public_key,
    public_key_of,
)


def test_a_public_key_is_that_of_rfc_7748() -> None:
    # RFC 7748 §6.1, Bob's keys
    private = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    public = "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    assert public_key_of(private).hex() == public


@given(st.binary(min_size=32, max_size=32))
def test_a_key_comes_back_from_its_text(key: bytes) -> None:
    assert decode_key(encode_key(key)) == key


@given(st.text(max_size=60))
def test_text_that_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a key"):
        decode_key(text)


@pytest.mark.parametrize(
    "point",
    [
        # The points of order 1, 2, 4 and 8 (https://cr.yp.to/ecdh.html#validate): their shared secrets are no secrets.
        bytes(32),
        b"\1" + bytes(31),
        bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
        b"\xec" + b"\xff" * 30 + b"\x7f",
    ],
)
def test_a_point_of_low_order_is_no_public_key(point: bytes) -> None:
    with pytest.raises(ValueError, match="is no public key: a point of low order"):
        parse_public_key(encode_key(point))
    public = public_key_of(bytes(range(32)))
    assert parse_public_key(encode_key(public)) == public


def test_a_second_spelling_of_a_key_is_refused() -> None:
    with pytest.raises(ValueError, match="is not a key"):
        decode_key("A" * 42 + "B=")  # the last character's unused bits are set


def test_the_gateways_key_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "gateway.key"
    first = load_or_make_private_key(path)
    assert load_or_make_private_key(path) == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["gateway.key"]


def test_a_key_that_others_may_read_is_closed_to_them(tmp_path: Path) -> None:
    path = tmp_path / "gateway.key"
    load_or_make_private_key(path)
    path.chmod(0o644)
    load_or_make_private_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("content", ["", "short", "A" * 44, "\xff\xfe"])
def test_a_damaged_key_is_refused_and_left_as_it_is(tmp_path: Path, content: str) -> None:
    path = tmp_path / "gateway.key"
    path.write_text(content)
    with pytest.raises(StoreError, match="damaged"):
        load_or_make_private_key(path)
    assert path.read_text() == content


def test_a_key_file_that_is_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "gateway.key"
    path.symlink_to(tmp_path / "unmounted" / "gateway.key")
    reason = r"gateway\.key: the gateway's key cannot be read: No such file"
    with pytest.raises(StoreError, match=reason) as refused:
        load_or_make_private_key(path)
    assert refused.value.hint == f"it is a symbolic link to {path.readlink()}"
    assert path.is_symlink()


def test_a_key_in_a_folder_that_may_not_be_searched_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(
        path: Path, **_: bool
    ) -> NoReturn:  # root, who runs some of the tests, may search any folder
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "stat", forbidden)
    monkeypatch.setattr(Path, "lstat", forbidden)
    with pytest.raises(
        StoreError, match=r"gateway\.key: the gateway's key cannot be read: Permission denied"
    ):
        load_or_make_private_key(tmp_path / "gateway.key")
