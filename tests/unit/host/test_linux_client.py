"""A client on a fake engine, but on the real host of a network namespace: TUN address, routes, rules, and their end.

::

    test0 (10.66.77.2/32, made by the test as the engine would) ── host ── eth0 (192.0.2.2/24) ── other
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.unit.host.veth import setup

pytestmark = pytest.mark.namespaces

INSIDE = """
import asyncio, json, subprocess
from tests.unit.fakes import FakeEngine, FakeEvent
from tests.unit.host.veth import sh
from tests.unit.test_client import PROFILE, until_connected
from tidegate.client import Client
from tidegate.errors import EngineError
from tidegate.host.client import LinuxClientHost
from tidegate.settings import OffloadSettings

def host_state():
    return [sh(f"ip {v} {w}") for v in ("-4", "-6") for w in ("rule", "route show table all")] + [
        sh("sysctl net.ipv4.conf.all.src_valid_mark")]

def client(engine, events):
    return Client(PROFILE, engine, LinuxClientHost(), tun_name="test0", offloads=OffloadSettings(),
                  use_dns=False, report=events.append)

told = {}

async def orderly():
    engine, events = FakeEngine(), []
    one = client(engine, events)
    task = await until_connected(one, events)
    told["internet"] = sh("ip route get 198.51.100.1")
    told["own"] = sh("ip route get 192.0.2.2 mark 0x7467")
    told["address"] = sh("ip -o address show dev test0")
    told["renewed"] = []
    whole = host_state()
    for gone in ("rule del priority 29799", "-6 rule del priority 29799",
                 "-6 route del unreachable ::/0 table 29799"):
        sh(f"ip {gone}")
        assert host_state() != whole
        for _ in range(100):
            await asyncio.sleep(0.05)
            if host_state() == whole:
                break
        told["renewed"].append(host_state() == whole)
    one.request_stop()
    await task

async def dying():
    engine, events = FakeEngine(), []
    task = await until_connected(client(engine, events), events)
    engine.clients[0].tell(FakeEvent("shard_failed", "out of luck"))
    try:
        await task
    except EngineError as died:
        told["died"] = str(died)

told["before"] = host_state()
for scenario in (orderly, dying):
    asyncio.run(scenario())
    sh("ip addr flush dev test0")
    told[f"after {scenario.__name__}"] = host_state()
print(json.dumps(told))
"""


def test_a_client_takes_everything_back_when_it_is_stopped_and_when_it_dies() -> None:
    script = f"set -e\n{setup('test0')}\nexec {sys.executable} -c '{INSIDE}'"
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert "dev test0" in told["internet"]
    assert "inet 10.66.77.2/32" in told["address"]
    assert told["renewed"] == [True, True, True], "what others take away"
    assert "out of luck" in told["died"]
    assert told["after orderly"] == told["before"]
    assert told["after dying"] == told["before"]
    assert "never awaited" not in done.stderr
