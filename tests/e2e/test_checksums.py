"""What leaves the gateway is correct to the last bit, also where no device finishes checksums.

::

    client ─── tunnel ─── gateway ═══ internet ─── beyond
                          tx off      tx off; tcpdump -vv computes every sum itself

veth passes unfinished checksums along and never looks at them, so with offloads on a wrong one would not be seen.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tidegate.lab import checks
from tidegate.lab.blob import blob_sha256
from tidegate.lab.topology import BEYOND, GATEWAY_EXTERNAL, INTERNET, Capture

from .conftest import MakeWorld, World

pytestmark = pytest.mark.namespaces

MIB = 1 << 20
OFFLOADS_OFF = """
[offloads]
tun = false
tun_uso = false
udp_gso = false
udp_gro = false
external = false
coalesce = false
"""


@pytest.fixture(scope="module", params=["", OFFLOADS_OFF], ids=["offloads on", "offloads off"])
def world(request: pytest.FixtureRequest, make_world: MakeWorld) -> Iterator[World]:
    world = make_world(config=request.param, external_tx=False)
    if request.param:
        assert not any(world.tidegate.status()["offloads"].values())
    world.connect(world.lab.client)
    yield world
    world.gateway.stop()


def test_no_packet_of_the_gateway_has_a_wrong_checksum(world: World) -> None:
    lab = world.lab
    with lab.internet.capture("external") as seen:
        size = 4 * MIB
        down = checks.download(lab.client, f"http://{INTERNET}/blob/sums/{size}")
        file = lab.scratch / "sums"
        checks.write_blob(file, "sums", size)
        up = checks.upload(lab.client, f"http://{INTERNET}/upload", file)
        checks.iperf(lab.client, INTERNET, "-u", "-b", "10M", "-l", "1200", seconds=1.0)
        checks.iperf(lab.client, INTERNET, "-u", "-b", "10M", "-l", "1201", seconds=1.0, reverse=True)
        checks.ping(lab.client, INTERNET, count=5, interval=0.02, size=3_001)
        checks.traceroute(lab.client, BEYOND, method="-U")
    assert seen.lost == 0
    assert down.sha256 == up.sha256 == blob_sha256("sums", size)
    packets = blocks(seen)
    assert len(packets) > 1_000
    wrong = [
        packet for packet in packets if "incorrect" in packet or "bad cksum" in packet or "wrong" in packet
    ]
    assert wrong == []


def test_no_packet_of_the_gateway_is_larger_than_the_link_allows(world: World) -> None:
    with world.lab.internet.capture("external", "greater 1515", snaplen=128) as seen:
        checks.iperf(world.lab.client, INTERNET, seconds=1.0)
    # Without transmit offloads the device cannot split, so what arrives must have been split before.
    assert seen.lines(f"src host {GATEWAY_EXTERNAL}") == []


def blocks(capture: Capture) -> list[str]:
    """Packets from the gateway as tcpdump -vv describes them, one text each (its lines begin with a blank)."""
    lines = capture.lines(f"src host {GATEWAY_EXTERNAL}", verbose=True)
    starts = [n for n, line in enumerate(lines) if not line.startswith((" ", "\t"))]
    return [" ".join(lines[a:b]) for a, b in itertools.pairwise([*starts, len(lines)])]
