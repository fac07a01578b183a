"""What the commands depend on: the engine and the host, injected so that tests can inject others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import typer

if TYPE_CHECKING:
    from tidegate.engine import Engine
    from tidegate.host import Host
    from tidegate.host.client import ClientHost


def _load_engine() -> Engine:
    from tidegate.engine import load

    return load()


def _linux_host() -> Host:
    from tidegate.host.netlink import LinuxHost

    return LinuxHost()


def _linux_client_host() -> ClientHost:
    from tidegate.host.client import LinuxClientHost

    return LinuxClientHost()


@dataclass(frozen=True, slots=True)
class Runtime:
    """Factories of engine and host."""

    engine: Callable[[], Engine] = _load_engine
    host: Callable[[], Host] = _linux_host
    client_host: Callable[[], ClientHost] = _linux_client_host
    default_config: Path = Path("/etc/tidegate/tidegate.toml")


def runtime_of(context: typer.Context) -> Runtime:
    return cast(Runtime, context.find_root().obj)
