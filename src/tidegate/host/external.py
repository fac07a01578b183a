"""Which interface leads to the internet, and what the engine must know about it. Pure functions of a snapshot."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network

from tidegate.engine import ExternalLink
from tidegate.errors import HostNetworkError
from tidegate.host import MAIN_TABLE, HostNetwork, Interface, Route
from tidegate.settings import ExternalSettings

DEFAULT_ROUTE = IPv4Network("0.0.0.0/0")


def external_link(network: HostNetwork, settings: ExternalSettings) -> ExternalLink:
    """The external interface: the one that the settings name, or that of the host's default route.

    Raises `HostNetworkError` if there is none, or if it cannot be used.
    """
    default = _default_route(network, settings.interface)
    interface = _interface(network, settings, default)
    addresses = _addresses(network, settings, interface, default)
    on_link = sorted(
        {
            route.destination
            for route in network.routes
            if route.table == MAIN_TABLE and route.index == interface.index and route.gateway is None
        }
    )
    assert interface.mac is not None, "_interface refuses those without"
    return ExternalLink(
        interface=interface.name,
        index=interface.index,
        mac=interface.mac,
        mtu=interface.mtu,
        addresses=tuple(map(str, addresses)),
        on_link=tuple(map(str, on_link)),
        router=str(default.gateway) if default is not None and default.gateway is not None else None,
    )


def host_addresses(network: HostNetwork, *, tun_name: str) -> tuple[str, ...]:
    """The host's own addresses, except those of loopback and of our TUN device."""
    ours = network.interface_named(tun_name)
    return tuple(
        str(entry.address.ip)
        for entry in network.addresses
        if not entry.address.ip.is_loopback and (ours is None or entry.index != ours.index)
    )


def check_subnet(network: HostNetwork, subnet: IPv4Network, *, tun_name: str) -> None:
    """Raises `HostNetworkError` if the VPN's subnet overlaps anything that the host reaches by another route. No
    `SettingsError`: the same setting may do when the host's network is another."""
    ours = network.interface_named(tun_name)
    hint = "choose another with [gateway] subnet"
    for entry in network.addresses:
        if (ours is None or entry.index != ours.index) and entry.address.network.overlaps(subnet):
            interface = network.interface_at(entry.index)
            name = interface.name if interface else f"interface {entry.index}"
            raise HostNetworkError(f"subnet {subnet} overlaps {entry.address} of {name}", hint=hint)
    for route in network.routes:
        if ours is not None and route.index == ours.index:
            continue
        if route.destination.prefixlen > 0 and route.destination.overlaps(subnet):
            interface = network.interface_at(route.index)
            way = f" via {route.gateway}" if route.gateway else ""
            way += f" dev {interface.name}" if interface else ""
            raise HostNetworkError(
                f"subnet {subnet} overlaps the host's route {route.destination}{way}", hint=hint
            )


def _default_route(network: HostNetwork, interface: str | None) -> Route | None:
    wanted = network.interface_named(interface) if interface else None
    candidates = [
        route
        for route in network.routes
        if route.destination == DEFAULT_ROUTE
        and route.table == MAIN_TABLE
        and route.index
        and (interface is None or (wanted is not None and route.index == wanted.index))
    ]
    return min(candidates, key=lambda route: route.metric, default=None)


def _interface(network: HostNetwork, settings: ExternalSettings, default: Route | None) -> Interface:
    usable = [interface.name for interface in network.interfaces if interface.ethernet]
    listed = f"this host has {', '.join(usable)}" if usable else "this host has no Ethernet interface"
    if settings.interface is not None:
        found = network.interface_named(settings.interface)
        if found is None:
            raise HostNetworkError(f"there is no interface {settings.interface!r}", hint=listed)
    elif default is None:
        raise HostNetworkError(
            "the host has no default route for IPv4, so the external interface is not known",
            hint=f"name it with --external ({listed}); it needs IPv4",
        )
    else:
        found = network.interface_at(default.index)
        if found is None:
            raise HostNetworkError(
                f"the default route's interface (index {default.index}) is gone", hint="try again"
            )
    if not found.ethernet or found.mac is None:
        raise HostNetworkError(
            f"{found.name} is not an Ethernet interface, so it cannot be the external one",
            hint=f"name another with --external ({listed})",
        )
    if not found.up:
        raise HostNetworkError(
            f"the external interface {found.name} is down", hint=f"run `ip link set {found.name} up`"
        )
    return found


def _addresses(
    network: HostNetwork, settings: ExternalSettings, interface: Interface, default: Route | None
) -> Iterable[IPv4Address]:
    present = [entry.address.ip for entry in network.addresses if entry.index == interface.index]
    if settings.addresses:
        for address in settings.addresses:
            if address not in present:
                have = ", ".join(map(str, present)) or "none"
                raise HostNetworkError(
                    f"external address {address} is not an address of {interface.name}", hint=f"it has {have}"
                )
        return settings.addresses
    if not present:
        raise HostNetworkError(
            f"the external interface {interface.name} has no IPv4 address",
            hint="assign one to it: Tidegate needs IPv4",
        )
    if default is not None and default.source in present:
        return [default.source]
    return present[:1]
