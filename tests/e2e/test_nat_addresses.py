"""A gateway with two external addresses: each client has one of them for everything it does.

::

    client  ──┐                     ┌─ 203.0.113.1  ─┐
              ├ switch ── gateway ──┤                ├── internet 203.0.113.9 ── beyond 192.0.2.9
    client2 ──┘                     └─ 203.0.113.20 ─┘

Which address a client gets is drawn by its own inner address and a secret of the gateway. So that both are seen for
certain, clients come and go until they have been.
"""

from __future__ import annotations

import json
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from tidegate.lab import checks, udpecho, webserver
from tidegate.lab.topology import BEYOND, GATEWAY_EXTERNAL, INTERNET, Namespace

from .conftest import MakeWorld, World

pytestmark = pytest.mark.namespaces

SECOND = "203.0.113.20"
ADDRESSES = {GATEWAY_EXTERNAL, SECOND}
ENOUGH = 16
"""Clients until both addresses have been seen; that one is not happens once in 32,768 times."""


@dataclass
class Pair:
    """Two clients whose external addresses differ."""

    world: World
    homes: dict[str, Namespace]
    """Where the client is that has this address."""


@pytest.fixture(scope="module")
def pair(make_world: MakeWorld) -> Iterator[Pair]:
    config = f'[external]\naddresses = ["{GATEWAY_EXTERNAL}", "{SECOND}"]\n'
    world = make_world(clients=2, config=config, more_addresses=[SECOND])
    assert set(world.tidegate.status()["external_addresses"]) == ADDRESSES
    first, second = world.lab.clients
    world.connect(first, name="first")
    homes = {home_of(first): first}
    for number in range(ENOUGH):
        client = world.connect(second, name=f"second-{number}")
        home = home_of(second)
        assert home in ADDRESSES
        if home not in homes:
            homes[home] = second
            break
        client.stop()
    assert set(homes) == ADDRESSES, "one address is never used"
    yield Pair(world, homes)
    world.gateway.stop()


def home_of(host: Namespace) -> str:
    """The address that the internet sees of the client."""
    with udp_socket(host, 0) as client:
        return face_of(client)[0]


def face_of(client: socket.socket, destination: str = INTERNET) -> tuple[str, int]:
    client.sendto(udpecho.WHOAMI, (destination, udpecho.PORT))
    address, port = client.recv(100).decode().split(":")
    return address, int(port)


def udp_socket(host: Namespace, port: int) -> socket.socket:
    def opened() -> socket.socket:
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        client.settimeout(5)
        client.bind(("", port))
        return client

    return host.call(opened)


def test_all_that_a_client_sends_comes_from_one_address(pair: Pair) -> None:
    # RFC 4787 REQ-2: UDP, TCP and ICMP, from many ports, to several destinations.
    internet = pair.world.lab.internet
    for home, host in pair.homes.items():
        with ExitStack() as stack:
            sockets = [stack.enter_context(udp_socket(host, port)) for port in range(41_000, 41_020)]
            faces = {face_of(client, to) for client in sockets for to in (INTERNET, BEYOND)}
        assert {address for address, _ in faces} == {home}
        assert len(faces) == len(sockets), "RFC 4787 REQ-1: one mapping for both destinations"
        for destination in (INTERNET, BEYOND):
            answer = host.run(["curl", "-sS", "--fail", "--max-time", "10", f"http://{destination}/whoami"])
            assert json.loads(answer.stdout)["address"] == home
        with internet.capture("external", "icmp[icmptype] == icmp-echo") as pings:
            assert checks.ping(host, INTERNET, count=3, interval=0.02).complete
        lines = pings.lines()
        assert lines
        assert all(f"IP {home} > {INTERNET}" in line for line in lines), lines


def test_traceroute_and_large_datagrams_work_from_either_address(pair: Pair) -> None:
    for host in pair.homes.values():
        assert checks.traceroute(host, BEYOND, method="-U")[1:] == [INTERNET, BEYOND]
        with udp_socket(host, 0) as client:
            client.sendto(bytes(8192), (INTERNET, udpecho.PORT))
            assert client.recv(65_535) == bytes(8192)


def test_connections_from_the_same_port_to_the_same_server_live_side_by_side(pair: Pair) -> None:
    def calling() -> socket.socket:
        caller = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        caller.settimeout(5)
        caller.bind(("", 42_000))
        caller.connect((INTERNET, 80))
        return caller

    request = b"GET /whoami HTTP/1.1\r\nHost: internet\r\nConnection: close\r\n\r\n"
    with ExitStack() as stack:
        callers = {h: stack.enter_context(host.call(calling)) for h, host in pair.homes.items()}
        for caller in callers.values():
            caller.send(request)
        for home, caller in callers.items():
            answer = b"".join(iter(lambda caller=caller: caller.recv(4096), b""))  # type: ignore[misc]
            seen = re.search(rb'"address": "([\d.]+)"', answer)
            assert seen is not None, answer
            assert seen[1].decode() == home


def test_clients_reach_each_other_from_one_external_address_to_the_other(pair: Pair) -> None:
    # Hairpinning (RFC 4787 REQ-9): each sees the other's external endpoint.
    one, other = pair.homes.values()
    with udp_socket(one, 0) as left, udp_socket(other, 0) as right:
        left_face, right_face = face_of(left), face_of(right)
        assert left_face[0] != right_face[0]
        left.sendto(b"opens the filter", right_face)
        face_of(left)  # by now that was dealt with
        right.sendto(b"to the left", left_face)
        assert left.recvfrom(100) == (b"to the left", right_face)
        left.sendto(b"to the right", right_face)
        assert right.recvfrom(100) == (b"to the right", left_face)


def test_a_published_port_is_at_the_first_address_wherever_its_client_is_at_home(pair: Pair) -> None:
    world = pair.world
    peers = json.loads(world.tidegate.command("peer", "list", "--json"))["peers"]
    for port, host in enumerate(pair.homes.values(), start=8080):
        inner = re.findall(r"inet (10[.]66[.]77[.]\d+)", host.run(["ip", "-4", "address"]).stdout)[0]
        name = next(peer["name"] for peer in peers if peer["address"] == inner)
        command = [sys.executable, "-m", webserver.__name__, inner]
        host.popen(command, name=f"webserver-{port}").wait_for(webserver.READY)
        world.tidegate.command("publish", "add", f"tcp/{port}", "--to", f"{name}:80")
        told = json.loads(world.tidegate.command("publish", "list", "--json"))["publications"]
        assert [entry["state"] for entry in told if entry["external"] == f"tcp/{port}"] == ["active"]

        def answers(address: str, port: int = port) -> str:
            command = ["curl", "-sS", "--max-time", "3", f"http://{address}:{port}/"]
            return world.lab.internet.run(command, check=False).stdout

        assert answers(GATEWAY_EXTERNAL).startswith("Hello")
        assert answers(SECOND) == ""
        world.tidegate.command("publish", "remove", f"tcp/{port}")
        assert answers(GATEWAY_EXTERNAL) == ""


def test_the_hosts_ports_are_free_and_the_nats_are_not_on_both_addresses(pair: Pair) -> None:
    def bound(address: str, port: int) -> bool:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as program:
            try:
                program.bind((address, port))
            except OSError:
                return False
            return True

    gateway = pair.world.lab.gateway
    for home, host in pair.homes.items():
        with udp_socket(host, 0) as client:
            port = face_of(client)[1]
            assert not gateway.call(lambda home=home, port=port: bound(home, port))  # type: ignore[misc]
