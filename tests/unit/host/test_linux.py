"""A gateway on a fake engine, but on the real host of a network namespace: netlink, TUN, DNS, signals.

::

    tidegate0 (10.66.77.1/24, made by the test as the engine would) ── host ── eth0 (192.0.2.2/24) ── other
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.unit.host.veth import setup
from tidegate.host.netlink import superpacket_bytes

pytestmark = pytest.mark.namespaces

INSIDE = """
import asyncio, json, os, signal, socket, subprocess, sys, tempfile, time
from pathlib import Path
from tests.unit.fakes import FakeEngine
from tests.unit.host.veth import sh
from tidegate.gateway import Gateway
from tidegate.host.netlink import LinuxHost
from tidegate.settings import GatewaySettings, Settings

def host_state():
    routes = sh("ip route show table all; ip -6 route show table all; ip rule; ip -6 rule")
    sysctls = sh("sysctl -a 2>/dev/null | grep ^net")
    return [line for line in (routes + sysctls).splitlines() if "tidegate0" not in line]

told = {}
settings = Settings(state_dir=Path(tempfile.mkdtemp()))
engine = FakeEngine()

async def scenario():
    before = host_state()
    ready = asyncio.Event()
    def is_ready(line):
        told["ready"] = line
        ready.set()

    gateway = Gateway(settings, engine, LinuxHost(), ready=is_ready)
    task = asyncio.create_task(gateway.run())
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED, timeout=20)
    if task.done():
        await task
    told["address"] = sh("ip -o address show dev tidegate0; ip -d link show dev tidegate0")
    told["dns"] = sh("ss -lntuH sport = :53")
    told["changed"] = sorted(set(host_state()) ^ set(before))
    packets = engine.gateways[0]
    await asyncio.sleep(0.5)
    sh("ip route replace default via 192.0.2.254")
    for _ in range(100):
        await asyncio.sleep(0.05)
        if packets.links:
            break
    told["next hops"] = [packets.options.external.router, *(link.router for link in packets.links)]
    await asyncio.sleep(0.5)
    idle = time.process_time()
    await asyncio.sleep(1)
    told["idle"] = time.process_time() - idle
    began = time.monotonic()
    os.kill(os.getpid(), signal.SIGTERM)
    await task
    told["seconds to stop"] = time.monotonic() - began
    told["dns after"] = sh("ss -lntuH sport = :53")

asyncio.run(scenario())
print(json.dumps(told))
"""


def test_a_gateway_reads_its_host_and_changes_nothing_but_its_own_device() -> None:
    script = f"set -e\n{setup('tidegate0')}\nexec {sys.executable} -c '{INSIDE}'"
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", script], capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["ready"] == "listening on 0.0.0.0:51820 (UDP), external eth0 192.0.2.2, 0 peers"
    assert "inet 10.66.77.1/24" in told["address"]
    assert "addrgenmode none" in told["address"], "nothing of IPv6 is sent into the tunnel"
    assert f"gso_max_size {superpacket_bytes(1420)} " in told["address"]
    assert told["dns"].count("10.66.77.1:53") == 2
    assert told["changed"] == []
    assert told["next hops"] == ["192.0.2.1", "192.0.2.254"]
    assert told["idle"] < 0.005
    assert told["seconds to stop"] < 2
    assert told["dns after"] == ""


@pytest.mark.parametrize("mtu", [1100, 1280, 1420, 1500, 9000, 20_000])
@pytest.mark.parametrize("kept_free", [128, 192, 320])
@pytest.mark.parametrize("options", [0, 12])
def test_a_superpackets_segments_fill_one_train_when_they_are_sealed(
    mtu: int, kept_free: int, options: int
) -> None:
    largest = superpacket_bytes(mtu) - (kept_free + 1)  # sk_dst_gso_max_size() of net/core/sock.c
    segments = largest // (mtu - 40 - options)
    assert segments * (mtu + 32) <= 65_507 < (segments + 1) * (mtu + 32)


@pytest.mark.parametrize("mtu", [576, 900, 65_476, 65_535])
def test_where_that_cannot_be_superpackets_are_as_large_as_the_kernel_makes_them(mtu: int) -> None:
    assert 65_475 <= superpacket_bytes(mtu) <= 65_536
