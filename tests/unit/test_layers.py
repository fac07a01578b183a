"""What a part of Tidegate must not load: a client runs without a gateway, the lab without the command line."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "foreign"),
    [
        (
            "tidegate.client",
            ["tidegate.gateway", "tidegate.control", "tidegate.store", "sqlalchemy", "typer"],
        ),
        ("tidegate.interrupts", ["typer"]),
        ("tidegate.lab.command", ["tidegate.cli", "typer"]),
    ],
)
def test_a_module_loads_nothing_of_another_layer(module: str, foreign: list[str]) -> None:
    script = f"import sys, {module}; print(*sorted({set(foreign)} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
