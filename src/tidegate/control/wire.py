"""The control socket's protocol: one JSON object per line, requests one way, answers the other.

    {"version": 1, "request": {"command": "peer.list"}}
    {"version": 1, "answer": {...}}
    {"version": 1, "error": {"message": ..., "hint": ..., "exit_code": ...}}

Lines are bounded in both directions; a line that is no valid request is answered with an error.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from tidegate.control.commands import PROTOCOL_VERSION, Answer, AnyCommand, Command
from tidegate.errors import ControlError, TidegateError, UnansweredError

SOCKET_NAME = "control.sock"
MAX_REQUEST_BYTES = 64 * 1024
MAX_ANSWER_BYTES = 16 * 1024 * 1024

_commands: TypeAdapter[Any] = TypeAdapter(AnyCommand)


class _Error(BaseModel):
    model_config = ConfigDict(frozen=True)
    message: str
    hint: str | None = None
    exit_code: int = 1


class _Request(BaseModel):
    version: int
    request: dict[str, Any]


class _Response(BaseModel):
    version: int
    answer: dict[str, Any] | None = None
    error: _Error | None = None


class RemoteError(ControlError):
    """The gateway refused a command; the message is its own."""

    def __init__(self, error: _Error) -> None:
        super().__init__(error.message, hint=error.hint)
        self.exit_code = error.exit_code


def encode_request(command: Command[Any]) -> bytes:
    """Without what is not asked for (`None` is the default of every field that can be `None`): a gateway that was not
    restarted after an upgrade refuses fields that it does not know."""
    request = command.model_dump(mode="json", exclude_none=True)
    return _line(_Request(version=PROTOCOL_VERSION, request=request))


def decode_request(line: bytes) -> Command[Any]:
    """Raises `ControlError`."""
    try:
        request = _Request.model_validate_json(line)
        _check_version(request.version)
        command: Command[Any] = _commands.validate_python(request.request)
    except ValidationError as invalid:
        first = invalid.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ControlError(f"not a valid request: {place}: {first['msg']}") from None
    return command


def encode_answer(answer: Answer) -> bytes:
    return _line(_Response(version=PROTOCOL_VERSION, answer=answer.model_dump(mode="json")))


def encode_error(error: TidegateError) -> bytes:
    body = _Error(message=error.message, hint=error.hint, exit_code=error.exit_code)
    return _line(_Response(version=PROTOCOL_VERSION, error=body))


def decode_answer(line: bytes, kind: type[Answer]) -> Answer:
    """Raises `ControlError`: `RemoteError` if the gateway refused, `UnansweredError` if the answer cannot be read."""
    try:
        response = _Response.model_validate_json(line)
        if response.error is not None:
            raise RemoteError(response.error)
        _check_version(response.version)
        return kind.model_validate(response.answer)
    except ValidationError:
        raise UnansweredError(
            "the gateway's answer cannot be read", hint="does it run the same version as this command?"
        ) from None


def _check_version(version: int) -> None:
    if version != PROTOCOL_VERSION:
        raise ControlError(
            f"the other side of the control socket speaks version {version}, this side version {PROTOCOL_VERSION}",
            hint="restart the gateway after an upgrade",
        )


def _line(message: BaseModel) -> bytes:
    return message.model_dump_json(exclude_none=True).encode() + b"\n"
