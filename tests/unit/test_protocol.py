"""The test vectors of docs/protocol.md against an implementation of HKDF and AES-GCM that is not the engine's."""

from __future__ import annotations

import re
import struct
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

DOCUMENT = Path(__file__).parents[2] / "docs" / "protocol.md"


def test_the_vectors_are_what_the_text_says() -> None:
    block = DOCUMENT.read_text().partition("### Test vectors")[2].split("```")[1]
    rows = re.findall(r"^(\w+) *([0-9a-f]*)$", block, re.MULTILINE)
    (_, transport_key), (_, aes_key), (_, receiver), *messages = rows
    derived = HKDF(SHA256(), 32, salt=b"tidegate aes-256-gcm v1", info=b"transport key")
    assert derived.derive(bytes.fromhex(transport_key)).hex() == aes_key
    assert [name for name, _ in messages] == ["counter", "plaintext", "message"] * 3
    for at in range(0, len(messages), 3):
        counter, plaintext, message = (value for _, value in messages[at : at + 3])
        nonce = bytes(4) + struct.pack(">Q", int(counter, 16))
        header = struct.pack("<IIQ", 4, int(receiver, 16), int(counter, 16))
        sealed = AESGCM(bytes.fromhex(aes_key)).encrypt(nonce, bytes.fromhex(plaintext), b"")
        assert (header + sealed).hex() == message
