"""What attacks have in common: the battlefield, and lines of talk that an attack must not disturb; forged packets, and
whether what came of them is true. `test_attacks.py` draws the field."""

from __future__ import annotations

import random
import re
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tidegate.control.commands import NatList
from tidegate.lab import udpecho
from tidegate.lab.processes import Process
from tidegate.lab.stacks import TidegateGateway
from tidegate.lab.topology import BEYOND, GATEWAY_EXTERNAL, Capture, Lab, Namespace
from tidegate.lab.waiting import wait_until

from .lab import connections, forge

ECHO = (BEYOND, 7_000)
"""A TCP server that sends back what it gets."""
SWEEP = 1 << 16
"""Sequence numbers that are tried: one per 64 KiB, so that one of them lies in any window of that size."""


@dataclass
class Battle:
    """Alice and Bob, who talk; Mallory, a peer who lies; Eve, on the path; and the gateway between them."""

    lab: Lab
    gateway: TidegateGateway
    inner: dict[str, str]
    """The peers' addresses in the VPN."""
    mallory_interface: str

    @property
    def alice(self) -> Namespace:
        return self.lab.clients[0]

    @property
    def bob(self) -> Namespace:
        return self.lab.clients[1]

    @property
    def mallory(self) -> Namespace:
        return self.lab.clients[2]

    @property
    def eve(self) -> Namespace:
        return self.lab.internet

    def drops(self, *reasons: str) -> int:
        counted: dict[str, int] = self.gateway.status()["drops"]
        return sum(counted.get(reason, 0) for reason in reasons)

    def mappings(self, name: str, protocol: str) -> dict[int, str]:
        """External ports of a peer's mappings, and their states."""
        return {
            int(mapping.external.rpartition(":")[2]): mapping.state
            for mapping in self.gateway.ask(NatList(peer=name)).mappings
            if mapping.protocol == protocol
        }

    @contextmanager
    def counted_drops(self, at_least: int, *reasons: str) -> Iterator[None]:
        """Asserts how many packets were dropped for these reasons together while the context lasted."""
        before = self.drops(*reasons)
        yield
        wait_until(
            lambda: self.drops(*reasons) - before >= at_least, f"{at_least} drops of {reasons}", interval=0.2
        )

    @contextmanager
    def seen_from_outside(self, at_least: int) -> Iterator[None]:
        """Asserts how many packets from outside the gateway passed or dropped while the context lasted."""

        def seen() -> int:
            status = self.gateway.status()
            passed: int = status["packets"]["from_external"]
            dropped: int = sum(status["drops"].values())
            return passed + dropped

        before = seen()
        yield
        wait_until(lambda: seen() - before >= at_least, f"{at_least} packets to be seen", interval=0.2)

    @contextmanager
    def watched(self, *inside: Namespace, expression: str = "ip") -> Iterator[list[Capture]]:
        """Captures what reaches clients through their tunnels."""
        with ExitStack() as stack:
            yield [
                stack.enter_context(host.capture(tunnel_of(host), expression, snaplen=128)) for host in inside
            ]


def tunnel_of(host: Namespace) -> str:
    """The name of a client's TUN device."""
    return next(name for name in host.interfaces() if name.startswith(("tidegate", "wg")))


def start_echo(host: Namespace, address: str) -> Process:
    command = [sys.executable, connections.__file__, "serve", address, str(ECHO[1])]
    return host.popen(command, name="connections-serve")


@dataclass
class Line:
    """An open TCP connection of a client to the echo server."""

    connection: socket.socket
    face: int
    """Its external port."""

    def answers(self) -> bool:
        try:
            self.connection.sendall(b"still there?")
            return self.connection.recv(100) == b"still there?"
        except OSError:
            return False


@contextmanager
def line_of(battle: Battle, host: Namespace, name: str) -> Iterator[Line]:
    """Calls the echo server from `host`, as the peer of that name."""
    before = battle.mappings(name, "tcp")
    with host.call(lambda: socket.create_connection(ECHO, timeout=10)) as connection:
        (face,) = battle.mappings(name, "tcp").keys() - before.keys()
        line = Line(connection, face)
        assert line.answers()
        yield line


@contextmanager
def flow_of(host: Namespace, server: str = BEYOND) -> Iterator[tuple[socket.socket, int]]:
    """A UDP socket that talks to an echo server, and its external port."""
    with host.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as client:
        client.settimeout(5)
        client.sendto(udpecho.WHOAMI, (server, udpecho.PORT))
        yield client, int(client.recv(100).decode().split(":")[1])


def tcp_sweep(
    source: forge.Endpoint, destination: forge.Endpoint, flags: int, offset: int, *, step: int = SWEEP
) -> Iterator[bytes]:
    """Segments with sequence and acknowledgment numbers from everywhere, one per `step`."""
    for seq in range(offset, 1 << 32, step):
        # The checksum is linear: with ACK = -SEQ (in ones' complement) it stays what it was.
        segment = bytearray(_template(source, destination, flags))
        struct.pack_into("!II", segment, 24, seq, 0xFFFFFFFF ^ seq)
        yield bytes(segment)


_templates: dict[tuple[object, ...], bytes] = {}


def _template(source: forge.Endpoint, destination: forge.Endpoint, flags: int) -> bytes:
    key = (source, destination, flags)
    if key not in _templates:
        _templates[key] = forge.tcp(source, destination, flags, seq=0, ack=0xFFFFFFFF)
    return _templates[key]


def mac_of(host: Namespace, interface: str) -> bytes:
    shown = host.run(["ip", "-o", "link", "show", interface]).stdout
    found = re.search(r"link/ether ([\da-f:]+)", shown)
    assert found is not None
    return bytes.fromhex(found[1].replace(":", ""))


def lie(chance: random.Random, packet: bytes) -> bytes:
    """The packet with something wrong: cut, prolonged, or with a field that does not fit the others."""
    lying = bytearray(packet)
    match chance.randrange(6):
        case 0:
            return bytes(lying[: chance.randrange(len(lying))])
        case 1:  # total length
            struct.pack_into("!H", lying, 2, chance.choice([0, 1, 19, 20, len(lying) + 1, 65_535]))
        case 2:  # header length and version
            lying[0] = chance.randrange(256)
        case 3:  # UDP length, or TCP's data offset
            at, size = (24, 2) if lying[9] == forge.UDP else (32, 1)
            lying[at : at + size] = chance.randbytes(size)
        case 4:  # a quoted packet, or the payload
            lying[28:] = chance.randbytes(len(lying) - 28)
        case _:
            for _ in range(chance.randrange(1, 6)):
                lying[chance.randrange(len(lying))] = chance.randrange(256)
    if chance.random() < 0.7:  # half of the lies are told with a straight face
        lying[10:12] = b"\0\0"
        lying[10:12] = forge.checksum(bytes(lying[:20])).to_bytes(2, "big")
    return bytes(lying)


def packets_of(pcap: Path) -> Iterator[bytes]:
    """The packets of a pcap file (in the machine's byte order)."""
    data = pcap.read_bytes()
    at = 24
    while at + 16 <= len(data):
        (kept,) = struct.unpack_from("=I", data, at + 8)
        yield data[at + 16 : at + 16 + kept]
        at += 16 + kept


def is_true(packet: bytes, *, from_us: str) -> bool:
    """Whether the IPv4 header is correct, if the packet came through the gateway at all."""
    if from_us == "inside" and packet[12:16] != socket.inet_aton(GATEWAY_EXTERNAL):
        return True
    header = (packet[0] & 15) * 4
    (total,) = struct.unpack_from("!H", packet, 2)
    return packet[0] >> 4 == 4 and header >= 20 and total >= header and forge.checksum(packet[:header]) == 0
