"""A whole gateway on a fake engine and a fake host, administered through command line and control socket."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path

import pytest

from tests.unit.fakes import FakeEngine, FakeEvent, FakeHost, ordinary_network
from tests.unit.running import only, serving, until
from tidegate.dns import DnsProxy, DnsServer, choose_upstreams
from tidegate.errors import EngineError, LockedError, SettingsError
from tidegate.gateway import Gateway
from tidegate.host import MAIN_TABLE, HostNetwork, InterfaceAddress, Route
from tidegate.settings import DnsSettings, Settings
from tidegate.state_dir import StateDir


def test_a_gateway_says_that_it_is_ready_and_undoes_everything(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            listen = settings.gateway.listen
            assert running.said == [f"listening on {listen} (UDP), external eth0 192.0.2.2, 0 peers"]
            assert running.host.configured == [("tidegate0", IPv4Interface("10.66.77.1/24"), 1420)]
            options = running.packets.options
            assert options.external.router == "192.0.2.1"
            assert options.external.on_link == ("192.0.2.0/24",)
            assert options.host_addresses == ("192.0.2.2",)
            control = running.state / "control.sock"
            assert stat.S_IMODE(control.stat().st_mode) == 0o600
        assert (running.packets.started, running.packets.stopped) == (1, 1)
        assert not control.exists()
        assert running.host.changed is None

    asyncio.run(scenario())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_everything_within_two_seconds(
    settings: Settings, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            began = time.monotonic()
            os.kill(os.getpid(), number)
            await running.task
            assert time.monotonic() - began < 2
            assert running.packets.stopped == 1

    asyncio.run(scenario())


def test_peers_and_publications_are_there_after_a_restart(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            await running.cli("peer", "add", "alice")
            await running.cli("publish", "add", "tcp/8000-8002", "--to", "alice:80")
            keys = set(running.packets.peers)
        async with serving(settings, capsys) as again:
            assert set(again.packets.peers) == keys
            assert again.packets.published == {
                ("tcp", 8000): ("10.66.77.2", 80),
                ("tcp", 8001): ("10.66.77.2", 81),
                ("tcp", 8002): ("10.66.77.2", 82),
            }
            assert "1 peer" in again.said[0]

    asyncio.run(scenario())


def test_a_publication_is_applied_at_once_and_whole_or_not_at_all(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            await running.cli("peer", "add", "alice")
            running.packets.held = {8005}
            code, _, err = await running.cli("publish", "add", "tcp/8000-8010", "--to", "alice:80")
            assert code == 1
            assert "tcp/8005 cannot be published" in err
            assert "tcp/8005 cannot be published: 192.0.2.2: Address already in use; " in err
            assert running.packets.published == {}
            assert (await running.answer("publish", "list"))["publications"] == []
            assert (await running.cli("publish", "add", "udp/53", "--to", "alice"))[0] == 0
            assert running.packets.published == {("udp", 53): ("10.66.77.2", 53)}
            told = await running.answer("publish", "list")
            assert told == {
                "publications": [{"external": "udp/53", "to": "alice:53", "state": "active", "detail": None}]
            }
            code, _, err = await running.cli("peer", "remove", "alice")
            assert "no longer published: udp/53" in err
            assert running.packets.published == {}

    asyncio.run(scenario())


def test_a_port_that_is_taken_on_a_new_external_address_is_told_for_as_long_as_it_is(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            await running.cli("peer", "add", "alice")
            await running.cli("publish", "add", "tcp/8000-8010", "--to", "alice:80")
            await running.cli("publish", "add", "udp/8005", "--to", "alice")
            running.packets.failed = [("tcp", 8005, "192.0.2.3", "address in use")]
            tcp, udp = (await running.answer("publish", "list"))["publications"]
            assert (tcp["state"], udp["state"]) == ("failed", "active")
            assert tcp["detail"] == "tcp/8005 on 192.0.2.3: address in use"
            why = "cannot publish tcp port 8005 of 192.0.2.3: Address already in use"
            running.packets.failed = [("tcp", 8005, "192.0.2.3", why)]
            tcp, _ = (await running.answer("publish", "list"))["publications"]
            assert tcp["detail"] == "tcp/8005 on 192.0.2.3: Address already in use"
            running.packets.failed = []
            tcp, _ = (await running.answer("publish", "list"))["publications"]
            assert (tcp["state"], tcp["detail"]) == ("active", None)

    asyncio.run(scenario())


def test_a_publication_that_a_shard_does_not_answer_for_is_taken_back_as_a_whole(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            await running.cli("peer", "add", "alice")
            running.packets.late_at = 8005
            code, _, err = await running.cli("publish", "add", "tcp/8000-8010", "--to", "alice:80")
            assert code == 1
            assert "tcp/8005 cannot be published: shard 1 did not answer within 2s" in err
            assert running.packets.published == {}
            assert (await running.answer("publish", "list"))["publications"] == []
            running.packets.late_at = None
            assert (await running.cli("publish", "add", "tcp/8000-8010", "--to", "alice:80"))[0] == 0

    asyncio.run(scenario())


def test_ports_are_not_each_tried_again_while_a_shard_does_not_answer(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = (8080, 8081, 8082)
    asked: list[int] = []

    def late(_protocol: str, port: int, _internal: tuple[str, int]) -> None:
        asked.append(port)
        raise RuntimeError("shard 1 did not answer within 2s")

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            await running.cli("peer", "add", "alice")
            for port in ports:
                assert (await running.cli("publish", "add", f"tcp/{port}", "--to", "alice"))[0] == 0
        engine = FakeEngine()
        engine.prepare = lambda packets: packets.held.update(ports)
        async with serving(settings, capsys, engine) as again:
            with monkeypatch.context() as patch:
                patch.setattr(again.packets, "publish", late)
                warnings = (await again.answer("reload"))["warnings"]
            assert asked == [8080], "the engine waits 2 s for each"
            assert "did not answer" in warnings[0]
            assert len(warnings) == 3
            again.packets.held.clear()
            assert (await again.answer("reload"))["warnings"] == []
            assert [port for _, port in again.packets.published] == list(ports)

    asyncio.run(scenario())


def test_a_port_that_is_taken_at_start_is_told_and_does_not_stop_the_gateway(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            await running.cli("peer", "add", "alice")
            await running.cli("publish", "add", "tcp/8080", "--to", "alice:80")
        engine = FakeEngine()
        engine.prepare = lambda packets: packets.held.add(8080)
        async with serving(settings, capsys, engine) as again:
            entry = only((await again.answer("publish", "list"))["publications"])
            assert entry["state"] == "failed"
            assert "tcp/8080" in entry["detail"]
            code, _, err = await again.cli("reload")
            assert code == 0
            assert "tcp/8080 cannot be published" in err
            again.packets.held.clear()
            _, _, err = await again.cli("reload")
            assert "cannot be published" not in err
            assert again.packets.published == {("tcp", 8080): ("10.66.77.2", 80)}
            assert only((await again.answer("publish", "list"))["publications"])["state"] == "active"

    asyncio.run(scenario())


def test_status_and_nat_are_shown_to_people_and_programs(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            await running.cli("peer", "add", "alice")
            status = await running.answer("status")
            assert status["drops"] == {"spoofed_source": 7, "no_mapping": 0}
            assert status["mappings"] == {"tcp": 1, "udp": 2}
            assert status["pid"] == os.getpid()
            assert status["dns"] is None
            assert [peer["name"] for peer in status["peers"]] == ["alice"]
            _, out, _ = await running.cli("status")
            for word in (
                "alice",
                "10.66.77.2",
                "203.0.113.9:4000",
                "3 s ago",
                "2.0 KiB",
                "spoofed_source",
                "7",
            ):
                assert word in out
            assert "no_mapping" not in out
            told = await running.answer("nat", "list", "--peer", "alice")
            mapping = only(told["mappings"])
            assert mapping["internal"] == "10.66.77.2:5000"
            assert mapping["peer"] == "alice"
            assert told["truncated"] is False
            _, listed, _ = await running.cli("nat", "list")
            for word in ("10.66.77.2:5000", "alice", "age", "10 s"):
                assert word in listed
            stats = await running.answer("nat", "stats")
            assert stats["limits"]["max_mappings"] == 200_000
            assert (stats["sessions"], stats["clients"], stats["resting_ports"]) == (5, 1, 4)
            assert stats["explanations"]["spoofed_source"] == "It lies."
            _, shown, _ = await running.cli("nat", "stats")
            for word in ("5 sessions of 1 client;", "4 ports resting", "spoofed_source", "It lies."):
                assert word in shown
            assert (await running.cli("nat", "list", "--peer", "bob"))[0] == 1

    asyncio.run(scenario())


def test_a_second_gateway_on_the_same_state_is_refused(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            with pytest.raises(LockedError, match=rf"already running .*\(pid {os.getpid()}\)"):
                await Gateway(settings, FakeEngine(), FakeHost()).run()
            assert (await running.cli("status"))[0] == 0, "the first one is not disturbed"

    asyncio.run(scenario())


def test_a_stop_is_heeded_while_a_command_has_the_state_directory(settings: Settings) -> None:
    state, engine = StateDir(settings.state_dir), FakeEngine()
    state.prepare()

    async def scenario() -> None:
        with state.lock("command"):
            gateway = Gateway(settings, engine, FakeHost())
            starting = asyncio.create_task(gateway.run())
            await asyncio.sleep(0.1)
            gateway.request_stop()
            async with asyncio.timeout(1):
                await starting
        assert engine.gateways == []
        with state.lock("command", patience=0):
            pass

    asyncio.run(scenario())


def test_what_a_killed_gateway_left_is_replaced(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    settings.state_dir.mkdir()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(settings.state_dir / "control.sock"))
    (settings.state_dir / "lock").write_text("gateway 1\n")

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            assert (await running.cli("status"))[0] == 0

    asyncio.run(scenario())


def test_a_failed_shard_takes_the_gateway_down(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            running.packets.tell(FakeEvent("offload_disabled", "udp_gso"))
            await asyncio.sleep(0.05)
            assert not running.task.done()
            running.packets.tell(FakeEvent("shard_failed", "shard 1: it is on fire"))
            async with asyncio.timeout(2):
                with pytest.raises(EngineError, match="shard 1: it is on fire"):
                    await running.task
            assert running.packets.stopped == 1
            assert not (running.state / "control.sock").exists()

    asyncio.run(scenario())


def test_a_change_of_the_hosts_network_reaches_the_engine_once(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate.upkeep.SETTLE", 0.02)

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            await asyncio.sleep(0.15)
            assert running.packets.links == [], "nothing changed yet"
            assert running.host.changed is not None
            moved = ordinary_network(
                default=False,
                routes=(Route(IPv4Network("0.0.0.0/0"), IPv4Address("192.0.2.254"), 2, 0, MAIN_TABLE, None),),
            )
            running.host.network = moved
            running.host.changed()
            running.host.changed()
            await asyncio.sleep(0.15)
            assert [link.router for link in running.packets.links] == ["192.0.2.254"]
            running.host.network = replace(
                moved, addresses=moved.addresses[:1]
            )  # no address: keep what there was
            running.host.changed()
            await asyncio.sleep(0.15)
            assert len(running.packets.links) == 1
            assert (await running.answer("status"))["next_hop"] == "192.0.2.254"

    asyncio.run(scenario())


def test_an_address_that_the_host_gets_on_any_interface_reaches_the_engine(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its services answer from there is for the clients; what comes from anywhere else is not."""
    monkeypatch.setattr("tidegate.upkeep.SETTLE", 0.02)

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            assert running.packets.host_addresses == ("192.0.2.2",)
            assert running.host.changed is not None
            containers = InterfaceAddress(7, IPv4Interface("172.17.0.1/16"))
            running.host.network = ordinary_network(addresses=(containers,))
            running.host.changed()
            await until(lambda: running.packets.host_addresses == ("192.0.2.2", "172.17.0.1"))

    asyncio.run(scenario())


def test_the_engine_is_told_the_link_again_after_every_spell_in_which_it_was_not_there(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if it looks the same: its sockets may be bound to nothing."""
    monkeypatch.setattr("tidegate.upkeep.SETTLE", 0.02)

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            assert running.host.changed is not None
            whole = running.host.network
            for spells in (1, 2):
                running.host.network = replace(whole, addresses=())
                running.host.changed()
                await until(lambda: running.gateway.external_trouble is not None)
                running.host.network = whole
                running.host.changed()
                await until(lambda: running.gateway.external_trouble is None)
                assert running.packets.links == [running.packets.options.external] * spells
            running.host.changed()
            await asyncio.sleep(0.15)
            assert len(running.packets.links) == 2, "nothing has happened since"

    asyncio.run(scenario())


def test_the_engine_is_told_the_link_again_when_it_says_that_it_is_down(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interface may have been away for less time than it takes to look."""
    monkeypatch.setattr("tidegate.upkeep.SETTLE", 0.02)

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            links = running.packets.links
            await asyncio.sleep(0.15)
            running.packets.tell(FakeEvent("external_down", "Network is down"))
            await until(lambda: len(links) == 1)
            assert links == [running.packets.options.external]
            await asyncio.sleep(0.15)
            assert len(links) == 1, "once"

    asyncio.run(scenario())


def test_a_change_of_the_hosts_network_brings_its_resolvers(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As for a gateway that was started before DHCP had written resolv.conf."""
    monkeypatch.setattr("tidegate.upkeep.SETTLE", 0.02)
    resolv_conf = tmp_path / "resolv.conf"
    monkeypatch.setattr(
        "tidegate.gateway.choose_upstreams", partial(choose_upstreams, resolv_conf=resolv_conf)
    )
    on_loopback = lambda proxy, _, clients: DnsServer(proxy, IPv4Address("127.0.0.1"), clients, port=0)  # noqa: E731
    monkeypatch.setattr("tidegate.gateway.DnsServer", on_loopback)
    serve_dns = settings.model_copy(update={"dns": DnsSettings()})
    asked: list[list[tuple[str, int]]] = []
    set_upstreams = DnsProxy.set_upstreams

    def noted(proxy: DnsProxy, upstreams: Sequence[tuple[str, int]]) -> None:
        asked.append(list(upstreams))
        set_upstreams(proxy, upstreams)

    monkeypatch.setattr(DnsProxy, "set_upstreams", noted)

    async def scenario() -> None:
        async with serving(serve_dns, capsys) as running:
            assert asked == [[]]
            resolv_conf.write_text("nameserver 192.0.2.53\n")
            assert running.host.changed is not None
            running.host.changed()
            await until(lambda: len(asked) > 1)
            assert asked[1] == [("192.0.2.53", 53)]

    asyncio.run(scenario())


def test_a_peer_outside_the_subnet_is_named_before_anything_serves(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            await running.cli("peer", "add", "alice")
        other = settings.model_copy(
            update={"gateway": settings.gateway.model_copy(update={"subnet": IPv4Network("10.99.0.0/24")})}
        )
        engine = FakeEngine()
        with pytest.raises(SettingsError, match=r"'alice' has address 10\.66\.77\.2"):
            await Gateway(other, engine, FakeHost()).run()
        assert (engine.gateways[0].started, engine.gateways[0].stopped) == (0, 1)

    asyncio.run(scenario())


def test_an_idle_gateway_uses_no_cpu(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            await running.cli("peer", "add", "alice")
            await asyncio.sleep(0.5)
            before = time.process_time()
            await asyncio.sleep(1.5)
            assert time.process_time() - before < 0.005

    asyncio.run(scenario())


def test_the_service_manager_is_told(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(2)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))

        async def scenario() -> None:
            async with serving(settings, capsys):
                pass

        asyncio.run(scenario())
        assert manager.recv(1000).startswith(b"READY=1\nSTATUS=listening on 127.0.0.1:")
        assert manager.recv(1000) == b"STOPPING=1"


def test_status_tells_that_the_external_link_is_not_usable_for_as_long_as_it_is_not(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            whole = running.host.network

            async def told_after(network: HostNetwork, trouble: bool) -> None:
                running.host.network = network
                assert running.host.changed is not None
                running.host.changed()
                await until(lambda: bool(running.gateway.external_trouble) is trouble)
                assert bool((await running.answer("status"))["external_trouble"]) is trouble
                assert ("not usable: " in (await running.cli("status"))[1]) is trouble

            await told_after(replace(whole, addresses=()), True)
            await told_after(whole, False)

    asyncio.run(scenario())
