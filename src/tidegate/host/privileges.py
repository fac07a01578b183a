"""Whether this process has the permissions that it needs; checked before anything is opened."""

import os
import resource
from pathlib import Path

from tidegate.errors import PrivilegeError

CAP_NET_ADMIN, CAP_NET_RAW = 12, 13  # linux/capability.h
TUN_DEVICE = Path("/dev/net/tun")

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
    missing = [_NAMES[number] for number in needed if not have >> number & 1]
    if missing:
        raise PrivilegeError(
            f"this needs {' and '.join(missing)}", hint="run as root, or grant the capability"
        )
    if not TUN_DEVICE.exists():
        raise PrivilegeError(
            f"{TUN_DEVICE} does not exist", hint="run `modprobe tun`, or pass the device into the container"
        )
    if not os.access(TUN_DEVICE, os.R_OK | os.W_OK):
        raise PrivilegeError(f"{TUN_DEVICE} cannot be opened: permission denied", hint="run as root")


def raise_open_file_limit() -> int:
    """Raises the soft limit of open files to the hard one (each NAT port is a socket), if the kernel lets us. Returns
    what the soft limit is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (
        OSError,
        ValueError,
    ):  # the hard limit exceeds fs.nr_open (setrlimit(2)): Python makes a ValueError of that
        return soft
    return hard
