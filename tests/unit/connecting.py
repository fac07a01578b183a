"""Clients on a fake engine and a fake host."""

from __future__ import annotations

import asyncio
import signal
from ipaddress import IPv4Address, IPv4Interface, ip_network

from tests.unit.fakes import FakeClientHost, FakeEngine
from tests.unit.running import until
from tidegate.client import Client, ClientEvent
from tidegate.identity import Profile
from tidegate.net import Endpoint
from tidegate.settings import OffloadSettings

PROFILE = Profile(
    private_key=b"p" * 32,
    address=IPv4Interface("10.66.77.2/32"),
    peer_public_key=b"g" * 32,
    endpoint=Endpoint("192.0.2.2", 51820),
    allowed_ips=(ip_network("0.0.0.0/0"), ip_network("::/0")),
    dns=(IPv4Address("10.66.77.1"),),
    persistent_keepalive=25,
)

WHOLE = [
    "privileges",
    "leftovers routes dns",
    "tun 10.66.77.2/32 1420",
    "routes",
    "dns",
    "dns undone",
    "routes undone",
]
"""What is done to the host, and undone."""


def made(
    engine: FakeEngine, host: FakeClientHost, events: list[ClientEvent], profile: Profile = PROFILE
) -> Client:
    return Client(profile, engine, host, tun_name="test0", offloads=OffloadSettings(), report=events.append)


async def until_connected(client: Client, events: list[ClientEvent]) -> asyncio.Task[signal.Signals | None]:
    task = asyncio.create_task(client.run())
    await until(lambda: task.done() or any(event.event == "connected" for event in events))
    assert not task.done(), task.exception()
    return task
