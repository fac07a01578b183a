"""Sets the tunnel's DNS servers on the client's host, through whatever manages resolv.conf there.

Debian's `resolvconf` sorts records by the position of their names in its interface-order(5), and by nothing else. So a
tunnel's record is named after a kind of interface that comes early there, as wg-quick does.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ipaddress import IPv4Address
from pathlib import Path
from typing import Literal

import structlog

log = structlog.get_logger("tidegate.resolver")

RESOLVED_FILES = Path("/run/systemd/resolve")
"""Where systemd-resolved keeps its own resolv.conf files, and its socket."""
SYSTEMD_RESOLVED = RESOLVED_FILES / "io.systemd.Resolve"
RESOLVED_STUBS = frozenset({"127.0.0.53", "127.0.0.54"})  # systemd-resolved(8)
RESOLV_CONF = Path("/etc/resolv.conf")
NSSWITCH = Path("/etc/nsswitch.conf")
INTERFACE_ORDER = Path("/etc/resolvconf/interface-order")
TIMEOUT = 10.0  # seconds for a helper command
LEFTOVER_TIMEOUT = 2.0
"""Seconds for a helper command that usually has nothing to do; the start waits for it, and so does a stop meanwhile."""

DnsOutcome = Literal["applied", "refused", "unmanaged"]
"""What became of the tunnel's DNS servers: *applied*: they are in use; *refused*: the program that manages resolv.conf
failed; *unmanaged*: there is no such program, or programs do not ask it. In the last two cases DNS is unchanged."""


@contextmanager
def configured_dns(
    tun_name: str, servers: Sequence[IPv4Address], search: Sequence[str]
) -> Iterator[DnsOutcome]:
    """Uses the servers (at least one) while the block lasts, if something on this host manages resolv.conf."""
    addresses = [str(server) for server in servers]
    if resolvectl := _resolvectl():
        applied = _run([resolvectl, "dns", tun_name, *addresses]) and _run(
            [resolvectl, "domain", tun_name, "~.", *search]
        )
        undo = [resolvectl, "revert", tun_name]
        # When a client ends, that is a moment later: no time to run a command by hand.
        complaint = (
            "DNS is not restored: systemd-resolved asks the tunnel's DNS servers until its device is gone"
        )
        goes_with = tun_name
    elif resolvconf := _resolvconf():
        text = "".join(f"nameserver {address}\n" for address in addresses)
        text += f"search {' '.join(search)}\n" if search else ""
        record = _record(Path(resolvconf), tun_name)
        applied = _run([resolvconf, "-a", record, "-m", "0", "-x"], text)
        undo = [resolvconf, "-d", record, "-f"]
        complaint = (
            "DNS is not restored: resolv.conf may name only the tunnel's DNS servers, and then names cannot be "
            "looked up; run the command by hand"
        )
        goes_with = None
    else:
        yield "unmanaged"
        return
    if not applied:
        # It may have been done partially.
        half = "some of the tunnel's DNS settings may remain; run the command by hand"
        _run(undo, complaint=half, goes_with=goes_with)
        yield "refused"
        return
    try:
        yield "applied"
    finally:
        _run(undo, complaint=complaint, goes_with=goes_with)


def remove_leftover_record(tun_name: str) -> None:
    """Removes a killed client's DNS servers: otherwise resolv.conf would name only a server inside a tunnel that is
    gone. systemd-resolved forgets them by itself, with the device."""
    if _resolvectl() or _exists(tun_name):
        return
    if resolvconf := _resolvconf():
        # Usually there is nothing to remove; and a user who may not remove it could not have set it either.
        undo = [resolvconf, "-d", _record(Path(resolvconf), tun_name), "-f"]
        _run(undo, timeout=LEFTOVER_TIMEOUT, quietly=True)


def _exists(interface: str) -> bool:
    try:
        socket.if_nametoindex(interface)
    except OSError:
        return False
    return True


def _resolvectl() -> str | None:
    """What tells systemd-resolved, where it runs and is asked."""
    return shutil.which("resolvectl") if SYSTEMD_RESOLVED.exists() and _resolved_is_asked() else None


def _resolvconf() -> str | None:
    """resolvconf(8); but not systemd's, which is resolvectl by another name, where nobody asks systemd-resolved."""
    found = shutil.which("resolvconf")
    if found and Path(os.path.realpath(found)).name == "resolvectl" and not _resolved_is_asked():
        return None
    return found


def _resolved_is_asked() -> bool:
    """Whether programs ask systemd-resolved for names (systemd-resolved(8), nss-resolve(8)). It may run where
    resolv.conf is somebody else's and names other servers: these are asked then, whatever it is told."""
    if Path(os.path.realpath(RESOLV_CONF)).is_relative_to(RESOLVED_FILES):
        return True
    for line in _lines(RESOLV_CONF):
        keyword, *values = line.split() or [""]
        if keyword == "nameserver" and RESOLVED_STUBS.intersection(values[:1]):
            return True
    for line in _lines(NSSWITCH):
        database, _, services = line.partition("#")[0].partition(":")  # nsswitch.conf(5)
        if database.strip() == "hosts" and "resolve" in re.split(r"[\s\[]", services):
            return True
    return False


def _lines(path: Path) -> list[str]:
    """Of a file that need not exist."""
    try:
        return path.read_text("utf-8", "replace").splitlines()
    except OSError:
        return []


def _record(resolvconf: Path, tun_name: str) -> str:
    """The name of the tunnel's record. Only Debian's program sorts by name; if `resolvconf` is a symbolic link, it is
    another one (systemd's, which accepts only names of interfaces)."""
    name = f"{tun_name}.inet"
    if resolvconf.is_symlink():
        return name
    order = _lines(INTERFACE_ORDER)
    kind = next((line[:-1] for line in order if re.fullmatch(r"[A-Za-z0-9-]+\*", line)), None)
    return f"{kind}.{name}" if kind else name


def _run(
    command: list[str],
    text: str = "",
    *,
    timeout: float = TIMEOUT,
    quietly: bool = False,
    complaint: str = "a resolver command failed",
    goes_with: str | None = None,
) -> bool:
    """Runs a command. Returns whether it succeeded; if not, logs `complaint`, unless what it was to undo is gone
    already, together with the device that it `goes_with`."""
    cause = _failure(command, text, timeout)
    if cause is not None:
        gone = goes_with is not None and not _exists(goes_with)
        complain = log.debug if quietly or gone else log.warning
        complain(complaint, command=shlex.join(command), cause=cause)
    return cause is None


def _failure(command: list[str], text: str, timeout: float) -> str | None:
    try:
        done = subprocess.run(
            command,
            input=text,  # even if empty: never from the terminal
            encoding="utf-8",
            errors="replace",
            capture_output=True,
            timeout=timeout,
            check=False,
            start_new_session=True,  # Ctrl-C on the terminal is for the client, which lets the command finish
        )
    except (OSError, subprocess.TimeoutExpired) as cause:
        return str(cause)
    return done.stderr.strip()[:200] if done.returncode != 0 else None
