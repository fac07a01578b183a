"""A client on a fake engine whose gateway has moved."""

from __future__ import annotations

import asyncio
import socket
import threading
from dataclasses import replace
from ipaddress import IPv4Address, ip_network
from typing import Literal, NoReturn

import pytest

from tests.unit.connecting import PROFILE, made, until_connected
from tests.unit.fakes import FakeClient, FakeClientHost, FakeEngine, FakeEvent
from tests.unit.running import until
from tidegate.client import Client
from tidegate.errors import HostNetworkError
from tidegate.host.routes import Renewal, RoutePlan
from tidegate.net import Endpoint

UNANSWERED = FakeEvent("handshake_unanswered")


class Name:
    """A host name whose address changes."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.look_ups = 0

    async def find(self, *_: object) -> IPv4Address:
        self.look_ups += 1
        if not self.address:
            raise HostNetworkError("vpn.example cannot be resolved")
        return IPv4Address(self.address)


class Search(asyncio.Event):
    """What a client's search waits for, and how often it has begun to wait: each time a round and its pause are
    over."""

    def __init__(self, client: Client) -> None:
        super().__init__()
        self._waits = 0
        client._unanswered = self

    async def wait(self) -> Literal[True]:
        self._waits += not self.is_set()
        return await super().wait()

    async def round(self, packets: FakeClient) -> None:
        """From an attempt that nobody answered until the next one would count."""
        await until(lambda: self._waits > 0)
        before = self._waits
        packets.tell(UNANSWERED)
        await until(lambda: self._waits > before)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidegate.client.SEARCH_PAUSE", 0.05)


def test_a_gateway_that_does_not_answer_is_looked_for_and_found(monkeypatch: pytest.MonkeyPatch) -> None:
    name = Name("192.0.2.2")
    engine, events = FakeEngine(), []  # type: ignore[var-annotated]
    named = replace(PROFILE, endpoint=Endpoint("vpn.example", 51820))

    async def resolve_again(*asked: object) -> IPv4Address:
        (packets,) = engine.clients
        for _ in range(5):  # more often than anybody is asked
            packets.tell(UNANSWERED)
            await until(lambda: not packets.events)
        return await name.find(*asked)

    monkeypatch.setattr("tidegate.client.resolve", name.find)
    monkeypatch.setattr("tidegate.client.resolve_again", resolve_again)

    async def scenario() -> None:
        client = made(engine, FakeClientHost(), events, named)
        search = Search(client)
        task = await until_connected(client, events)
        (packets,) = engine.clients
        for address in ("192.0.2.2", "", "192.0.2.3", "192.0.2.3"):
            name.address = address
            await search.round(packets)
        assert packets.endpoints == [("192.0.2.3", 51820)]
        assert name.look_ups == 1 + 4
        await asyncio.sleep(0.2)
        assert name.look_ups == 1 + 4, "nobody looks for a gateway that answers"
        client.request_stop()
        await task

    asyncio.run(scenario())


def test_a_gateway_that_has_roamed_is_called_where_its_profile_says_and_where_it_was_heard_in_turns() -> None:
    """It may have come back and been restarted, and then nobody hears of it; or it may be where it went."""
    engine, events = FakeEngine(), []  # type: ignore[var-annotated]
    heard, named = ("192.0.2.9", 51999), ("192.0.2.2", 51820)

    async def scenario() -> None:
        client = made(engine, FakeClientHost(), events)
        search = Search(client)
        task = await until_connected(client, events)
        (packets,) = engine.clients
        packets.called = heard
        for _ in range(3):
            await search.round(packets)
        assert packets.endpoints == [named, heard, named]
        client.request_stop()
        await task

    asyncio.run(scenario())


@pytest.mark.parametrize("refused", [False, True])
def test_the_routing_rules_move_before_the_gateway_is_asked_elsewhere(
    monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    """Where reverse path filtering is strict, its answers would be dropped. If the rules cannot be moved, it is asked
    nevertheless, and they are tried again."""
    monkeypatch.setattr("tidegate.upkeep.SETTLE", 0.01)
    host, engine, events = FakeClientHost(), FakeEngine(), []  # type: ignore[var-annotated]
    heard, named = ("192.0.2.9", 51999), ("192.0.2.2", 51820)
    steps: list[object] = []

    def renew(plan: RoutePlan, _: str) -> Renewal:
        (gateway,) = (rule.gateway for rule in plan.rules if rule.gateway is not None)
        steps.append((str(gateway[0]), gateway[1]))
        if refused and steps.count(heard) == 1 and steps[-1] == heard:
            raise HostNetworkError("busy")
        return "whole"

    monkeypatch.setattr(host, "renew_routes", renew)

    async def scenario() -> None:
        client = made(engine, host, events)
        search = Search(client)
        task = await until_connected(client, events)
        (packets,) = engine.clients
        move = packets.set_endpoint

        def noted(endpoint: tuple[str, int]) -> None:
            steps.append("asked")
            move(endpoint)

        monkeypatch.setattr(packets, "set_endpoint", noted)
        await until(lambda: steps == [named])
        packets.called = heard
        await search.round(packets)
        await search.round(packets)
        assert packets.endpoints == [named, heard]
        tries = [named, "asked", heard, "asked"]
        await until(lambda: steps == [*tries, *[heard] * refused])
        client.request_stop()
        await task

    asyncio.run(scenario())


def test_the_routing_rules_follow_a_gateway_that_is_heard_elsewhere_after_an_outage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engine follows it by itself: the name said that it had moved, and then it answers from where it was."""
    monkeypatch.setattr("tidegate.client.FIRST_LOOK", 0.01)
    name = Name("192.0.2.3")
    monkeypatch.setattr("tidegate.client.resolve_again", name.find)
    host, engine, events = FakeClientHost(), FakeEngine(), []  # type: ignore[var-annotated]
    ruled: list[str] = []

    def renew(plan: RoutePlan, _: str) -> Renewal:
        ruled.extend(str(rule.gateway[0]) for rule in plan.rules if rule.gateway is not None)
        return "whole"

    monkeypatch.setattr(host, "renew_routes", renew)

    async def scenario() -> None:
        client = made(engine, host, events)
        search = Search(client)
        task = await until_connected(client, events)
        (packets,) = engine.clients
        await search.round(packets)
        assert ruled[-1] == "192.0.2.3"
        packets.called = ("192.0.2.2", 51820)
        packets.last_handshake = 0.0
        await until(lambda: ruled[-1] == "192.0.2.2")
        client.request_stop()
        await task

    asyncio.run(scenario())


def test_a_name_that_leads_to_no_gateway_is_told_of_once_and_the_gateway_stays_where_it_was(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where a DNS filter answers 0.0.0.0."""
    answer = "192.0.2.2"

    def look_up(*_: object, **__: object) -> list[object]:
        return [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", (answer, 51820))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    engine, events = FakeEngine(), []  # type: ignore[var-annotated]
    named = replace(PROFILE, endpoint=Endpoint("vpn.example", 51820))

    async def scenario() -> None:
        nonlocal answer
        client = made(engine, FakeClientHost(), events, named)
        search = Search(client)
        task = await until_connected(client, events)
        (packets,) = engine.clients
        answer = "0.0.0.0"
        for _ in range(3):
            await search.round(packets)
        answer = str(PROFILE.address.ip)
        await search.round(packets)
        assert packets.endpoints == []
        answer = "192.0.2.3"
        await search.round(packets)
        assert packets.endpoints == [("192.0.2.3", 51820)]
        answer = "0.0.0.0"
        await search.round(packets)
        client.request_stop()
        await task

    asyncio.run(scenario())
    told = capsys.readouterr().out
    assert told.count("vpn.example resolves to 0.0.0.0, which is no gateway's address") == 2, "once each time"
    assert told.count("vpn.example resolves to 10.66.77.2, which is no gateway's address") == 1


def test_an_attempt_that_was_told_of_and_then_answered_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine announces attempts when it makes them: the one that succeeds after a move is announced as well."""
    engine, events = FakeEngine(), []  # type: ignore[var-annotated]
    heard, named = ("192.0.2.9", 51999), ("192.0.2.2", 51820)

    async def scenario() -> None:
        client = made(engine, FakeClientHost(), events)
        search = Search(client)
        task = await until_connected(client, events)
        (packets,) = engine.clients
        packets.called = heard
        move = packets.set_endpoint

        def move_and_be_answered(endpoint: tuple[str, int]) -> None:
            """In a thread."""
            move(endpoint)
            packets.tell(UNANSWERED)
            while packets.events:
                threading.Event().wait(0.005)
            packets.last_handshake = 28.0  # before the pause is over

        monkeypatch.setattr(packets, "set_endpoint", move_and_be_answered)
        await search.round(packets)
        await asyncio.sleep(0.2)
        assert packets.endpoints == [named]
        client.request_stop()
        await task

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "late", [True, False], ids=["during the look-up", "before Python hears of the attempt"]
)
def test_a_gateway_that_answers_before_it_is_found_elsewhere_is_not_left(
    monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    engine, events = FakeEngine(), []  # type: ignore[var-annotated]
    look_ups = 0

    async def find(*_: object) -> IPv4Address:
        nonlocal look_ups
        look_ups += 1
        if late:
            engine.clients[0].last_handshake = 0.0
        return IPv4Address("192.0.2.3")

    monkeypatch.setattr("tidegate.client.resolve_again", find)

    async def scenario() -> None:
        client = made(engine, FakeClientHost(), events)
        search = Search(client)
        task = await until_connected(client, events)
        (packets,) = engine.clients
        if not late:
            packets.last_handshake = 0.3  # a busy machine: the answer was faster than the news of the attempt
        await search.round(packets)
        assert (look_ups, packets.endpoints) == (1, [])
        client.request_stop()
        await task

    asyncio.run(scenario())


def test_a_gateway_is_not_left_while_the_engine_does_not_say_whether_it_has_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = Name("192.0.2.3")
    monkeypatch.setattr("tidegate.client.resolve_again", name.find)
    engine, events = FakeEngine(), []  # type: ignore[var-annotated]

    def busy() -> NoReturn:
        raise RuntimeError("shard 0 did not answer within 2s")

    async def scenario() -> None:
        client = made(engine, FakeClientHost(), events)
        search = Search(client)
        task = await until_connected(client, events)
        (packets,) = engine.clients
        monkeypatch.setattr(packets, "status", busy)
        await search.round(packets)
        assert (name.look_ups, packets.endpoints) == (1, [])
        client.request_stop()
        await task

    asyncio.run(scenario())


HOME, AWAY, INNER = ("192.0.2.53", 53), ("198.51.100.53", 53), ("10.66.77.1", 53)


@pytest.mark.parametrize(
    ("tunnels", "asked_first", "asked_then"),
    [(INNER, AWAY, HOME), (HOME, AWAY, HOME), (HOME, HOME, HOME)],
    ids=["of its own", "the same as at home", "the same, and none else now"],
)
def test_the_resolvers_of_the_network_of_now_are_asked_before_those_of_the_start(
    monkeypatch: pytest.MonkeyPatch,
    tunnels: tuple[str, int],
    asked_first: tuple[str, int],
    asked_then: tuple[str, int],
) -> None:
    """And never the tunnel's own, unless it was the host's own before there was a tunnel."""
    asked: list[list[tuple[str, int]]] = []

    async def find(_: Endpoint, resolvers: list[tuple[str, int]], *__: object) -> IPv4Address:
        asked.append(resolvers)
        return IPv4Address("192.0.2.2")

    monkeypatch.setattr("tidegate.client.resolve_again", find)
    engine, host, events = FakeEngine(), FakeClientHost(), []  # type: ignore[var-annotated]
    host.name_servers = [HOME]
    profile = replace(PROFILE, dns=(IPv4Address(tunnels[0]),))

    async def scenario() -> None:
        client = made(engine, host, events, profile)
        search = Search(client)
        task = await until_connected(client, events)
        host.name_servers = [*dict.fromkeys([tunnels, asked_first])]
        await search.round(engine.clients[0])
        client.request_stop()
        await task

    asyncio.run(scenario())
    assert asked == [[*dict.fromkeys([asked_first, asked_then])]]


@pytest.mark.parametrize(("found", "moved"), [("10.9.0.1", False), ("192.0.2.3", True)])
def test_a_gateway_is_not_followed_into_its_own_tunnel(
    monkeypatch: pytest.MonkeyPatch, found: str, moved: bool
) -> None:
    """If only some networks are routed into the tunnel, its own datagrams carry no mark."""
    name = Name("192.0.2.2")
    monkeypatch.setattr("tidegate.client.resolve_again", name.find)
    engine, events = FakeEngine(), []  # type: ignore[var-annotated]
    split = replace(PROFILE, allowed_ips=(ip_network("10.0.0.0/8"),))

    async def scenario() -> None:
        client = made(engine, FakeClientHost(), events, split)
        search = Search(client)
        task = await until_connected(client, events)
        name.address = found
        await search.round(engine.clients[0])
        assert engine.clients[0].endpoints == ([(found, 51820)] if moved else [])
        client.request_stop()
        await task

    asyncio.run(scenario())
