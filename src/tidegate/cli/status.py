"""``tidegate status``"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tidegate.cli.options import ConfigOption, JsonOption, StateDirOption, examples, read_settings

if TYPE_CHECKING:
    from tidegate.control.commands import GatewayStatus

EXAMPLES = examples(
    ("tidegate status", "peers, mappings in use, drops by reason"),
    ("tidegate status --json | jq .drops", "for programs"),
    ("tidegate status --prometheus", "for node_exporter's textfile collector"),
)


def status(
    context: typer.Context,
    config: ConfigOption = None,
    state_dir: StateDirOption = None,
    json: JsonOption = False,
    prometheus: Annotated[
        bool, typer.Option("--prometheus", help="Print Prometheus's text format, version 0.0.4.")
    ] = False,
) -> None:
    """Show what the running gateway is doing."""
    import time

    from tidegate.cli.administration import running_gateway
    from tidegate.cli.output import print_json, written
    from tidegate.cli.prometheus import exposition
    from tidegate.control.commands import NatStats, StatusQuery
    from tidegate.errors import UsageError

    if json and prometheus:
        raise UsageError("--json and --prometheus are two formats: give one of them")
    settings = read_settings(context, config, state_dir)
    with running_gateway(settings) as gateway:
        answer = gateway.execute(StatusQuery())
        now = time.time()
        reasons = gateway.execute(NatStats()).explanations if prometheus else {}
    if json:
        print_json(answer)
    elif prometheus:
        with written():
            print(exposition(answer, reasons, now), end="")
    else:
        _print(answer)


def _print(answer: GatewayStatus) -> None:
    from rich.markup import escape

    from tidegate.cli.counters import drops_table, ports_table
    from tidegate.cli.output import amount, counted, duration, print_rich, table
    from tidegate.cli.peer import peer_table

    trouble = answer.external_trouble and f"not usable: {escape(answer.external_trouble)}"
    if not trouble and not answer.default_route:
        trouble = f"no default route: clients reach only the networks of {escape(answer.external_interface)}"
    offloads = ", ".join(name for name, used in sorted(answer.offloads.items()) if used) or "none"
    print_rich(
        f"[bold]tidegate {answer.version}[/], up {duration(answer.uptime)} (pid {answer.pid}), "
        f"{counted(answer.shards, 'shard')}, offloads: {offloads}",
        f"listening on {answer.listen}, subnet {answer.subnet}, gateway {answer.gateway_address}",
        f"external {answer.external_interface} {', '.join(answer.external_addresses)}, "
        f"next hop {answer.next_hop or 'none'}",
        *([f"[red]{trouble}[/]"] if trouble else []),
        f"public key {answer.public_key}",
        "",
        peer_table(answer.peers, running=True),
        ports_table(answer.mappings, answer.reserved_ports, "NAT"),
        table(
            None,
            ("traffic", "packets>", "bytes>"),
            [
                (name.replace("_", " "), str(answer.packets.get(name, 0)), amount(answer.bytes.get(name, 0)))
                for name in answer.packets
            ],
            empty="no traffic yet",
        ),
        drops_table(answer.drops),
    )
    events = sorted((event, str(count)) for event, count in (answer.dns or {}).items() if count)
    if events:
        print_rich(table(None, ("DNS", "count>"), events, empty=""))
