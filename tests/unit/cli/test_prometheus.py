"""``tidegate status --prometheus``, read by the format's own grammar (text exposition format 0.0.4)."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path

import pytest

from tests.unit.conftest import CommandLine
from tests.unit.running import serving
from tidegate.cli.prometheus import exposition
from tidegate.control.commands import GatewayStatus, PeerView
from tidegate.dns.events import DNS_EVENTS
from tidegate.settings import Settings

SAMPLE = re.compile(r"(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\[\\"n])*)"(?:,|$)')
ESCAPES = {r"\\": "\\", r"\"": '"', r"\n": "\n"}

Sample = tuple[str, frozenset[tuple[str, str]]]


def samples(text: str) -> dict[Sample, float]:
    """Every sample. Each must belong to the HELP and TYPE above it, and be there once."""
    assert text.endswith("\n"), "the last line ends with a line feed"
    found: dict[Sample, float] = {}
    families: set[str] = set()
    described = family = kind = ""
    for line in text.splitlines():
        if line.startswith("# HELP "):
            described, _, help_text = line.removeprefix("# HELP ").partition(" ")
            assert help_text and "\\" not in help_text
        elif line.startswith("# TYPE "):
            family, _, kind = line.removeprefix("# TYPE ").partition(" ")
            assert family == described and family not in families, "one HELP and one TYPE, together"
            families.add(family)
            assert kind in {"counter", "gauge"}
            assert (kind == "counter") == family.endswith("_total")
        else:
            sample = SAMPLE.fullmatch(line)
            assert sample is not None, line
            assert sample["name"] == family
            assert LABEL.sub("", sample["labels"] or "") == "", line
            pairs = LABEL.findall(sample["labels"] or "")
            labels = {name: re.sub(r"\\.", lambda escape: ESCAPES[escape[0]], value) for name, value in pairs}
            assert len(labels) == len(pairs)
            key = (family, frozenset(labels.items()))
            assert key not in found, line
            found[key] = float(sample["value"])
    return found


def of(name: str, **labels: str) -> Sample:
    return f"tidegate_{name}", frozenset(labels.items())


def status_of(*peers: PeerView) -> GatewayStatus:
    return GatewayStatus(
        version="1.2.3",
        pid=1,
        uptime=12.5,
        listen="0.0.0.0:51820",
        public_key="",
        subnet="10.66.77.0/24",
        gateway_address="10.66.77.1",
        external_interface="eth0",
        external_addresses=["192.0.2.2"],
        next_hop=None,
        default_route=False,
        external_trouble="the link is down",
        shards=2,
        offloads={"tun": True, "udp_gso": False},
        peers=list(peers),
        mappings={},
        reserved_ports={},
        packets={},
        bytes={},
        drops={},
        dns={"answered": 3},
    )


def test_a_running_gateway_is_described(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            await running.cli("peer", "add", "alice")
            before = time.time()
            code, out, err = await running.cli("status", "--prometheus")
            after = time.time()
            assert (code, err) == (0, "")
            found = samples(out)
            assert found[of("dropped_packets_total", reason="spoofed_source")] == 7
            assert found[of("dropped_packets_total", reason="no_mapping")] == 0, (
                "so that a first drop is a rise"
            )
            assert found[of("dropped_packets_total", reason="queue_delay")] == 0, "known, and not yet counted"
            assert found[of("packets_total", direction="from_peers")] == 20
            assert found[of("bytes_total", direction="from_peers")] == 2048
            assert found[of("mappings", protocol="udp")] == 2
            assert found[of("reserved_ports", protocol="tcp")] == 64
            assert found[of("external_usable")] == 1
            assert found[of("default_route_known")] == 1
            assert found[of("peer_info", peer="alice", address="10.66.77.2", cipher="chacha20-poly1305")] == 1
            assert found[of("peer_received_bytes_total", peer="alice")] == 2048
            assert found[of("peer_sent_bytes_total", peer="alice")] == 1024
            assert found[of("peer_received_packets_total", peer="alice")] == 20
            assert found[of("peer_sent_packets_total", peer="alice")] == 10
            assert found[of("peer_mappings", peer="alice")] == 1
            assert found[of("peer_enabled", peer="alice")] == 1
            handshake = found[of("peer_last_handshake_timestamp_seconds", peer="alice")]
            assert before - 3.5 - 0.001 <= handshake <= after - 3.5 + 0.001
            assert not any(name.startswith("tidegate_dns") for name, _ in found), "DNS is off"

    asyncio.run(scenario())


def test_large_counts_are_exact() -> None:
    many = 2**53 - 1  # the largest that Prometheus, whose values are doubles, still tells from the next
    peer = PeerView(name="alice", address="10.66.77.2", public_key="", created_at=0, received_bytes=many)
    text = exposition(status_of(peer), (), now=1000)
    assert f'tidegate_peer_received_bytes_total{{peer="alice"}} {many}\n' in text


def test_any_text_fits_in_a_label() -> None:
    name = 'a"b\\c\nd\\n,{}'
    peer = PeerView(name=name, address="10.66.77.2", public_key="", created_at=0, enabled=False)
    found = samples(exposition(status_of(peer), (), now=1000))
    assert of("peer_sent_bytes_total", peer=name) in found
    assert found[of("peer_enabled", peer=name)] == 0
    assert of("peer_last_handshake_timestamp_seconds", peer=name) not in found, "it never had one"


def test_what_is_not_well_is_visible() -> None:
    found = samples(exposition(status_of(), ("no_mapping",), now=1000))
    assert found[of("build_info", version="1.2.3")] == 1
    assert found[of("uptime_seconds")] == 12.5
    assert found[of("external_usable")] == 0
    assert found[of("default_route_known")] == 0
    assert found[of("offload_used", offload="tun")] == 1
    assert found[of("offload_used", offload="udp_gso")] == 0
    assert found[of("dns_events_total", event="answered")] == 3
    assert found[of("dropped_packets_total", reason="no_mapping")] == 0


def test_the_documentation_says_what_every_dns_event_means() -> None:
    operation = (Path(__file__).parents[3] / "docs" / "operation.md").read_text()
    table = operation.partition("| `event` of `dns_events_total` |")[2].partition("\n\n")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \| [A-Z]", table, re.MULTILINE)) == DNS_EVENTS


def test_two_formats_at_once_are_refused(tidegate: CommandLine, tmp_path: Path) -> None:
    message = tidegate.refused(2, "status", "--json", "--prometheus", "--state-dir", tmp_path)
    assert "--json and --prometheus" in message
