"""Where settings come from, and which source wins."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.errors import SettingsError
from tidegate.settings import Settings, SettingsSources, load_settings

Write = Callable[[str], Path]


def test_without_any_source_everything_has_a_default(tmp_path: Path) -> None:
    settings = load_settings(default_path=tmp_path / "none.toml")
    assert settings == Settings()
    assert settings.gateway.subnet == IPv4Network("10.66.77.0/24")
    assert settings.gateway.address == IPv4Address("10.66.77.1")
    assert str(settings.gateway.listen) == "0.0.0.0:51820"
    assert settings.state_dir == Path("/var/lib/tidegate")


def test_the_environment_wins_over_the_file_and_flags_over_both(write: Write) -> None:
    file = write("[gateway]\nshards = 1\ntunnel_mtu = 1300\n[nat]\nudp_timeout = 200")
    environment = {"TIDEGATE_GATEWAY__SHARDS": "2", "TIDEGATE_GATEWAY__TUNNEL_MTU": "1350"}
    settings = load_settings(
        config=file, environment=environment, flags={("gateway", "shards"): ("--shards", 3)}
    )
    assert settings.gateway.shards == 3
    assert settings.gateway.tunnel_mtu == 1350
    assert settings.nat.udp_timeout == 200


def test_the_default_file_is_read_if_it_exists(write: Write) -> None:
    file = write("[gateway]\nshards = 4")
    assert load_settings(default_path=file).gateway.shards == 4


@pytest.mark.parametrize("given_as", ["config", "default_path"])
def test_a_file_that_was_read_must_be_there_ever_after(write: Write, given_as: str) -> None:
    file = write("[gateway]\nbetween_clients = false")
    sources = SettingsSources(**{given_as: file})  # type: ignore[arg-type]
    assert sources.read().gateway.between_clients is False
    file.unlink()
    for _ in range(2):
        with pytest.raises(SettingsError, match=f"{file}: is gone since it was read; .* an empty file"):
            sources.read()
    file.touch()
    assert sources.read() == Settings()


def test_a_default_file_that_was_never_in_force_may_go_as_it_came(write: Write) -> None:
    file = write("")
    file.unlink()
    sources = SettingsSources(default_path=file)
    assert sources.read() == Settings()
    write("[gateway]\nshards = 1000")
    with pytest.raises(SettingsError, match=r"gateway\.shards"):
        sources.read()
    file.unlink()
    assert sources.read() == Settings()


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    """A directory that belongs to somebody else."""
    folder = tmp_path / "tidegate"
    folder.mkdir(mode=0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        os.seteuid(user)


def test_a_default_file_that_one_may_not_look_for_is_named(closed: Path) -> None:
    file = closed / "tidegate.toml"
    with pytest.raises(SettingsError, match=f"{file}: cannot be read: Permission denied; .*--config"):
        load_settings(default_path=file)


def test_a_named_file_is_read_instead_of_the_default_one(write: Write, tmp_path: Path) -> None:
    default = tmp_path / "default.toml"
    default.write_text("[gateway]\nshards = 9")
    named = write("")
    assert load_settings(config=named, default_path=default).gateway.shards == 0
    assert (
        load_settings(environment={"TIDEGATE_CONFIG": str(named)}, default_path=default).gateway.shards == 0
    )


def test_variables_are_read_by_the_type_of_their_setting() -> None:
    settings = load_settings(
        environment={
            "TIDEGATE_DNS__ENABLED": "no",
            "TIDEGATE_DNS__UPSTREAMS": "192.0.2.1, 192.0.2.2",
            "TIDEGATE_EXTERNAL__DENY": "192.168.0.0/16,10.0.0.0/8,10.0.0.0/8",
            "TIDEGATE_GATEWAY__BETWEEN_CLIENTS": "no",
            "TIDEGATE_NAT__PORT_RANGE": "2000,3000",
            "TIDEGATE_NAT__ICMP_TIMEOUT": "90.5",
            "TIDEGATE_GATEWAY__TUN_NAME": "123",
            "TIDEGATE_STATE_DIR": "/srv/tidegate",
        },
        default_path=Path("/nonexistent"),
    )
    assert settings.dns.enabled is False
    assert settings.dns.upstreams == (IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2"))
    assert list(map(str, settings.external.deny)) == ["192.168.0.0/16", "10.0.0.0/8", "10.0.0.0/8"]
    assert settings.gateway.between_clients is False
    assert settings.nat.port_range == (2000, 3000)
    assert settings.nat.icmp_timeout == 90.5
    assert settings.gateway.tun_name == "123"
    assert settings.state_dir == Path("/srv/tidegate")


def test_variables_that_are_not_settings_are_left_alone() -> None:
    environment = {
        "TIDEGATE_PORT": "tcp://192.0.2.1:1",
        "TIDEGATE_DEBUG": "1",
        "TIDEGATE_DNS": "x",
        "PATH": "/bin",
    }
    assert load_settings(environment=environment, default_path=Path("/nonexistent")) == Settings()


def test_an_empty_variable_counts_as_unset(write: Write) -> None:
    file = write('state_dir = "/srv/tidegate"\n[dns]\nupstreams = ["192.0.2.1"]')
    empty = {
        "TIDEGATE_CONFIG": "",
        "TIDEGATE_STATE_DIR": "",
        "TIDEGATE_DNS__UPSTREAMS": "",
        "TIDEGATE_NAT__UDP_TIMEOUT": "",
        "TIDEGATE_NAT__OTHER_PROTOCOLS__GRE": "",
        "TIDEGATE_NAT__UPD_TIMEOUT": "",
    }
    assert load_settings(environment=empty, default_path=file) == load_settings(config=file)
    no_upstreams = load_settings(config=file, environment={"TIDEGATE_DNS__UPSTREAMS": "[]"})
    assert no_upstreams.dns.upstreams == ()


def test_a_misspelt_variable_of_a_section_is_an_error() -> None:
    with pytest.raises(SettingsError, match=r'\$TIDEGATE_NAT__UDP_TIMEOT: .* did you mean "udp_timeout"'):
        load_settings(environment={"TIDEGATE_NAT__UDP_TIMEOT": "5"}, default_path=Path("/nonexistent"))


def test_a_file_without_end_is_refused() -> None:
    with pytest.raises(SettingsError, match="^/dev/zero: is larger than"):
        load_settings(config=Path("/dev/zero"))


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    file = tmp_path / "tidegate.toml"
    file.write_bytes(b"\xef\xbb\xbf[gateway]\nshards = 3\n")
    assert load_settings(config=file).gateway.shards == 3
    file.write_bytes(b"\xef\xbb\xbf[gateway]\nshards = 300\n")
    with pytest.raises(SettingsError, match=r"tidegate\.toml:2: gateway\.shards"):
        load_settings(config=file)


@pytest.mark.parametrize(
    ("text", "variable", "told"),
    [
        ("", "TIDEGATE_FOO__BAR", '$TIDEGATE_FOO__BAR: unknown key "foo"'),
        ("[gateway]\nshards = 1", "TIDEGATE_FOO__BAR", '$TIDEGATE_FOO__BAR: unknown key "foo"'),
        ("", "TIDEGATE_GATEWAY__LISTEN__X", "$TIDEGATE_GATEWAY__LISTEN__X: gateway.listen: must be text"),
        (
            '[gateway]\nlisten = "0.0.0.0:1"',
            "TIDEGATE_GATEWAY__LISTEN__X",
            '$TIDEGATE_GATEWAY__LISTEN__X: gateway.listen: is not a table, so it has no "x"',
        ),
        ('dns = "yes"', "TIDEGATE_DNS__ENABLED", "tidegate.toml:1: dns: must be a table"),
        (
            "[nat]\nother_protocols = 5",
            "TIDEGATE_NAT__OTHER_PROTOCOLS__GRE",
            "tidegate.toml:2: nat.other_protocols",
        ),
    ],
)
def test_a_variable_that_names_no_setting_is_named(write: Write, text: str, variable: str, told: str) -> None:
    with pytest.raises(SettingsError) as refused:
        load_settings(config=write(text), environment={variable: "1"})
    assert str(refused.value).removeprefix(f"{write(text).parent}/").startswith(told)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().gateway.shards = 5


@given(st.text(max_size=200))
def test_whatever_a_file_says_the_answer_is_settings_or_a_settings_error(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    file = tmp_path_factory.mktemp("settings") / "tidegate.toml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        load_settings(config=file)
    except SettingsError as refused:
        assert refused.exit_code == 2
        assert "\n" not in str(refused)


_scalars = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False).map(lambda number: number),
    st.sampled_from(["", "0.0.0.0:1", "10.0.0.0/8", "eth0", "x" * 300]),
    st.lists(st.integers(0, 70000), max_size=3),
)
_keys = [
    f"{section}.{key}"
    for section, model in Settings.model_fields.items()
    if section != "state_dir"
    for key in model.annotation.model_fields  # type: ignore[union-attr]
]


@given(st.dictionaries(st.sampled_from(_keys), _scalars, max_size=4))
def test_whatever_a_key_holds_the_answer_is_settings_or_one_that_names_file_and_line(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, object]
) -> None:
    import json

    lines = [f"{key} = {json.dumps(value)}".replace("Infinity", "inf") for key, value in values.items()]
    file = tmp_path_factory.mktemp("settings") / "tidegate.toml"
    file.write_text("\n".join(lines))
    try:
        load_settings(config=file)
    except SettingsError as refused:
        where, _, rest = str(refused).removeprefix(f"{file}:").partition(": ")
        named = lines[int(where) - 1].partition(" = ")[0]
        assert named in rest
