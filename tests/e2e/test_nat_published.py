"""Published ports: open to everybody, inside and outside, for as long as the operator wants.

::

    client  (alice) ──┐
                      ├ switch ── gateway ── internet 203.0.113.9
    client2 (bob)   ──┘           203.0.113.1

The gateway has two shards; alice lives on the first and bob on the second, and a port belongs to the shard of its
remainder by two. So each client gets an even and an odd port.
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from tidegate.lab import udpecho, webserver
from tidegate.lab.processes import CommandError
from tidegate.lab.stacks import TidegateClient, TidegateGateway
from tidegate.lab.topology import BEYOND, GATEWAY_EXTERNAL, INTERNET, Lab, Namespace
from tidegate.lab.waiting import wait_until

from .conftest import MakeWorld

pytestmark = pytest.mark.namespaces

FEW_PORTS = "[gateway]\nshards = 2\n[nat]\nport_range = [40000, 40199]\n"
"""So few that the NAT reserves all of them, 100 for each shard."""


@dataclass
class Fair:
    lab: Lab
    gateway: TidegateGateway
    inner: dict[str, str]
    """The clients' addresses inside the VPN, by name."""
    clients: list[TidegateClient]

    def publish(self, ports: str, to: str) -> None:
        self.gateway.command("publish", "add", ports, "--to", to)

    def remove(self, ports: str) -> None:
        self.gateway.command("publish", "remove", ports)

    def listed(self) -> dict[str, tuple[str, str]]:
        """What ``publish list`` says: target and state by external port."""
        answer = json.loads(self.gateway.command("publish", "list", "--json"))
        return {entry["external"]: (entry["to"], entry["state"]) for entry in answer["publications"]}

    def host(self, name: str) -> Namespace:
        return self.lab.clients[list(self.inner).index(name)]


@pytest.fixture(scope="module")
def fair(make_world: MakeWorld) -> Iterator[Fair]:
    world = make_world(clients=2, config=FEW_PORTS)
    gateway = world.tidegate
    inner, clients = {}, []
    for name, host in zip(("alice", "bob"), world.lab.clients, strict=True):
        client = TidegateClient(host, gateway.add_peer(name))
        client.start()
        clients.append(client)
        inner[name] = inner_address(gateway, name)
        for server in ([webserver.__name__, inner[name]], [udpecho.__name__, inner[name]]):
            ready = webserver.READY if server[0] == webserver.__name__ else udpecho.READY
            host.popen([sys.executable, "-m", *server], name=server[0].split(".")[-1]).wait_for(ready)
    yield Fair(world.lab, gateway, inner, clients)
    gateway.stop()


def inner_address(gateway: TidegateGateway, name: str) -> str:
    peers = json.loads(gateway.command("peer", "list", "--json"))["peers"]
    found: str = next(peer["address"] for peer in peers if peer["name"] == name)
    return found


def web_answers(host: Namespace, port: int, *, within: float = 5.0) -> bool:
    """Whether a web server answers on that port of the gateway's external address."""
    command = ["curl", "-sS", "--fail", "--max-time", f"{within:g}", f"http://{GATEWAY_EXTERNAL}:{port}/"]
    return host.run(command, check=False).stdout.startswith("Hello")


def whoami(host: Namespace, port: int, *, patience: float = 2.0) -> str | None:
    """Which endpoint the UDP echo server behind a published port sees; None if it does not answer."""

    def ask() -> str | None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(patience)
            client.connect((GATEWAY_EXTERNAL, port))  # so that only that port's answers are taken
            try:
                client.send(udpecho.WHOAMI)
                return client.recv(100).decode()
            except (TimeoutError, ConnectionRefusedError):
                return None

    return host.call(ask)


@pytest.mark.parametrize("name", ["alice", "bob"])
@pytest.mark.parametrize("port", [8080, 8081])
def test_a_published_tcp_port_is_reached_from_outside_and_from_every_client(
    fair: Fair, name: str, port: int
) -> None:
    fair.publish(f"tcp/{port}", f"{name}:80")
    try:
        assert fair.listed() == {f"tcp/{port}": (f"{name}:80", "active")}
        hosts = [fair.lab.internet, fair.lab.beyond, *fair.lab.clients]
        assert {host.role: web_answers(host, port) for host in hosts} == {host.role: True for host in hosts}
    finally:
        fair.remove(f"tcp/{port}")
    assert fair.listed() == {}
    # Closed: nobody serves it, the host's kernel included, which has its port back and says so.
    assert not web_answers(fair.lab.internet, port, within=1.0)
    assert not web_answers(fair.host("alice"), port, within=1.0)
    with fair.lab.gateway.call(lambda: bound(port)):
        pass


@pytest.mark.parametrize("name", ["alice", "bob"])
def test_a_range_of_udp_ports_leads_to_as_many_ports(fair: Fair, name: str) -> None:
    fair.publish("udp/27000-27003", f"{name}:5")  # ... whose third is the echo server's, 7
    try:
        assert fair.listed() == {"udp/27000-27003": (f"{name}:5-8", "active")}
        other = fair.host("bob" if name == "alice" else "alice")
        seen = whoami(fair.lab.internet, 27_002)
        assert seen is not None
        assert seen.split(":")[0] == INTERNET, "the published server sees who really asks"
        hairpinned = whoami(other, 27_002)
        assert hairpinned is not None
        assert hairpinned.split(":")[0] == GATEWAY_EXTERNAL, "RFC 4787 REQ-9a"
    finally:
        fair.remove("udp/27000-27003")
    assert whoami(fair.lab.internet, 27_002, patience=0.5) is None


def test_what_a_published_server_opens_itself_comes_from_its_published_port(fair: Fair) -> None:
    fair.publish("udp/27011", "bob:6000")

    def faces() -> set[str]:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
            server.settimeout(5)
            server.bind(("", 6000))
            seen = set()
            for destination in (INTERNET, BEYOND):
                server.sendto(udpecho.WHOAMI, (destination, udpecho.PORT))
                seen.add(server.recv(100).decode())
            return seen

    try:
        assert fair.host("bob").call(faces) == {f"{GATEWAY_EXTERNAL}:27011"}
    finally:
        fair.remove("udp/27011")


def test_a_published_port_is_lent_to_nobody(fair: Fair) -> None:
    # Each of these ports is the NAT's, on one shard or the other, before it is published. Not one that it has lent to
    # an earlier test's connection: that one is refused, and rightly.
    lent_before = {port for _, port in lent_ports(fair)}
    even, odd = (
        [port for port in range(first, 40_200, 2) if port not in lent_before] for first in (40_000, 40_001)
    )
    published = {even[0]: "alice:80", odd[0]: "alice:81", even[1]: "bob:80", odd[1]: "bob:81"}
    try:
        for port, to in published.items():
            fair.publish(f"tcp/{port}", to)
        with ExitStack() as stack:
            for host in fair.lab.clients:
                lent = {port for _, port in mappings_after(fair, host, 150, stack)}
                assert not lent & published.keys(), "port shadowing: a published port was lent to a client"
            assert web_answers(fair.lab.internet, even[0])
            assert web_answers(fair.lab.internet, even[1])
    finally:
        for external in fair.listed():
            fair.remove(external)


def lent_ports(fair: Fair) -> set[tuple[str, int]]:
    """Inner endpoints of TCP mappings, and the external ports that the NAT has lent to them."""
    listed = json.loads(fair.gateway.command("nat", "list", "--json"))["mappings"]
    return {
        (entry["internal"], int(entry["external"].rpartition(":")[2]))
        for entry in listed
        if entry["protocol"] == "tcp" and entry["state"] != "published"
    }


def mappings_after(fair: Fair, host: Namespace, count: int, stack: ExitStack) -> set[tuple[str, int]]:
    """Opens connections until the NAT has no ports left, and returns the external endpoints of TCP mappings."""

    def connect() -> list[socket.socket]:
        opened = []
        for number in range(count):
            connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            connection.setblocking(False)
            connection.connect_ex((INTERNET if number % 2 else BEYOND, 80))
            opened.append(connection)
        return opened

    for connection in host.call(connect):
        stack.callback(connection.close)

    wait_until(lambda: len(lent_ports(fair)) >= 90, "the NAT to lend its ports", timeout=5, interval=0.2)
    return lent_ports(fair)


def bound(port: int) -> socket.socket:
    holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    holder.bind(("", port))
    return holder


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])
def test_a_port_of_a_host_program_is_refused_by_name_and_whole(fair: Fair, kind: socket.SocketKind) -> None:
    protocol = "tcp" if kind == socket.SOCK_STREAM else "udp"

    def hold() -> socket.socket:
        holder = socket.socket(socket.AF_INET, kind)
        holder.bind(("", 9002))
        return holder

    with fair.lab.gateway.call(hold), pytest.raises(CommandError) as refused:
        fair.publish(f"{protocol}/9000-9003", "alice")
    message = " ".join(refused.value.output.split())
    assert f"{protocol}/9002" in message, message
    assert "9002" in message
    assert "Traceback" not in message
    assert len(refused.value.output.strip().splitlines()) <= 6, refused.value.output
    assert fair.listed() == {}, "all ports or none"
    fair.publish(f"{protocol}/9000-9003", "alice")  # nothing was left behind
    fair.remove(f"{protocol}/9000-9003")


def test_a_target_that_is_published_already_is_refused_for_that_reason(fair: Fair) -> None:
    fair.publish("tcp/8080", "alice:80")
    try:
        with pytest.raises(CommandError) as refused:
            fair.publish("tcp/8081", "alice:80")
        message = " ".join(refused.value.output.split())
        assert "published" in message
        assert "program on the host" not in message, message
        with fair.lab.gateway.call(lambda: bound(8081)):
            pass  # what was refused is not reserved
    finally:
        fair.remove("tcp/8080")


def test_publications_outlive_the_gateway_and_tell_when_the_host_took_their_port(fair: Fair) -> None:
    fair.publish("tcp/8080", "bob:80")
    fair.publish("udp/27000", "alice:7")
    try:
        fair.gateway.stop()
        assert fair.listed()["tcp/8080"] == ("bob:80", "not running")
        with fair.lab.gateway.call(lambda: bound(8080)):
            fair.gateway.start()
            assert fair.listed()["tcp/8080"][1] == "failed"
            assert fair.listed()["udp/27000"][1] == "active"
            assert "tcp/8080" in fair.gateway.process.output()
            fair.gateway.stop()
        fair.gateway.start()
        assert fair.listed()["tcp/8080"][1] == "active"
        for client in fair.clients:  # left alone, they would find out within 15 s of having something to say
            client.stop()
            client.start()
        assert web_answers(fair.lab.internet, 8080)
        assert whoami(fair.lab.internet, 27_000) is not None
    finally:
        fair.remove("tcp/8080")
        fair.remove("udp/27000")


def test_nat_list_and_stats_say_what_there_is(fair: Fair) -> None:
    def talk(name: str) -> int:
        def send() -> int:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.settimeout(5)
                client.sendto(udpecho.WHOAMI, (INTERNET, udpecho.PORT))
                return int(client.recv(100).decode().split(":")[1])

        return fair.host(name).call(send)

    ports = {name: talk(name) for name in fair.inner}
    for name, other in (("alice", "bob"), ("bob", "alice")):
        answer = json.loads(fair.gateway.command("nat", "list", "--peer", name, "--json"))
        udp = [entry for entry in answer["mappings"] if entry["protocol"] == "udp"]
        assert {entry["peer"] for entry in answer["mappings"]} == {name}
        assert f"{GATEWAY_EXTERNAL}:{ports[name]}" in {entry["external"] for entry in udp}
        assert f"{GATEWAY_EXTERNAL}:{ports[other]}" not in {entry["external"] for entry in udp}
        assert INTERNET not in json.dumps(answer), "RFC 6888 REQ-12: no destinations"
        text = fair.gateway.command("nat", "list", "--peer", name)
        assert f"{GATEWAY_EXTERNAL}:{ports[name]}" in text
        for external in (f"{GATEWAY_EXTERNAL}:{ports[name]}", str(ports[name])):
            answer = json.loads(fair.gateway.command("nat", "list", "--external", external, "--json"))
            holders = {entry["peer"] for entry in answer["mappings"] if entry["protocol"] == "udp"}
            assert holders == {name}
    stats = json.loads(fair.gateway.command("nat", "stats", "--json"))
    assert stats["mappings"]["udp"] >= 2
    assert stats["reserved_ports"]["udp"] >= 200
    assert stats["limits"]["max_mappings_per_client"] == 16_384
    with pytest.raises(CommandError) as refused:
        fair.gateway.command("nat", "list", "--peer", "nobody")
    assert "nobody" in refused.value.output
