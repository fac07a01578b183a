"""The compiled engine behind the protocols of `tidegate.engine`. Nothing else imports `tidegate._engine`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

from tidegate import _engine
from tidegate._engine import Dropped, Nat, NatOptions
from tidegate.ciphers import WIREGUARD_CIPHER, CipherName
from tidegate.engine import (
    AccessPolicy,
    ClientOptions,
    EngineClient,
    EngineEvent,
    EngineGateway,
    EngineStatus,
    ExternalLink,
    GatewayOptions,
    MappingRecord,
    NatMapping,
)
from tidegate.errors import EngineUnresponsiveError
from tidegate.settings import NatSettings
from tidegate.settings.model import ALL_PORTS

__all__ = ["Dropped", "Nat", "NatOptions", "RustEngine"]


def _link(link: ExternalLink) -> _engine.ExternalLink:
    values = asdict(link) | {"addresses": list(link.addresses), "on_link": list(link.on_link)}
    return _engine.ExternalLink(**values)


def _nat_options(nat: NatSettings, kept_ports: tuple[int, int] | None) -> NatOptions:
    # The transitory timeout is only the default of two others, and the engine gets clients by address, not by name.
    values = nat.model_dump(exclude={"tcp_transitory_timeout", "other_protocols", "port_range"})
    return NatOptions(**values, port_range=nat.port_range or ALL_PORTS, kept_ports=kept_ports)


@contextmanager
def _in_words() -> Iterator[None]:
    """Around calls in which the engine's `RuntimeError` means that a thread hangs, or that it is not running."""
    try:
        yield
    except RuntimeError as cause:
        raise EngineUnresponsiveError(
            f"the packet engine: {cause}", hint="if this persists, restart the process"
        ) from cause


class RustEngine:
    """Makes the compiled engines."""

    def gateway(self, options: GatewayOptions) -> EngineGateway:
        return _RustGateway(
            _engine.Gateway(
                _engine.GatewayOptions(
                    private_key=options.private_key,
                    listen=options.listen,
                    subnet=options.subnet,
                    gateway_address=options.gateway_address,
                    tun_name=options.tun_name,
                    tunnel_mtu=options.tunnel_mtu,
                    external=_link(options.external),
                    host_addresses=list(options.host_addresses),
                    between_clients=options.access.between_clients,
                    denied=list(options.access.denied),
                    nat=_nat_options(options.nat, options.kept_ports),
                    offloads=_engine.Offloads(**options.offloads.model_dump()),
                    shards=options.shards,
                )
            )
        )

    def client(self, options: ClientOptions) -> EngineClient:
        inner = _engine.Client(
            _engine.ClientOptions(
                private_key=options.private_key,
                tun_name=options.tun_name,
                mtu=options.mtu,
                peer_public_key=options.peer_public_key,
                preshared_key=options.preshared_key,
                endpoint=options.endpoint,
                allowed_ips=list(options.allowed_ips),
                persistent_keepalive=options.persistent_keepalive,
                listen_port=options.listen_port,
                fwmark=options.fwmark,
                offloads=_engine.Offloads(**options.offloads.model_dump()),
                cipher=options.cipher,
            )
        )
        return _RustClient(inner)

    def aead_library(self, shards: int) -> str:
        return _engine.aead_library(shards)

    def aes_available(self) -> bool:
        return _engine.aes_available()

    def version(self) -> str:
        return _engine.version()


class _RustLifecycle:
    """What `_engine.Gateway` and `_engine.Client` have in common."""

    def __init__(self, inner: _engine.Gateway | _engine.Client) -> None:
        self._shards = inner

    def start(self) -> None:
        self._shards.start()

    def stop(self) -> None:
        with _in_words():
            self._shards.stop()

    def event_fd(self) -> int:
        return self._shards.event_fd()

    def poll_events(self) -> Sequence[EngineEvent]:
        return self._shards.poll_events()

    def status(self) -> EngineStatus:
        with _in_words():
            return self._shards.status()


class _RustClient(_RustLifecycle):
    """`_engine.Client`."""

    def __init__(self, inner: _engine.Client) -> None:
        super().__init__(inner)
        self._inner = inner

    def set_endpoint(self, endpoint: tuple[str, int]) -> None:
        self._inner.set_endpoint(endpoint)


class _RustGateway(_RustLifecycle):
    """`_engine.Gateway` with the Python side's own types in its signatures."""

    def __init__(self, inner: _engine.Gateway) -> None:
        super().__init__(inner)
        self._inner = inner

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
        self._inner.set_peer(public_key, address, preshared_key, cipher=cipher, endpoint=endpoint, call=call)

    def remove_peer(self, public_key: bytes) -> bool:
        return self._inner.remove_peer(public_key)

    def set_external(self, link: ExternalLink, host_addresses: Sequence[str]) -> None:
        self._inner.set_external(_link(link), list(host_addresses))

    def poll_mapping_log(self, limit: int) -> tuple[Sequence[MappingRecord], int]:
        return self._inner.poll_mapping_log(limit)

    def set_nat(self, nat: NatSettings, kept_ports: tuple[int, int] | None) -> None:
        self._inner.set_nat(_nat_options(nat, kept_ports))

    def set_access(self, access: AccessPolicy) -> None:
        self._inner.set_access(access.between_clients, list(access.denied))

    def pass_protocols(self, clients: dict[int, str]) -> None:
        self._inner.pass_protocols(clients)

    def publish(self, protocol: str, external_port: int, internal: tuple[str, int]) -> None:
        self._inner.publish(protocol, external_port, internal)

    def unpublish(self, protocol: str, external_port: int) -> bool:
        return self._inner.unpublish(protocol, external_port)

    def failed_publications(self) -> Sequence[tuple[str, int, str, str]]:
        return self._inner.failed_publications()

    def mappings(
        self,
        address: str | None = None,
        limit: int = 10_000,
        *,
        external: tuple[str | None, int] | None = None,
    ) -> Sequence[NatMapping]:
        with _in_words():
            return self._inner.mappings(address, limit, external=external)
