"""What the built extension says of itself; other unit tests do with a simulated engine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tidegate.engine import load

WORTH_IT = {"avx512ifma", "vaes", "vpclmulqdq", "gfni", "sha_ni"}


def was_there() -> bool:
    """Whether the build finds Intel's library (ipsec-mb/build.rs)."""
    asked = ["cc", "-print-file-name=libIPSec_MB.a"]
    archive = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
    is_wanted = not os.environ.get("TIDEGATE_WITHOUT_IPSEC_MB")
    return is_wanted and archive.is_absolute() and Path("/usr/include/intel-ipsec-mb.h").exists()


def test_messages_are_sealed_by_the_library_that_is_the_faster_one_here() -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = {flag for line in lines if line.startswith("flags") for flag in line.split()}
    faster = was_there() and flags >= WORTH_IT
    assert load().aead_library(1) == ("intel-ipsec-mb" if faster else "aws-lc-rs")
