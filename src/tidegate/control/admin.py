"""Carries out commands: on the store, and at once on the engine where one runs.

The store is written first, then the engine; if the engine refuses, the store is rolled back, so that a command is
carried out completely or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from typing import Protocol, cast

import structlog

from tidegate import VERSION
from tidegate.ciphers import CipherName, check_cipher
from tidegate.control.commands import (
    Answer,
    AnswerT,
    Command,
    GatewayStatus,
    MappingView,
    NatCounted,
    NatList,
    NatListed,
    NatStats,
    PeerAdd,
    PeerAdded,
    PeerDisable,
    PeerDisabled,
    PeerEnable,
    PeerEnabled,
    PeerList,
    PeerListed,
    PeerRemove,
    PeerRemoved,
    PeerRename,
    PeerRenamed,
    PeerRenew,
    PeerRenewed,
    PeerView,
    PublishAdd,
    PublishList,
    PublishRemove,
    ReloadSettings,
    SettingsReloaded,
    StatusQuery,
)
from tidegate.control.publications import Publications
from tidegate.engine import EngineGateway, EngineStatus, ExternalLink, PeerStatus
from tidegate.errors import (
    EngineError,
    NotRunningError,
    SettingsError,
    StoreError,
    TidegateError,
    UsageError,
)
from tidegate.identity.keys import decode_key, encode_key, parse_public_key
from tidegate.ip_protocols import protocol_key, protocol_name
from tidegate.net import Endpoint, parse_peer_address
from tidegate.settings import Key, Settings
from tidegate.store import LastSeen, Peer, Publication, Store, check_peer_name, key_taken

log = structlog.get_logger("tidegate.control")

CALL_WITHIN = 300.0
"""A peer whose last handshake was less than so many seconds before the gateway's start is called, for it may take its
session for alive and wait: a session of 180 s, 60 s at most until the store knew of the handshake
(`peer_watch.SAVE_INTERVAL`), and a minute for the restart. A client whose session is over begins anew by itself."""


class LiveGateway(Protocol):
    """What administration needs from a running gateway."""

    @property
    def engine(self) -> EngineGateway: ...
    @property
    def external(self) -> ExternalLink: ...
    @property
    def external_trouble(self) -> str | None: ...
    @property
    def uptime(self) -> float: ...
    def dns_counters(self) -> dict[str, int] | None: ...
    def reload(self) -> Reloaded: ...


@dataclass(frozen=True, slots=True)
class Reloaded:
    """The outcome of reloading the settings."""

    settings: Settings
    """The settings in force now."""
    applied: tuple[Key, ...]
    needs_restart: tuple[Key, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AdminContext:
    """What administration needs to know apart from the store."""

    settings: Settings
    public_key: Callable[[], bytes]
    """The gateway's own. Raises `StoreError`."""
    suggested_endpoint: Callable[[], Endpoint | None]
    """Where clients would find the gateway, if the settings do not say."""
    now: Callable[[], float]
    """Seconds since the epoch."""
    aes_available: Callable[[], bool]


class Administration:
    """Carries out commands. Not safe to use from two threads at once."""

    def __init__(self, store: Store, context: AdminContext, live: LiveGateway | None = None) -> None:
        self._store = store
        self._context = context
        self._live = live
        self._publications = Publications(store, live.engine if live is not None else None)
        self._names: dict[str, str] = {}
        self._passed: dict[int, str] = {}

    def name_at(self, address: str) -> str | None:
        """The peer that holds the address, or held it last: its mappings outlive it by a moment. One name is remembered
        per address of the subnet."""
        return self._names.get(address)

    def execute(self, command: Command[AnswerT]) -> AnswerT:
        """Raises `TidegateError`."""
        return cast(AnswerT, self._dispatch(command))

    def _dispatch(self, command: Command[AnswerT]) -> Answer:  # noqa: PLR0911, PLR0912 -- one per command
        match command:
            case PeerAdd():
                return self._peer_add(command)
            case PeerList():
                return self._peer_list(command)
            case PeerRemove():
                return self._peer_remove(command)
            case PeerDisable():
                return self._peer_disable(command)
            case PeerEnable():
                return self._peer_enable(command)
            case PeerRename():
                return self._peer_rename(command)
            case PeerRenew():
                return self._peer_renew(command)
            case PublishAdd():
                return self._publications.add(command)
            case PublishRemove():
                return self._publications.remove(command)
            case PublishList():
                return self._publications.listed()
            case NatList():
                return self._nat_list(command)
            case NatStats():
                return self._nat_stats()
            case StatusQuery():
                return self._status()
            case ReloadSettings():
                return self._reload()
        raise UsageError(f"unknown command {type(command).__name__}")

    def restore(self) -> tuple[int, int]:
        """Gives a new engine every peer that is enabled, and every publication, and has it call the peers that were
        connected to the last (`CALL_WITHIN`). Returns how many peers that are, and how many are disabled.

        Raises `SettingsError` if a peer's address is not in the subnet, `EngineError` if the machine cannot run its
        cipher, `OSError` if the engine refuses a peer.
        """
        peers, last_seen = self._store.peers(), self._store.last_seen()
        self._check_subnet(peers)
        enabled = [peer for peer in peers if peer.enabled]
        for peer in enabled:
            self._check_own_cipher(peer)
        for peer in enabled:
            self._set_peer(peer, last_seen.get(peer.public_key))
        self._publications.restore()
        return len(enabled), len(peers) - len(enabled)

    @property
    def failed_publications(self) -> dict[str, str]:
        """External ports that could not be published, and why."""
        return self._publications.failed

    # Peers

    def _peer_add(self, command: PeerAdd) -> PeerAdded:
        name = check_peer_name(command.name)
        self._check_cipher(command.cipher, name, "add the peer without --cipher")
        if self._live is None:  # a running gateway has checked already
            self._check_subnet(self._store.peers())
        public_key, preshared_key = self._keys_of(command)
        peer = self._store.add_peer(
            name,
            public_key,
            preshared_key,
            subnet=self._context.settings.gateway.subnet,
            reserved=self._reserved(),
            address=self._address(command.address),
            now=self._context.now(),
            cipher=command.cipher,
        )
        if self._live is not None:
            try:
                self._admit(peer)
            except BaseException:  # whatever it is: no command is left half-done
                self._store.remove_peer(name)
                raise
            log.info("peer added", **_for_the_log(peer), cipher=peer.cipher)
            self._pass_protocols_and_log()
        return self._for_the_profile(peer)

    def _keys_of(self, command: PeerAdd | PeerRenew) -> tuple[bytes, bytes | None]:
        """The public and the preshared key. Raises `UsageError` for keys that no peer can have, and `StoreError`."""
        try:
            public_key = parse_public_key(command.public_key)
            preshared_key = decode_key(command.preshared_key) if command.preshared_key is not None else None
        except ValueError as cause:
            raise UsageError(f"the key of {command.name!r} {cause}") from None
        if public_key == self._context.public_key():
            raise UsageError(
                f"the key of {command.name!r} is the gateway's own",
                hint="give the public key of the peer's device",
            )
        return public_key, preshared_key

    def _for_the_profile(self, peer: Peer) -> PeerAdded:
        gateway = self._context.settings.gateway
        endpoint = gateway.endpoint or self._context.suggested_endpoint()
        return PeerAdded(
            peer=_peer_view(peer, None),
            gateway_public_key=encode_key(self._context.public_key()),
            gateway_address=str(gateway.address),
            listen_port=gateway.listen.port,
            endpoint=str(endpoint) if endpoint else None,
            mtu=gateway.tunnel_mtu,
            dns=list(map(str, self._context.settings.profile_servers)),
        )

    def _check_subnet(self, peers: Iterable[Peer]) -> None:
        subnet = self._context.settings.gateway.subnet
        for peer in peers:
            if peer.address not in subnet or peer.address in self._reserved():
                raise SettingsError(
                    f"peer {peer.name!r} has address {peer.address}, "
                    f"which no peer can have in [gateway] subnet {subnet}",
                    hint=f"restore the former [gateway] subnet, or `tidegate peer remove {peer.name}` and add it again",
                )

    def _admit(self, peer: Peer) -> None:
        """Gives the engine a peer. Raises `EngineError` if it refuses, and `StoreError`."""
        try:
            self._set_peer(peer, self._store.last_seen().get(peer.public_key))
        except (OSError, ValueError, RuntimeError) as cause:
            raise EngineError(f"the engine refuses peer {peer.name!r}: {cause}") from cause

    def _set_peer(self, peer: Peer, seen: LastSeen | None) -> None:
        """Gives the engine a peer, and has it call one that was connected a moment ago. Raises what the engine does."""
        self._names[str(peer.address)] = peer.name
        self._running().engine.set_peer(
            peer.public_key,
            str(peer.address),
            peer.preshared_key,
            cipher=peer.cipher,
            endpoint=seen.endpoint if seen is not None else None,
            # A handshake in the future: the clock was set back, and nobody knows how old it is.
            call=seen is not None and self._context.now() - seen.handshake_at < CALL_WITHIN,
        )

    def _readmit(self, peer: Peer, publications: Iterable[Publication]) -> list[str]:
        """Gives the engine a peer that has been there before, and its publications. Returns why some of these failed.
        Raises `EngineError` and `StoreError`."""
        self._admit(peer)
        warnings = self._publications.restore_some(publications)
        for warning in warnings:
            log.warning(warning)
        return warnings

    def _expel(self, peer: Peer) -> None:
        """Takes a peer out of the engine, with its sessions, mappings, published ports and other protocols."""
        self._running().engine.remove_peer(peer.public_key)
        self._passed = {
            number: holder for number, holder in self._passed.items() if holder != str(peer.address)
        }

    def _check_own_cipher(self, peer: Peer) -> None:
        self._check_cipher(peer.cipher, peer.name, f"`tidegate peer remove {peer.name}` and add it again")

    def _check_cipher(self, cipher: CipherName, peer: str, hint: str) -> None:
        check_cipher(cipher, self._context.aes_available, user=f"peer {peer!r}", hint=hint)

    def _reserved(self) -> frozenset[IPv4Address]:
        gateway = self._context.settings.gateway
        subnet = gateway.subnet
        return frozenset({subnet.network_address, gateway.address, subnet.broadcast_address})

    def _address(self, text: str | None) -> IPv4Address | None:
        if text is None:
            return None
        try:
            return parse_peer_address(text, self._context.settings.gateway.subnet)
        except ValueError as cause:
            raise UsageError(str(cause)) from None

    def _peer_list(self, command: PeerList) -> PeerListed:
        status = self._live.engine.status() if self._live is not None else None
        return PeerListed(running=status is not None, peers=self._peer_views(status, command.name))

    def _peer_views(self, status: EngineStatus | None, name: str | None = None) -> list[PeerView]:
        """Of the peer with that name, or of all."""
        counters = {entry.public_key: entry for entry in status.peers} if status is not None else {}
        last_seen, now = self._store.last_seen(), self._context.now()
        return [
            _peer_view(peer, counters.get(peer.public_key), last_seen.get(peer.public_key), now)
            for peer in self._store.peers()
            if name in (None, peer.name)
        ]

    def _peer_remove(self, command: PeerRemove) -> PeerRemoved:
        peer, publications = self._store.remove_peer(command.name)
        if self._live is not None:
            # First, so that the peer is out even if the store fails from here on. Its publications go with it.
            self._expel(peer)
            self._publications.withdraw(publications)
            log.info(
                "peer removed", **_for_the_log(peer), no_longer_published=_ports_for_the_log(publications)
            )
            self._pass_protocols_and_log()
        return PeerRemoved(peer=_peer_view(peer, None), publications=_ports(publications))

    def _peer_disable(self, command: PeerDisable) -> PeerDisabled:
        before = self._store.peer(command.name)
        publications = self._publications.of(command.name)
        peer = self._store.set_peer_enabled(command.name, False)
        if self._live is not None and before.enabled:
            self._expel(peer)
            self._publications.withdraw(publications)
            log.info(
                "peer disabled", **_for_the_log(peer), no_longer_published=_ports_for_the_log(publications)
            )
            self._pass_protocols_and_log()
        return PeerDisabled(peer=_peer_view(peer, None), publications=_ports(publications))

    def _peer_enable(self, command: PeerEnable) -> PeerEnabled:
        before = self._store.peer(command.name)
        publications = self._publications.of(command.name)
        self._check_own_cipher(before)
        peer = self._store.set_peer_enabled(command.name, True)
        warnings: list[str] = []
        if self._live is not None and not before.enabled:
            try:
                warnings = self._readmit(peer, publications)
            except BaseException:  # whatever it is: no command is left half-done
                self._expel(peer)
                self._publications.withdraw(publications)
                self._store.set_peer_enabled(command.name, False)
                raise
            log.info("peer enabled", **_for_the_log(peer), published=_ports_for_the_log(publications))
            self._pass_protocols_and_log()
        return PeerEnabled(peer=_peer_view(peer, None), publications=_ports(publications), warnings=warnings)

    def _peer_rename(self, command: PeerRename) -> PeerRenamed:
        peer = self._store.rename_peer(command.name, check_peer_name(command.new_name))
        protocols = self._context.settings.nat.other_protocols
        settings = [
            f"nat.other_protocols.{protocol_key(number)}"
            for number, name in protocols.items()
            if name == command.name
        ]
        if self._live is not None:
            self._names[str(peer.address)] = peer.name
            log.info("peer renamed", former_name=command.name, **_for_the_log(peer))
            for setting in settings:
                log.warning("a setting still has a peer's former name", setting=setting, peer=command.name)
            self._pass_protocols_and_log()
        return PeerRenamed(peer=_peer_view(peer, None), former_name=command.name, settings=settings)

    def _peer_renew(self, command: PeerRenew) -> PeerRenewed:
        public_key, preshared_key = self._keys_of(command)
        before = self._store.peer(command.name)
        if command.dry_run:
            for other in self._store.peers():
                if other.public_key == public_key:
                    raise key_taken(other.name)
            peer, warnings = replace(before, public_key=public_key, preshared_key=preshared_key), []
        else:
            publications = self._publications.of(command.name)
            peer = self._store.replace_keys(command.name, public_key, preshared_key)
            warnings = self._readmit_with_new_keys(before, peer, publications)
        return PeerRenewed(**dict(self._for_the_profile(peer)), warnings=warnings)

    def _readmit_with_new_keys(
        self, before: Peer, peer: Peer, publications: Sequence[Publication]
    ) -> list[str]:
        """For the engine, which knows peers by their keys, it is another peer."""
        if self._live is None:
            return []
        warnings: list[str] = []
        if before.enabled:
            kept = self._passed
            try:
                self._expel(before)
                self._publications.withdraw(publications)
                warnings = self._readmit(peer, publications)
            except BaseException:  # whatever it is: no command is left half-done
                self._expel(peer)
                self._store.replace_keys(before.name, before.public_key, before.preshared_key)
                self._readmit(before, publications)
                raise
            finally:
                self._pass_protocols_and_log(kept)
        log.info("peer renewed", **_for_the_log(peer), former_public_key=encode_key(before.public_key))
        return warnings

    # Of a running gateway

    def _running(self) -> LiveGateway:
        if self._live is None:
            raise NotRunningError(
                f"no gateway is running with state directory {self._context.settings.state_dir}",
                hint="start one with `tidegate serve`, or name another with --state-dir",
            )
        return self._live

    def _nat_list(self, command: NatList) -> NatListed:
        live = self._running()
        names = {str(peer.address): peer.name for peer in self._store.peers()}
        address = str(self._store.peer(command.peer).address) if command.peer is not None else None
        external: tuple[str | None, int] | None = None
        if command.external is not None:
            at, port = command.external
            external = (None if at is None else str(at), port)
        # One more than asked for, to know whether there are more.
        found = live.engine.mappings(address, command.limit + 1, external=external)
        return NatListed(
            mappings=[
                MappingView(
                    protocol=entry.protocol,
                    internal=_pair(entry.internal),
                    external=_pair(entry.external),
                    peer=names.get(entry.internal[0]),
                    state=entry.state,
                    age=entry.age,
                    idle=entry.idle,
                    expires_in=entry.expires_in,
                    sessions=entry.sessions,
                )
                for entry in found[: command.limit]
            ],
            truncated=len(found) > command.limit,
        )

    def _nat_stats(self) -> NatCounted:
        status = self._running().engine.status()
        nat = self._context.settings.nat
        return NatCounted(
            mappings=dict(status.mappings),
            sessions=status.sessions,
            clients=status.clients,
            reserved_ports=dict(status.reserved_ports),
            resting_ports=status.resting_ports,
            limits={
                "max_mappings": nat.max_mappings,
                "max_mappings_per_client": nat.max_mappings_per_client,
                "max_new_mappings_per_second": nat.max_new_mappings_per_second,
                "max_sessions_per_mapping": nat.max_sessions_per_mapping,
            },
            drops=dict(status.drops),
            explanations=dict(status.explanations),
        )

    def _reload(self) -> SettingsReloaded:
        live = self._running()
        try:
            reloaded = live.reload()
        except TidegateError as refused:
            log.warning("settings not reloaded: the old ones stay in force", cause=str(refused))
            raise
        self._context = replace(self._context, settings=reloaded.settings)
        unmet = [*self.pass_protocols(), *self._publications.retry()]
        for warning in unmet:  # after SIGHUP nobody gets the answer
            log.warning(warning)
        return SettingsReloaded(
            applied=[".".join(key) for key in reloaded.applied],
            needs_restart=[".".join(key) for key in reloaded.needs_restart],
            warnings=[*reloaded.warnings, *unmet],
        )

    def pass_protocols(self, *, kept: Mapping[int, str] | None = None) -> list[str]:
        """Tells the engine which client gets each protocol without ports, as the settings assign them to peers. Where
        no peer has the name that they say, the client in `kept` has the protocol, if there is one. Returns what stood
        in the way: a peer that does not exist (yet) or is disabled, a store that cannot be read, or the engine's
        refusal."""
        wanted = self._context.settings.nat.other_protocols
        try:
            peers = {peer.name: peer for peer in self._store.peers()} if wanted else {}
        except StoreError as cause:
            return [f"[nat] other_protocols: the peers cannot be looked up: {cause}"]
        holders = {name: str(peer.address) for name, peer in peers.items() if peer.enabled}
        clients = {
            number: client
            for number, name in wanted.items()
            if (client := holders.get(name) or (kept or {}).get(number)) is not None
        }
        unmet = [
            f"[nat] other_protocols: {protocol_name(number)} goes to {name!r}, but "
            + ("that peer is disabled" if name in peers else "there is no such peer")
            for number, name in wanted.items()
            if number not in clients
        ]
        if clients != self._passed:
            try:
                self._running().engine.pass_protocols(clients)
                self._passed = clients
            except (OSError, ValueError) as cause:
                unmet.append(f"[nat] other_protocols: the engine refuses: {cause}")
        return unmet

    def _pass_protocols_and_log(self, kept: Mapping[int, str] | None = None) -> None:
        """For commands that succeed whatever stands in the way of this. A peer that was renamed keeps its protocols
        until the settings are read again, so that there is time to change them."""
        for warning in self.pass_protocols(kept=self._passed if kept is None else kept):
            log.warning(warning)

    def _status(self) -> GatewayStatus:
        live = self._running()
        status = live.engine.status()
        gateway = self._context.settings.gateway
        return GatewayStatus(
            version=VERSION,
            pid=os.getpid(),
            uptime=live.uptime,
            listen=str(gateway.listen),
            public_key=encode_key(self._context.public_key()),
            subnet=str(gateway.subnet),
            gateway_address=str(gateway.address),
            external_interface=live.external.interface,
            external_addresses=list(live.external.addresses),
            next_hop=live.external.router,
            default_route=live.external.has_default_route,
            external_trouble=live.external_trouble,
            shards=status.shards,
            offloads=dict(status.offloads),
            peers=self._peer_views(status),
            mappings=dict(status.mappings),
            reserved_ports=dict(status.reserved_ports),
            packets=dict(status.packets),
            bytes=dict(status.bytes),
            drops=dict(status.drops),
            dns=live.dns_counters(),
        )


def _pair(endpoint: tuple[str, int]) -> str:
    return f"{endpoint[0]}:{endpoint[1]}"


def _for_the_log(peer: Peer) -> dict[str, str]:
    return {"name": peer.name, "address": str(peer.address), "public_key": encode_key(peer.public_key)}


def _ports(publications: Iterable[Publication]) -> list[str]:
    return [publication.external_text for publication in publications]


def _ports_for_the_log(publications: Iterable[Publication]) -> str:
    return ",".join(_ports(publications)) or "none"


def _peer_view(
    peer: Peer, counters: PeerStatus | None, seen: LastSeen | None = None, now: float = 0.0
) -> PeerView:
    """`seen` tells of a peer that has made no handshake since the gateway's start; `now`: seconds since the epoch."""
    view = PeerView(
        name=peer.name,
        address=str(peer.address),
        public_key=encode_key(peer.public_key),
        created_at=peer.created_at,
        cipher=peer.cipher,
        enabled=peer.enabled,
        endpoint=_pair(seen.endpoint) if seen is not None else None,
        # The clock may have been set back since.
        last_handshake=max(0.0, now - seen.handshake_at) if seen is not None else None,
    )
    if counters is None:
        return view
    return view.model_copy(
        update={
            "endpoint": _pair(counters.endpoint) if counters.endpoint else view.endpoint,
            "last_handshake": (
                counters.last_handshake if counters.last_handshake is not None else view.last_handshake
            ),
            "received_bytes": counters.received_bytes,
            "sent_bytes": counters.sent_bytes,
            "received_packets": counters.received_packets,
            "sent_packets": counters.sent_packets,
            "mappings": counters.mappings,
        }
    )
