"""Resolves host names without holding anything up: the C library's look-up cannot be cancelled, so it runs in a thread
of its own, which nothing waits for at the end."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from ipaddress import AddressValueError, IPv4Address

from tidegate.daemon_thread import in_daemon_thread
from tidegate.errors import HostNetworkError
from tidegate.net import Endpoint, is_connectable

RESOLVE_TIMEOUT = 10.0  # seconds


async def resolve(endpoint: Endpoint, own: IPv4Address) -> IPv4Address:
    """The endpoint's IPv4 address, the first at which a gateway can be (`can_be_a_gateway`). `own` is the tunnel's. May
    be cancelled. Raises `HostNetworkError`."""
    with suppress(AddressValueError):
        return IPv4Address(endpoint.host)
    try:
        async with asyncio.timeout(RESOLVE_TIMEOUT):
            found = await in_daemon_thread("look-up", lambda: _look_up(endpoint))
    except TimeoutError:
        raise HostNetworkError(
            f"{endpoint.host} could not be resolved within {RESOLVE_TIMEOUT:g} s"
        ) from None
    except OSError as cause:
        raise HostNetworkError(f"{endpoint.host} cannot be resolved: {cause.strerror}") from cause
    for address in found:
        if can_be_a_gateway(address, own):
            return address
    raise HostNetworkError(
        f"{endpoint.host} resolves to {found[0]}, which is no gateway's address",
        hint="does a DNS filter block the name?",
    )


def can_be_a_gateway(address: IPv4Address, own: IPv4Address) -> bool:
    """Whether a look-up may lead to this address: filters answer 0.0.0.0 for a name that they block, and `own`, the
    tunnel's, would send the tunnel into itself. A loopback address may be that of a relay (udp2raw, wstunnel)."""
    return is_connectable(address) and address != own


def _look_up(endpoint: Endpoint) -> list[IPv4Address]:
    try:
        found = socket.getaddrinfo(
            endpoint.host, endpoint.port, family=socket.AF_INET, type=socket.SOCK_DGRAM
        )
    except UnicodeError:  # no IDNA encoding, as for labels of more than 63 letters
        raise socket.gaierror(socket.EAI_NONAME, "not a host name") from None
    return [IPv4Address(entry[4][0]) for entry in found]
