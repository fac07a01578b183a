"""A client that routes everything through its tunnel, in a network that is not as simple as the other tests'.

::

    client 192.168.5.2 ── 192.168.5.1 router 198.51.100.3 ── 198.51.100.1 gateway ── internet 203.0.113.9
      (rp_filter=1)         (client2)

The three share a switch, but the client reaches the gateway only through its default route.
"""

from __future__ import annotations

import pytest

from tidegate.lab import checks
from tidegate.lab.stacks import INNER_GATEWAY
from tidegate.lab.topology import BEYOND, GATEWAY_ACCESS, INTERNET, Lab

from .conftest import MakeWorld, World

pytestmark = pytest.mark.namespaces

HOME = "192.168.5"


@pytest.fixture(scope="module")
def world(make_world: MakeWorld) -> World:
    return make_world(clients=2, prepare=_behind_a_router)


def _behind_a_router(lab: Lab) -> None:
    client, router = lab.clients
    router.ip(f"address add {HOME}.1/24 dev access")
    router.sysctl("net.ipv4.ip_forward", "1")
    for scope in ("all", "access"):
        router.sysctl(f"net.ipv4.conf.{scope}.send_redirects", "0")
        client.sysctl(f"net.ipv4.conf.{scope}.rp_filter", "1")
    client.ip("address flush dev access")
    client.ip(f"address add {HOME}.2/24 dev access")
    client.ip(f"route add default via {HOME}.1")
    lab.gateway.ip(f"route add {HOME}.0/24 via {lab.client_address(1)}")


def test_a_client_behind_a_router_and_a_strict_reverse_path_filter_is_served(world: World) -> None:
    host = world.lab.client
    assert checks.ping(host, GATEWAY_ACCESS, count=1).complete, "without a tunnel"
    client = world.connect(host)
    for address in (INNER_GATEWAY, INTERNET, BEYOND):
        assert checks.ping(host, address, count=10, interval=0.02).complete, address
    assert checks.lookup(host, "www.example", INNER_GATEWAY) == [INTERNET]
    client.stop()
    assert "2979" not in host.run(["ip", "rule"]).stdout
