"""What the built extension says of itself; other unit tests do with a simulated engine."""

from __future__ import annotations

from pathlib import Path

from tidegate.engine import load

HEADER = Path("/usr/include/intel-ipsec-mb.h")
"""Of Debian's libipsec-mb-dev, which scripts/bootstrap installs before it builds."""
WORTH_IT = {"avx512ifma", "vaes", "vpclmulqdq", "gfni", "sha_ni"}


def test_messages_are_sealed_by_the_library_that_is_the_faster_one_here() -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = {flag for line in lines if line.startswith("flags") for flag in line.split()}
    faster = HEADER.exists() and flags >= WORTH_IT
    assert load().aead_library() == ("intel-ipsec-mb" if faster else "aws-lc-rs")
