"""Bad input beside the settings: one clear line with what, where and what to do; the exit code; nothing half-done."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from typing import NoReturn

import pytest

from tests.unit.conftest import CommandLine
from tests.unit.fakes import ordinary_network
from tidegate.cli import main
from tidegate.cli.runtime import Runtime
from tidegate.errors import PrivilegeError
from tidegate.host import MAIN_TABLE, Interface, InterfaceAddress, Route

Write = Callable[[str], Path]
USAGE, FAILURE = 2, 1


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["serve", "--shards", "many"], "invalid value for '--shards': must be an integer, not 'many'; see"),
        (["serve", "--shards", "9" * 5000], "'--shards': must be a shorter integer, not '9999"),
        (["nat", "list", "--limit", "0"], "'--limit': must be greater than or equal to 1, not '0'; see"),
        (["peer", "add", "a", "--cipher", "x"], "'--cipher': 'x' is not one of 'chacha20-poly1305', 'aes-"),
        (["serve", "--shrads", "2"], "--shrads"),
        (["swerve"], "swerve"),
        (["peer", "add"], "NAME"),
        (["peer", "add", "a/b"], "'a/b'"),
        (["peer", "add", "alice", "--endpoint", "here:there"], "--endpoint"),
        (
            ["peer", "add", "alice", "--endpoint", "http://x"],
            "--endpoint: 'http://x' is not HOST:PORT, such as",
        ),
        (["peer", "add", "alice", "--endpoint", "x:70000"], "--endpoint: '70000' is not a port (1 to 65535)"),
        (["peer", "add", "alice", "--endpoint", "0.0.0.0"], "--endpoint: '0.0.0.0' is not an address that"),
        (
            ["peer", "add", "alice", "--endpoint", "255.255.255.255:1"],
            "'255.255.255.255' is not an address that",
        ),
        (["peer", "add", "alice", "--endpoint", "224.0.0.1:1"], "'224.0.0.1' is not an address that"),
        (["peer", "add", "alice", "--endpoint", "10.66.77.1"], "10.66.77.1:51820 lies inside the VPN's own"),
        (["peer", "add", "alice", "--endpoint", "10.66.77.9:1"], "10.66.77.9:1 lies inside the VPN's own"),
        (["peer", "add", "alice", "--endpoint", "[::1]:1"], "IPv6 endpoints are not supported yet"),
        (
            ["peer", "add", "alice", "--endpoint", "::1"],
            "--endpoint: '::1': IPv6 endpoints are not supported",
        ),
        (["peer", "add", "alice", "--endpoint", "2001:db8::1:51820"], "IPv6 endpoints are not supported yet"),
        (["peer", "add", "alice", "--address", "10.66.77.300"], "10.66.77.300"),
        (["peer", "add", "alice", "--address", "10.66.77.1"], "10.66.77.1"),
        (["peer", "add", "alice", "--address", "192.0.2.9"], "10.66.77.0/24"),
        (
            ["peer", "add", "alice", "--public-key", "abc"],
            "--public-key is not a key (32 bytes in base64, 44",
        ),
        (
            ["peer", "add", "alice", "--public-key", "A" * 43 + "="],
            "--public-key is no public key: a point of low",
        ),
        (
            ["connect", "a.conf", "--log-level", "loud"],
            "--log-level: must be 'debug', 'info', 'warning' or 'error'",
        ),
        (
            ["connect", "a.conf", "--log-format", "xml"],
            "--log-format: must be 'auto', 'console', 'json' or 'logfmt'",
        ),
        (["publish", "add", "sctp/80", "--to", "alice"], "sctp/80"),
        (["publish", "add", "tcp/90-80", "--to", "alice"], "ports 90-80: the range ends before it starts"),
        (["publish", "add", "tcp/0", "--to", "alice"], "'0'"),
        (["publish", "add", "tcp/0000080801", "--to", "alice"], "'0000080801'"),
        (["publish", "add", "tcp/80", "--to", "alice:0000080801"], "'0000080801'"),
        (["publish", "add", "tcp/80-90", "--to", "alice:8080-8085"], "11"),
    ],
)
def test_a_wrong_command_line_is_a_usage_error(
    tidegate: CommandLine, tmp_path: Path, arguments: list[str], word: str
) -> None:
    state = ["--state-dir", str(tmp_path / "state")] if arguments[0] in {"peer", "publish"} else []
    assert word in tidegate.refused(USAGE, *arguments, *state)


UNDECODABLE = os.fsdecode(b"\xff")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["peer", "remove", "a" * 300], "NAME: must have at most 256 characters"),
        (["peer", "remove", UNDECODABLE], "NAME: must be UTF-8 text, not '\\udcff'"),
        (["peer", "add", "bob", "--address", "1" * 70], "--address: must have at most 64 characters"),
        (["peer", "add", "bob", "--address", UNDECODABLE], "--address: must be UTF-8 text, not '\\udcff'"),
        (["publish", "add", "tcp/80", "--to", "a" * 300], "--to: must have at most 256 characters"),
        (["publish", "add", "tcp/80", "--to", UNDECODABLE], "--to: must be UTF-8 text, not '\\udcff'"),
        (["nat", "list", "--peer", "a" * 300], "--peer: must have at most 256 characters"),
        (["nat", "list", "--peer", UNDECODABLE], "--peer: must be UTF-8 text, not '\\udcff'"),
    ],
)
def test_an_argument_that_no_gateway_would_be_sent_is_named(
    tidegate: CommandLine, tmp_path: Path, arguments: list[str], told: str
) -> None:
    state = ["--state-dir", str(tmp_path)]
    assert tidegate("peer", "add", "alice", "--endpoint", "a.b", *state).code == 0
    assert tidegate.refused(USAGE, *arguments, *state) == f"tidegate: {told}"


@pytest.mark.parametrize(
    "flags",
    [
        ["--address", "10.66.77.300"],
        ["--address", "10.66.77.1"],
        ["--address", "192.0.2.9"],
        ["--endpoint", "10.66.77.1"],
        ["--public-key", "abc"],
        [],
    ],
    ids=" ".join,
)
def test_a_peer_that_is_refused_makes_no_state_directory(
    tidegate: CommandLine, tmp_path: Path, flags: list[str]
) -> None:
    state = tmp_path / "state"
    if not flags:
        tidegate.host.network = ordinary_network(default=False)
    first = tidegate.refused(USAGE, "peer", "add", "alice", "--state-dir", state, *flags)
    assert not state.exists()
    assert tidegate("peer", "add", "bob", "--endpoint", "a.b", "--state-dir", state).code == 0
    again = tidegate.refused(USAGE, "peer", "add", "alice", "--state-dir", state, *flags)
    assert again.startswith(first), "the same words as of one that is made already"


def test_a_peer_whose_endpoint_is_refused_is_not_added(tidegate: CommandLine, tmp_path: Path) -> None:
    assert tidegate("peer", "add", "alice", "--endpoint", "a.b", "--state-dir", tmp_path).code == 0
    message = tidegate.refused(
        USAGE, "peer", "add", "bob", "--endpoint", "10.66.77.1", "--state-dir", tmp_path
    )
    assert message.endswith("; bob was not added")
    assert "bob" not in tidegate("peer", "list", "--state-dir", tmp_path).out


def test_an_endpoint_that_every_machine_has_for_itself_is_remarked(
    tidegate: CommandLine, tmp_path: Path
) -> None:
    outcome = tidegate("peer", "add", "alice", "--endpoint", "127.0.0.1:1", "--state-dir", tmp_path)
    assert outcome.code == 0
    assert "the endpoint 127.0.0.1:1 is a loopback address" in outcome.err


def test_a_missing_interface_is_answered_with_those_that_exist(tidegate: CommandLine, tmp_path: Path) -> None:
    state = tmp_path / "state"
    message = tidegate.refused(FAILURE, "serve", "--state-dir", state, "--external", "eth9")
    assert "'eth9'" in message
    assert "this host has eth0" in message
    assert not state.exists()


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (ordinary_network(default=False), ["no default route for IPv4", "--external", "eth0", "needs IPv4"]),
        (
            replace(ordinary_network(), addresses=()),
            ["eth0 has no IPv4 address", "assign one to it: Tidegate needs IPv4"],
        ),
        (
            ordinary_network(
                interfaces=(Interface(5, "wan", b"\x02\0\0\0\0\5", 1500, False, True),),
                routes=(Route(IPv4Network("0.0.0.0/0"), IPv4Address("192.0.2.9"), 5, -1, MAIN_TABLE, None),),
            ),
            ["wan is down"],
        ),
        (
            ordinary_network(
                interfaces=(Interface(5, "ppp0", None, 1500, True, False),),
                routes=(Route(IPv4Network("0.0.0.0/0"), None, 5, -1, MAIN_TABLE, None),),
            ),
            ["ppp0 is not an Ethernet interface"],
        ),
    ],
)
def test_an_external_interface_that_cannot_be_used_is_explained(
    tidegate: CommandLine, tmp_path: Path, network: object, words: list[str]
) -> None:
    tidegate.host.network = network  # type: ignore[assignment]
    message = tidegate.refused(FAILURE, "serve", "--state-dir", tmp_path / "state")
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (
            ordinary_network(addresses=(InterfaceAddress(2, IPv4Interface("10.66.77.200/16")),)),
            ["10.66.77.0/24 overlaps 10.66.77.200/16 of eth0"],
        ),
        (
            ordinary_network(
                routes=(Route(IPv4Network("10.0.0.0/8"), IPv4Address("192.0.2.7"), 2, 0, MAIN_TABLE, None),)
            ),
            ["10.66.77.0/24 overlaps", "10.0.0.0/8 via 192.0.2.7 dev eth0"],
        ),
    ],
)
def test_a_subnet_that_the_host_uses_otherwise_is_refused_as_long_as_it_does(
    tidegate: CommandLine, tmp_path: Path, network: object, words: list[str]
) -> None:
    """With status 1, after which systemd tries again (RestartPreventExitStatus=2): the host's network changes."""
    tidegate.host.network = network  # type: ignore[assignment]
    state = tmp_path / "state"
    message = tidegate.refused(FAILURE, "serve", "--state-dir", state)
    for word in [*words, "[gateway] subnet"]:
        assert word in message
    assert not state.exists()


def test_a_subnet_that_has_no_place_for_a_peer_is_a_settings_error_and_gets_no_further_peers(
    tidegate: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tidegate("peer", "add", "alice", "--state-dir", tmp_path).code == 0
    monkeypatch.setenv("TIDEGATE_GATEWAY__SUBNET", "10.9.0.0/24")
    for command in (["serve", "--listen", "127.0.0.1:51999", "--no-dns"], ["peer", "add", "bob"]):
        message = tidegate.refused(USAGE, *command, "--state-dir", tmp_path)
        assert (
            "peer 'alice' has address 10.66.77.2, which no peer can have in [gateway] subnet 10.9.0.0/24"
            in message
        )
        assert "tidegate peer remove alice" in message
    assert tidegate("peer", "remove", "alice", "--state-dir", tmp_path).code == 0
    assert tidegate("peer", "add", "bob", "--state-dir", tmp_path).code == 0
    listed = json.loads(tidegate("peer", "list", "--json", "--state-dir", tmp_path).out)
    assert [(peer["name"], peer["address"]) for peer in listed["peers"]] == [("bob", "10.9.0.2")]


def test_a_gateway_does_not_listen_where_it_answers_dns(tidegate: CommandLine, tmp_path: Path) -> None:
    state = tmp_path / "state"
    message = tidegate.refused(USAGE, "serve", "--state-dir", state, "--listen", "0.0.0.0:53")
    assert "[gateway] listen: 0.0.0.0:53 takes the port on which the gateway answers DNS" in message
    assert "[dns] enabled = false" in message
    assert not state.exists()


def test_a_port_in_use_is_named_with_its_holder(tidegate: CommandLine, tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # which must not help it
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
        message = tidegate.refused(
            FAILURE, "serve", "--state-dir", tmp_path / "state", "--listen", f"127.0.0.1:{port}"
        )
    assert f"port {port} is in use" in message
    assert f"(pid {os.getpid()})" in message
    assert "--listen" in message
    assert tidegate.engine.gateways == []


def test_missing_privileges_are_named(tidegate: CommandLine, tmp_path: Path) -> None:
    tidegate.host.privileges = PrivilegeError("this needs CAP_NET_ADMIN", hint="run as root")
    state = tmp_path / "state"
    assert "CAP_NET_ADMIN; run as root" in tidegate.refused(FAILURE, "serve", "--state-dir", state)
    assert not state.exists()


@pytest.mark.parametrize("damage", [b"this was a database once" * 400, b"SQLite format 3\0" + b"\xff" * 4000])
@pytest.mark.parametrize(
    "command", [["serve", "--listen", "127.0.0.1:51999"], ["peer", "add", "bob"], ["peer", "list"]]
)
def test_a_damaged_database_is_named_and_left_as_it_is(
    tidegate: CommandLine, tmp_path: Path, damage: bytes, command: list[str]
) -> None:
    assert tidegate("peer", "add", "alice", "--state-dir", tmp_path).code == 0
    database = tmp_path / "tidegate.db"
    database.write_bytes(damage)
    message = tidegate.refused(FAILURE, *command, "--state-dir", tmp_path)
    assert f"{database}: the database is damaged" in message
    assert "backup" in message
    assert database.read_bytes() == damage


def test_a_database_of_a_newer_tidegate_is_left_alone(tidegate: CommandLine, tmp_path: Path) -> None:
    import sqlite3

    tidegate("peer", "add", "alice", "--state-dir", tmp_path)
    with sqlite3.connect(tmp_path / "tidegate.db") as connection:
        connection.execute("UPDATE schema_version SET version = 99")
    connection.close()
    assert "schema version 99" in tidegate.refused(FAILURE, "peer", "list", "--state-dir", tmp_path)


def test_a_damaged_gateway_key_is_named_without_showing_it(tidegate: CommandLine, tmp_path: Path) -> None:
    tidegate("peer", "add", "alice", "--state-dir", tmp_path)
    (tmp_path / "gateway.key").write_text("notakey")
    message = tidegate.refused(FAILURE, "peer", "add", "bob", "--state-dir", tmp_path)
    assert f"{tmp_path / 'gateway.key'}: the gateway's key is damaged" in message
    assert "notakey" not in message


def test_a_gateway_key_that_is_gone_is_not_replaced_while_peers_have_profiles_that_name_it(
    tidegate: CommandLine, tmp_path: Path
) -> None:
    listen = ["serve", "--listen", "127.0.0.1:51999", "--no-dns"]
    for name in ("alice", "bob", "carol", "dave"):
        assert tidegate("peer", "add", name, "--state-dir", tmp_path).code == 0
    key = tmp_path / "gateway.key"
    key.unlink()
    for command in (["peer", "add", "eve"], listen):
        message = tidegate.refused(FAILURE, *command, "--state-dir", tmp_path)
        assert (
            f"{key}: the gateway's key is missing, and 4 peers (alice, bob, carol, …) have profiles"
            in message
        )
        assert "from a backup, or move the database beside it away" in message
        assert not key.exists()
    listed = json.loads(tidegate("peer", "list", "--json", "--state-dir", tmp_path).out)
    assert len(listed["peers"]) == 4


def test_commands_that_need_no_gateway_key_do_without_and_make_none(
    tidegate: CommandLine, tmp_path: Path
) -> None:
    assert tidegate("peer", "add", "alice", "--state-dir", tmp_path).code == 0
    key = tmp_path / "gateway.key"
    before = key.read_text()
    key.unlink()
    for command in (
        ["peer", "list"],
        ["peer", "show", "alice"],
        ["publish", "add", "tcp/8080", "--to", "alice"],
        ["publish", "list"],
        ["publish", "remove", "tcp/8080"],
        ["peer", "remove", "alice"],
    ):
        outcome = tidegate(*command, "--state-dir", tmp_path)
        assert outcome.code == 0, outcome
        assert not key.exists()
    assert tidegate("peer", "add", "alice", "--state-dir", tmp_path).code == 0, (
        "nobody has the old one any more"
    )
    assert key.read_text() != before


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EBUSY, ["TUN device tidegate0", "in use? choose another [gateway] tun_name"]),
        (errno.EINVAL, ["TUN device tidegate0", "of another kind? choose another [gateway] tun_name"]),
        (errno.EPERM, ["TUN device tidegate0", "root"]),
        (errno.ENODEV, ["TUN device tidegate0"]),
        (errno.EADDRINUSE, ["choose another port with --listen"]),
    ],
)
def test_a_refusal_of_the_engine_is_told_in_its_words(
    tidegate: CommandLine, tmp_path: Path, free_port: int, number: int, words: list[str]
) -> None:
    tidegate.engine.failure = OSError(number, "cannot create the TUN device tidegate0: no")
    listen = f"127.0.0.1:{free_port}"
    message = tidegate.refused(FAILURE, "serve", "--state-dir", tmp_path, "--listen", listen)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EBUSY, "is the interface tg in use? choose another --interface NAME"),
        (errno.EINVAL, "is tg an interface of another kind? choose another --interface NAME"),
        (errno.EADDRINUSE, "choose another ListenPort in the profile"),
    ],
)
def test_a_refusal_of_the_engine_is_told_to_a_client_with_what_it_has(
    tidegate: CommandLine, tmp_path: Path, number: int, words: str
) -> None:
    state, profile = tmp_path / "state", tmp_path / "alice.conf"
    tidegate("peer", "add", "alice", "--endpoint", "192.0.2.1:1", "--state-dir", state, "--out", profile)
    tidegate.engine.failure = OSError(number, "cannot create the TUN device tg: no")
    message = tidegate("connect", profile, "--interface", "tg").err.splitlines()[-1]
    assert message == f"tidegate: cannot create the TUN device tg: no; {words}"


def test_an_interface_of_a_client_has_a_name_of_its_own(tidegate: CommandLine, tmp_path: Path) -> None:
    message = tidegate.refused(USAGE, "connect", tmp_path / "alice.conf", "--interface", "tg%d")
    assert "--interface: 'tg%d' is not an interface name" in message


def test_an_engine_that_was_not_built_is_told_with_the_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "tidegate._engine", None)
    monkeypatch.delitem(sys.modules, "tidegate.extension", raising=False)
    assert main(["serve", "--state-dir", str(tmp_path)]) == FAILURE
    assert "make build" in capsys.readouterr().err


def test_an_unexpected_failure_is_one_line_and_says_how_to_see_more(
    tidegate: CommandLine, tmp_path: Path, free_port: int
) -> None:
    tidegate.engine.failure = RuntimeError("something nobody\nthought of")
    message = tidegate.refused(
        FAILURE, "serve", "--state-dir", tmp_path, "--listen", f"127.0.0.1:{free_port}"
    )
    assert "RuntimeError: something nobody thought of" in message
    assert "TIDEGATE_DEBUG=1" in message


def test_a_failure_of_a_command_is_not_taken_for_one_of_its_output(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken() -> NoReturn:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    assert main(["serve", "--state-dir", str(tmp_path)], Runtime(engine=broken)) == FAILURE
    assert "unexpected OSError: [Errno 5] Input/output error" in capsys.readouterr().err


def test_a_traceback_that_was_asked_for_changes_no_exit_code(
    tidegate: CommandLine, tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It tells systemd that a setting is wrong, so that starting again would not help."""
    monkeypatch.setenv("TIDEGATE_DEBUG", "1")
    tidegate.engine.failure = RuntimeError("something nobody thought of")
    serve = ("serve", "--state-dir", tmp_path, "--listen")
    for code, listen, name in (
        (USAGE, "nowhere", "SettingsError"),
        (FAILURE, f"127.0.0.1:{free_port}", "RuntimeError"),
    ):
        outcome = tidegate(*serve, listen)
        assert outcome.code == code
        assert "Traceback" in outcome.err and name in outcome.err
        assert outcome.err.splitlines()[-1].startswith("tidegate: ")


@pytest.mark.parametrize("command", [["status"], ["nat", "list"], ["nat", "stats"]])
def test_asking_a_gateway_that_does_not_run_says_so(
    tidegate: CommandLine, tmp_path: Path, command: list[str]
) -> None:
    message = tidegate.refused(FAILURE, *command, "--state-dir", tmp_path)
    assert f"no gateway is running with state directory {tmp_path}" in message


def test_looking_at_a_state_directory_does_not_make_one(tidegate: CommandLine, tmp_path: Path) -> None:
    state = tmp_path / "state"
    tidegate.refused(FAILURE, "peer", "list", "--state-dir", state)
    tidegate.refused(FAILURE, "peer", "remove", "alice", "--state-dir", state)
    assert not state.exists()


def test_a_state_directory_that_cannot_be_one_is_named(tidegate: CommandLine, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert str(file) in tidegate.refused(FAILURE, "peer", "add", "alice", "--state-dir", file)
