"""A gateway with several addresses: answers leave from the one that was addressed, and its port is its own there only.

::

                  198.51.100.1, and secondary .70
    client ─ firewall ─── gateway ─── internet
    198.51.100.2                       203.0.113.9

The client's profile names the secondary address, and its firewall lets in nothing from the other one, from where the
gateway's kernel would send to it: as any stateful firewall, or NAT, between the two.
"""

from __future__ import annotations

import socket
import sys

import pytest

from tidegate.lab import checks, udpecho
from tidegate.lab.blob import blob_sha256
from tidegate.lab.stacks import LISTEN_PORT, TidegateClient, TidegateGateway, WireguardGoClient, read_profile
from tidegate.lab.topology import GATEWAY_ACCESS, GATEWAY_EXTERNAL, INTERNET, Lab

from .conftest import ClientKind, MakeWorld

pytestmark = pytest.mark.namespaces

SECOND = "198.51.100.70"
MIB = 1 << 20
FIREWALL = (
    "table ip firewall { chain input { type filter hook input priority 0; "
    f"udp sport {LISTEN_PORT} ip saddr != {SECOND} drop; }}; }}"
)


def prepare(lab: Lab) -> None:
    lab.gateway.ip(f"address add {SECOND}/24 dev access")
    lab.client.run(["nft", FIREWALL])


@pytest.mark.parametrize("kind", [TidegateClient, WireguardGoClient], ids=["own client", "wireguard-go"])
@pytest.mark.parametrize("offloads", [True, False], ids=["offloads", "no offloads"])
def test_every_datagram_leaves_from_the_address_that_the_client_calls(
    make_world: MakeWorld, kind: ClientKind, offloads: bool
) -> None:
    world = make_world(offloads=offloads, prepare=prepare)
    if world.reference and kind is TidegateClient:
        pytest.skip("about Tidegate only")
    lab = world.lab
    profile = world.gateway.add_peer("client")
    profile.write_text(profile.read_text().replace(f"{GATEWAY_ACCESS}:", f"{SECOND}:"))
    client = kind(lab.client, profile)
    with lab.client.capture("access", f"udp src port {LISTEN_PORT}", snaplen=64) as answers:
        client.start()
        assert checks.ping(lab.client, INTERNET, count=5).complete
        size = 8 * MIB
        transfer = checks.download(lab.client, f"http://{INTERNET}/blob/addresses/{size}")
        assert transfer.sha256 == blob_sha256("addresses", size)
    lines = answers.lines()
    assert len(lines) > size // 65_535, "trains may be captured whole"
    assert all(f"IP {SECOND}.{LISTEN_PORT} > " in line for line in lines)
    client.stop()
    world.gateway.stop()


def test_a_response_comes_from_the_addressed_one_where_that_is_not_the_first(make_world: MakeWorld) -> None:
    # A program with a connected socket hears nothing else; nor would it behind any NAT.
    world = make_world(prepare=lambda lab: lab.gateway.ip(f"address add {SECOND}/24 dev access"))
    profile = world.gateway.add_peer("client")
    text = profile.read_text()
    for address in (GATEWAY_ACCESS, SECOND, GATEWAY_ACCESS):
        profile.write_text(text.replace(f"{GATEWAY_ACCESS}:", f"{address}:"))
        client = WireguardGoClient(world.lab.client, profile)
        client.start()
        seen = world.lab.client.run(["wg", "show", client.interface, "endpoints"]).stdout.split()[1]
        assert seen == f"{address}:{LISTEN_PORT}", "it would have roamed"
        client.stop()
    world.gateway.stop()


def test_an_address_that_the_gateway_loses_costs_no_packet_towards_the_client(make_world: MakeWorld) -> None:
    world = make_world(prepare=prepare)
    gateway, host = world.tidegate, world.lab.client
    profile = gateway.add_peer("client")
    profile.write_text(profile.read_text().replace(f"{GATEWAY_ACCESS}:", f"{SECOND}:"))
    client = TidegateClient(host, profile)
    client.start()
    inner = read_profile(profile)["Interface"]["Address"].partition("/")[0]
    assert checks.ping(world.lab.gateway, inner, count=3).complete
    world.lab.gateway.ip(f"address delete {SECOND}/24 dev access")
    host.run(["nft", "delete table ip firewall"])
    # The gateway calls from what it still has, and the client roams there.
    assert checks.ping(world.lab.gateway, inner, count=5).complete
    assert checks.ping(host, INTERNET, count=5).complete
    assert "send_failed" not in gateway.status()["drops"]
    client.stop()
    gateway.stop()


def test_the_port_on_which_a_gateway_listens_can_be_published_on_another_address(
    make_world: MakeWorld,
) -> None:
    world = make_world()
    world.tidegate.stop()
    gateway, host = TidegateGateway(world.lab, listen=GATEWAY_ACCESS), world.lab.client
    gateway.start()
    profile = gateway.add_peer("client")
    client = TidegateClient(host, profile)
    client.start()
    inner = read_profile(profile)["Interface"]["Address"].partition("/")[0]
    host.popen([sys.executable, "-m", udpecho.__name__, inner], name="udpecho").wait_for(udpecho.READY)
    gateway.command("publish", "add", f"udp/{LISTEN_PORT}", "--to", f"client:{udpecho.PORT}")

    def asked() -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as visitor:
            visitor.settimeout(5)
            visitor.connect((GATEWAY_EXTERNAL, LISTEN_PORT))
            visitor.send(udpecho.WHOAMI)
            return visitor.recv(100).decode()

    assert world.lab.internet.call(asked).startswith(f"{INTERNET}:")
    client.stop()
    gateway.stop()
