"""The settings: names, types and defaults.

Every model is frozen and refuses unknown keys. Types are strict (`shards = "2"` is an error, not a two); `sources`
first turns text from the environment into values.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from unicodedata import category

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    field_validator,
    model_validator,
)

from tidegate.ip_protocols import MAX_OTHER_PROTOCOLS, parse_protocol, refuse_doubles
from tidegate.net import (
    Endpoint,
    ListenAddress,
    gateway_address_of,
    is_connectable,
    parse_prefix,
    parse_subnet,
)

MAX_INTERFACE_NAME = 15  # IFNAMSIZ - 1, linux/if.h
NOT_IN_INTERFACE_NAMES = "/:%"  # dev_valid_name(); and in `%d` the kernel would insert a number
ALL_PORTS = (1024, 65535)
"""What a NAT may lend (RFC 4787 REQ-3 keeps the ports below apart)."""
MAX_DENIED = 256
"""Prefixes that can be denied to clients: their look-up is part of the hot path."""
MAX_PROFILE_SERVERS = 3  # MAXNS, resolv.conf(5): clients may ignore more
MAX_SHARDS = 64  # as in engine/src/engine.rs; a test compares the two


def _text(value: Any, parse: Any) -> Any:
    """Parses text; everything else is left to the type check."""
    return parse(value) if isinstance(value, str) else value


def _parse_address(text: str) -> IPv4Address:
    try:
        return IPv4Address(text)
    except ValueError:
        raise ValueError(f"{text!r} is not an IPv4 address") from None


def _parse_path(text: str) -> Path:
    if not text:  # which `Path` takes for the current directory
        raise ValueError("must not be empty")
    # NUL, which no system call takes; and what would garble a message.
    if any(category(c) == "Cc" for c in text):
        raise ValueError(f"{text!r} has a control character, which is not allowed in a path")
    return Path(text)


def parse_interface(text: str) -> str:
    if (
        not text
        or any(c.isspace() or not c.isprintable() or c in NOT_IN_INTERFACE_NAMES for c in text)
        or len(text.encode()) > MAX_INTERFACE_NAME
        or text in {".", ".."}
    ):
        raise ValueError(
            f"{text!r} is not an interface name (1 to {MAX_INTERFACE_NAME} bytes, printable, no spaces, "
            f"none of {' '.join(NOT_IN_INTERFACE_NAMES)})"
        )
    return text


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


ListenText = Annotated[InstanceOf[ListenAddress], BeforeValidator(lambda v: _text(v, ListenAddress.parse))]
EndpointText = Annotated[InstanceOf[Endpoint], BeforeValidator(lambda v: _text(v, Endpoint.parse))]
SubnetText = Annotated[InstanceOf[IPv4Network], BeforeValidator(lambda v: _text(v, parse_subnet))]
PrefixText = Annotated[InstanceOf[IPv4Network], BeforeValidator(lambda v: _text(v, parse_prefix))]
AddressText = Annotated[InstanceOf[IPv4Address], BeforeValidator(lambda v: _text(v, _parse_address))]
InterfaceName = Annotated[str, BeforeValidator(lambda v: _text(v, parse_interface))]
AddressList = Annotated[tuple[AddressText, ...], BeforeValidator(_as_tuple)]
PrefixList = Annotated[tuple[PrefixText, ...], BeforeValidator(_as_tuple)]
PathText = Annotated[InstanceOf[Path], BeforeValidator(lambda v: _text(v, _parse_path))]

Timeout = Annotated[float, Field(ge=1, le=7 * 86_400, allow_inf_nan=False)]
"""Seconds."""


OtherProtocols = Annotated[
    dict[Annotated[int, BeforeValidator(parse_protocol)], Annotated[str, Field(min_length=1, max_length=63)]],
    BeforeValidator(refuse_doubles),
    Field(max_length=MAX_OTHER_PROTOCOLS),
]
"""Peers by protocol number."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class GatewaySettings(_Section):
    """``[gateway]``"""

    subnet: SubnetText = IPv4Network("10.66.77.0/24")
    """The VPN's addresses; the first host is the gateway itself."""
    listen: ListenText = ListenAddress(IPv4Address("0.0.0.0"), 51820)
    """Where WireGuard datagrams are received (UDP)."""
    tun_name: InterfaceName = "tidegate0"
    tunnel_mtu: Annotated[int, Field(ge=576, le=65535)] = 1420
    """The MTU inside the tunnel; 1420 fits in 1500 with either IP version outside."""
    shards: Annotated[int, Field(ge=0, le=MAX_SHARDS)] = 0
    """Threads that move packets; 0: one per core."""
    endpoint: EndpointText | None = None
    """What profiles tell clients to connect to; by default the external address and the listening port."""
    between_clients: bool = True
    """Whether clients may reach each other at their addresses in the subnet."""

    @property
    def address(self) -> IPv4Address:
        """The gateway's own address in the subnet."""
        return gateway_address_of(self.subnet)


class ExternalSettings(_Section):
    """``[external]``: the way to the internet."""

    interface: InterfaceName | None = None
    """By default the interface of the host's default route."""
    addresses: AddressList = ()
    """The addresses to translate to; by default the interface's first."""
    deny: Annotated[PrefixList, Field(max_length=MAX_DENIED)] = ()
    """What clients may not reach through the interface."""

    @field_validator("addresses")
    @classmethod
    def _addresses_differ(cls, value: tuple[IPv4Address, ...]) -> tuple[IPv4Address, ...]:
        # Listed twice, an address would count as two that share the ports.
        for address in value:
            if value.count(address) > 1:
                raise ValueError(f"{address} is listed twice")
        return value


class NatSettings(_Section):
    """``[nat]``: behaviour of the NAT; docs/settings.md explains each. Times in seconds."""

    filtering: Literal["endpoint-independent", "address-dependent", "address-and-port-dependent"] = (
        "address-dependent"
    )
    udp_timeout: Timeout = 300.0  # RFC 4787 REQ-5: at least 2 min, 5 min recommended
    tcp_established_timeout: Timeout = 7440.0  # RFC 5382 REQ-5: at least 2 h 4 min
    tcp_transitory_timeout: Timeout = 240.0  # RFC 5382 REQ-5: at least 4 min
    """The default of the next two."""
    tcp_opening_timeout: Timeout = 240.0  # RFC 7857 section 2.1: a timer of its own
    tcp_closing_timeout: Timeout = 240.0  # likewise, also after an RST
    icmp_timeout: Timeout = 60.0  # RFC 5508 REQ-2: at least 60 s
    max_mappings: Annotated[int, Field(ge=1, le=4_000_000)] = 200_000
    max_mappings_per_client: Annotated[int, Field(ge=1, le=65_536)] = 16_384
    max_new_mappings_per_second: Annotated[int, Field(ge=1, le=1_000_000)] = 2_000
    max_sessions_per_mapping: Annotated[int, Field(ge=1, le=1_000_000)] = 4_096
    port_range: (
        Annotated[
            tuple[Annotated[int, Field(ge=1024, le=65535)], Annotated[int, Field(ge=1024, le=65535)]],
            BeforeValidator(_as_tuple),
        ]
        | None
    ) = None
    """By default all (`ALL_PORTS`), but for what is left to the host's programs."""

    other_protocols: OtherProtocols = {}
    """The peer that each protocol without ports is given to: everything that arrives goes there, and only that peer can
    send it. By number; a file can use names for the common ones, such as ``gre = "alice"``."""
    log_mappings: bool = False
    """A line in the log for each mapping that begins or ends, at level info. It names no destinations (RFC 6888
    REQ-12)."""

    @model_validator(mode="before")
    @classmethod
    def _one_timeout_is_enough_for_both(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "tcp_transitory_timeout" not in values:
            return values
        both = values["tcp_transitory_timeout"]
        return {"tcp_opening_timeout": both, "tcp_closing_timeout": both} | values

    @field_validator("port_range")
    @classmethod
    def _port_range_ascends(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and value[0] > value[1]:
            raise ValueError(f"ports {value[0]}-{value[1]}: the range ends before it starts")
        return value


class DnsSettings(_Section):
    """``[dns]``: the DNS proxy on the gateway's own address."""

    enabled: bool = True
    upstreams: Annotated[AddressList, Field(max_length=8)] = ()
    """By default those of /etc/resolv.conf."""
    profile_servers: Annotated[AddressList, Field(max_length=MAX_PROFILE_SERVERS)] = ()
    """The resolvers that profiles name; by default the proxy where it is on, otherwise none."""

    @field_validator("profile_servers")
    @classmethod
    def _clients_can_ask_them(cls, value: tuple[IPv4Address, ...]) -> tuple[IPv4Address, ...]:
        for address in value:
            if address.is_loopback:
                raise ValueError(f"{address} is the client itself: give the address at which clients find it")
            if not is_connectable(address):
                raise ValueError(f"{address} is no resolver's address")
        return value


class OffloadSettings(_Section):
    """``[offloads]``: which kernel offloads to try; each falls back by itself where the kernel refuses."""

    tun: bool = True
    tun_uso: bool = True
    udp_gso: bool = True
    udp_gro: bool = True
    external: bool = True
    coalesce: bool = True

    @classmethod
    def none(cls) -> Self:
        """Everything off: one packet per system call."""
        return cls(**dict.fromkeys(cls.model_fields, False))


class LogSettings(_Section):
    """``[log]``"""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json", "logfmt"] = "auto"
    """auto: console on a terminal, logfmt elsewhere."""


class Settings(_Section):
    """Everything that can be set."""

    state_dir: PathText = Path("/var/lib/tidegate")
    """The database, the gateway's key, the lock and the control socket."""
    gateway: GatewaySettings = GatewaySettings()
    external: ExternalSettings = ExternalSettings()
    nat: NatSettings = NatSettings()
    dns: DnsSettings = DnsSettings()
    offloads: OffloadSettings = OffloadSettings()
    log: LogSettings = LogSettings()

    @property
    def profile_servers(self) -> tuple[IPv4Address, ...]:
        """The resolvers that profiles name."""
        return self.dns.profile_servers or ((self.gateway.address,) if self.dns.enabled else ())

    @model_validator(mode="after")
    def _nothing_points_into_the_tunnel(self) -> Self:
        subnet = self.gateway.subnet
        if self.gateway.listen.address in subnet:
            raise ValueError(
                f"gateway.listen: {self.gateway.listen} lies inside the VPN's own subnet {subnet}"
            )
        endpoint = self.gateway.endpoint
        if endpoint is not None and endpoint.address is not None and endpoint.address in subnet:
            raise ValueError(f"gateway.endpoint: {endpoint} lies inside the VPN's own subnet {subnet}")
        for upstream in self.dns.upstreams:
            if upstream in subnet:
                raise ValueError(f"dns.upstreams: {upstream} lies inside the VPN's own subnet {subnet}")
        for address in self.external.addresses:
            if address in subnet:
                raise ValueError(f"external.addresses: {address} lies inside the VPN's own subnet {subnet}")
        return self
