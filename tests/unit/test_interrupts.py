"""Signals that interrupt a command which then has something to undo."""

from __future__ import annotations

import os
import signal

import pytest

from tidegate.interrupts import SignalInterrupt, interrupt_on_signals

pytestmark = pytest.mark.usefixtures("at_a_terminal")


@pytest.mark.parametrize(
    ("first", "second"),
    [(signal.SIGTERM, signal.SIGHUP), (signal.SIGHUP, signal.SIGHUP)],
    ids=["of systemd", "of a terminal and its shell"],
)
def test_of_two_signals_the_second_does_not_cut_the_undoing_short(
    first: signal.Signals, second: signal.Signals
) -> None:
    told = []
    with pytest.raises(SignalInterrupt) as ended, interrupt_on_signals():
        try:
            os.kill(os.getpid(), first)
            told.append("goes on")
        except KeyboardInterrupt:
            os.kill(os.getpid(), second)
            told.append("is undone")
            raise
    assert (told, ended.value.number) == (["is undone"], first)
    assert signal.getsignal(first) == signal.getsignal(second) == signal.SIG_DFL


@pytest.mark.parametrize("late", [signal.SIGTERM, signal.SIGHUP])
def test_once_ctrl_c_was_pressed_no_other_signal_cuts_the_undoing_short(
    late: signal.Signals,
) -> None:
    told = []
    with pytest.raises(KeyboardInterrupt) as ended, interrupt_on_signals():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            told.append("goes on")
        except KeyboardInterrupt:
            os.kill(os.getpid(), late)
            told.append("is undone")
            raise
    assert (told, ended.type) == (["is undone"], KeyboardInterrupt)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("late", [signal.SIGTERM, signal.SIGHUP])
def test_once_something_else_has_ended_it_no_signal_cuts_the_undoing_short(
    late: signal.Signals,
) -> None:
    told = []
    with pytest.raises(OSError, match="full"), interrupt_on_signals() as unwinding:
        try:
            raise OSError("the disk is full")
        except OSError:
            unwinding.begin()
            os.kill(os.getpid(), late)
            told.append("is undone")
            raise
    assert told == ["is undone"]


def test_a_second_ctrl_c_cuts_the_undoing_short() -> None:
    told = []
    with pytest.raises(KeyboardInterrupt), interrupt_on_signals():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGINT)
            told.append("is undone")
    assert told == []


def test_a_signal_that_is_ignored_or_handled_stays_so() -> None:
    handled = []
    before = [
        signal.signal(signal.SIGHUP, signal.SIG_IGN),
        signal.signal(signal.SIGTERM, lambda *_: handled.append("SIGTERM")),
    ]
    try:
        with interrupt_on_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
        assert handled == ["SIGTERM"]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before[0])
        signal.signal(signal.SIGTERM, before[1])
