"""Packets, made and judged by scapy."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption
from scapy.packet import Packet, Raw

EXTERNAL = "203.0.113.1"
ROUTER = "192.0.2.254"
"""Somewhere on the way."""

ECHO_REPLY, UNREACHABLE, ECHO, TIME_EXCEEDED, PARAMETER_PROBLEM = 0, 3, 8, 11, 12  # RFC 792
TIMESTAMP, TIMESTAMP_REPLY = 13, 14  # RFC 792


class Endpoint(NamedTuple):
    """An address and a port, or an ICMP identifier in the port's place."""

    address: str
    port: int


class Header(NamedTuple):
    """The fields of an IPv4 header that are none of a NAT's business."""

    tos: int
    identification: int
    dont_fragment: bool
    ttl: int
    options: bytes


PLAIN = Header(tos=0, identification=1, dont_fragment=True, ttl=64, options=b"")

clients = st.integers(2, 254).map(lambda host: f"10.66.77.{host}")
remotes = st.integers(1, 254).map(lambda host: f"198.51.100.{host}")
ports = st.integers(1, 65535)
payloads = st.binary(max_size=64) | st.integers(0, 1200).map(
    lambda length: bytes(i % 251 for i in range(length))
)
headers = st.builds(
    Header,
    tos=st.integers(0, 255),
    identification=st.integers(0, 65535),
    dont_fragment=st.booleans(),
    ttl=st.integers(1, 255),
    options=st.one_of(
        st.just(b""),
        st.integers(1, 10).map(lambda words: b"\x01" * 4 * words),  # no operation (RFC 791)
        st.just(b"\x94\x04\x00\x00"),  # router alert (RFC 2113)
        st.binary(min_size=8, max_size=8).map(
            lambda route: b"\x07\x0b\x0c" + route + b"\x01"
        ),  # record route
    ),
)


def ip(source: str, destination: str, header: Header = PLAIN) -> Packet:
    """An IPv4 header, to which a payload can be appended."""
    return IP(
        src=source,
        dst=destination,
        tos=header.tos,
        id=header.identification,
        flags="DF" if header.dont_fragment else 0,
        ttl=header.ttl,
        options=[IPOption(header.options)] if header.options else [],
    )


def udp(
    source: Endpoint,
    destination: Endpoint,
    payload: bytes = b"",
    header: Header = PLAIN,
    *,
    checksum: bool = True,
) -> bytes:
    """A datagram; one without checksum says so with a zero (RFC 768)."""
    transport = UDP(sport=source.port, dport=destination.port, chksum=None if checksum else 0)
    return bytes(ip(source.address, destination.address, header) / transport / Raw(payload))


def tcp(
    source: Endpoint,
    destination: Endpoint,
    flags: str,
    sequence: int,
    acknowledgment: int = 0,
    payload: bytes = b"",
    header: Header = PLAIN,
) -> bytes:
    """A segment; a SYN comes with the usual options, an odd number of bytes of them among them."""
    options = [("MSS", 1460), ("SAckOK", b""), ("Timestamp", (7, 0)), ("NOP", None), ("WScale", 7)]
    transport = TCP(
        sport=source.port,
        dport=destination.port,
        flags=flags,
        seq=sequence,
        ack=acknowledgment,
        window=1000,
        options=options if "S" in flags else [("NOP", None), ("NOP", None), ("Timestamp", (8, 7))],
    )
    return bytes(ip(source.address, destination.address, header) / transport / Raw(payload))


def query(
    kind: int, source: str, destination: str, identifier: int, payload: bytes = b"", header: Header = PLAIN
) -> bytes:
    """An ICMP query, or the answer to one."""
    message = ICMP(type=kind, id=identifier, seq=1)
    return bytes(ip(source, destination, header) / message / Raw(payload))


def error(
    source: str,
    destination: str,
    quoted: bytes,
    kind: int = UNREACHABLE,
    code: int = 1,
    header: Header = PLAIN,
) -> bytes:
    """An ICMP error about the packet `quoted`."""
    return bytes(ip(source, destination, header) / ICMP(type=kind, code=code) / Raw(quoted))


def with_fields(packet: bytes, **fields: int) -> bytes:
    """The packet with other fields in its IPv4 header, and the right header checksum."""
    parsed = IP(packet)
    for name, value in fields.items():
        setattr(parsed, name, value)
    del parsed.chksum
    return bytes(parsed)


def identification(packet: bytes) -> int:
    """The identification field."""
    value: int = IP(packet).id
    return value


def source(packet: bytes) -> Endpoint:
    """Address and port (or ICMP identifier) that the packet comes from."""
    parsed = IP(packet)
    return Endpoint(parsed.src, parsed[ICMP].id if ICMP in parsed else parsed.payload.sport)


def destination(packet: bytes) -> Endpoint:
    """Address and port (or ICMP identifier) that the packet goes to."""
    parsed = IP(packet)
    return Endpoint(parsed.dst, parsed[ICMP].id if ICMP in parsed else parsed.payload.dport)


def remade(packet: bytes) -> bytes:
    """The packet as scapy would have made it: with its own lengths and checksums."""
    parsed = IP(packet)
    del parsed.chksum, parsed.len
    transport = parsed.payload
    if not (UDP in parsed and transport.chksum == 0):
        del transport.chksum
    return bytes(parsed)
