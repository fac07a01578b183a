"""Large test data that both ends can compute: the key stream of AES-CTR under a seed.

No two blocks are alike, so a lost, duplicated or swapped segment always changes the SHA-256; and any range can be
computed without the bytes before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

CHUNK = 1 << 20


def blob(seed: str, size: int, *, offset: int = 0) -> Iterator[bytes]:
    """Bytes `offset` to `size` of the content named `seed`, in chunks of at most 1 MiB."""
    key = hashlib.sha256(seed.encode()).digest()
    block, skip = divmod(offset, 16)
    cipher = Cipher(algorithms.AES256(key), modes.CTR(block.to_bytes(16, "big"))).encryptor()
    cipher.update(bytes(skip))
    zeros = bytes(CHUNK)
    remaining = size - offset
    while remaining > 0:
        yield cipher.update(zeros[: min(CHUNK, remaining)])
        remaining -= CHUNK


def blob_sha256(seed: str, size: int) -> str:
    """The SHA-256 of the whole content, in hexadecimal."""
    digest = hashlib.sha256()
    for chunk in blob(seed, size):
        digest.update(chunk)
    return digest.hexdigest()
