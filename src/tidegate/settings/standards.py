"""What the standards ask of timers, where settings ask for less.

Such settings are accepted: a laboratory has good reasons for short timers. Who has them by mistake is told, with the
standard's name.
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
"""Timers in seconds: the least that a standard allows, and which one."""


def below_the_standard(nat: NatSettings) -> list[str]:
    """A sentence about each timer that is shorter than its standard allows."""
    return [
        f"[nat] {name} is {getattr(nat, name):g} s, but {standard} requires at least {floor:g} s"
        for name, (floor, standard) in FLOORS.items()
        if getattr(nat, name) < floor
    ]
