"""What pydantic finds wrong with a value, in words for people."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

LONGEST_INTEGER = 1024
"""Bits of the longest integer that a message shows. Python refuses to print very long ones, which a file can contain in
hexadecimal."""

_WANTED = {
    "is_instance_of": "text",
    "string_type": "text",
    "tuple_type": "a list",
    "model_type": "a table",
    "dict_type": "a table",
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_parsing_size": "a shorter integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
}
"""What pydantic's error types mean in a settings file, or on a command line."""


def as_in_a_file(value: Any) -> str:
    """A value as a settings file would show it, shortened."""
    match value:
        case bool():
            return str(value).lower()
        case str():
            shown = f'the text "{value}"'
        case dict():
            return "a table"
        case list() | tuple():
            return "a list"
        case int() if value.bit_length() > LONGEST_INTEGER:
            shown = "an integer that long"
        case _:
            shown = str(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def describe_error(error: ErrorDetails, shown: Callable[[Any], str] = as_in_a_file) -> str:
    """One error, such as ``must be an integer, not the text "two"``. `shown` turns the wrong value into text."""
    message, kind = error["msg"], error["type"]
    if kind == "value_error":  # raised by our own validators
        return message.removeprefix("Value error, ")
    if kind == "missing":  # an item of a list of fixed length; every setting has a default
        return "the list is too short"
    subject, _, rule = message.partition(" should ")
    if kind in _WANTED:
        rule = f"be {_WANTED[kind]}, not {shown(error['input'])}"
    elif subject == "Input":
        rule = f"{rule}, not {shown(error['input'])}"
    return f"must {rule.replace(' after validation', '')}"
