"""What a client can send to the gateway's DNS proxy keeps neither the gateway nor the other clients waiting."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
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

pytestmark = pytest.mark.namespaces

PROMISED = 1.0
"""Seconds within which `status` answers, on a machine that does other things as well."""
LONG_NAME = b"\x01a" * 112 + b"\0"
OPEN_FILES = 1024
PART = 64
"""A quarter of the 256 that the ports leave of these."""
NOBODY = "203.0.113.77"
"""An address that no host has: who is asked there is silent."""


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
