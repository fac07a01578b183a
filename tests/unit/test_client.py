"""A client on a fake engine and a fake host."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.conftest import CommandLine
from tests.unit.connecting import PROFILE, WHOLE, made, until_connected
from tests.unit.fakes import FakeClient, FakeClientHost, FakeEngine, FakeEvent, FakePeerStatus, FakeStatus
from tests.unit.running import until
from tidegate.client import Client, ClientEvent
from tidegate.errors import EngineError, HostNetworkError
from tidegate.host.resolver import DnsOutcome
from tidegate.net import Endpoint
from tidegate.settings import OffloadSettings
from tidegate.streams import discard

EndWhenConnected = Callable[[signal.Signals], None]


@pytest.fixture
def end_when_connected(monkeypatch: pytest.MonkeyPatch) -> EndWhenConnected:
    """Lets clients be sent a signal once they have said that they are connected."""

    def end(number: signal.Signals) -> None:
        make = Client.__init__

        def init(client: Client, *arguments: Any, report: Callable[[ClientEvent], None], **more: Any) -> None:
            def reported(event: ClientEvent) -> None:
                report(event)
                if event.event == "connected":
                    os.kill(os.getpid(), number)

            make(client, *arguments, report=reported, **more)

        monkeypatch.setattr(Client, "__init__", init)

    return end


def test_everything_is_set_up_and_taken_back_in_reverse_order() -> None:
    engine, host, events = FakeEngine(), FakeClientHost(), []  # type: ignore[var-annotated]

    async def scenario() -> None:
        client = made(engine, host, events)
        task = await until_connected(client, events)
        assert host.journal == WHOLE[:5]
        client.request_stop()
        async with asyncio.timeout(2):
            assert await task is None

    asyncio.run(scenario())
    assert host.journal == WHOLE
    (packets,) = engine.clients
    assert (packets.started, packets.stopped) == (1, 1)
    assert packets.options.allowed_ips == ("0.0.0.0/0",), "IPv6 is blocked, not carried"
    assert packets.options.fwmark != 0
    assert [event.event for event in events] == ["starting", "connected", "stopping"]


def test_a_failure_half_way_takes_back_what_was_done() -> None:
    engine, host = FakeEngine(), FakeClientHost(HostNetworkError("no route for you"))
    with pytest.raises(HostNetworkError, match="no route for you"):
        asyncio.run(made(engine, host, []).run())
    assert engine.clients[0].stopped == 1
    assert host.journal == WHOLE[:3]


def test_an_engine_that_dies_takes_the_client_down_and_its_routes_with_it() -> None:
    engine, host, events = FakeEngine(), FakeClientHost(), []  # type: ignore[var-annotated]

    async def scenario() -> None:
        task = await until_connected(made(engine, host, events), events)
        engine.clients[0].tell(FakeEvent("shard_failed", "out of luck"))
        async with asyncio.timeout(2):
            with pytest.raises(EngineError, match="out of luck"):
                await task

    asyncio.run(scenario())
    assert host.journal == WHOLE


def test_a_gateway_that_does_not_answer_is_mentioned_and_tried_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidegate.client.REMINDER", 0.1)
    engine, host, events = FakeEngine(), FakeClientHost(), []  # type: ignore[var-annotated]
    monkeypatch.setattr(engine, "client", lambda options: FakeClient(options, looks=5))

    async def scenario() -> None:
        client = made(engine, host, events)
        task = await until_connected(client, events)
        client.request_stop()
        await task

    asyncio.run(scenario())
    kinds = [event.event for event in events]
    assert kinds[0] == "starting"
    assert "waiting" in kinds
    assert kinds[-2:] == ["connected", "stopping"]
    assert "no answer from 192.0.2.2:51820" in next(e.text for e in events if e.event == "waiting")


def test_what_to_check_about_a_gateway_that_does_not_answer_is_told_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tidegate.client.REMINDER", 0.05)
    engine, events = FakeEngine(), []  # type: ignore[var-annotated]
    monkeypatch.setattr(engine, "client", lambda options: FakeClient(options, looks=1_000_000))

    async def scenario() -> None:
        client = made(engine, FakeClientHost(), events)
        task = asyncio.create_task(client.run())
        await until(lambda: len(events) >= 4)
        client.request_stop()
        await task

    asyncio.run(scenario())
    first, *others = (event.text for event in events if event.event == "waiting")
    for hint in ("UDP port", "profile still valid", "clock", "docs/operation.md"):
        assert hint in first
        assert all(hint not in other and other.endswith("; still trying") for other in others)
    heading = first.partition('"')[2].partition('"')[0]
    assert f"\n## {heading}\n" in (Path(__file__).parents[2] / "docs" / "operation.md").read_text()


def test_a_connected_client_stops_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, host, events = FakeEngine(), FakeClientHost(), []  # type: ignore[var-annotated]
    looks = 0
    status = FakeClient.status

    def counted(self: FakeClient) -> object:
        nonlocal looks
        looks += 1
        return status(self)

    monkeypatch.setattr(FakeClient, "status", counted)

    async def scenario() -> None:
        client = made(engine, host, events)
        task = await until_connected(client, events)
        before = looks
        await asyncio.sleep(0.3)
        assert looks == before
        client.request_stop()
        await task

    asyncio.run(scenario())


def test_an_engine_that_is_too_busy_to_answer_holds_nothing_up_and_takes_no_tunnel_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tidegate.client.SILENCE", 0.05)
    engine, host, events = FakeEngine(), FakeClientHost(), []  # type: ignore[var-annotated]
    status, looks = FakeClient.status, 0

    def busy(self: FakeClient) -> object:
        nonlocal looks
        assert threading.current_thread() is not threading.main_thread(), "the event loop goes on meanwhile"
        looks += 1
        if looks % 2:
            raise RuntimeError("shard 0 did not answer within 2s")
        return status(self)

    monkeypatch.setattr(FakeClient, "status", busy)

    async def scenario() -> None:
        client = made(engine, host, events)
        task = await until_connected(client, events)
        await until(lambda: looks >= 5)
        await asyncio.sleep(0.1)
        client.request_stop()
        await task

    asyncio.run(scenario())
    assert looks == 5, "two looks, each without an answer once; then one at what came back"
    assert host.journal == WHOLE


def test_the_engine_gets_the_profiles_cipher() -> None:
    engine, events = FakeEngine(), []  # type: ignore[var-annotated]

    async def scenario() -> None:
        fast = replace(PROFILE, cipher="aes-256-gcm")
        client = made(engine, FakeClientHost(), events, fast)
        task = await until_connected(client, events)
        client.request_stop()
        await task

    asyncio.run(scenario())
    assert engine.clients[0].options.cipher == "aes-256-gcm"


def test_a_cipher_that_this_machine_is_no_good_at_is_refused() -> None:
    engine = FakeEngine()
    engine.aes = False
    fast = replace(PROFILE, cipher="aes-256-gcm")
    with pytest.raises(EngineError, match="no AES instructions, which aes-256-gcm for this profile needs"):
        asyncio.run(made(engine, FakeClientHost(), [], fast).run())
    assert engine.clients == []


@pytest.mark.parametrize(
    ("sent", "received", "mentioned"), [(10, 0, True), (10, 20, False), (0, 0, False)], ids=str
)
def test_a_handshake_without_any_data_is_mentioned_once(
    monkeypatch: pytest.MonkeyPatch, sent: int, received: int, mentioned: bool
) -> None:
    monkeypatch.setattr("tidegate.client.SILENCE", 0.05)
    monkeypatch.setattr(FakePeerStatus, "__init__", _counters(FakePeerStatus.__init__, sent, received))
    engine, events = FakeEngine(), []  # type: ignore[var-annotated]

    async def scenario() -> None:
        client = made(engine, FakeClientHost(), events)
        task = await until_connected(client, events)
        engine.clients[0].last_handshake = 0.0  # another one: the gateway is there
        await until(lambda: engine.clients[0].looks == 3)
        await until(lambda: not mentioned or any(event.event == "silent" for event in events))
        await asyncio.sleep(0.1)
        client.request_stop()
        await task

    asyncio.run(scenario())
    told = [event for event in events if event.event == "silent"]
    assert len(told) == int(mentioned)
    assert all("chacha20-poly1305" in event.text and "peer show" in event.text for event in told)


@pytest.mark.parametrize("told", [False, True], ids=["not yet known", "known"])
def test_ciphers_are_not_blamed_for_a_gateway_that_is_gone(
    monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    """It answers no handshake since the first one."""
    monkeypatch.setattr("tidegate.client.SILENCE", 0.05)
    monkeypatch.setattr(FakePeerStatus, "__init__", _counters(FakePeerStatus.__init__, 10, 0))
    engine, events = FakeEngine(), []  # type: ignore[var-annotated]

    async def scenario() -> None:
        client = made(engine, FakeClientHost(), events)
        task = await until_connected(client, events)
        if told:
            engine.clients[0].tell(FakeEvent("handshake_unanswered"))
        await until(lambda: engine.clients[0].looks >= 4)
        await asyncio.sleep(0.1)
        client.request_stop()
        await task

    asyncio.run(scenario())
    lost = ["lost"] if told else []
    assert [event.event for event in events] == ["starting", "connected", *lost, "stopping"]


def test_each_outage_is_told_of_once_and_its_end_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidegate.client.FIRST_LOOK", 0.01)
    engine, host, events = FakeEngine(), FakeClientHost(), []  # type: ignore[var-annotated]

    async def scenario() -> None:
        client = made(engine, host, events)
        task = await until_connected(client, events)
        (packets,) = engine.clients
        for outage in (1, 2):
            for _ in range(3):
                packets.tell(FakeEvent("handshake_unanswered"))
                await until(lambda: [event.event for event in events[-1:]] == ["lost"])
                await asyncio.sleep(0.05)
            packets.last_handshake = 0.0
            await until(lambda: events[-1].event == "connected")
            looks = packets.looks
            packets.tell(FakeEvent("handshake_unanswered"))  # late news of the attempt that was answered
            await asyncio.sleep(0.2)
            assert packets.looks <= looks + 1, "nobody looks any longer"
            assert [event.event for event in events] == [
                "starting",
                "connected",
                *["lost", "connected"] * outage,
            ]
            packets.last_handshake = 60.0
        client.request_stop()
        await task

    asyncio.run(scenario())
    assert events[2].text == "192.0.2.2:51820 does not answer any more; still trying"
    assert events[3].text.startswith("connected to 192.0.2.2:51820 again, after ")
    assert events[3].fields["address"] == "10.66.77.2"
    assert 0.1 < events[3].fields["seconds"] < 5


def test_an_engine_that_does_not_say_whether_the_gateway_answers_ends_no_outage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tidegate.client.FIRST_LOOK", 0.01)
    engine, events = FakeEngine(), []  # type: ignore[var-annotated]
    looks = 0

    def busy(_: FakeClient) -> object:
        nonlocal looks
        looks += 1
        raise RuntimeError("shard 0 did not answer within 2s")

    async def scenario() -> None:
        client = made(engine, FakeClientHost(), events)
        task = await until_connected(client, events)
        monkeypatch.setattr(FakeClient, "status", busy)
        engine.clients[0].tell(FakeEvent("handshake_unanswered"))
        await until(lambda: looks >= 4)
        client.request_stop()
        await task

    asyncio.run(scenario())
    assert [event.event for event in events] == ["starting", "connected", "lost", "stopping"]


def _counters(make: Callable[..., None], sent: int, received: int) -> Callable[..., None]:
    def init(self: FakePeerStatus, *arguments: object) -> None:
        make(self, *arguments)
        self.sent_packets, self.received_packets = sent, received

    return init


def test_a_host_name_is_resolved_and_an_unknown_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    named = replace(PROFILE, endpoint=Endpoint("localhost", 51820))
    engine, events = FakeEngine(), []  # type: ignore[var-annotated]

    async def scenario() -> None:
        client = made(engine, FakeClientHost(), events, named)
        task = await until_connected(client, events)
        client.request_stop()
        await task

    asyncio.run(scenario())
    assert engine.clients[0].options.endpoint == ("127.0.0.1", 51820)
    unknown = replace(PROFILE, endpoint=Endpoint("vpn.invalid", 51820))  # RFC 6761 §6.4
    with pytest.raises(HostNetworkError, match="vpn.invalid cannot be resolved"):
        asyncio.run(made(FakeEngine(), FakeClientHost(), [], unknown).run())


def test_a_name_that_leads_to_no_gateway_ends_the_command_before_anything_is_set_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    filtered = [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("0.0.0.0", 51820))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: filtered)
    named, host = replace(PROFILE, endpoint=Endpoint("vpn.example", 51820)), FakeClientHost()
    refused = r"vpn\.example resolves to 0\.0\.0\.0, which is no gateway's address; does a DNS filter"
    with pytest.raises(HostNetworkError) as raised:
        asyncio.run(made(FakeEngine(), host, [], named).run())
    assert re.match(refused, str(raised.value))
    assert host.journal == WHOLE[:2]


@pytest.mark.usefixtures("at_a_terminal")
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGHUP, 0)],
    ids=["SIGINT", "SIGTERM", "SIGHUP"],
)
def test_the_command_tells_programs_and_ends_with_the_code_of_its_signal(
    end_when_connected: EndWhenConnected,
    tidegate: CommandLine,
    tmp_path: Path,
    number: signal.Signals,
    code: int,
) -> None:
    file = tmp_path / "alice.conf"
    file.write_text(PROFILE.render())
    end_when_connected(number)
    outcome = tidegate("connect", file, "--json", "--interface", "test0")
    assert outcome.code == code
    events = [json.loads(line) for line in outcome.out.splitlines()]
    assert [event["event"] for event in events] == ["starting", "connected", "stopping"]
    assert events[1]["address"] == "10.66.77.2"
    assert tidegate.client_host.journal == WHOLE


@pytest.mark.parametrize(("stream", "flags"), [("stdout", ["--json"]), ("stderr", [])])
@pytest.mark.parametrize("full", [False, True], ids=["nobody reads", "disk is full"])
def test_the_tunnel_stays_up_where_nobody_reads_what_becomes_of_it(
    end_when_connected: EndWhenConnected,
    tidegate: CommandLine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stream: str,
    flags: list[str],
    full: bool,
) -> None:
    file = tmp_path / "alice.conf"
    file.write_text(PROFILE.render())
    reader, writer = os.pipe()
    os.close(reader)
    if full:
        os.dup2(os.open("/dev/full", os.O_WRONLY), writer)
    with os.fdopen(writer, "w", buffering=1) as unread:
        monkeypatch.setattr(sys, stream, unread)
        end_when_connected(signal.SIGINT)
        outcome = tidegate("connect", file, *flags)
        discard(unread)
    assert outcome.code == 130, outcome
    assert tidegate.client_host.journal == WHOLE


@contextmanager
def look_ups_that_hang(meanwhile: Callable[[], None] = lambda: None) -> Iterator[None]:
    """The C library's look-up takes its time."""
    answer = threading.Event()

    def hang(*_: object, **__: object) -> list[object]:
        meanwhile()
        answer.wait(30)
        raise socket.gaierror(socket.EAI_AGAIN, "late")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", hang)
        try:
            yield
        finally:
            answer.set()


def test_a_client_that_is_stopped_while_it_looks_up_its_gateway_ends_at_once() -> None:
    host, engine = FakeClientHost(), FakeEngine()
    named = replace(PROFILE, endpoint=Endpoint("vpn.example", 51820))
    with look_ups_that_hang(lambda: os.kill(os.getpid(), signal.SIGTERM)):
        began = time.monotonic()
        assert asyncio.run(made(engine, host, [], named).run()) == signal.SIGTERM
        assert time.monotonic() - began < 5, "it would be given up after 10 s"
    assert host.journal == WHOLE[:2], (
        "what a killed client left is removed before: it may keep names from being found"
    )
    assert engine.clients == []


def test_a_look_up_that_takes_too_long_ends_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidegate.host.names.RESOLVE_TIMEOUT", 0.2)
    named = replace(PROFILE, endpoint=Endpoint("vpn.example", 51820))
    with look_ups_that_hang():
        began = time.monotonic()
        with pytest.raises(HostNetworkError, match=r"vpn\.example could not be resolved within 0\.2 s"):
            asyncio.run(made(FakeEngine(), FakeClientHost(), [], named).run())
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("step", ["configure_tun", "routes", "dns"])
def test_a_stop_during_the_start_is_heeded_and_what_was_done_is_undone(step: str) -> None:
    host, engine = FakeClientHost(), FakeEngine()
    client = made(engine, host, [])
    method = getattr(host, step)

    def stopping(*arguments: object) -> object:
        client.request_stop()
        return method(*arguments)

    setattr(host, step, stopping)
    asyncio.run(client.run())
    done = {"configure_tun": WHOLE[:3], "routes": [*WHOLE[:4], "routes undone"], "dns": WHOLE}
    assert host.journal == done[step]
    assert engine.clients[0].stopped == 1


def test_a_hangup_that_is_ignored_as_under_nohup_stops_nothing() -> None:
    host, events = FakeClientHost(), []  # type: ignore[var-annotated]

    async def scenario() -> None:
        client = made(FakeEngine(), host, events)
        task = await until_connected(client, events)
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.sleep(0.1)
        assert not task.done()
        client.request_stop()
        await task

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        asyncio.run(scenario())
    finally:
        signal.signal(signal.SIGHUP, before)
    assert host.journal == WHOLE


@pytest.mark.usefixtures("at_a_terminal")
def test_a_terminal_that_is_gone_keeps_nothing_from_being_taken_back() -> None:
    host, events = FakeClientHost(), []

    def report(event: ClientEvent) -> None:
        if event.event == "stopping":
            raise OSError(errno.EIO, "Input/output error")
        events.append(event)

    async def scenario() -> None:
        client = Client(
            PROFILE, FakeEngine(), host, tun_name="test0", offloads=OffloadSettings(), report=report
        )
        task = await until_connected(client, events)
        os.kill(os.getpid(), signal.SIGHUP)
        async with asyncio.timeout(2):
            assert await task == signal.SIGHUP

    asyncio.run(scenario())
    assert host.journal == WHOLE


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        ("applied", []),
        ("refused", ["resolv.conf failed", "names go on to the former resolver"]),
        (
            "unmanaged",
            [
                "nothing on this host manages",
                "names go on to the former resolver",
                "install systemd-resolved or resolvconf, or use --no-dns",
            ],
        ),
    ],
)
def test_a_resolver_that_was_not_told_is_mentioned(
    end_when_connected: EndWhenConnected,
    tidegate: CommandLine,
    tmp_path: Path,
    outcome: DnsOutcome,
    said: list[str],
) -> None:
    tidegate.client_host.dns_outcome = outcome
    file = tmp_path / "alice.conf"
    file.write_text(PROFILE.render())
    end_when_connected(signal.SIGINT)
    told = tidegate("connect", file).err
    assert ("DNS is left as it is" in told) == bool(said)
    assert all(words in told for words in said)


def test_search_domains_without_a_server_leave_dns_alone(
    end_when_connected: EndWhenConnected, tidegate: CommandLine, tmp_path: Path
) -> None:
    file = tmp_path / "alice.conf"
    file.write_text(replace(PROFILE, dns=(), search=("corp.example", "example")).render())
    end_when_connected(signal.SIGINT)
    told = tidegate("connect", file).err
    assert "dns" not in tidegate.client_host.journal
    assert "its search domains are ignored" in told
    assert "corp.example, example" in told


@pytest.mark.parametrize(
    ("flags", "leftovers", "then", "marked"),
    [
        ((), "leftovers routes dns", WHOLE[3:], True),
        (("--no-dns",), "leftovers routes", ["routes", "routes undone"], True),
        (("--no-routes",), "leftovers dns", ["no routes", "dns", "dns undone", "no routes undone"], False),
        (("--no-dns", "--no-routes"), "leftovers", ["no routes", "no routes undone"], False),
    ],
    ids=["none", "no DNS", "no routes", "neither"],
)
def test_switches_leave_dns_and_routes_alone(
    end_when_connected: EndWhenConnected,
    tidegate: CommandLine,
    tmp_path: Path,
    flags: tuple[str, ...],
    leftovers: str,
    then: list[str],
    marked: bool,
) -> None:
    """Even if it looks like an earlier client's: somebody may have made it by hand."""
    file = tmp_path / "alice.conf"
    file.write_text(PROFILE.render())
    end_when_connected(signal.SIGINT)
    assert tidegate("connect", file, *flags).code == 130
    assert tidegate.client_host.journal == ["privileges", leftovers, "tun 10.66.77.2/32 1420", *then]
    assert (tidegate.engine.clients[0].options.fwmark != 0) == marked


@pytest.mark.parametrize(("mode", "said"), [(0o644, True), (0o600, False)])
def test_a_profile_that_everybody_can_read_is_mentioned(
    end_when_connected: EndWhenConnected, tidegate: CommandLine, open_folder: Path, mode: int, said: bool
) -> None:
    file = open_folder / "alice.conf"
    file.write_text(PROFILE.render())
    file.chmod(mode)
    end_when_connected(signal.SIGINT)
    outcome = tidegate("connect", file)
    assert outcome.code == 130
    assert (f"{file}: every user of this machine can read its keys" in outcome.err) == said


@pytest.mark.parametrize("level", ["debug", "info"])
def test_what_only_helps_to_find_faults_is_logged_when_asked_for(
    end_when_connected: EndWhenConnected,
    tidegate: CommandLine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    level: str,
) -> None:
    status = FakeClient.status

    def busy_at_first(client: FakeClient) -> FakeStatus:
        answer = status(client)
        if client.looks == 1:
            raise RuntimeError("the engine is busy")
        return answer

    monkeypatch.setattr(FakeClient, "status", busy_at_first)
    file = tmp_path / "alice.conf"
    file.write_text(PROFILE.render())
    end_when_connected(signal.SIGINT)
    outcome = tidegate("connect", file, "--log-level", level, "--log-format", "json")
    assert outcome.code == 130
    events = [json.loads(line) for line in outcome.err.splitlines() if line.startswith("{")]
    causes = [event["cause"] for event in events if event["level"] == "debug"]
    assert causes == (["the engine is busy"] if level == "debug" else [])


def test_a_broken_profile_is_a_usage_error(tidegate: CommandLine, tmp_path: Path) -> None:
    file = tmp_path / "alice.conf"
    file.write_text(PROFILE.render().replace("PublicKey = ", "PublicKey = x"))
    assert f"{file}:8: PublicKey is not a key" in tidegate.refused(2, "connect", file)
    assert "cannot be read" in tidegate.refused(2, "connect", tmp_path / "missing.conf")
    file.write_text(PROFILE.render())
    assert "--interface" in tidegate.refused(2, "connect", file, "--interface", "x" * 20)
    assert tidegate.engine.clients == []
