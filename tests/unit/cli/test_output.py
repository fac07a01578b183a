"""What people see on a terminal of 80 columns, and what happens to lines that nobody reads."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from tidegate.ciphers import CIPHERS
from tidegate.cli.output import hand_out, remark, table
from tidegate.cli.peer import peer_table
from tidegate.control.commands import PeerView

FAILURE = (
    "failed: tcp/8000 cannot be published: Address already in use; a program of the host may hold the port"
)


def on_a_terminal(shown: object) -> str:
    console = Console(file=io.StringIO(), width=80, highlight=False)
    console.print(shown)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_a_long_text_in_the_last_column_folds_and_leaves_the_others_whole() -> None:
    text = on_a_terminal(
        table(None, ("external", "to", "state"), [("tcp/8000-8010", "alice:80-90", FAILURE)], empty="")
    )
    assert "tcp/8000-8010   alice:80-90   failed: " in text
    assert " ".join(text.split()).endswith("hold the port")
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


def test_a_closed_stream_swallows_no_secret_and_sends_no_remark_elsewhere(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", None)  # as Python has it then
    remark("mind the gap")
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(OSError, match="Bad file descriptor"):
        hand_out("a secret")
