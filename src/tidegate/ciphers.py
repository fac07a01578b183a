"""Which AEAD protects the data messages of a peer. `docs/protocol.md` says how, and why that is safe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from tidegate.errors import EngineError

CipherName = Literal["chacha20-poly1305", "aes-256-gcm"]
CIPHERS: tuple[CipherName, ...] = get_args(CipherName)
WIREGUARD_CIPHER: CipherName = "chacha20-poly1305"
"""What every WireGuard program knows; the others are for Tidegate's own client."""


def check_cipher(cipher: CipherName, aes_available: Callable[[], bool], *, user: str, hint: str) -> None:
    """Raises `EngineError` where this machine should not run `cipher`: never falls back to another one."""
    if cipher == "aes-256-gcm" and not aes_available():
        raise EngineError(f"this CPU has no AES instructions, which {cipher} for {user} needs", hint=hint)
