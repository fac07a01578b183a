"""``tidegate publish``: external ports that lead to a client."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from tidegate.cli.options import ConfigOption, JsonOption, StateDirOption, examples, given_as, read_settings
from tidegate.cli.runtime import runtime_of

if TYPE_CHECKING:
    from tidegate.control.commands import PublicationView

app = typer.Typer(
    help="Published ports: external ports that lead to a peer.",
    no_args_is_help=True,
    epilog=examples(
        ("tidegate publish add tcp/8080 --to alice:80", "the world reaches alice's web server"),
        ("tidegate publish list", "what is published, and whether it works"),
        ("tidegate publish remove tcp/8080", "no longer"),
    ),
)

PortsArgument = Annotated[
    str, typer.Argument(metavar="PROTO/PORT", help="Such as tcp/8080, or tcp/8000-8010.", show_default=False)
]


@app.command(
    "add",
    epilog=examples(
        (
            "tidegate publish add tcp/8080 --to alice:80",
            "port 8080 of the external address leads to alice's port 80",
        ),
        ("tidegate publish add udp/27000-27010 --to bob", "a range, to the same ports"),
        ("tidegate publish add tcp/443 --to alice", "below 1024 as well; needs CAP_NET_BIND_SERVICE"),
    ),
)
def add(
    context: typer.Context,
    ports: PortsArgument,
    to: Annotated[
        str, typer.Option(metavar="PEER[:PORT]", help="The peer, and its (first) port.", show_default=False)
    ],
    config: ConfigOption = None,
    state_dir: StateDirOption = None,
    json: JsonOption = False,
) -> None:
    """Publish external ports to a peer, at once and after every restart. For a peer that is disabled they are only
    noted: they are published once it is enabled."""
    from tidegate.cli.administration import administration
    from tidegate.cli.output import print_json, remark
    from tidegate.control.commands import PublishAdd

    protocol, first, last = parse_ports(ports)
    peer, internal = _parse_target(to, first, last)
    settings = read_settings(context, config, state_dir)
    with given_as(peer="--to", internal_port="--to"):
        command = PublishAdd(
            protocol=protocol, first_port=first, last_port=last, peer=peer, internal_port=internal
        )
    with administration(settings, runtime_of(context).host(), make=False) as executor:
        answer = executor.execute(command)
    if answer.publication.state == "peer disabled":
        done = (
            f"{answer.publication.external} will be published to {answer.publication.to} "
            f"once {peer} is enabled: `tidegate peer enable {peer}`"
        )
    else:
        done = f"{answer.publication.external} is published to {answer.publication.to}"
    if json:
        print_json(answer, done=done)
    else:
        remark(done)


@app.command("remove", epilog=examples(("tidegate publish remove tcp/8080", "no longer published")))
def remove(
    context: typer.Context,
    ports: PortsArgument,
    config: ConfigOption = None,
    state_dir: StateDirOption = None,
    json: JsonOption = False,
) -> None:
    """Stop publishing external ports."""
    from tidegate.cli.administration import administration
    from tidegate.cli.output import print_json, remark
    from tidegate.control.commands import PublishRemove

    protocol, first, last = parse_ports(ports)
    settings = read_settings(context, config, state_dir)
    with administration(settings, runtime_of(context).host(), make=False) as executor:
        answer = executor.execute(PublishRemove(protocol=protocol, first_port=first, last_port=last))
    done = f"{answer.publication.external} is no longer published to {answer.publication.to}"
    if json:
        print_json(answer, done=done)
    else:
        remark(done)


@app.command("list", epilog=examples(("tidegate publish list", "all published ports")))
def list_publications(
    context: typer.Context,
    config: ConfigOption = None,
    state_dir: StateDirOption = None,
    json: JsonOption = False,
) -> None:
    """List the published ports."""
    from tidegate.cli.administration import administration
    from tidegate.cli.output import print_json, print_rich, table
    from tidegate.control.commands import PublishList

    settings = read_settings(context, config, state_dir)
    with administration(settings, runtime_of(context).host(), make=False) as executor:
        answer = executor.execute(PublishList())
    if json:
        print_json(answer)
        return
    rows = [(entry.external, entry.to, _state(entry)) for entry in answer.publications]
    print_rich(table(None, ("external", "to", "state"), rows, empty="nothing is published"))


def _state(entry: PublicationView) -> str:
    return f"{entry.state}: {entry.detail}" if entry.detail else entry.state


def parse_ports(text: str) -> tuple[Literal["tcp", "udp"], int, int]:
    """``tcp/8080`` or ``tcp/8000-8010``. Raises `UsageError`."""
    from tidegate.errors import UsageError
    from tidegate.net import parse_port

    protocol, slash, range_text = text.lower().partition("/")
    first, dash, last = range_text.partition("-")
    try:
        if protocol not in {"tcp", "udp"} or not slash:
            raise ValueError(f"{text!r} is not PROTO/PORT, such as tcp/8080 or udp/27000-27010")
        low = parse_port(first)
        high = parse_port(last) if dash else low
    except ValueError as cause:
        raise UsageError(str(cause)) from None
    if high < low:
        raise UsageError(f"ports {low}-{high}: the range ends before it starts")
    return cast(Literal["tcp", "udp"], protocol), low, high


def _parse_target(text: str, first: int, last: int) -> tuple[str, int]:
    """``alice`` (the same ports), ``alice:80``, or ``alice:80-90``, which must be as long as the external range."""
    from tidegate.errors import UsageError
    from tidegate.net import parse_port

    peer, colon, range_text = text.partition(":")
    if not colon:
        return peer, first
    low_text, dash, high_text = range_text.partition("-")
    try:
        low = parse_port(low_text)
        high = parse_port(high_text) if dash else low + last - first
    except ValueError as cause:
        raise UsageError(f"--to: {cause}") from None
    if high - low != last - first:
        raise UsageError(f"--to {text}: must be as many ports as are published ({last - first + 1})")
    return peer, low
