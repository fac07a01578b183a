"""A flood of as many packets as two senders can make costs the packets of the flood, and nothing else.

::

    client  (floods, is flooded) ──┐
    client2 (wants to be served) ──┴ switch ── gateway ── internet 203.0.113.9 (iperf3)
"""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tidegate.control.client import ControlClient
from tidegate.control.commands import StatusQuery
from tidegate.lab import checks
from tidegate.lab.processes import Process
from tidegate.lab.services import IPERF_PORT, start_iperf_server
from tidegate.lab.stacks import INNER_GATEWAY
from tidegate.lab.topology import INTERNET
from tidegate.lab.waiting import pause

from .conftest import MakeWorld, World

pytestmark = [pytest.mark.namespaces, pytest.mark.alone]

SECONDS = 8
SIZE = 64  # bytes of payload: what costs is packets
PROBE_RATE = 1_000_000_000
"""Offered in bits/s to find the capacity: more than any machine carries in such small packets."""
PORTS = (IPERF_PORT, IPERF_PORT + 1)
"""Of two servers, each of which is sent as much as gets through: one sender alone is no flood."""
QUERIES = 20
PROMISED = 0.1
"""Seconds within which `status` answers."""
MAY_GROW = 8 << 20
"""Bytes of resident memory: what a flood makes the allocator and the kernel's pages settle at, once."""


@dataclass
class Scene:
    world: World

    def capacity(self, direction: list[str]) -> float:
        """Bits per second of small packets that get through, both ends of it included."""
        client = self.world.lab.client
        report = checks.iperf(client, INTERNET, *flood(PROBE_RATE), *direction, seconds=2.0)
        end = report["end"]["sum"]
        return float(end["bits_per_second"]) * (1 - float(end["lost_percent"]) / 100)

    def ask(self) -> list[float]:
        """Seconds until `status` answered, of some queries over the time of a flood."""
        control = ControlClient.connect(self.world.tidegate.state)
        taken = []
        try:
            for _ in range(QUERIES):
                begun = time.monotonic()
                control.execute(StatusQuery())
                taken.append(time.monotonic() - begun)
                pause(0.1)
        finally:
            control.close()
        return taken


@dataclass(frozen=True)
class Flooded:
    was_flood: bool
    median: float
    """Seconds until `status` answered."""


def flood(bits_per_second: float) -> list[str]:
    return ["-u", "-b", f"{bits_per_second:.0f}", "-l", str(SIZE), "-w", "4M", "-f", "k"]


def lost_and_sent(flooding: Process) -> tuple[int, int]:
    """Packets, as the receiving end counted them."""
    total = re.search(r" (\d+)/(\d+) \([\d.e+-]+%\)  receiver", flooding.output())
    assert total is not None, flooding.output()[-500:]
    return int(total[1]), int(total[2])


@pytest.fixture(scope="module")
def scene(make_world: MakeWorld) -> Iterator[Scene]:
    world = make_world(clients=2)
    start_iperf_server(world.lab.internet, INTERNET, PORTS[1])
    for host in world.lab.clients:
        world.connect(host)
    yield Scene(world)
    world.gateway.stop()


@pytest.mark.parametrize("direction", [[], ["-R"]], ids=["to the internet", "from the internet"])
def test_a_flood_of_two_senders_at_full_rate_neither_stops_the_control_plane_nor_raises_memory(
    scene: Scene, direction: list[str]
) -> None:
    rate = scene.capacity(direction)
    before = scene.world.tidegate.process.resident_bytes()
    flooded = flood_once(scene, direction, rate, before)
    assert flooded.median < PROMISED
    if not flooded.was_flood:
        # The machine was busy with something else while the capacity was measured: once more.
        flooded = flood_once(scene, direction, scene.capacity(direction), before)
    assert flooded.was_flood, "no flood: everything got through"
    assert flooded.median < PROMISED


def flood_once(scene: Scene, direction: list[str], rate: float, before: int) -> Flooded:
    """Floods, and asserts what is no question of time. `before` is the gateway's resident memory."""
    lab, gateway = scene.world.lab, scene.world.tidegate
    command = ["iperf3", "-c", INTERNET, "-t", str(SECONDS), *flood(rate), *direction]
    floods = [lab.client.popen([*command, "-p", str(port)]) for port in PORTS]
    pause(1.5)
    taken = scene.ask()
    during = gateway.process.resident_bytes()
    names = [checks.lookup(lab.clients[1], "www.example", INNER_GATEWAY) for _ in range(5)]
    pings = checks.ping(lab.clients[1], INTERNET, count=20, interval=0.05)
    assert all(flooding.running for flooding in floods), "the flood was over before its time"
    for flooding in floods:
        flooding.wait(SECONDS + 20)
    after = gateway.process.resident_bytes()
    lost, sent = (sum(counts) for counts in zip(*map(lost_and_sent, floods), strict=True))
    median, worst = statistics.median(taken), max(taken)
    print(
        f"\n{sent / SECONDS / 1e3:.0f} k packets/s, {lost / sent:.0%} lost, "
        f"on {os.cpu_count()} cores: status in {median * 1e3:.1f} ms "
        f"(median), {worst * 1e3:.1f} ms (worst); memory {(during - before) / 1024:+.0f} KiB during, "
        f"{(after - before) / 1024:+.0f} KiB after; {len(pings.round_trips)} of {pings.sent} pings of another client"
    )
    assert max(during, after) - before < MAY_GROW
    assert names == [[INTERNET]] * 5
    assert len(pings.round_trips) >= pings.sent // 2, pings
    pause(1.0)  # iperf3's server drains what is left
    assert checks.ping(lab.client, INTERNET, count=10, interval=0.02).complete
    assert checks.ping(lab.clients[1], INTERNET, count=10, interval=0.02).complete
    # The other way, two senders on the gateway's own cores need not send more than it carries.
    return Flooded(lost > 0 or bool(direction), median)
