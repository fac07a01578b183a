"""Two clients of one shard: what one has waiting in the gateway is no burden to the other.

::

    client  (as much as it can) ──┐
    client2 (a ping, or as much)──┴ switch ── gateway, one shard ── internet 203.0.113.9 (iperf3)
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from tidegate.lab import checks
from tidegate.lab.services import IPERF_PORT, start_iperf_server
from tidegate.lab.topology import INTERNET, Lab
from tidegate.lab.waiting import pause

from .conftest import MakeWorld

pytestmark = pytest.mark.namespaces

MANY = 8
"""Flows of a client that wants more than its share. First come, first served, it would get as many shares."""


@dataclass
class Pair:
    lab: Lab


@pytest.fixture(scope="module")
def pair(make_world: MakeWorld) -> Iterator[Pair]:
    world = make_world(clients=2, config="[gateway]\nshards = 1\n")
    if world.reference:
        pytest.skip("about Tidegate only")
    start_iperf_server(world.lab.internet, INTERNET, IPERF_PORT + 1)
    for host in world.lab.clients:
        world.connect(host)
    yield Pair(world.lab)
    world.gateway.stop()


def test_a_ping_overtakes_the_download_of_another_client_but_not_that_of_its_own(pair: Pair) -> None:
    greedy, modest = pair.lab.clients
    download = greedy.popen(["iperf3", "-c", INTERNET, "-t", "6", "-R", "-P", str(MANY)])
    pause(1.5)
    with ThreadPoolExecutor() as pool:
        own, other = pool.map(
            lambda host: checks.ping(host, INTERNET, count=200, interval=0.01), [greedy, modest]
        )
    assert download.running, "the download was over before its time"
    download.wait(30)
    print(
        f"\nbehind its own download: {own.median:.2f} ms, beside another's: {other.median:.2f} ms (medians)"
    )
    # Both run at the same time on the same machine: what makes the difference is where they wait.
    assert other.complete
    assert other.median < own.median / 2


@pytest.mark.parametrize("reverse", [False, True], ids=["to the internet", "from the internet"])
def test_two_greedy_clients_get_about_the_same_however_many_flows_one_has(pair: Pair, reverse: bool) -> None:
    flows = [MANY, 1]
    with ThreadPoolExecutor() as pool:
        reports = pool.map(
            lambda i: checks.iperf(
                pair.lab.clients[i],
                INTERNET,
                "-O",
                "1",
                seconds=4.0,
                flows=flows[i],
                reverse=reverse,
                port=IPERF_PORT + i,
            ),
            range(2),
        )
        many, one = (float(report["end"]["sum_received"]["bits_per_second"]) for report in reports)
    share = one / (many + one)
    print(f"\n{MANY} flows: {many / 1e9:.2f} Gb/s, one flow: {one / 1e9:.2f} Gb/s, which is {share:.0%}")
    assert 1 / 3 < share < 2 / 3
