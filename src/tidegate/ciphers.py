"""The AEADs that can protect a peer's data messages. `docs/protocol.md` says how, and why that is safe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from tidegate.errors import EngineError

CipherName = Literal["chacha20-poly1305", "aes-256-gcm"]
CIPHERS: tuple[CipherName, ...] = get_args(CipherName)
WIREGUARD_CIPHER: CipherName = "chacha20-poly1305"
"""The one that every WireGuard program knows; the others are for Tidegate's own client."""


def check_cipher(cipher: CipherName, aes_available: Callable[[], bool], *, user: str, hint: str) -> None:
    """Raises `EngineError` if this machine should not run `cipher`: there is never a fallback to another one."""
    if cipher == "aes-256-gcm" and not aes_available():
        raise EngineError(f"this CPU has no AES instructions, which {cipher} for {user} needs", hint=hint)
