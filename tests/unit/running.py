"""A whole gateway on a fake engine and a fake host, and a command line for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import structlog

from tests.unit.fakes import FakeEngine, FakeGateway, FakeHost
from tidegate.cli import main
from tidegate.cli.runtime import Runtime
from tidegate.errors import EngineError
from tidegate.gateway import Gateway
from tidegate.settings import Settings


@dataclass
class Running:
    """A running gateway, and a command line for it."""

    state: Path
    engine: FakeEngine
    host: FakeHost
    gateway: Gateway
    task: asyncio.Task[None]
    capture: pytest.CaptureFixture[str]
    said: list[str] = field(default_factory=list)

    @property
    def packets(self) -> FakeGateway:
        return self.engine.gateways[-1]

    async def cli(self, *arguments: str) -> tuple[int, str, str]:
        """A command in a thread, as another process would be."""
        runtime = Runtime(lambda: self.engine, lambda: self.host, default_config=Path("/nonexistent"))
        self.capture.readouterr()
        code = await asyncio.to_thread(main, [*arguments, "--state-dir", str(self.state)], runtime)
        captured = self.capture.readouterr()
        return code, captured.out, captured.err

    async def answer(self, *arguments: str) -> dict[str, Any]:
        code, out, err = await self.cli(*arguments, "--json")
        assert code == 0, err
        # What the gateway logs meanwhile is on standard output, too.
        document = re.search(r"^{$.*?^}$", out, re.MULTILINE | re.DOTALL)
        assert document is not None, out
        told: dict[str, object] = json.loads(document[0])
        return told


@asynccontextmanager
async def serving(
    settings: Settings,
    capture: pytest.CaptureFixture[str],
    engine: FakeEngine | None = None,
    host: FakeHost | None = None,
    reread: Callable[[], Settings] | None = None,
) -> AsyncIterator[Running]:
    ready = asyncio.Event()
    said: list[str] = []

    def is_ready(line: str) -> None:
        said.append(line)
        ready.set()

    if not structlog.is_configured():  # what only informs would be in the answers of the command line, too
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    engine, host = engine or FakeEngine(), host or FakeHost()
    gateway = Gateway(settings, engine, host, ready=is_ready, reread=reread)
    task = asyncio.create_task(gateway.run())
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait({task, waiting}, timeout=10, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if task.done():
        await task
    try:
        yield Running(settings.state_dir, engine, host, gateway, task, capture, said)
    finally:
        gateway.request_stop()
        async with asyncio.timeout(2):
            with contextlib.suppress(EngineError):
                await task


def open_sockets() -> set[str]:
    """The sockets of this process, by their inodes."""
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that reads the directory
            found.add(str(descriptor.readlink()))
    return {name for name in found if name.startswith("socket:")}


async def until(holds: Callable[[], bool], *, seconds: float = 5) -> None:
    """Waits until the condition holds, which must be within `seconds`."""
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110 -- what is waited for happens in other threads
            await asyncio.sleep(0.01)


def only(items: list[dict[str, Any]]) -> dict[str, Any]:
    """The one item of a list that has just one."""
    (item,) = items
    return item
