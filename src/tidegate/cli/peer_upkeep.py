"""``tidegate peer``: what happens to a peer between its coming and its going."""

from __future__ import annotations

import typer

from tidegate.cli.options import ConfigOption, JsonOption, StateDirOption, examples, given_as, read_settings
from tidegate.cli.peer import NameArgument
from tidegate.cli.runtime import runtime_of

DISABLE_EXAMPLES = examples(
    ("tidegate peer disable alice", "alice cannot connect until she is enabled"),
    ("tidegate peer list", "says who is disabled"),
)
ENABLE_EXAMPLES = examples(
    ("tidegate peer enable alice", "alice can connect again, with the profile she has")
)


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
