"""What the benchmark compares: each variant is one way from a client to the internet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tidegate.lab.openvpn import OpenVpnClient, OpenVpnGateway
from tidegate.lab.processes import which
from tidegate.lab.softether import SoftEtherClient, SoftEtherGateway
from tidegate.lab.stacks import (
    BORINGTUN,
    WITHOUT_OFFLOADS,
    Client,
    Gateway,
    KernelGateway,
    TidegateClient,
    TidegateGateway,
    WireguardGoClient,
    WireguardGoGateway,
)
from tidegate.lab.topology import Lab, Namespace
from tidegate.lab.workloads import (
    BULK,
    CONNECTIONS,
    CPU,
    LOADED_PING,
    PING,
    TCP_1_DOWN,
    TCP_1_UP,
    TCP_8_DOWN,
    UDP_64,
    Rig,
)

# The limits that protect a gateway from one client are not what is measured here.
SETTINGS = """
[nat]
max_new_mappings_per_second = 100000
max_mappings_per_client = 65536
"""

KERNEL = "kernel forwarding + masquerade"
TIDEGATE = "Tidegate"
TIDEGATE_AES = "Tidegate, AES-256-GCM"
TIDEGATE_STOCK_CLIENT = "Tidegate, wireguard-go as client"
TIDEGATE_BARE = "Tidegate, offloads off"
WIREGUARD_GO = "wireguard-go + kernel NAT"
BORINGTUN_KERNEL = "boringtun + kernel NAT"
OPENVPN = "OpenVPN + kernel NAT"
SOFTETHER = "SoftEther with SecureNAT"

# No goal involves these three, so they are measured only with what a user would look at first, to keep the run short.
_FOR_THE_PICTURE = (TCP_1_UP, TCP_1_DOWN, TCP_8_DOWN, UDP_64, CONNECTIONS, PING, LOADED_PING, CPU)


@dataclass(frozen=True)
class Variant:
    """One way from a client to the internet."""

    name: str
    gateway: Callable[[Lab], Gateway] | None
    """None: only the kernel."""
    client: Callable[[Namespace, Path], Client] | None = None
    needs: Sequence[str] = ()
    """Commands that must be installed."""
    only: Sequence[str] = ()
    """The workloads that it is measured with; empty: all."""
    default: bool = True
    """Whether it is measured if no variant is asked for by name."""

    def missing(self) -> list[str]:
        """The commands that are not installed."""
        return [Path(command).name for command in self.needs if which(command) is None]

    def measured_with(self, workload: str) -> bool:
        return not self.only or workload in self.only

    def set_up(self, lab: Lab) -> Rig:
        """Starts it in a lab whose services are running."""
        if self.gateway is None or self.client is None:
            KernelGateway(lab).start()
            return Rig(lab, None)
        gateway = self.gateway(lab)
        gateway.start()
        for host in lab.clients:
            self.client(host, gateway.add_peer(host.role)).start()
        return Rig(lab, gateway.process)


def _sharded(shards: int) -> Variant:
    settings = f"[gateway]\nshards = {shards}\n{SETTINGS}"
    name = f"{TIDEGATE}, {shards} shard{'s' if shards > 1 else ''}"
    return Variant(name, partial(TidegateGateway, config=settings), TidegateClient, default=False)


VARIANTS = [
    Variant(KERNEL, None),
    Variant(TIDEGATE, partial(TidegateGateway, config=SETTINGS), TidegateClient),
    Variant(
        TIDEGATE_AES,
        partial(TidegateGateway, config=SETTINGS, cipher="aes-256-gcm"),
        TidegateClient,
        only=(*BULK, CPU),
    ),
    Variant(
        TIDEGATE_STOCK_CLIENT,
        partial(TidegateGateway, config=SETTINGS),
        WireguardGoClient,
        ("wireguard-go", "wg"),
    ),
    Variant(
        TIDEGATE_BARE,
        partial(TidegateGateway, config=SETTINGS + WITHOUT_OFFLOADS),
        partial(TidegateClient, offloads=False),
        only=BULK,
    ),
    Variant(WIREGUARD_GO, WireguardGoGateway, WireguardGoClient, ("wireguard-go", "wg")),
    Variant(
        BORINGTUN_KERNEL,
        partial(WireguardGoGateway, program=BORINGTUN),
        partial(WireguardGoClient, program=BORINGTUN),
        (BORINGTUN[0], "wg"),
        only=_FOR_THE_PICTURE,
    ),
    Variant(OPENVPN, OpenVpnGateway, OpenVpnClient, ("openvpn", "openssl"), only=_FOR_THE_PICTURE),
    Variant(
        SOFTETHER,
        SoftEtherGateway,
        SoftEtherClient,
        ("vpnserver", "vpnclient", "vpncmd"),
        only=_FOR_THE_PICTURE,
    ),
    *(_sharded(shards) for shards in (1, 2, 4)),
]


def chosen_variants(parts: Sequence[str]) -> list[Variant]:
    """The variants with one of `parts` in their names; without parts, those of the default run."""
    if not parts:
        return [variant for variant in VARIANTS if variant.default]
    return [v for v in VARIANTS if any(part.lower() in v.name.lower() for part in parts)]
