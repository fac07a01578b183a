"""``tidegate connect``"""

from __future__ import annotations

from typing import Annotated

import typer

from tidegate.cli.options import JsonOption, examples, file_named, given_as
from tidegate.cli.runtime import runtime_of

DEFAULT_INTERFACE = "tidegate-client"

EXAMPLES = examples(
    ("tidegate connect alice.conf", "connect until Ctrl-C; routes and DNS are restored then"),
    ("tidegate connect alice.conf --no-dns", "leave the resolver as it is"),
    ("tidegate connect alice.conf --no-routes", "only the tunnel; the routes are yours to add"),
    ("tidegate connect bob.conf --interface tidegate-bob", "a second tunnel (at most one can be a full one)"),
    ("tidegate connect alice.conf --json", "one JSON object per event, for programs"),
)


def connect(
    context: typer.Context,
    profile: Annotated[str, typer.Argument(metavar="PROFILE", help="A profile, from `tidegate peer add`.")],
    interface: Annotated[
        str, typer.Option(metavar="NAME", help="The TUN device's name.")
    ] = DEFAULT_INTERFACE,
    dns: Annotated[
        bool, typer.Option("--dns/--no-dns", help="Whether to use the profile's DNS servers.")
    ] = True,
    routes: Annotated[bool, typer.Option("--routes/--no-routes", help="Whether to route AllowedIPs.")] = True,
    offloads: Annotated[
        bool, typer.Option("--offloads/--no-offloads", help="Whether to try the kernel's offloads.")
    ] = True,
    log_level: Annotated[str, typer.Option(metavar="LEVEL", help="debug, info, warning or error.")] = "info",
    log_format: Annotated[
        str,
        typer.Option(metavar="FORMAT", help="auto, console, json or logfmt; auto: console on a terminal."),
    ] = "auto",
    json: JsonOption = False,
) -> int:
    """Connect this machine to a gateway, until Ctrl-C."""
    import asyncio
    import signal
    import sys
    from json import dumps

    from tidegate.cli import EXIT_INTERRUPTED, EXIT_OK
    from tidegate.cli.output import remark
    from tidegate.client import Client, ClientEvent
    from tidegate.errors import UsageError
    from tidegate.identity import others_can_read, read_profile
    from tidegate.log import configure_logging, report_lost_lines
    from tidegate.settings import LogSettings, OffloadSettings
    from tidegate.settings.model import parse_interface
    from tidegate.streams import say, saying_in_background

    def report(event: ClientEvent) -> None:
        if json:
            say(dumps({"event": event.event, **event.fields}), sys.stdout)
        else:
            remark(event.text)

    try:
        parse_interface(interface)
    except ValueError as cause:
        raise UsageError(f"--interface: {cause}") from None
    with given_as(level="--log-level", format="--log-format"):
        log_settings = LogSettings.model_validate({"level": log_level, "format": log_format})
    path = file_named(profile, "PROFILE")
    parsed = read_profile(path)
    if others_can_read(path):
        remark(f"{profile}: every user of this machine can read its keys; chmod 600 it")
    configure_logging(log_settings)
    runtime = runtime_of(context)
    client = Client(
        parsed,
        runtime.engine(),
        runtime.client_host(),
        tun_name=interface,
        offloads=OffloadSettings() if offloads else OffloadSettings.none(),
        use_dns=dns,
        use_routes=routes,
        report=report,
    )
    with saying_in_background(report_lost_lines):
        stopped_by = asyncio.run(client.run())
    return EXIT_INTERRUPTED if stopped_by == signal.SIGINT else EXIT_OK
