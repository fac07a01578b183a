"""Tells the client's resolver about the tunnel's DNS servers, with whatever manages resolv.conf here.

Of several records, Debian's `resolvconf` puts those first whose names come first in its interface-order(5), and knows
no other order. So the record of a tunnel is named after a kind of interface that comes early there, as wg-quick does.
"""

from __future__ import annotations

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

SYSTEMD_RESOLVED = Path("/run/systemd/resolve/io.systemd.Resolve")
INTERFACE_ORDER = Path("/etc/resolvconf/interface-order")
TIMEOUT = 10.0  # seconds for a helper command
LEFTOVER_TIMEOUT = 2.0
"""For one that most often has nothing to do; the start waits for it, and a stop during the start."""

DnsOutcome = Literal["told", "refused", "unmanaged"]
"""What became of the tunnel's DNS servers; *refused*: what manages resolv.conf failed, *unmanaged*: there is none.
DNS is as it was then."""


@contextmanager
def configured_dns(
    tun_name: str, servers: Sequence[IPv4Address], search: Sequence[str]
) -> Iterator[DnsOutcome]:
    """Uses the servers (at least one) while the block lasts, if there is something that can be told."""
    addresses = [str(server) for server in servers]
    if resolvectl := _resolvectl():
        told = _run([resolvectl, "dns", tun_name, *addresses]) and _run(
            [resolvectl, "domain", tun_name, "~.", *search]
        )
        undo = [resolvectl, "revert", tun_name]
        # At the end of a client that is a moment later, too early for anybody to run a command.
        complaint = (
            "DNS is not restored: systemd-resolved asks the tunnel's DNS servers until its device is gone"
        )
        goes_with = tun_name
    elif resolvconf := shutil.which("resolvconf"):
        text = "".join(f"nameserver {address}\n" for address in addresses)
        text += f"search {' '.join(search)}\n" if search else ""
        record = _record(Path(resolvconf), tun_name)
        told = _run([resolvconf, "-a", record, "-m", "0", "-x"], text)
        undo = [resolvconf, "-d", record, "-f"]
        complaint = (
            "DNS is not restored: resolv.conf may name only the tunnel's DNS servers, and then names cannot be "
            "looked up; run the command by hand"
        )
        goes_with = None
    else:
        yield "unmanaged"
        return
    if not told:
        # Half of it may have been done.
        half = "some of the tunnel's DNS settings may remain; run the command by hand"
        _run(undo, complaint=half, goes_with=goes_with)
        yield "refused"
        return
    try:
        yield "told"
    finally:
        _run(undo, complaint=complaint, goes_with=goes_with)


def remove_leftover_record(tun_name: str) -> None:
    """Takes back what a killed client told: resolv.conf would name a server inside a tunnel that is no more, and no
    other. systemd-resolved forgets by itself, with the device."""
    if _resolvectl() or _exists(tun_name):
        return
    if resolvconf := shutil.which("resolvconf"):
        # Most often there is nothing to take back, and who may not do so may not have told anything either.
        undo = [resolvconf, "-d", _record(Path(resolvconf), tun_name), "-f"]
        _run(undo, timeout=LEFTOVER_TIMEOUT, quietly=True)


def _exists(interface: str) -> bool:
    try:
        socket.if_nametoindex(interface)
    except OSError:
        return False
    return True


def _resolvectl() -> str | None:
    return shutil.which("resolvectl") if SYSTEMD_RESOLVED.exists() else None


def _record(resolvconf: Path, tun_name: str) -> str:
    """The name of the tunnel's record. Only Debian's program has an order of names; where `resolvconf` is a symbolic
    link, it is another's (systemd's, which takes names of interfaces alone)."""
    name = f"{tun_name}.inet"
    if resolvconf.is_symlink():
        return name
    try:
        order = INTERFACE_ORDER.read_text("utf-8", "replace").splitlines()
    except OSError:
        return name
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
    """Whether the command did what it was to do. If not, `complaint` is logged, but not where what is to be taken back
    `goes_with` a device that is no more."""
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
            input=text,  # if there is none: not from the terminal either
            encoding="utf-8",
            errors="replace",
            capture_output=True,
            timeout=timeout,
            check=False,
            start_new_session=True,  # a Ctrl-C on the terminal is for the client, which lets this end
        )
    except (OSError, subprocess.TimeoutExpired) as cause:
        return str(cause)
    return done.stderr.strip()[:200] if done.returncode != 0 else None
