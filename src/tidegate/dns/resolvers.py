"""The resolvers that the proxy asks: the configured ones, or those of the host's resolv.conf(5)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import AddressValueError, IPv4Address
from pathlib import Path

RESOLV_CONF = Path("/etc/resolv.conf")
BEHIND_THE_STUB = Path("/run/systemd/resolve/resolv.conf")
"""The servers that systemd-resolved itself asks; /etc/resolv.conf then names its stub (systemd-resolved(8))."""
MAX_RESOLVERS = 3  # MAXNS, resolv.conf(5)
DNS_PORT = 53

Resolver = tuple[str, int]


def choose_upstreams(
    configured: Sequence[IPv4Address], *, own: IPv4Address, resolv_conf: Path = RESOLV_CONF
) -> list[Resolver]:
    """The resolvers to ask, in order; never the proxy itself. IPv6 ones are left out, for now."""
    candidates = configured or _from_file(resolv_conf)
    return [(str(address), DNS_PORT) for address in dict.fromkeys(candidates) if address != own]


def host_resolvers() -> list[Resolver]:
    """The resolvers that this host ultimately asks."""
    path = BEHIND_THE_STUB if BEHIND_THE_STUB.exists() else RESOLV_CONF
    return [(str(address), DNS_PORT) for address in _from_file(path)]


def _from_file(path: Path) -> Iterable[IPv4Address]:
    try:
        lines = path.read_text("utf-8", "replace").splitlines()
    except OSError:
        return []
    found: list[IPv4Address] = []
    for line in lines:
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            try:
                found.append(IPv4Address(words[1]))
            except AddressValueError:
                continue  # IPv6, or nonsense that the host's own resolver ignores too
    return found[:MAX_RESOLVERS]
