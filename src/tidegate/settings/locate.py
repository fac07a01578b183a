"""Finds the line of a key in a settings file, so that a message can point at it.

`tomllib` gives values without positions. This is not a second TOML parser: it reads table headers and the beginnings of
lines, which suffices for any file with its keys at the beginnings of lines, and finds nothing otherwise.
"""

import re
from functools import lru_cache

_HEADER = re.compile(r"^\s*\[{1,2}\s*([^\[\]]+?)\s*\]{1,2}\s*(?:#.*)?$")
_KEY = re.compile(r"^\s*((?:[\w-]+|\"[^\"]*\"|'[^']*')(?:\s*\.\s*(?:[\w-]+|\"[^\"]*\"|'[^']*'))*)\s*=")


def _parts(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))


@lru_cache(maxsize=1)  # a message may name many keys of one file
def key_lines(text: str) -> dict[tuple[str, ...], int]:
    """The line (from 1) of each key and table header."""
    lines: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            table = _parts(header[1])
            found = table
        elif key := _KEY.match(line):
            found = (*table, *_parts(key[1]))
        else:
            continue
        for length in range(1, len(found) + 1):  # `a.b = 1` is also where `a` begins
            lines.setdefault(found[:length], number)
    return lines


def line_of(text: str, path: tuple[str, ...]) -> int | None:
    """The line of the setting `path`, or of the nearest table or key that contains it."""
    lines = key_lines(text)
    for length in range(len(path), 0, -1):
        if path[:length] in lines:
            return lines[path[:length]]
    return None
