"""A profile as a QR code in a terminal, for the camera of a phone that runs a WireGuard app."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from tidegate.errors import TidegateError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from tidegate.identity import Profile

QUIET_ZONE = 4  # light modules around the code (ISO/IEC 18004)
_WHITE_ON_BLACK, _AS_BEFORE = "\x1b[97;40m", "\x1b[0m"
"""Whatever the terminal's own colours: many apps read no code whose dark and light are exchanged."""


def check_qr(*, out: Path | None, json: bool, public_key: str | None) -> None:
    """Raises `UsageError` for options that make no sense beside ``--qr``."""
    if json:
        raise UsageError("--qr and --json are two formats: give one of them")
    if out is not None:
        raise UsageError("--qr shows the profile, and --out writes it to a file: give one of them")
    if public_key is not None:
        raise UsageError(
            "--qr shows a profile to a camera, and one without its private key, as with --public-key, "
            "cannot be used as it is",
            hint="give one of them",
        )


def qr_code(profile: Profile) -> str:
    """The profile as text of half blocks, without the remark on its first line. Standard output need not be a terminal:
    over ssh it is a pipe that ends in one. Raises `TidegateError` if it is one that is too narrow for the code, or a
    stream that has no such characters: nobody could ever read the profile."""
    import io

    import segno

    # The lowest level of error correction, as qrencode has it, and no higher one that would fit: what matters on a
    # screen is how large the modules are.
    code = segno.make_qr(profile.render(), error="l", boost_error=False)
    drawn = io.StringIO()
    code.terminal(drawn, border=QUIET_ZONE, compact=True)
    text = "".join(f"{_WHITE_ON_BLACK}{line}{_AS_BEFORE}\n" for line in drawn.getvalue().splitlines())
    needed, _ = code.symbol_size(border=QUIET_ZONE)
    if (columns := _columns()) is not None and columns < needed:
        raise TidegateError(
            f"the terminal has {columns} columns, and the QR code needs {needed}",
            hint="make it wider or its letters smaller, or use --out",
        )
    try:
        text.encode(sys.stdout.encoding if sys.stdout is not None else "utf-8")
    except UnicodeEncodeError:
        raise TidegateError(
            f"standard output is written in {sys.stdout.encoding}, which has no blocks to draw a QR code with",
            hint="set LC_ALL=C.UTF-8, or use --out",
        ) from None
    return text


def _columns() -> int | None:
    """The width of the terminal that standard output is; `None` if it is none, or does not know."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or None
    except (OSError, ValueError, AttributeError):  # no terminal; no descriptor; closed
        return None
