"""The tree of commands."""

from typing import Annotated

import typer

from tidegate import VERSION
from tidegate.cli import connect, lab, nat, peer, publish, reload, serve, status

app = typer.Typer(
    name="tidegate",
    help="A VPN gateway wholly in user space: WireGuard in, user-space NAT out, the host untouched.",
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


@app.command("version")
def version() -> None:
    """Print the version."""
    _print_version(True)


app.command("serve", epilog=serve.EXAMPLES)(serve.serve)
app.add_typer(peer.app, name="peer")
app.command("connect", epilog=connect.EXAMPLES)(connect.connect)
app.command("reload", epilog=reload.EXAMPLES)(reload.reload)
app.command("status", epilog=status.EXAMPLES)(status.status)
app.add_typer(nat.app, name="nat")
app.add_typer(publish.app, name="publish")
app.command("demo", epilog=lab.DEMO_EXAMPLES)(lab.demo)
app.command("bench", epilog=lab.BENCH_EXAMPLES)(lab.bench)
