"""Options that several commands share, and the settings they lead to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidegate.cli.runtime import runtime_of

if TYPE_CHECKING:
    from tidegate.settings import Settings

ConfigOption = Annotated[
    str | None,  # no `Path`, which has an empty text be the current directory
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


def read_settings(
    context: typer.Context,
    config: str | None,
    state_dir: str | None,
    flags: dict[tuple[str, ...], tuple[str, Any]] | None = None,
) -> Settings:
    """Settings from file, environment and flags. `flags` maps a setting to the flag's name and its value; a
    value of `None` was not given."""
    from tidegate.settings import load_settings

    given = {key: (flag, value) for key, (flag, value) in (flags or {}).items() if value is not None}
    if state_dir is not None:
        given["state_dir",] = ("--state-dir", state_dir)
    return load_settings(
        config=file_named(config, "--config") if config is not None else None,
        environment=os.environ,
        flags=given,
        default_path=runtime_of(context).default_config,
    )


def file_named(text: str, what: str) -> Path:
    """Raises `UsageError`."""
    from tidegate.errors import UsageError

    if not text:
        raise UsageError(f"{what}: must not be empty")
    return Path(text)


def examples(*lines: tuple[str, str]) -> str:
    """The end of a command's help: commands with what they do. (A blank line between lines keeps them
    apart.)"""
    return "\n\n".join(
        ["[bold]Examples[/]", *(f"[cyan]{command}[/]  [dim]{does}[/]" for command, does in lines)]
    )
