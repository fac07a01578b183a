"""``tidegate reload``"""

from __future__ import annotations

import typer

from tidegate.cli.options import ConfigOption, JsonOption, StateDirOption, examples, settings_sources

EXAMPLES = examples(
    ("tidegate reload", "apply what the settings file says now"),
    ("tidegate reload --json | jq .needs_restart", "what would need a restart"),
)


def reload(
    context: typer.Context,
    config: ConfigOption = None,
    state_dir: StateDirOption = None,
    json: JsonOption = False,
) -> None:
    """Make the running gateway reload its settings, as SIGHUP does.

    The gateway reads the file that it was started with, and applies what can change while it runs; it names what needs
    a restart. If anything in the file is wrong, nothing changes.
    """
    from tidegate.cli.administration import running_gateway
    from tidegate.cli.output import print_json, remark
    from tidegate.control.commands import ReloadSettings
    from tidegate.errors import NotRunningError
    from tidegate.settings import Settings

    # The gateway judges the rest, so that what is wrong is in its log as well.
    settings = Settings(state_dir=settings_sources(context, config, state_dir).read_state_dir())
    try:
        with running_gateway(settings) as gateway:
            answer = gateway.execute(ReloadSettings())
    except NotRunningError as absent:
        if state_dir is None:  # the file may name a new one, which the gateway has not read yet
            absent.hint = (
                "start one with `tidegate serve`, or name the state_dir that it uses with --state-dir"
            )
        raise
    done = [f"applied: {', '.join(answer.applied)}" if answer.applied else "nothing to apply has changed"]
    if answer.needs_restart:
        done.append(f"needs a restart: {', '.join(answer.needs_restart)}")
    done += (f"warning: {warning}" for warning in answer.warnings)
    if json:
        print_json(answer, done="; ".join(done))
        return
    for text in done:
        remark(text)
