"""Peers: in the store, and at once in the engine where one runs.

A command first checks what the store cannot (whether the gateway can serve such a key, address or cipher), then writes
the store, which refuses a name, an address or a key that is taken, then tells the engine. If the engine refuses, the
store gets back what it had. Where no gateway runs, the engine's part is left out.

What leads to a peer comes and goes with it: one that leaves the engine takes its published ports and the protocols
passed to it along, and one that is enabled again, or gets new keys (for the engine another peer), has them restored. By
then a program on the host may have taken a port, which makes the command warn, but not fail.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from ipaddress import IPv4Address

import structlog

from tidegate.ciphers import CipherName, check_cipher
from tidegate.control.commands import (
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
)
from tidegate.control.context import AdminContext
from tidegate.control.other_protocols import OtherProtocols
from tidegate.control.publications import Publications
from tidegate.control.views import peer_view
from tidegate.engine import EngineGateway, EngineStatus
from tidegate.errors import EngineError, SettingsError, UsageError
from tidegate.identity.keys import decode_key, encode_key, parse_public_key
from tidegate.net import parse_peer_address
from tidegate.settings import GatewaySettings
from tidegate.store import LastSeen, Peer, Publication, Store, check_peer_name, key_taken

log = structlog.get_logger("tidegate.control")

CALL_WITHIN = 300.0
"""A peer whose last handshake was less than so many seconds before the gateway's start is called, for it may take its
session for alive and wait: a session of 180 s, 60 s at most until the store knew of the handshake
(`peer_watch.SAVE_INTERVAL`), and a minute for the restart. A client whose session is over begins anew by itself."""


class Peers:
    """The clients that may connect. `engine` is that of a running gateway, None where none runs."""

    def __init__(
        self,
        store: Store,
        context: AdminContext,
        engine: EngineGateway | None,
        publications: Publications,
        other_protocols: OtherProtocols,
    ) -> None:
        self._store = store
        self._context = context
        self._engine = engine
        self._publications = publications
        self._other_protocols = other_protocols
        self._names: dict[str, str] = {}

    def name_at(self, address: str) -> str | None:
        """The peer that holds the address, or held it last: its mappings outlive it by a moment. One name is remembered
        per address of the subnet."""
        return self._names.get(address)

    def restore(self) -> tuple[int, int]:
        """Gives a new engine every peer that is enabled, and has it call those that were connected to the last
        (`CALL_WITHIN`). Returns how many peers it has, and how many are disabled.

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
        return len(enabled), len(peers) - len(enabled)

    # Commands. All of them raise `TidegateError`.

    def add(self, command: PeerAdd) -> PeerAdded:
        name = check_peer_name(command.name)
        self._check_cipher(command.cipher, name, "add the peer without --cipher")
        if self._engine is None:  # a running gateway has checked already
            self._check_subnet(self._store.peers())
        public_key, preshared_key = self._keys_of(command)
        peer = self._store.add_peer(
            name,
            public_key,
            preshared_key,
            subnet=self._gateway.subnet,
            reserved=self._reserved(),
            address=self._address(command.address),
            now=self._context.now(),
            cipher=command.cipher,
        )
        try:
            self._admit(peer)
        except BaseException:  # whatever it is: no command is left half-done
            self._store.remove_peer(name)
            raise
        self._log("peer added", peer, cipher=peer.cipher)
        self._other_protocols.pass_on_and_log()
        return self._for_the_profile(peer)

    def listed(self, command: PeerList) -> PeerListed:
        status = self._engine.status() if self._engine is not None else None
        return PeerListed(running=status is not None, peers=self.views(status, command.name))

    def remove(self, command: PeerRemove) -> PeerRemoved:
        peer, publications = self._store.remove_peer(command.name)
        # First, so that the peer is out even if the store fails from here on. Its publications go with it.
        self._expel(peer)
        self._publications.withdraw(publications)
        self._log("peer removed", peer, no_longer_published=_ports_for_the_log(publications))
        self._other_protocols.pass_on_and_log()
        return PeerRemoved(peer=peer_view(peer, None), publications=_ports(publications))

    def disable(self, command: PeerDisable) -> PeerDisabled:
        before = self._store.peer(command.name)
        publications = self._publications.of(command.name)
        peer = self._store.set_peer_enabled(command.name, False)
        if before.enabled:
            self._expel(peer)
            self._publications.withdraw(publications)
            self._log("peer disabled", peer, no_longer_published=_ports_for_the_log(publications))
            self._other_protocols.pass_on_and_log()
        return PeerDisabled(peer=peer_view(peer, None), publications=_ports(publications))

    def enable(self, command: PeerEnable) -> PeerEnabled:
        before = self._store.peer(command.name)
        publications = self._publications.of(command.name)
        self._check_own_cipher(before)
        peer = self._store.set_peer_enabled(command.name, True)
        warnings: list[str] = []
        if not before.enabled:
            try:
                warnings = self._readmit(peer, publications)
            except BaseException:  # whatever it is: no command is left half-done
                self._expel(peer)
                self._publications.withdraw(publications)
                self._store.set_peer_enabled(command.name, False)
                raise
            self._log("peer enabled", peer, published=_ports_for_the_log(publications))
            self._other_protocols.pass_on_and_log()
        return PeerEnabled(peer=peer_view(peer, None), publications=_ports(publications), warnings=warnings)

    def rename(self, command: PeerRename) -> PeerRenamed:
        peer = self._store.rename_peer(command.name, check_peer_name(command.new_name))
        settings = self._other_protocols.settings_naming(command.name)
        if self._engine is not None:
            self._names[str(peer.address)] = peer.name
            log.info("peer renamed", former_name=command.name, **_for_the_log(peer))
            for setting in settings:
                log.warning("a setting still has a peer's former name", setting=setting, peer=command.name)
            self._other_protocols.pass_on_and_log()
        return PeerRenamed(peer=peer_view(peer, None), former_name=command.name, settings=settings)

    def renew(self, command: PeerRenew) -> PeerRenewed:
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

    # Checks

    @property
    def _gateway(self) -> GatewaySettings:
        """The settings in force."""
        return self._context.settings().gateway

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

    def _address(self, text: str | None) -> IPv4Address | None:
        if text is None:
            return None
        try:
            return parse_peer_address(text, self._gateway.subnet)
        except ValueError as cause:
            raise UsageError(str(cause)) from None

    def _check_subnet(self, peers: Iterable[Peer]) -> None:
        subnet = self._gateway.subnet
        for peer in peers:
            if peer.address not in subnet or peer.address in self._reserved():
                raise SettingsError(
                    f"peer {peer.name!r} has address {peer.address}, "
                    f"which no peer can have in [gateway] subnet {subnet}",
                    hint=f"restore the former [gateway] subnet, or `tidegate peer remove {peer.name}` and add it again",
                )

    def _reserved(self) -> frozenset[IPv4Address]:
        gateway = self._gateway
        subnet = gateway.subnet
        return frozenset({subnet.network_address, gateway.address, subnet.broadcast_address})

    def _check_own_cipher(self, peer: Peer) -> None:
        self._check_cipher(peer.cipher, peer.name, f"`tidegate peer remove {peer.name}` and add it again")

    def _check_cipher(self, cipher: CipherName, peer: str, hint: str) -> None:
        check_cipher(cipher, self._context.aes_available, user=f"peer {peer!r}", hint=hint)

    # In the engine, and in the log of a gateway. Where none runs, all of these do nothing.

    def _admit(self, peer: Peer) -> None:
        """Gives the engine a peer. Raises `EngineError` if it refuses, and `StoreError`."""
        if self._engine is None:
            return
        try:
            self._set_peer(peer, self._store.last_seen().get(peer.public_key))
        except (OSError, ValueError, RuntimeError) as cause:
            raise EngineError(f"the engine refuses peer {peer.name!r}: {cause}") from cause

    def _set_peer(self, peer: Peer, seen: LastSeen | None) -> None:
        """Gives the engine a peer, and has it call one that was connected a moment ago. Raises what the engine does."""
        if self._engine is None:
            return
        self._names[str(peer.address)] = peer.name
        self._engine.set_peer(
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

    def _readmit_with_new_keys(
        self, before: Peer, peer: Peer, publications: Sequence[Publication]
    ) -> list[str]:
        """For the engine, which knows peers by their keys, it is another peer."""
        warnings: list[str] = []
        if before.enabled:
            kept = self._other_protocols.passed
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
                self._other_protocols.pass_on_and_log(kept)
        self._log("peer renewed", peer, former_public_key=encode_key(before.public_key))
        return warnings

    def _expel(self, peer: Peer) -> None:
        """Takes a peer out of the engine, with its sessions, mappings, published ports and other protocols."""
        if self._engine is not None:
            self._engine.remove_peer(peer.public_key)
            self._other_protocols.forget(str(peer.address))

    def _log(self, change: str, peer: Peer, **more: str) -> None:
        if self._engine is not None:
            log.info(change, **_for_the_log(peer), **more)

    # Answers

    def views(self, status: EngineStatus | None, name: str | None = None) -> list[PeerView]:
        """Of the peer with that name, or of all; with their counters, if the engine's status is given."""
        counters = {entry.public_key: entry for entry in status.peers} if status is not None else {}
        last_seen, now = self._store.last_seen(), self._context.now()
        return [
            peer_view(peer, counters.get(peer.public_key), last_seen.get(peer.public_key), now)
            for peer in self._store.peers()
            if name in (None, peer.name)
        ]

    def _for_the_profile(self, peer: Peer) -> PeerAdded:
        gateway = self._gateway
        endpoint = gateway.endpoint or self._context.suggested_endpoint()
        return PeerAdded(
            peer=peer_view(peer, None),
            gateway_public_key=encode_key(self._context.public_key()),
            gateway_address=str(gateway.address),
            listen_port=gateway.listen.port,
            endpoint=str(endpoint) if endpoint else None,
            mtu=gateway.tunnel_mtu,
            dns=list(map(str, self._context.settings().profile_servers)),
        )


def _for_the_log(peer: Peer) -> dict[str, str]:
    return {"name": peer.name, "address": str(peer.address), "public_key": encode_key(peer.public_key)}


def _ports(publications: Iterable[Publication]) -> list[str]:
    return [publication.external_text for publication in publications]


def _ports_for_the_log(publications: Iterable[Publication]) -> str:
    return ",".join(_ports(publications)) or "none"
