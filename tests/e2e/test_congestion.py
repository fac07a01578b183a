"""A router between client and gateway that marks packets of the tunnel where others would drop them (ECN, RFC 3168).

::

    client ─── marks ─── tunnel ─── gateway ─── internet
    access (nftables of the client's host)      203.0.113.9

The marks are on the outer headers, and the two ends of a connection, inside, are to hear of them (RFC 6040 §4.2).
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator

import pytest

from tidegate.lab import checks
from tidegate.lab.blob import blob, blob_sha256
from tidegate.lab.stacks import LISTEN_PORT, TidegateClient, WireguardGoClient
from tidegate.lab.topology import GATEWAY_EXTERNAL, INTERNET
from tidegate.lab.waiting import wait_until

from .conftest import ClientKind, MakeWorld, World

pytestmark = pytest.mark.namespaces

SIZE = 1 << 20
# Some of the large ones: what TCP sends again is not ECN-capable (RFC 3168 §6.1.5), and a mark loses it.
MARKS = f"""
table ip congestion {{
    chain up {{
        type filter hook output priority 0
        udp dport {LISTEN_PORT} udp length > 1000 limit rate 20/second burst 5 packets ip ecn set ce
    }}
    chain down {{
        type filter hook input priority 0
        udp sport {LISTEN_PORT} udp length > 1000 limit rate 20/second burst 5 packets ip ecn set ce
    }}
}}
"""
MARKED = "tcp and ip[1] & 3 == 3"
ECE = "tcp[13] & 0x42 == 0x40"
"""What a receiver that has seen a mark says in its acknowledgments, and not in a SYN."""
CWR = "tcp[13] & 0x82 == 0x80"
"""What a sender that has heard of it says, once: it sends more slowly now."""


@pytest.fixture(
    scope="module", params=[TidegateClient, WireguardGoClient], ids=["own client", "wireguard-go"]
)
def world(request: pytest.FixtureRequest, make_world: MakeWorld) -> Iterator[World]:
    kind: ClientKind = request.param
    world = make_world()
    if world.reference and kind is TidegateClient:
        pytest.skip("about Tidegate only")
    client = world.connect(world.lab.client, kind)
    for host in (world.lab.client, world.lab.internet):
        host.sysctl("net.ipv4.tcp_ecn", "1")
    world.lab.client.run(["nft", "-f", "/dev/stdin"], stdin=MARKS)
    yield world
    client.stop()
    world.gateway.stop()


def upload() -> str:
    web = http.client.HTTPConnection(INTERNET, timeout=30)
    web.request("PUT", "/upload", body=b"".join(blob("up", SIZE)))
    sha256: str = json.loads(web.getresponse().read())["sha256"]
    return sha256


def test_a_client_whose_packets_are_marked_on_the_way_to_the_gateway_sends_more_slowly(world: World) -> None:
    with world.lab.internet.capture("external", "tcp", snaplen=100) as seen:
        assert world.lab.client.call(upload) == blob_sha256("up", SIZE)
    assert seen.lines(f"src host {GATEWAY_EXTERNAL} and {MARKED}"), "the mark is inside now"
    assert seen.lines(f"dst host {GATEWAY_EXTERNAL} and {ECE}"), "the receiver has seen it"
    assert seen.lines(f"src host {GATEWAY_EXTERNAL} and {CWR}"), "the sender has heard of it"


# (wireguard-go does not look at the marks of what it receives.)
@pytest.mark.parametrize("world", [TidegateClient], ids=["own client"], indirect=True)
def test_a_server_whose_packets_are_marked_on_the_way_to_the_client_sends_more_slowly(world: World) -> None:
    with world.lab.internet.capture("external", "tcp", snaplen=100) as seen:
        transfer = checks.download(world.lab.client, f"http://{INTERNET}/blob/down/{SIZE}")
    assert transfer.sha256 == blob_sha256("down", SIZE)
    assert seen.lines(f"src host {GATEWAY_EXTERNAL} and {ECE}"), "the receiver has seen a mark"
    assert seen.lines(f"dst host {GATEWAY_EXTERNAL} and {CWR}"), "the sender has heard of it"


def test_a_mark_on_what_only_a_loss_can_slow_down_is_a_loss_that_is_counted(world: World) -> None:
    def marked() -> int:
        count: int = world.tidegate.status()["drops"].get("congestion_marked", 0)
        return count

    before = marked()
    assert not checks.ping(world.lab.client, INTERNET, count=5, interval=0.02, size=1200).complete
    wait_until(lambda: marked() > before, "a drop under its own reason", timeout=5)
