"""Profiles in the wg-quick format: `peer add` writes them, `connect` reads them.

Parsing is strict: an unknown key or section is an error with its line, not ignored, because an ignored key is a broken
promise (a `Table` or `PostUp` that silently does nothing).

Keys that only Tidegate's own client understands are in comments of the form ``# Tidegate-KEY = VALUE``, so that other
WireGuard programs can read the profile; they are parsed just as strictly.
"""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Interface,
    IPv6Network,
    ip_address,
    ip_interface,
    ip_network,
)
from pathlib import Path
from typing import NoReturn

from tidegate.ciphers import CIPHERS, WIREGUARD_CIPHER, CipherName
from tidegate.errors import ProfileError
from tidegate.identity.keys import decode_key, encode_key
from tidegate.net import Endpoint, is_host_name, parse_number

MAX_FILE_BYTES = 64 * 1024
MAX_KEEPALIVE = 65535
DEFAULT_MTU = 1420

Network = IPv4Network | IPv6Network

_KEYS = {
    "interface": ("PrivateKey", "Address", "DNS", "MTU", "ListenPort"),
    "peer": ("PublicKey", "PresharedKey", "AllowedIPs", "Endpoint", "PersistentKeepalive", "Tidegate-Cipher"),
}
_REQUIRED = {"interface": ("PrivateKey", "Address"), "peer": ("PublicKey", "AllowedIPs", "Endpoint")}
_REPEATABLE = ("address", "dns", "allowedips")
_EXTENSION = re.compile(r"\s*#\s*(Tidegate-[A-Za-z]+\s*=.*)", re.IGNORECASE)
_OF_WG_QUICK = ("table", "preup", "postup", "predown", "postdown", "saveconfig", "fwmark")


@dataclass(frozen=True, slots=True)
class Profile:
    """Everything that a client needs to connect to a gateway."""

    private_key: bytes | None
    """`None`: the device keeps it to itself. Such a profile is to be completed there; nobody connects with it as it
    is."""
    address: IPv4Interface
    peer_public_key: bytes
    endpoint: Endpoint
    allowed_ips: tuple[Network, ...]
    dns: tuple[IPv4Address, ...] = ()
    search: tuple[str, ...] = ()
    """Search domains: names in the DNS line, as in wg-quick."""
    mtu: int = DEFAULT_MTU
    preshared_key: bytes | None = None
    persistent_keepalive: int = 0
    """Seconds; 0: off."""
    listen_port: int = 0
    cipher: CipherName = WIREGUARD_CIPHER
    """Any other than WireGuard's makes it a profile for Tidegate's own client only."""

    def __repr__(self) -> str:
        return f"Profile(address={self.address}, endpoint={self.endpoint})"  # no keys in logs

    def render(self, comment: str | None = None) -> str:
        """The profile as text, with its secrets."""
        lines = [f"# {line}" for line in (comment or "").splitlines()]
        private_key = (
            f"PrivateKey = {encode_key(self.private_key)}"
            if self.private_key is not None
            else "# PrivateKey = (put the device's own private key here)"
        )
        lines += ["[Interface]", private_key, f"Address = {self.address}"]
        if self.dns or self.search:
            lines.append(f"DNS = {', '.join([*map(str, self.dns), *self.search])}")
        lines.append(f"MTU = {self.mtu}")
        if self.listen_port:
            lines.append(f"ListenPort = {self.listen_port}")
        lines += ["", "[Peer]", f"PublicKey = {encode_key(self.peer_public_key)}"]
        if self.preshared_key is not None:
            lines.append(f"PresharedKey = {encode_key(self.preshared_key)}")
        lines += [f"AllowedIPs = {', '.join(map(str, self.allowed_ips))}", f"Endpoint = {self.endpoint}"]
        if self.persistent_keepalive:
            lines.append(f"PersistentKeepalive = {self.persistent_keepalive}")
        if self.cipher != WIREGUARD_CIPHER:
            lines.append(f"# Tidegate-Cipher = {self.cipher}")
        return "\n".join(lines) + "\n"


def read_profile(path: Path) -> Profile:
    """The profile in a file. Raises `ProfileError`."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as cause:
        raise ProfileError(f"cannot be read: {cause.strerror}", path=path) from cause
    if len(raw) > MAX_FILE_BYTES:
        raise ProfileError(f"is larger than {MAX_FILE_BYTES} bytes, so it is not a profile", path=path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise ProfileError("is not UTF-8 text", path=path, line=raw[: cause.start].count(b"\n") + 1) from None
    return parse_profile(text, path)


def others_can_read(path: Path) -> bool:
    """Whether any user of this machine can read a file, judging by its mode and those of all folders above it."""
    try:
        file = path.stat()
        folders = [folder.stat() for folder in path.resolve().parents]
    except OSError:
        return False  # reading it will fail, with the reason
    readable = stat.S_ISREG(file.st_mode) and file.st_mode & stat.S_IROTH
    return bool(readable and all(folder.st_mode & stat.S_IXOTH for folder in folders))


def parse_profile(text: str, path: Path | str = "profile") -> Profile:
    """A profile from its text; `path` is for messages. Raises `ProfileError`, and nothing else, whatever the text."""
    sections = _sections(text, path)
    return _Reader(sections, path).profile()


@dataclass(frozen=True, slots=True)
class _Entry:
    value: str
    line: int


def _sections(text: str, path: Path | str) -> dict[str, dict[str, list[_Entry]]]:
    """Section → key (lower case) → its entries. Both sections and their required keys are present."""
    sections: dict[str, dict[str, list[_Entry]]] = {}
    lines: dict[str, int] = {}
    current: str | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        extension = _EXTENSION.fullmatch(line)
        content = (extension[1] if extension else line).partition("#")[0].strip()
        if not content:
            continue
        if content.startswith("["):
            current = content.strip("[]").strip().lower()
            if current not in _KEYS or not content.endswith("]"):
                raise ProfileError(f"unknown section {_short(content)}", path=path, line=number)
            if current in sections:
                raise ProfileError(
                    f"a second {_short(content)} section: only one is supported", path=path, line=number
                )
            sections[current], lines[current] = {}, number
            continue
        key, equals, value = (part.strip() for part in content.partition("="))
        if current is None or not equals:
            raise ProfileError("neither a section nor KEY = VALUE", path=path, line=number)
        _check_key(current, key, value, sections[current], path, number)
        sections[current].setdefault(key.lower(), []).append(_Entry(value, number))
    for section, required in _REQUIRED.items():
        if section not in sections:
            raise ProfileError(f"has no [{section.capitalize()}] section", path=path)
        for key in required:
            if key.lower() not in sections[section]:
                raise ProfileError(f"[{section.capitalize()}] has no {key}", path=path, line=lines[section])
    return sections


def _check_key(
    section: str, key: str, value: str, seen: dict[str, list[_Entry]], path: Path | str, line: int
) -> None:
    known = {name.lower(): name for name in _KEYS[section]}
    if key.lower() in _OF_WG_QUICK:
        raise ProfileError(
            f"{key} is not supported by `tidegate connect`", path=path, line=line, hint="remove the line"
        )
    if key.lower() not in known:
        hint = f"known keys: {', '.join(_KEYS[section])}"
        raise ProfileError(
            f"unknown key {_short(key)} in [{section.capitalize()}]", path=path, line=line, hint=hint
        )
    if key.lower() in seen and key.lower() not in _REPEATABLE:
        first = seen[key.lower()][0].line
        raise ProfileError(f"{known[key.lower()]} was already given on line {first}", path=path, line=line)
    if not value:
        raise ProfileError(f"{known[key.lower()]} has no value", path=path, line=line)


def _short(text: str) -> str:
    shown = text if len(text) <= 40 else text[:37] + "..."
    return "".join(c if c.isprintable() else "?" for c in shown)


class _Reader:
    """Turns entries into values; each error names the entry's line."""

    def __init__(self, sections: dict[str, dict[str, list[_Entry]]], path: Path | str) -> None:
        self._sections = sections
        self._path = path

    def profile(self) -> Profile:
        dns, search = self._dns()
        return Profile(
            private_key=self._required_key("interface", "PrivateKey"),
            address=self._address(),
            dns=dns,
            search=search,
            mtu=self._number("interface", "MTU", 576, 65535, DEFAULT_MTU),  # RFC 791: every host accepts 576
            listen_port=self._number("interface", "ListenPort", 0, 65535, 0),
            peer_public_key=self._required_key("peer", "PublicKey"),
            preshared_key=self._key("peer", "PresharedKey"),
            allowed_ips=self._allowed_ips(),
            endpoint=self._endpoint(),
            persistent_keepalive=self._keepalive(),
            cipher=self._cipher(),
        )

    def _entry(self, section: str, key: str) -> _Entry | None:
        entries = self._sections[section].get(key.lower())
        return entries[0] if entries else None

    def _items(self, section: str, key: str) -> list[_Entry]:
        entries = self._sections[section].get(key.lower(), [])
        return [
            _Entry(item.strip(), entry.line)
            for entry in entries
            for item in entry.value.split(",")
            if item.strip()
        ]

    def _fail(self, message: str, line: int) -> NoReturn:
        raise ProfileError(message, path=self._path, line=line)

    def _key(self, section: str, key: str) -> bytes | None:
        entry = self._entry(section, key)
        if entry is None:
            return None
        try:
            return decode_key(entry.value)
        except ValueError as cause:
            self._fail(f"{key} {cause}", entry.line)

    def _required_key(self, section: str, key: str) -> bytes:
        value = self._key(section, key)
        assert value is not None, "_sections checked that it is there"
        return value

    def _number(self, section: str, key: str, least: int, most: int, default: int) -> int:
        entry = self._entry(section, key)
        if entry is None:
            return default
        number = parse_number(entry.value, least, most)
        if number is None:
            self._fail(
                f"{key} must be a number from {least} to {most}, not {_short(entry.value)!r}", entry.line
            )
        return number

    def _keepalive(self) -> int:
        entry = self._entry("peer", "PersistentKeepalive")
        if entry is not None and entry.value.lower() == "off":
            return 0
        return self._number("peer", "PersistentKeepalive", 0, MAX_KEEPALIVE, 0)

    def _cipher(self) -> CipherName:
        entry = self._entry("peer", "Tidegate-Cipher")
        if entry is None:
            return WIREGUARD_CIPHER
        for cipher in CIPHERS:
            if entry.value == cipher:
                return cipher
        self._fail(f"Tidegate-Cipher must be {' or '.join(CIPHERS)}, not {_short(entry.value)!r}", entry.line)

    def _address(self) -> IPv4Interface:
        found: list[IPv4Interface] = []
        for item in self._items("interface", "Address"):
            try:
                address = ip_interface(item.value)
            except ValueError:
                self._fail(f"Address: {_short(item.value)!r} is not an IP address", item.line)
            if isinstance(address, IPv6Interface):
                self._fail(
                    f"Address: {_short(item.value)!r}: IPv6 inside the tunnel is not supported", item.line
                )
            found.append(address)
        line = self._sections["interface"]["address"][0].line
        if len(found) != 1:
            self._fail(f"Address must be one IPv4 address, not {len(found)}", line)
        if found[0].ip.is_unspecified or found[0].ip.is_multicast or found[0].ip.is_loopback:
            self._fail(f"Address: {found[0].ip} cannot be a host's address", line)
        return found[0]

    def _dns(self) -> tuple[tuple[IPv4Address, ...], tuple[str, ...]]:
        servers: list[IPv4Address] = []
        search: list[str] = []
        for item in self._items("interface", "DNS"):
            try:
                address = ip_address(item.value)
            except ValueError:
                if not is_host_name(item.value):
                    self._fail(f"DNS: {_short(item.value)!r} is neither an address nor a domain", item.line)
                search.append(item.value)
                continue
            if not isinstance(address, IPv4Address):
                self._fail(
                    f"DNS: {address} cannot be reached: IPv6 inside the tunnel is not supported", item.line
                )
            servers.append(address)
        return tuple(servers), tuple(search)

    def _allowed_ips(self) -> tuple[Network, ...]:
        networks: list[Network] = []
        for item in self._items("peer", "AllowedIPs"):
            try:
                network = ip_network(item.value, strict=False)
            except ValueError:
                self._fail(f"AllowedIPs: {_short(item.value)!r} is not an IP prefix", item.line)
            if network not in networks:
                networks.append(network)
        if not any(isinstance(network, IPv4Network) for network in networks):
            self._fail("AllowedIPs has no IPv4 prefix", self._sections["peer"]["allowedips"][0].line)
        return tuple(networks)

    def _endpoint(self) -> Endpoint:
        entry = self._sections["peer"]["endpoint"][0]
        try:
            return Endpoint.parse(entry.value)
        except ValueError as cause:
            self._fail(f"Endpoint: {cause}", entry.line)
