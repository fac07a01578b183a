"""Whether this process has the permissions that it needs; checked before anything is opened."""

import os
import resource
from pathlib import Path

import structlog

from tidegate.errors import PrivilegeError

log = structlog.get_logger("tidegate.host")

CAP_NET_ADMIN, CAP_NET_RAW = 12, 13  # linux/capability.h
TUN_DEVICE = Path("/dev/net/tun")
NR_OPEN = Path("/proc/sys/fs/nr_open")

_NAMES = {CAP_NET_ADMIN: "CAP_NET_ADMIN", CAP_NET_RAW: "CAP_NET_RAW"}


def effective_capabilities(status: Path = Path("/proc/self/status")) -> int:
    """The effective set as a bit mask (capabilities(7))."""
    for line in status.read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def check_privileges(needed: tuple[int, ...] = (CAP_NET_ADMIN, CAP_NET_RAW)) -> None:
    """Raises `PrivilegeError` if a capability or the TUN device is missing."""
    have = effective_capabilities()
    is_root = os.geteuid() == 0  # root without a permission is most likely that of a container
    missing = [_NAMES[number] for number in needed if not have >> number & 1]
    if missing:
        needs = f"this needs {' and '.join(missing)}"
        if not is_root:
            raise PrivilegeError(needs, hint="run as root, or grant the capability")
        options = " ".join(f"--cap-add {name.removeprefix('CAP_')}" for name in missing)
        raise PrivilegeError(
            f"{needs}, which root lacks here", hint=f"in a container, start it with {options}"
        )
    device = f"--device {TUN_DEVICE}"
    if not TUN_DEVICE.exists():
        raise PrivilegeError(
            f"{TUN_DEVICE} does not exist", hint=f"run `modprobe tun`, or start the container with {device}"
        )
    if not os.access(TUN_DEVICE, os.R_OK | os.W_OK):
        raise PrivilegeError(
            f"{TUN_DEVICE} cannot be opened: permission denied",
            hint=f"in a container, start it with {device}" if is_root else "run as root",
        )


def raise_open_file_limit() -> int:
    """Raises the soft limit of open files (each NAT port is a socket, and so is each DNS query) to the hard one, or, if
    that exceeds what the kernel gives one process, both to that. Returns what the soft limit is then; logs it if it
    could not be raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return soft
    if _set_open_file_limit(hard):
        return hard
    most = _most_open_files()
    if soft < most < hard and _set_open_file_limit(most):
        return most
    log.warning(
        "the limit of open files could not be raised: there are fewer external ports and DNS queries",
        open_files=soft,
        hard_limit=hard,
    )
    return soft


def _set_open_file_limit(limit: int) -> bool:
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    except (OSError, ValueError):
        return False  # above fs.nr_open it is EPERM (setrlimit(2)), of which Python makes a ValueError
    return True


def _most_open_files() -> int:
    """What the kernel gives one process at most; zero if that cannot be read."""
    try:
        return int(NR_OPEN.read_text())
    except (OSError, ValueError):
        return 0
