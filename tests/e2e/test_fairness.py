"""Two clients of one shard: what one has waiting in the gateway is no burden to the other.

::

    client  (as much as it can) ──┐
    client2 (a ping, or as much)──┴ switch ── gateway, one shard ── internet 203.0.113.9 (iperf3)
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tidegate.lab import checks
from tidegate.lab.services import IPERF_PORT, start_iperf_server
from tidegate.lab.topology import INTERNET, Lab
from tidegate.lab.waiting import pause, wait_until

from .conftest import MakeWorld

pytestmark = [pytest.mark.namespaces, pytest.mark.alone]

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


def test_a_quiet_shard_asks_the_scheduler_for_shorter_slices_than_a_busy_one(pair: Pair) -> None:
    if tuple(map(int, platform.release().split(".")[:2])) < (6, 12):
        pytest.skip("this kernel knows no slices")
    client = pair.lab.client
    thread = shard_thread(pair.lab)

    def quiet() -> bool:
        # It thinks of it when it wakes up.
        return checks.ping(client, INTERNET, count=2, interval=0.02).complete and slice_of(thread) == 100

    wait_until(quiet, "a quiet shard to ask for slices of 100 us", timeout=5.0)
    download = client.popen(["iperf3", "-c", INTERNET, "-t", "10", "-R"])
    wait_until(lambda: slice_of(thread) == 200, "a busy shard to ask for slices of 200 us", timeout=8.0)
    download.stop()
    wait_until(quiet, "the shard to ask for short slices again", timeout=5.0)


def shard_thread(lab: Lab) -> int:
    """The thread of the gateway's only shard."""
    names = (path for pid in lab.gateway.pids() for path in Path(f"/proc/{pid}/task").glob("*/comm"))
    [thread] = [int(path.parent.name) for path in names if path.read_text().startswith("shard-")]
    return thread


def slice_of(thread: int) -> int:
    """The slice that a thread has asked for, in microseconds (sched_getattr(2), which the C library does not have)."""
    number = {"x86_64": 315, "aarch64": 275}[platform.machine()]
    attributes = ctypes.create_string_buffer(SCHED_ATTR.size)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(number, thread, attributes, SCHED_ATTR.size, 0) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    *_, runtime, _deadline, _period = SCHED_ATTR.unpack(attributes.raw)
    return int(runtime) // 1000


SCHED_ATTR = struct.Struct("=IIQiIQQQ")
"""``struct sched_attr`` of linux/sched/types.h, its first version."""
