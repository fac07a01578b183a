"""`scripts/bootstrap` builds the engine with and without Intel's library, and again when that changes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class Checkout:
    """As much of a checkout as the script looks at, with programs that only note how they were called."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        for file in ("engine/src/lib.rs", "engine/Cargo.toml", "ipsec-mb/build.rs"):
            self._write(file, "")
        for file in ("Cargo.toml", "Cargo.lock", "pyproject.toml"):
            self._write(file, "")
        (folder / "scripts").mkdir()
        shutil.copy(ROOT / "scripts" / "bootstrap", folder / "scripts")
        self._program(".venv/bin/maturin", "cat target/ipsec-mb-found >>built")
        self._program(".venv/bin/tidegate", "")
        self.archive = folder / "archive.a"
        self._program("bin/cc", f"echo {self.archive}")

    def build(self, **environment: str) -> None:
        path = f"{self.root / 'bin'}:{os.environ['PATH']}"
        subprocess.run(
            [self.root / "scripts" / "bootstrap", "engine"],
            env={**os.environ, "PATH": path, "TIDEGATE_WITHOUT_IPSEC_MB": "", **environment},
            check=True,
        )

    def built(self) -> list[str]:
        """What each build was told about the library."""
        return (self.root / "built").read_text().splitlines()

    def _write(self, file: str, text: str) -> Path:
        path = self.root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def _program(self, file: str, line: str) -> None:
        self._write(file, f"#!/bin/sh\n{line}\n").chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_the_engine_is_built_where_the_library_is_not(checkout: Checkout) -> None:
    checkout.build()
    assert len(checkout.built()) == 1


def test_the_engine_is_built_anew_only_when_the_library_has_come_or_changed(checkout: Checkout) -> None:
    for text in ("", "a version", "another"):
        if text:
            checkout.archive.write_text(text)
        checkout.build()
        checkout.build()
    assert len(set(checkout.built())) == len(checkout.built()) == 3


def test_the_engine_is_built_anew_where_the_library_is_no_longer_wanted(checkout: Checkout) -> None:
    checkout.archive.write_text("a version")
    checkout.build()
    checkout.build(TIDEGATE_WITHOUT_IPSEC_MB="1")
    assert len(set(checkout.built())) == 2
