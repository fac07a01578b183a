"""The image that the Containerfile builds, run by Podman in the lab's gateway namespace.

`make test` builds no image, so these run where one is named: ``pytest tests/e2e/test_container.py --image tidegate``.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tidegate.lab import checks, hoststate
from tidegate.lab.blob import blob_sha256
from tidegate.lab.hoststate import HostState
from tidegate.lab.processes import run
from tidegate.lab.services import start_services
from tidegate.lab.stacks import INNER_GATEWAY, LISTEN_PORT, TidegateClient, WireguardGoClient
from tidegate.lab.topology import GATEWAY_ACCESS, GATEWAY_EXTERNAL, INTERNET, Lab
from tidegate.lab.waiting import wait_until

from .conftest import ClientKind

pytestmark = pytest.mark.namespaces

MIB = 1 << 20
STATE = "/var/lib/tidegate"
CAPABILITIES = ("NET_ADMIN", "NET_RAW", "NET_BIND_SERVICE")
TUN = "/dev/net/tun"
STOP_SECONDS = 2.0
"""Within which SIGTERM ends a gateway, and Podman notices."""

_serial = itertools.count()


class Container:
    """A gateway in a container."""

    def __init__(self, name: str) -> None:
        self.name = name

    def tidegate(self, *arguments: str) -> str:
        """Runs the command inside, and returns what it prints."""
        return run(["podman", "exec", self.name, "tidegate", *arguments]).stdout

    def log(self) -> str:
        said = run(["podman", "logs", self.name], check=False)
        return said.stdout + said.stderr

    def wait_until_ready(self) -> str:
        """Returns the line with which the gateway says that it serves."""
        wait_until(lambda: "listening on" in self.log(), "the container to serve", timeout=20.0)
        return next(line for line in self.log().splitlines() if "listening on" in line)

    def wait(self) -> int:
        """Waits until it has ended, and returns its exit code."""
        return int(run(["podman", "wait", self.name]).stdout)

    def stop(self) -> float:
        """Returns how many seconds it took."""
        begun = time.monotonic()
        run(["podman", "stop", self.name])
        return time.monotonic() - begun


class Place:
    """A lab in which containers run, and a volume for their state."""

    def __init__(self, lab: Lab, image: str, undo: ExitStack) -> None:
        self.lab = lab
        self.volume = f"tidegate-test-{os.getpid()}-{next(_serial)}"
        self._image = image
        self._undo = undo
        undo.callback(run, ["podman", "volume", "rm", "--force", self.volume], check=False)

    def run(self, *, capabilities: tuple[str, ...] = CAPABILITIES, tun: bool = True) -> Container:
        container = Container(f"{self.volume}-{next(_serial)}")
        options = ["--cap-drop", "all", *(f"--cap-add={name}" for name in capabilities)]
        options += ["--device", TUN] * tun
        options += ["--network", f"ns:/run/netns/{self.lab.gateway.name}", "--dns", INTERNET]
        options += ["--ulimit", "nofile=65536", "--volume", f"{self.volume}:{STATE}"]
        self._undo.callback(run, ["podman", "rm", "--force", "--time", "1", container.name], check=False)
        run(["podman", "run", "--detach", "--name", container.name, *options, self._image], timeout=60)
        return container


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    image = request.config.getoption("--image")
    if image is None:
        pytest.skip("needs an image: `make image`, and --image tidegate")
    with ExitStack() as undo:
        lab = undo.enter_context(Lab())
        start_services(lab)
        yield Place(lab, image, undo)


def connect(place: Place, container: Container, kind: ClientKind) -> TidegateClient | WireguardGoClient:
    profile: Path = place.lab.scratch / "alice.conf"
    profile.touch(mode=0o600)
    endpoint = f"{GATEWAY_ACCESS}:{LISTEN_PORT}"
    profile.write_text(container.tidegate("peer", "add", "alice", "--endpoint", endpoint))
    client = kind(place.lab.client, profile)
    client.start()
    return client


@pytest.mark.parametrize("kind", [TidegateClient, WireguardGoClient], ids=["own client", "wireguard-go"])
def test_a_container_serves_and_the_one_that_replaces_it_serves_the_same_peers(
    place: Place, kind: ClientKind
) -> None:
    lab = place.lab
    before = HostState.read(lab.gateway)
    first = place.run()
    assert first.wait_until_ready().endswith(f"external external {GATEWAY_EXTERNAL}, 0 peers")
    client = connect(place, first, kind)

    assert checks.ping(lab.client, INTERNET).complete
    seen = json.loads(lab.client.run(["curl", "-sS", "--fail", f"http://{INTERNET}/whoami"]).stdout)
    assert seen["address"] == GATEWAY_EXTERNAL
    assert checks.lookup(lab.client, "www.example", INNER_GATEWAY) == [INTERNET]
    transfer = checks.download(lab.client, f"http://{INTERNET}/blob/container/{64 * MIB}")
    assert transfer.sha256 == blob_sha256("container", 64 * MIB)
    (peer,) = json.loads(first.tidegate("status", "--json"))["peers"]
    assert peer["name"] == "alice" and peer["last_handshake"] is not None
    own = hoststate.tun_devices(lab.gateway)
    assert hoststate.compare(before, HostState.read(lab.gateway), own).untouched

    assert first.stop() < STOP_SECONDS
    assert first.wait() == 0
    assert hoststate.compare(before, HostState.read(lab.gateway), set()).untouched

    second = place.run()
    assert second.wait_until_ready().endswith("1 peer")
    wait_until(lambda: checks.ping(lab.client, INTERNET, count=1).complete, "the client to be served again")
    assert second.stop() < STOP_SECONDS
    assert second.wait() == 0
    client.stop()


@pytest.mark.parametrize(
    ("capabilities", "tun", "message"),
    [
        (
            CAPABILITIES,
            False,
            f"{TUN} does not exist; run `modprobe tun`, or start the container with --device {TUN}",
        ),
        (
            ("NET_ADMIN", "NET_BIND_SERVICE"),
            True,
            "CAP_NET_RAW, which root lacks here; in a container, start it with",
        ),
        ((), True, "--cap-add NET_ADMIN --cap-add NET_RAW"),
        (("NET_ADMIN", "NET_RAW"), True, f"UDP {INNER_GATEWAY}:53 cannot be bound: permission denied; grant"),
    ],
    ids=["no device", "no NET_RAW", "no capability", "no NET_BIND_SERVICE"],
)
def test_what_a_container_lacks_is_named(
    place: Place, capabilities: tuple[str, ...], tun: bool, message: str
) -> None:
    container = place.run(capabilities=capabilities, tun=tun)
    assert container.wait() == 1
    assert message in container.log()
    assert "Traceback" not in container.log()
