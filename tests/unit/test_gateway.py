"""A whole gateway on a fake engine and a fake host, administered through command line and control socket."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.unit.fakes import FakeEngine, FakeEvent, FakeHost, ordinary_network
from tests.unit.running import serving, until
from tidegate.control.client import ControlClient
from tidegate.control.commands import AnswerT, Command, PeerAdd, PeerList
from tidegate.dns import DnsProxy, DnsServer, choose_upstreams
from tidegate.errors import ConflictError, EngineError, LockedError, StoreError, UnansweredError
from tidegate.gateway import Gateway
from tidegate.host import MAIN_TABLE, HostNetwork, Route
from tidegate.identity import parse_profile, read_profile
from tidegate.net import Endpoint
from tidegate.settings import DnsSettings, Settings
from tidegate.state_dir import StateDir
from tidegate.store.sqlite import SqliteStore


def only(items: list[dict[str, Any]]) -> dict[str, Any]:
    """The one item of a list that has just one."""
    (item,) = items
    return item


def test_a_gateway_says_that_it_is_ready_and_undoes_everything(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            listen = settings.gateway.listen
            assert running.said == [f"listening on {listen} (UDP), external eth0 192.0.2.2, 0 peers"]
            assert running.host.configured == [("tidegate0", IPv4Interface("10.66.77.1/24"), 1420)]
            options = running.packets.options
            assert options.external.next_hop == "192.0.2.1"
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


def test_peers_are_added_listed_and_removed_at_once(
    settings: Settings, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            file = tmp_path / "alice.conf"
            code, out, err = await running.cli("peer", "add", "alice", "--out", str(file))
            assert (code, out) == (0, ""), err
            assert list(running.packets.peers.values()) == ["10.66.77.2"]
            profile = file.read_text()
            assert f"Endpoint = {settings.gateway.listen}" in profile
            assert "DNS" not in profile
            peer = only((await running.answer("peer", "list"))["peers"])
            assert peer["name"] == "alice"
            assert peer["received_bytes"] == 2048
            assert peer["last_handshake"] == 3.5
            assert (await running.answer("peer", "show", "alice"))["endpoint"] == "203.0.113.9:4000"
            code, _, err = await running.cli("peer", "add", "alice")
            assert code == 1
            assert "exists already" in err
            assert (await running.cli("peer", "remove", "alice"))[0] == 0
            assert running.packets.peers == {}
            assert (await running.cli("peer", "remove", "alice"))[0] == 1

    asyncio.run(scenario())


def test_a_profile_has_the_running_gateways_endpoint_and_port_and_not_what_the_command_line_knows(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    named = Endpoint("vpn.example.net", 443)
    settings = settings.model_copy(
        update={"gateway": settings.gateway.model_copy(update={"endpoint": named})}
    )

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            code, out, err = await running.cli("peer", "add", "alice")
            assert (code, err) == (0, "")
            assert parse_profile(out).endpoint == named
            code, out, err = await running.cli("peer", "add", "bob", "--endpoint", "vpn.example.com")
            assert (code, err) == (0, "")
            assert parse_profile(out).endpoint == Endpoint("vpn.example.com", settings.gateway.listen.port)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "refusal", [OSError(errno.ENOMEM, "no room for another peer"), RuntimeError("the engine was stopped")]
)
def test_a_peer_that_the_engine_refuses_is_not_in_the_store(
    settings: Settings, capsys: pytest.CaptureFixture[str], tmp_path: Path, refusal: Exception
) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            running.packets.refuse_peers = refusal
            code, _, err = await running.cli("peer", "add", "alice", "--out", str(tmp_path / "alice.conf"))
            assert code == 1
            assert str(refusal.args[-1]) in err
            assert not (tmp_path / "alice.conf").exists()
            assert (await running.answer("peer", "list"))["peers"] == []

    asyncio.run(scenario())


def deafen(monkeypatch: pytest.MonkeyPatch, kinds: set[type], cause: BaseException) -> None:
    """Commands of these kinds are carried out, and the command line does not hear the answer."""
    execute = ControlClient.execute

    def deaf(client: ControlClient, command: Command[AnswerT]) -> AnswerT:
        try:
            return execute(client, command)
        finally:
            if type(command) in kinds:
                raise cause

    monkeypatch.setattr(ControlClient, "execute", deaf)


@pytest.mark.parametrize(
    ("cause", "code", "told"),
    [
        (UnansweredError("no word", hint="is it well?"), 1, "tidegate: no word; alice was not added\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_a_peer_whose_adding_is_not_answered_is_taken_back(
    settings: Settings,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    cause: BaseException,
    code: int,
    told: str,
) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            out = tmp_path / "alice.conf"
            with monkeypatch.context() as patch:
                deafen(patch, {PeerAdd}, cause)
                assert await running.cli("peer", "add", "alice", "--out", str(out)) == (code, "", told)
            assert not out.exists()
            assert (await running.answer("peer", "list"))["peers"] == []
            assert running.packets.peers == {}
            assert (await running.cli("peer", "add", "alice"))[0] == 0
            with monkeypatch.context() as patch:
                deafen(patch, {PeerAdd}, cause)
                assert (await running.cli("peer", "add", "alice"))[0] == code
            assert len(running.packets.peers) == 1, "the alice of before has another key"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("cause", "code"), [(UnansweredError("no word"), 1), (KeyboardInterrupt(), 130)], ids=["", "Ctrl-C"]
)
def test_a_peer_that_cannot_be_taken_back_is_told_of(
    settings: Settings,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    cause: BaseException,
    code: int,
) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            with monkeypatch.context() as patch:
                deafen(patch, {PeerAdd, PeerList}, cause)
                exit_code, out, err = await running.cli("peer", "add", "alice")
            assert (exit_code, out) == (code, "")
            (line,) = err.splitlines()
            assert "alice may have been added" in line and "`tidegate peer show alice`" in line

    asyncio.run(scenario())


@pytest.mark.parametrize("taken_back", [True, False])
def test_a_profile_that_cannot_be_printed_leaves_one_thing_said_of_its_peer(
    settings: Settings,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    taken_back: bool,
) -> None:
    def full(_: str) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            with monkeypatch.context() as patch:
                patch.setattr("tidegate.cli.delivery.hand_out", full)
                if not taken_back:
                    deafen(patch, {PeerList}, UnansweredError("no word"))
                code, _, err = await running.cli("peer", "add", "alice")
            (line,) = err.splitlines()
            assert code == 1
            assert "the profile cannot be printed: No space left on device" in line
            assert ("alice was not added" in line) == taken_back
            assert ("alice may have been added" in line) != taken_back

    asyncio.run(scenario())


def test_a_failure_with_advice_of_its_own_keeps_it_while_the_peer_is_taken_back(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def taken_meanwhile(*_: object) -> NoReturn:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            monkeypatch.setattr("tidegate.files.os.link", taken_meanwhile)
            code, _, err = await running.cli("peer", "add", "alice", "--out", str(tmp_path / "alice.conf"))
            (line,) = err.splitlines()
            assert code == 2
            assert line.endswith("choose another --out, or add --force")
            assert running.packets.peers == {}

    asyncio.run(scenario())


HELD = StoreError("tidegate.db: is held by another process", hint="try again")


@contextmanager
def unreadable(monkeypatch: pytest.MonkeyPatch, cause: Exception = HELD) -> Iterator[None]:
    """The store cannot be read, as when another process holds it for long."""

    def held(_store: SqliteStore) -> NoReturn:
        raise cause

    with monkeypatch.context() as patch:
        patch.setattr(SqliteStore, "peers", held)
        patch.setattr(SqliteStore, "publications", held)
        yield


def test_a_store_that_fails_in_the_midst_of_a_command_leaves_no_half_of_it(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = with_gre_for_alice(settings)

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            with unreadable(monkeypatch):
                file = tmp_path / "alice.conf"
                assert (await running.cli("peer", "add", "alice", "--out", str(file)))[0] == 0
                assert read_profile(file).address == IPv4Interface("10.66.77.2/32")
                assert list(running.packets.peers.values()) == ["10.66.77.2"]
                assert (await running.cli("peer", "remove", "alice"))[0] == 0
                assert running.packets.peers == {}, "it cannot connect any more"
            assert (await running.cli("peer", "add", "alice"))[0] == 0
            assert running.packets.passed == {47: "10.66.77.2"}

    asyncio.run(scenario())


def test_a_peer_that_is_removed_connects_no_more_whatever_fails_then(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = with_gre_for_alice(settings)

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            assert (await running.cli("peer", "add", "alice"))[0] == 0
            with unreadable(monkeypatch, RuntimeError("nobody has thought of this")):
                assert (await running.cli("peer", "remove", "alice"))[0] == 1
            assert running.packets.peers == {}

    asyncio.run(scenario())


def with_gre_for_alice(settings: Settings) -> Settings:
    """So that whoever adds or removes a peer has to look in the store whose the protocol is."""
    nat = settings.nat.model_copy(update={"other_protocols": {47: "alice"}})
    return settings.model_copy(update={"nat": nat})


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
            for word in ("5 sessions of 1 clients", "4 ports rest", "spoofed_source", "It lies."):
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
    monkeypatch.setattr("tidegate.gateway.SETTLE", 0.02)

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
            assert [link.next_hop for link in running.packets.links] == ["192.0.2.254"]
            running.host.network = replace(
                moved, addresses=moved.addresses[:1]
            )  # no address: keep what there was
            running.host.changed()
            await asyncio.sleep(0.15)
            assert len(running.packets.links) == 1
            assert (await running.answer("status"))["next_hop"] == "192.0.2.254"

    asyncio.run(scenario())


def test_a_change_of_the_hosts_network_brings_its_resolvers(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As of a gateway that was started before DHCP had written resolv.conf."""
    monkeypatch.setattr("tidegate.gateway.SETTLE", 0.02)
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
        with pytest.raises(ConflictError, match=r"'alice' has address 10\.66\.77\.2"):
            await Gateway(other, engine, FakeHost()).run()
        assert (engine.gateways[0].started, engine.gateways[0].stopped) == (0, 1)

    asyncio.run(scenario())


def test_the_engine_is_told_each_peers_cipher_at_once_and_after_a_restart(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = ["aes-256-gcm", "chacha20-poly1305"]

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            await running.cli("peer", "add", "alice", "--cipher", "aes-256-gcm")
            await running.cli("peer", "add", "bob")
            assert list(running.packets.ciphers.values()) == expected
            assert "aes-256-gcm" in (await running.cli("status"))[1]
        async with serving(settings, capsys) as running:
            assert list(running.packets.ciphers.values()) == expected
            running.engine.aes = False
            code, _, err = await running.cli("peer", "add", "carol", "--cipher", "aes-256-gcm")
            assert (code, len(running.packets.ciphers)) == (1, 2)
            assert "no AES instructions" in err

    asyncio.run(scenario())


def test_a_gateway_without_aes_instructions_does_not_serve_a_peer_that_needs_them(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            await running.cli("peer", "add", "alice", "--cipher", "aes-256-gcm")
        engine = FakeEngine()
        engine.aes = False
        with pytest.raises(EngineError, match="no AES instructions.*'alice'.*peer remove alice"):
            await Gateway(settings, engine, FakeHost()).run()
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
                assert ("not usable now" in (await running.cli("status"))[1]) is trouble

            await told_after(replace(whole, addresses=()), True)
            await told_after(whole, False)

    asyncio.run(scenario())
