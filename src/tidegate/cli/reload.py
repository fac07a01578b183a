"""``tidegate reload``"""

from __future__ import annotations

import typer

from tidegate.cli.options import ConfigOption, JsonOption, StateDirOption, examples, read_settings

EXAMPLES = examples(
    ("tidegate reload", "take over what the settings file says now"),
    ("tidegate reload --json | jq .needs_restart", "what would need a restart"),
)


def reload(
    context: typer.Context,
    config: ConfigOption = None,
    state_dir: StateDirOption = None,
    json: JsonOption = False,
) -> None:
    """Let the running gateway read its settings anew, as SIGHUP does.

    The gateway reads its own file, whichever it was started with, and takes over what can change while it
    runs; the rest is named. If anything in it is wrong, nothing changes.
    """
    from tidegate.cli.administration import running_gateway
    from tidegate.cli.output import print_json, remark
    from tidegate.control.commands import ReloadSettings
    from tidegate.errors import NotRunningError

    settings = read_settings(context, config, state_dir)
    try:
        with running_gateway(settings) as gateway:
            answer = gateway.execute(ReloadSettings())
    except NotRunningError as absent:
        if state_dir is None:  # this command has read a new one already, the gateway has not
            absent.hint = (
                "start one with `tidegate serve`, or name the state_dir that it has with --state-dir"
            )
        raise
    done = [
        f"in force: {', '.join(answer.applied)}" if answer.applied else "nothing to take over has changed"
    ]
    if answer.needs_restart:
        done.append(f"needs a restart: {', '.join(answer.needs_restart)}")
    done += (f"mind: {warning}" for warning in answer.warnings)
    if json:
        print_json(answer, done="; ".join(done))
        return
    for text in done:
        remark(text)
