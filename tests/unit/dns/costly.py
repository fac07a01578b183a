"""Messages that cost seconds to parse, written by hand, and what handling them costs."""

from __future__ import annotations

import itertools
import struct
import time
from collections.abc import Awaitable, Callable

HEADER_BYTES = 12
QUERY = 0x0100  # RD
RESPONSE = 0x8180  # QR, RD, RA
ANSWER, AUTHORITY, ADDITIONAL = range(3)
A, NS = 1, 2

PROMISED = 0.05
"""Seconds of CPU time that any message may take."""
TAIL = b"\x01a" * 110
"""Of a name: as many labels as there is room for before it."""


def name(text: str) -> bytes:
    return b"".join(bytes([len(label)]) + label.encode() for label in text.split(".")) + b"\0"


def message(flags: int, question: bytes, records: list[bytes], section: int, number: int = 7) -> bytes:
    counts = [0, 0, 0]
    counts[section] = len(records)
    header = struct.pack("!HHHHHH", number, flags, 1, *counts)
    return header + question + struct.pack("!HH", A, 1) + b"".join(records)


def _record(owner: bytes, kind: int, data: bytes) -> bytes:
    return owner + struct.pack("!HHIH", kind, 1, 60, len(data)) + data


def _owners(question: bytes, labels: list[bytes]) -> list[bytes]:
    """Names that share a long tail, which is written out once."""
    first = HEADER_BYTES + len(question) + 4
    pointer = struct.pack("!H", 0xC000 | first + 1 + len(labels[0]))
    return [
        bytes([len(label)]) + label + (pointer if index else TAIL + b"\0")
        for index, label in enumerate(labels)
    ]


def colliding(count: int, question: bytes, *, letters: int = 22) -> list[bytes]:
    """Addresses of names that differ, but have the same hash in dnspython, which is the same in every process: it is
    `9 * hash + character` for one character after the other."""
    pairs = itertools.product((b"dn", b"ee"), repeat=letters // 2)
    labels = [b"".join(chosen) for chosen in itertools.islice(pairs, count)]
    return [_record(owner, A, b"\xc0\0\2\1") for owner in _owners(question, labels)]


def with_long_names(count: int, question: bytes) -> list[bytes]:
    """Name servers of one name, all with long names."""
    owner = _owners(question, [b"x"])[0]
    pointer = struct.pack("!H", 0xC000 | HEADER_BYTES + len(question) + 4)
    labels = [bytes([2, 97 + index // 26, 97 + index % 26]) for index in range(count)]
    tail = struct.pack(
        "!H", 0xC000 | HEADER_BYTES + len(question) + 4 + 6
    )  # a few labels less: one comes before
    return [_record(owner if not index else pointer, NS, label + tail) for index, label in enumerate(labels)]


def with_many_questions(number: int, question: bytes, count: int) -> bytes:
    again = b"\xc0\x0c" + struct.pack("!HH", A, 1)
    first = question + struct.pack("!HH", A, 1)
    return struct.pack("!HHHHHH", number, RESPONSE, count, 0, 0, 0) + first + again * (count - 1)


async def cost(handle: Callable[[], Awaitable[object]]) -> float:
    """Seconds of this thread's CPU time; the least of three, since other programs slow even that down."""
    taken = []
    for _ in range(3):
        begun = time.thread_time()
        await handle()
        taken.append(time.thread_time() - begun)
        if taken[-1] < PROMISED:
            break
    return min(taken)
