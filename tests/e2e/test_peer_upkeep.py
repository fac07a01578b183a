"""A client whose peer is renamed, disabled, enabled and renewed: what it notices, and what it does not.

::

    client  (alice) ── tunnel ── gateway ── internet 203.0.113.9
                                203.0.113.1
"""

from __future__ import annotations

import re
import sys

import pytest

from tidegate.control.commands import PublishList
from tidegate.lab import checks, webserver
from tidegate.lab.stacks import LISTEN_PORT, TidegateClient, TidegateGateway
from tidegate.lab.topology import GATEWAY_ACCESS, GATEWAY_EXTERNAL, INTERNET, Lab
from tidegate.lab.waiting import wait_until

from .conftest import MakeWorld

pytestmark = pytest.mark.namespaces

INNER = "10.66.77.2"
PORT = 8080


def is_online(lab: Lab) -> bool:
    return checks.ping(lab.client, INTERNET, count=2).complete


def is_served(lab: Lab) -> bool:
    """Whether the client's web server answers on the published port."""
    command = ["curl", "-sS", "--fail", "--max-time", "1", f"http://{GATEWAY_EXTERNAL}:{PORT}/"]
    return lab.internet.run(command, check=False).stdout.startswith("Hello")


def is_cut_off(lab: Lab) -> bool:
    return not checks.ping(lab.client, INTERNET, count=2).round_trips and not is_served(lab)


def peer(gateway: TidegateGateway) -> tuple[str, str, bool]:
    (only,) = gateway.status()["peers"]
    return only["name"], only["address"], only["enabled"]


def published(gateway: TidegateGateway) -> tuple[str, str]:
    (only,) = gateway.ask(PublishList()).publications
    return only.to, only.state


@pytest.mark.timeout(180)
def test_a_client_lives_through_the_upkeep_of_its_peer(make_world: MakeWorld) -> None:
    world = make_world()
    lab, gateway = world.lab, world.tidegate
    client = TidegateClient(lab.client, gateway.add_peer("alice"), offloads=world.offloads)
    client.start()
    server = lab.client.popen([sys.executable, "-m", webserver.__name__, INNER], name="webserver")
    server.wait_for(webserver.READY)
    gateway.command("publish", "add", f"tcp/{PORT}", "--to", "alice:80")
    assert is_online(lab) and is_served(lab)

    gateway.command("peer", "rename", "alice", "bob")
    assert (peer(gateway), published(gateway)) == (("bob", INNER, True), ("bob:80", "active"))
    assert is_online(lab) and is_served(lab)

    gateway.command("peer", "disable", "bob")
    assert is_cut_off(lab)
    gateway.stop()
    gateway = TidegateGateway(lab, state=gateway.state)
    gateway.start()
    assert (peer(gateway), published(gateway)) == (("bob", INNER, False), ("bob:80", "peer disabled"))
    assert is_cut_off(lab)
    gateway.command("peer", "enable", "bob")
    # A client that is sending tries again every 5 s (REKEY_TIMEOUT).
    wait_until(lambda: is_online(lab), "the client to return by itself", timeout=30)
    assert is_served(lab)

    new, endpoint = lab.scratch / "new.conf", ("--endpoint", f"{GATEWAY_ACCESS}:{LISTEN_PORT}")
    gateway.command("peer", "renew", "bob", *endpoint, "--out", str(new))
    assert is_cut_off(lab), "with the former keys"
    client.stop()
    client = TidegateClient(lab.client, new, offloads=world.offloads)
    client.start()
    assert is_online(lab) and is_served(lab)
    assert (peer(gateway), published(gateway)) == (("bob", INNER, True), ("bob:80", "active"))
    assert re.search(r"created +20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC", gateway.command("peer", "show", "bob"))

    code = gateway.command("peer", "renew", "bob", *endpoint, "--qr")
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in code.splitlines()]
    assert len(lines) > 30 and all(set(line) <= set(" ▀▄█") for line in lines), "the code and nothing else"
    assert is_cut_off(lab), "its keys were renewed once more"
    client.stop()
    gateway.stop()
