"""The kernel's routes, as rtnetlink(7) dumps them.

A host may have any number of routes, a router a million, and pyroute2 takes some 0.2 ms to decode one. So they are read
here: the kernel is asked for no more than what is wanted, and of a message only that is decoded which somebody looks
at.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import IPv4Network, IPv6Network, ip_network

SOL_NETLINK, NETLINK_GET_STRICT_CHK = 270, 12  # linux/socket.h, linux/netlink.h
NLM_F_REQUEST, NLM_F_DUMP, NLM_F_DUMP_INTR = 0x1, 0x300, 0x10  # linux/netlink.h
NLMSG_ERROR, NLMSG_DONE = 2, 3  # the same
RTM_NEWROUTE, RTM_GETROUTE = 24, 26  # linux/rtnetlink.h
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY = 1, 4, 5, 6  # the same
RTA_PREFSRC, RTA_MULTIPATH, RTA_TABLE, RTA_VIA = 7, 9, 15, 18  # the same
NLA_TYPE_MASK = 0x3FFF  # linux/netlink.h

_MESSAGE = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence number, port."""
_ROUTE = struct.Struct("=BBBBBBBBI")
"""struct rtmsg: family, lengths of the destination's and the source's prefix, TOS, table, protocol, scope, type,
flags."""
_NEXT_HOP = struct.Struct("=HBBi")
"""struct rtnexthop: length, flags, weight, interface."""
_ATTRIBUTE = struct.Struct("=HH")
"""struct rtattr: length, type."""
_NUMBER = struct.Struct("=I")
_ERROR = struct.Struct("=i")
_RECEIVE_BYTES = 65536
"""More than the kernel puts into one datagram of a dump (32 KiB)."""

Attributes = dict[int, bytes]


class DumpInterruptedError(OSError):
    """Something changed during the dump, which may lack routes or have them twice."""


class RouteMessage:
    """One route. Attributes are decoded when they are asked for, each time."""

    __slots__ = ("_data", "family", "kind", "prefix_length", "protocol", "table")

    def __init__(self, data: bytes) -> None:
        self.family, self.prefix_length, _, _, self.table, self.protocol, _, self.kind, _ = (
            _ROUTE.unpack_from(data)
        )
        self._data = data

    def attributes(self) -> Attributes:
        """By their types (`RTA_…`)."""
        return _attributes(self._data, _ROUTE.size)

    def destination(self, attributes: Attributes) -> IPv4Network | IPv6Network:
        everything = bytes(4 if self.family == socket.AF_INET else 16)
        return ip_network((attributes.get(RTA_DST, everything), self.prefix_length))


def dump_routes(
    family: socket.AddressFamily, *, table: int = 0, kind: int = 0, device: int = 0
) -> Iterator[RouteMessage]:
    """The routes of a family; only those of a table, of a kind (`RTN_…`), or through a device, where these are given.
    Linux before 4.20 gives all of them nevertheless. Raises `OSError`."""
    # A table's number may have more bits than the header's field.
    attributes = b"".join(
        _ATTRIBUTE.pack(_ATTRIBUTE.size + _NUMBER.size, what) + _NUMBER.pack(number)
        for what, number in ((RTA_TABLE, table), (RTA_OIF, device))
        if number
    )
    asked = _ROUTE.pack(family, 0, 0, 0, 0, 0, 0, kind, 0) + attributes
    header = _MESSAGE.pack(_MESSAGE.size + len(asked), RTM_GETROUTE, NLM_F_REQUEST | NLM_F_DUMP, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
        with suppress(OSError):
            kernel.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)
        kernel.sendto(header + asked, (0, 0))
        for what, data in _answers(kernel):
            if what == RTM_NEWROUTE and data[0] == family:  # where IPv6 is switched off, others may come
                yield RouteMessage(data)
            elif what in (NLMSG_ERROR, NLMSG_DONE):
                error = -_ERROR.unpack_from(data)[0] if len(data) >= _ERROR.size else 0
                if error and not (error == errno.ENOENT and table):  # otherwise the table does not exist
                    raise OSError(error, os.strerror(error))
                return


def _answers(kernel: socket.socket) -> Iterator[tuple[int, bytes]]:
    """Types and contents of messages, without end."""
    while True:
        received, (sender, _) = kernel.recvfrom(_RECEIVE_BYTES)
        at = 0
        while sender == 0 and at + _MESSAGE.size <= len(received):
            length, what, flags, _, _ = _MESSAGE.unpack_from(received, at)
            if flags & NLM_F_DUMP_INTR:
                raise DumpInterruptedError("dump interrupted")
            yield what, received[at + _MESSAGE.size : at + length]
            at += _aligned(length)


def next_hops(attributes: Attributes) -> Iterator[tuple[int, Attributes]]:
    """Where a route leads: an interface's index (0: nowhere), and the attributes of this hop. A multipath route has
    several."""
    several = attributes.get(RTA_MULTIPATH)
    if several is None:
        yield number(attributes, RTA_OIF), attributes
        return
    at = 0
    while at + _NEXT_HOP.size <= len(several):
        length, _, _, device = _NEXT_HOP.unpack_from(several, at)
        yield device, _attributes(several[at : at + length], _NEXT_HOP.size)
        at += _aligned(length)


def number(attributes: Attributes, what: int) -> int:
    """An attribute that is a number; 0 if it is absent."""
    found = attributes.get(what)
    return 0 if found is None else int(_NUMBER.unpack(found)[0])


def _attributes(data: bytes, at: int) -> Attributes:
    found = {}
    while at + _ATTRIBUTE.size <= len(data):
        length, what = _ATTRIBUTE.unpack_from(data, at)
        found[what & NLA_TYPE_MASK] = data[at + _ATTRIBUTE.size : at + length]
        at += _aligned(length)
    return found


def _aligned(length: int) -> int:
    """Lengths count without the padding to 4 bytes. At least 4, so that nobody goes in circles."""
    return max(4, (length + 3) & ~3)
