"""``tidegate status``"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tidegate.cli.options import ConfigOption, JsonOption, StateDirOption, examples, read_settings

if TYPE_CHECKING:
    from rich.console import RenderableType

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
        reasons = gateway.execute(NatStats()).explanations if prometheus else {}
    if json:
        print_json(answer)
    elif prometheus:
        with written():
            print(exposition(answer, reasons, time.time()), end="")
    else:
        _print(answer)


def _print(answer: GatewayStatus) -> None:
    from rich.markup import escape

    from tidegate.cli.output import amount, duration, print_rich, table
    from tidegate.cli.peer import peer_table

    protocols = sorted({*answer.mappings, *answer.reserved_ports})
    offloads = ", ".join(name for name, used in sorted(answer.offloads.items()) if used) or "none"
    print_rich(
        f"[bold]tidegate {answer.version}[/], up {duration(answer.uptime)} (pid {answer.pid}), "
        f"{answer.shards} {'shard' if answer.shards == 1 else 'shards'}, offloads: {offloads}",
        f"listening on {answer.listen}, subnet {answer.subnet}, gateway {answer.gateway_address}",
        f"external {answer.external_interface} {', '.join(answer.external_addresses)}, "
        f"next hop {answer.next_hop or 'none'}",
        *([f"[red]not usable: {escape(answer.external_trouble)}[/]"] if answer.external_trouble else []),
        f"public key {answer.public_key}",
        "",
        peer_table(answer.peers, running=True),
        table(
            None,
            ("NAT", "mappings>", "reserved ports>"),
            [
                (name, str(answer.mappings.get(name, 0)), str(answer.reserved_ports.get(name, 0)))
                for name in protocols
            ],
            empty="no NAT mappings",
        ),
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


def drops_table(drops: dict[str, int], explanations: dict[str, str] | None = None) -> RenderableType:
    """Drops by reason, most frequent first; reasons that never occurred are left out. `explanations` fill a column of
    their own."""
    from tidegate.cli.output import table

    rows = sorted(
        ((name, count) for name, count in drops.items() if count), key=lambda row: (-row[1], row[0])
    )
    return table(
        None,
        ("dropped because", "packets>", *(() if explanations is None else ("which means",))),
        [
            (name, str(count), *(() if explanations is None else (explanations.get(name, ""),)))
            for name, count in rows
        ],
        empty="nothing was dropped",
    )
