"""Commands without a gateway: they work on the store itself, and report to people and programs what they did."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.unit.conftest import CommandLine, names_in_store
from tidegate.errors import ProfileError
from tidegate.identity import encode_key, make_private_key, parse_profile, public_key_of

COMMANDS = [
    ["serve"],
    ["peer", "add"],
    ["peer", "list"],
    ["peer", "show"],
    ["peer", "remove"],
    ["peer", "disable"],
    ["peer", "enable"],
    ["peer", "rename"],
    ["peer", "renew"],
    ["connect"],
    ["status"],
    ["reload"],
    ["nat", "list"],
    ["nat", "stats"],
    ["publish", "add"],
    ["publish", "list"],
    ["publish", "remove"],
    ["demo"],
    ["bench"],
    ["version"],
]
GROUPS = [["peer"], ["publish"], ["nat"]]


@pytest.mark.parametrize("command", [*COMMANDS, *GROUPS], ids=" ".join)
def test_every_command_has_help_with_examples(tidegate: CommandLine, command: list[str]) -> None:
    outcome = tidegate(*command, "--help")
    assert outcome.code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", outcome.out)
    assert "Examples" in text
    assert f"tidegate {' '.join(command)}" in text


def test_help_shows_how_to_connect_without_routes_and_twice_and_how_to_publish_a_privileged_port(
    tidegate: CommandLine,
) -> None:
    def help_of(*command: str) -> str:
        return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", tidegate(*command, "--help").out).split())

    connect = help_of("connect")
    assert "tidegate connect alice.conf --no-routes " in connect
    assert "tidegate connect bob.conf --interface tidegate-bob " in connect
    publish = help_of("publish", "add")
    assert "tidegate publish add tcp/443 --to alice " in publish
    assert "below 1024" in publish and "CAP_NET_BIND_SERVICE" in publish


def test_the_help_does_not_teach_to_write_keys_where_others_may_read_them(tidegate: CommandLine) -> None:
    text = re.sub(r"\x1b\[[0-9;]*m", "", tidegate("peer", "add", "--help").out)
    assert ".conf" in text
    assert not re.search(r"> *\w+\.conf", text)


@pytest.mark.parametrize("command", [[], *GROUPS, *COMMANDS], ids=" ".join)
def test_help_fits_on_a_terminal_of_80_columns(
    tidegate: CommandLine, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = re.sub(r"\x1b\[[0-9;]*m", "", tidegate(*command, "--help").out)
    assert "…" not in text, "a default that was cut"
    assert "<bool>" not in text, "a switch that seems to take a value"
    before, _, _ = text.partition("╭─ ")
    prose = [line.strip() for line in before.splitlines()[3:]]
    for line, following in itertools.pairwise(prose):
        first_word = following.partition(" ")[0]
        assert not line or not following or len(line) + len(first_word) > 76, "a line break of the source"


def test_help_is_there_at_once() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "tidegate", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "serve" in done.stdout
    for heavy in ("sqlalchemy", "pyroute2", "pydantic", "cryptography", "asyncio", "dns.message"):
        assert f" {heavy}\n" not in done.stderr, f"--help must not import {heavy}"


def test_the_version_is_printed(tidegate: CommandLine) -> None:
    assert tidegate("--version").out == tidegate("version").out == "tidegate 0.1.0\n"


def test_a_group_without_a_command_shows_its_help(tidegate: CommandLine) -> None:
    for group, command in ((["peer"], "remove"), ([], "serve")):
        outcome = tidegate(*group)
        assert outcome.code == 2
        assert command in outcome.out
        assert outcome.err == ""


def test_a_peer_without_a_known_endpoint_is_not_added(tidegate: CommandLine, tmp_path: Path) -> None:
    from tests.unit.fakes import ordinary_network

    tidegate.host.network = ordinary_network(default=False)
    assert "--endpoint" in tidegate.refused(2, "peer", "add", "alice", "--state-dir", tmp_path)
    assert json.loads(tidegate("peer", "list", "--state-dir", tmp_path, "--json").out)["peers"] == []


def test_the_private_key_of_a_client_is_stored_nowhere(tidegate: CommandLine, tmp_path: Path) -> None:
    profile = parse_profile(tidegate("peer", "add", "alice", "--state-dir", tmp_path).out)
    from tidegate.identity import encode_key

    assert profile.private_key is not None
    for file in tmp_path.iterdir():
        content = file.read_bytes()
        assert profile.private_key not in content
        assert encode_key(profile.private_key).encode() not in content


def test_a_device_that_keeps_its_private_key_gets_a_profile_without_one(
    tidegate: CommandLine, tmp_path: Path
) -> None:
    private = make_private_key()
    public = encode_key(public_key_of(private))
    state = ["--state-dir", tmp_path]
    outcome = tidegate("peer", "add", "alice", "--public-key", public, *state)
    assert outcome.code == 0
    assert "private key" in outcome.err
    with pytest.raises(ProfileError, match=r"has no PrivateKey"):
        parse_profile(outcome.out)
    comment, key_line = outcome.out.splitlines()[0], outcome.out.splitlines()[2]
    assert comment.startswith("# ")
    assert key_line == "# PrivateKey = (put the device's own private key here)"
    profile = parse_profile(outcome.out.replace(key_line, f"PrivateKey = {encode_key(private)}"))
    assert profile.private_key == private
    assert profile.preshared_key is not None
    assert json.loads(tidegate("peer", "show", "alice", *state, "--json").out)["public_key"] == public
    other = encode_key(public_key_of(make_private_key()))
    added = json.loads(tidegate("peer", "add", "bob", "--public-key", other, *state, "--json").out)
    assert (added["public_key"], key_line in added["profile"]) == (other, True)
    message = tidegate.refused(1, "peer", "add", "carol", "--public-key", public, *state)
    assert message == "tidegate: peer 'alice' already has this public key"


def test_a_peer_does_not_get_the_gateways_own_key(tidegate: CommandLine, tmp_path: Path) -> None:
    state = ["--state-dir", tmp_path]
    gateway = parse_profile(tidegate("peer", "add", "alice", *state).out).peer_public_key
    message = tidegate.refused(2, "peer", "add", "bob", "--public-key", encode_key(gateway), *state)
    assert (
        message == "tidegate: the key of 'bob' is the gateway's own; give the public key of the peer's device"
    )
    assert names_in_store(tmp_path) == ["alice"]


def test_programs_get_json(tidegate: CommandLine, tmp_path: Path) -> None:
    state = ["--state-dir", tmp_path, "--json"]
    added = json.loads(tidegate("peer", "add", "alice", *state).out)
    assert set(added) == {"name", "address", "public_key", "endpoint", "cipher", "file", "profile"}
    (peer,) = json.loads(tidegate("peer", "list", *state).out)["peers"]
    assert peer["public_key"] == added["public_key"]
    published = json.loads(tidegate("publish", "add", "tcp/8000-8010", "--to", "alice:80", *state).out)
    assert published["publication"] == {
        "external": "tcp/8000-8010",
        "to": "alice:80-90",
        "state": "not running",
        "detail": None,
    }
    assert len(json.loads(tidegate("publish", "list", *state).out)["publications"]) == 1
    assert json.loads(tidegate("publish", "remove", "tcp/8000-8010", *state).out)
    assert json.loads(tidegate("peer", "remove", "alice", *state).out)["peer"]["name"] == "alice"


def test_a_faster_cipher_goes_into_store_and_profile_and_is_said_to_be_ours_alone(
    tidegate: CommandLine, tmp_path: Path
) -> None:
    state = ["--state-dir", tmp_path]
    outcome = tidegate("peer", "add", "alice", "--cipher", "aes-256-gcm", *state)
    assert parse_profile(outcome.out).cipher == "aes-256-gcm"
    assert "aes-256-gcm works with `tidegate connect` only" in outcome.err
    outcome = tidegate("peer", "add", "bob", *state)
    assert parse_profile(outcome.out).cipher == "chacha20-poly1305"
    assert "Cipher" not in outcome.out
    assert "aes" not in outcome.err
    peers = json.loads(tidegate("peer", "list", *state, "--json").out)["peers"]
    assert [peer["cipher"] for peer in peers] == ["aes-256-gcm", "chacha20-poly1305"]
    for command in (["peer", "list"], ["peer", "show", "alice"]):
        assert "aes-256-gcm" in tidegate(*command, *state).out
    assert "aes-128-gcm" in tidegate.refused(2, "peer", "add", "eve", "--cipher", "aes-128-gcm", *state)


def test_a_faster_cipher_is_refused_where_it_would_be_slower(tidegate: CommandLine, tmp_path: Path) -> None:
    tidegate.engine.aes = False
    refused = tidegate.refused(1, "peer", "add", "alice", "--cipher", "aes-256-gcm", "--state-dir", tmp_path)
    assert "this CPU has no AES instructions, which aes-256-gcm for peer 'alice' needs" in refused
    assert json.loads(tidegate("peer", "list", "--state-dir", tmp_path, "--json").out)["peers"] == []
    assert tidegate("peer", "add", "alice", "--state-dir", tmp_path).code == 0


def test_people_get_tables_that_do_not_lose_anything_in_a_pipe(tidegate: CommandLine, tmp_path: Path) -> None:
    added = json.loads(tidegate("peer", "add", "a" * 63, "--state-dir", tmp_path, "--json").out)
    listed = tidegate("peer", "list", "--state-dir", tmp_path).out
    assert "a" * 63 in listed
    assert added["public_key"] in listed


def test_two_processes_that_add_at_the_same_time_both_succeed(tmp_path: Path) -> None:
    def add(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tidegate", "peer", "add", name, "--endpoint", "192.0.2.1:1"]
        return subprocess.run(
            [*command, "--state-dir", str(tmp_path)], capture_output=True, text=True, check=False
        )

    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(add, ["a", "b", "c", "d"]))
    assert [outcome.returncode for outcome in outcomes] == [0] * 4, outcomes
    addresses = {str(parse_profile(outcome.stdout).address) for outcome in outcomes}
    keys = {parse_profile(outcome.stdout).peer_public_key for outcome in outcomes}
    assert addresses == {f"10.66.77.{number}/32" for number in (2, 3, 4, 5)}
    assert len(keys) == 1, "the gateway has one key, whoever made it"


def test_a_reader_that_has_seen_enough_is_no_failure_to_shout_about(tmp_path: Path) -> None:
    command = f"{sys.executable} -m tidegate peer add alice --help | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
