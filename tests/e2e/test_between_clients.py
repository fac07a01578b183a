"""Several clients of one gateway: they reach each other, and do not get in each other's way.

::

    client  198.51.100.2 ──┐                     ┌── internet 203.0.113.9
    client2 198.51.100.3 ──┤ switch ── gateway ──┤
    client3 198.51.100.4 ──┘           10.66.77.1└── (beyond it) 192.0.2.9
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from http.client import HTTPResponse

import pytest

from tidegate.lab import checks, udpecho
from tidegate.lab.blob import blob_sha256
from tidegate.lab.services import start_iperf_server, start_web_server
from tidegate.lab.stacks import TidegateClient, WireguardGoClient
from tidegate.lab.topology import BEYOND, GATEWAY_EXTERNAL, INTERNET, Lab, Namespace
from tidegate.lab.webserver import READY

from .conftest import MakeWorld

pytestmark = pytest.mark.namespaces

MIB = 1 << 20


@dataclass
class Party:
    lab: Lab
    inner: list[str]
    """The clients' addresses inside the VPN."""


@pytest.fixture(scope="module")
def party(make_world: MakeWorld) -> Iterator[Party]:
    world = make_world(clients=3)
    own = WireguardGoClient if world.reference else TidegateClient
    kinds = [own, own, WireguardGoClient]
    for host, kind in zip(world.lab.clients, kinds, strict=True):
        world.connect(host, kind)
    yield Party(world.lab, [inner_address(host) for host in world.lab.clients])
    world.gateway.stop()


def inner_address(host: Namespace) -> str:
    found = re.search(r"inet (10\.66\.77\.\d+)", host.run(["ip", "-o", "-4", "address"]).stdout)
    assert found is not None
    return found[1]


def test_every_client_has_an_address_of_its_own(party: Party) -> None:
    assert len(set(party.inner)) == len(party.inner)


def test_every_client_can_ping_every_other(party: Party) -> None:
    for here in party.lab.clients:
        for there in party.inner:
            assert checks.ping(here, there, count=5, interval=0.02).complete, f"{here.role} to {there}"


def test_a_transfer_between_clients_is_intact(party: Party) -> None:
    _, second, third = party.lab.clients
    for host, address in ((second, party.inner[1]), (third, party.inner[2])):
        start_web_server(host, address).wait_for(READY)
        transfer = checks.download(party.lab.client, f"http://{address}/blob/between/{64 * MIB}")
        assert transfer.sha256 == blob_sha256("between", 64 * MIB)


def test_iperf3_runs_between_clients(party: Party) -> None:
    start_iperf_server(party.lab.clients[1], party.inner[1])
    assert checks.tcp_throughput(party.lab.client, party.inner[1], seconds=1.0) > 1e6


def test_the_same_source_port_on_two_clients_serves_both(party: Party) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(udp_socket(host, 40_000)) for host in party.lab.clients]
        faces = set()
        for client in clients:
            client.sendto(udpecho.WHOAMI, (INTERNET, udpecho.PORT))
            faces.add(client.recv(100).decode())
        assert len(faces) == len(clients), faces
        assert {face.split(":")[0] for face in faces} == {GATEWAY_EXTERNAL}
        for number, client in enumerate(clients):  # all three are still told apart
            client.sendto(f"client {number}".encode(), (INTERNET, udpecho.PORT))
        for number, client in enumerate(clients):
            assert client.recv(100) == f"client {number}".encode()


def test_the_same_tcp_source_port_on_two_clients_serves_both(party: Party) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(tcp_socket(host, 40_001)) for host in party.lab.clients]
        for client in clients:
            client.connect((INTERNET, 80))
        for client in clients:  # all three are open now
            client.sendall(b"GET /whoami HTTP/1.0\r\n\r\n")
        faces = set()
        for client in clients:
            answer = HTTPResponse(client)
            answer.begin()
            seen = json.load(answer)
            faces.add((seen["address"], seen["port"]))
    assert len(faces) == len(clients), faces
    assert {address for address, _ in faces} == {GATEWAY_EXTERNAL}


def test_a_mapping_is_the_same_towards_every_destination(party: Party) -> None:
    with udp_socket(party.lab.client, 40_002) as client:
        faces = set()
        for destination in (INTERNET, BEYOND):
            client.sendto(udpecho.WHOAMI, (destination, udpecho.PORT))
            faces.add(client.recv(100))
    assert len(faces) == 1, "endpoint-independent mapping, RFC 4787 REQ-1"


def test_two_clients_can_talk_through_their_external_addresses(party: Party) -> None:
    # Hairpinning, RFC 4787 REQ-9: what a game or a call does that learned its address from a STUN server.
    with udp_socket(party.lab.clients[0], 0) as left, udp_socket(party.lab.clients[1], 0) as right:
        faces = []
        for client in (left, right):
            client.sendto(udpecho.WHOAMI, (INTERNET, udpecho.PORT))
            address, port = client.recv(100).decode().split(":")
            faces.append((address, int(port)))
        left.sendto(b"opens the filter", faces[1])
        left.sendto(udpecho.WHOAMI, (INTERNET, udpecho.PORT))
        left.recv(100)  # so that this was dealt with; two clients' packets have no order between them
        right.sendto(b"to the left", faces[0])
        data, sender = left.recvfrom(100)
        assert (data, sender) == (b"to the left", faces[1])


def udp_socket(host: Namespace, port: int) -> socket.socket:
    return bound_socket(host, socket.SOCK_DGRAM, port)


def tcp_socket(host: Namespace, port: int) -> socket.socket:
    return bound_socket(host, socket.SOCK_STREAM, port)


def bound_socket(host: Namespace, kind: socket.SocketKind, port: int) -> socket.socket:
    """A socket of a client, bound to `port`."""

    def open_socket() -> socket.socket:
        opened = socket.socket(socket.AF_INET, kind)
        opened.bind(("", port))
        opened.settimeout(5)
        return opened

    return host.call(open_socket)
