"""The host as Tidegate sees it: read through netlink, and never changed except for our own TUN device (a client also
adds routes and rules, and removes them again)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Protocol

MAIN_TABLE = 254  # RT_TABLE_MAIN, linux/rtnetlink.h


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface."""

    index: int
    name: str
    mac: bytes | None
    """6 bytes; `None` if the interface has no Ethernet address."""
    mtu: int
    up: bool
    ethernet: bool
    """Whether frames on it carry an Ethernet header (ARPHRD_ETHER)."""


@dataclass(frozen=True, slots=True)
class InterfaceAddress:
    """An IPv4 address of an interface, in the kernel's order (primary ones first)."""

    index: int
    address: IPv4Interface


@dataclass(frozen=True, slots=True)
class Route:
    """An IPv4 unicast route."""

    destination: IPv4Network
    gateway: IPv4Address | None
    index: int
    """The interface's index; 0 if the route has none (blackhole, unreachable)."""
    metric: int
    table: int
    source: IPv4Address | None


@dataclass(frozen=True, slots=True)
class HostNetwork:
    """A snapshot of interfaces, addresses and routes. Loopback's own routes are left out."""

    interfaces: tuple[Interface, ...]
    addresses: tuple[InterfaceAddress, ...]
    routes: tuple[Route, ...]

    def interface_named(self, name: str) -> Interface | None:
        return next((interface for interface in self.interfaces if interface.name == name), None)

    def interface_at(self, index: int) -> Interface | None:
        return next((interface for interface in self.interfaces if interface.index == index), None)


class Host(Protocol):
    """What a gateway needs from its host. Methods block briefly: call them from a worker thread."""

    def check_privileges(self) -> None:
        """Raises `PrivilegeError`."""

    def check_listen_port(self, address: IPv4Address, port: int) -> None:
        """Raises `ConflictError` or `HostNetworkError` if a UDP socket cannot be bound there."""

    def kept_ports(self) -> tuple[int, int]:
        """The ports that the host's programs cannot do without, both included."""

    def read_network(self) -> HostNetwork: ...

    def configure_tun(self, name: str, address: IPv4Interface, mtu: int) -> None:
        """Gives our own TUN device its address and MTU, and brings it up."""

    def watch(self, changed: Callable[[], None]) -> AbstractContextManager[None]:
        """Calls `changed` in the running event loop when links, addresses or routes change."""
