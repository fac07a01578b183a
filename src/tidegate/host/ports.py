"""Ports of the host: whether one is free, which process holds it otherwise, and which its programs need."""

from __future__ import annotations

import contextlib
import errno
import socket
from ipaddress import IPv4Address
from pathlib import Path

from tidegate.errors import ConflictError, HostNetworkError, PrivilegeError

LOCAL_PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
USUAL_PORT_RANGE = (32768, 60999)
"""The kernel's own."""
KEPT_PART = 4


def kept_ports(file: Path = LOCAL_PORT_RANGE) -> tuple[int, int]:
    """The last quarter, both ends included, of the ports from which the kernel gives one to a program that asks for
    none in particular, as for a query or a connection. Where the NAT had all of those, the host, and with it the DNS
    proxy, could reach nobody."""
    first, last = USUAL_PORT_RANGE
    with contextlib.suppress(OSError, ValueError):
        first, last = map(int, file.read_text().split())
    return last - (last - first) // KEPT_PART, last


def check_listen_port(address: IPv4Address, port: int) -> None:
    """Raises the error of `explain_bind` if no UDP socket can be bound there.

    The engine's own sockets share their port with SO_REUSEPORT; this one does not, so that it also finds a port that
    another process would share.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((str(address), port))
        except OSError as cause:
            raise explain_bind(
                cause, "UDP", str(address), port, hint="choose another with --listen"
            ) from cause


def explain_bind(cause: OSError, kind: str, address: str, port: int, *, hint: str) -> Exception:
    """Why a bind failed, as an exception to raise; it names the process that holds the port, if that can be found."""
    where = f"{kind} {address}:{port}"
    match cause.errno:
        case errno.EADDRINUSE:
            holder = holder_of(kind, port)
            return ConflictError(
                f"port {port} is in use: {where}{f' is held by {holder}' if holder else ''}", hint=hint
            )
        case errno.EADDRNOTAVAIL:
            return HostNetworkError(f"{address} is not an address of this host", hint=hint)
        case errno.EACCES | errno.EPERM:
            return PrivilegeError(
                f"{where} cannot be bound: permission denied", hint=f"grant CAP_NET_BIND_SERVICE, or {hint}"
            )
    return HostNetworkError(f"{where} cannot be bound: {cause.strerror}", hint=hint)


def holder_of(kind: str, port: int, proc: Path = Path("/proc")) -> str | None:
    """The process that has a socket on `port`, as ``name (pid 12)``; `None` if it cannot be found."""
    inodes = _socket_inodes(proc / "net" / kind.lower(), port)
    if not inodes:
        return None
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for process in proc.iterdir():
        if not process.name.isdigit():
            continue
        try:
            if any(str(link.readlink()) in wanted for link in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text().strip()} (pid {process.name})"
        except OSError:
            continue  # gone meanwhile, or not ours to look at
    return None


def _socket_inodes(table: Path, port: int) -> set[str]:
    """proc(5): local_address is ``ADDRESS:PORT`` in hexadecimal, the tenth column is the inode."""
    try:
        lines = table.read_text().splitlines()[1:]
    except OSError:
        return set()
    columns = (line.split() for line in lines)
    return {row[9] for row in columns if len(row) > 9 and int(row[1].rpartition(":")[2], 16) == port}
