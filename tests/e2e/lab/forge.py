"""Packets that no kernel would send: the lab's attackers.

Headers are built by hand, because an attack needs tens of thousands of packets, each slightly wrong.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable
from ipaddress import IPv4Address

ICMP, TCP, UDP = socket.IPPROTO_ICMP, socket.IPPROTO_TCP, socket.IPPROTO_UDP
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16  # RFC 9293 §3.1
DONT_FRAGMENT, MORE_FRAGMENTS = 0x4000, 0x2000  # RFC 791 §3.1

Endpoint = tuple[str, int]


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def ipv4(
    source: str,
    destination: str,
    protocol: int,
    payload: bytes,
    *,
    identification: int = 0,
    fragment: int = 0,
    ttl: int = 64,
) -> bytes:
    """A packet; `fragment` is flags and offset, as in the header."""
    header = struct.pack(
        "!BBHHHBBH4s4s",
        0x45,
        0,
        20 + len(payload),
        identification,
        fragment,
        ttl,
        protocol,
        0,
        _octets(source),
        _octets(destination),
    )
    return header[:10] + checksum(header).to_bytes(2, "big") + header[12:] + payload


def udp(source: Endpoint, destination: Endpoint, data: bytes = b"", **header: int) -> bytes:
    """A UDP datagram without a checksum, as IPv4 allows."""
    body = struct.pack("!HHHH", source[1], destination[1], 8 + len(data), 0) + data
    return ipv4(source[0], destination[0], UDP, body, **header)


def tcp(
    source: Endpoint,
    destination: Endpoint,
    flags: int,
    *,
    seq: int = 0,
    ack: int = 0,
    data: bytes = b"",
    **header: int,
) -> bytes:
    """A TCP segment without options."""
    body = struct.pack("!HHIIBBHHH", source[1], destination[1], seq, ack, 0x50, flags, 1024, 0, 0) + data
    pseudo = _octets(source[0]) + _octets(destination[0]) + struct.pack("!HH", TCP, len(body))
    body = body[:16] + checksum(pseudo + body).to_bytes(2, "big") + body[18:]
    return ipv4(source[0], destination[0], TCP, body, **header)


def echo_request(source: str, destination: str, identifier: int, **header: int) -> bytes:
    """A ping."""
    return ipv4(source, destination, ICMP, _icmp(8, 0, identifier << 16, b"forged"), **header)


def icmp_error(source: str, destination: str, kind: int, code: int, rest: int, quoted: bytes) -> bytes:
    """An ICMP error about the packet `quoted`."""
    return ipv4(source, destination, ICMP, _icmp(kind, code, rest, quoted))


def fragmentation_needed(source: str, destination: str, mtu: int, quoted: bytes) -> bytes:
    """*Fragmentation needed and DF set* (RFC 1191 §4)."""
    return icmp_error(source, destination, 3, 4, mtu, quoted)


def send(packets: Iterable[bytes]) -> int:
    """Sends whole packets from the caller's namespace. Returns how many. Headers must be correct: the kernel sets total
    length and checksum itself."""
    sent = 0
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sender:
        for packet in packets:
            sender.sendto(packet, (socket.inet_ntoa(packet[16:20]), 0))
            sent += 1
    return sent


def inject(interface: str, packets: Iterable[bytes], *, to: bytes = b"\0" * 6) -> int:
    """Sends packets through one interface exactly as they are, to the station `to`. Returns how many the kernel
    accepted: some interfaces refuse what is not a packet at all, and a queue may be full."""
    sent = 0
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0) as sender:
        for packet in packets:
            try:
                sender.sendto(packet, (interface, 0x0800, 0, 0, to))
            except OSError as refused:
                if refused.errno not in {errno.EINVAL, errno.ENOBUFS}:
                    raise
            else:
                sent += 1
    return sent


def _icmp(kind: int, code: int, rest: int, data: bytes) -> bytes:
    body = struct.pack("!BBHI", kind, code, 0, rest) + data
    return body[:2] + checksum(body).to_bytes(2, "big") + body[4:]


def _octets(address: str) -> bytes:
    return IPv4Address(address).packed
