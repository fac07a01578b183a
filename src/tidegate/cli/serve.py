"""``tidegate serve``"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tidegate.cli.options import ConfigOption, StateDirOption, examples, settings_sources
from tidegate.cli.runtime import runtime_of

EXAMPLES = examples(
    ("tidegate serve", "serve, with defaults taken from the host's network"),
    ("tidegate serve --config /etc/tidegate/tidegate.toml", "with a settings file"),
    ("tidegate serve --listen 0.0.0.0:443 --external eth0", "on another port, through a named interface"),
)


def serve(
    context: typer.Context,
    config: ConfigOption = None,
    state_dir: StateDirOption = None,
    listen: Annotated[
        str | None,
        typer.Option(metavar="ADDR:PORT", help="Where to receive WireGuard. [dim]\\[0.0.0.0:51820][/]"),
    ] = None,
    external: Annotated[
        str | None,
        typer.Option(metavar="INTERFACE", help="The external interface. [dim]\\[the default route's][/]"),
    ] = None,
    subnet: Annotated[
        str | None, typer.Option(metavar="PREFIX", help="The VPN's addresses. [dim]\\[10.66.77.0/24][/]")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="What profiles tell clients to connect to.")
    ] = None,
    shards: Annotated[
        int | None, typer.Option(metavar="N", help="Threads that move packets. [dim]\\[one per core][/]")
    ] = None,
    tun: Annotated[
        str | None, typer.Option(metavar="NAME", help="The TUN device's name. [dim]\\[tidegate0][/]")
    ] = None,
    dns: Annotated[
        bool | None, typer.Option("--dns/--no-dns", help="Whether to answer DNS.", show_default=False)
    ] = None,
    log_level: Annotated[
        str | None, typer.Option(metavar="LEVEL", help="debug, info, warning or error. [dim]\\[info][/]")
    ] = None,
) -> None:
    """Run the gateway, until SIGTERM or Ctrl-C."""
    import asyncio

    import structlog

    from tidegate.cli.output import remark
    from tidegate.gateway import Gateway
    from tidegate.log import configure_logging, report_lost_lines
    from tidegate.streams import saying_in_background

    flags: dict[tuple[str, ...], tuple[str, Any]] = {
        ("gateway", "listen"): ("--listen", listen),
        ("external", "interface"): ("--external", external),
        ("gateway", "subnet"): ("--subnet", subnet),
        ("gateway", "endpoint"): ("--endpoint", endpoint),
        ("gateway", "shards"): ("--shards", shards),
        ("gateway", "tun_name"): ("--tun", tun),
        ("dns", "enabled"): ("--dns/--no-dns", dns),
        ("log", "level"): ("--log-level", log_level),
    }
    sources = settings_sources(context, config, state_dir, flags)
    settings = sources.read()
    configure_logging(settings.log)
    runtime = runtime_of(context)
    # If the log is JSON, programs read it, and every line must be JSON.
    ready = structlog.get_logger("tidegate.gateway").info if settings.log.format == "json" else remark
    gateway = Gateway(settings, runtime.engine(), runtime.host(), ready=ready, reread=sources.read)
    with saying_in_background(report_lost_lines):
        asyncio.run(gateway.run())
