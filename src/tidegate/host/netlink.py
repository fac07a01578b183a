"""rtnetlink: a snapshot of the host's network, and notifications of changes to it.

pyroute2 reads and writes all but routes, which are read by `tidegate.host.route_dump`; it is imported on first use,
because that takes a fifth of a second. Notifications need no parsing (whatever changed, everything is read again), so
they come through a plain netlink socket in the event loop.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from typing import Any

import structlog

from tidegate.errors import HostNetworkError
from tidegate.host import Host, HostNetwork, Interface, InterfaceAddress, Route
from tidegate.host.ports import check_listen_port, kept_ports
from tidegate.host.privileges import check_privileges
from tidegate.host.route_dump import (
    RTA_GATEWAY,
    RTA_PREFSRC,
    RTA_PRIORITY,
    RTA_TABLE,
    RTA_VIA,
    DumpInterruptedError,
    RouteMessage,
    dump_routes,
    next_hops,
    number,
)

log = structlog.get_logger("tidegate.netlink")

READ_ATTEMPTS = 5
"""A dump during which something changed is inconsistent (NLM_F_DUMP_INTR), and is repeated."""

TUN_QUEUE_PACKETS = 2000
"""Packets that the kernel queues for us on a TUN device: 10 ms of small ones at 200,000 a second. With the kernel's
default of 500, a process that fills the device gets a few ms ahead of us whenever the scheduler lets it run that long,
and packets are lost although cores are idle."""

TRAIN_BYTES, TRAIN_SEGMENTS = 65_507, 64
"""The most that one send of the transport carries, as in engine/src/transport/mod.rs."""

SEALING_BYTES = 32
"""Header and tag of a data message (WireGuard whitepaper §5.4.6)."""

SHORTEST_HEADERS = 40
"""IPv4 and TCP without options: the minimum that a segment has in addition to its payload."""

LARGEST_SUPERPACKET = 65_536
"""A TUN device's own limit (``GSO_LEGACY_MAX_SIZE`` of linux/netdevice.h)."""

MAX_TCP_HEADER = 320
"""The most that the kernel reserves of that for headers (net/tcp.h); 128 with some configurations."""

ARPHRD_ETHER = 1  # linux/if_arp.h
IFF_UP = 1  # linux/if.h
RTN_UNICAST, RTN_UNREACHABLE = 1, 7  # linux/rtnetlink.h
RTNLGRP_LINK, RTNLGRP_IPV4_IFADDR = 1, 5  # linux/rtnetlink.h
RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV4_RULE, RTNLGRP_IPV6_ROUTE, RTNLGRP_IPV6_RULE = 7, 8, 11, 19  # the same
IN6_ADDR_GEN_MODE_NONE = 1  # linux/if_link.h
INET6_PROC = Path("/proc/net/if_inet6")  # absent where IPv6 is switched off
GATEWAY_GROUPS = (RTNLGRP_LINK, RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV4_ROUTE)
"""The netlink groups that concern a gateway's external link."""
CLIENT_GROUPS = (
    RTNLGRP_LINK,
    RTNLGRP_IPV4_ROUTE,
    RTNLGRP_IPV4_RULE,
    RTNLGRP_IPV6_ROUTE,
    RTNLGRP_IPV6_RULE,
)
"""The netlink groups that concern a client's routes into its tunnel."""


class LinuxHost(Host):
    """The host that this process runs on (its network namespace)."""

    def check_privileges(self) -> None:
        check_privileges()

    def check_listen_port(self, address: IPv4Address, port: int) -> None:
        check_listen_port(address, port)

    def kept_ports(self) -> tuple[int, int]:
        return kept_ports()

    def read_network(self) -> HostNetwork:
        return read_network()

    def configure_tun(self, name: str, address: IPv4Interface, mtu: int) -> None:
        configure_tun(name, address, mtu)

    @contextmanager
    def watch(self, changed: Callable[[], None]) -> Iterator[None]:
        with watch(changed, GATEWAY_GROUPS):
            yield


def read_network() -> HostNetwork:
    """A snapshot of the host's network. Raises `HostNetworkError`."""
    from pyroute2 import NetlinkDumpInterrupted  # noqa: PLC0415 -- slow to import

    for _ in range(READ_ATTEMPTS - 1):
        try:
            return _read_once()
        except HostNetworkError as cause:
            if not isinstance(cause.__cause__, NetlinkDumpInterrupted | DumpInterruptedError):
                raise
            log.debug("the host's network changed while it was read")
    return _read_once()


def _read_once() -> HostNetwork:
    with rtnetlink("read the host's network") as ip:
        return HostNetwork(
            interfaces=tuple(map(_interface, ip.get_links())),
            addresses=tuple(
                InterfaceAddress(message["index"], _address(message))
                for message in ip.get_addr(family=socket.AF_INET)
            ),
            routes=tuple(
                route
                for message in dump_routes(socket.AF_INET, kind=RTN_UNICAST)
                if message.kind == RTN_UNICAST
                for route in _routes(message)
            ),
        )


def configure_tun(name: str, address: IPv4Interface, mtu: int) -> None:
    """Gives our own TUN device its MTU and address, and brings it up; also one that has part of that already. Raises
    `HostNetworkError`."""
    with rtnetlink(f"configure {name}") as ip:
        found = list(ip.link_lookup(ifname=name))
        if not found:
            raise HostNetworkError(f"the TUN device {name} is gone")
        if INET6_PROC.exists():
            # The tunnel carries no IPv6: without a link-local address, the kernel sends no solicitations into it.
            inet6 = {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", IN6_ADDR_GEN_MODE_NONE)]}
            ip.link("set", index=found[0], IFLA_AF_SPEC={"attrs": [("AF_INET6", inet6)]})
        ip.link("set", index=found[0], mtu=mtu, txqlen=TUN_QUEUE_PACKETS)
        _fit_superpackets(ip, found[0], mtu)
        ip.addr("replace", index=found[0], address=str(address.ip), prefixlen=address.network.prefixlen)
        ip.link("set", index=found[0], state="up")


def superpacket_bytes(mtu: int) -> int:
    """The maximum size of a TUN device's superpackets, in bytes, at which the sealed segments of one fill one train.

    By default the kernel makes a superpacket of 47 segments of the usual MTU. Sealed, 45 of them fill a train, and the
    other two would leave in a second train, at the price of a full one. Segments so small that their number, not their
    size, fills a train take two trains either way.
    """
    segments = max(1, TRAIN_BYTES // (mtu + SEALING_BYTES))
    if segments > TRAIN_SEGMENTS:
        return LARGEST_SUPERPACKET
    return min(LARGEST_SUPERPACKET, segments * (mtu - SHORTEST_HEADERS) + 1 + MAX_TCP_HEADER)


def _fit_superpackets(ip: Any, index: int, mtu: int) -> None:
    from pyroute2 import NetlinkError  # noqa: PLC0415 -- slow to import

    size = superpacket_bytes(mtu)
    try:
        ip.link("set", index=index, gso_max_size=size)
    except NetlinkError as cause:
        log.debug("superpackets keep their size", bytes=size, error=str(cause.args[-1]))


@contextmanager
def watch(changed: Callable[[], None], groups: Sequence[int]) -> Iterator[None]:
    """Calls `changed` in the running loop when the netlink groups report a change; several changes may cause one
    call."""
    loop = asyncio.get_running_loop()
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE
    ) as notices:
        notices.bind((0, sum(1 << (group - 1) for group in groups)))

        def readable() -> None:
            try:
                while notices.recv(65536):
                    pass
            except BlockingIOError:
                pass
            except OSError:
                pass  # ENOBUFS: notifications were lost, which is notification enough
            changed()

        loop.add_reader(notices, readable)
        try:
            yield
        finally:
            loop.remove_reader(notices)


@contextmanager
def rtnetlink(doing: str) -> Iterator[Any]:
    """An rtnetlink socket of pyroute2, whose errors become a `HostNetworkError` that says what was being done."""
    from pyroute2 import IPRoute, NetlinkError  # noqa: PLC0415 -- slow to import

    try:
        with IPRoute() as ip:
            yield ip
    except NetlinkError as cause:
        raise HostNetworkError(f"cannot {doing}: {cause.args[-1]}") from cause
    except OSError as cause:
        raise HostNetworkError(f"cannot {doing}: {cause.strerror or cause}") from cause


def _interface(message: Any) -> Interface:
    ethernet = message["ifi_type"] == ARPHRD_ETHER
    mac = message.get("IFLA_ADDRESS")
    return Interface(
        index=message["index"],
        name=message.get("IFLA_IFNAME"),
        mac=bytes.fromhex(mac.replace(":", "")) if ethernet and mac else None,
        mtu=message.get("IFLA_MTU"),
        up=bool(message["flags"] & IFF_UP),
        ethernet=ethernet,
    )


def _address(message: Any) -> IPv4Interface:
    # On a point-to-point interface IFA_ADDRESS is the other end's and IFA_LOCAL ours (linux/if_addr.h).
    local = message.get("IFA_LOCAL") or message.get("IFA_ADDRESS")
    return IPv4Interface(f"{local}/{message['prefixlen']}")


def _routes(message: RouteMessage) -> Iterator[Route]:
    """A route; a multipath one as several."""
    attributes = message.attributes()
    destination = message.destination(attributes)
    assert isinstance(destination, IPv4Network)
    source = attributes.get(RTA_PREFSRC)
    for device, hop in next_hops(attributes):
        if RTA_VIA in hop:  # an IPv6 router for IPv4 (RFC 5549): not supported
            continue
        gateway = hop.get(RTA_GATEWAY)
        yield Route(
            destination=destination,
            gateway=IPv4Address(gateway) if gateway else None,
            index=device,
            metric=number(attributes, RTA_PRIORITY),
            table=number(attributes, RTA_TABLE) or message.table,
            source=IPv4Address(source) if source else None,
        )
