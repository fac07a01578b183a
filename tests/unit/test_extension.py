"""What the built extension says about itself; other unit tests use a simulated engine."""

from __future__ import annotations

import subprocess
from hashlib import sha256
from pathlib import Path

from tidegate.engine import load

WORTH_IT = {"avx512ifma", "vaes", "vpclmulqdq", "gfni", "sha_ni"}
TOLD = Path(__file__).parents[2] / "target" / "ipsec-mb-found"
"""What scripts/bootstrap told the build of Intel's library."""
INTEL, RING, OTHER = "intel-ipsec-mb", "ring", "aws-lc-rs"


def as_bootstrap_tells(files: list[Path]) -> str:
    there = [file for file in files if file.is_file()]
    sums = "".join(f"{sha256(file.read_bytes()).hexdigest()}  {file}\n" for file in there)
    return f"{sha256(sums.encode()).hexdigest()}  -"


def built_with() -> set[str]:
    """What the extension may have been built with. Environment and files may have changed since the build: they count
    only as far as the build was given them."""
    if not TOLD.exists():
        return {INTEL, OTHER}
    told = TOLD.read_text().strip()
    if told in {"none", as_bootstrap_tells([])}:
        return {OTHER}
    asked = ["cc", "-print-file-name=libIPSec_MB.a"]
    archive = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
    needed = [Path("/usr/include/intel-ipsec-mb.h"), archive]
    if told != as_bootstrap_tells(needed):
        return {INTEL, OTHER}
    return {INTEL} if all(file.is_file() for file in needed) else {OTHER}


def test_messages_are_sealed_by_the_library_that_is_the_faster_one_here() -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = {flag for line in lines if line.startswith("flags") for flag in line.split()}
    if flags >= {"vaes", "vpclmulqdq", "avx2"} and "avx512f" not in flags:
        assert load().aead_library(1) == RING
    else:
        assert load().aead_library(1) in (built_with() if flags >= WORTH_IT else {OTHER})
