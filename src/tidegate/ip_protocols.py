"""Protocols other than TCP, UDP and ICMP, which a setting can give to one peer, by name or number."""

from __future__ import annotations

from typing import Any

from tidegate.net import parse_number

NUMBERS = {"ipip": 4, "ipv6": 41, "gre": 47, "esp": 50, "l2tp": 115, "sctp": 132}
"""The usual ones (IANA, "Assigned Internet Protocol Numbers")."""

MAX_OTHER_PROTOCOLS = 32

_NAMES = {number: name for name, number in NUMBERS.items()}
_MAX_NUMBER = 252  # 253 and 254 are for experiments, 255 is reserved
_TRANSLATED = {1: "ICMP", 6: "TCP", 17: "UDP"}
_BOUND_TO_ADDRESSES = {33: "DCCP", 51: "AH", 58: "ICMPv6", 136: "UDP-Lite"}
"""Their checksums cover the addresses: the receiver would drop translated packets."""


def protocol_name(number: int) -> str:
    """Such as ``gre (47)``, or the number alone."""
    return f"{_NAMES[number]} ({number})" if number in _NAMES else f"protocol {number}"


def protocol_key(number: int) -> str:
    """A protocol's key in ``[nat.other_protocols]``, such as ``gre`` or ``99``."""
    return _NAMES.get(number, str(number))


def parse_protocol(key: Any) -> int:
    """The number of a protocol that can be given to one peer, from its name or number. Raises `ValueError`."""
    text = str(key)
    number = _number(text)
    if number is None:
        known = ", ".join(NUMBERS)
        raise ValueError(f"{text!r} is not a protocol: use a number from 1 to {_MAX_NUMBER}, or {known}")
    if number in _TRANSLATED:
        raise ValueError(f"{_TRANSLATED[number]} is translated for every peer, and cannot be given to one")
    if number in _BOUND_TO_ADDRESSES:
        raise ValueError(f"{_BOUND_TO_ADDRESSES[number]} does not survive the translation of its addresses")
    return number


def refuse_doubles(value: Any) -> Any:
    """Returns a table of protocols unchanged. Raises `ValueError` if it has one both by name and by number."""
    seen: dict[int, str] = {}
    for key in map(str, value) if isinstance(value, dict) else ():
        number = _number(key)
        if number in seen:
            raise ValueError(f"{protocol_name(number)} is listed twice, as {seen[number]!r} and {key!r}")
        if number is not None:
            seen[number] = key
    return value


def _number(text: str) -> int | None:
    return NUMBERS.get(text.lower(), parse_number(text, 1, _MAX_NUMBER))
