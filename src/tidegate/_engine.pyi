"""The boundary between Python, which decides, and Rust, which moves packets.

Settings and commands go down, events and counters come up. Python never sees a data packet (except through `Nat`, which
exists for tests and tinkerers); Rust never reads a file, a database or an environment variable.

Conventions: addresses are dotted IPv4 strings, prefixes ``"10.66.77.0/24"``, keys 32 raw bytes, times seconds. A bad
argument raises `ValueError`, a refusal by the operating system `OSError` with ``errno`` set and a message that says
what was being done; nothing is left half-open after either.
"""

from typing import Self, final

__all__ = [
    "Client",
    "ClientOptions",
    "Dropped",
    "Event",
    "ExternalLink",
    "Gateway",
    "GatewayOptions",
    "Mapping",
    "MappingRecord",
    "Nat",
    "NatOptions",
    "Offloads",
    "PeerStatus",
    "Status",
    "aead_library",
    "aes_available",
    "version",
]

@final
class Offloads:
    """Which kernel offloads to try; each falls back by itself where the kernel refuses (and says so in an event)."""

    def __new__(
        cls,
        *,
        tun: bool = True,  # virtio-net header on the TUN device: TSO
        tun_uso: bool = True,  # UDP segmentation on the TUN device
        udp_gso: bool = True,  # UDP_SEGMENT on the transport
        udp_gro: bool = True,  # UDP_GRO on the transport
        external: bool = True,  # superpackets towards the external interface; off: every packet at most the MTU
        coalesce: bool = True,  # merge consecutive segments into superpackets
    ) -> Self: ...

@final
class NatOptions:
    """Behaviour of the NAT. What is not given, or `None`, is as in docs/nat.md. Times in seconds."""

    def __new__(
        cls,
        *,
        filtering: str | None = None,  # "endpoint-independent", "address-dependent", "address-and-port-dependent"
        udp_timeout: float | None = None,  # idle time of a session, as all these timeouts
        tcp_established_timeout: float | None = None,
        tcp_opening_timeout: float | None = None,
        tcp_closing_timeout: float | None = None,
        icmp_timeout: float | None = None,
        max_mappings: int | None = None,  # the whole gateway
        max_mappings_per_client: int | None = None,
        max_new_mappings_per_second: int | None = None,  # per client, with a burst of as many
        max_sessions_per_mapping: int | None = None,  # remote endpoints that one mapping talks to
        port_range: tuple[int, int] = ...,  # (1024, 65535)  # external ports, inclusive
        kept_ports: tuple[int, int] | None = None,  # left to the host's programs, inclusive: a gateway takes none
        log_mappings: bool = False,  # whether `Gateway.poll_mapping_log` returns anything
    ) -> Self: ...

@final
class ExternalLink:
    """What the host's kernel says about the external interface. Read, never changed."""

    def __new__(
        cls,
        *,
        interface: str,
        index: int,
        mac: bytes,  # 6 bytes
        mtu: int,
        addresses: list[str],  # external addresses to translate to; the gateway itself speaks from the first
        on_link: list[str],  # prefixes reached without a router
        router: str | None,  # the default router; None: only on-link destinations
    ) -> Self: ...

@final
class GatewayOptions:
    """What a gateway is made of. `ValueError` for a key, address, prefix or number that is none."""

    def __new__(
        cls,
        *,
        private_key: bytes,  # the gateway's WireGuard key (X25519)
        listen: tuple[str, int],  # address and UDP port of the transport; "0.0.0.0": every address of the host
        subnet: str,  # of the clients' addresses
        gateway_address: str,  # the gateway's own address in the subnet
        tun_name: str,  # at most 15 bytes
        tunnel_mtu: int,  # in bytes of inner packet: a larger one is fragmented, or answered with "fragmentation needed"
        external: ExternalLink,
        host_addresses: list[str],  # the host's own addresses: delivered through the TUN device
        between_clients: bool,  # whether clients may reach each other at their addresses in the subnet
        denied: list[str],  # prefixes that they may not reach through the external interface
        nat: NatOptions,
        offloads: Offloads,
        shards: int,  # 0: one per core
    ) -> Self: ...

@final
class ClientOptions:
    """What a client is made of: a profile, resolved. `ValueError` for a key, address, prefix or number that is none."""

    def __new__(
        cls,
        *,
        private_key: bytes,  # the client's WireGuard key (X25519)
        tun_name: str,  # at most 15 bytes
        mtu: int,  # of the tunnel, in bytes of inner packet
        peer_public_key: bytes,  # the gateway's
        preshared_key: bytes | None,  # mixed into the handshake, as on the gateway; None: none
        endpoint: tuple[str, int],  # the gateway's address and UDP port; `Client.set_endpoint` changes it
        allowed_ips: list[str],  # inner sources accepted from the gateway
        persistent_keepalive: int,  # seconds, 0: off
        listen_port: int,  # 0: any
        fwmark: int,  # SO_MARK of the transport socket, 0: none
        offloads: Offloads,
        cipher: str = "chacha20-poly1305",  # or "aes-256-gcm": docs/protocol.md; the same as on the gateway
    ) -> Self: ...

@final
class PeerStatus:
    """One peer and its counters, which begin at 0 when it is added."""

    public_key: bytes
    address: str | None  # in the VPN subnet; None: the gateway, as a client sees it
    endpoint: tuple[str, int] | None  # where its datagrams come from, or came from last; None: not known yet
    last_handshake: float | None  # seconds ago; None: never
    received_bytes: int  # inner bytes received from the peer
    sent_bytes: int  # inner bytes sent to it
    received_packets: int  # inner packets: a superpacket counts as its segments
    sent_packets: int
    mappings: int  # its NAT mappings; 0 on a client

@final
class Mapping:
    """One NAT mapping (RFC 4787 §2): an inner endpoint and the external endpoint that stands for it."""

    protocol: str  # "tcp", "udp", "icmp"
    internal: tuple[str, int]
    external: tuple[str, int]
    age: float
    idle: float
    expires_in: float | None  # None: never (a published port)
    sessions: int
    state: str  # TCP: "opening", "established", "closing"; others: "active"; published ports: "published"

@final
class MappingRecord:
    """A mapping that began or ended. It names no destinations (RFC 6888 REQ-12)."""

    event: str  # "created", "ended"
    protocol: str
    internal: tuple[str, int]
    external: tuple[str, int]
    time: float  # seconds since the epoch
    age: float  # of the mapping

@final
class Status:
    """A snapshot of the engine's counters."""

    peers: list[PeerStatus]
    mappings: dict[str, int]  # by protocol
    reserved_ports: dict[str, int]  # by protocol
    sessions: int  # remote endpoints that mappings talk to
    resting_ports: int  # reserved ports that rest before they are used again
    clients: int  # clients with mappings
    drops: dict[str, int]  # by reason
    explanations: dict[str, str]  # what every reason there is means, one sentence each
    packets: dict[str, int]  # by direction: "from_peers", "to_peers", "from_external", "to_external", "from_host", "to_host"
    bytes: dict[str, int]
    offloads: dict[str, bool]  # those in use
    shards: int

@final
class Event:
    """Something that Python needs to know. `kind`: "shard_failed", "offload_disabled", "ports_exhausted",
    "external_down", "publication_failed", "handshake_unanswered", "handshake_completed" (with peers that the status
    tells), "handshake_refused" (of each reason once a minute and shard)."""

    kind: str
    detail: str

@final
class Gateway:
    """One gateway's packet engine. Use: construct (opens everything), `start`, `stop`."""

    def __new__(cls, options: GatewayOptions) -> Self: ...
    def start(self) -> None:
        """Starts the shards. Raises `RuntimeError` if they have already been started."""
    def stop(self) -> None:
        """Stops and joins the shards and closes every socket. Idempotent. Raises `RuntimeError` if a shard hangs: it
        keeps its sockets until the process ends."""
    def event_fd(self) -> int:
        """A descriptor that is readable (level-triggered) while there are events, or records of mappings."""
    def poll_events(self) -> list[Event]:
        """Takes what has happened since the last call, oldest first; never blocks. Of more than 256 that nobody took,
        the newest are lost, but for the failure of a shard."""
    def poll_mapping_log(self, limit: int) -> tuple[list[MappingRecord], int]:
        """The oldest records, at most `limit`, and how many were lost since the last call because the queue was full.
        The descriptor of `event_fd` is readable while there are more."""
    def set_peer(
        self,
        public_key: bytes,
        address: str,
        preshared_key: bytes | None = None,
        *,
        cipher: str = "chacha20-poly1305",  # or "aes-256-gcm": ValueError where this CPU has no AES instructions
        endpoint: tuple[str, int] | None = None,  # where it was heard of last, before this engine was made
        call: bool = False,  # begin a handshake there at once, in turn with those of other peers
    ) -> None:
        """Adds the peer, or changes its address, preshared key and cipher; sessions of other peers are not disturbed.
        An endpoint inside the VPN is ignored. Raises `RuntimeError` once the engine has been stopped."""
    def remove_peer(self, public_key: bytes) -> bool:
        """Ends the peer's session and its mappings, and what is published or passed to it. `False` if there is no such
        peer."""
    def set_external(self, link: ExternalLink, host_addresses: list[str]) -> None:
        """Call this when the kernel's view of the link has changed (next hop, address, MTU or interface), or when the
        interface was away: it then needs new sockets even if it looks the same. `OSError` if they cannot be opened;
        nothing has changed then."""
    def set_nat(self, options: NatOptions) -> None:
        """Changes the NAT's options. The filter applies at once, and timers to existing sessions too, counted from
        their last packet. Lower limits end nothing; mappings on ports outside a smaller range, or kept, live on,
        and unused ones go back to the host."""
    def set_access(self, between_clients: bool, denied: list[str]) -> None:
        """Changes what clients may reach, as in `GatewayOptions`. It holds at once, and in sessions that there are, too;
        none of them ends."""
    def pass_protocols(self, clients: dict[int, str]) -> None:
        """Assigns protocols without ports to clients, by number (47: GRE): what arrives of one at any external address
        goes to its client. Protocols that are not listed belong to nobody. `OSError` if the host cannot be kept from
        answering them; nothing has changed then."""
    def publish(self, protocol: str, external_port: int, internal: tuple[str, int]) -> None:
        """Forwards an external port to a client. `OSError` (EADDRINUSE) if a program on the host holds the port."""
    def unpublish(self, protocol: str, external_port: int) -> bool:
        """Ends the forwarding, and its sessions; the port is the host's again. `False` if it was not published."""
    def failed_publications(self) -> list[tuple[str, int, str, str]]:
        """Published ports that could not be published on an external address that was added later: protocol, port,
        address and reason. They are tried again at the next `set_external`."""
    def status(self) -> Status:
        """Asks every shard. `RuntimeError` if one does not answer within 2 s, or the engine is not running."""
    def mappings(
        self,
        address: str | None = None,
        limit: int = 10_000,
        *,
        external: tuple[str | None, int] | None = None,
    ) -> list[Mapping]:
        """The NAT's mappings, at most `limit`, of all shards alike: of the client with this `address`, if it is given;
        with this external port or ICMP identifier, if one is, at this external address or (`None`) at any."""

@final
class Client:
    """One client's packet engine. The TUN device exists once constructed; Python gives it its address and routes."""

    def __new__(cls, options: ClientOptions) -> Self: ...
    def start(self) -> None:
        """Starts the shard, and the first handshake without waiting for a packet. Raises `RuntimeError` if it has
        already been started."""
    def stop(self) -> None:
        """As in `Gateway`."""
    def event_fd(self) -> int:
        """A descriptor that is readable (level-triggered) while there are events."""
    def poll_events(self) -> list[Event]:
        """As in `Gateway`."""
    def set_endpoint(self, endpoint: tuple[str, int]) -> None:
        """Sets the gateway's endpoint; the next handshake goes there."""
    def status(self) -> Status:
        """As in `Gateway`; `peers` contains only the gateway."""

class Dropped(Exception):
    """The packet is not delivered; `reason` says why, as in `Status.drops`."""

    reason: str

@final
class Nat:
    """The NAT's core, one packet at a time, for tests and tinkerers. It does no I/O and reads no clock: `now`, in
    seconds, comes from the caller and must not go backwards. Packets are whole IPv4 datagrams with complete
    checksums; anything after their total length is cut off."""

    def __new__(
        cls,
        *,
        external: list[str],  # the addresses to translate to
        options: NatOptions | None = None,  # None: the defaults
        ports: tuple[int, int] | None = None,  # TCP and UDP ports to use, inclusive; None: options' port_range
        seed: bytes | None = None,  # 32 bytes that determine everything random; None: different each time
    ) -> Self: ...
    def translate_outbound(self, packet: bytes, now: float) -> bytes:
        """A packet from a client, as it leaves. Raises `Dropped`. If its destination is an external address, it is a
        hairpin: pass the result to `translate_inbound`."""
    def translate_inbound(self, packet: bytes, now: float) -> bytes:
        """A packet from outside, as its client receives it. Raises `Dropped`."""
    def expire(self, now: float) -> None:
        """Ends whatever has expired: sessions, mappings, the resting time of ports."""
    def next_expiry(self) -> float | None:
        """When `expire` next has something to do; None: never."""
    def remove_client(self, address: str, now: float) -> None:
        """Ends the client's mappings; their ports rest."""
    def mappings(self, now: float) -> list[Mapping]: ...
    @property
    def counts(self) -> dict[str, int]:
        """"tcp_mappings", "udp_mappings", "icmp_mappings", "sessions", "resting_ports", "clients"."""

def aead_library(shards: int) -> str:
    """Which library seals and opens data messages in an engine with `shards` shards: "intel-ipsec-mb" if it was
    available at the build and this CPU has AVX-512 with IFMA and VAES; "ring" (for AES-256-GCM alone, "aws-lc-rs" for
    the rest) where it has VAES without AVX-512; otherwise "aws-lc-rs"."""

def aes_available() -> bool:
    """Whether this CPU has the instructions that make AES-256-GCM fast; without them it is refused."""

def version() -> str:
    """The engine's version."""
