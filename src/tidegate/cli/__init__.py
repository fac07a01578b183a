"""The command line: one module per group of commands, and `main`, the only place that prints errors.

Commands import what they need when they run, so that ``tidegate --help`` is instant.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from traceback import format_exc, walk_tb

from typer.exceptions import Abort, TyperException

from tidegate.cli.app import command_tree
from tidegate.cli.output import remark, unwritable
from tidegate.cli.runtime import Runtime
from tidegate.errors import TidegateError
from tidegate.streams import escape_unencodable, flush, occupy_closed_descriptors, say

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as in shells

DEBUG_VARIABLE = "TIDEGATE_DEBUG"


def main(arguments: Sequence[str] | None = None, runtime: Runtime | None = None) -> int:
    """Runs a command and returns the exit code: 0, 1 (run time), 2 (usage, settings), 130 (Ctrl-C), or 128 + the number
    of another signal. Stopping a service is not a failure: `serve` ends with 0 after SIGTERM or Ctrl-C, `connect` after
    SIGTERM."""
    occupy_closed_descriptors()
    escape_unencodable(sys.stdout)
    exit_code = _carry_out(arguments, runtime)
    stuck = flush(sys.stdout)
    if stuck is not None and exit_code == EXIT_OK:
        exit_code = _complain_about_output(stuck)
    flush(sys.stderr)  # or Python reports a failure with an exit code of its own, 120
    return exit_code


def _carry_out(arguments: Sequence[str] | None, runtime: Runtime | None) -> int:
    debug = os.environ.get(DEBUG_VARIABLE, "") not in {"", "0"}
    try:
        result = command_tree().main(
            args=list(sys.argv[1:] if arguments is None else arguments),
            prog_name="tidegate",
            standalone_mode=False,
            obj=runtime or Runtime(),
        )
    except TidegateError as failure:
        if debug:
            say(format_exc(), sys.stderr)
        return _complain(str(failure), failure.exit_code)
    except TyperException as misuse:  # unknown options, missing arguments, values of a wrong type
        return _complain_about_usage(misuse)
    except (KeyboardInterrupt, Abort):
        return EXIT_INTERRUPTED
    except Exception as unexpected:  # noqa: BLE001 -- all are reported, in one line or with a traceback
        if debug and not isinstance(unexpected, BrokenPipeError):
            say(format_exc(), sys.stderr)
        return _complain_about_unexpected(
            unexpected, "" if debug else f"run with {DEBUG_VARIABLE}=1 for the traceback"
        )
    return result if isinstance(result, int) else EXIT_OK


def _complain_about_unexpected(unexpected: Exception, hint: str) -> int:
    if isinstance(unexpected, BrokenPipeError):
        return _complain_about_output(unexpected)
    if isinstance(unexpected, OSError) and (stuck := _stuck_output(unexpected)) is not None:
        return _complain_about_output(stuck)
    reason = " ".join(str(unexpected).split())
    failure = TidegateError(f"unexpected {type(unexpected).__name__}: {reason}", hint=hint)
    return _complain(str(failure), failure.exit_code)


def _stuck_output(failure: OSError) -> OSError | None:
    """The failure to write to standard output, if that is what `failure` is. Help is printed by Typer, outside our
    commands; if standard output is unbuffered, nothing is left for `flush` to fail on."""
    frames = [frame for frame, _ in walk_tb(failure.__traceback__)]
    in_a_command = any(frame.f_globals.get("__name__", "").startswith(f"{__name__}.") for frame in frames)
    return flush(sys.stdout) or (failure if not in_a_command else None)


def _complain_about_output(cause: OSError) -> int:
    if isinstance(cause, BrokenPipeError):
        return EXIT_FAILED  # the reader has seen enough
    return _complain(str(unwritable(cause)), EXIT_FAILED)


def _complain(message: str, exit_code: int) -> int:
    remark(message)
    return exit_code


def _complain_about_usage(misuse: TyperException) -> int:
    context = getattr(misuse, "ctx", None)
    if type(misuse).__name__ == "NoArgsIsHelpError":  # a group without a command: its help is the message
        if help_text := misuse.format_message().strip():  # empty if Typer has printed it already, with rich
            say(help_text, sys.stderr)
        return EXIT_USAGE
    command = context.command_path if context is not None else "tidegate"
    if misuse.__cause__ is not None:
        misuse.message = _describe_bad_value(misuse.__cause__) or misuse.message
    message = misuse.format_message().rstrip(".")
    return _complain(f"{message[:1].lower()}{message[1:]}; see `{command} --help`", EXIT_USAGE)


def _describe_bad_value(cause: BaseException) -> str | None:
    """A bad value as the settings would describe it; Typer repeats pydantic's own message."""
    from pydantic import ValidationError

    from tidegate.net import quoted
    from tidegate.settings.messages import describe_error

    if not isinstance(cause, ValidationError):
        return None
    return describe_error(cause.errors(include_url=False)[0], lambda value: quoted(str(value)))
