"""How fast a source may ask."""

from __future__ import annotations

import pytest

from tidegate.dns.places import Turns


def test_a_source_has_a_burst_at_once_and_then_its_rate() -> None:
    turns = Turns(rate=10.0, burst=3)
    assert [turns.take("alice", 100.0) for _ in range(5)] == pytest.approx([0, 0, 0, 0.1, 0.2])
    assert turns.take("bob", 100.0) == 0
    assert turns.take("alice", 100.25) == pytest.approx(0.05)
    assert [turns.take("alice", 101.0) for _ in range(4)] == pytest.approx([0, 0, 0, 0.1])


def test_what_is_known_of_sources_that_ask_no_more_is_forgotten() -> None:
    turns = Turns(rate=10.0, burst=3)
    for number in range(100):
        turns.take(f"client-{number}", 100.0)
    turns.take("alice", 101.0)
    turns.take("alice", 102.5)
    assert len(turns) == 1
