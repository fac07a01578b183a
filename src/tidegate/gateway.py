"""Assembles one gateway and runs it.

The steps, in order, undone in reverse: privileges, the external link as the host's kernel reports it, state directory
and its lock, store, key, the packet engine (which opens every socket and the TUN device), the TUN device's address (the
only change on the host), peers and publications, DNS proxy, control socket, and the tasks that watch link, peers and
engine. A step that fails undoes the ones before it: nothing is left half-done.

A gateway that was killed leaves nothing to clean up: the TUN device and the lock vanish with the process, and
the control socket's file is replaced.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from ipaddress import IPv4Interface

import structlog

from tidegate.control.admin import Administration
from tidegate.control.commands import ReloadSettings
from tidegate.control.context import AdminContext, Reloaded
from tidegate.control.server import ControlServer
from tidegate.dns import DnsProxy, DnsServer, Resolver, choose_upstreams, in_flight_within
from tidegate.dns.resolvers import DNS_PORT
from tidegate.engine import AccessPolicy, Engine, EngineGateway, ExternalLink, GatewayOptions
from tidegate.engine_watch import explain_engine, watch_engine
from tidegate.errors import EngineError, HostNetworkError, LockedError, SettingsError, TidegateError
from tidegate.host import Host, HostNetwork, InterfaceAddress
from tidegate.host.external import check_subnet, external_link, host_addresses
from tidegate.host.privileges import raise_open_file_limit
from tidegate.identity import load_or_make_private_key, public_key_of
from tidegate.lifecycle import Supervisor, on_signal
from tidegate.log import RateLimit, configure_logging
from tidegate.mapping_log import MappingLog
from tidegate.net import Endpoint
from tidegate.notify import ServiceManager
from tidegate.peer_watch import PeerWatch
from tidegate.settings import Settings
from tidegate.settings.changes import changed_keys, is_live, with_live_changes
from tidegate.settings.standards import below_the_standard
from tidegate.state_dir import StateDir
from tidegate.store import peer_names
from tidegate.store.sqlite import SqliteStore
from tidegate.upkeep import Outcome, Reading, keep

log = structlog.get_logger("tidegate.gateway")


class Gateway:
    """One gateway, from start to stop. Can be run once."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        host: Host,
        *,
        ready: Callable[[str], None] = lambda _: None,
        reread: Callable[[], Settings] | None = None,
    ) -> None:
        """`ready` is called with one line when the gateway serves. `reread` reads the settings again, from wherever
        they came."""
        self._settings = settings
        self._engines = engine
        self._host = host
        self._ready = ready
        self._reread = reread or (lambda: settings)
        self._supervisor = Supervisor()
        self._manager = ServiceManager()
        self._started_at = time.monotonic()
        self._engine: EngineGateway | None = None
        self._external: ExternalLink | None = None
        self.external_trouble: str | None = None
        """Why `external` cannot be used at the moment; `None`: it can."""
        self._external_was_away = False
        """Whether the interface may have been away since the engine opened its sockets on it: they may be bound to an
        interface that is gone, although the new one looks the same."""
        self._own_addresses: tuple[str, ...] = ()
        self._overlap: str | None = None
        """What the VPN's subnet has come to overlap since the start."""
        self._reading = Reading()
        self._admit_warning = RateLimit(time.monotonic, burst=1).admit
        self._kept_ports: tuple[int, int] | None = None
        self._dns: DnsServer | None = None
        self._dns_proxy: DnsProxy | None = None
        self._look_at_the_link: Callable[[], object] = lambda: None

    async def run(self) -> None:
        """Serves until SIGTERM or SIGINT. Raises `TidegateError` if it cannot start, or if a part of it dies."""
        async with AsyncExitStack() as undo:
            undo.callback(self._manager.close)
            await self._start(undo)
            await self._supervisor.wait()
            log.info("stopping", signal=self._supervisor.stop_signal and self._supervisor.stop_signal.name)
            self._manager.tell("STOPPING=1")

    def request_stop(self) -> None:
        """Makes `run` return. Idempotent."""
        self._supervisor.request_stop()

    # What administration sees of a running gateway (`LiveGateway`)

    @property
    def engine(self) -> EngineGateway:
        if self._engine is None:
            raise RuntimeError("the gateway has not been started")
        return self._engine

    @property
    def external(self) -> ExternalLink:
        if self._external is None:
            raise RuntimeError("the gateway has not been started")
        return self._external

    @property
    def settings(self) -> Settings:
        """Those in force."""
        return self._settings

    @property
    def uptime(self) -> float:
        return time.monotonic() - self._started_at

    def dns_counters(self) -> dict[str, int] | None:
        return self._dns.counters() if self._dns is not None else None

    def reload(self) -> Reloaded:
        """Reads the settings again and applies what needs no restart. Raises `TidegateError` if anything in them is
        wrong; nothing has changed then. Called in a worker thread, never twice at once."""
        wanted = self._reread()
        changed = changed_keys(self._settings, wanted)
        settings = with_live_changes(self._settings, wanted)
        if settings.external.addresses != self._settings.external.addresses:
            external_link(self._host.read_network(), settings.external)  # raises if the host lacks an address
        kept_ports = self._ports_to_keep(settings)
        if (settings.nat, kept_ports) != (self._settings.nat, self._kept_ports):
            try:
                self.engine.set_nat(settings.nat, kept_ports)
            except (OSError, ValueError) as cause:
                raise EngineError(f"the engine refuses the settings: {cause}") from cause
        # From here on nothing can fail.
        self.engine.set_access(_access_policy(settings))
        self._settings, self._kept_ports = settings, kept_ports
        configure_logging(settings.log)
        if self._dns_proxy is not None:
            self._dns_proxy.set_upstreams(self._upstreams())
        self._look_at_the_link()
        warnings = tuple(below_the_standard(settings.nat))
        for warning in warnings:
            log.warning(warning)
        applied = tuple(key for key in changed if is_live(key))
        needs_restart = tuple(key for key in changed if not is_live(key))
        log.info(
            "settings reloaded",
            applied=",".join(map(".".join, applied)) or "none",
            needs_restart=",".join(map(".".join, needs_restart)) or "none",
        )
        return Reloaded(applied, needs_restart, warnings)

    async def _start(self, undo: AsyncExitStack) -> None:
        settings, gateway = self._settings, self._settings.gateway
        state = StateDir(settings.state_dir)
        undo.enter_context(self._supervisor.stop_on_signals(signal.SIGTERM, signal.SIGINT))
        hung_up = asyncio.Event()
        undo.enter_context(on_signal(signal.SIGHUP, hung_up.set))
        for warning in below_the_standard(settings.nat):
            log.warning(warning)

        _check_listen(settings)
        self._host.check_privileges()
        network = await asyncio.to_thread(self._host.read_network)
        check_subnet(network, gateway.subnet, tun_name=gateway.tun_name)
        self._external = external_link(network, settings.external)
        self._own_addresses = host_addresses(network, tun_name=gateway.tun_name)
        if not self._external.has_default_route:
            _warn_of_no_default_route(self._external)

        state.prepare()
        if not await self._lock(state, undo):
            return
        self._host.check_listen_port(gateway.listen.address, gateway.listen.port)
        store = await asyncio.to_thread(SqliteStore, state.database)
        undo.callback(store.close)
        private_key = await asyncio.to_thread(load_or_make_private_key, state.key, partial(peer_names, store))

        open_files = raise_open_file_limit()
        engine = await self._open_engine(private_key)
        self._engine = engine
        undo.callback(engine.stop)
        await asyncio.to_thread(
            self._host.configure_tun, gateway.tun_name, self._tun_address, gateway.tunnel_mtu
        )

        admin = self._administration(store, private_key)
        peers, disabled = await self._restore(admin)

        self._open_dns(undo, open_files)
        control = ControlServer(state.control_socket, admin.execute)
        control.open()
        undo.callback(control.close)

        # The watch begins before the network is read a last time, so that no change falls between the two.
        changed = asyncio.Event()
        undo.enter_context(self._host.watch(changed.set))
        changed.set()
        loop = asyncio.get_running_loop()
        self._look_at_the_link = partial(loop.call_soon_threadsafe, changed.set)

        engine.start()
        peer_watch = PeerWatch(engine, store, admin.name_at)
        undo.push_async_callback(peer_watch.finish)
        undo.push_async_callback(self._supervisor.stop)  # last in, first out: tasks end before what they use
        self._start_tasks(peer_watch, MappingLog(engine, admin.name_at), control, changed, hung_up)
        self._announce(peers, disabled)

    def _administration(self, store: SqliteStore, private_key: bytes) -> Administration:
        context = AdminContext(
            lambda: self._settings,
            partial(public_key_of, private_key),
            self._suggested_endpoint,
            time.time,
            self._engines.aes_available,
        )
        return Administration(store, context, self)

    async def _restore(self, admin: Administration) -> tuple[int, int]:
        """Gives the engine the peers of the store, and what is published or passed to them. Returns how many peers it
        has, and how many are disabled. A port or protocol that the engine refuses is logged, and the rest is served.
        Raises `EngineError` if it refuses a peer."""
        try:
            peers, disabled = await asyncio.to_thread(admin.restore)
        except OSError as cause:
            raise EngineError(f"the engine refuses a peer of the store: {cause.strerror or cause}") from cause
        for warning in admin.pass_protocols():
            log.warning(warning)
        for external, why in admin.failed_publications.items():
            log.warning("a port is not published", port=external, cause=why)
        return peers, disabled

    def _start_tasks(
        self,
        peer_watch: PeerWatch,
        mapping_log: MappingLog,
        control: ControlServer,
        changed: asyncio.Event,
        hung_up: asyncio.Event,
    ) -> None:
        """`changed` is set when the host's network has changed, `hung_up` on SIGHUP."""
        handlers = {
            "external_down": self._external_is_down,
            "handshake_completed": peer_watch.handshake_completed,
        }
        self._supervisor.start(
            "engine-events",
            lambda: watch_engine(
                self.engine, self._supervisor, handlers=handlers, read_log=mapping_log.write
            ),
        )
        self._supervisor.start("peer-watch", lambda: peer_watch.run(self._supervisor))
        self._supervisor.start("link-watch", lambda: self._watch_link(changed))
        if self._dns is not None:
            self._supervisor.start("dns", self._dns.run)
        self._supervisor.start("control", control.run)
        self._supervisor.start("reload", lambda: self._reload_on(hung_up, control))

    @property
    def _tun_address(self) -> IPv4Interface:
        gateway = self._settings.gateway
        return IPv4Interface(f"{gateway.address}/{gateway.subnet.prefixlen}")

    async def _lock(self, state: StateDir, undo: AsyncExitStack) -> bool:
        """Takes the state directory's lock, after waiting for a command that holds it. `False` if a stop was
        requested. Warns of a directory that is not the gateway's alone."""
        if warning := state.warning():
            log.warning(warning)
        given_up = threading.Event()
        lock = state.lock("gateway", given_up=given_up)
        locking = asyncio.create_task(asyncio.to_thread(undo.enter_context, lock))
        stopped = asyncio.create_task(self._supervisor.stopped())
        await asyncio.wait({locking, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        given_up.set()
        try:
            await locking
        except LockedError:
            if not self._supervisor.stop_requested:
                raise
        return not self._supervisor.stop_requested

    async def _open_engine(self, private_key: bytes) -> EngineGateway:
        gateway = self._settings.gateway
        self._kept_ports = self._ports_to_keep(self._settings)
        options = GatewayOptions(
            private_key=private_key,
            listen=(str(gateway.listen.address), gateway.listen.port),
            subnet=str(gateway.subnet),
            gateway_address=str(gateway.address),
            tun_name=gateway.tun_name,
            tunnel_mtu=gateway.tunnel_mtu,
            external=self.external,
            host_addresses=self._own_addresses,
            access=_access_policy(self._settings),
            nat=self._settings.nat,
            kept_ports=self._kept_ports,
            offloads=self._settings.offloads,
            shards=gateway.shards,
        )
        try:
            return await asyncio.to_thread(self._engines.gateway, options)
        except OSError as cause:
            raise explain_engine(
                cause, gateway.tun_name, naming="[gateway] tun_name", port="port with --listen"
            ) from cause
        except ValueError as cause:
            raise EngineError(f"the engine refuses the settings: {cause}") from cause

    def _ports_to_keep(self, settings: Settings) -> tuple[int, int] | None:
        """None where the settings name a range: whoever sets one has thought of the host's programs."""
        return self._host.kept_ports() if settings.nat.port_range is None else None

    def _open_dns(self, undo: AsyncExitStack, open_files: int) -> None:
        gateway = self._settings.gateway
        if not self._settings.dns.enabled:
            return
        self._dns_proxy = DnsProxy(
            self._upstreams(),
            find_upstreams=self._upstreams,
            max_in_flight=in_flight_within(open_files),
        )
        self._dns = DnsServer(self._dns_proxy, gateway.address, gateway.subnet)
        self._dns.open()
        undo.callback(self._dns.close)

    def _upstreams(self) -> list[Resolver]:
        """The resolvers that the settings name, otherwise the host's current ones."""
        return choose_upstreams(self._settings.dns.upstreams, own=self._settings.gateway.address)

    def _suggested_endpoint(self) -> Endpoint | None:
        return self._settings.gateway.listen.reached_at(self.external.addresses[0])

    def _announce(self, peers: int, disabled: int) -> None:
        external = self.external
        line = (
            f"listening on {self._settings.gateway.listen} (UDP), external {external.interface} "
            f"{', '.join(external.addresses)}, {peers} {'peer' if peers == 1 else 'peers'}"
        )
        if disabled:
            line += f" (and {disabled} disabled)"
        self._ready(line)
        self._manager.tell(f"READY=1\nSTATUS={line}")

    async def _reload_on(self, hung_up: asyncio.Event, control: ControlServer) -> None:
        """Reloads the settings on SIGHUP, as `tidegate reload` does."""
        while True:
            await hung_up.wait()
            hung_up.clear()
            # For systemd's Type=notify-reload.
            self._manager.tell(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            try:
                await control.execute(ReloadSettings())
            except TidegateError as refused:  # of which `Administration` has told the log
                log.debug("the reload on SIGHUP was refused", cause=str(refused))
            except Exception:  # as over the control socket, no command takes the gateway down
                log.exception("reloading the settings failed unexpectedly")
            self._manager.tell("READY=1")

    async def _watch_link(self, changed: asyncio.Event) -> None:
        """Whenever the host's network changes: gives the engine the new external link, and the DNS proxy the new
        resolvers, and restores the TUN device."""
        await keep(self._follow_network, changed, self._supervisor, self._reading)

    async def _follow_network(self) -> Outcome:
        # Before the network is read: whatever happens from here on makes the engine be told again.
        was_away, self._external_was_away = self._external_was_away, False
        if self._dns_proxy is not None:
            await self._dns_proxy.look_up_upstreams()
        try:
            network = await self._reading("host-network", self._host.read_network)
        except HostNetworkError as cause:
            self._link_is_unusable(cause.message)
            return "failed"
        await self._look_for_overlap(network)
        tun = await self._restore_tun(network)
        return tun if await self._follow_link(network, was_away) else "failed"

    async def _look_for_overlap(self, network: HostNetwork) -> None:
        """Warns of what would have been refused at the start. The gateway goes on: only part of the subnet may be
        concerned, and the host's network may change again."""
        gateway = self._settings.gateway
        was, self._overlap = self._overlap, None
        try:
            check = partial(check_subnet, network, gateway.subnet, tun_name=gateway.tun_name)
            await self._reading("overlap", check)  # very many routes take a while
        except HostNetworkError as cause:
            self._overlap = str(cause)
            if self._overlap != was:
                log.warning("the host reaches addresses of the VPN another way", cause=self._overlap)

    async def _restore_tun(self, network: HostNetwork) -> Outcome:
        """Gives our TUN device back the address that another program has removed, and sets it up again."""
        gateway = self._settings.gateway
        device, address = network.interface_named(gateway.tun_name), self._tun_address
        if device is None:  # it was deleted: the engine tells
            return "whole"
        if device.up and InterfaceAddress(device.index, address) in network.addresses:
            return "whole"
        suppressed = self._admit_warning("tun")
        if suppressed is not None:
            log.warning(
                "the TUN device has lost its address or was set down: it is restored",
                device=gateway.tun_name,
                address=str(address),
                suppressed=suppressed,
            )
        try:
            await asyncio.to_thread(self._host.configure_tun, gateway.tun_name, address, gateway.tunnel_mtu)
        except HostNetworkError as cause:
            log.warning("the TUN device cannot be restored yet", cause=cause.message)
            return "failed"
        return "restored"

    async def _follow_link(self, network: HostNetwork, was_away: bool) -> bool:
        """Whether the engine has the link as it is now."""
        own = host_addresses(network, tun_name=self._settings.gateway.tun_name)
        try:
            link = external_link(network, self._settings.external)
        except HostNetworkError as cause:
            self._link_is_unusable(cause.message)
            await self._tell_own_addresses(own)
            return False
        if (link, own) == (self._external, self._own_addresses) and not was_away:
            return True
        try:
            await asyncio.to_thread(self.engine.set_external, link, own)
        except OSError as cause:
            self._link_is_unusable(cause.strerror or str(cause))
            return False
        # Addresses elsewhere on the host come and go with every container that it starts and stops.
        say = log.debug if link == self.external and not was_away else log.info
        say(
            "the external link is back" if was_away else "the host's network changed",
            interface=link.interface,
            addresses=",".join(link.addresses),
            next_hop=link.router,
        )
        if self.external.has_default_route and not link.has_default_route:
            _warn_of_no_default_route(link)
        elif link.has_default_route and not self.external.has_default_route:
            log.info("a default route leads out of the external interface again", interface=link.interface)
        self._external, self._own_addresses = link, own
        self.external_trouble = None
        return True

    async def _tell_own_addresses(self, own: tuple[str, ...]) -> None:
        """Gives the engine the host's own addresses, which clients reach without the external link, and the link that
        it has, whose addresses stay the host's as long as they are translated to. Where the link's interface is gone
        the engine refuses, and is told both when there is one."""
        own = tuple(dict.fromkeys((*self.external.addresses, *own)))
        if own == self._own_addresses:
            return
        try:
            await asyncio.to_thread(self.engine.set_external, self.external, own)
        except OSError as cause:
            log.debug("the engine does not take the host's addresses yet", cause=str(cause.strerror or cause))
        else:
            self._own_addresses = own

    def _link_is_unusable(self, cause: str) -> None:
        if cause != self.external_trouble:
            log.warning("the external link is not usable", cause=cause)
        self.external_trouble = cause
        self._external_was_away = True

    def _external_is_down(self) -> None:
        """The engine noticed; the host's network may look unchanged by the time it is read."""
        self._external_was_away = True
        self._look_at_the_link()


def _warn_of_no_default_route(link: ExternalLink) -> None:
    """It is allowed: the clients may be meant to reach just these networks."""
    log.warning(
        "no default route leads out of the external interface: clients reach only its own networks",
        interface=link.interface,
        networks=",".join(link.on_link) or "none",
    )


def _access_policy(settings: Settings) -> AccessPolicy:
    return AccessPolicy(settings.gateway.between_clients, tuple(map(str, settings.external.deny)))


def _check_listen(settings: Settings) -> None:
    """Raises `SettingsError` if WireGuard and the DNS proxy would share a UDP port: 0.0.0.0 includes the gateway's own
    address. (The settings themselves refuse to listen inside the subnet.)"""
    listen = settings.gateway.listen
    if settings.dns.enabled and listen.port == DNS_PORT and listen.address.is_unspecified:
        raise SettingsError(
            f"[gateway] listen: {listen} takes the port on which the gateway answers DNS",
            hint="listen on one address of the host or on another port, or set [dns] enabled = false",
        )
