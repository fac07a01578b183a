"""Reads settings from a TOML file, the environment and the command line.

Flags override the environment, the environment the file, and the file the defaults. The origin of each value is kept,
so that a message can say ``tidegate.toml:12``, ``$TIDEGATE_GATEWAY__LISTEN`` or ``--listen``.
"""

from __future__ import annotations

import difflib
import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from tidegate.errors import SettingsError
from tidegate.ip_protocols import parse_protocol, protocol_key
from tidegate.settings.locate import key_lines, line_of
from tidegate.settings.messages import describe_error
from tidegate.settings.model import Settings

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

DEFAULT_PATH = Path("/etc/tidegate/tidegate.toml")
PREFIX = "TIDEGATE_"
NESTED = "__"
MAX_FILE_BYTES = 1 << 20
MAX_EXPLAINED = 10
"""Settings whose errors one message names; it counts the others."""
NAME_ANOTHER = "name another with --config"
Key = tuple[str, ...]
"""A setting's path, such as ``("gateway", "listen")``."""


class SettingsSources:
    """Where a process's settings come from. They can be read again."""

    def __init__(
        self,
        *,
        config: Path | None = None,
        environment: Mapping[str, str] | None = None,
        flags: Mapping[Key, tuple[str, Any]] | None = None,
        default_path: Path = DEFAULT_PATH,
    ) -> None:
        """`config` is the file that the user named; without one, `default_path` is read if it exists. `flags` maps a
        setting to the flag's name and its value."""
        self._environment = environment or {}
        self._flags = flags or {}
        if config is None and (named := self._environment.get(PREFIX + "CONFIG")):
            config = Path(named)
        self._path = config or default_path
        self._is_named = config is not None
        self._was_read = False
        """Whether the settings have been read with the file. It must be there from then on: what it forbade would
        otherwise be permitted when it is moved away."""

    def read(self) -> Settings:
        """The settings of now. Raises `SettingsError`, also if the file has vanished since it was read."""
        merged = self.merge()
        for key, (flag, value) in self._flags.items():
            merged.put(key, value, where=flag)
        try:
            settings = Settings.model_validate(merged.tree)
        except ValidationError as invalid:
            raise merged.explain(invalid) from None
        self._was_read = merged.has_file
        return settings

    def merge(self) -> _Merged:
        """What file and environment say, without the flags. Raises `SettingsError`."""
        merged = _Merged()
        is_there = merged.add_file(self._path)
        if not is_there and self._was_read:
            raise SettingsError(
                "is gone since it was read",
                where=str(self._path),
                hint="put it back, or an empty file for the defaults",
            )
        if not is_there and self._is_named:
            raise SettingsError("no such file", where=str(self._path), hint=NAME_ANOTHER)
        merged.check_values()
        merged.add_environment(self._environment)
        merged.check_values()
        return merged

    def read_state_dir(self) -> Path:
        """The state directory of now, although other settings may be wrong. Raises `SettingsError`."""
        key, variable = ("state_dir",), f"{PREFIX}STATE_DIR"
        merged = _Merged()
        if key in self._flags:
            flag, value = self._flags[key]
            merged.put(key, value, where=flag)
        elif text := self._environment.get(variable):
            merged.put(key, text, where=f"${variable}")
        elif not merged.add_file(self._path) and self._is_named:
            raise SettingsError("no such file", where=str(self._path), hint=NAME_ANOTHER)
        merged.tree = {"state_dir": merged.tree["state_dir"]} if "state_dir" in merged.tree else {}
        try:
            return Settings.model_validate(merged.tree).state_dir
        except ValidationError as invalid:
            raise merged.explain(invalid) from None


def load_settings(
    *,
    config: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[Key, tuple[str, Any]] | None = None,
    default_path: Path = DEFAULT_PATH,
) -> Settings:
    """The settings of `SettingsSources`, read once."""
    return SettingsSources(
        config=config, environment=environment, flags=flags, default_path=default_path
    ).read()


def protocols_of(
    peer: str, *, config: Path | None, environment: Mapping[str, str], default_path: Path = DEFAULT_PATH
) -> dict[str, str | None]:
    """Where file and environment assign protocols to a peer, such as ``tidegate.toml:12``; by the protocol's usual key.
    The parameters are those of `load_settings`. Raises `SettingsError`."""
    merged = SettingsSources(config=config, environment=environment, default_path=default_path).merge()
    table = merged.tree.get("nat", {}).get("other_protocols", {})
    return {
        protocol_key(parse_protocol(key)): merged.where(("nat", "other_protocols", key))
        for key, name in table.items()
        if name == peer
    }


class _Merged:
    """Values of all sources in one tree, each with its origin."""

    def __init__(self) -> None:
        self.tree: dict[str, Any] = {}
        self._origins: dict[Key, str] = {}
        self._path: Path | None = None
        self._text = ""

    @property
    def has_file(self) -> bool:
        """Whether one of the sources is a file."""
        return self._path is not None

    def add_file(self, path: Path) -> bool:
        """Returns whether there is such a file."""
        try:
            with path.open("rb") as file:
                raw = file.read(MAX_FILE_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as cause:
            raise SettingsError(
                f"cannot be read: {cause.strerror}", where=str(path), hint=NAME_ANOTHER
            ) from cause
        if len(raw) > MAX_FILE_BYTES:
            raise SettingsError(f"is larger than {MAX_FILE_BYTES} bytes", where=str(path))
        try:
            self._text = raw.decode("utf-8-sig")
            self.tree = tomllib.loads(self._text)
        except UnicodeDecodeError as cause:
            line = cause.object[: cause.start].count(b"\n") + 1
            raise SettingsError("is not UTF-8 text", where=f"{path}:{line}") from None
        except tomllib.TOMLDecodeError as cause:
            raise SettingsError(
                f"is not valid TOML: {cause}", where=_toml_position(path, self._text, str(cause))
            ) from None
        except ValueError:  # raised by `int`, not by `tomllib`
            raise SettingsError(
                "has an integer that is too long", where=_long_number_position(path, self._text)
            ) from None
        except RecursionError:
            raise SettingsError("is nested too deeply", where=str(path)) from None
        self._path = path
        return True

    def add_environment(self, environment: Mapping[str, str]) -> None:
        """Variables such as ``TIDEGATE_STATE_DIR`` and ``TIDEGATE_NAT__UDP_TIMEOUT``. An unknown name without ``__`` is
        not an error: container platforms set ``TIDEGATE_PORT`` for a service called tidegate. Empty variables are
        ignored: that is how Compose files and EnvironmentFile= leave one unset."""
        for name, text in sorted(environment.items()):
            if not text:
                continue
            key = tuple(name.removeprefix(PREFIX).lower().split(NESTED))
            known = _field_type(key)
            if not name.startswith(PREFIX) or (len(key) == 1 and (known is None or _is_model(known))):
                continue
            self.put(key, _from_text(text, known), where=f"${name}")

    def check_values(self) -> None:
        """Checks each value by itself, before another source overrides it. Rules that involve several settings are
        checked on the merged ones."""
        try:
            Settings.model_validate(self.tree)
        except ValidationError as invalid:
            if invalid.errors(include_url=False)[0]["loc"]:
                raise self.explain(invalid) from None

    def put(self, key: Key, value: Any, *, where: str) -> None:
        node = self.tree
        for length, part in enumerate(key[:-1], start=1):
            child = node.setdefault(part, {})
            if not isinstance(child, dict):
                above = key[:length]
                if _is_table(_field_type(above)):
                    raise SettingsError(f"{'.'.join(above)}: must be a table", where=self.where(above))
                raise SettingsError(
                    f'{".".join(above)}: is not a table, so it has no "{key[length]}"', where=where
                )
            node = child
        node[key[-1]] = value
        self._origins[key] = where

    def where(self, key: Key) -> str | None:
        """A setting's origin, as messages name it."""
        for length in range(len(key), 0, -1):
            if key[:length] in self._origins:
                return self._origins[key[:length]]
        if key not in key_lines(self._text):  # a table that exists only through variables or flags
            for origin, where in self._origins.items():
                if origin[: len(key)] == key:
                    return where
        if self._path is None:
            return None
        line = line_of(self._text, key)
        return f"{self._path}:{line}" if line else str(self._path)

    def explain(self, invalid: ValidationError) -> SettingsError:
        """The first error of each setting, in the order of the file's lines, in words for people."""
        found: dict[Key, ErrorDetails] = {}
        for error in invalid.errors(include_url=False):
            found.setdefault(_key_of(error), error)
        # A wrong value may be that of other settings as well, where it is their default.
        wrong = [key for key in found if self._has(key)] or list(found)
        wrong.sort(key=lambda key: line_of(self._text, key) or 0)
        explained = [self._explain(key, found[key]) for key in wrong[:MAX_EXPLAINED]]
        if len(wrong) == 1:
            return explained[0]
        left = len(wrong) - len(explained)
        return SettingsError("; ".join([*map(str, explained), *([f"and {left} more"] if left else [])]))

    def _has(self, key: Key) -> bool:
        node: Any = self.tree
        for part in key:
            if not isinstance(node, dict) or part not in node:
                return False
            node = node[part]
        return True

    def _explain(self, key: Key, error: ErrorDetails) -> SettingsError:
        name = ".".join(key)
        if error["type"] == "extra_forbidden":
            return _unknown_key(key, self.where(key))
        message = describe_error(error)
        if error["type"] == "value_error" and not key:
            # A rule that involves two settings; its message begins with the name of the one to change.
            name, _, message = message.partition(": ")
            key = tuple(name.split("."))
        return SettingsError(f"{name}: {message}", where=self.where(key))


def _key_of(error: ErrorDetails) -> Key:
    """The setting that is wrong; empty where a rule for several is broken."""
    location: list[str] = []
    for part in error["loc"]:
        # Unions and list items add parts that are not keys of the file.
        if not isinstance(part, str) or _field_type((*location, part)) is None:
            if error["type"] == "extra_forbidden" and part == error["loc"][-1]:
                location.append(str(part))
            break
        location.append(part)
    return tuple(location)


def _unknown_key(key: Key, where: str | None) -> SettingsError:
    parent = _field_type(key[:-1]) if key[:-1] else Settings
    known = list(parent.model_fields) if parent is not None and _is_model(parent) else []
    near = difflib.get_close_matches(key[-1], known, n=1, cutoff=0.5)
    table = f"[{'.'.join(key[:-1])}]" if key[:-1] else "the settings"
    hint = f'did you mean "{near[0]}"?' if near else f"known keys: {', '.join(known)}"
    return SettingsError(f'unknown key "{key[-1]}" in {table}', where=where, hint=hint)


def _toml_position(path: Path, text: str, message: str) -> str:
    """`tomllib` puts the position in its message: ``(at line 3, column 5)`` or ``(at end of document)``."""
    _, found, rest = message.rpartition("(at line ")
    line = rest.partition(",")[0] if found else len(text.splitlines())
    return f"{path}:{line}"


def _long_number_position(path: Path, text: str) -> str:
    digits = f"[0-9_]{{{sys.get_int_max_str_digits()},}}"
    lines = (number for number, line in enumerate(text.splitlines(), start=1) if re.search(digits, line))
    line = next(lines, None)
    return f"{path}:{line}" if line else str(path)


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _is_table(kind: Any) -> bool:
    return _is_model(kind) or get_origin(kind) is dict


def _field_type(key: Key) -> Any:
    """The type of a setting; `None` if there is no such setting."""
    kind: Any = Settings
    for part in key:
        if get_origin(kind) is dict:  # any key is allowed
            kind = get_args(kind)[1]
            continue
        if not _is_model(kind) or part not in kind.model_fields:
            return None
        kind = kind.model_fields[part].annotation
    return kind


def _from_text(text: str, kind: Any) -> Any:
    """A variable's text as a value of type `kind`; unchanged if it cannot be converted, so that the type check reports
    it."""
    if get_origin(kind) is Union:  # of a type and `None`
        kind = _without_notes(get_args(kind)[0])
    if kind is bool:
        return {
            "1": True,
            "true": True,
            "yes": True,
            "on": True,
            "0": False,
            "false": False,
            "no": False,
            "off": False,
        }.get(text.strip().lower(), text)
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            return text
    if getattr(kind, "__origin__", None) is tuple:
        items = [item.strip() for item in text.strip("[] ").split(",") if item.strip()]
        return [_from_text(item.strip("\"'"), _item_type(kind)) for item in items]
    return text


def _item_type(kind: Any) -> Any:
    return _without_notes(get_args(kind)[0])


def _without_notes(kind: Any) -> Any:
    """The type itself of an annotated one."""
    return get_args(kind)[0] if hasattr(kind, "__metadata__") else kind
