"""Timers that are shorter than the standards require.

Such settings are accepted, because a laboratory may have good reasons for them; but the log warns of them, and names
the standard.
"""

from __future__ import annotations

from tidegate.settings.model import NatSettings

FLOORS = {
    "udp_timeout": (120.0, "RFC 4787 REQ-5"),
    "tcp_established_timeout": (7440.0, "RFC 5382 REQ-5"),
    "tcp_opening_timeout": (240.0, "RFC 5382 REQ-5, RFC 7857 section 2.1"),
    "tcp_closing_timeout": (240.0, "RFC 5382 REQ-5, RFC 7857 section 2.1"),
    "icmp_timeout": (60.0, "RFC 5508 REQ-2"),
}
"""For each timer the minimum in seconds, and the standard that sets it."""


def below_the_standard(nat: NatSettings) -> list[str]:
    """A warning for each timer that is shorter than its standard allows."""
    return [
        f"[nat] {name} is {getattr(nat, name):g} s, but {standard} requires at least {floor:g} s"
        for name, (floor, standard) in FLOORS.items()
        if getattr(nat, name) < floor
    ]
