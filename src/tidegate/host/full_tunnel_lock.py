"""A lock that only one client per host (network namespace) can hold: the one that routes everything through its tunnel.

The lock is the kernel's (flock(2)), so that a killed client leaves none behind. It is taken on a file that every
network namespace has its own copy of, and that only an administrator of the namespace can open (root, or CAP_NET_ADMIN
alone): a sysctl that holds a secret. Its value is neither read nor written. A file of our own would need a directory
that clients without root can write to, and a name that anybody can take (an abstract socket) would let anybody keep
root from connecting. Clients that share a network namespace but see it through different mounts of /proc do not exclude
each other here, so the holder still has to look for another client's routes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tidegate.errors import ConflictError, HostNetworkError

LOCK_FILE = Path("/proc/sys/net/ipv4/tcp_fastopen_key")  # mode 0600, net/ipv4/sysctl_net_ipv4.c
LOCKS = Path("/proc/locks")  # proc_locks(5)
PATIENCE = 2.0
"""Seconds to wait for a client that holds the lock only while it tidies up."""
RETRY_INTERVAL = 0.05


@contextmanager
def full_tunnel_lock(*, patience: float = 0.0) -> Iterator[None]:
    """Holds the lock while the block lasts. Raises `ConflictError` if another client still has it after `patience`
    seconds, `HostNetworkError` if there is no such lock here."""
    try:
        descriptor = os.open(LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as cause:
        raise HostNetworkError(
            f"{LOCK_FILE} cannot be opened ({cause.strerror}); it keeps clients out of each other's way",
            hint="mount /proc here, or use --no-routes" if cause.errno == errno.ENOENT else "use --no-routes",
        ) from cause
    try:
        _acquire(descriptor, patience)
        yield
    finally:
        os.close(descriptor)  # releases the lock


def already_routed_error(which: str) -> ConflictError:
    """`which` identifies the other client, such as `` (pid 12)``; empty where it is not known."""
    return ConflictError(
        f"another client already routes everything through its tunnel{which}",
        hint="stop it first; two tunnels cannot both carry everything",
    )


def _acquire(descriptor: int, patience: float) -> None:
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise already_routed_error(_pid_of_holder(descriptor)) from None
            threading.Event().wait(RETRY_INTERVAL)
        else:
            return


def _pid_of_holder(descriptor: int) -> str:
    """For a message: empty where it cannot be found out, as for a process in another PID namespace."""
    status = os.fstat(descriptor)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    try:
        lines = LOCKS.read_text("ascii").splitlines()
    except OSError:
        return ""
    for words in map(str.split, lines):  # such as 1: FLOCK ADVISORY WRITE 4711 00:15:4026 0 EOF
        if words[1] == "FLOCK" and words[5] == f"{device}:{status.st_ino}":
            return f" (pid {words[4]})"
    return ""
