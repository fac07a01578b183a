"""What a client can send to the gateway's DNS proxy keeps neither the gateway nor the other clients waiting."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.unit.dns import costly
from tidegate.control.client import ControlClient
from tidegate.control.commands import StatusQuery
from tidegate.lab import checks
from tidegate.lab.services import start_services
from tidegate.lab.stacks import INNER_GATEWAY, TidegateGateway
from tidegate.lab.topology import INTERNET, Lab
from tidegate.lab.waiting import pause, wait_until

from .conftest import MakeWorld, World

pytestmark = [pytest.mark.namespaces, pytest.mark.alone]

PROMISED = 1.0
"""Seconds within which `status` answers, on a machine that does other things as well."""
LONG_NAME = b"\x01a" * 112 + b"\0"
OPEN_FILES = 1024
PART = 64
"""A quarter of the 256 that the ports leave of these."""
NOBODY = "203.0.113.77"
"""An address that no host has: who is asked there is silent."""
FLOOD_RATE = 20_000  # datagrams per second: more than the proxy can look at
FLOOD_SECONDS = 3.0
RATE, BURST = 500, 128 + 63
"""What the engine lets a client ask: queries per second, and at once; the last of these may be the first of a
superpacket of 64, the rest of which it owes then."""
LOOK_UPS = 20


def status_takes(gateway: TidegateGateway) -> float:
    begun = time.monotonic()
    control = ControlClient.connect(gateway.state)
    try:
        control.execute(StatusQuery())
    finally:
        control.close()
    return time.monotonic() - begun


@pytest.fixture(scope="module")
def world(make_world: MakeWorld) -> Iterator[World]:
    world = make_world(clients=2)
    for host in world.lab.clients:
        world.connect(host)
    yield world
    world.gateway.stop()


@pytest.mark.parametrize("count", [250, 1600], ids=["10 KB over UDP", "64 KB over TCP"])
def test_a_query_of_colliding_names_holds_nobody_up(world: World, count: int) -> None:
    lab, gateway = world.lab, world.tidegate
    wire = costly.message(costly.QUERY, LONG_NAME, costly.colliding(count, LONG_NAME), costly.ADDITIONAL)

    def send() -> socket.socket:
        over = socket.SOCK_DGRAM if len(wire) < 20_000 else socket.SOCK_STREAM
        sender = socket.socket(socket.AF_INET, over)
        sender.settimeout(10)
        sender.connect((INNER_GATEWAY, 53))
        sender.sendall(wire if over == socket.SOCK_DGRAM else struct.pack("!H", len(wire)) + wire)
        return sender

    with lab.client.call(send) as sender:
        pause(0.2)
        taken = status_takes(gateway)
        names = checks.lookup(lab.clients[1], "www.example", INNER_GATEWAY)
        answer = sender.recv(100)
    print(f"\nstatus in {taken * 1e3:.0f} ms, beside a query of {len(wire)} bytes")
    assert taken < PROMISED
    assert names == [INTERNET]
    assert answer[-12:][3] & 15 == 1, "FORMERR"


def flood(sender: socket.socket, wire: bytes) -> int:
    """Sends at `FLOOD_RATE` for `FLOOD_SECONDS`. Returns how many datagrams it sent."""
    begun, sent = time.monotonic(), 0
    while (passed := time.monotonic() - begun) < FLOOD_SECONDS:
        for _ in range(int(passed * FLOOD_RATE) - sent):
            sender.send(wire)
            sent += 1
        pause(0.002)
    return sent


def test_a_client_that_floods_the_proxy_does_not_keep_another_from_dns(world: World) -> None:
    """The proxy's socket has one queue for all clients: what overflows it is anybody's."""
    lab, gateway = world.lab, world.tidegate

    def counted() -> tuple[int, int]:
        """How many queries have come to the proxy, and how many have not."""
        status = gateway.status()
        return status["dns"].get("queries_udp", 0), status["drops"].get("client_dns_rate", 0)

    def connected() -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.connect((INNER_GATEWAY, 53))
        return made

    def look_up(asking: socket.socket) -> int:
        """How many queries, each sent once, are answered."""
        question = costly.name("www.example")
        for number in range(LOOK_UPS):
            asking.send(costly.message(costly.QUERY, question, [], costly.ANSWER, number))
            pause(0.1)
        answered: set[bytes] = set()
        asking.settimeout(1.0)
        with contextlib.suppress(TimeoutError):
            while len(answered) < LOOK_UPS:
                answered.add(asking.recv(512)[:2])
        return len(answered)

    with (
        lab.client.call(connected) as sender,
        lab.clients[1].call(connected) as asking,
        ThreadPoolExecutor(1) as pool,
    ):
        before, begun = counted(), time.monotonic()
        flooding = pool.submit(flood, sender, b"\0" * 12)
        pause(0.2)
        answered = look_up(asking)
        sent = flooding.result()
    asked, dropped = (after - earlier for after, earlier in zip(counted(), before, strict=True))
    took = time.monotonic() - begun
    print(
        f"\n{answered} of {LOOK_UPS} look-ups answered; of {sent} others {asked} were asked, {dropped} dropped"
    )
    assert sent > FLOOD_RATE * FLOOD_SECONDS / 2, "no flood"
    assert answered >= LOOK_UPS - 1
    assert asked <= RATE * took + BURST + LOOK_UPS
    assert dropped > sent / 2


def open_files(gateway: TidegateGateway) -> int:
    return len(list(Path(f"/proc/{gateway.process.pid}/fd").iterdir()))


def test_waiting_queries_take_a_part_of_the_open_files_that_ports_leave(
    request: pytest.FixtureRequest,
) -> None:
    if request.config.getoption("--reference"):
        pytest.skip("about Tidegate only")
    with Lab(clients=3) as lab:
        start_services(lab)
        gateway = TidegateGateway(lab, config=f'[dns]\nupstreams = ["{NOBODY}"]\n', open_files=OPEN_FILES)
        gateway.start()
        world = World(lab, gateway, reference=False)
        for host in lab.clients:
            world.connect(host)
        seen = [-1]

        def steady() -> bool:
            """The engine reserves ports for a while."""
            seen.append(open_files(gateway))
            return seen[-1] == seen[-2]

        wait_until(steady, "the ports to be reserved", timeout=20.0, interval=1.0)
        before, peak = seen[-1], 0
        senders = [
            host.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for host in lab.clients
        ]
        wire = costly.message(costly.QUERY, costly.name("www.example"), [], costly.ANSWER)
        ends = time.monotonic() + 3
        while time.monotonic() < ends:
            for sender in senders:
                for _ in range(20):
                    sender.sendto(wire, (INNER_GATEWAY, 53))
            pause(0.1)
            peak = max(peak, open_files(gateway))
        taken = status_takes(gateway)
        for sender in senders:
            sender.close()
        print(f"\n{before} open files, {peak} beside waiting queries; status in {taken * 1e3:.0f} ms")
        assert 0 < peak - before <= PART
        assert taken < PROMISED
        gateway.stop()
