"""A gateway's status in Prometheus's text exposition format, version 0.0.4
(https://prometheus.io/docs/instrumenting/exposition_formats/).

The format is written here: it is a few lines, and the client library would be one more package that root runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from tidegate.control.commands import GatewayStatus, PeerView

Labels = tuple[tuple[str, str], ...]
"""Names and values of a sample's labels."""


@dataclass(frozen=True, slots=True)
class Family:
    """A metric. Counters only ever grow while the gateway runs; their names end with ``_total``."""

    kind: Literal["counter", "gauge"]
    name: str
    """Without the prefix ``tidegate_``."""
    help: str
    """One line, without backslashes."""
    samples: Mapping[Labels, float]


def exposition(status: GatewayStatus, reasons: Iterable[str], now: float) -> str:
    """The whole text. `reasons` are all those for which packets may be dropped; `now`, in seconds since the epoch, is
    when the gateway gave its status."""
    return "".join(_text(family) for family in _families(status, reasons, now) if family.samples)


def _text(family: Family) -> str:
    name = f"tidegate_{family.name}"
    lines = [f"# HELP {name} {family.help}", f"# TYPE {name} {family.kind}"]
    lines += (f"{name}{_label_text(labels)} {value}" for labels, value in family.samples.items())
    return "\n".join(lines) + "\n"


def _label_text(labels: Labels) -> str:
    inside = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels)
    return f"{{{inside}}}" if inside else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _families(status: GatewayStatus, reasons: Iterable[str], now: float) -> Iterator[Family]:
    yield Family("gauge", "build_info", "The gateway's version.", {(("version", status.version),): 1})
    yield Family("gauge", "uptime_seconds", "Since the gateway was started.", {(): status.uptime})
    yield Family("gauge", "shards", "Threads that move packets.", {(): status.shards})
    yield Family(
        "gauge",
        "external_usable",
        "Whether the external link can be used at the moment.",
        {(): int(status.external_trouble is None)},
    )
    yield Family(
        "gauge",
        "default_route_known",
        "Whether a default route leads out of the external interface: otherwise clients reach its own networks only.",
        {(): int(status.default_route)},
    )
    yield Family(
        "gauge",
        "offload_used",
        "Whether a kernel offload is in use.",
        _by("offload", {name: int(used) for name, used in status.offloads.items()}),
    )
    yield Family("gauge", "mappings", "NAT mappings.", _by("protocol", status.mappings))
    yield Family(
        "gauge",
        "reserved_ports",
        "External ports that the NAT has reserved.",
        _by("protocol", status.reserved_ports),
    )
    yield Family("counter", "packets_total", "Packets moved.", _by("direction", status.packets))
    yield Family("counter", "bytes_total", "Bytes moved.", _by("direction", status.bytes))
    # With what has not happened yet: `increase()` does not see the first event of a counter that begins with it.
    drops = {**dict.fromkeys(reasons, 0), **status.drops}
    yield Family("counter", "dropped_packets_total", "Packets dropped.", _by("reason", drops))
    yield Family("counter", "dns_events_total", "Events of the DNS proxy.", _by("event", status.dns or {}))
    yield from _peer_families(status.peers, now)


def _peer_families(peers: list[PeerView], now: float) -> Iterator[Family]:
    def each(value: Callable[[PeerView], float]) -> dict[Labels, float]:
        return {(("peer", peer.name),): value(peer) for peer in peers}

    yield Family(
        "gauge",
        "peer_info",
        "A peer's inner address and cipher.",
        {(("peer", peer.name), ("address", peer.address), ("cipher", peer.cipher)): 1 for peer in peers},
    )
    yield Family(
        "gauge",
        "peer_enabled",
        "Whether the peer is enabled: one that is disabled cannot connect.",
        each(lambda peer: int(peer.enabled)),
    )
    yield Family(
        "gauge",
        "peer_last_handshake_timestamp_seconds",
        "When the peer's last handshake was, since the epoch; a peer without one is absent.",
        {
            (("peer", peer.name),): round(now - peer.last_handshake, 3)
            for peer in peers
            if peer.last_handshake is not None
        },
    )
    yield Family("gauge", "peer_mappings", "NAT mappings of the peer.", each(lambda peer: peer.mappings))
    yield Family(
        "counter",
        "peer_received_bytes_total",
        "Inner bytes received from the peer.",
        each(lambda peer: peer.received_bytes),
    )
    yield Family(
        "counter",
        "peer_sent_bytes_total",
        "Inner bytes sent to the peer.",
        each(lambda peer: peer.sent_bytes),
    )
    yield Family(
        "counter",
        "peer_received_packets_total",
        "Inner packets received from the peer.",
        each(lambda peer: peer.received_packets),
    )
    yield Family(
        "counter",
        "peer_sent_packets_total",
        "Inner packets sent to the peer.",
        each(lambda peer: peer.sent_packets),
    )


def _by(label: str, values: Mapping[str, int]) -> dict[Labels, float]:
    return {((label, name),): value for name, value in values.items()}
