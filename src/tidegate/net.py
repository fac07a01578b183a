"""Small network values that settings, profiles and commands share."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address
from typing import Self

MAX_PORT = 65535
BROADCAST = IPv4Address("255.255.255.255")

PRIVATE_NETWORKS = (
    IPv4Network("10.0.0.0/8"),  # RFC 1918
    IPv4Network("172.16.0.0/12"),  # RFC 1918
    IPv4Network("192.168.0.0/16"),  # RFC 1918
    IPv4Network("100.64.0.0/10"),  # RFC 6598
)
"""Where a VPN subnet may lie: address space that the internet does not route."""


def quoted(text: str) -> str:
    """User input as a message repeats it: in quotes, on one line, at most 40 characters."""
    return repr(text if len(text) <= 40 else text[:37] + "...")


def parse_port(text: str) -> int:
    """A port from 1 to 65535. Raises `ValueError`, with a message for people."""
    port = parse_number(text, 1, MAX_PORT)
    if port is None:
        raise ValueError(f"{quoted(text)} is not a port (1 to {MAX_PORT})")
    return port


def parse_number(text: str, least: int, most: int) -> int | None:
    """A number from `least` to `most`, with no more digits than `most` has; `None` if the text is not one."""
    if not (text.isascii() and text.isdigit()) or len(text) > len(str(most)):
        return None
    number = int(text)
    return number if least <= number <= most else None


def is_host_name(text: str) -> bool:
    """Whether `text` may be a host name (RFC 1123 §2.1): letters, digits and hyphens between dots."""
    labels = text.removesuffix(".").split(".")
    return len(text) <= 253 and all(
        0 < len(label) <= 63
        and label.isascii()
        and label.replace("-", "").replace("_", "").isalnum()
        and not label.startswith("-")
        and not label.endswith("-")
        for label in labels
    )


def flaw_in_uri(host: str) -> str | None:
    """What keeps a host name from being the host of a URI (RFC 2396 §3.2.2), in words that follow *has*; `None` if
    nothing does, or if it is an IPv4 address."""
    if "_" in host:
        return "an underscore"
    if host.removesuffix(".").rpartition(".")[2][0].isdigit() and not _is_ipv4(host):
        return "a last label that begins with a digit"
    return None


def is_connectable(address: IPv4Address) -> bool:
    """Whether it can be one host's address, to which others send."""
    return not (address.is_unspecified or address.is_multicast or address == BROADCAST)


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """Where the gateway's UDP socket listens."""

    address: IPv4Address
    port: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """From ``ADDR:PORT``. Raises `ValueError`."""
        host, colon, port = text.rpartition(":")
        if not colon:
            raise ValueError(f'{quoted(text)} is not ADDRESS:PORT, such as "0.0.0.0:51820"')
        try:
            address = IPv4Address(host or "0.0.0.0")
        except AddressValueError:
            raise ValueError(f"{quoted(host)} is not an IPv4 address (write ADDRESS:PORT)") from None
        return cls(address, parse_port(port))

    def reached_at(self, external: str) -> Endpoint:
        """Where clients find the gateway if the settings do not say: at this address, or at `external` if it listens on
        all addresses."""
        host = external if self.address.is_unspecified else str(self.address)
        return Endpoint(host, self.port)

    def __str__(self) -> str:
        return f"{self.address}:{self.port}"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a client finds the gateway: a host name or an IPv4 address, and a UDP port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str, default_port: int | None = None) -> Self:
        """From ``HOST:PORT``, or ``HOST`` where there is a default port. Raises `ValueError`."""
        host, colon, port = text.rpartition(":")
        if text.startswith("[") or _is_ipv6(text) or _is_ipv6(host):
            raise ValueError(f"{quoted(text)}: IPv6 endpoints are not supported yet")
        if not colon and default_port is not None:
            host, port = text, str(default_port)
        elif not colon or "/" in text:  # such as a URL, whose scheme would be the host
            raise ValueError(f'{quoted(text)} is not HOST:PORT, such as "vpn.example.com:51820"')
        if not is_host_name(host) or (host.replace(".", "").isdigit() and not _is_ipv4(host)):
            raise ValueError(f"{quoted(host)} is neither a host name nor an IPv4 address")
        endpoint = cls(host, parse_port(port))
        address = endpoint.address
        if address is not None and not is_connectable(address):
            raise ValueError(f"{quoted(host)} is not an address that a client can connect to")
        return endpoint

    @property
    def address(self) -> IPv4Address | None:
        """`None` for a host name."""
        return IPv4Address(self.host) if _is_ipv4(self.host) else None

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def _is_ipv4(text: str) -> bool:
    try:
        IPv4Address(text)
    except AddressValueError:
        return False
    return True


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except AddressValueError:
        return False
    return True


def parse_subnet(text: str) -> IPv4Network:
    """A subnet that the VPN may use: private, /8 to /30, no host bits set. Raises `ValueError`."""
    try:
        loose = IPv4Network(text, strict=False)
    except ValueError:
        raise ValueError(f'{quoted(text)} is not an IPv4 subnet, such as "10.66.77.0/24"') from None
    if not 8 <= loose.prefixlen <= 30:
        raise ValueError(
            f"{quoted(text)}: the prefix length must be between 8 and 30, to leave room for peers"
        )
    if str(loose.network_address) != text.partition("/")[0]:
        raise ValueError(f'{quoted(text)} has host bits set: did you mean "{loose}"?')
    if not any(loose.subnet_of(private) for private in PRIVATE_NETWORKS):
        ranges = ", ".join(map(str, PRIVATE_NETWORKS))
        raise ValueError(f"{quoted(text)} is not private address space; choose one within {ranges}")
    return loose


def parse_prefix(text: str) -> IPv4Network:
    """An IPv4 prefix, in the one way to write it: no host bits set, and a length, not a mask. Raises `ValueError`."""
    try:
        network = IPv4Network(text, strict=False)
    except ValueError:
        raise ValueError(f'{quoted(text)} is not an IPv4 prefix, such as "192.168.0.0/16"') from None
    if str(network) != text:
        raise ValueError(f'{quoted(text)} is not how a prefix is written: did you mean "{network}"?')
    return network


def gateway_address_of(subnet: IPv4Network) -> IPv4Address:
    """The gateway's own inner address: the first host of the subnet."""
    return subnet.network_address + 1


def parse_peer_address(text: str, subnet: IPv4Network) -> IPv4Address:
    """An address that a peer may have in the subnet. Raises `ValueError`."""
    try:
        address = IPv4Address(text)
    except AddressValueError:
        raise ValueError(f"{quoted(text)} is not an IPv4 address") from None
    taken = {subnet.network_address, gateway_address_of(subnet), subnet.broadcast_address}
    if address not in subnet or address in taken:
        raise ValueError(
            f"{address} cannot be a peer's address; choose one from {subnet}, but not its first, second or last"
        )
    return address
