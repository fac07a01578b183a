"""The command line's end of the control socket."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import cast

from tidegate.control.commands import AnswerT, Command
from tidegate.control.wire import MAX_ANSWER_BYTES, SOCKET_NAME, decode_answer, encode_request
from tidegate.errors import ControlError, NotRunningError, PrivilegeError, UnansweredError

TIMEOUT = 15.0  # seconds; a command that publishes a thousand ports takes about one


class ControlClient:
    """Asks a running gateway."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    @classmethod
    def connect(cls, state_dir: Path) -> ControlClient:
        """Raises `NotRunningError` if no gateway listens, `PrivilegeError` if this user has no access."""
        path = state_dir / SOCKET_NAME
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(TIMEOUT)
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            connection.close()
            raise NotRunningError(
                f"no gateway is running with state directory {state_dir}",
                hint="start one with `tidegate serve`, or name another with --state-dir",
            ) from None
        except PermissionError:
            connection.close()
            raise PrivilegeError(f"{path}: permission denied", hint="run as root") from None
        except OSError as cause:
            connection.close()
            raise ControlError(f"{path}: {cause.strerror or cause}") from cause
        return cls(connection)

    def execute(self, command: Command[AnswerT]) -> AnswerT:
        """Sends a command and waits for its answer. Raises `ControlError`: `RemoteError`, in the gateway's own words,
        if it refused; `UnansweredError` if there is no answer, or none that can be read."""
        try:
            self._connection.sendall(encode_request(command))
            with self._connection.makefile("rb") as stream:
                line = stream.readline(MAX_ANSWER_BYTES + 1)
        except TimeoutError:
            raise UnansweredError(f"the gateway did not answer within {TIMEOUT:g} s") from None
        except OSError as cause:
            raise UnansweredError(f"the gateway closed the connection: {cause.strerror or cause}") from cause
        if not line.endswith(b"\n"):
            raise UnansweredError(
                "the gateway closed the connection before it answered", hint="is it shutting down?"
            )
        return cast(AnswerT, decode_answer(line, command.answer))

    def close(self) -> None:
        self._connection.close()
