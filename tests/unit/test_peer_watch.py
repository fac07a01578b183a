"""Who is connected, in the log; and what a gateway remembers of its peers over a restart."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from tests.unit.fakes import FakeEvent, FakePeerStatus
from tests.unit.running import Running, only, serving, until
from tidegate.errors import EngineUnresponsiveError, StoreError
from tidegate.log import configure_logging
from tidegate.settings import LogSettings, Settings
from tidegate.store import LastSeen
from tidegate.store.sqlite import SqliteStore

COMPLETED = FakeEvent("handshake_completed", "")
HERE, THERE = ("203.0.113.9", 4000), ("198.51.100.7", 500)


class Heard:
    """The log's lines of the peers, as they come."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture
        self._lines: list[dict[str, Any]] = []
        configure_logging(LogSettings(format="json", level="debug"))

    def __call__(self) -> list[dict[str, Any]]:
        told = [json.loads(line) for line in self._capture.readouterr().err.splitlines() if line[:1] == "{"]
        self._lines += [
            {key: value for key, value in line.items() if key not in {"level", "timestamp"}} for line in told
        ]
        return self._lines


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidegate.peer_watch.LOOK_INTERVAL", 0.01)


async def with_alice(running: Running, **status: Any) -> FakePeerStatus:
    """Adds alice, whose status at the engine can be changed."""
    code, _, err = await running.cli("peer", "add", "alice")
    assert code == 0, err
    ((key, address),) = running.packets.peers.items()
    running.packets.statuses[key] = alice = FakePeerStatus(key, address, **status)
    return alice


def stored(settings: Settings) -> Mapping[bytes, LastSeen]:
    store = SqliteStore(settings.state_dir / "tidegate.db")
    try:
        return store.last_seen()
    finally:
        store.close()


def test_a_peer_that_connects_moves_and_falls_silent_is_in_the_log(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            alice = await with_alice(running, last_handshake=None, endpoint=None)
            heard = Heard(capsys)
            running.packets.tell(COMPLETED)
            await asyncio.sleep(0.1)
            assert heard() == []

            alice.last_handshake, alice.endpoint = 0.5, HERE
            running.packets.tell(COMPLETED)
            await until(lambda: len(heard()) == 1)
            assert heard()[0] == {"event": "peer connected", "name": "alice", "endpoint": "203.0.113.9:4000"}

            alice.endpoint, alice.received_bytes = THERE, alice.received_bytes + 700
            for _ in range(3):
                running.packets.tell(COMPLETED)
                await asyncio.sleep(0.05)
            moved, was = "198.51.100.7:500", "203.0.113.9:4000"
            assert heard()[1:] == [{"event": "peer moved", "name": "alice", "endpoint": moved, "was": was}]

            # Its session ends in a moment, and no event says so.
            monkeypatch.setattr("tidegate.peer_watch.REJECT_AFTER_TIME", 0.6)
            running.packets.tell(COMPLETED)
            await asyncio.sleep(0.1)
            alice.last_handshake = 0.7
            await until(lambda: len(heard()) == 3)
            silent = heard()[2]
            assert 0 <= silent.pop("connected_seconds") <= 3
            assert silent == {
                "event": "peer silent",
                "name": "alice",
                "endpoint": moved,
                "received_bytes": 700,
                "sent_bytes": 0,
            }
            await asyncio.sleep(0.1)
            assert len(heard()) == 3

    asyncio.run(scenario())


def test_a_peer_that_was_disabled_and_enabled_connects_anew(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            alice = await with_alice(running, last_handshake=0.5, endpoint=HERE)
            alice.received_bytes = 5000
            heard = Heard(capsys)
            running.packets.tell(COMPLETED)
            await until(lambda: len(heard()) == 1)
            alice.received_bytes = 100  # as of an engine's peer that is new, and no look was between the two
            running.packets.tell(COMPLETED)
            await until(lambda: len(heard()) == 2)
            assert [line["event"] for line in heard()] == ["peer connected", "peer connected"]

    asyncio.run(scenario())


def test_where_nothing_happens_nobody_looks(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            await with_alice(running, last_handshake=20.0)
            running.packets.tell(COMPLETED)
            await asyncio.sleep(0.2)
            running.packets.refuse_status = AssertionError("nobody asked")
            await asyncio.sleep(0.3)
            assert not running.task.done()
            running.packets.refuse_status = None

    asyncio.run(scenario())


def test_an_engine_that_does_not_answer_is_asked_again_later(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            await with_alice(running)
            heard = Heard(capsys)
            running.packets.refuse_status = EngineUnresponsiveError("shard 1 did not answer")
            running.packets.tell(COMPLETED)
            await until(lambda: len(heard()) == 1)
            assert heard()[0]["cause"] == "shard 1 did not answer"
            running.packets.refuse_status = None
            running.packets.tell(COMPLETED)
            await until(lambda: len(heard()) == 2)

    asyncio.run(scenario())


@pytest.mark.parametrize("killed", [False, True])
def test_when_and_where_a_peer_was_last_seen_outlives_the_gateway(
    settings: Settings, capsys: pytest.CaptureFixture[str], killed: bool
) -> None:
    """One that is killed has saved what it saw at its last look."""

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            alice = await with_alice(running, last_handshake=10.0, endpoint=HERE)
            running.packets.tell(COMPLETED)
            await until(lambda: len(stored(settings)) == 1)
            if not killed:
                alice.last_handshake, alice.endpoint = 4.0, THERE
        age, endpoint = (10.0, HERE) if killed else (4.0, THERE)
        seen = stored(settings)[alice.public_key]
        assert seen.endpoint == endpoint
        assert time.time() - age - seen.handshake_at < 5

        offline = only((await running.answer("peer", "list"))["peers"])
        assert offline["endpoint"] == "{}:{}".format(*endpoint)
        assert age <= offline["last_handshake"] < age + 10

        async with serving(settings, capsys, engine=running.engine) as running:
            again = running.packets
            assert again.endpoints == {alice.public_key: endpoint}
            assert again.called == [alice.public_key]
            again.statuses[alice.public_key] = FakePeerStatus(
                alice.public_key, alice.address, last_handshake=None, endpoint=endpoint
            )
            for shown in (
                only((await running.answer("status"))["peers"]),
                only((await running.answer("peer", "list"))["peers"]),
                await running.answer("peer", "show", "alice"),
            ):
                assert age <= shown["last_handshake"] < age + 10
            assert "peer_last_handshake_timestamp_seconds" in (await running.cli("status", "--prometheus"))[1]

    asyncio.run(scenario())


@pytest.mark.parametrize(("age", "called"), [(299.0, True), (301.0, False), (-3600.0, True)])
def test_who_was_connected_when_the_gateway_ended_is_called(
    settings: Settings, capsys: pytest.CaptureFixture[str], age: float, called: bool
) -> None:
    """As far as the clock can tell: one that was set back calls everybody who was seen in what is the future now."""

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            alice = await with_alice(running, last_handshake=None, endpoint=None)
            await running.cli("peer", "add", "bob")
            bob = (set(running.packets.peers) - {alice.public_key}).pop()
            running.packets.statuses[bob] = FakePeerStatus(bob, "10.66.77.3", None, last_handshake=None)
        store = SqliteStore(settings.state_dir / "tidegate.db")
        store.set_last_seen({alice.public_key: LastSeen(time.time() - age, HERE)})
        store.close()
        async with serving(settings, capsys) as running:
            engine = running.packets
            assert engine.called == [alice.public_key] * called
            assert engine.endpoints[alice.public_key] == HERE, "it may be called when somebody sends to it"
            assert engine.endpoints[bob] is None
            engine.statuses[alice.public_key] = alice
            assert (await running.answer("peer", "show", "alice"))["last_handshake"] >= 0
            for change in ("disable", "enable"):
                await running.cli("peer", change, "alice")
            assert engine.called == [alice.public_key] * 2 * called, "likewise where it comes back"
            assert engine.endpoints[alice.public_key] == HERE

    asyncio.run(scenario())


def test_the_store_is_written_at_most_once_a_minute_and_only_with_what_is_new(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = spy_on_writes(monkeypatch)

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            alice = await with_alice(running, last_handshake=10.0, endpoint=HERE)
            running.packets.tell(COMPLETED)
            await until(lambda: written == [{alice.public_key: HERE}])
            await running.cli("peer", "add", "bob")
            bob = (set(running.packets.peers) - {alice.public_key}).pop()
            for _ in range(5):
                running.packets.tell(COMPLETED)
                await asyncio.sleep(0.03)
            assert len(written) == 1
        assert written[1:] == [{bob: HERE}], "at the stop, but not alice again"

    asyncio.run(scenario())


def test_a_store_that_fails_is_told_once_and_disturbs_nobody(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate.peer_watch.SAVE_INTERVAL", 0.05)
    attempts = 0

    def fail(*_: object) -> None:
        nonlocal attempts
        attempts += 1
        raise StoreError("tidegate.db: the disk is full")

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            alice = await with_alice(running, last_handshake=10.0, endpoint=HERE)
            heard = Heard(capsys)
            with monkeypatch.context() as patch:
                patch.setattr(SqliteStore, "set_last_seen", fail)
                running.packets.tell(COMPLETED)
                await until(lambda: attempts > 3)
            warnings = [line for line in heard() if "not saved" in line["event"]]
            assert [line["cause"] for line in warnings] == ["tidegate.db: the disk is full"]
            await until(lambda: alice.public_key in stored(settings))
            assert not running.task.done()

    asyncio.run(scenario())


def spy_on_writes(monkeypatch: pytest.MonkeyPatch) -> list[dict[bytes, tuple[str, int]]]:
    written: list[dict[bytes, tuple[str, int]]] = []
    write: Callable[[SqliteStore, Mapping[bytes, LastSeen]], None] = SqliteStore.set_last_seen

    def spy(store: SqliteStore, seen: Mapping[bytes, LastSeen]) -> None:
        written.append({key: entry.endpoint for key, entry in seen.items()})
        write(store, seen)

    monkeypatch.setattr(SqliteStore, "set_last_seen", spy)
    return written
