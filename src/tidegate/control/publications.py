"""Published ports: in the store, and at once in the engine where one runs.

A new publication is refused, and taken out of the store again, if one of its ports cannot be had. One that is in the
store already is kept: at a restart, or when its peer is enabled again, a program on the host may have taken a port
meanwhile. Then it counts as failed, is listed so, and is tried again at each reload. While its peer is disabled, only
the store has it.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Literal

import structlog

from tidegate.control.commands import (
    PublicationView,
    PublishAdd,
    PublishAdded,
    PublishListed,
    PublishRemove,
    PublishRemoved,
)
from tidegate.engine import EngineGateway
from tidegate.errors import ConflictError, EngineError, StoreError, UsageError
from tidegate.net import MAX_PORT
from tidegate.store import MAX_PUBLISHED_PORTS, Publication, Store

log = structlog.get_logger("tidegate.control")


class Publications:
    """The external ports that lead to clients. `engine` is that of a running gateway, None where none runs."""

    def __init__(self, store: Store, engine: EngineGateway | None) -> None:
        self._store = store
        self._engine = engine
        self._failed: dict[str, str] = {}

    @property
    def failed(self) -> dict[str, str]:
        """External ports that could not be published, and why."""
        return dict(self._failed)

    def restore(self) -> None:
        """Gives a new engine all of them; those of disabled peers have to wait until these are enabled."""
        self.restore_some(self._store.publications())

    def of(self, peer: str) -> list[Publication]:
        """Those that lead to a peer."""
        return [entry for entry in self._store.publications() if entry.peer == peer]

    def restore_some(self, publications: Iterable[Publication]) -> list[str]:
        """Gives the engine what it lacks. One whose port a program on the host has taken meanwhile is kept, and listed
        as failed. Returns why some failed."""
        failures = []
        for publication in publications:
            try:
                self._publish(publication)
            except ConflictError as refused:
                self._failed[publication.external_text] = str(refused)
                failures.append(str(refused))
        return failures

    def _disabled_peers(self) -> set[str]:
        return {peer.name for peer in self._store.peers() if not peer.enabled}

    def retry(self) -> list[str]:
        """Tries the failed ones again. Returns why some still fail."""
        if not self._failed:
            return []
        try:
            published = self._store.publications()
        except StoreError as cause:
            return [f"unpublished ports cannot be tried again: {cause}"]
        for publication in published:
            if publication.external_text not in self._failed:
                continue
            try:
                self._publish(publication)
            except (ConflictError, StoreError) as refused:
                self._failed[publication.external_text] = str(refused)
            except EngineError as silence:
                self._failed[publication.external_text] = str(silence)
                break  # each of the others would wait as long for the same shard
            else:
                del self._failed[publication.external_text]
        return list(self._failed.values())

    def add(self, command: PublishAdd) -> PublishAdded:
        """Publishes all ports or none. Raises `TidegateError`."""
        count = command.last_port - command.first_port + 1
        if count < 1:
            raise UsageError(
                f"ports {command.first_port}-{command.last_port}: the range ends before it starts"
            )
        if count > MAX_PUBLISHED_PORTS:
            raise UsageError(f"{count} ports at once are too many", hint=f"at most {MAX_PUBLISHED_PORTS}")
        if command.internal_port + count - 1 > MAX_PORT:
            raise UsageError(f"{count} ports from {command.internal_port} on would go beyond {MAX_PORT}")
        publication = Publication(
            command.protocol, command.first_port, command.last_port, command.peer, command.internal_port
        )
        self._store.add_publication(publication)
        try:
            self._publish(publication)
        except BaseException:  # whatever it is: no command is left half-done
            self._store.remove_publication(
                publication.protocol, publication.first_port, publication.last_port
            )
            raise
        self._log("port published", publication)
        return PublishAdded(publication=self._view(publication, self._disabled_peers()))

    def remove(self, command: PublishRemove) -> PublishRemoved:
        publication = self._store.remove_publication(command.protocol, command.first_port, command.last_port)
        view = self._view(publication, self._disabled_peers())
        self.withdraw([publication])
        self._log("port no longer published", publication)
        return PublishRemoved(publication=view)

    def withdraw(self, publications: Iterable[Publication]) -> None:
        """Takes them out of the engine."""
        for publication in publications:
            self._failed.pop(publication.external_text, None)
            if self._engine is not None:
                for port in publication.ports:
                    self._engine.unpublish(publication.protocol, port)

    def listed(self) -> PublishListed:
        disabled = self._disabled_peers()
        return PublishListed(
            publications=[self._view(entry, disabled) for entry in self._store.publications()]
        )

    def _publish(self, publication: Publication) -> None:
        """In the engine, if there is one, and unless the peer is disabled: all ports or none."""
        if self._engine is None:
            return
        peer = self._store.peer(publication.peer)
        if not peer.enabled:
            return
        address = str(peer.address)
        done: list[int] = []
        try:
            for port in publication.ports:
                self._engine.publish(publication.protocol, port, (address, publication.internal_of(port)))
                done.append(port)
        except BaseException as cause:
            for port in done:
                self._engine.unpublish(publication.protocol, port)
            failed = f"{publication.protocol}/{publication.first_port + len(done)} cannot be published"
            if isinstance(cause, OSError):
                why = _without_the_port(
                    str(cause.strerror or cause), publication.protocol, publication.first_port + len(done)
                )
                raise ConflictError(
                    f"{failed}: {why}",
                    hint="a program on the host may be using the port (see `ss -lntup`)",
                ) from cause
            if isinstance(cause, RuntimeError):
                raise EngineError(f"{failed}: {cause}") from cause
            raise

    def _log(self, change: str, publication: Publication) -> None:
        """In a gateway's log: a command that works alone has none."""
        if self._engine is not None:
            log.info(change, external=publication.external_text, to=publication.internal_text)

    def _view(self, publication: Publication, disabled: Container[str]) -> PublicationView:
        """`disabled`: the names of the peers that are."""
        failure = self._failed.get(publication.external_text) or self._failure_since(publication)
        state: Literal["active", "failed", "peer disabled", "not running"]
        if publication.peer in disabled:
            state = "peer disabled"
        elif self._engine is None:
            state = "not running"
        else:
            state = "failed" if failure else "active"
        return PublicationView(
            external=publication.external_text, to=publication.internal_text, state=state, detail=failure
        )

    def _failure_since(self, publication: Publication) -> str | None:
        """Why it is not published on an external address that was added later; the engine tries again by itself."""
        if self._engine is None:
            return None
        return next(
            (
                f"{protocol}/{port} on {address}: "
                + _without_the_port(why, protocol, port).removeprefix(f"{address}: ")
                for protocol, port, address, why in self._engine.failed_publications()
                if protocol == publication.protocol and port in publication.ports
            ),
            None,
        )


def _without_the_port(why: str, protocol: str, port: int) -> str:
    """The engine's reason for not publishing a port, without its beginning, which names the port."""
    return why.removeprefix(f"cannot publish {protocol} port {port} ").removeprefix("of ")
