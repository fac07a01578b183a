"""``--qr``: a profile that a camera can read, on whatever terminal, or nothing changes."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import segno

from tests.unit.conftest import CommandLine
from tidegate.cli.qr import QUIET_ZONE, qr_code
from tidegate.identity import Profile, encode_key, make_private_key, parse_profile, public_key_of

BLOCKS = {" ": (1, 1), "▀": (0, 1), "▄": (1, 0), "█": (0, 0)}
"""Upper and lower module: 1 is dark. The blocks are white, on black."""
PROFILE = f"""[Interface]
PrivateKey = {"A" * 42}A=
Address = 10.66.77.2/32
MTU = 1420

[Peer]
PublicKey = {"B" * 42}A=
AllowedIPs = 0.0.0.0/0, ::/0
Endpoint = {{host}}:51820
"""


def profile(host: str = "vpn.example.net") -> Profile:
    return parse_profile(PROFILE.format(host=host))


def modules_of(shown: str) -> list[list[int]]:
    """The code that a terminal shows, without its light border."""
    rows: list[list[int]] = []
    for line in shown.splitlines():
        inside = re.fullmatch(r"\x1b\[97;40m([ ▀▄█]+)\x1b\[0m", line)
        assert inside is not None, repr(line)
        pairs = [BLOCKS[block] for block in inside[1]]
        rows += [[upper for upper, _ in pairs], [lower for _, lower in pairs]]
    size = len(rows[0]) - 2 * QUIET_ZONE
    for border in (
        rows[:QUIET_ZONE],
        [row[:QUIET_ZONE] + row[-QUIET_ZONE:] for row in rows[: size + QUIET_ZONE]],
    ):
        assert not any(any(row) for row in border)
    return [row[QUIET_ZONE:-QUIET_ZONE] for row in rows[QUIET_ZONE : QUIET_ZONE + size]]


def modules_for(text: str) -> list[list[int]]:
    return [list(row) for row in segno.make_qr(text, error="l", boost_error=False).matrix]


def test_a_code_has_the_profile_and_fits_into_80_columns() -> None:
    shown = qr_code(profile())
    assert modules_of(shown) == modules_for(profile().render())
    full = Profile(
        private_key=b"k" * 32,
        address=profile().address,
        dns=(profile().address.ip,),
        peer_public_key=b"p" * 32,
        preshared_key=b"s" * 32,
        allowed_ips=profile().allowed_ips,
        endpoint=profile("a-host-of-some-length.vpn.example.net").endpoint,
        persistent_keepalive=25,
    )
    plain = re.sub(r"\x1b\[[0-9;]*m", "", qr_code(full))
    assert max(map(len, plain.splitlines())) <= 80


@pytest.mark.parametrize("command", ["add", "renew"])
def test_the_code_alone_is_on_standard_output_and_is_that_of_the_peer(
    tidegate: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    state = ["--state-dir", tmp_path]
    if command == "renew":
        assert tidegate("peer", "add", "alice", *state).code == 0
    encoded: list[str] = []
    make = segno.make_qr

    def remember(text: str, **options: object) -> segno.QRCode:
        encoded.append(text)
        return make(text, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(segno, "make_qr", remember)
    outcome = tidegate("peer", command, "alice", "--qr", *state)
    (text,) = encoded
    assert outcome.code == 0
    assert modules_of(outcome.out) == modules_for(text)
    shown = parse_profile(text)
    assert "#" not in text, "what no app reads would only make the code larger"
    assert shown.private_key is not None
    key = encode_key(public_key_of(shown.private_key))
    assert key in tidegate("peer", "show", "alice", *state).out


@pytest.mark.parametrize("command", ["add", "renew"])
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--json"], "--qr and --json are two formats"),
        (["--out", "alice.conf"], "--qr shows the profile, and --out writes it"),
        (["--public-key", encode_key(public_key_of(make_private_key()))], "without its private key"),
    ],
    ids=["json", "out", "public-key"],
)
def test_options_that_make_no_sense_beside_it_are_refused(
    tidegate: CommandLine, tmp_path: Path, command: str, options: list[str], told: str
) -> None:
    state = tmp_path / "state"
    assert told in tidegate.refused(2, "peer", command, "alice", "--qr", *options, "--state-dir", state)
    assert not state.exists()


COMMAND = [sys.executable, "-m", "tidegate", "peer", "add", "alice", "--qr", "--endpoint", "a.b"]


def _adding(state: Path, stdout: int, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "--state-dir", str(state)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env=os.environ | variables,
    )


@pytest.mark.parametrize(("columns", "enough"), [(60, False), (80, True)])
def test_a_terminal_that_is_too_narrow_is_told_and_no_peer_is_added(
    tidegate: CommandLine, tmp_path: Path, columns: int, enough: bool
) -> None:
    ours, theirs = os.openpty()
    try:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        done = _adding(tmp_path, theirs)
        peers = tidegate("peer", "list", "--state-dir", tmp_path).out
        if enough:
            assert (done.returncode, done.stderr) == (0, "")
            assert "alice" in peers
        else:
            assert done.returncode == 1
            assert re.fullmatch(
                r"tidegate: the terminal has 60 columns, and the QR code needs \d\d; make it wider .*, or use --out\n"
                r"(tidegate: alice was not added\n)?",
                done.stderr,
            ), done.stderr
            assert "alice" not in peers
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_stream_that_has_no_blocks_is_told_and_no_peer_is_added(
    tidegate: CommandLine, tmp_path: Path
) -> None:
    with (tmp_path / "out").open("w") as out:
        done = _adding(tmp_path / "state", out.fileno(), PYTHONIOENCODING="latin-1")
    assert done.returncode == 1
    assert "is written in iso8859-1, which has no blocks" in done.stderr
    assert "alice" not in tidegate("peer", "list", "--state-dir", tmp_path / "state").out
