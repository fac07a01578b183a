"""What the benchmark measures, one function a figure. Each takes a `Rig`, set up and warm, and gives a number."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from tidegate.lab import checks, shortserver
from tidegate.lab.processes import CommandError, Process
from tidegate.lab.topology import INTERNET, Lab

_BULK_SECONDS = 3.0
_PROBE_SECONDS = 1.0
_LOSS_LIMIT = 0.1  # per cent
_PROBES = 7
_CONNECTIONS = (
    1500  # few enough for the NAT's closed connections to rest for their 4 minutes (RFC 5382 REQ-5)
)


@dataclass
class Rig:
    """One way from a client to the internet, up and running."""

    lab: Lab
    gateway: Process | None
    """The gateway's process; None where the kernel does it all."""


@dataclass(frozen=True)
class Workload:
    """One figure that is measured."""

    name: str
    unit: str
    measure: Callable[[Rig], float | None]
    """None: does not apply."""
    better: str = "more"
    clients: int = 1
    """How many clients the lab needs."""


def tcp(*, flows: int, reverse: bool) -> Callable[[Rig], float]:
    """Gb/s over TCP."""

    def measure(rig: Rig) -> float:
        rate = checks.tcp_throughput(
            rig.lab.client, INTERNET, seconds=_BULK_SECONDS, flows=flows, reverse=reverse
        )
        return rate / 1e9

    return measure


def tcp_both(rig: Rig) -> float:
    """Gb/s over TCP, both directions at once, added."""
    report = checks.iperf(rig.lab.client, INTERNET, "--bidir", "-O", "0.5", seconds=_BULK_SECONDS)
    end = report["end"]
    both = end["sum_received"]["bits_per_second"] + end["sum_received_bidir_reverse"]["bits_per_second"]
    return float(both) / 1e9


def udp(*, size: int) -> Callable[[Rig], float]:
    """Thousands of packets per second, the highest rate that was found with less than 0.1 % loss."""

    def measure(rig: Rig) -> float:
        best, low, high = 0.0, 2e3, 400e3
        for _ in range(_PROBES):
            rate = (low * high) ** 0.5
            arrived = _udp_probe(rig, size, rate)
            if arrived is None:
                high = rate
            else:
                best, low = max(best, arrived), rate
        return best / 1e3

    return measure


def _udp_probe(rig: Rig, size: int, packets_per_second: float) -> float | None:
    """Packets per second that arrived at an offered rate; None if too many were lost on the way."""
    bits = packets_per_second * size * 8
    offered = ["-u", "-b", f"{bits:.0f}", "-l", str(size), "-w", "4M", "--pacing-timer", "200"]
    try:
        report = checks.iperf(rig.lab.client, INTERNET, *offered, seconds=_PROBE_SECONDS)
    except CommandError:
        # iperf3's server resets a control connection that comes while it still drains the flood before; a second
        # failure is a finding.
        report = checks.iperf(rig.lab.client, INTERNET, *offered, seconds=_PROBE_SECONDS)
    total = report["end"]["sum"]
    return None if total["lost_percent"] >= _LOSS_LIMIT else float(total["packets"] / total["seconds"])


def connections(rig: Rig) -> float:
    """TCP connections per second, each with one short request, 32 at a time."""
    command = ["ab", "-q", "-n", str(_CONNECTIONS), "-c", "32", f"http://{INTERNET}:{shortserver.PORT}/"]
    output = rig.lab.client.run(command, timeout=60).stdout
    rate = re.search(r"Requests per second: +([\d.]+)", output)
    failed = re.search(r"Failed requests: +(\d+)", output)
    if rate is None or failed is None or int(failed[1]):
        raise CommandError(command, 0, output)
    return float(rate[1])


def ping_idle(rig: Rig) -> float:
    """Milliseconds, median of 200."""
    return checks.ping(rig.lab.client, INTERNET, count=200, interval=0.01).median


def ping_under_load(rig: Rig) -> float:
    """Milliseconds, 99th percentile of what another client sees while the first one downloads in bulk."""
    load = rig.lab.client.popen(["iperf3", "-c", INTERNET, "-t", "30", "-R"])
    try:
        checks.ping(rig.lab.clients[1], INTERNET, count=50, interval=0.01)  # lets the load come up
        return checks.ping(rig.lab.clients[1], INTERNET, count=300, interval=0.01).percentile(99)
    finally:
        load.stop()


def cpu_per_gib(rig: Rig) -> float | None:
    """CPU seconds of the gateway's process for each GiB downloaded over TCP."""
    if rig.gateway is None:
        return None
    before = rig.gateway.cpu_seconds()
    report = checks.iperf(rig.lab.client, INTERNET, seconds=_BULK_SECONDS, reverse=True)
    used = rig.gateway.cpu_seconds() - before
    return used / (float(report["end"]["sum_received"]["bytes"]) / (1 << 30))


def resident_mib(rig: Rig) -> float | None:
    """Resident memory of the gateway's process, in MiB."""
    return None if rig.gateway is None else rig.gateway.resident_bytes() / (1 << 20)


WORKLOADS = [
    Workload("TCP, 1 flow, up", "Gb/s", tcp(flows=1, reverse=False)),
    Workload("TCP, 1 flow, down", "Gb/s", tcp(flows=1, reverse=True)),
    Workload("TCP, 8 flows, up", "Gb/s", tcp(flows=8, reverse=False)),
    Workload("TCP, 8 flows, down", "Gb/s", tcp(flows=8, reverse=True)),
    Workload("TCP, both ways at once", "Gb/s", tcp_both),
    Workload("UDP, 64 bytes", "k packets/s", udp(size=64)),
    Workload("UDP, 1300 bytes", "k packets/s", udp(size=1300)),
    Workload("New TCP connections", "1/s", connections),
    Workload("Ping, idle, median", "ms", ping_idle, better="less"),
    Workload("Ping of another client under load, p99", "ms", ping_under_load, better="less", clients=2),
    Workload("CPU of the gateway", "s/GiB", cpu_per_gib, better="less"),
    Workload("Memory of the gateway", "MiB", resident_mib, better="less"),
]
