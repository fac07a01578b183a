"""``tidegate peer``: what happens to a peer between its coming and its going."""

from __future__ import annotations

from typing import Annotated

import typer

from tidegate.cli.options import (
    ConfigOption,
    JsonOption,
    StateDirOption,
    examples,
    file_named,
    given_as,
    read_settings,
)
from tidegate.cli.peer import NameArgument
from tidegate.cli.runtime import runtime_of

DISABLE_EXAMPLES = examples(
    ("tidegate peer disable alice", "alice cannot connect until she is enabled"),
    ("tidegate peer list", "says who is disabled"),
)
ENABLE_EXAMPLES = examples(
    ("tidegate peer enable alice", "alice can connect again, with the profile she has")
)

RENAME_EXAMPLES = examples(("tidegate peer rename alice alice-phone", "what is published to her follows"))


def disable(
    context: typer.Context,
    name: NameArgument,
    config: ConfigOption = None,
    state_dir: StateDirOption = None,
    json: JsonOption = False,
) -> None:
    """Shut a peer out, at once and after every restart, until it is enabled. Its keys and address are kept, and so are
    its published ports and other protocols, which lead nowhere meanwhile."""
    from tidegate.cli.administration import administration
    from tidegate.cli.output import print_json, remark
    from tidegate.control.commands import PeerDisable

    settings = read_settings(context, config, state_dir)
    with given_as(name="NAME"):
        command = PeerDisable(name=name)
    with administration(settings, runtime_of(context).host(), make=False) as executor:
        answer = executor.execute(command)
    kept = f"; not published until it is enabled: {', '.join(answer.publications)}"
    done = f"peer {name} ({answer.peer.address}) is disabled{kept if answer.publications else ''}"
    if json:
        print_json(answer, done=done)
    else:
        remark(done)


def enable(
    context: typer.Context,
    name: NameArgument,
    config: ConfigOption = None,
    state_dir: StateDirOption = None,
    json: JsonOption = False,
) -> None:
    """Let a peer that was disabled connect again, with the keys, address, published ports and other protocols that it
    had."""
    from tidegate.cli.administration import administration
    from tidegate.cli.output import print_json, remark
    from tidegate.control.commands import PeerEnable

    settings = read_settings(context, config, state_dir)
    with given_as(name="NAME"):
        command = PeerEnable(name=name)
    runtime = runtime_of(context)
    with administration(settings, runtime.host(), make=False, engine=runtime.engine) as executor:
        answer = executor.execute(command)
    done = [f"peer {name} ({answer.peer.address}) is enabled"]
    done += (f"warning: {warning}" for warning in answer.warnings)
    if json:
        print_json(answer, done="; ".join(done))
        return
    for text in done:
        remark(text)


def rename(
    context: typer.Context,
    old: Annotated[str, typer.Argument(metavar="OLD", help="The peer's name.", show_default=False)],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Its new name.", show_default=False)],
    config: ConfigOption = None,
    state_dir: StateDirOption = None,
    json: JsonOption = False,
) -> None:
    """Give a peer another name. It stays connected, and its profile and published ports stay as they are. Settings are
    not changed: one that has the former name is told of."""
    from tidegate.cli.administration import administration
    from tidegate.cli.output import print_json, remark
    from tidegate.control.commands import PeerRename

    settings = read_settings(context, config, state_dir)
    with given_as(name="OLD", new_name="NEW"):
        command = PeerRename(name=old, new_name=new)
    with administration(settings, runtime_of(context).host(), make=False) as executor:
        answer = executor.execute(command)
    done = f"peer {old} ({answer.peer.address}) is now called {new}"
    if json:
        print_json(answer, done=done)
    else:
        remark(done)
    places = _places_that_name(old, context, config) if answer.settings else {}
    for setting in answer.settings:
        place = places.get(setting.rpartition(".")[2])
        remark(f"warning: {setting} still says {old}: {_advice(place, new)}")


def _places_that_name(peer: str, context: typer.Context, config: str | None) -> dict[str, str | None]:
    """As far as the settings that this command reads are those of the gateway."""
    import os

    from tidegate.settings.sources import protocols_of

    return protocols_of(
        peer,
        config=file_named(config, "--config") if config is not None else None,
        environment=os.environ,
        default_path=runtime_of(context).default_config,
    )


def _advice(place: str | None, name: str) -> str:
    where = f"in {place}" if place is not None else "where the gateway's settings say so"
    # A running gateway keeps the environment that it was started with.
    apply = "restart the gateway" if place is not None and place.startswith("$") else "run `tidegate reload`"
    return f"write {name} {where}, and {apply}, or the next reload or restart takes the protocol from it"
