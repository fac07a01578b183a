"""Protocols without ports: each is passed to the peer that a setting names, while it is there.

The setting stays when its peer is removed, disabled or renamed, and may name one that is yet to be added. So nobody
passes a single protocol to a single peer: whenever peers or settings have changed, `pass_on` compares what the settings
want with what the engine has, and tells it all of them if they differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import structlog

from tidegate.engine import EngineGateway
from tidegate.errors import StoreError
from tidegate.ip_protocols import protocol_key, protocol_name
from tidegate.settings import Settings
from tidegate.store import Store

log = structlog.get_logger("tidegate.control")


class OtherProtocols:
    """Which client gets each protocol. `engine` is that of a running gateway, None where none runs."""

    def __init__(self, store: Store, settings: Callable[[], Settings], engine: EngineGateway | None) -> None:
        """`settings` gives those in force."""
        self._store = store
        self._settings = settings
        self._engine = engine
        self._passed: Mapping[int, str] = {}

    @property
    def passed(self) -> Mapping[int, str]:
        """By protocol number: the address of the client to which the engine passes it."""
        return self._passed

    def pass_on(self, *, kept: Mapping[int, str] | None = None) -> list[str]:
        """Tells the engine which client gets each protocol, as the settings assign them to peers. Where no peer has the
        name that they say, the client in `kept` has the protocol, if there is one. Returns what stood in the way: a
        peer that does not exist (yet) or is disabled, a store that cannot be read, or the engine's refusal."""
        if self._engine is None:
            return []
        wanted = self._settings().nat.other_protocols
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
                self._engine.pass_protocols(clients)
                self._passed = clients
            except (OSError, ValueError) as cause:
                unmet.append(f"[nat] other_protocols: the engine refuses: {cause}")
        return unmet

    def pass_on_and_log(self, kept: Mapping[int, str] | None = None) -> None:
        """For commands that succeed whatever stands in the way of this. A peer that was renamed keeps its protocols
        until the settings are read again, so that there is time to change them."""
        for warning in self.pass_on(kept=self._passed if kept is None else kept):
            log.warning(warning)

    def forget(self, client: str) -> None:
        """Notes that the engine has the client at this address no more, and passes nothing to it."""
        self._passed = {number: holder for number, holder in self._passed.items() if holder != client}

    def settings_naming(self, peer: str) -> list[str]:
        """The settings in force that pass a protocol to the peer, such as ``nat.other_protocols.gre``."""
        return [
            f"nat.other_protocols.{protocol_key(number)}"
            for number, name in self._settings().nat.other_protocols.items()
            if name == peer
        ]
