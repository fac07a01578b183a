"""Many connections: held all at once, and opened one after the other.

::

    client ─── tunnel ─── gateway ─── internet 203.0.113.9 (several connection servers)

In full (``TIDEGATE_E2E_FULL=1``) 12,000 are held and 50,000 follow each other; otherwise 2,000 and 5,000. Every
process of the lab may have 20,000 open files, the gateway included, whose ports cost one each.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tidegate.lab.processes import Process
from tidegate.lab.stacks import TidegateGateway
from tidegate.lab.topology import INTERNET, Lab, Namespace

from .conftest import MakeWorld
from .lab import connections

pytestmark = pytest.mark.namespaces

FULL = os.environ.get("TIDEGATE_E2E_FULL") == "1"
HELD, CHURNED = (12_000, 50_000) if FULL else (2_000, 5_000)
WORKERS = 4
PORTS = range(7_000, 7_000 + WORKERS)
PATIENCE = 280.0 if FULL else 80.0
# All of it comes from one client, and a fast machine opens more than 2,000 a second: that limit has tests of its own.
CONFIG = "[nat]\nmax_new_mappings_per_second = 1_000_000\n"


@dataclass
class Crowd:
    lab: Lab
    gateway: TidegateGateway

    def stats(self) -> dict[str, dict[str, int]]:
        stats: dict[str, dict[str, int]] = json.loads(self.gateway.command("nat", "stats", "--json"))
        return stats


@pytest.fixture(scope="module")
def crowd(make_world: MakeWorld) -> Iterator[Crowd]:
    world = make_world(config=CONFIG)
    gateway = world.tidegate
    world.connect(world.lab.client)
    for ports in (PORTS[:2], PORTS[2:]):
        server = start(world.lab.internet, "serve", *ports)
        server.wait_for(connections.READY)
    yield Crowd(world.lab, gateway)
    gateway.stop()


def start(host: Namespace, role: str, *numbers: int) -> Process:
    command = [sys.executable, connections.__file__, role, INTERNET, *map(str, numbers)]
    return host.popen(command, name=f"connections-{role}")


def figures(process: Process, word: str) -> int:
    """The figure that the process printed last after `word`."""
    return int(re.findall(rf"^{word} (\d+)", process.output(), re.MULTILINE)[-1])


@pytest.mark.timeout(300)
def test_thousands_of_connections_are_held_at_once_and_short_ones_come_and_go_beside_them(
    crowd: Crowd,
) -> None:
    holders = [start(crowd.lab.client, "hold", port, HELD // WORKERS) for port in PORTS]
    for holder in holders:
        holder.wait_for(connections.HELD, timeout=PATIENCE)
    print([holder.output() for holder in holders], crowd.stats())
    assert [figures(holder, connections.HELD) for holder in holders] == [HELD // WORKERS] * WORKERS

    churners = [start(crowd.lab.client, "churn", port, CHURNED // WORKERS) for port in PORTS]
    for churner in churners:
        churner.wait_for(connections.DONE, timeout=PATIENCE)
    print([churner.output() for churner in churners], crowd.stats())
    assert [figures(churner, connections.DONE) for churner in churners] == [CHURNED // WORKERS] * WORKERS

    for holder in holders:
        holder.send_signal(signal.SIGUSR1)
    for holder in holders:
        holder.wait_for(connections.ALIVE, timeout=PATIENCE)
    assert [figures(holder, connections.ALIVE) for holder in holders] == [HELD // WORKERS] * WORKERS
    stats = crowd.stats()
    assert stats["mappings"]["tcp"] >= HELD
    assert stats["reserved_ports"]["tcp"] >= stats["mappings"]["tcp"]
    for holder in holders:
        holder.stop()
