"""STUN for the lab (RFC 8489, RFC 5780): a server with two addresses and two ports, and behaviour discovery.

``python tests/e2e/lab/stun.py ADDRESS OTHER_ADDRESS``. Only what discovery needs is here: binding requests with
``CHANGE-REQUEST``, and answers with ``XOR-MAPPED-ADDRESS``, ``RESPONSE-ORIGIN`` and ``OTHER-ADDRESS``.
"""

from __future__ import annotations

import argparse
import secrets
import selectors
import socket
import struct
from dataclasses import dataclass
from enum import StrEnum

PORT, OTHER_PORT = 3478, 3479  # RFC 8489 §18.6; the second is arbitrary
READY = "STUN server is ready"

_BINDING_REQUEST, _BINDING_RESPONSE = 0x0001, 0x0101  # RFC 8489 §5
_MAGIC_COOKIE = 0x2112A442  # RFC 8489 §5
_HEADER = struct.Struct("!HHI12s")
_ATTRIBUTE = struct.Struct("!HH")
# RFC 8489 §18.3, RFC 5780 §7
_CHANGE_REQUEST, _XOR_MAPPED_ADDRESS, _RESPONSE_ORIGIN, _OTHER_ADDRESS = 0x0003, 0x0020, 0x802B, 0x802C
_CHANGE_ADDRESS, _CHANGE_PORT = 0x4, 0x2  # RFC 5780 §7.2
_IPV4 = 0x01

Endpoint = tuple[str, int]


class Behaviour(StrEnum):
    """What a NAT's mapping or filtering depends on (RFC 4787 §4.1, §5)."""

    ENDPOINT_INDEPENDENT = "endpoint-independent"
    ADDRESS_DEPENDENT = "address-dependent"
    ADDRESS_AND_PORT_DEPENDENT = "address-and-port-dependent"


@dataclass(frozen=True)
class Discovered:
    """The NAT as a client sees it."""

    mapped: Endpoint
    """The client's external endpoint."""
    mapping: Behaviour
    filtering: Behaviour


class NoAnswerError(RuntimeError):
    """The server did not answer a request that no NAT may block."""


def discover(server: Endpoint, *, patience: float = 0.4) -> Discovered:
    """Discovers mapping (RFC 5780 §4.3) and filtering (§4.4). `patience`: seconds without an answer that count as
    silence.

    Each of the two uses a socket of its own: mapping discovery sends to addresses whose silence filtering discovery
    is about.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(patience)
        first = _must_answer(client, server)
        other_address, other_port = first.other
        elsewhere = _must_answer(client, (other_address, server[1]))
        farther = _must_answer(client, (other_address, other_port))
    if first.mapped == elsewhere.mapped == farther.mapped:
        mapping = Behaviour.ENDPOINT_INDEPENDENT
    elif elsewhere.mapped == farther.mapped:
        mapping = Behaviour.ADDRESS_DEPENDENT
    else:
        mapping = Behaviour.ADDRESS_AND_PORT_DEPENDENT
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(patience)
        _must_answer(client, server)
        if _ask(client, server, change=_CHANGE_ADDRESS | _CHANGE_PORT) is not None:
            filtering = Behaviour.ENDPOINT_INDEPENDENT
        elif _ask(client, server, change=_CHANGE_PORT) is not None:
            filtering = Behaviour.ADDRESS_DEPENDENT
        else:
            filtering = Behaviour.ADDRESS_AND_PORT_DEPENDENT
    return Discovered(first.mapped, mapping, filtering)


@dataclass(frozen=True)
class _Answer:
    mapped: Endpoint
    other: Endpoint


def _must_answer(client: socket.socket, server: Endpoint) -> _Answer:
    answer = _ask(client, server)
    if answer is None:
        raise NoAnswerError(f"no answer from {server[0]}:{server[1]}")
    return answer


def _ask(client: socket.socket, server: Endpoint, *, change: int = 0) -> _Answer | None:
    """Sends a request up to three times; None if nothing comes back from anywhere."""
    transaction = secrets.token_bytes(12)
    attributes = _ATTRIBUTE.pack(_CHANGE_REQUEST, 4) + change.to_bytes(4, "big") if change else b""
    request = _HEADER.pack(_BINDING_REQUEST, len(attributes), _MAGIC_COOKIE, transaction) + attributes
    for _ in range(3):
        client.sendto(request, server)
        try:
            while True:
                answer = _parse_answer(client.recv(2048), transaction)
                if answer is not None:
                    return answer
        except TimeoutError:
            continue
    return None


def _parse_answer(message: bytes, transaction: bytes) -> _Answer | None:
    """None if it answers another request."""
    kind, _, _, answered = _HEADER.unpack_from(message)
    if (kind, answered) != (_BINDING_RESPONSE, transaction):
        return None
    found = _attributes(message)
    return _Answer(
        _unpack_endpoint(found[_XOR_MAPPED_ADDRESS], xor=True), _unpack_endpoint(found[_OTHER_ADDRESS])
    )


def _attributes(message: bytes) -> dict[int, bytes]:
    found, at = {}, _HEADER.size
    while at + _ATTRIBUTE.size <= len(message):
        kind, length = _ATTRIBUTE.unpack_from(message, at)
        found[kind] = message[at + _ATTRIBUTE.size : at + _ATTRIBUTE.size + length]
        at += _ATTRIBUTE.size + -(-length // 4) * 4  # padded to whole words, RFC 8489 §14
    return found


def _pack_endpoint(kind: int, endpoint: Endpoint, *, xor: bool = False) -> bytes:
    address = int.from_bytes(socket.inet_aton(endpoint[0]), "big") ^ (_MAGIC_COOKIE if xor else 0)
    port = endpoint[1] ^ (_MAGIC_COOKIE >> 16 if xor else 0)
    return _ATTRIBUTE.pack(kind, 8) + struct.pack("!xBHI", _IPV4, port, address)


def _unpack_endpoint(value: bytes, *, xor: bool = False) -> Endpoint:
    _, port, address = struct.unpack("!xBHI", value)
    address ^= _MAGIC_COOKIE if xor else 0
    return socket.inet_ntoa(address.to_bytes(4, "big")), port ^ (_MAGIC_COOKIE >> 16 if xor else 0)


class _Server:
    """Four sockets: each address with each port."""

    def __init__(self, address: str, other_address: str) -> None:
        self._addresses = (address, other_address)
        self._sockets: dict[Endpoint, socket.socket] = {}
        for bound in self._addresses:
            for port in (PORT, OTHER_PORT):
                opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                opened.bind((bound, port))
                self._sockets[bound, port] = opened

    def serve(self) -> None:
        with selectors.DefaultSelector() as ready:
            for endpoint, opened in self._sockets.items():
                ready.register(opened, selectors.EVENT_READ, endpoint)
            while True:
                for key, _ in ready.select():
                    self._answer(key.data)

    def _answer(self, asked: Endpoint) -> None:
        message, client = self._sockets[asked].recvfrom(2048)
        if len(message) < _HEADER.size:
            return
        kind, _, cookie, transaction = _HEADER.unpack_from(message)
        if (kind, cookie) != (_BINDING_REQUEST, _MAGIC_COOKIE):
            return
        change = int.from_bytes(_attributes(message).get(_CHANGE_REQUEST, b""), "big")
        other = self._other(asked, address=True, port=True)
        origin = self._other(asked, address=bool(change & _CHANGE_ADDRESS), port=bool(change & _CHANGE_PORT))
        attributes = (
            _pack_endpoint(_XOR_MAPPED_ADDRESS, client, xor=True)
            + _pack_endpoint(_RESPONSE_ORIGIN, origin)
            + _pack_endpoint(_OTHER_ADDRESS, other)
        )
        header = _HEADER.pack(_BINDING_RESPONSE, len(attributes), _MAGIC_COOKIE, transaction)
        self._sockets[origin].sendto(header + attributes, client)

    def _other(self, endpoint: Endpoint, *, address: bool, port: bool) -> Endpoint:
        here, there = self._addresses if endpoint[0] == self._addresses[0] else self._addresses[::-1]
        other_port = OTHER_PORT if endpoint[1] == PORT else PORT
        return there if address else here, other_port if port else endpoint[1]


def main() -> None:
    """Serves until it is ended by a signal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("address")
    parser.add_argument("other_address")
    arguments = parser.parse_args()
    server = _Server(arguments.address, arguments.other_address)
    print(READY, flush=True)
    server.serve()


if __name__ == "__main__":
    main()
