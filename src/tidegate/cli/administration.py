"""Chooses what carries out a command: the gateway that runs on the state directory, or, if none runs, this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Protocol

from tidegate.cli.output import remark
from tidegate.control.client import ControlClient
from tidegate.engine import load
from tidegate.errors import LockedError, NotRunningError, TidegateError
from tidegate.net import Endpoint
from tidegate.state_dir import RETRY_INTERVAL, StateDir

if TYPE_CHECKING:
    from tidegate.control.commands import AnswerT, Command
    from tidegate.engine import Engine
    from tidegate.host import Host
    from tidegate.settings import Settings


GATEWAY_PATIENCE = 10.0  # seconds that a gateway has between taking its lock and listening


class Executor(Protocol):
    def execute(self, command: Command[AnswerT]) -> AnswerT: ...


@contextmanager
def running_gateway(settings: Settings) -> Iterator[Executor]:
    """The running gateway. Raises `NotRunningError`."""
    client = ControlClient.connect(settings.state_dir)
    try:
        yield client
    finally:
        client.close()


@contextmanager
def administration(
    settings: Settings,
    host: Host,
    *,
    make: bool,
    suggest_endpoint: bool = False,
    engine: Callable[[], Engine] = load,
) -> Iterator[Executor]:
    """The running gateway, or else the store itself, under its lock. Without `make` a missing state directory raises
    `NotRunningError`: merely looking must not create it."""
    state = StateDir(settings.state_dir)
    deadline = time.monotonic() + GATEWAY_PATIENCE
    while True:
        try:
            with running_gateway(settings) as gateway:
                yield gateway
                return
        except NotRunningError as absent:
            if not make and not state.database.exists():
                raise NotRunningError(
                    f"{state.path}: neither a running gateway nor a database",
                    hint="name another with --state-dir",
                ) from absent
        try:
            with _store_alone(settings, state, host if suggest_endpoint else None, engine) as alone:
                yield alone
                return
        except LockedError:
            # A gateway holds the lock, but does not listen yet, or no longer: ask it again until the time is up.
            if time.monotonic() >= deadline:
                raise
            threading.Event().wait(RETRY_INTERVAL)


@contextmanager
def _store_alone(
    settings: Settings, state: StateDir, host: Host | None, engine: Callable[[], Engine]
) -> Iterator[Executor]:
    from tidegate.control.admin import Administration
    from tidegate.control.context import AdminContext
    from tidegate.identity import load_or_make_private_key, public_key_of
    from tidegate.store import peer_names
    from tidegate.store.sqlite import SqliteStore

    state.prepare()
    with state.lock("command"):
        if warning := state.warning():
            remark(f"warning: {warning}")
        store = SqliteStore(state.database)
        try:
            admin_context = AdminContext(
                lambda: settings,
                lambda: public_key_of(load_or_make_private_key(state.key, partial(peer_names, store))),
                lambda: suggested_endpoint(settings, host),
                time.time,
                lambda: engine().aes_available(),
            )
            yield Administration(store, admin_context)
        finally:
            store.close()


def suggested_endpoint(settings: Settings, host: Host | None) -> Endpoint | None:
    if host is None:
        return None
    from tidegate.host.external import external_link

    try:
        link = external_link(host.read_network(), settings.external)
    except TidegateError:
        return None  # the command says that --endpoint is needed
    return settings.gateway.listen.reached_at(link.addresses[0])
