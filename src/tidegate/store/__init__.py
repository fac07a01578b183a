"""What must survive a restart: peers, when they were last seen, and publications.

`Store` is the whole interface; `sqlite` implements it in one file. Another store (PostgreSQL, for a fleet) would be
another module here, and no change anywhere else. Stores are synchronous: each call is one short transaction, made from
a worker thread.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Literal, Protocol

from tidegate.ciphers import WIREGUARD_CIPHER, CipherName
from tidegate.errors import ConflictError, UsageError

MAX_PEER_NAME = 63
MAX_PUBLISHED_PORTS = 1000
"""Maximum ports of one publication: each costs the engine a socket."""

_PEER_NAME = re.compile(rf"[A-Za-z0-9](?:[A-Za-z0-9._-]{{0,{MAX_PEER_NAME - 2}}}[A-Za-z0-9])?")

TransportProtocol = Literal["tcp", "udp"]


@dataclass(frozen=True, slots=True)
class Peer:
    """A client that may connect. Its private key is only in its profile."""

    name: str
    public_key: bytes
    preshared_key: bytes | None
    address: IPv4Address
    created_at: float
    """Seconds since the epoch."""
    cipher: CipherName = WIREGUARD_CIPHER
    enabled: bool = True
    """Whether it may connect."""

    def __repr__(self) -> str:
        return f"Peer(name={self.name!r}, address={self.address})"  # no keys in logs


@dataclass(frozen=True, slots=True)
class LastSeen:
    """When and where a peer was heard of last."""

    handshake_at: float
    """When its last handshake was, in seconds since the epoch."""
    endpoint: tuple[str, int]
    """Where its authentic datagrams came from: IPv4 address and UDP port."""


@dataclass(frozen=True, slots=True)
class Publication:
    """External ports that are forwarded to a client, in order, from `internal_port` on."""

    protocol: TransportProtocol
    first_port: int
    last_port: int
    peer: str
    internal_port: int

    @property
    def ports(self) -> range:
        """The external ports."""
        return range(self.first_port, self.last_port + 1)

    def internal_of(self, external_port: int) -> int:
        """The client's port behind an external one."""
        return self.internal_port + external_port - self.first_port

    @property
    def external_text(self) -> str:
        """Such as ``tcp/8080`` or ``tcp/8000-8010``."""
        return f"{self.protocol}/{_port_text(self.first_port, self.last_port)}"

    @property
    def internal_text(self) -> str:
        """Such as ``alice:80`` or ``alice:80-90``."""
        return f"{self.peer}:{_port_text(self.internal_port, self.internal_of(self.last_port))}"


def _port_text(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def check_peer_name(name: str) -> str:
    """The name itself. Raises `UsageError`."""
    if not _PEER_NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is not a peer name",
            hint=f"use 1 to {MAX_PEER_NAME} letters, digits, '.', '_', '-'; a letter or digit at both ends",
        )
    return name


def key_taken(holder: str) -> ConflictError:
    return ConflictError(f"peer {holder!r} already has this public key")


def peer_names(store: Store) -> list[str]:
    return [peer.name for peer in store.peers()]


class Store(Protocol):
    """Peers and publications. Each method is one transaction, and raises `StoreError` if the store itself fails."""

    def peers(self) -> Sequence[Peer]:
        """In the order of their addresses."""

    def peer(self, name: str) -> Peer:
        """Raises `NotFoundError`."""

    def add_peer(
        self,
        name: str,
        public_key: bytes,
        preshared_key: bytes | None,
        *,
        subnet: IPv4Network,
        reserved: frozenset[IPv4Address],
        address: IPv4Address | None,
        now: float,
        cipher: CipherName = WIREGUARD_CIPHER,
    ) -> Peer:
        """Adds a peer with `address`, or with the lowest free one of `subnet`. Raises `ConflictError` if its name, key
        or address is taken, or if the subnet is full."""

    def remove_peer(self, name: str) -> tuple[Peer, Sequence[Publication]]:
        """Removes a peer and its publications, and returns what was removed. Raises `NotFoundError`."""

    def set_peer_enabled(self, name: str, enabled: bool) -> Peer:
        """Returns the peer as it is now. Raises `NotFoundError`."""

    def rename_peer(self, name: str, new_name: str) -> Peer:
        """Returns the peer as it is now; its publications stay its own. Raises `NotFoundError`, or `ConflictError` if a
        peer has the new name already."""

    def replace_keys(self, name: str, public_key: bytes, preshared_key: bytes | None) -> Peer:
        """Returns the peer as it is now. Raises `NotFoundError`, or `ConflictError` if a peer, this one or another, has
        the public key already."""

    def last_seen(self) -> Mapping[bytes, LastSeen]:
        """By public key, as far as it is known. A peer whose key has changed since has not been seen."""

    def set_last_seen(self, seen: Mapping[bytes, LastSeen]) -> None:
        """Notes what is known of peers, by public key; of others it stays as it was. Keys that are no peer's are
        ignored."""

    def publications(self) -> Sequence[Publication]:
        """In the order of protocol and port."""

    def add_publication(self, publication: Publication) -> None:
        """Raises `NotFoundError` for an unknown peer, `ConflictError` if its ports overlap those of another
        publication."""

    def remove_publication(self, protocol: TransportProtocol, first_port: int, last_port: int) -> Publication:
        """Raises `NotFoundError`."""

    def close(self) -> None: ...
