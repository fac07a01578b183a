"""Profiles: written and read back, and a clear message about everything that is wrong."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.ciphers import CIPHERS
from tidegate.errors import ProfileError
from tidegate.identity import (
    Profile,
    encode_key,
    make_private_key,
    others_can_read,
    parse_profile,
    public_key_of,
    read_profile,
)
from tidegate.net import Endpoint

GOOD = Profile(
    private_key=bytes(range(32)),
    address=IPv4Interface("10.66.77.2/32"),
    peer_public_key=bytes(range(32, 64)),
    endpoint=Endpoint("vpn.example.com", 51820),
    allowed_ips=(ip_network("0.0.0.0/0"), ip_network("::/0")),
    dns=(IPv4Address("10.66.77.1"),),
    search=("example.com",),
    mtu=1420,
    preshared_key=bytes(range(64, 96)),
    persistent_keepalive=25,
)

_keys = st.binary(min_size=32, max_size=32)
_addresses = st.ip_addresses(v=4)


@given(
    st.builds(
        Profile,
        private_key=_keys,
        address=st.builds(
            lambda a, length: IPv4Interface((a, length)),
            st.integers(0x0A000001, 0x0AFFFFFE).map(IPv4Address),
            st.integers(8, 32),
        ),
        peer_public_key=_keys,
        endpoint=st.builds(
            Endpoint, st.sampled_from(["vpn.example.com", "192.0.2.1"]), st.integers(1, 65535)
        ),
        allowed_ips=st.lists(
            st.builds(lambda a, n: ip_network((a, n), strict=False), _addresses, st.integers(0, 32)),
            min_size=1,
            max_size=4,
            unique=True,
        ).map(tuple),
        dns=st.lists(_addresses, max_size=2).map(tuple),
        mtu=st.integers(576, 65535),
        preshared_key=st.none() | _keys,
        persistent_keepalive=st.integers(0, 65535),
        listen_port=st.integers(0, 65535),
        cipher=st.sampled_from(CIPHERS),
    )
)
def test_a_profile_comes_back_from_its_text_as_it_was(profile: Profile) -> None:
    assert parse_profile(profile.render("with a comment\non two lines")) == profile


@given(st.text(max_size=300))
def test_any_text_gives_a_profile_or_a_profile_error(text: str) -> None:
    with pytest.raises(ProfileError):
        parse_profile(text)


@given(st.integers(0, 12), st.text(max_size=60), st.booleans())
def test_any_line_that_is_exchanged_gives_a_profile_or_an_error_with_a_line(
    number: int, junk: str, keep_key: bool
) -> None:
    lines = GOOD.render().splitlines()
    target = lines[number % len(lines)]
    lines[number % len(lines)] = f"{target.partition('=')[0]}={junk}" if keep_key else junk
    try:
        parse_profile("\n".join(lines), "alice.conf")
    except ProfileError as refused:
        assert re.match(r"alice\.conf:\d+: |alice\.conf: has no ", str(refused))
        assert "\n" not in str(refused)


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("PrivateKey = .*", "PrivateKey = abc", 2, ["PrivateKey is not a key", "base64"]),
        ("PublicKey = .*", f"PublicKey = {'A' * 43}", 8, ["PublicKey is not a key"]),
        ("PresharedKey = .*", f"PresharedKey = {'!' * 44}", 9, ["PresharedKey is not a key"]),
        ("Address = .*", "Address = 10.66.77.300", 3, ["Address", "10.66.77.300"]),
        ("Address = .*", "Address = fd00::1/64", 3, ["Address", "IPv6"]),
        ("Address = .*", "Address = 10.0.0.1/32, 10.0.0.2/32", 3, ["one IPv4 address, not 2"]),
        ("DNS = .*", "DNS = dns server", 4, ["DNS", "dns server"]),
        ("MTU = .*", "MTU = 12", 5, ["MTU", "576"]),
        ("MTU = .*", f"MTU = {'0' * 5}1420{'9' * 5000}", 5, ["MTU", "65535"]),
        ("MTU = .*", "MTU = ٣٠٠٠", 5, ["MTU"]),
        ("MTU = .*", "MUT = 1420", 5, ["unknown key MUT in [Interface]", "MTU"]),
        ("MTU = .*", "PostUp = rm -rf /", 5, ["PostUp is not supported", "remove the line"]),
        ("MTU = .*", "Address =", 5, ["Address has no value"]),
        ("MTU = .*", "MTU = 1420\nMTU = 1400", 6, ["MTU was already given on line 5"]),
        (r"\[Peer\]", "[Pear]", 7, ["unknown section [Pear]"]),
        ("AllowedIPs = .*", "AllowedIPs = everything", 10, ["AllowedIPs", "everything"]),
        ("AllowedIPs = .*", "AllowedIPs = ::/0", 10, ["no IPv4 prefix"]),
        (
            "Endpoint = .*",
            "Endpoint = 198.51.100.1",
            11,
            ["'198.51.100.1' is not HOST:PORT, such as \"vpn.example.com:51820\""],
        ),
        ("Endpoint = .*", f"Endpoint = {'x' * 5000}", 11, ["Endpoint: 'xxx", "...' is not HOST:PORT"]),
        (
            "Endpoint = .*",
            f"Endpoint = -{'x' * 50}:1",
            11,
            ["...' is neither a host name nor an IPv4 address"],
        ),
        ("Endpoint = .*", "Endpoint = 198.51.100.300:1", 11, ["Endpoint", "198.51.100.300"]),
        ("Endpoint = .*", "Endpoint = [2001:db8::1]:51820", 11, ["Endpoint", "IPv6"]),
        ("Endpoint = .*", "Endpoint = a.b:000001999999", 11, ["Endpoint", "'000001999999'"]),
        ("Endpoint = .*", "Endpoint = vpn.example.com:0", 11, ["Endpoint", "'0'"]),
        ("PersistentKeepalive = .*", "PersistentKeepalive = 70000", 12, ["PersistentKeepalive", "65535"]),
        ("PersistentKeepalive = .*", "[Peer]", 12, ["a second [Peer]"]),
        ("PersistentKeepalive = .*", "# Tidegate-Cipher = rot13", 12, ["aes-256-gcm", "rot13"]),
        ("PersistentKeepalive = .*", "#Tidegate-Cypher=aes-256-gcm", 12, ["unknown key Tidegate-Cypher"]),
        ("MTU = .*", "# Tidegate-Cipher = aes-256-gcm", 5, ["unknown key Tidegate-Cipher in [Interface]"]),
    ],
)
def test_what_is_wrong_is_named_with_its_line(old: str, new: str, line: int, words: list[str]) -> None:
    text = re.sub(old, lambda _: new, GOOD.render(), count=1)
    with pytest.raises(ProfileError) as refused:
        parse_profile(text, "alice.conf")
    assert str(refused.value).startswith(f"alice.conf:{line}: ")
    for word in words:
        assert word in str(refused.value)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("key", ["PrivateKey", "Address", "PublicKey", "AllowedIPs", "Endpoint"])
def test_what_is_missing_is_named(key: str) -> None:
    text = "\n".join(line for line in GOOD.render().splitlines() if not line.startswith(key))
    with pytest.raises(ProfileError, match=f"has no {key}"):
        parse_profile(text)


def test_keys_are_case_insensitive_and_comments_and_windows_lines_are_taken() -> None:
    text = GOOD.render().replace("PrivateKey", "privatekey").replace("[Peer]", "[PEER] # them")
    assert parse_profile(text.replace("\n", "\r\n")) == GOOD


def test_another_cipher_is_a_comment_to_other_programs_and_a_key_to_ours() -> None:
    fast = replace(GOOD, cipher="aes-256-gcm")
    added = set(fast.render().splitlines()) - set(GOOD.render().splitlines())
    assert added == {"# Tidegate-Cipher = aes-256-gcm"}
    assert fast.render().startswith(GOOD.render()), "in the [Peer] section"
    for spelling in ("#tidegate-cipher=aes-256-gcm", "  #  Tidegate-Cipher =  aes-256-gcm  # faster"):
        assert parse_profile(fast.render().replace("# Tidegate-Cipher = aes-256-gcm", spelling)) == fast
    assert parse_profile(GOOD.render("Tidegate profile of alice, Tidegate-Cipher or not")) == GOOD


def test_a_secret_is_in_no_error_and_no_repr() -> None:
    assert GOOD.private_key is not None
    secret = encode_key(GOOD.private_key)[:-1]
    with pytest.raises(ProfileError) as refused:
        parse_profile(GOOD.render().replace(encode_key(GOOD.private_key), secret))
    assert secret not in str(refused.value)
    assert encode_key(GOOD.private_key) not in repr(GOOD)
    assert repr(GOOD.private_key) not in repr(GOOD)


def test_a_file_that_is_no_profile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="cannot be read"):
        read_profile(tmp_path / "missing.conf")
    file = tmp_path / "big.conf"
    file.write_bytes(b"#" * 100_000)
    with pytest.raises(ProfileError, match="larger than"):
        read_profile(file)
    file.write_bytes(b"[Interface]\n\xff")
    with pytest.raises(ProfileError, match=r"big\.conf:2: is not UTF-8"):
        read_profile(file)


@pytest.mark.parametrize(
    ("file", "folder", "above", "readable"),
    [
        (0o644, 0o755, 0o755, True),
        (0o644, 0o711, 0o711, True),
        (0o644, 0o700, 0o755, False),
        (0o644, 0o755, 0o700, False),
        (0o640, 0o755, 0o755, False),
        (0o600, 0o755, 0o755, False),
    ],
    ids="{:o}".format,
)
def test_whom_a_files_keys_are_open_to_is_told_by_its_mode_and_those_of_the_folders_above(
    open_folder: Path, file: int, folder: int, above: int, readable: bool
) -> None:
    profile = open_folder / "vpn" / "alice.conf"
    profile.parent.mkdir()
    profile.touch()
    profile.chmod(file)
    profile.parent.chmod(folder)
    open_folder.chmod(above)
    assert others_can_read(profile) == readable
    link = open_folder / "link.conf"
    link.symlink_to(profile)
    assert others_can_read(link) == readable
    assert not others_can_read(open_folder / "missing.conf")
    assert not others_can_read(Path("/dev/null"))


def test_keys_are_those_that_wg_makes() -> None:
    private = make_private_key()
    told = subprocess.run(
        ["wg", "pubkey"], input=encode_key(private), capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == encode_key(public_key_of(private))
