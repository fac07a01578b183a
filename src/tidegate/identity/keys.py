"""X25519 keys (RFC 7748) as WireGuard writes them: 32 bytes in base64, 44 characters."""

import base64
import binascii
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from tidegate.errors import StoreError
from tidegate.files import atomic_write, make_private

KEY_BYTES = 32  # RFC 7748 §5
KEY_TEXT_LENGTH = 44

_NAMED_PEERS = 3
"""How many peers the message about a missing key names."""


def encode_key(key: bytes) -> str:
    return base64.b64encode(key).decode("ascii")


def decode_key(text: str) -> bytes:
    """A key from its text. Raises `ValueError`, whose message does not repeat the key: it may be a secret one."""
    try:
        key = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        key = b""
    # The round trip refuses a second spelling of the same key (unused bits of the last character).
    if len(key) != KEY_BYTES or encode_key(key) != text:
        raise ValueError(f"is not a key (32 bytes in base64, {KEY_TEXT_LENGTH} characters)")
    return key


def parse_public_key(text: str) -> bytes:
    """A public key that somebody has given. Raises `ValueError`, whose message does not repeat it: people mistake their
    private key for it."""
    key = decode_key(text)
    try:
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(key))
    except ValueError:  # the shared secret is zero (RFC 7748 §6.1): everybody knows it
        raise ValueError("is no public key: a point of low order") from None
    return key


def make_private_key() -> bytes:
    return X25519PrivateKey.generate().private_bytes_raw()


def make_preshared_key() -> bytes:
    return secrets.token_bytes(KEY_BYTES)


def public_key_of(private_key: bytes) -> bytes:
    return (
        X25519PrivateKey.from_private_bytes(private_key)
        .public_key()
        .public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    )


def load_or_make_private_key(path: Path, peers: Callable[[], Sequence[str]] = tuple) -> bytes:
    """The gateway's private key from its file (0600), made on first use. Raises `StoreError`, also if the file is
    missing although there are `peers` (their names): their profiles contain its public key, and with another key none
    of them could connect any more."""
    try:
        return _load(path)
    except FileNotFoundError:
        pass
    except OSError as cause:
        raise _unreadable(path, cause) from cause
    if names := peers():
        raise _gone(path, names)
    try:
        with atomic_write(path, replace=False) as file:
            file.write(encode_key(make_private_key()) + "\n")
    except FileExistsError:
        pass  # another process made one meanwhile: use that one; or it is a link to nothing
    except OSError as cause:
        raise StoreError(f"{path}: the gateway's key cannot be written: {cause.strerror}") from cause
    try:
        return _load(path)
    except OSError as cause:
        raise _unreadable(path, cause) from cause


def _unreadable(path: Path, cause: OSError) -> StoreError:
    try:
        hint = f"it is a symbolic link to {path.readlink()}"
    except OSError:  # it is none, or its directory may not be searched
        hint = None
    return StoreError(f"{path}: the gateway's key cannot be read: {cause.strerror}", hint=hint)


def _gone(path: Path, peers: Sequence[str]) -> StoreError:
    named = ", ".join(peers[:_NAMED_PEERS]) + (", …" if len(peers) > _NAMED_PEERS else "")
    holders = (
        f"peer {named} has a profile" if len(peers) == 1 else f"{len(peers)} peers ({named}) have profiles"
    )
    return StoreError(
        f"{path}: the gateway's key is missing, and {holders} made for it",
        hint="restore it from a backup, or move the database beside it away as well "
        "(every peer then needs a new profile)",
    )


def _load(path: Path) -> bytes:
    make_private(path)
    try:
        return decode_key(path.read_text("ascii").strip())
    except (ValueError, UnicodeDecodeError):
        raise StoreError(
            f"{path}: the gateway's key is damaged",
            hint="restore it from a backup, or move it away (every peer then needs a new profile)",
        ) from None
