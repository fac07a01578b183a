"""The state directory and its lock.

Only one process at a time can change what is in it: a gateway for as long as it runs, or, when none runs, a command
such as `peer add` for a moment. The lock is the kernel's (flock(2)), so that a killed process leaves none behind; the
file's text only says who holds it.
"""

from __future__ import annotations

import fcntl
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tidegate.errors import LockedError, PrivilegeError, StoreError
from tidegate.files import PRIVATE_DIRECTORY, PRIVATE_FILE

Holder = Literal["gateway", "command"]

RETRY_INTERVAL = 0.02  # seconds
COMMAND_PATIENCE = 30.0  # seconds that one command waits for another


@dataclass(frozen=True, slots=True)
class StateDir:
    """The directory with everything that must survive a restart."""

    path: Path

    @property
    def database(self) -> Path:
        return self.path / "tidegate.db"

    @property
    def key(self) -> Path:
        return self.path / "gateway.key"

    @property
    def control_socket(self) -> Path:
        return self.path / "control.sock"

    @property
    def lock_file(self) -> Path:
        return self.path / "lock"

    def prepare(self) -> None:
        """Makes the directory (0700) if it is not there. Raises `PrivilegeError` or `StoreError`."""
        try:
            self.path.mkdir(mode=PRIVATE_DIRECTORY, parents=True, exist_ok=True)
        except PermissionError:
            raise PrivilegeError(
                f"{self.path}: permission denied", hint="run as root, or name another --state-dir"
            ) from None
        except OSError as cause:
            raise StoreError(
                f"{self.path}: cannot be used as the state directory: {cause.strerror}",
                hint="name another with --state-dir",
            ) from cause

    def warning(self) -> str | None:
        """What is wrong with the mode of the directory, which must be there; `None`: nothing. It is left as it is:
        whoever made the directory may mean it."""
        if not self.path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return None
        return f"{self.path}: others can write here, and so give the gateway another key or other peers; chmod 700 it"

    @contextmanager
    def lock(
        self,
        holder: Holder,
        *,
        patience: float = COMMAND_PATIENCE,
        given_up: threading.Event | None = None,
    ) -> Iterator[None]:
        """Holds the directory's lock while the block lasts. Waits for a command that holds it, for at most `patience`
        seconds or until another thread sets `given_up`, but not for a gateway.

        Raises `LockedError`, `PrivilegeError` or `StoreError`.
        """
        try:
            descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE)
        except PermissionError:
            raise PrivilegeError(f"{self.lock_file}: permission denied", hint="run as root") from None
        except OSError as cause:
            raise StoreError(
                f"{self.lock_file}: {cause.strerror}", hint="name another with --state-dir"
            ) from cause
        try:
            _acquire(descriptor, self.path, patience, given_up or threading.Event())
            try:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{holder} {os.getpid()}\n".encode(), 0)
            except OSError as cause:
                raise StoreError(f"{self.lock_file}: cannot be written: {cause.strerror}") from cause
            yield
        finally:
            os.close(descriptor)  # releases the lock


def _acquire(descriptor: int, path: Path, patience: float, given_up: threading.Event) -> None:
    text = ""
    for _ in range(max(1, int(patience / RETRY_INTERVAL))):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            before, text = text, os.pread(descriptor, 64, 0).decode("ascii", "replace").strip()
            kind, _, pid = text.partition(" ")
            # Seen once, it may be the text of a past gateway, which a command that has just got the lock has yet to
            # replace.
            if kind == "gateway" and text == before:
                raise LockedError(
                    f"a gateway is already running with state directory {path} (pid {pid})",
                    hint="stop it first, or name another --state-dir",
                ) from None
            if given_up.wait(RETRY_INTERVAL):
                raise LockedError(f"another command holds {path}") from None
        else:
            return
    raise LockedError(f"another command still holds {path} after {patience:g} s", hint="try again")
