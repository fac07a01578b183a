"""Keys and the gateway's key file."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.errors import StoreError
from tidegate.identity import decode_key, encode_key, load_or_make_private_key, public_key_of


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
