"""The tree of commands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tidegate import VERSION
from tidegate.cli import connect, lab, nat, peer, peer_upkeep, publish, reload, serve, status
from tidegate.cli.options import examples

if TYPE_CHECKING:
    from typer._click import Command

app = typer.Typer(
    name="tidegate",
    help="A VPN gateway entirely in user space: WireGuard in, user-space NAT out, the host untouched.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    from tidegate.cli.output import written

    if wanted:
        with written():
            print(f"tidegate {VERSION}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command("version", epilog=examples(("tidegate version", "as --version does")))
def version() -> None:
    """Print the version."""
    _print_version(True)


app.command("serve", epilog=serve.EXAMPLES)(serve.serve)
peer.app.command("disable", epilog=peer_upkeep.DISABLE_EXAMPLES)(peer_upkeep.disable)
peer.app.command("enable", epilog=peer_upkeep.ENABLE_EXAMPLES)(peer_upkeep.enable)
peer.app.command("rename", epilog=peer_upkeep.RENAME_EXAMPLES)(peer_upkeep.rename)
peer.app.command("renew", epilog=peer_upkeep.RENEW_EXAMPLES)(peer_upkeep.renew)
app.add_typer(peer.app, name="peer")
app.command("connect", epilog=connect.EXAMPLES)(connect.connect)
app.command("reload", epilog=reload.EXAMPLES)(reload.reload)
app.command("status", epilog=status.EXAMPLES)(status.status)
app.add_typer(nat.app, name="nat")
app.add_typer(publish.app, name="publish")
app.command("demo", epilog=lab.DEMO_EXAMPLES)(lab.demo)
app.command("bench", epilog=lab.BENCH_EXAMPLES)(lab.bench)


def command_tree() -> Command:
    """The command tree, with its help tidied up."""
    root = typer.main.get_command(app)
    _tidy(root, None)
    return root


def _tidy(command: Command, above: typer.Context | None) -> None:
    """Removes the docstrings' line breaks, which Typer keeps, and the metavar that it shows for switches as if they
    took a value."""
    if command.help is not None:
        command.help = "\n\n".join(" ".join(part.split()) for part in command.help.split("\n\n"))
    context = typer.Context(command, parent=above, **command.context_settings)
    for parameter in command.get_params(context):
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    for below in getattr(command, "commands", {}).values():
        _tidy(below, context)
