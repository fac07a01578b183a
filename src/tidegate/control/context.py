"""What administration is given besides the store: what it has to know, and what it sees of a running gateway."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tidegate.engine import EngineGateway, ExternalLink
from tidegate.net import Endpoint
from tidegate.settings import Key, Settings


@dataclass(frozen=True, slots=True)
class AdminContext:
    """What administration has to know, whether a gateway runs or not."""

    settings: Callable[[], Settings]
    """Those in force, which a reload changes."""
    public_key: Callable[[], bytes]
    """The gateway's own. Raises `StoreError`."""
    suggested_endpoint: Callable[[], Endpoint | None]
    """Where clients would find the gateway, if the settings do not say."""
    now: Callable[[], float]
    """Seconds since the epoch."""
    aes_available: Callable[[], bool]


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

    applied: tuple[Key, ...]
    needs_restart: tuple[Key, ...]
    warnings: tuple[str, ...]
