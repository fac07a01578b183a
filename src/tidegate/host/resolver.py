"""Tells the client's resolver about the tunnel's DNS servers, with whatever manages resolv.conf here."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ipaddress import IPv4Address
from pathlib import Path

import structlog

log = structlog.get_logger("tidegate.resolver")

SYSTEMD_RESOLVED = Path("/run/systemd/resolve/io.systemd.Resolve")
TIMEOUT = 10  # seconds for a helper command


@contextmanager
def configured_dns(
    tun_name: str, servers: Sequence[IPv4Address], search: Sequence[str]
) -> Iterator[str | None]:
    """Uses the servers while the block lasts; gives the manager's name, or `None` where there is none that
    could be told (then nothing was changed)."""
    addresses = [str(server) for server in servers]
    if SYSTEMD_RESOLVED.exists() and (resolvectl := shutil.which("resolvectl")):
        told = _run([resolvectl, "dns", tun_name, *addresses]) and _run(
            [resolvectl, "domain", tun_name, "~.", *search]
        )
        undo = [resolvectl, "revert", tun_name]
        name = "systemd-resolved"
    elif resolvconf := shutil.which("resolvconf"):
        text = "".join(f"nameserver {address}\n" for address in addresses)
        text += f"search {' '.join(search)}\n" if search else ""
        told = _run([resolvconf, "-a", f"{tun_name}.inet", "-m", "0", "-x"], text)
        undo = [resolvconf, "-d", f"{tun_name}.inet", "-f"]
        name = "resolvconf"
    else:
        yield None
        return
    try:
        yield name if told else None
    finally:
        _run(undo)


def _run(command: list[str], text: str | None = None) -> bool:
    try:
        done = subprocess.run(
            command, input=text, text=True, capture_output=True, timeout=TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as cause:
        log.warning("a resolver command failed", command=command[0], cause=str(cause))
        return False
    if done.returncode != 0:
        log.warning("a resolver command failed", command=" ".join(command), cause=done.stderr.strip()[:200])
    return done.returncode == 0
