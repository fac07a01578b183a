"""Options that several commands share, and the settings that result from them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidegate.cli.runtime import runtime_of

if TYPE_CHECKING:
    from tidegate.settings import Settings, SettingsSources

ConfigOption = Annotated[
    str | None,  # not `Path`, for which an empty text is the current directory
    typer.Option(
        "--config",
        metavar="FILE",
        help="Settings (TOML). [dim]\\[/etc/tidegate/tidegate.toml, if it exists][/]",
    ),
]
StateDirOption = Annotated[
    str | None,
    typer.Option(
        "--state-dir", metavar="DIR", help="Database, key and control socket. [dim]\\[/var/lib/tidegate][/]"
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def settings_sources(
    context: typer.Context,
    config: str | None,
    state_dir: str | None,
    flags: dict[tuple[str, ...], tuple[str, Any]] | None = None,
) -> SettingsSources:
    """File, environment and flags. `flags` maps a setting to the flag's name and its value; `None` means that the flag
    was not given."""
    from tidegate.settings import SettingsSources

    given = {key: (flag, value) for key, (flag, value) in (flags or {}).items() if value is not None}
    if state_dir is not None:
        given["state_dir",] = ("--state-dir", state_dir)
    return SettingsSources(
        config=file_named(config, "--config") if config is not None else None,
        environment=os.environ,
        flags=given,
        default_path=runtime_of(context).default_config,
    )


def read_settings(context: typer.Context, config: str | None, state_dir: str | None) -> Settings:
    """The settings of a command that has no flags for single ones."""
    return settings_sources(context, config, state_dir).read()


def file_named(text: str, what: str) -> Path:
    """A path that the user gave as `what`. Raises `UsageError` if it is empty."""
    from tidegate.errors import UsageError

    if not text:
        raise UsageError(f"{what}: must not be empty")
    return Path(text)


@contextmanager
def given_as(**names: str) -> Iterator[None]:
    """Around the making of a command out of what the user gave: `names` maps its fields to arguments. Raises
    `UsageError` for what no gateway accepts: text that is too long, or undecodable."""
    from pydantic import ValidationError

    from tidegate.errors import UsageError
    from tidegate.net import quoted
    from tidegate.settings.messages import describe_error

    try:
        yield
    except ValidationError as refused:
        error = refused.errors(include_url=False)[0]
        field, value = str(error["loc"][0]), quoted(str(error["input"]))
        if error["type"] == "string_unicode":
            wrong = f"must be UTF-8 text, not {value}"
        else:
            wrong = describe_error(error, lambda _: value)
        raise UsageError(f"{names.get(field, field)}: {wrong}") from None


def examples(*lines: tuple[str, str]) -> str:
    """The end of a command's help: example commands and what they do. (Without blank lines between them, Typer would
    join the lines.)"""
    return "\n\n".join(
        ["[bold]Examples[/]", *(f"[cyan]{command}[/]  [dim]{does}[/]" for command, does in lines)]
    )
