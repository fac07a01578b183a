"""Carries out commands: on the store, and at once on the engine where one runs.

The store is written first, then the engine; if the engine refuses, the store is rolled back, so that a command is
carried out completely or not at all. `Peers` and `Publications` do so, each for its own commands; those that only look
at the NAT are in `views`. What concerns more than one of these is here: the start, when a new engine gets everything
from the store; a reload of the settings, after which protocols are passed as these say now, and failed publications are
tried again; and the status of the whole gateway.
"""

from __future__ import annotations

import os
from typing import cast

import structlog

from tidegate import VERSION
from tidegate.control.commands import (
    Answer,
    AnswerT,
    Command,
    GatewayStatus,
    NatList,
    NatStats,
    PeerAdd,
    PeerDisable,
    PeerEnable,
    PeerList,
    PeerRemove,
    PeerRename,
    PeerRenew,
    PublishAdd,
    PublishList,
    PublishRemove,
    ReloadSettings,
    SettingsReloaded,
    StatusQuery,
)
from tidegate.control.context import AdminContext, LiveGateway
from tidegate.control.other_protocols import OtherProtocols
from tidegate.control.peers import Peers
from tidegate.control.publications import Publications
from tidegate.control.views import nat_counted, nat_listed
from tidegate.errors import NotRunningError, TidegateError, UsageError
from tidegate.identity.keys import encode_key
from tidegate.store import Store

log = structlog.get_logger("tidegate.control")


class Administration:
    """Carries out commands. Not safe to use from two threads at once."""

    def __init__(self, store: Store, context: AdminContext, live: LiveGateway | None = None) -> None:
        self._store = store
        self._context = context
        self._live = live
        engine = live.engine if live is not None else None
        self._publications = Publications(store, engine)
        self._other_protocols = OtherProtocols(store, context.settings, engine)
        self._peers = Peers(store, context, engine, self._publications, self._other_protocols)

    def name_at(self, address: str) -> str | None:
        """The peer that holds the address, or held it last."""
        return self._peers.name_at(address)

    def execute(self, command: Command[AnswerT]) -> AnswerT:
        """Raises `TidegateError`."""
        return cast(AnswerT, self._dispatch(command))

    def _dispatch(self, command: Command[AnswerT]) -> Answer:  # noqa: PLR0911, PLR0912 -- one per command
        match command:
            case PeerAdd():
                return self._peers.add(command)
            case PeerList():
                return self._peers.listed(command)
            case PeerRemove():
                return self._peers.remove(command)
            case PeerDisable():
                return self._peers.disable(command)
            case PeerEnable():
                return self._peers.enable(command)
            case PeerRename():
                return self._peers.rename(command)
            case PeerRenew():
                return self._peers.renew(command)
            case PublishAdd():
                return self._publications.add(command)
            case PublishRemove():
                return self._publications.remove(command)
            case PublishList():
                return self._publications.listed()
            case NatList():
                return nat_listed(command, self._running().engine, self._store)
            case NatStats():
                return nat_counted(self._running().engine.status(), self._context.settings().nat)
            case StatusQuery():
                return self._status()
            case ReloadSettings():
                return self._reload()
        raise UsageError(f"unknown command {type(command).__name__}")

    # At the start

    def restore(self) -> tuple[int, int]:
        """Gives a new engine every peer that is enabled, and every publication, and has it call the peers that were
        connected to the last. Returns how many peers it has, and how many are disabled.

        Raises `SettingsError` if a peer's address is not in the subnet, `EngineError` if the machine cannot run its
        cipher, `OSError` if the engine refuses a peer.
        """
        enabled, disabled = self._peers.restore()
        self._publications.restore()
        return enabled, disabled

    def pass_protocols(self) -> list[str]:
        """Tells the engine which client gets each protocol without ports. Returns what stood in the way."""
        return self._other_protocols.pass_on()

    @property
    def failed_publications(self) -> dict[str, str]:
        """External ports that could not be published, and why."""
        return self._publications.failed

    # Of a running gateway

    def _running(self) -> LiveGateway:
        if self._live is None:
            raise NotRunningError(
                f"no gateway is running with state directory {self._context.settings().state_dir}",
                hint="start one with `tidegate serve`, or name another with --state-dir",
            )
        return self._live

    def _reload(self) -> SettingsReloaded:
        live = self._running()
        try:
            reloaded = live.reload()
        except TidegateError as refused:
            log.warning("settings not reloaded: the old ones stay in force", cause=str(refused))
            raise
        unmet = [*self._other_protocols.pass_on(), *self._publications.retry()]
        for warning in unmet:  # after SIGHUP nobody gets the answer
            log.warning(warning)
        return SettingsReloaded(
            applied=[".".join(key) for key in reloaded.applied],
            needs_restart=[".".join(key) for key in reloaded.needs_restart],
            warnings=[*reloaded.warnings, *unmet],
        )

    def _status(self) -> GatewayStatus:
        live = self._running()
        status = live.engine.status()
        gateway = self._context.settings().gateway
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
            peers=self._peers.views(status),
            mappings=dict(status.mappings),
            reserved_ports=dict(status.reserved_ports),
            packets=dict(status.packets),
            bytes=dict(status.bytes),
            drops=dict(status.drops),
            dns=live.dns_counters(),
        )
