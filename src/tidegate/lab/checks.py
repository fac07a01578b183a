"""Measurements from a host of the lab: round trips, names, paths, transfers, throughput."""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidegate.lab.blob import blob
from tidegate.lab.processes import CommandError
from tidegate.lab.services import IPERF_PORT
from tidegate.lab.topology import Namespace


@dataclass(frozen=True)
class Ping:
    """The outcome of some pings; round trips in milliseconds."""

    sent: int
    round_trips: list[float]
    duplicates: int

    @property
    def complete(self) -> bool:
        return len(self.round_trips) == self.sent and not self.duplicates

    @property
    def median(self) -> float:
        return statistics.median(self.round_trips)

    def percentile(self, percent: float) -> float:
        """The round trip that `percent` of the pings do not exceed."""
        ordered = sorted(self.round_trips)
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def ping(host: Namespace, address: str, *, count: int = 10, interval: float = 0.1, size: int = 56) -> Ping:
    """Pings `address`; `size` is the payload (IPv4 and ICMP headers add 28 bytes)."""
    command = ["ping", "-n", "-c", str(count), "-i", f"{interval:g}", "-W", "2", "-s", str(size), address]
    output = host.run(command, timeout=count * interval + 20, check=False).stdout
    replies = [line for line in output.splitlines() if " time=" in line]
    fresh = [line for line in replies if "DUP!" not in line]
    return Ping(count, [_number(r"time=([\d.]+)", line) for line in fresh], len(replies) - len(fresh))


def lookup(host: Namespace, name: str, server: str, *, kind: str = "A", tcp: bool = False) -> list[str]:
    """The answers of a DNS server to one question, as ``dig +short`` prints them."""
    transport = ["+tcp"] if tcp else []
    command = ["dig", "+short", "+time=2", "+tries=2", *transport, f"@{server}", name, kind]
    return host.run(command).stdout.split("\n")[:-1]


def traceroute(host: Namespace, address: str, *, method: str = "-I") -> list[str]:
    """The hops to `address`; ``*`` where nobody answered. `method`: ``-I`` ICMP, ``-U`` UDP, ``-T`` TCP."""
    output = host.run(["traceroute", "-n", "-q", "1", "-w", "2", "-m", "8", method, address]).stdout
    return [line.split()[1] for line in output.splitlines()[1:]]


@dataclass(frozen=True)
class Transfer:
    """A completed transfer."""

    sha256: str
    size: int
    seconds: float

    @property
    def bits_per_second(self) -> float:
        return self.size * 8 / self.seconds


def download(host: Namespace, url: str, *, timeout: float = 300.0) -> Transfer:
    """Downloads with curl and computes the SHA-256 of what arrived."""
    script = 'set -o pipefail; curl -sS --fail -w "%{stderr}%{size_download} %{time_total}" "$0" | sha256sum'
    done = host.run(["bash", "-c", script, url], timeout=timeout)
    size, seconds = done.stderr.split()
    return Transfer(done.stdout.split()[0], int(size), float(seconds))


def upload(host: Namespace, url: str, file: Path, *, timeout: float = 300.0) -> Transfer:
    """Uploads with curl; the SHA-256 is the one that the server computed."""
    command = [
        "curl",
        "-sS",
        "--fail",
        "-H",
        "Expect:",
        "--write-out",
        "\n%{time_total}",
        "-T",
        str(file),
        url,
    ]
    answer, seconds = host.run(command, timeout=timeout).stdout.rsplit("\n", 1)
    received = json.loads(answer)
    return Transfer(received["sha256"], received["bytes"], float(seconds))


def write_blob(file: Path, seed: str, size: int) -> None:
    """Writes a content of `tidegate.lab.blob` to a file, for uploading."""
    with file.open("wb") as sink:
        for chunk in blob(seed, size):
            sink.write(chunk)


def iperf(
    host: Namespace,
    server: str,
    *arguments: str,
    seconds: float = 3.0,
    reverse: bool = False,
    flows: int = 1,
    port: int = IPERF_PORT,
) -> dict[str, Any]:
    """Runs iperf3 against a server of the lab and returns its JSON report."""
    command = [
        "iperf3",
        "-c",
        server,
        "-p",
        str(port),
        "-t",
        f"{seconds:g}",
        "-P",
        str(flows),
        "-J",
        *arguments,
    ]
    if reverse:
        command.append("-R")
    done = host.run(command, timeout=seconds + 30, check=False)
    report: dict[str, Any] = json.loads(done.stdout or "{}")
    if done.returncode != 0 or "error" in report:
        raise CommandError(command, done.returncode, report.get("error", done.stderr))
    return report


def tcp_throughput(
    host: Namespace, server: str, *, seconds: float = 3.0, reverse: bool = False, flows: int = 1
) -> float:
    """Bits per second that arrived over TCP; `reverse` is from the server to the host (download)."""
    # The first half second is slow start and is left out.
    report = iperf(host, server, "-O", "0.5", seconds=seconds, reverse=reverse, flows=flows)
    return float(report["end"]["sum_received"]["bits_per_second"])


def _number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern!r} in {text!r}")
    return float(found[1])
