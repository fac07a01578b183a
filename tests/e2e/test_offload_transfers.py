"""Transfers are intact over wide and narrow paths, whatever the ends agreed on, with all offloads and with none.

::

    client ─── tunnel ─── gateway ═══ internet ─── beyond
          access    (tx off)  external      beyond
          (tx off)

Without transmit offloads at the gateway's interfaces the kernel splits and sums what is sent, and the receiving kernel
and tcpdump verify it; what comes from the internet stays in superpackets.
"""

from __future__ import annotations

import hashlib
import http.client
import itertools
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tidegate.lab.blob import blob, blob_sha256
from tidegate.lab.topology import BEYOND, GATEWAY_EXTERNAL, INTERNET, Capture, Lab, Namespace

from .conftest import MakeWorld, World

pytestmark = pytest.mark.namespaces

FULL = os.environ.get("TIDEGATE_E2E_FULL") == "1"
SIZE = (64 if FULL else 2) << 20
IN_USE = 536  # RFC 879: the segment size of a host that says nothing


@dataclass(frozen=True)
class Path:
    """MTUs of the links, and of the tunnel where it is not the default."""

    access: int = 1500
    external: int = 1500
    beyond: int = 1500
    tunnel: int = 1420

    def __str__(self) -> str:
        return f"access {self.access}, external {self.external}, beyond {self.beyond}"

    @property
    def server(self) -> str:
        return BEYOND if self.beyond < self.external else INTERNET

    def prepare(self, lab: Lab) -> None:
        for host in (lab.client, lab.gateway):
            host.ip(f"link set access mtu {self.access}")
            host.run(["ethtool", "-K", "access", "tx", "off"])
        for host in (lab.gateway, lab.internet):
            host.ip(f"link set external mtu {self.external}")
        lab.gateway.run(["ethtool", "-K", "external", "tx", "off"])


ORDINARY = Path()
NARROW_BEYOND = Path(beyond=1280)
NARROW_ACCESS = Path(access=1280)
PATHS = [
    ORDINARY,
    NARROW_BEYOND,
    NARROW_ACCESS,
    Path(external=1280),
    Path(external=9000),
    Path(access=9000, external=9000, tunnel=8900),
]
CASES = [(path, True) for path in PATHS]
CASES += [(path, False) for path in (PATHS if FULL else (ORDINARY, NARROW_BEYOND, NARROW_ACCESS))]

SETTINGS = {
    "as Linux does it": {},
    "ECN": {"tcp_ecn": "1"},
    "no timestamps": {"tcp_timestamps": "0"},
    "no SACK": {"tcp_sack": "0"},
    "neither": {"tcp_timestamps": "0", "tcp_sack": "0"},
}
"""Of ``net.ipv4``, at both ends."""


@dataclass
class Scene:
    world: World
    path: Path

    @property
    def ends(self) -> list[Namespace]:
        lab = self.world.lab
        return [lab.client, lab.beyond if self.path.server == BEYOND else lab.internet]

    def transfers_are_intact(self, *, segment: int | None = None) -> None:
        down, up = self.world.lab.client.call(lambda: transfer(self.path.server, segment))
        assert down == blob_sha256("down", SIZE)
        assert up == blob_sha256("up", SIZE)


@pytest.fixture(
    scope="module",
    params=CASES,
    ids=[f"{path}, offloads {'on' if offloads else 'off'}" for path, offloads in CASES],
)
def scene(request: pytest.FixtureRequest, make_world: MakeWorld) -> Iterator[Scene]:
    path, offloads = request.param
    config = f"[gateway]\ntunnel_mtu = {path.tunnel}\n"
    world = make_world(beyond_mtu=path.beyond, config=config, offloads=offloads, prepare=path.prepare)
    client = world.connect(world.lab.client)
    if not world.offloads:
        assert not any(world.tidegate.status()["offloads"].values())
    yield Scene(world, path)
    client.stop()
    world.gateway.stop()


def transfer(server: str, segment: int | None) -> tuple[str, str]:
    """SHA-256 of a download and of an upload; `segment` is the largest one that this end takes and sends."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
        connection.settimeout(30)
        if segment is not None:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, segment)
        connection.connect((server, 80))
        web = http.client.HTTPConnection(server)
        web.sock = connection
        web.request("GET", f"/blob/down/{SIZE}")
        down = hashlib.sha256(web.getresponse().read()).hexdigest()
        web.request("PUT", "/upload", body=b"".join(blob("up", SIZE)))
        up: str = json.loads(web.getresponse().read())["sha256"]
        return down, up


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_transfers_are_intact_whatever_the_ends_agreed_on(scene: Scene, settings: dict[str, str]) -> None:
    before = [
        (host, key, host.run(["sysctl", "-n", f"net.ipv4.{key}"]).stdout.strip())
        for host in scene.ends
        for key in settings
    ]
    try:
        for host, key, _ in before:
            host.sysctl(f"net.ipv4.{key}", settings[key])
        scene.transfers_are_intact()
    finally:
        for host, key, value in before:
            host.sysctl(f"net.ipv4.{key}", value)


def test_what_the_internet_sees_has_right_checksums_and_fits_the_path(scene: Scene) -> None:
    lab, path = scene.world.lab, scene.path
    for host in scene.ends:
        host.sysctl("net.ipv4.tcp_ecn", "1")
    with lab.internet.capture("external", f"src host {GATEWAY_EXTERNAL}", snaplen=9_100) as seen:
        scene.transfers_are_intact(segment=IN_USE)
        scene.transfers_are_intact()
    assert seen.lost == 0
    packets = described(seen)
    assert len(packets) > SIZE // IN_USE
    wrong = [text for text in packets if "incorrect" in text or "bad cksum" in text or "wrong" in text]
    assert wrong == []
    assert seen.lines(f"ip[2:2] > {min(path.external, path.tunnel)}") == []
    assert seen.lines("tcp and ip[1] & 3 == 2"), "ECN-capable segments (RFC 3168 §5)"
    # The first connection's data: nothing of it is larger than what its end had said.
    ports = [line.split(f"{GATEWAY_EXTERNAL}.")[1].split(" ")[0] for line in seen.lines("tcp[13] & 2 != 0")]
    assert len(ports) == 2
    payload = "(ip[2:2] - ((ip[0]&0xf)<<2)) - ((tcp[12]&0xf0)>>2)"
    assert seen.lines(f"src port {ports[0]} and {payload} > {IN_USE}") == []
    assert seen.lines(f"src port {ports[0]} and {payload} > {IN_USE - 20}") != []


def described(capture: Capture) -> list[str]:
    """Packets as tcpdump -vv describes them, one text each (its lines begin with a blank)."""
    lines = capture.lines(verbose=True)
    starts = [n for n, line in enumerate(lines) if not line.startswith((" ", "\t"))]
    return [" ".join(lines[a:b]) for a, b in itertools.pairwise([*starts, len(lines)])]
