"""What a service manager is told of the gateway, above all one that does not read."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.unit.running import open_sockets, serving, until
from tidegate.notify import MOST_WAITING, ServiceManager
from tidegate.settings import Settings

STUCK = 5.0
"""Seconds after which a gateway that waits for the manager is helped, so that the test fails and does not hang."""


class Manager:
    """A service manager with a full socket."""

    FILLER = b"of another service"

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(str(path))
        self._filler = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._filler.connect(str(path))
        self.fill()

    def fill(self) -> None:
        with suppress(BlockingIOError):
            while True:
                self._filler.send(self.FILLER)

    def read(self) -> list[str]:
        """What there is to read, without what filled the socket."""
        told = []
        with suppress(BlockingIOError):
            while True:
                told.append(self._socket.recv(1000))
        return [text.decode() for text in told if text != self.FILLER]

    def close(self) -> None:
        self._filler.close()
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    made = Manager(tmp_path / "notify")
    yield made
    made.close()


def test_a_manager_that_does_not_read_holds_nothing_up_and_is_told_in_order_once_it_does(
    settings: Settings, capsys: pytest.CaptureFixture[str], manager: Manager
) -> None:
    reread = 0
    helped = threading.Event()

    def help_out() -> None:
        helped.set()
        manager.read()

    def read_again() -> Settings:
        nonlocal reread
        reread += 1
        return settings

    async def scenario() -> None:
        async with serving(settings, capsys, reread=read_again) as running:
            os.kill(os.getpid(), signal.SIGHUP)
            await until(lambda: reread == 1)
            await running.answer("status")
            assert not helped.is_set(), "the gateway waits for the manager"
            told: list[str] = []

            def is_told() -> bool:
                told.extend(manager.read())
                return len(told) == 3

            await until(is_told)
            starting, reloading, reloaded = told
            assert starting.startswith("READY=1\nSTATUS=listening on ")
            assert reloading.startswith("RELOADING=1\n")
            assert reloaded == "READY=1"
            manager.fill()
        assert not helped.is_set(), "its stop waits, too"

    helper = threading.Timer(STUCK, help_out)
    helper.start()
    try:
        asyncio.run(scenario())
    finally:
        helper.cancel()
        helper.join()


def test_of_what_a_manager_has_not_read_only_the_last_is_kept(manager: Manager) -> None:
    async def scenario() -> None:
        service = ServiceManager()
        for number in range(3 * MOST_WAITING):
            service.tell(f"STATUS={number}")
        told: list[str] = []

        def is_told() -> bool:
            told.extend(manager.read())
            return f"STATUS={3 * MOST_WAITING - 1}" in told

        await until(is_told)
        assert told == [f"STATUS={number}" for number in range(2 * MOST_WAITING, 3 * MOST_WAITING)]
        manager.fill()
        service.tell("STOPPING=1")
        service.close()
        service.close()

    sockets = open_sockets()
    asyncio.run(scenario())
    assert open_sockets() == sockets


@pytest.mark.parametrize("address", ["/nonexistent/notify", "@tidegate-nobody-listens", "/" + 200 * "x"])
def test_a_manager_that_is_not_there_is_told_to_the_log(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        ServiceManager({"NOTIFY_SOCKET": address}).tell("READY=1")

    sockets = open_sockets()
    asyncio.run(scenario())
    assert open_sockets() == sockets
    assert "the service manager cannot be told" in capsys.readouterr().out


def test_without_a_manager_nobody_is_told_and_nothing_said(capsys: pytest.CaptureFixture[str]) -> None:
    ServiceManager({}).tell("READY=1")
    assert capsys.readouterr() == ("", "")
