"""A whole gateway on a fake engine and a fake host whose link, or whose TUN device, needs more than one try."""

from __future__ import annotations

import asyncio
import errno
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from ipaddress import IPv4Interface, IPv4Network
from itertools import pairwise

import pytest
import structlog

from tests.unit.fakes import FakeEvent, FakeHost, ordinary_network
from tests.unit.running import serving, until
from tidegate.engine import ExternalLink
from tidegate.errors import HostNetworkError
from tidegate.host import MAIN_TABLE, HostNetwork, Interface, InterfaceAddress, Route
from tidegate.settings import ExternalSettings, Settings
from tidegate.upkeep import FIRST_RETRY, LONGEST_RETRY

TUN = Interface(9, "tidegate0", None, 1420, True, False)


def test_a_link_that_the_engine_refuses_is_tried_again_without_another_notice(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example for want of descriptors: nothing tells when there are some again."""
    monkeypatch.setattr("tidegate.upkeep.SETTLE", 0.02)
    monkeypatch.setattr("tidegate.upkeep.FIRST_RETRY", 0.04)
    tried_at: list[float] = []

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            take = running.packets.set_external

            def refuse(link: ExternalLink, own: Sequence[str]) -> None:
                tried_at.append(time.monotonic())
                if len(tried_at) <= 4:
                    raise OSError(errno.EMFILE, "Too many open files")
                take(link, own)

            monkeypatch.setattr(running.packets, "set_external", refuse)
            running.packets.tell(FakeEvent("external_down", "Network is down"))
            await until(lambda: len(tried_at) == 1)
            assert running.gateway.external_trouble == "Too many open files"
            await until(lambda: running.gateway.external_trouble is None)
            assert running.packets.links == [running.packets.options.external]
            await asyncio.sleep(0.5)
            assert len(tried_at) == 5, "and is left alone then"

    asyncio.run(scenario())
    pauses = [after - before for before, after in pairwise(tried_at)]
    assert all(pause >= least for pause, least in zip(pauses, (0.04, 0.08, 0.16, 0.32), strict=True))
    assert capsys.readouterr().out.count("the external link is not usable") == 1, "the same each time"


def test_a_network_that_cannot_be_read_is_read_again_in_a_minute_at_the_latest(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (FIRST_RETRY, LONGEST_RETRY) == (0.5, 60)
    monkeypatch.setattr("tidegate.upkeep.SETTLE", 0.02)
    monkeypatch.setattr("tidegate.upkeep.FIRST_RETRY", 0.01)
    monkeypatch.setattr("tidegate.upkeep.LONGEST_RETRY", 0.02)

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            await asyncio.sleep(0.1)
            reads, read = 0, running.host.read_network

            def refuse() -> HostNetwork:
                nonlocal reads
                reads += 1
                if reads <= 20:
                    raise HostNetworkError("cannot read the host's network: Cannot allocate memory")
                return read()

            monkeypatch.setattr(running.host, "read_network", refuse)
            assert running.host.changed is not None
            running.host.changed()
            await until(lambda: reads > 20 and running.gateway.external_trouble is None)

    asyncio.run(scenario())


def test_the_hosts_own_addresses_reach_the_engine_while_the_link_cannot_be_used(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate.upkeep.SETTLE", 0.01)
    monkeypatch.setattr("tidegate.upkeep.FIRST_RETRY", 0.02)
    bridge = Interface(7, "docker0", b"\x02\x00\x00\x00\x00\x07", 1500, True, True)
    own = InterfaceAddress(7, IPv4Interface("172.17.0.1/16"))

    def with_bridge(*, usable: bool) -> HostNetwork:
        network = ordinary_network(interfaces=(bridge,), addresses=(own,))
        eth0 = network.interface_named("eth0")
        interfaces = (replace(each, up=usable) if each == eth0 else each for each in network.interfaces)
        return replace(network, interfaces=tuple(interfaces))

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            packets = running.packets
            running.host.network = with_bridge(usable=False)
            assert running.host.changed is not None
            running.host.changed()
            await until(lambda: packets.host_addresses == ("192.0.2.2", "172.17.0.1"))
            assert running.gateway.external_trouble == "the external interface eth0 is down"
            assert packets.links == [packets.options.external], "the link is the one that it had"
            await asyncio.sleep(0.2)
            assert len(packets.links) == 1, "it is told once"

            running.host.network = with_bridge(usable=True)
            await until(lambda: running.gateway.external_trouble is None)
            assert len(packets.links) == 2, "and the link again, since it was away"

    asyncio.run(scenario())


@pytest.fixture
def _every_level_is_logged() -> None:
    """Unlike in other tests, whose answers the command line prints among what is logged."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG))


async def changed_to(host: FakeHost, network: HostNetwork, *, done: Callable[[], bool]) -> None:
    host.network = network
    assert host.changed is not None
    host.changed()
    await until(done)


@pytest.mark.usefixtures("_every_level_is_logged")
def test_a_gateway_without_a_default_route_serves_and_says_so_at_start_and_whenever_that_changes(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate.upkeep.SETTLE", 0.01)
    named = settings.model_copy(update={"external": ExternalSettings(interface="eth0")})
    without, whole = ordinary_network(default=False), ordinary_network()
    lost = "no default route leads out of the external interface: clients reach only its own networks"
    back = "a default route leads out of the external interface again"

    async def scenario() -> list[tuple[str, str]]:
        with structlog.testing.capture_logs() as logged:
            async with serving(named, capsys, host=FakeHost(without)) as running:

                async def seen(network: HostNetwork, metric: int, line: int) -> None:
                    links = len(running.packets.links)
                    await changed_to(running.host, network, done=lambda: links < len(running.packets.links))
                    status = await running.answer("status")
                    assert (status["default_route"], status["external_trouble"]) == (bool(metric), None)
                    text = (await running.cli("status"))[1]
                    assert text.count("no default route: clients reach only the networks of eth0") == line
                    metrics = (await running.cli("status", "--prometheus"))[1]
                    assert f"\ntidegate_default_route_known {metric}\n" in metrics
                    assert "\ntidegate_external_usable 1\n" in metrics

                assert "no default route" in (await running.cli("status"))[1]
                await seen(whole, 1, 0)
                await seen(without, 0, 1)
                second = InterfaceAddress(2, IPv4Interface("192.0.2.3/24"))
                await seen(ordinary_network(default=False, addresses=(second,)), 0, 1)
                await seen(whole, 1, 0)
        return [
            (line["log_level"], line["event"])
            for line in logged
            if "default route" in line["event"] and line["interface"] == "eth0"
        ]

    assert asyncio.run(scenario()) == [
        ("warning", lost),
        ("info", back),
        ("warning", lost),
        ("info", back),
    ]


@pytest.mark.usefixtures("_every_level_is_logged")
def test_a_host_that_gets_other_addresses_is_no_news_unless_its_link_is_another(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every container that starts brings an interface with an address."""
    monkeypatch.setattr("tidegate.upkeep.SETTLE", 0.01)
    veth = Interface(7, "veth7", b"\x02\x00\x00\x00\x00\x07", 1500, True, True)
    own = InterfaceAddress(7, IPv4Interface("172.17.0.1/16"))

    async def scenario() -> list[str]:
        with structlog.testing.capture_logs() as logged:
            async with serving(settings, capsys) as running:
                packets = running.packets
                await changed_to(
                    running.host,
                    ordinary_network(interfaces=(veth,), addresses=(own,)),
                    done=lambda: packets.host_addresses == ("192.0.2.2", "172.17.0.1"),
                )
                await changed_to(
                    running.host, ordinary_network(), done=lambda: packets.host_addresses == ("192.0.2.2",)
                )
                other = ordinary_network(
                    addresses=(own,),
                    routes=(Route(IPv4Network("198.51.100.0/24"), None, 2, 0, MAIN_TABLE, None),),
                )
                await changed_to(running.host, other, done=lambda: len(packets.links) == 3)
        return [line["log_level"] for line in logged if line["event"] == "the host's network changed"]

    assert asyncio.run(scenario()) == ["debug", "debug", "info"]


def test_a_route_that_comes_to_overlap_the_subnet_is_warned_of_once(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the host joins another VPN."""
    monkeypatch.setattr("tidegate.upkeep.SETTLE", 0.01)
    reads = 0

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            host, read = running.host, running.host.read_network

            def counted() -> HostNetwork:
                nonlocal reads
                reads += 1
                return read()

            monkeypatch.setattr(host, "read_network", counted)

            async def changed(*destinations: str) -> None:
                routes = (Route(IPv4Network(each), None, 2, 0, MAIN_TABLE, None) for each in destinations)
                host.network = ordinary_network(routes=tuple(routes))
                for _ in range(3):
                    before = reads
                    assert host.changed is not None
                    host.changed()
                    await until(lambda: reads > before)  # noqa: B023 -- called at once
                    await asyncio.sleep(0.02)

            await changed("10.64.0.0/10")
            await changed("10.66.77.128/25")
            await changed()
            await changed("10.64.0.0/10")

    asyncio.run(scenario())
    told = [line for line in capsys.readouterr().out.splitlines() if "overlaps" in line]
    assert ["10.64.0.0/10" in line for line in told] == [True, False, True], told
    assert all("dev eth0; choose another with [gateway] subnet" in line for line in told)


@pytest.mark.parametrize("up", [True, False])
def test_the_tun_device_gets_its_address_back_and_a_program_that_takes_it_again_some_time(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, up: bool
) -> None:
    monkeypatch.setattr("tidegate.upkeep.SETTLE", 0.01)
    monkeypatch.setattr("tidegate.upkeep.LONGEST_SETTLE", 0.1)
    own = InterfaceAddress(9, IPv4Interface("10.66.77.1/24"))
    whole = ordinary_network(interfaces=(TUN,), addresses=(own,))
    taken = ordinary_network(interfaces=(replace(TUN, up=up),), addresses=() if up else (own,))
    given_at: list[float] = []

    async def scenario() -> None:
        host = FakeHost(whole)
        async with serving(settings, capsys, host=host) as running:
            loop = asyncio.get_running_loop()
            await asyncio.sleep(0.1)
            assert len(host.configured) == 1, "at the start"
            wanted = host.configured[0]

            def give(*given: object) -> None:
                assert given == wanted
                given_at.append(time.monotonic())
                if len(given_at) >= 6:
                    host.network = whole
                assert host.changed is not None
                loop.call_soon_threadsafe(host.changed)

            monkeypatch.setattr(host, "configure_tun", give)
            host.network = taken
            assert host.changed is not None
            host.changed()
            await until(lambda: len(given_at) == 6)
            await asyncio.sleep(0.3)
            assert len(given_at) == 6
            assert running.packets.links == [], "the external link is as it was"

    asyncio.run(scenario())
    assert given_at[5] - given_at[0] >= 0.3, "0.02, 0.04, 0.08 and two times 0.1 s"
    assert capsys.readouterr().out.count("TUN device has lost its address or was set down") == 1


def test_a_tun_device_that_cannot_be_given_its_address_back_is_tried_again(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate.upkeep.SETTLE", 0.02)
    monkeypatch.setattr("tidegate.upkeep.FIRST_RETRY", 0.02)
    own = InterfaceAddress(9, IPv4Interface("10.66.77.1/24"))
    tries = 0

    async def scenario() -> None:
        host = FakeHost(ordinary_network(interfaces=(TUN,), addresses=(own,)))
        async with serving(settings, capsys, host=host):

            def give(*_: object) -> None:
                nonlocal tries
                tries += 1
                if tries < 3:
                    raise HostNetworkError("cannot configure tidegate0: Cannot allocate memory")
                host.network = ordinary_network(interfaces=(TUN,), addresses=(own,))

            monkeypatch.setattr(host, "configure_tun", give)
            host.network = ordinary_network(interfaces=(TUN,))
            assert host.changed is not None
            host.changed()
            await until(lambda: tries == 3)
            await asyncio.sleep(0.2)
            assert tries == 3

    asyncio.run(scenario())


def test_a_gateway_that_reads_its_hosts_network_can_be_stopped_at_once(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one with a million routes."""
    monkeypatch.setattr("tidegate.upkeep.SETTLE", 0.01)
    reading, go_on = threading.Event(), threading.Event()
    stopped_at = 0.0

    def read() -> HostNetwork:
        reading.set()
        go_on.wait(5)
        return ordinary_network()

    async def scenario() -> None:
        nonlocal stopped_at
        async with serving(settings, capsys) as running:
            monkeypatch.setattr(running.host, "read_network", read)
            assert running.host.changed is not None
            running.host.changed()
            await until(reading.is_set)
            stopped_at = time.monotonic()

    asyncio.run(scenario())
    took = time.monotonic() - stopped_at
    go_on.set()
    assert took < 2
