"""``tidegate nat``: what the NAT holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tidegate.cli.options import ConfigOption, JsonOption, StateDirOption, examples, given_as, read_settings

if TYPE_CHECKING:
    from ipaddress import IPv4Address

    from rich.console import RenderableType

    from tidegate.control.commands import MappingView

app = typer.Typer(
    help="The NAT: mappings and counters.",
    no_args_is_help=True,
    epilog=examples(
        ("tidegate nat list --peer alice", "alice's mappings"),
        ("tidegate nat stats", "how full it is, and why packets are dropped"),
    ),
)


@app.command(
    "list",
    epilog=examples(
        ("tidegate nat list --peer alice", "alice's mappings"),
        ("tidegate nat list --external 203.0.113.1:40001", "who has this port now, of any protocol"),
        ("tidegate nat list --limit 10000 --json", "for programs"),
    ),
)
def list_mappings(
    context: typer.Context,
    peer: Annotated[str | None, typer.Option(metavar="NAME", help="Only this peer's.")] = None,
    external: Annotated[
        str | None, typer.Option(metavar="[ADDR:]PORT", help="Only those that have this external port.")
    ] = None,
    limit: Annotated[int, typer.Option(metavar="N", min=1, max=10_000, help="How many at most.")] = 1000,
    config: ConfigOption = None,
    state_dir: StateDirOption = None,
    json: JsonOption = False,
) -> None:
    """List the NAT's mappings: which peer has which external port.

    Several peers may have the same TCP port, towards different destinations. Who had a port before is in the log, if
    `log_mappings` is set.
    """
    from tidegate.cli.administration import running_gateway
    from tidegate.cli.output import print_json, print_rich, remark
    from tidegate.control.commands import NatList

    settings = read_settings(context, config, state_dir)
    with given_as(peer="--peer"):
        command = NatList(
            peer=peer, external=None if external is None else _parse_external(external), limit=limit
        )
    with running_gateway(settings) as gateway:
        answer = gateway.execute(command)
    if json:
        print_json(answer)
    else:
        print_rich(_mappings_table(answer.mappings))
    if answer.truncated:
        remark(f"there are more than these {limit}; raise --limit, or choose a --peer")


def _parse_external(text: str) -> tuple[IPv4Address | None, int]:
    """``203.0.113.1:40001``, or ``40001`` for any external address. Raises `UsageError`."""
    from ipaddress import AddressValueError, IPv4Address

    from tidegate.errors import UsageError
    from tidegate.net import parse_port, quoted

    address, colon, port = text.rpartition(":")
    try:
        return (IPv4Address(address) if colon else None), parse_port(port)
    except ValueError as cause:
        wrong = (
            f"{quoted(address)} is not an IPv4 address"
            if isinstance(cause, AddressValueError)
            else str(cause)
        )
        raise UsageError(f"--external: {wrong}; write ADDR:PORT, or PORT for any address") from None


def _mappings_table(mappings: list[MappingView]) -> RenderableType:
    """Mappings as a table."""
    from tidegate.cli.output import duration, table

    return table(
        None,
        (
            "protocol",
            "peer",
            "internal",
            "external",
            "state",
            "sessions>",
            "age>",
            "idle>",
            "expires in>",
        ),
        [
            (
                entry.protocol,
                entry.peer or "-",
                entry.internal,
                entry.external,
                entry.state,
                str(entry.sessions),
                duration(entry.age),
                duration(entry.idle),
                "never" if entry.expires_in is None else duration(entry.expires_in),
            )
            for entry in mappings
        ],
        empty="no mappings",
    )


@app.command(
    "stats",
    epilog=examples(("tidegate nat stats", "mappings, ports, limits, drops and what they mean")),
)
def stats(
    context: typer.Context,
    config: ConfigOption = None,
    state_dir: StateDirOption = None,
    json: JsonOption = False,
) -> None:
    """Show how full the NAT is, and what it dropped."""
    from tidegate.cli.administration import running_gateway
    from tidegate.cli.counters import drops_table, ports_table
    from tidegate.cli.output import counted, print_json, print_rich, table
    from tidegate.control.commands import NatStats

    settings = read_settings(context, config, state_dir)
    with running_gateway(settings) as gateway:
        answer = gateway.execute(NatStats())
    if json:
        print_json(answer)
        return
    print_rich(
        ports_table(answer.mappings, answer.reserved_ports, "protocol"),
        f"{counted(answer.sessions, 'session')} of {counted(answer.clients, 'client')}; "
        f"{counted(answer.resting_ports, 'port')} resting\n",
        table(
            None, ("limit", "value>"), [(name, str(value)) for name, value in answer.limits.items()], empty=""
        ),
        drops_table(answer.drops, answer.explanations),
    )
