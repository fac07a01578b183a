"""Stand-ins for the compiled engine and the host, so that everything else runs without root."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

from tidegate.ciphers import WIREGUARD_CIPHER, CipherName
from tidegate.engine import AccessPolicy, ClientOptions, ExternalLink, GatewayOptions
from tidegate.host import MAIN_TABLE, HostNetwork, Interface, InterfaceAddress, Route
from tidegate.host.ports import check_listen_port
from tidegate.host.resolver import DnsOutcome
from tidegate.host.routes import Renewal, RoutePlan
from tidegate.settings import NatSettings


@dataclass
class FakePeerStatus:
    public_key: bytes
    address: str
    endpoint: tuple[str, int] | None = ("203.0.113.9", 4000)
    last_handshake: float | None = 3.5
    received_bytes: int = 2048
    sent_bytes: int = 1024
    received_packets: int = 20
    sent_packets: int = 10
    mappings: int = 1


@dataclass
class FakeMapping:
    internal: tuple[str, int]
    protocol: str = "udp"
    external: tuple[str, int] = ("192.0.2.2", 40000)
    age: float = 10.0
    idle: float = 1.0
    expires_in: float = 299.0
    sessions: int = 2
    state: str = "active"


@dataclass
class FakeStatus:
    peers: list[FakePeerStatus]
    mappings: dict[str, int] = field(default_factory=lambda: {"tcp": 1, "udp": 2})
    reserved_ports: dict[str, int] = field(default_factory=lambda: {"tcp": 64, "udp": 64})
    sessions: int = 5
    resting_ports: int = 4
    clients: int = 1
    drops: dict[str, int] = field(default_factory=lambda: {"spoofed_source": 7, "no_mapping": 0})
    explanations: dict[str, str] = field(
        default_factory=lambda: {
            "spoofed_source": "It lies.",
            "no_mapping": "It is not expected.",
            "queue_delay": "It is late.",
        }
    )
    packets: dict[str, int] = field(default_factory=lambda: {"from_peers": 20})
    bytes: dict[str, int] = field(default_factory=lambda: {"from_peers": 2048})
    offloads: dict[str, bool] = field(default_factory=lambda: {"tun": True, "udp_gso": False})
    shards: int = 2


@dataclass
class FakeRecord:
    event: str
    internal: tuple[str, int]
    protocol: str = "udp"
    external: tuple[str, int] = ("192.0.2.2", 40000)
    time: float = 1_700_000_000.25
    age: float = 0.0


@dataclass
class FakeEvent:
    kind: str
    detail: str = "told by a test"


class FakeLifecycle:
    def __init__(self) -> None:
        self.started = 0
        self.stopped = 0
        self.events: list[FakeEvent] = []
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK)

    def start(self) -> None:
        self.started += 1

    def stop(self) -> None:
        if not self.stopped:
            os.close(self._descriptor)
        self.stopped += 1

    def event_fd(self) -> int:
        return self._descriptor

    def tell(self, event: FakeEvent) -> None:
        self.events.append(event)
        os.eventfd_write(self._descriptor, 1)

    def poll_events(self) -> Sequence[FakeEvent]:
        os.eventfd_read(self._descriptor)
        told, self.events = self.events, []
        return told


class FakeGateway(FakeLifecycle):
    """Keeps peers and publications as the engine would; ports in `held` belong to programs of the host, and a shard
    does not answer when port `late_at` is published."""

    def __init__(self, options: GatewayOptions) -> None:
        super().__init__()
        self.options = options
        self.peers: dict[bytes, str] = {}
        self.removals = 0
        self.ciphers: dict[bytes, CipherName] = {}
        self.endpoints: dict[bytes, tuple[str, int] | None] = {}
        self.called: list[bytes] = []
        self.statuses: dict[bytes, FakePeerStatus] = {}
        self.refuse_status: Exception | None = None
        self.published: dict[tuple[str, int], tuple[str, int]] = {}
        self.links: list[ExternalLink] = []
        self.host_addresses = options.host_addresses
        self.access = options.access
        self.held: set[int] = set()
        self.late_at: int | None = None
        self.failed: list[tuple[str, int, str, str]] = []
        self.refuse_peers: Exception | None = None
        self._refuse_once: Exception | int | None = None
        self.nat: list[NatSettings] = []
        self.kept_ports = options.kept_ports
        self.refuse_nat = False
        self.records: list[FakeRecord] = []
        self.records_missing = 0
        self.passed: dict[int, str] = {}
        self.refuse_passing = False

    def refuse_once(self, what: Exception | int) -> None:
        """The next peer, with this exception; or the next time that this port is published, with silence."""
        self._refuse_once = what

    def set_peer(
        self,
        public_key: bytes,
        address: str,
        preshared_key: bytes | None = None,
        *,
        cipher: CipherName = WIREGUARD_CIPHER,
        endpoint: tuple[str, int] | None = None,
        call: bool = False,
    ) -> None:
        if self.refuse_peers is not None:
            raise self.refuse_peers
        if isinstance(self._refuse_once, Exception):
            refusal, self._refuse_once = self._refuse_once, None
            raise refusal
        self.peers[public_key] = address
        self.ciphers[public_key] = cipher
        self.endpoints[public_key] = endpoint
        if call:
            self.called.append(public_key)

    def remove_peer(self, public_key: bytes) -> bool:
        self.removals += 1
        gone = self.peers.pop(public_key, None)
        self.passed = {number: holder for number, holder in self.passed.items() if holder != gone}
        return gone is not None

    def set_external(self, link: ExternalLink, host_addresses: Sequence[str]) -> None:
        self.links.append(link)
        self.host_addresses = tuple(host_addresses)

    def set_access(self, access: AccessPolicy) -> None:
        self.access = access

    def pass_protocols(self, clients: dict[int, str]) -> None:
        if self.refuse_passing:
            raise OSError(errno.EPERM, "no raw sockets here")
        if any(address not in self.peers.values() for address in clients.values()):
            raise ValueError("no peer holds the address")
        self.passed = dict(clients)

    def log_mappings(self, *records: FakeRecord, missing: int = 0) -> None:
        """As the engine does if there is something to log."""
        self.records += records
        self.records_missing += missing
        os.eventfd_write(self._descriptor, 1)

    def poll_mapping_log(self, limit: int) -> tuple[Sequence[FakeRecord], int]:
        taken, self.records = self.records[:limit], self.records[limit:]
        missing, self.records_missing = self.records_missing, 0
        if self.records:
            os.eventfd_write(self._descriptor, 1)
        return taken, missing

    def set_nat(self, nat: NatSettings, kept_ports: tuple[int, int] | None) -> None:
        if self.refuse_nat:
            raise ValueError("the port range is not to this engine's taste")
        self.nat.append(nat)
        self.kept_ports = kept_ports

    def publish(self, protocol: str, external_port: int, internal: tuple[str, int]) -> None:
        if external_port in self.held:
            place = f"{protocol} port {external_port} of {self.options.external.addresses[0]}"
            raise OSError(errno.EADDRINUSE, f"cannot publish {place}: Address already in use")
        if external_port in (self.late_at, self._refuse_once):
            self._refuse_once = None
            raise RuntimeError("shard 1 did not answer within 2s")
        self.published[protocol, external_port] = internal

    def unpublish(self, protocol: str, external_port: int) -> bool:
        return self.published.pop((protocol, external_port), None) is not None

    def failed_publications(self) -> Sequence[tuple[str, int, str, str]]:
        return self.failed

    def mappings(
        self,
        address: str | None = None,
        limit: int = 10_000,
        *,
        external: tuple[str | None, int] | None = None,
    ) -> Sequence[FakeMapping]:
        """Each peer has one, with an external port of its own."""
        every = [
            FakeMapping((inner, 5000), external=("192.0.2.2", 40000 + n))
            for n, inner in enumerate(self.peers.values())
        ]
        host, port = external or (None, None)
        return [
            entry
            for entry in every
            if address in (None, entry.internal[0])
            and host in (None, entry.external[0])
            and port in (None, entry.external[1])
        ][:limit]

    def status(self) -> FakeStatus:
        if self.refuse_status is not None:
            raise self.refuse_status
        return FakeStatus(
            [self.statuses.get(key) or FakePeerStatus(key, address) for key, address in self.peers.items()]
        )


class FakeClient(FakeLifecycle):
    """Has its handshake after `looks` looks at its status, and says then that it was `last_handshake` seconds ago: so
    long that its gateway is worth looking for. `called` is where it takes that to be."""

    def __init__(self, options: ClientOptions, looks: int = 2) -> None:
        super().__init__()
        self.options = options
        self.endpoints: list[tuple[str, int]] = []
        self.called = options.endpoint
        self.last_handshake = 60.0
        self.looks = 0
        self._enough = looks

    def set_endpoint(self, endpoint: tuple[str, int]) -> None:
        self.endpoints.append(endpoint)
        self.called = endpoint

    def status(self) -> FakeStatus:
        self.looks += 1
        peer = FakePeerStatus(self.options.peer_public_key, "0.0.0.0", self.called)
        peer.last_handshake = self.last_handshake if self.looks >= self._enough else None
        return FakeStatus([peer])


class FakeEngine:
    """Remembers what it made; raises `failure` instead if one is set."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure
        self.aes = True
        self.gateways: list[FakeGateway] = []
        self.clients: list[FakeClient] = []
        self.prepare: Callable[[FakeGateway], None] = lambda _: None

    def gateway(self, options: GatewayOptions) -> FakeGateway:
        if self.failure is not None:
            raise self.failure
        self.gateways.append(FakeGateway(options))
        self.prepare(self.gateways[-1])
        return self.gateways[-1]

    def client(self, options: ClientOptions) -> FakeClient:
        if self.failure is not None:
            raise self.failure
        self.clients.append(FakeClient(options))
        return self.clients[-1]

    def aead_library(self, shards: int) -> str:
        return "fake"

    def aes_available(self) -> bool:
        return self.aes

    def version(self) -> str:
        return "fake"


def ordinary_network(
    *,
    routes: tuple[Route, ...] = (),
    addresses: tuple[InterfaceAddress, ...] = (),
    interfaces: tuple[Interface, ...] = (),
    default: bool = True,
) -> HostNetwork:
    """A host with lo and eth0, 192.0.2.2/24, and a default route; and what a test adds."""
    eth0 = Interface(2, "eth0", b"\x02\x00\x00\x00\x00\x02", 1500, True, True)
    lo = Interface(1, "lo", None, 65536, True, False)
    own = Route(IPv4Network("192.0.2.0/24"), None, 2, 0, MAIN_TABLE, IPv4Address("192.0.2.2"))
    way_out = Route(IPv4Network("0.0.0.0/0"), IPv4Address("192.0.2.1"), 2, 0, MAIN_TABLE, None)
    return HostNetwork(
        interfaces=(lo, eth0, *interfaces),
        addresses=(
            InterfaceAddress(1, IPv4Interface("127.0.0.1/8")),
            InterfaceAddress(2, IPv4Interface("192.0.2.2/24")),
            *addresses,
        ),
        routes=(*((way_out,) if default else ()), own, *routes),
    )


class FakeHost:
    """A host whose network is what a test says. Ports are the real host's."""

    def __init__(self, network: HostNetwork | None = None, *, privileges: Exception | None = None) -> None:
        self.network = network or ordinary_network()
        self.privileges = privileges
        self.kept = (53_942, 60_999)
        self.configured: list[tuple[str, IPv4Interface, int]] = []
        self.changed: Callable[[], None] | None = None

    def check_privileges(self) -> None:
        if self.privileges is not None:
            raise self.privileges

    def check_listen_port(self, address: IPv4Address, port: int) -> None:
        check_listen_port(address, port)

    def kept_ports(self) -> tuple[int, int]:
        return self.kept

    def read_network(self) -> HostNetwork:
        return self.network

    def configure_tun(self, name: str, address: IPv4Interface, mtu: int) -> None:
        self.configured.append((name, address, mtu))

    @contextmanager
    def watch(self, changed: Callable[[], None]) -> Iterator[None]:
        self.changed = changed
        try:
            yield
        finally:
            self.changed = None


class FakeClientHost:
    """Writes down what a client did to its host, in order."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.journal: list[str] = []
        self.failure = failure
        self.dns_outcome: DnsOutcome = "applied"
        self.wide: Sequence[str] = ()
        self.name_servers: list[tuple[str, int]] = []

    def check_privileges(self) -> None:
        self.journal.append("privileges")

    def remove_leftovers(self, tun_name: str, *, routes: bool, dns: bool) -> None:
        self.journal.append(" ".join(["leftovers", *["routes"] * routes, *["dns"] * dns]))

    def configure_tun(self, name: str, address: IPv4Interface, mtu: int) -> None:
        self.journal.append(f"tun {address} {mtu}")

    def resolvers(self) -> Sequence[tuple[str, int]]:
        return self.name_servers

    @contextmanager
    def routes(self, plan: RoutePlan, tun_name: str) -> Iterator[RoutePlan]:
        if self.failure is not None:
            raise self.failure
        what = "routes" if plan.routes else "no routes"
        self.journal.append(what)
        try:
            yield plan
        finally:
            self.journal.append(f"{what} undone")

    def renew_routes(self, plan: RoutePlan, tun_name: str) -> Renewal:
        return "whole"

    def wide_routes(self, plan: RoutePlan) -> Sequence[str]:
        return self.wide

    @contextmanager
    def watch(self, changed: Callable[[], None]) -> Iterator[None]:
        self.changed = changed
        yield

    @contextmanager
    def dns(
        self, tun_name: str, servers: Sequence[IPv4Address], search: Sequence[str]
    ) -> Iterator[DnsOutcome]:
        self.journal.append("dns")
        try:
            yield self.dns_outcome
        finally:
            self.journal.append("dns undone")
