"""Bad settings, in a file, a variable or a flag: one clear line that says what, where and what to do; the exit code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.conftest import CommandLine

Write = Callable[[str], Path]
USAGE, FAILURE = 2, 1


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (
            '[gateway]\nlissen = "0.0.0.0:1"',
            2,
            ['unknown key "lissen"', "[gateway]", 'did you mean "listen"'],
        ),
        ("[gatewya]\nlisten = 1", 1, ['unknown key "gatewya"', 'did you mean "gateway"']),
        ("colour = 5", 1, ['unknown key "colour"', "known keys: state_dir, gateway"]),
        ('[gateway]\n\nshards = "two"', 3, ["gateway.shards", "an integer", '"two"']),
        ("[gateway]\nshards = 65", 2, ["gateway.shards", "64", "65"]),
        ("[gateway]\nlisten = 51820", 2, ["gateway.listen", "must be text", "51820"]),
        ("[nat]\nudp_timeout = true", 2, ["nat.udp_timeout", "a number", "true"]),
        ("\n[[gateway]]\nshards = 2", 2, ["gateway: must be a table, not a list"]),
        ('dns = "yes"', 1, ["dns", "a table", '"yes"']),
        ('[dns]\nenabled = "yes"', 2, ["dns.enabled", "true or false"]),
        ('[dns]\nupstreams = "192.0.2.53"', 2, ["dns.upstreams", "a list"]),
        ('[dns]\nupstreams = [\n"192.0.2.53.1"]', 2, ["dns.upstreams", "192.0.2.53.1"]),
        ('[dns]\nupstreams = ["10.66.77.9"]', 2, ["dns.upstreams", "10.66.77.9", "10.66.77.0/24"]),
        ('[gateway]\nsubnet = "203.0.113.0/24"', 2, ["gateway.subnet", "private", "10.0.0.0/8"]),
        ('[gateway]\nsubnet = "10.0.0.0/31"', 2, ["gateway.subnet", "prefix length", "between 8 and 30"]),
        ('[gateway]\nsubnet = "10.66.77.9/24"', 2, ["gateway.subnet", 'did you mean "10.66.77.0/24"']),
        ('[gateway]\nsubnet = "tenslash8"', 2, ["gateway.subnet", "'tenslash8'", "10.66.77.0/24"]),
        ('[gateway]\nlisten = "0.0.0.0:70000"', 2, ["gateway.listen", "70000", "1 to 65535"]),
        ('[gateway]\nlisten = "10.66.77.5:51820"', 2, ["gateway.listen", "inside", "10.66.77.0/24"]),
        ("[gateway]\ntunnel_mtu = 500", 2, ["gateway.tunnel_mtu", "576", "500"]),
        ('[gateway]\nendpoint = "vpn example"', 2, ["gateway.endpoint", "vpn example"]),
        (
            '[gateway]\nendpoint = "0.0.0.0:51820"',
            2,
            ["gateway.endpoint: '0.0.0.0' is not an address that a client"],
        ),
        ('[gateway]\nendpoint = "10.66.77.1:51820"', 2, ["gateway.endpoint: 10.66.77.1:51820 lies inside"]),
        ('[gateway]\nendpoint = "[::1]:51820"', 2, ["gateway.endpoint", "IPv6 endpoints are not supported"]),
        (
            "[nat]\nport_range = [5000, 4000]",
            2,
            ["nat.port_range: ports 5000-4000: the range ends before it starts"],
        ),
        ("[nat]\nport_range = [80, 4000]", 2, ["nat.port_range", "1024", "80"]),
        ('[nat]\nfiltering = "none"', 2, ["nat.filtering", "endpoint-independent", '"none"']),
        ('[nat.other_protocols]\ntcp = "alice"', 2, ["nat.other_protocols", "'tcp'", "gre"]),
        ('[nat.other_protocols]\n6 = "alice"', 2, ["nat.other_protocols", "TCP", "every peer"]),
        ('[nat.other_protocols]\n51 = "alice"', 2, ["nat.other_protocols", "AH", "does not survive"]),
        (
            '[nat.other_protocols]\ngre = "alice"\n47 = "bob"',
            1,
            ["gre (47) is listed twice, as 'gre' and '47'"],
        ),
        ("[nat.other_protocols]\ngre = 5", 2, ["nat.other_protocols.gre", "text", "5"]),
        ('[nat.other_protocols]\ngre = ""', 2, ["nat.other_protocols.gre: must have at least 1 character"]),
        (f'[nat.other_protocols]\n{"4" * 5000} = "alice"', 2, ["is not a protocol"]),
        (f"[dns]\nupstreams = {['192.0.2.1'] * 9}", 2, ["dns.upstreams: must have at most 8 items, not 9"]),
        (
            '[dns]\nprofile_servers = ["127.0.0.1"]',
            2,
            ["dns.profile_servers: 127.0.0.1 is the client itself"],
        ),
        (
            '[dns]\nprofile_servers = ["0.0.0.0"]',
            2,
            ["dns.profile_servers: 0.0.0.0", "no resolver's address"],
        ),
        (
            f"[dns]\nprofile_servers = {['192.0.2.1'] * 4}",
            2,
            ["dns.profile_servers: must have at most 3 items, not 4"],
        ),
        ('[nat]\nother_protocols = "gre"', 2, ["nat.other_protocols", "a table"]),
        ('[nat]\ntcp_transitory_timeout = "x"', 2, ["nat.tcp_transitory_timeout", "a number"]),
        ("[nat]\nudp_timeout = inf", 2, ["nat.udp_timeout", "finite"]),
        ('[external]\ninterface = "a-name-that-is-too-long"', 2, ["external.interface", "15 bytes"]),
        (
            '[external]\naddresses = ["192.0.2.2", "192.0.2.3", "192.0.2.2"]',
            2,
            ["external.addresses: 192.0.2.2 is listed twice"],
        ),
        ('[gateway]\nbetween_clients = "no"', 2, ["gateway.between_clients", "true or false"]),
        ('[external]\ndeny = "10.0.0.0/8"', 2, ["external.deny", "a list"]),
        ('[external]\ndeny = ["lan"]', 2, ["external.deny: 'lan' is not an IPv4 prefix", "192.168.0.0/16"]),
        ('[external]\ndeny = ["fd00::/8"]', 2, ["external.deny: 'fd00::/8' is not an IPv4 prefix"]),
        ('[external]\ndeny = ["10.0.0.0/33"]', 2, ["external.deny: '10.0.0.0/33' is not an IPv4 prefix"]),
        ('[external]\ndeny = ["10.1.2.3/8"]', 2, ["external.deny", 'did you mean "10.0.0.0/8"?']),
        ('[external]\ndeny = ["192.168.1.5"]', 2, ["external.deny", 'did you mean "192.168.1.5/32"?']),
        ('[external]\ndeny = ["10.0.0.0/255.0.0.0"]', 2, ["external.deny", 'did you mean "10.0.0.0/8"?']),
        (
            f"[external]\ndeny = {['10.0.0.0/8'] * 257}",
            2,
            ["external.deny: must have at most 256 items, not 257"],
        ),
        ('[gateway]\ntun_name = "tg%d"', 2, ["gateway.tun_name: 'tg%d' is not an interface name"]),
        ('[gateway]\ntun_name = "tg\\u0000"', 2, [r"gateway.tun_name: 'tg\x00' is not an interface name"]),
        ('[external]\ninterface = "eth\\u00070"', 2, [r"external.interface: 'eth\x070' is not an interface"]),
        (f"[gateway]\nshards = {'9' * 5000}", 2, ["has an integer that is too long"]),
        (f"[gateway]\nshards = 0x{'f' * 5000}", 2, ["gateway.shards: must be", "not an integer that long"]),
        (
            f"[gateway]\nlisten = 0x{'f' * 5000}",
            2,
            ["gateway.listen: must be text, not an integer that long"],
        ),
        (f"[nat]\nudp_timeout = 0x{'f' * 5000}", 2, ["nat.udp_timeout: must be"]),
        ("[gateway", 1, ["TOML"]),
        ("[gateway]\nshards = 1\nshards = 2", 3, ["TOML"]),
        ('a."b c".d = 5', 1, ['unknown key "a"']),
    ],
)
def test_a_wrong_setting_is_named_with_file_line_and_remedy(
    tidegate: CommandLine, write: Write, tmp_path: Path, text: str, line: int, words: list[str]
) -> None:
    file, state = write(text), tmp_path / "state"
    message = tidegate.refused(USAGE, "serve", "--config", file, "--state-dir", state)
    assert message.startswith(f"tidegate: {file}:{line}: ")
    for word in words:
        assert word in message
    assert not state.exists()
    assert tidegate.engine.gateways == []


def test_all_that_is_wrong_in_a_file_is_named_in_the_order_of_its_lines(
    tidegate: CommandLine, write: Write
) -> None:
    file = write(
        '[nat]\ntcp_transitory_timeout = "x"\nudp_timeout = 0\n[gateway]\nlissen = 1\nshards = 65\n'
        '[external]\ndeny = ["lan", "wan"]\n'
    )
    message = tidegate.refused(USAGE, "serve", "--config", file)
    before, *found = message.split(f"{file}:")
    assert before == "tidegate: "
    assert found == [
        '2: nat.tcp_transitory_timeout: must be a number, not the text "x"; ',
        "3: nat.udp_timeout: must be greater than or equal to 1, not 0; ",
        '5: unknown key "lissen" in [gateway]; did you mean "listen"?; ',
        "6: gateway.shards: must be less than or equal to 64, not 65; ",
        "8: external.deny: 'lan' is not an IPv4 prefix, such as \"192.168.0.0/16\"",
    ]


def test_a_file_with_nothing_right_in_it_is_told_in_one_line_that_ends(
    tidegate: CommandLine, write: Write
) -> None:
    file = write("".join(f"wrong{number} = 1\n" for number in range(20_000)))
    message = tidegate.refused(USAGE, "serve", "--config", file)
    assert message.count(f"{file}:") == 10
    assert f'{file}:10: unknown key "wrong9" in the settings; ' in message
    assert message.endswith("; and 19990 more")


def test_a_settings_file_that_is_no_text_is_named(tidegate: CommandLine, tmp_path: Path) -> None:
    file = tmp_path / "tidegate.toml"
    file.write_bytes(b"[gateway]\n\xff\xfe")
    assert f"{file}:2: is not UTF-8" in tidegate.refused(USAGE, "serve", "--config", file)


def test_a_settings_file_that_is_missing_or_a_directory_is_named(
    tidegate: CommandLine, tmp_path: Path
) -> None:
    assert "no such file" in tidegate.refused(USAGE, "serve", "--config", tmp_path / "missing.toml")
    assert str(tmp_path) in tidegate.refused(USAGE, "serve", "--config", tmp_path)


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--listen", "nowhere", ["--listen: gateway.listen", "nowhere"]),
        ("--subnet", "10.0.0.0/7", ["--subnet: gateway.subnet", "between 8 and 30"]),
        ("--shards", "5000", ["--shards: gateway.shards", "64"]),
        ("--tun", "a-name-that-is-too-long", ["--tun: gateway.tun_name", "15 bytes"]),
        ("--tun", "tg%d", ["--tun: gateway.tun_name: 'tg%d'", "none of / : %"]),
        ("--log-level", "loud", ["--log-level: log.level", "'warning'"]),
    ],
)
def test_a_wrong_flag_is_named(tidegate: CommandLine, flag: str, value: str, words: list[str]) -> None:
    message = tidegate.refused(USAGE, "serve", flag, value)
    for word in words:
        assert word in message


@pytest.mark.parametrize(("character", "shown"), [(r"\u0000", r"\x00"), (r"\n", r"\n"), (r"\u007f", r"\x7f")])
def test_a_control_character_in_a_path_is_named(
    tidegate: CommandLine, write: Write, tmp_path: Path, character: str, shown: str
) -> None:
    file = write(f'\nstate_dir = "{tmp_path}/a{character}b"')
    message = tidegate.refused(USAGE, "peer", "list", "--config", file)
    assert message == (
        f"tidegate: {file}:2: state_dir: '{tmp_path}/a{shown}b' has a control character, which is not allowed in a path"
    )


def test_an_empty_state_directory_is_not_the_current_one(
    tidegate: CommandLine, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = tidegate.refused(USAGE, "peer", "add", "alice", "--endpoint", "a.b:1", "--state-dir", "")
    assert message == "tidegate: --state-dir: state_dir: must not be empty"
    file = write('state_dir = ""')
    message = tidegate.refused(USAGE, "peer", "add", "alice", "--endpoint", "a.b:1", "--config", file)
    assert message == f"tidegate: {file}:1: state_dir: must not be empty"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("command", "word"),
    [
        (["peer", "add", "alice", "--endpoint", "a.b", "--out", ""], "--out"),
        (["peer", "list", "--config", ""], "--config"),
        (["connect", ""], "PROFILE"),
    ],
)
def test_an_empty_name_of_a_file_is_not_the_current_directory(
    tidegate: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], word: str
) -> None:
    monkeypatch.setenv("TIDEGATE_STATE_DIR", str(tmp_path / "state"))
    assert tidegate.refused(USAGE, *command) == f"tidegate: {word}: must not be empty"
    assert not (tmp_path / "state").exists()


def test_a_wrong_variable_is_named(tidegate: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEGATE_NAT__UDP_TIMEOUT", "soon")
    assert '$TIDEGATE_NAT__UDP_TIMEOUT: nat.udp_timeout: must be a number, not the text "soon"' in (
        tidegate.refused(USAGE, "serve")
    )


def test_a_wrong_value_is_refused_although_another_source_covers_it(
    tidegate: CommandLine, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write("state_dir = 5")
    message = tidegate.refused(USAGE, "peer", "list", "--config", file, "--state-dir", tmp_path / "state")
    assert message == f"tidegate: {file}:1: state_dir: must be text, not 5"
    monkeypatch.setenv("TIDEGATE_GATEWAY__SHARDS", "two")
    message = tidegate.refused(USAGE, "serve", "--config", write(""), "--shards", "2")
    assert message.startswith("tidegate: $TIDEGATE_GATEWAY__SHARDS: gateway.shards: must be an integer")


def test_what_must_be_true_of_two_settings_is_asked_of_those_in_force(
    tidegate: CommandLine, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write('[dns]\nupstreams = ["10.66.77.9"]')
    monkeypatch.setenv("TIDEGATE_GATEWAY__SUBNET", "10.99.0.0/24")
    outcome = tidegate(
        "peer", "add", "alice", "--endpoint", "a.b", "--config", file, "--state-dir", tmp_path / "state"
    )
    assert outcome.code == 0


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("TCP", "alice", "nat.other_protocols.tcp: 'tcp' is not a protocol"),
        ("GRE", "x" * 64, "nat.other_protocols.gre: must have at most 63 characters"),
        ("GRE__X", "alice", "nat.other_protocols.gre: must be text, not a table"),
    ],
)
@pytest.mark.parametrize("text", ["", "[nat]\nudp_timeout = 300", '[nat.other_protocols]\nesp = "alice"'])
def test_a_wrong_variable_is_named_and_not_the_file_that_says_nothing_of_it(
    tidegate: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    write: Write,
    text: str,
    variable: str,
    value: str,
    told: str,
) -> None:
    name = f"TIDEGATE_NAT__OTHER_PROTOCOLS__{variable}"
    monkeypatch.setenv(name, value)
    message = tidegate.refused(USAGE, "serve", "--config", write(text))
    assert message.startswith(f"tidegate: ${name}: {told}")
