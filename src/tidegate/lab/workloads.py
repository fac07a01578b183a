"""What the benchmark measures, one function per figure. Each takes a `Rig`, set up and warm, and returns a number."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tidegate.lab import checks, crowd, shortserver
from tidegate.lab.processes import CommandError, Process
from tidegate.lab.topology import INTERNET, Lab

_BULK_SECONDS = 3.0
_PROBE_SECONDS = 1.0
_LOSS_LIMIT = 0.1  # per cent
_CHANCE = 5.0  # per cent; a loss beyond that is no accident
_PROBES = 7
_CONNECTIONS = 1500
"""Few enough for the NAT's closed connections to rest for their 4 minutes (RFC 5382 REQ-5)."""

TCP_1_UP, TCP_1_DOWN = "TCP, 1 flow, up", "TCP, 1 flow, down"
TCP_8_UP, TCP_8_DOWN = "TCP, 8 flows, up", "TCP, 8 flows, down"
BULK = (TCP_1_UP, TCP_1_DOWN, TCP_8_UP, TCP_8_DOWN)
TCP_BOTH = "TCP, both ways at once"
UDP_64, UDP_1300 = "UDP, 64 bytes", "UDP, 1300 bytes"
CONNECTIONS = "New TCP connections"
PING, LOADED_PING = "Ping, idle, median", "Ping of another client under load, p99"
CPU = "CPU of the gateway"
MEMORY = "Memory of the gateway"
CROWD_MEMORY = "Memory, 1,000 peers and 100,000 mappings"


@dataclass
class Rig:
    """One way from a client to the internet, up and running."""

    lab: Lab
    gateway: Process | None
    """The gateway's process; None if the kernel does everything."""


@dataclass(frozen=True)
class Workload:
    """One figure to measure."""

    name: str
    unit: str
    measure: Callable[[Rig], float | None] | None
    """Returns None if the figure does not apply to the rig."""
    better: str = "more"
    clients: int = 1
    """How many clients the lab needs."""
    own_lab: Callable[[], float] | None = None
    """Instead of `measure`: builds a lab of its own, with Tidegate's gateway, and measures that."""

    def once(self, rig: Rig | None) -> float | None:
        """Measures once; `rig` is needed unless the workload has a lab of its own."""
        if self.own_lab is not None:
            return self.own_lab()
        if self.measure is None or rig is None:
            raise ValueError(f"{self.name}: nothing to measure it with")
        return self.measure(rig)


def tcp(*, flows: int, reverse: bool) -> Callable[[Rig], float]:
    """Gb/s over TCP."""

    def measure(rig: Rig) -> float:
        rate = checks.tcp_throughput(
            rig.lab.client, INTERNET, seconds=_BULK_SECONDS, flows=flows, reverse=reverse
        )
        return rate / 1e9

    return measure


def tcp_both(rig: Rig) -> float:
    """Gb/s over TCP, the sum of both directions at once."""
    report = checks.iperf(rig.lab.client, INTERNET, "--bidir", "-O", "0.5", seconds=_BULK_SECONDS)
    end = report["end"]
    both = end["sum_received"]["bits_per_second"] + end["sum_received_bidir_reverse"]["bits_per_second"]
    return float(both) / 1e9


def udp(*, size: int) -> Callable[[Rig], float]:
    """The highest rate found with less than 0.1 % loss, in thousands of packets per second.

    A bisection on a logarithmic scale: seven probes leave 4 % between the last rate that passed and the first that did
    not. A probe that lost little is repeated once, because a single hiccup of the machine would otherwise halve the
    rate.
    """

    def measure(rig: Rig) -> float:
        best, low, high = 0.0, 2e3, 400e3
        for _ in range(_PROBES):
            rate = (low * high) ** 0.5
            arrived, lost = _udp_probe(rig, size, rate)
            if _LOSS_LIMIT <= lost < _CHANCE:
                arrived, lost = _udp_probe(rig, size, rate)
            if lost >= _LOSS_LIMIT:
                high = rate
            else:
                best, low = max(best, arrived), rate
        return best / 1e3

    return measure


def _udp_probe(rig: Rig, size: int, packets_per_second: float) -> tuple[float, float]:
    """Packets per second that arrived at an offered rate, and how many per cent were lost on the way."""
    bits = packets_per_second * size * 8
    offered = ["-u", "-b", f"{bits:.0f}", "-l", str(size), "-w", "4M", "--pacing-timer", "200"]
    try:
        report = checks.iperf(rig.lab.client, INTERNET, *offered, seconds=_PROBE_SECONDS)
    except CommandError:
        # iperf3's server resets a control connection that arrives while it still drains the previous flood; a second
        # failure is a finding.
        report = checks.iperf(rig.lab.client, INTERNET, *offered, seconds=_PROBE_SECONDS)
    total = report["end"]["sum"]
    arrived = (total["packets"] - total["lost_packets"]) / total["seconds"]
    return float(arrived), float(total["lost_percent"])


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
    """Milliseconds, 99th percentile, for another client while the first one downloads in bulk."""
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
    Workload(TCP_1_UP, "Gb/s", tcp(flows=1, reverse=False)),
    Workload(TCP_1_DOWN, "Gb/s", tcp(flows=1, reverse=True)),
    Workload(TCP_8_UP, "Gb/s", tcp(flows=8, reverse=False)),
    Workload(TCP_8_DOWN, "Gb/s", tcp(flows=8, reverse=True)),
    Workload(TCP_BOTH, "Gb/s", tcp_both),
    Workload(UDP_64, "k packets/s", udp(size=64)),
    Workload(UDP_1300, "k packets/s", udp(size=1300)),
    Workload(CONNECTIONS, "1/s", connections),
    Workload(PING, "ms", ping_idle, better="less"),
    Workload(LOADED_PING, "ms", ping_under_load, better="less", clients=2),
    Workload(CPU, "s/GiB", cpu_per_gib, better="less"),
    Workload(MEMORY, "MiB", resident_mib, better="less"),
    *(
        Workload(name, "MiB", None, better="less", own_lab=partial(crowd.resident_mib, peers, mappings))
        for name, peers, mappings in (
            ("Memory, 1 peer", 1, 0),
            ("Memory, 100 peers", 100, 0),
            ("Memory, 1,000 peers", 1000, 0),
            (CROWD_MEMORY, 1000, 100_000),
        )
    ),
]
