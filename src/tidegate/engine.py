"""The packet engine as the rest of Python sees it: dataclasses go in, objects behind protocols come out.

Only `load` imports the compiled extension `tidegate._engine`, so that everything above it can run with another engine,
passed in as an argument.

For tests and tinkerers, `Nat` is the NAT's core, one packet at a time, with its `NatOptions` and the exception
`Dropped`; see `_engine.pyi`.
"""

from __future__ import annotations

from collections.abc import Mapping as MappingOf
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tidegate.ciphers import WIREGUARD_CIPHER, CipherName
from tidegate.errors import EngineError

if TYPE_CHECKING:
    from tidegate._engine import Dropped as Dropped
    from tidegate._engine import Nat as Nat
    from tidegate._engine import NatOptions as NatOptions
    from tidegate.settings import NatSettings, OffloadSettings


@dataclass(frozen=True, slots=True)
class ExternalLink:
    """What the host's kernel says about the external interface. Read, never changed."""

    interface: str
    index: int
    mac: bytes
    mtu: int
    addresses: tuple[str, ...]
    """External addresses to translate to; the gateway itself speaks from the first."""
    on_link: tuple[str, ...]
    """Prefixes reached without a router."""
    router: str | None
    """The default router; `None`: only on-link destinations."""

    @property
    def has_default_route(self) -> bool:
        """Whether it leads beyond its own networks, through a router or without one."""
        return self.router is not None or "0.0.0.0/0" in self.on_link


@dataclass(frozen=True, slots=True)
class AccessPolicy:
    """What clients may reach; by default everything."""

    between_clients: bool = True
    """Whether each other, at their addresses in the subnet."""
    denied: tuple[str, ...] = ()
    """Prefixes that they may not reach through the external interface."""


@dataclass(frozen=True, slots=True)
class GatewayOptions:
    """What a gateway's engine needs at start; see `_engine.GatewayOptions`."""

    private_key: bytes
    listen: tuple[str, int]
    subnet: str
    gateway_address: str
    tun_name: str
    tunnel_mtu: int
    external: ExternalLink
    host_addresses: tuple[str, ...]
    access: AccessPolicy
    nat: NatSettings
    kept_ports: tuple[int, int] | None
    """What of the external ports is left to the host's programs, first and last."""
    offloads: OffloadSettings
    shards: int


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """What a client's engine needs at start; see `_engine.ClientOptions`."""

    private_key: bytes
    tun_name: str
    mtu: int
    peer_public_key: bytes
    preshared_key: bytes | None
    endpoint: tuple[str, int]
    allowed_ips: tuple[str, ...]
    persistent_keepalive: int
    listen_port: int
    fwmark: int
    offloads: OffloadSettings
    cipher: CipherName = WIREGUARD_CIPHER


class PeerStatus(Protocol):
    """One peer's counters. `last_handshake` is in seconds before now; bytes are inner bytes. A client's one peer, the
    gateway, has no `address`."""

    @property
    def public_key(self) -> bytes: ...
    @property
    def address(self) -> str | None: ...
    @property
    def endpoint(self) -> tuple[str, int] | None: ...
    @property
    def last_handshake(self) -> float | None: ...
    @property
    def received_bytes(self) -> int: ...
    @property
    def sent_bytes(self) -> int: ...
    @property
    def received_packets(self) -> int: ...
    @property
    def sent_packets(self) -> int: ...
    @property
    def mappings(self) -> int: ...


class NatMapping(Protocol):
    """One NAT mapping (RFC 4787 §2). Times in seconds."""

    @property
    def protocol(self) -> str: ...
    @property
    def internal(self) -> tuple[str, int]: ...
    @property
    def external(self) -> tuple[str, int]: ...
    @property
    def age(self) -> float: ...
    @property
    def idle(self) -> float: ...
    @property
    def expires_in(self) -> float | None: ...
    @property
    def sessions(self) -> int: ...
    @property
    def state(self) -> str: ...


class EngineStatus(Protocol):
    """A snapshot of the engine's counters."""

    @property
    def peers(self) -> Sequence[PeerStatus]: ...
    @property
    def mappings(self) -> MappingOf[str, int]: ...
    @property
    def reserved_ports(self) -> MappingOf[str, int]: ...
    @property
    def sessions(self) -> int: ...
    @property
    def resting_ports(self) -> int: ...
    @property
    def clients(self) -> int: ...
    @property
    def explanations(self) -> MappingOf[str, str]: ...
    @property
    def drops(self) -> MappingOf[str, int]: ...
    @property
    def packets(self) -> MappingOf[str, int]: ...
    @property
    def bytes(self) -> MappingOf[str, int]: ...
    @property
    def offloads(self) -> MappingOf[str, bool]: ...
    @property
    def shards(self) -> int: ...


class EngineEvent(Protocol):
    """Something that Python should know: "shard_failed", "offload_disabled", "ports_exhausted",
    "external_down", "publication_failed", "handshake_unanswered", "handshake_completed", "handshake_refused"."""

    @property
    def kind(self) -> str: ...
    @property
    def detail(self) -> str: ...


class MappingRecord(Protocol):
    """A mapping that began or ended; see `_engine.MappingRecord`."""

    @property
    def event(self) -> str: ...
    @property
    def protocol(self) -> str: ...
    @property
    def internal(self) -> tuple[str, int]: ...
    @property
    def external(self) -> tuple[str, int]: ...
    @property
    def time(self) -> float: ...
    @property
    def age(self) -> float: ...


class EngineLifecycle(Protocol):
    """What a gateway's and a client's engine have in common. If a thread hangs, queries and `stop` raise
    `EngineUnresponsiveError` after a few seconds.

    What the methods here and below mean, their units and their errors are in `_engine.pyi`."""

    # Packets move from `start`, once, until `stop`, which closes everything and may be called again.
    def start(self) -> None: ...
    def stop(self) -> None: ...

    # Wait until the descriptor is readable, then take the events (`watch_engine`).
    def event_fd(self) -> int: ...
    def poll_events(self) -> Sequence[EngineEvent]: ...

    # Counters at this moment.
    def status(self) -> EngineStatus: ...


class EngineGateway(EngineLifecycle, Protocol):
    """A gateway's packet engine; every method may be called from any thread."""

    # Who may connect, from the next handshake on; a removed peer's sessions end at once.
    def set_peer(
        self,
        public_key: bytes,
        address: str,
        preshared_key: bytes | None = None,
        *,
        cipher: CipherName = WIREGUARD_CIPHER,
        endpoint: tuple[str, int] | None = None,
        call: bool = False,
    ) -> None: ...
    def remove_peer(self, public_key: bytes) -> bool: ...

    # What a reload, or a change of the host's network, changes while packets move; no client's session ends by it.
    def set_external(self, link: ExternalLink, host_addresses: Sequence[str]) -> None: ...
    def set_nat(self, nat: NatSettings, kept_ports: tuple[int, int] | None) -> None: ...
    def set_access(self, access: AccessPolicy) -> None: ...

    # Which clients get what arrives from outside unasked: protocols without ports, and published ports.
    def pass_protocols(self, clients: dict[int, str]) -> None: ...
    def publish(self, protocol: str, external_port: int, internal: tuple[str, int]) -> None: ...
    def unpublish(self, protocol: str, external_port: int) -> bool: ...
    def failed_publications(self) -> Sequence[tuple[str, int, str, str]]: ...

    # Who has which external port now, and who had it when.
    def mappings(
        self,
        address: str | None = None,
        limit: int = 10_000,
        *,
        external: tuple[str | None, int] | None = None,
    ) -> Sequence[NatMapping]: ...
    def poll_mapping_log(self, limit: int) -> tuple[Sequence[MappingRecord], int]: ...


class EngineClient(EngineLifecycle, Protocol):
    """A client's packet engine. The TUN device exists once constructed."""

    # Where the next handshake goes, as when the gateway's name resolves to another address.
    def set_endpoint(self, endpoint: tuple[str, int]) -> None: ...


class Engine(Protocol):
    """Makes packet engines. Making one opens every socket and device, or raises `OSError` and leaves nothing open."""

    def gateway(self, options: GatewayOptions) -> EngineGateway: ...
    def client(self, options: ClientOptions) -> EngineClient: ...

    # What this machine and this build can do.
    def aead_library(self, shards: int) -> str: ...
    def aes_available(self) -> bool: ...
    def version(self) -> str: ...


def load() -> Engine:
    """The compiled engine."""
    try:
        from tidegate.extension import RustEngine  # noqa: PLC0415 -- the extension is absent in unit tests
    except ImportError as cause:
        raise EngineError(
            f"the packet engine cannot be loaded ({cause})", hint="build it with `make build`"
        ) from cause
    return RustEngine()


_OF_THE_EXTENSION = ("Dropped", "Nat", "NatOptions")


def __getattr__(name: str) -> object:
    """Re-exports parts of the extension unchanged, and loads it only when one of them is used."""
    if name not in _OF_THE_EXTENSION:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tidegate import extension  # noqa: PLC0415 -- as in `load`

    return getattr(extension, name)
