"""Everything that Tidegate refuses or fails at, as one family of exceptions.

The message says what is wrong and where, `hint` what to do about it; only `tidegate.cli.main` prints them. The exit
code follows from the kind: 2 for what the user wrote (arguments, settings, profiles), 1 for what the machine did.
"""

from pathlib import Path


class TidegateError(Exception):
    """A failure at run time, described in one line."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class UsageError(TidegateError):
    """The command line does not make sense."""

    exit_code = 2


class SettingsError(TidegateError):
    """A setting is unknown, has the wrong type, or makes no sense. `where` is ``file:line``, a variable or a flag."""

    exit_code = 2

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(f"{where}: {message}" if where else message, hint=hint)
        self.where = where


class ProfileError(TidegateError):
    """A profile (wg-quick format) that cannot be used."""

    exit_code = 2

    def __init__(
        self, message: str, *, path: Path | str, line: int | None = None, hint: str | None = None
    ) -> None:
        super().__init__(f"{path}:{line}: {message}" if line else f"{path}: {message}", hint=hint)
        self.path = path
        self.line = line


class StoreError(TidegateError):
    """The store cannot be read or written."""


class NotFoundError(TidegateError):
    """A peer or publication of that name does not exist."""


class ConflictError(TidegateError):
    """A name, an address, a key or a port is taken."""


class LockedError(TidegateError):
    """Another process uses the state directory."""


class PrivilegeError(TidegateError):
    """The process lacks a permission that it needs."""


class HostNetworkError(TidegateError):
    """The host's network is not usable as it is, or refused a change to our own device."""


class EngineError(TidegateError):
    """The packet engine refused to start or died."""


class EngineUnresponsiveError(EngineError, RuntimeError):
    """The packet engine does not answer, because one of its threads hangs or it is not running; or a thread does not
    end."""


class ControlError(TidegateError):
    """The control socket of a gateway cannot be reached, or does not follow the protocol."""


class UnansweredError(ControlError):
    """A gateway was sent a command, and it is not known whether it carried it out."""


class NotRunningError(ControlError):
    """No gateway runs on this state directory."""


class TaskDiedError(TidegateError):
    """A background task ended although nobody asked it to; the gateway goes down with its name and cause."""

    def __init__(self, task: str, cause: BaseException | None) -> None:
        reason = f"{type(cause).__name__}: {cause}" if cause is not None else "it returned"
        super().__init__(f"background task {task!r} died: {reason}")
        self.task = task
        self.__cause__ = cause
