"""What people see on a terminal of 80 columns, and what happens to lines that nobody reads."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import pytest
from rich.console import Console

from tests.unit.conftest import CommandLine
from tests.unit.fakes import FakeHost, ordinary_network
from tests.unit.running import serving
from tidegate.ciphers import CIPHERS, WIREGUARD_CIPHER, CipherName
from tidegate.cli.output import Handout, print_rich, remark, table
from tidegate.cli.peer import peer_table
from tidegate.control.commands import PeerView
from tidegate.settings import Settings

FAILURE = "failed: tcp/8000 cannot be published: Address already in use; a program on the host may be using the port"


def on_a_terminal(shown: object, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(shown)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_a_long_text_in_the_last_column_folds_and_leaves_the_others_whole() -> None:
    text = on_a_terminal(
        table(None, ("external", "to", "state"), [("tcp/8000-8010", "alice:80-90", FAILURE)], empty="")
    )
    assert "tcp/8000-8010  alice:80-90  failed: " in text
    assert " ".join(text.split()).endswith("using the port")
    assert "…" not in text


def test_the_ciphers_of_peers_do_not_vanish_where_the_table_is_too_wide() -> None:
    peers = [
        PeerView(
            name=name,
            address="10.66.77.100",
            public_key="k" * 44,
            created_at=0,
            cipher=cipher,
            endpoint="203.0.113.100:45678",
            last_handshake=12000,
            received_bytes=123_456_789,
            sent_bytes=123_456_789,
            mappings=16384,
        )
        for name, cipher in zip(("alice", "bob"), CIPHERS, strict=True)
    ]
    for running in (False, True):
        text = on_a_terminal(peer_table(peers, running=running))
        assert "aes-" in text and "chacha" in text
        assert all(len(line) <= 80 for line in text.splitlines())


def cells(text: str, columns: int) -> list[str]:
    """The cells of a folded table row, each joined again. Only for texts without blanks."""
    first, *others = text.splitlines()
    starts = [match.start() for match in re.finditer(r"(?<!\S)\S", first)][:columns]
    bounds = [*starts[1:], None]
    return [
        "".join(line[start:end].strip() for line in (first, *others))
        for start, end in zip(starts, bounds, strict=True)
    ]


LONG_NAME = "a-peer-with-23-letters."


def test_names_addresses_and_ports_fold_and_are_never_cut() -> None:
    columns = ("protocol", "peer", "internal", "external", "sessions>", "idle>")
    row = ("udp", LONG_NAME, "10.66.77.100:45678", "203.0.113.100:61234", "1234", "59 min 59 s")
    text = on_a_terminal(table(None, columns, [row], empty=""))
    assert cells(text.rpartition("─")[2].strip("\n "), 5)[:4] == list(row[:4])
    assert "  1234  " in text
    assert "…" not in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_an_address_and_a_key_stay_whole_beside_a_long_name() -> None:
    peer = PeerView(name=LONG_NAME, address="10.66.77.100", public_key="k" * 44, created_at=0)
    for running in (False, True):
        text = on_a_terminal(peer_table([peer], running=running))
        assert "10.66.77.100" in text
        assert running or "k" * 44 in text
        assert "…" not in text


@pytest.mark.parametrize("width", [20, 40, 50, 60, 80, 120])
@pytest.mark.parametrize("running", [False, True], ids=["stopped", "running"])
@pytest.mark.parametrize("cipher", CIPHERS)
def test_every_value_of_a_peer_is_there_in_full_on_any_terminal(
    width: int, running: bool, cipher: CipherName
) -> None:
    peer = PeerView(
        name="N" * 23,
        address="10.66.77.100",
        public_key="K" * 44,
        created_at=0,
        cipher=cipher,
        endpoint="203.0.113.100:" + "E" * 5,
        last_handshake=12000,
        received_bytes=123_456_789,
        sent_bytes=987_654_321,
        mappings=16384,
    )
    text = on_a_terminal(peer_table([peer], running=running), width)
    wanted = ["peer", "address", "10.66.77.100"]
    wanted += (
        ["endpoint", "last", "handshake", "3", "20", "ago", "117.7", "941.9", "16384"] if running else ["key"]
    )
    for word in wanted:
        assert word in text
    assert text.count("N") == 23
    assert text.count("E") == (5 if running else 0)
    assert text.count("K") == (0 if running else 44)
    assert ("cipher" in text) == (cipher != WIREGUARD_CIPHER)
    assert "…" not in text
    assert all(len(line) <= width for line in text.splitlines())


@pytest.mark.parametrize("width", [20, 40, 50, 60, 80, 120])
def test_every_value_of_a_table_is_there_in_full_on_any_terminal(width: int) -> None:
    columns = ("one", "two!", "three", "four>", "five>")
    row = ("A" * 23, "B" * 12, "C" * 44, "1" * 9, "59 min 58 s")
    text = on_a_terminal(table(None, columns, [row, row], empty=""), width)
    for column in columns:
        assert column.rstrip(">!") in text
    for letter, length in (("A", 23), ("B", 12), ("C", 44)):
        assert text.count(letter) == 2 * length
    for whole in ("B" * 12, "1" * 9, "59", "58", "min"):
        assert text.count(whole) == 2
    assert all(len(line) <= width for line in text.splitlines())


def test_a_table_in_a_pipe_is_as_wide_as_it_needs_to_be(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")  # is about colours
    print_rich(table(None, ("external", "to", "state"), [("tcp/8000-8010", "x" * 100, FAILURE)], empty=""))
    assert FAILURE in capsys.readouterr().out


def test_a_closed_stream_swallows_no_secret_and_sends_no_remark_elsewhere(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", None)  # as Python has it then
    remark("mind the gap")
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(OSError, match="Bad file descriptor"):
        Handout("a secret").print()


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize(
    "command",
    [
        ["peer", "list"],
        ["peer", "list", "--json"],
        ["version"],
        ["--version"],
        ["--help"],
        [],
        ["peer"],
        ["peer", "show", "alice"],
    ],
    ids=" ".join,
)
def test_output_that_does_not_fit_on_the_disk_is_told_in_a_line(
    tidegate: CommandLine, tmp_path: Path, command: list[str], unbuffered: str
) -> None:
    tidegate("peer", "add", "alice", "--endpoint", "192.0.2.1:1", "--state-dir", tmp_path)
    variables = {"TIDEGATE_STATE_DIR": str(tmp_path), "PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tidegate", *command],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env={**os.environ, **variables},
        )
    assert done.stderr == "tidegate: standard output cannot be written: No space left on device\n"
    assert done.returncode == 1


@pytest.mark.parametrize(
    "command", [["peer", "list"], ["peer", "list", "--json"], ["publish", "list"], ["version"], ["--version"]]
)
def test_an_answer_into_a_closed_stream_is_not_lost_in_silence(
    tidegate: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    tidegate("peer", "add", "alice", "--endpoint", "192.0.2.1:1", "--state-dir", tmp_path)
    monkeypatch.setenv("TIDEGATE_STATE_DIR", str(tmp_path))
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it then
    message = tidegate.refused(1, *command)
    assert message == "tidegate: standard output cannot be written: Bad file descriptor"


def _stdout_that(is_so: str) -> TextIO | None:
    """A standard output that accepts nothing."""
    if is_so == "closed":
        return None
    if is_so == "full":
        return Path("/dev/full").open("w")
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.mark.parametrize("stdout", ["full", "without a reader", "closed"])
@pytest.mark.parametrize(
    ("command", "done"),
    [
        (["publish", "add", "tcp/81", "--to", "alice"], "tcp/81 is published to alice:81"),
        (["publish", "remove", "tcp/80"], "tcp/80 is no longer published to alice:80"),
        (["peer", "remove", "alice"], "peer alice (10.66.77.2) is removed; no longer published: tcp/80"),
        (["peer", "add", "bob", "--endpoint", "a.b", "--out", "bob.conf"], "its profile is in bob.conf"),
    ],
)
def test_a_change_whose_answer_is_lost_is_told(
    tidegate: CommandLine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stdout: str,
    command: list[str],
    done: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TIDEGATE_STATE_DIR", str(tmp_path))
    tidegate("peer", "add", "alice", "--endpoint", "192.0.2.1:1")
    tidegate("publish", "add", "tcp/80", "--to", "alice")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", _stdout_that(stdout))
        message = tidegate.refused(1, *command, "--json")
    assert message.startswith("tidegate: standard output cannot be written: ")
    assert "; done nevertheless: " in message
    assert message.endswith(done)


def test_what_the_output_cannot_spell_is_escaped(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = ordinary_network()
    named = tuple(replace(each, name="éx") if each.name == "eth0" else each for each in network.interfaces)

    async def scenario() -> None:
        async with serving(settings, capsys, host=FakeHost(replace(network, interfaces=named))) as running:

            async def shown(*arguments: str) -> str:
                with monkeypatch.context() as patch:
                    patch.setattr(sys, "stdout", stdout := io.TextIOWrapper(io.BytesIO(), "ascii"))
                    code, _, err = await running.cli("status", *arguments)
                assert (code, err) == (0, "")
                stdout.seek(0)
                return stdout.read()

            assert "external \\xe9x 192.0.2.2" in await shown()
            assert json.loads(await shown("--json"))["external_interface"] == "éx"
            assert "tidegate_external_usable 1\n" in await shown("--prometheus")

    asyncio.run(scenario())
