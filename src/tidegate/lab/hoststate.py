"""The proof that a host was not touched: its kernel's configuration, read before, during and after.

Configuration is what an administrator sets: routes, rules, the nftables ruleset, sysctls, NIC features, addresses and
links; not what the kernel counts or learns by itself (neighbours, read-only files under /proc/sys). The one thing that
a gateway may add is its own TUN device; lines that mention it are set apart and shown.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tidegate.lab.processes import which
from tidegate.lab.topology import Namespace

# Written by the kernel itself each time a process starts, although the file is writable.
_KERNEL_COUNTERS = frozenset({"kernel.ns_last_pid"})


_COUNTERS = re.compile(r" ?\[\d+:\d+\]")
"""Packet and byte counters of a chain, in the output of iptables-save(8)."""


@dataclass(frozen=True)
class HostState:
    """The configuration of one host's network, as lists of lines by aspect."""

    aspects: Mapping[str, list[str]]

    @classmethod
    def read(cls, host: Namespace) -> HostState:
        """Reads everything; takes about a tenth of a second."""

        def lines(*command: str) -> list[str]:
            return host.run(command).stdout.splitlines()

        features = []
        for interface in sorted(host.interfaces() - {"lo"}):
            features += [f"{interface} {line.strip()}" for line in lines("ethtool", "-k", interface)]
        return cls(
            {
                "routes": lines("ip", "route", "show", "table", "all")
                + lines("ip", "-6", "route", "show", "table", "all"),
                "rules": lines("ip", "rule") + lines("ip", "-6", "rule"),
                "nftables": lines("nft", "list", "ruleset"),
                "iptables": _iptables(host),
                "sysctls": _sysctls(host),
                "NIC features": features,
                "links": lines("ip", "-o", "link"),
                "addresses": lines("ip", "-o", "address"),
            }
        )

    @property
    def forwards(self) -> bool:
        """Whether the host's kernel forwards IPv4 packets (`ip_forward`)."""
        return "net.ipv4.ip_forward = 1" in self.aspects["sysctls"]


@dataclass(frozen=True)
class Comparison:
    """How a host differs from what it was."""

    differences: list[str]
    """Lines that came or went, as ``routes: + 10.0.0.0/8 …``."""
    set_apart: dict[str, list[str]] = field(default_factory=dict)
    """By aspect, the lines about the gateway's own TUN device, which were not compared."""

    @property
    def untouched(self) -> bool:
        return not self.differences


def compare(before: HostState, now: HostState, own_devices: set[str]) -> Comparison:
    """Compares two readings, setting apart what mentions one of `own_devices`."""
    differences, set_apart = [], {}
    for aspect, old in before.aspects.items():
        own = [line for line in now.aspects[aspect] if _mentions(line, own_devices)]
        if own:
            set_apart[aspect] = own
        rest = [line for line in now.aspects[aspect] if not _mentions(line, own_devices)]
        for line in difflib.ndiff(old, rest):
            if line[0] in "+-":
                differences.append(f"{aspect}: {line[0]} {line[2:]}")
    return Comparison(differences, set_apart)


def tun_devices(host: Namespace) -> set[str]:
    """The names of the host's TUN devices (and of no others: not bridges, not WireGuard, not TAP)."""
    listed = host.run(["ip", "-d", "-o", "link", "show", "type", "tun"]).stdout.splitlines()
    return {line.split(": ")[1].partition("@")[0] for line in listed if " tun type tun " in line}


def _mentions(line: str, devices: set[str]) -> bool:
    """Whether a line is about one of the devices, in any of the forms that the tools use."""
    return any(
        re.search(rf"(\bdev |^\d+: |^|\.(conf|neigh)\.){re.escape(name)}(?=[ :.@]|$)", line)
        for name in devices
    )


def _sysctls(host: Namespace) -> list[str]:
    settings = []
    for line in host.run(["sysctl", "-a"], check=False).stdout.splitlines():
        key = line.partition(" = ")[0]
        if key not in _KERNEL_COUNTERS and _is_setting(key):
            settings.append(line)
    return settings


def _is_setting(key: str) -> bool:
    """Whether the file behind a sysctl can be written; the rest are the kernel's own figures (file-nr, uuid, …)."""
    # sysctl(8) swaps dots and slashes: `net.ipv4.conf.eth0/1.forwarding` is conf/eth0.1/forwarding.
    path = Path("/proc/sys") / key.translate(str.maketrans("./", "/."))
    try:
        return bool(path.stat().st_mode & 0o222)
    except FileNotFoundError:
        return True  # exists only inside the namespace, as the settings of its interfaces do


def _iptables(host: Namespace) -> list[str]:
    """The tables of the older interface, which nft may not show, and their rules if a program that prints them is
    installed."""
    lines = []
    for family in ("ip", "ip6", "arp"):
        names = host.run(["cat", f"/proc/net/{family}_tables_names"], check=False).stdout.split()
        lines += [f"{family} {name}" for name in sorted(names)]
        program = f"{family}tables-legacy-save"
        if names and which(program):
            for line in host.run([program]).stdout.splitlines():
                if not line.startswith("#"):  # the time of day
                    lines.append(f"{family} {_COUNTERS.sub('', line)}")
    return lines
