"""What clients may not reach by the operator's word: each other, and the network at the gateway's external interface.

::

    client  ──┐                      the denied network        the internet
              ├ switch ── gateway ─────────────────── internet ──────────── beyond
    client2 ──┘           203.0.113.1     203.0.113.9 (router, resolver)    192.0.2.9
"""

from __future__ import annotations

import json
import time

import pytest

from tidegate.lab import checks
from tidegate.lab.services import start_web_server
from tidegate.lab.stacks import INNER_GATEWAY
from tidegate.lab.topology import BEYOND, GATEWAY_EXTERNAL, INTERNET, Namespace
from tidegate.lab.webserver import READY

from .conftest import MakeWorld

pytestmark = pytest.mark.namespaces

SHARDS = "[gateway]\nshards = 2\n"  # one client on each
DENYING = f'{SHARDS}between_clients = false\n[external]\ndeny = ["203.0.113.0/24"]\n'

CONNECTED, NOT_CONNECTED = 0, 7  # curl's exit codes; a time-out has another one
AT_ONCE = 1.0  # seconds


def curl(host: Namespace, address: str) -> int:
    """Curl's exit code."""
    command = ["curl", "-sS", "--fail", "--max-time", "10", "--output", "/dev/null", f"http://{address}/"]
    return host.run(command, check=False).returncode


def is_told(host: Namespace, address: str) -> bool:
    """Whether a ping and a TCP connection fail at once, because the gateway says that they are not permitted."""
    ping = host.run(["ping", "-n", "-c", "1", "-W", "10", address], check=False).stdout
    since = time.monotonic()
    code = curl(host, address)
    filtered = f"From {INNER_GATEWAY} icmp_seq=1 Packet filtered" in ping
    return filtered and code == NOT_CONNECTED and time.monotonic() - since < AT_ONCE


def reaches(host: Namespace, address: str) -> bool:
    return checks.ping(host, address, count=2).complete and curl(host, address) == CONNECTED


def test_clients_reach_neither_each_other_nor_a_denied_network_until_a_reload_permits_it(
    make_world: MakeWorld,
) -> None:
    world = make_world(clients=2, config=DENYING)
    lab, gateway = world.lab, world.tidegate
    offloads = gateway.settings_file.read_text().removeprefix(DENYING)  # as --offloads-off has them
    for host in lab.clients:
        world.connect(host)
    inner = {peer["name"]: peer["address"] for peer in gateway.status()["peers"]}
    there = [inner[host.role] for host in lab.clients]
    for host, address in zip(lab.clients, there, strict=True):
        start_web_server(host, address).wait_for(READY)
    gateway.command("publish", "add", "tcp/8080", "--to", "client2:80")

    for host, other in zip(lab.clients, reversed(there), strict=True):
        assert is_told(host, other), f"{host.role} to the other client"
        assert is_told(host, INTERNET), f"{host.role} to the denied network"
        assert reaches(host, BEYOND), f"{host.role} to the internet, by way of the denied network's router"
        assert checks.lookup(host, "far.example", INNER_GATEWAY) == [BEYOND], "the proxy asks in its place"
        assert curl(host, f"{GATEWAY_EXTERNAL}:8080") == CONNECTED, f"{host.role} to a published port"
    for visitor in (lab.internet, lab.beyond):
        assert curl(visitor, f"{GATEWAY_EXTERNAL}:8080") == CONNECTED, f"{visitor.role} is no client"
    assert gateway.status()["drops"]["denied"] >= 8

    gateway.settings_file.write_text(SHARDS + offloads)
    answer = json.loads(gateway.command("reload", "--json"))
    assert (answer["applied"], answer["needs_restart"]) == (["gateway.between_clients", "external.deny"], [])
    for host, other in zip(lab.clients, reversed(there), strict=True):
        assert reaches(host, other) and reaches(host, INTERNET)

    gateway.settings_file.write_text(DENYING + offloads)
    gateway.command("reload")
    for host, other in zip(lab.clients, reversed(there), strict=True):
        assert is_told(host, other) and is_told(host, INTERNET)
    gateway.stop()
