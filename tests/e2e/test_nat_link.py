"""The network of the gateway's host changes under it: the traffic goes on within seconds, and nobody polls.

::

    client ─── tunnel ─── gateway ─── internet 203.0.113.9
                          203.0.113.1          203.0.113.10 (a second router, with a link address of its own)
"""

from __future__ import annotations

import errno
import json
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from tidegate.lab import checks, udpecho, webserver
from tidegate.lab.processes import Process
from tidegate.lab.stacks import INNER_GATEWAY, TidegateGateway
from tidegate.lab.topology import BEYOND, GATEWAY_EXTERNAL, INTERNET, Lab, Namespace
from tidegate.lab.waiting import wait_until

from .conftest import MakeWorld
from .lab import connections

pytestmark = pytest.mark.namespaces

OTHER_ROUTER, OTHER_ROUTER_MAC = "203.0.113.10", "02:00:5e:00:01:0a"
OTHER_FACE = "203.0.113.77"
SLOW_NEIGHBOUR, SWITCHED_OFF = "203.0.113.11", "203.0.113.12"
CONTAINERS = "172.17.0.1"
RECOVERY = 12.0
"""Seconds, generous for a busy machine: what is waited for takes one or two."""
ECHO_PORT = 7_000
HOLD = """
import signal, socket, sys
listener = socket.create_server((sys.argv[1], int(sys.argv[2])))
print("holds", flush=True)
signal.pause()
"""
LATE = b"said after the restart"


@dataclass
class Scene:
    lab: Lab
    gateway: TidegateGateway

    def face(self, server: str = BEYOND) -> str | None:
        """The endpoint under which a fresh UDP flow appears; None if there is no answer."""

        def ask() -> str | None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.settimeout(0.5)
                client.sendto(udpecho.WHOAMI, (server, udpecho.PORT))
                try:
                    return client.recv(100).decode()
                except OSError:
                    return None

        return self.lab.client.call(ask)

    def packets_to_external(self) -> int:
        """Packets that went to the external interface, or wait for their next hop there."""
        count: int = self.gateway.status()["packets"].get("to_external", 0)
        return count

    def recovers(self) -> str:
        """Waits until fresh flows are answered, and returns the address that they appear under."""
        answers: list[str | None] = []

        def answered() -> bool:
            answers.append(self.face())
            return answers[-1] is not None

        wait_until(answered, "traffic to go on", timeout=RECOVERY, interval=0.1)
        assert answers[-1] is not None
        return answers[-1].split(":")[0]

    @contextmanager
    def lasting_connection(self) -> Iterator[None]:
        """A TCP connection that lasts from before the change until after it."""

        def answer(connection: socket.socket, said: bytes) -> bool:
            connection.sendall(said)
            return connection.recv(100) == said

        with self.lab.client.call(
            lambda: socket.create_connection((BEYOND, ECHO_PORT), timeout=2 * RECOVERY)
        ) as connection:
            assert answer(connection, b"before")
            yield
            assert answer(connection, b"after")


@pytest.fixture(scope="module")
def scene(make_world: MakeWorld) -> Iterator[Scene]:
    world = make_world(config="[gateway]\nshards = 2\n")
    lab, gateway = world.lab, world.tidegate
    world.connect(lab.client)
    start_connection_server(lab).wait_for(connections.READY)
    # A second router on the same link, which answers ARP for its own address only.
    for interface in ("all", "external"):
        lab.internet.sysctl(f"net.ipv4.conf.{interface}.arp_ignore", "1")
        lab.internet.sysctl(f"net.ipv4.conf.{interface}.arp_announce", "2")
    lab.internet.ip(f"link add second link external address {OTHER_ROUTER_MAC} type macvlan mode bridge")
    lab.internet.ip(f"address add {OTHER_ROUTER}/32 dev second")
    lab.internet.ip("link set second up")
    yield Scene(lab, gateway)
    gateway.stop()


def start_connection_server(lab: Lab) -> Process:
    command = [sys.executable, connections.__file__, "serve", BEYOND, str(ECHO_PORT)]
    return lab.beyond.popen(command, name="connections-serve")


def test_a_service_of_the_host_answers_from_an_address_that_the_host_got_a_moment_ago(scene: Scene) -> None:
    host = scene.lab.gateway
    host.ip("link add containers type bridge")
    host.ip(f"address add {CONTAINERS}/16 dev containers")
    host.ip("link set containers up")
    echo = host.popen([sys.executable, "-m", udpecho.__name__, CONTAINERS], name="containers-udpecho")
    echo.wait_for(udpecho.READY)
    wait_until(lambda: scene.face(CONTAINERS) is not None, "an answer of the host", timeout=RECOVERY)
    echo.stop()
    host.ip("link delete containers")


def test_another_default_route_is_followed_at_once(scene: Scene) -> None:
    to_other = f"ether dst {OTHER_ROUTER_MAC} and udp"
    with scene.lasting_connection():
        scene.lab.gateway.ip(f"route replace default via {OTHER_ROUTER}")
        wait_until(
            lambda: scene.gateway.status()["next_hop"] == OTHER_ROUTER, "the new route", timeout=RECOVERY
        )
        with scene.lab.gateway.capture("external", to_other) as seen:
            assert scene.recovers() == GATEWAY_EXTERNAL
        assert seen.lines(), "packets go to the new router"
    with scene.lasting_connection():
        scene.lab.gateway.ip(f"route replace default via {INTERNET}")
        wait_until(lambda: scene.gateway.status()["next_hop"] == INTERNET, "the old route", timeout=RECOVERY)
        assert scene.recovers() == GATEWAY_EXTERNAL


def test_without_a_default_route_the_client_is_told_and_with_one_it_is_served(scene: Scene) -> None:
    scene.lab.gateway.ip("route delete default")
    wait_until(lambda: scene.gateway.status()["next_hop"] is None, "no route", timeout=RECOVERY)
    ping = scene.lab.client.run(["ping", "-n", "-c", "1", "-W", "2", BEYOND], check=False).stdout
    assert f"From {INNER_GATEWAY}" in ping, ping
    assert "Net Unreachable" in ping, ping
    assert checks.ping(scene.lab.client, INTERNET, count=3, interval=0.02).complete, "what is on the link"
    scene.lab.gateway.ip(f"route add default via {INTERNET}")
    assert scene.recovers() == GATEWAY_EXTERNAL


def test_nothing_of_a_burst_is_lost_while_a_new_neighbour_is_resolved(scene: Scene) -> None:
    internet = scene.lab.internet
    internet.ip(f"address add {SLOW_NEIGHBOUR}/24 dev external")
    echo = internet.popen([sys.executable, "-m", udpecho.__name__, SLOW_NEIGHBOUR], name="slow-udpecho")
    echo.wait_for(udpecho.READY)
    internet.sysctl("net.ipv4.conf.all.arp_ignore", "8")  # no answer: the next request comes after a second
    # Of lengths that are no train. The kernel would hold about as many, in 208 KiB.
    burst = sorted(bytes([number]) * (1 + 37 * number % 130) for number in range(100))
    sent_before = scene.packets_to_external()
    with scene.lab.client.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as client:
        client.settimeout(RECOVERY)
        for datagram in burst:
            client.sendto(datagram, (SLOW_NEIGHBOUR, udpecho.PORT))
        wait_until(
            lambda: scene.packets_to_external() >= sent_before + len(burst), "the burst to reach the gateway"
        )
        internet.sysctl("net.ipv4.conf.all.arp_ignore", "1")
        assert sorted(client.recv(1000) for _ in burst) == burst
    echo.stop()


def test_who_connects_to_a_host_that_is_switched_off_is_told_so_within_seconds(scene: Scene) -> None:
    def attempt() -> int:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
            client.settimeout(RECOVERY)
            return client.connect_ex((SWITCHED_OFF, 80))

    assert scene.lab.client.call(attempt) == errno.EHOSTUNREACH, "when three requests were not answered"
    ports = scene.gateway.status()["mappings"]["tcp"]
    began = time.monotonic()
    assert scene.lab.client.call(attempt) == errno.EHOSTUNREACH
    assert time.monotonic() - began < 1, "it is known by now"
    assert scene.gateway.status()["mappings"]["tcp"] == ports, "no port is lent for it"


def test_a_router_that_was_replaced_is_found_at_its_new_link_address(scene: Scene) -> None:
    scene.lab.internet.sysctl("net.ipv4.conf.external.arp_notify", "1")  # as VRRP and hypervisors announce it
    with scene.lasting_connection():
        scene.lab.internet.ip("link set external address 02:00:5e:00:01:01")
        assert scene.recovers() == GATEWAY_EXTERNAL


def test_a_link_that_goes_down_and_comes_up_keeps_its_connections(scene: Scene) -> None:
    with scene.lasting_connection():
        scene.lab.gateway.ip("link set external down")
        assert scene.face() is None
        scene.lab.gateway.ip("link set external up")
        scene.lab.gateway.ip(f"route add default via {INTERNET}")  # the kernel took it away with the link
        assert scene.recovers() == GATEWAY_EXTERNAL
    with scene.lasting_connection():
        scene.lab.internet.ip("link set external down")  # no carrier
        assert scene.face() is None
        scene.lab.internet.ip("link set external up")
        assert scene.recovers() == GATEWAY_EXTERNAL


def test_another_address_is_used_from_now_on_and_has_the_published_ports(scene: Scene) -> None:
    def published_answers(address: str) -> bool:
        command = ["curl", "-sS", "--max-time", "2", f"http://{address}:8080/"]
        return scene.lab.internet.run(command, check=False).stdout.startswith("Hello")

    inner = scene.gateway.status()["peers"][0]["address"]
    server = scene.lab.client.popen([sys.executable, "-m", webserver.__name__, inner], name="webserver")
    server.wait_for(webserver.READY)
    scene.gateway.command("publish", "add", "tcp/8080", "--to", "client:80")
    assert published_answers(GATEWAY_EXTERNAL)
    before = scene.gateway.status()["reserved_ports"]

    for old, new in ((GATEWAY_EXTERNAL, OTHER_FACE), (OTHER_FACE, GATEWAY_EXTERNAL)):
        scene.lab.gateway.ip(f"address add {new}/24 dev external")
        scene.lab.gateway.sysctl("net.ipv4.conf.external.promote_secondaries", "1")
        scene.lab.gateway.ip(f"address delete {old}/24 dev external")
        scene.lab.gateway.ip(f"route replace default via {INTERNET}")
        wait_until(
            lambda new=new: scene.gateway.status()["external_addresses"] == [new],  # type: ignore[misc]
            "the new address",
            timeout=RECOVERY,
        )
        assert scene.recovers() == new
        wait_until(
            lambda new=new: published_answers(new),  # type: ignore[misc]
            "the published port at the new address",
            timeout=RECOVERY,
        )
    after = scene.gateway.status()["reserved_ports"]
    assert after["tcp"] <= before["tcp"] + 2_048, "ports of an address that is gone are given back"
    scene.gateway.command("publish", "remove", "tcp/8080")
    server.stop()


def test_a_published_port_that_is_taken_on_a_new_address_is_told_and_published_when_it_is_free(
    scene: Scene,
) -> None:
    def state() -> str:
        told = json.loads(scene.gateway.command("publish", "list", "--json"))
        (entry,) = told["publications"]
        return f"{entry['state']} {entry['detail']}"

    def until_addresses(*addresses: str) -> None:
        wait_until(
            lambda: scene.gateway.status()["external_addresses"] == list(addresses),
            "the new addresses",
            timeout=RECOVERY,
        )

    lab = scene.lab
    scene.gateway.command("publish", "add", "tcp/8080", "--to", "client:80")
    lab.gateway.ip(f"address add {OTHER_FACE}/24 dev external")
    holder = lab.gateway.popen([sys.executable, "-c", HOLD, OTHER_FACE, "8080"], name="holder")
    holder.wait_for("holds")
    lab.gateway.sysctl("net.ipv4.conf.external.promote_secondaries", "1")
    lab.gateway.ip(f"address delete {GATEWAY_EXTERNAL}/24 dev external")
    lab.gateway.ip(f"route replace default via {INTERNET}")
    until_addresses(OTHER_FACE)
    wait_until(lambda: state().startswith("failed"), "the failure to be told", timeout=RECOVERY)
    assert f"tcp/8080 on {OTHER_FACE}: " in state()

    holder.stop()
    lab.gateway.ip(f"address add {GATEWAY_EXTERNAL}/24 dev external")  # any change of the link
    wait_until(lambda: state() == "active None", "the port to be published", timeout=RECOVERY)
    scene.gateway.command("publish", "remove", "tcp/8080")


def test_an_interface_that_is_made_anew_is_taken_up(scene: Scene) -> None:
    lab = scene.lab
    lab.gateway.ip("link delete external")
    assert scene.face() is None
    lab.gateway.ip(f"link add external type veth peer name external netns {lab.internet.name}")
    lab.gateway.ip("link set external up")
    lab.internet.ip("link set external up")
    lab.gateway.ip(f"address add {GATEWAY_EXTERNAL}/24 dev external")
    lab.internet.ip(f"address add {INTERNET}/24 dev external")
    lab.gateway.ip(f"route add default via {INTERNET}")
    assert scene.recovers() == GATEWAY_EXTERNAL
    size = 16 << 20
    assert checks.download(lab.client, f"http://{INTERNET}/blob/anew/{size}").size == size


@pytest.mark.alone  # under load, the gateway sees the interface half set up
@pytest.mark.parametrize("seen", [True, False], ids=["seen", "between two looks"])
def test_an_interface_that_was_in_another_namespace_is_taken_up_again(scene: Scene, seen: bool) -> None:
    """With its old index: the kernel has unbound the packet sockets all the same, and does not bind them again."""
    lab = scene.lab
    index = lab.gateway.call(lambda: socket.if_nametoindex("external"))

    def all_at_once(*commands: tuple[Namespace, str]) -> None:
        lines = [f"ip -n {namespace.name} {arguments}" for namespace, arguments in commands]
        lab.gateway.run(["sh", "-c", " && ".join(lines)])

    away = (lab.gateway, f"link set external netns {lab.beyond.name}")
    back = (
        (lab.beyond, f"link set external netns {lab.gateway.name}"),
        (lab.gateway, "link set external up"),
        (lab.gateway, f"address add {GATEWAY_EXTERNAL}/24 dev external"),
        (lab.gateway, f"route add default via {INTERNET}"),
    )
    with scene.lasting_connection():
        if seen:
            all_at_once(away)
            wait_until(
                lambda: scene.gateway.status()["external_trouble"],
                "the interface to be missed",
                timeout=RECOVERY,
            )
            all_at_once(*back)
        else:
            all_at_once(away, *back)
        assert lab.gateway.call(lambda: socket.if_nametoindex("external")) == index
        assert scene.recovers() == GATEWAY_EXTERNAL
        assert scene.gateway.status()["external_trouble"] is None


def test_after_a_restart_nobody_gets_what_was_meant_for_an_old_connection(make_world: MakeWorld) -> None:
    world = make_world(clients=2)
    lab, gateway = world.lab, world.tidegate
    alice, bob = (world.connect(host) for host in lab.clients)
    start_connection_server(lab).wait_for(connections.READY)
    churn = [sys.executable, connections.__file__, "churn", BEYOND, str(ECHO_PORT), "200"]
    with lab.clients[0].call(lambda: socket.create_connection((BEYOND, ECHO_PORT), timeout=5)) as old:
        old.sendall(b"said before")
        assert old.recv(100) == b"said before"
        alice.stop()
        bob.stop()
        gateway.stop()
        gateway.start()
        bob.start()
        tunnel = next(name for name in lab.clients[1].interfaces() if name.startswith("tidegate"))
        with (
            lab.internet.capture("external", f"tcp and dst host {BEYOND}") as outside,
            lab.clients[1].capture(tunnel, f"src host {BEYOND}") as at_bob,
        ):
            assert f"{connections.DONE} 200 of 200" in lab.clients[1].run(churn).stdout
            alice.start()
            old.sendall(LATE)  # a segment of a connection that the gateway does not know any more
            with pytest.raises(ConnectionResetError):  # at once, so that its application reconnects
                old.recv(100)
        assert gateway.status()["drops"].get("tcp_out_of_state", 0) > 0
        assert outside.lines() != []
        assert [line for line in outside.lines() if line.endswith(f"length {len(LATE)}")] == []
        assert at_bob.lines(f"dst port {old.getsockname()[1]} and tcp[tcpflags] & tcp-rst != 0") == []
    page = lab.clients[0].run(["curl", "-sS", "--fail", "--max-time", "10", f"http://{BEYOND}/"])
    assert page.stdout.startswith("Hello"), "new connections are made as ever"
    gateway.stop()
