"""What the NAT does unless told otherwise. The engine's own defaults are the same (`test_engine_limits.py`)."""

from __future__ import annotations

from tidegate.settings import Settings


def test_the_timers_are_those_that_the_rfcs_ask_for() -> None:
    nat = Settings().nat
    assert nat.udp_timeout == 5 * 60, "RFC 4787 REQ-5"
    assert nat.tcp_established_timeout == 2 * 3600 + 4 * 60, "RFC 5382 REQ-5"
    assert nat.tcp_transitory_timeout == 4 * 60, "RFC 5382 REQ-5"
    assert nat.icmp_timeout == 60, "RFC 5508 REQ-2"


def test_filtering_is_address_dependent() -> None:
    assert Settings().nat.filtering == "address-dependent", "RFC 4787 REQ-8"


def test_one_client_cannot_take_everything() -> None:
    nat = Settings().nat
    assert nat.max_mappings_per_client * 8 < nat.max_mappings, "RFC 6888 REQ-4"
    assert nat.max_new_mappings_per_second <= 2_000, "RFC 6888 REQ-4c"
