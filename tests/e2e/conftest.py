"""A lab with a gateway and its clients, for tests of the whole thing.

By default Tidegate runs, as built in ``.venv/bin/tidegate``. With ``--reference``, wireguard-go and kernel NAT run in
its place: what any VPN must do is green then, and what only Tidegate does is red. So the tests themselves are tested.
With ``--offloads-off``, every offload of the gateway and of its own client is off, and the same must be true.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from tidegate.lab.services import start_services
from tidegate.lab.stacks import (
    WITHOUT_OFFLOADS,
    Client,
    Gateway,
    TidegateClient,
    TidegateGateway,
    WireguardGoClient,
    WireguardGoGateway,
)
from tidegate.lab.topology import Lab, Namespace

# Another user, who may read the working tree wherever it lies, and nothing else that root may.
AS_NOBODY = (
    *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all,+dac_read_search"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
)

ClientKind = type[TidegateClient] | type[WireguardGoClient]


@dataclass(frozen=True)
class Scale:
    """How long and how large: TIDEGATE_E2E_FULL=1 asks for the figures of the specification."""

    transfer_bytes: int
    silence_seconds: float
    idle_seconds: float

    @classmethod
    def chosen(cls) -> Scale:
        if os.environ.get("TIDEGATE_E2E_FULL") == "1":
            return cls(transfer_bytes=1 << 30, silence_seconds=60.0, idle_seconds=30.0)
        return cls(transfer_bytes=256 << 20, silence_seconds=10.0, idle_seconds=10.0)


@pytest.fixture(scope="session")
def scale() -> Scale:
    return Scale.chosen()


@dataclass
class World:
    """A lab with services and a running gateway."""

    lab: Lab
    gateway: Gateway
    reference: bool
    offloads: bool = True

    @property
    def tidegate(self) -> TidegateGateway:
        """The gateway, for tests that are about Tidegate only."""
        if not isinstance(self.gateway, TidegateGateway):
            pytest.skip("about Tidegate only")
        return self.gateway

    def connect(self, host: Namespace, kind: ClientKind | None = None, name: str | None = None) -> Client:
        """Registers a peer and connects it from `host`; by default with the gateway's own kind of client."""
        kind = kind or (WireguardGoClient if self.reference else TidegateClient)
        profile = self.gateway.add_peer(name or host.role)
        client: Client
        if kind is TidegateClient:
            client = TidegateClient(host, profile, offloads=self.offloads)
        else:
            client = kind(host, profile)
        client.start()
        return client


MakeWorld = Callable[..., World]


@pytest.fixture(scope="module")
def make_world(request: pytest.FixtureRequest) -> Iterator[MakeWorld]:
    """Builds worlds that last as long as the module; on failure their logs are part of the report."""
    reference = bool(request.config.getoption("--reference"))
    with ExitStack() as stack:

        def make(
            *,
            clients: int = 1,
            beyond_mtu: int = 1500,
            external_tx: bool = True,
            more_addresses: Sequence[str] = (),
            config: str | None = None,
            offloads: bool = True,
            prepare: Callable[[Lab], None] = lambda _: None,
        ) -> World:
            offloads = offloads and not request.config.getoption("--offloads-off")
            if not offloads and "[offloads]" not in (config or ""):
                config = (config or "") + WITHOUT_OFFLOADS
            lab = stack.enter_context(Lab(clients=clients, beyond_mtu=beyond_mtu))
            for address in more_addresses:
                lab.gateway.ip(f"address add {address}/24 dev external")
            if not external_tx:
                for host in (lab.gateway, lab.internet):
                    host.run(["ethtool", "-K", "external", "tx", "off"])
            prepare(lab)
            start_services(lab)
            gateway = WireguardGoGateway(lab) if reference else TidegateGateway(lab, config=config)
            world = World(lab, gateway, reference, offloads)
            worlds = request.node.stash.setdefault(_WORLDS, [])
            worlds.append(world)
            stack.callback(worlds.remove, world)
            gateway.start()
            return world

        yield make


_WORLDS = pytest.StashKey[list[World]]()
_LOG_LINES = 40


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds the last lines of the gateway's and the clients' logs to the report of a failed test."""
    report = yield
    module = item.getparent(pytest.Module)
    if report.failed and module is not None:
        for world in module.stash.get(_WORLDS, []):
            for log in sorted(world.lab.logs.glob("*tidegate*.log")):
                lines = log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
                report.sections.append((f"last lines of {log.name}", "\n".join(lines)))
    return report
