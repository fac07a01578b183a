"""Settings that change while the gateway runs: all of a file or nothing of it, by command and by signal."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Any, NoReturn

import pytest
import structlog

from tests.unit.conftest import CommandLine
from tests.unit.fakes import FakeEngine, ordinary_network
from tests.unit.running import Running, serving, until
from tidegate.engine import AccessPolicy
from tidegate.errors import StoreError
from tidegate.host import InterfaceAddress
from tidegate.identity import parse_profile
from tidegate.settings import Settings, load_settings
from tidegate.settings.changes import changed_keys, is_live, with_live_changes
from tidegate.settings.standards import FLOORS, below_the_standard
from tidegate.store.sqlite import SqliteStore

USAGE, FAILURE = 2, 1


@dataclass
class Editor:
    """Somebody who edits a running gateway's settings file."""

    running: Running
    write: Callable[[str], Path]

    async def change(self, text: str) -> dict[str, Any]:
        self.write(text)
        return await self.running.answer("reload")

    async def refused(self, text: str) -> tuple[int, str]:
        self.write(text)
        code, _, err = await self.running.cli("reload")
        return code, err

    @property
    def in_force(self) -> Settings:
        return self.running.gateway.settings


@asynccontextmanager
async def edited(
    tmp_path: Path, free_port: int, capture: pytest.CaptureFixture[str], engine: FakeEngine | None = None
) -> AsyncIterator[Editor]:
    file = tmp_path / "tidegate.toml"
    always = f'state_dir = "{tmp_path}/state"\n[gateway]\nlisten = "127.0.0.1:{free_port}"\n'

    def write(text: str) -> Path:
        file.write_text(always + text)
        return file

    write("")

    def reread() -> Settings:
        return load_settings(config=file, flags={("dns", "enabled"): ("--no-dns", False)})

    async with serving(reread(), capture, engine, reread=reread) as running:
        yield Editor(running, write)


def test_what_can_change_while_running_does_and_the_rest_is_named(
    tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with edited(tmp_path, free_port, capsys) as editor:
            answer = await editor.change(
                'tun_name = "other0"\nshards = 7\n[nat]\nudp_timeout = 150.0\nport_range = [20000, 30000]\n'
                'max_mappings = 5\n[log]\nlevel = "warning"\n'
            )
            assert answer["applied"] == [
                *("nat.udp_timeout", "nat.max_mappings", "nat.port_range", "log.level")
            ]
            assert answer["needs_restart"] == ["gateway.tun_name", "gateway.shards"]
            (nat,) = editor.running.packets.nat
            assert (nat.udp_timeout, nat.port_range) == (150.0, (20000, 30000))
            stats = await editor.running.answer("nat", "stats")
            assert stats["limits"]["max_mappings"] == 5, "administration goes by the new settings, too"
            assert editor.in_force.gateway.tun_name == "tidegate0"

            again = await editor.running.answer("reload")
            assert again["applied"] == [], "nothing is new the second time"
            assert again["needs_restart"] == ["gateway.tun_name", "gateway.shards"], "still not taken over"
            assert len(editor.running.packets.nat) == 1

    asyncio.run(scenario())


def test_ports_are_kept_for_the_host_where_no_range_is_set(
    tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with edited(tmp_path, free_port, capsys) as editor:
            packets, host = editor.running.packets, editor.running.host
            assert packets.kept_ports == (53_942, 60_999)
            answer = await editor.change("[nat]\nport_range = [1024, 65535]\n")
            assert answer["applied"] == ["nat.port_range"], "although that is all there is"
            assert packets.kept_ports is None
            await editor.change("")
            assert (packets.kept_ports, len(packets.nat)) == ((53_942, 60_999), 2)
            host.kept = (30_000, 32_767)
            await editor.change("")
            assert (packets.kept_ports, len(packets.nat)) == (host.kept, 3), "the host's range is another one"
            await editor.change("")
            assert len(packets.nat) == 3

    asyncio.run(scenario())


def test_what_was_taken_over_is_told_although_the_answer_is_lost(
    tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with edited(tmp_path, free_port, capsys) as editor:
            editor.write("shards = 7\n[nat]\nudp_timeout = 150.0\n")
            with monkeypatch.context() as patch:
                patch.setattr(sys, "stdout", None)
                code, _, err = await editor.running.cli("reload", "--json")
            assert code == FAILURE
            assert err.splitlines()[-1] == (
                "tidegate: standard output cannot be written: Bad file descriptor; done nevertheless: "
                "applied: nat.udp_timeout; needs a restart: gateway.shards"
            )

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("[nat]\nudp_timeout = 150.0\nmax_mappings = 0", 6, "nat.max_mappings"),
        ('[nat]\nudp_timeout = 150.0\n[dns]\nupstreams = ["ten"]', 7, "dns.upstreams"),
        ("[nat]\nudp_timeout = 150.0\n[nta]\n", 6, '"nta"'),
        ("[nat]\nudp_timeout = 150.0\n[", 6, "TOML"),
    ],
)
def test_a_file_that_is_wrong_anywhere_changes_nothing(
    tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str], text: str, line: int, words: str
) -> None:
    async def scenario() -> None:
        async with edited(tmp_path, free_port, capsys) as editor:
            before = editor.in_force
            code, message = await editor.refused(text)
            assert code == USAGE
            assert f"tidegate.toml:{line}: " in message and words in message
            assert editor.in_force is before
            assert editor.running.packets.nat == []

    asyncio.run(scenario())


def test_an_address_that_the_host_has_not_or_an_engine_that_refuses_changes_nothing(
    tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with edited(tmp_path, free_port, capsys) as editor:
            before = editor.in_force
            code, message = await editor.refused(
                '[external]\naddresses = ["192.0.2.99"]\n[nat]\nudp_timeout = 150.0\n'
            )
            assert code != 0 and "192.0.2.99" in message
            editor.running.packets.refuse_nat = True
            code, message = await editor.refused('[nat]\nudp_timeout = 150.0\n[log]\nlevel = "error"\n')
            assert code == FAILURE and "taste" in message
            assert editor.in_force is before
            assert editor.running.packets.nat == []

    asyncio.run(scenario())


def test_other_external_addresses_reach_the_engine_without_a_restart(
    tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with edited(tmp_path, free_port, capsys) as editor:
            second = InterfaceAddress(2, IPv4Interface("192.0.2.3/24"))
            editor.running.host.network = ordinary_network(addresses=(second,))
            answer = await editor.change('[external]\naddresses = ["192.0.2.3", "192.0.2.2"]\n')
            assert answer["applied"] == ["external.addresses"]
            await until(lambda: bool(editor.running.packets.links))  # the watch over the link settles first
            assert editor.running.packets.links[-1].addresses == ("192.0.2.3", "192.0.2.2")

    asyncio.run(scenario())


def test_profiles_name_the_resolvers_of_the_settings_from_a_reload_on(
    tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    remark = "names no resolver"

    async def scenario() -> None:
        async with edited(tmp_path, free_port, capsys) as editor:

            async def added(name: str) -> tuple[list[str], str]:
                code, out, err = await editor.running.cli("peer", "add", name)
                assert code == 0
                return list(map(str, parse_profile(out).dns)), err

            servers, err = await added("alice")
            assert servers == [], "the proxy is off"
            assert remark in err and "[dns] profile_servers" in err
            answer = await editor.change('[dns]\nprofile_servers = ["10.66.77.1", "192.0.2.53"]\n')
            assert answer["applied"] == ["dns.profile_servers"]
            servers, err = await added("bob")
            assert servers == ["10.66.77.1", "192.0.2.53"]
            assert remark not in err

    asyncio.run(scenario())


def test_what_clients_may_reach_changes_in_the_engine_with_the_rest_or_not_at_all(
    tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with edited(tmp_path, free_port, capsys) as editor:
            packets = editor.running.packets
            assert packets.access == AccessPolicy(between_clients=True, denied=())
            answer = await editor.change(
                'between_clients = false\n[external]\ndeny = ["192.168.0.0/16", "10.0.0.0/8"]\n'
            )
            assert answer["applied"] == ["gateway.between_clients", "external.deny"]
            denied = AccessPolicy(between_clients=False, denied=("192.168.0.0/16", "10.0.0.0/8"))
            assert packets.access == denied

            code, message = await editor.refused(
                '[external]\ndeny = [\n  "10.0.0.0/8",\n  "10.1.2.3/8",\n]\n'
            )
            assert code == USAGE
            assert "tidegate.toml:5: external.deny: " in message
            packets.refuse_nat = True
            await editor.refused("[nat]\nudp_timeout = 150.0\n")
            packets.refuse_nat = False
            assert packets.access == denied, "as before, if anything is wrong"

            await editor.change("")
            assert packets.access == AccessPolicy()

    asyncio.run(scenario())


def test_what_clients_may_not_reach_is_denied_although_the_link_cannot_be_used(
    tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with edited(tmp_path, free_port, capsys) as editor:
            network = editor.running.host.network
            editor.running.host.network = replace(
                network, interfaces=tuple(replace(each, up=False) for each in network.interfaces)
            )
            answer = await editor.change('[external]\ndeny = ["10.0.0.0/8"]\n')
            assert answer["applied"] == ["external.deny"]
            assert editor.running.packets.access == AccessPolicy(denied=("10.0.0.0/8",))
            code, message = await editor.refused('[external]\naddresses = ["192.0.2.2"]\n')
            assert code == FAILURE and "eth0 is down" in message

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[dns]\nupstreams = ["10.66.77.9"]\n', "dns.upstreams: 10.66.77.9 lies inside"),
        ('[external]\naddresses = ["10.66.77.9"]\n', "external.addresses: 10.66.77.9 lies inside"),
    ],
)
def test_what_fits_only_the_subnet_after_a_restart_does_not_come_into_force_before(
    tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    async def scenario() -> None:
        async with edited(tmp_path, free_port, capsys) as editor:
            before = editor.in_force
            code, message = await editor.refused(
                f'subnet = "10.99.0.0/24"\n[nat]\nudp_timeout = 150.0\n{text}'
            )
            assert code == USAGE
            assert f"{words} the VPN's own subnet 10.66.77.0/24" in message
            assert "restart" in message
            assert editor.in_force == before
            assert editor.running.packets.nat == []
            answer = await editor.change('subnet = "10.99.0.0/24"\n[nat]\nudp_timeout = 150.0\n')
            assert answer["applied"] == ["nat.udp_timeout"]
            assert answer["needs_restart"] == ["gateway.subnet"]

    asyncio.run(scenario())


def test_sighup_reads_the_settings_anew_and_survives_a_wrong_file(
    tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []

    async def told(words: str) -> str:
        def heard() -> bool:
            said.extend(capsys.readouterr())  # where logs go to is settled by the first reload
            return words in "".join(said)

        await until(heard)
        return "".join(said)

    async def scenario() -> None:
        async with edited(tmp_path, free_port, capsys) as editor:
            editor.write("[nat]\nudp_timeout = 0\n")
            os.kill(os.getpid(), signal.SIGHUP)
            assert "tidegate.toml:5: nat.udp_timeout" in await told("settings not reloaded")
            assert editor.running.packets.nat == []

            editor.write("[nat]\nudp_timeout = 150\n")
            os.kill(os.getpid(), signal.SIGHUP)
            await told("settings reloaded")
            assert [nat.udp_timeout for nat in editor.running.packets.nat] == [150.0]
            assert not editor.running.task.done()

    asyncio.run(scenario())


def test_a_reload_that_is_refused_is_in_the_gateways_log_whoever_asked_for_it(
    tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with edited(tmp_path, free_port, capsys) as editor:
            with structlog.testing.capture_logs() as logged:
                _, err = await editor.refused("[nat]\nudp_timeout = 0\n")
                os.kill(os.getpid(), signal.SIGHUP)
                await until(lambda: len(logged) >= 2)
            assert [line["log_level"] for line in logged] == ["warning", "warning"]
            for line in logged:
                assert line["event"] == "settings not reloaded: the old ones stay in force"
                assert "tidegate.toml:5: nat.udp_timeout" in line["cause"]
                assert line["cause"] in err

    asyncio.run(scenario())


def test_the_gateway_judges_its_settings_where_the_command_only_has_to_find_it(
    tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str], tidegate: CommandLine
) -> None:
    async def scenario() -> None:
        async with edited(tmp_path, free_port, capsys) as editor:
            file = editor.write("[nat]\nudp_timeout = 0\n")
            capsys.readouterr()
            with structlog.testing.capture_logs() as logged:
                message = await asyncio.to_thread(tidegate.refused, USAGE, "reload", "--config", file)
            assert "tidegate.toml:5: nat.udp_timeout" in message
            assert [line["event"] for line in logged] == ["settings not reloaded: the old ones stay in force"]

    asyncio.run(scenario())
    missing = tmp_path / "missing.toml"
    assert "no such file" in tidegate.refused(USAGE, "reload", "--config", missing)
    file = tmp_path / "wrong.toml"
    file.write_text("state_dir = 5\n[nat]\nudp_timeout = 0\n")
    assert f"{file}:1: state_dir: must be text, not 5" in tidegate.refused(USAGE, "reload", "--config", file)
    state = tmp_path / "elsewhere"
    message = tidegate.refused(FAILURE, "reload", "--config", file, "--state-dir", state)
    assert f"no gateway is running with state directory {state}" in message


def test_the_service_manager_is_told_of_a_reload_also_of_one_that_is_refused(
    tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # sd_notify(3), Type=notify-reload: systemd waits for a READY=1 after this very RELOADING=1.
    def now() -> int:
        return time.monotonic_ns() // 1000

    async def scenario(manager: socket.socket) -> None:
        async def told() -> str:
            return (await asyncio.to_thread(manager.recv, 1000)).decode()

        async with edited(tmp_path, free_port, capsys) as editor:
            assert (await told()).startswith("READY=1\nSTATUS=")
            for text in ("[nat]\nudp_timeout = 150\n", "[nat]\nudp_timeout = 0\n"):
                editor.write(text)
                before = now()
                os.kill(os.getpid(), signal.SIGHUP)
                reloading, since = (await told()).split("\nMONOTONIC_USEC=")
                assert reloading == "RELOADING=1"
                assert before <= int(since) <= now()
                assert await told() == "READY=1"
            assert [nat.udp_timeout for nat in editor.running.packets.nat] == [150.0], "the second is refused"
        assert await told() == "STOPPING=1", "and nothing was said in between"

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        asyncio.run(scenario(manager))


def test_a_failure_that_nobody_thought_of_does_not_take_the_gateway_down(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    looks = 0

    def reread() -> Settings:
        nonlocal looks
        looks += 1
        raise ZeroDivisionError("oops")

    async def scenario() -> None:
        async with serving(settings, capsys, reread=reread) as running:
            for look in (1, 2):
                os.kill(os.getpid(), signal.SIGHUP)
                await until(lambda: looks == look)  # noqa: B023 -- at once
                await asyncio.sleep(0.05)
                assert not running.task.done()

    asyncio.run(scenario())


def test_a_store_that_cannot_be_read_does_not_deny_what_came_into_force(
    tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def held(_store: SqliteStore) -> NoReturn:
        raise StoreError("tidegate.db: is held by another process")

    async def scenario() -> None:
        async with edited(tmp_path, free_port, capsys) as editor:
            await editor.running.cli("peer", "add", "alice")
            monkeypatch.setattr(SqliteStore, "peers", held)
            answer = await editor.change('[nat]\nudp_timeout = 150.0\n[nat.other_protocols]\ngre = "alice"\n')
            assert answer["applied"] == ["nat.udp_timeout", "nat.other_protocols"]
            (warning,) = answer["warnings"]
            assert "other_protocols" in warning and "held by another process" in warning

    asyncio.run(scenario())


def test_a_new_state_directory_needs_a_restart_and_the_former_one_until_then(
    tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str], tidegate: CommandLine
) -> None:
    async def scenario() -> None:
        async with edited(tmp_path, free_port, capsys) as editor:
            file = editor.write("[nat]\nudp_timeout = 150\n")
            file.write_text(file.read_text().replace("/state", "/other"))
            capsys.readouterr()
            message = await asyncio.to_thread(tidegate.refused, FAILURE, "reload", "--config", file)
            assert f"no gateway is running with state directory {tmp_path}/other" in message
            assert "name the state_dir that it uses with --state-dir" in message
            answer = await editor.running.answer("reload")
            assert answer["applied"] == ["nat.udp_timeout"]
            assert answer["needs_restart"] == ["state_dir"]

    asyncio.run(scenario())


def test_a_timer_below_its_standard_is_accepted_and_told_with_the_standards_name(
    tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with edited(tmp_path, free_port, capsys) as editor:
            answer = await editor.change("[nat]\ntcp_transitory_timeout = 10\ntcp_closing_timeout = 240\n")
            assert answer["applied"] == ["nat.tcp_transitory_timeout", "nat.tcp_opening_timeout"]
            (warning,) = answer["warnings"]
            assert "tcp_opening_timeout is 10 s" in warning and "RFC 5382 REQ-5" in warning

    asyncio.run(scenario())


def test_every_timers_default_is_as_its_standard_asks() -> None:
    assert below_the_standard(Settings().nat) == []
    low = Settings.model_validate({"nat": dict.fromkeys(FLOORS, 1.0)})
    assert len(below_the_standard(low.nat)) == len(FLOORS) == 5


def test_one_timeout_is_the_default_of_opening_and_closing() -> None:
    nat = Settings.model_validate({"nat": {"tcp_transitory_timeout": 300.0}}).nat
    assert (nat.tcp_opening_timeout, nat.tcp_closing_timeout) == (300.0, 300.0)
    nat = Settings.model_validate(
        {"nat": {"tcp_transitory_timeout": 300.0, "tcp_closing_timeout": 250.0}}
    ).nat
    assert (nat.tcp_opening_timeout, nat.tcp_closing_timeout) == (300.0, 250.0)


def test_what_is_in_force_differs_from_what_is_wanted_only_in_what_needs_a_restart() -> None:
    """So that no setting is called live and then forgotten."""
    wanted = Settings.model_validate(
        {
            "state_dir": "/elsewhere",
            "gateway": {
                "shards": 3,
                "listen": "0.0.0.0:1",
                "endpoint": "vpn.example:1",
                "between_clients": False,
            },
            "external": {"interface": "eth9", "addresses": ["192.0.2.3"], "deny": ["10.0.0.0/8"]},
            "nat": {"udp_timeout": 130.0, "filtering": "endpoint-independent", "max_mappings": 9},
            "dns": {
                "enabled": False,
                "upstreams": ["192.0.2.53"],
                "profile_servers": ["192.0.2.54"],
            },
            "offloads": {"tun": False},
            "log": {"level": "debug", "format": "json"},
        }
    )
    running = Settings()
    changed = changed_keys(running, wanted)
    left = changed_keys(with_live_changes(running, wanted), wanted)
    assert left == [key for key in changed if not is_live(key)]
    assert ("nat", "filtering") in changed and ("offloads", "tun") in left
