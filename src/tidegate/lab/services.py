"""The servers on the internet side of the lab."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from tidegate.lab import udpecho, webserver
from tidegate.lab.processes import CommandError, Process
from tidegate.lab.topology import BEYOND, INTERNET, Lab, Namespace
from tidegate.lab.waiting import wait_until

IPERF_PORT = 5201
# Names that the lab's DNS server knows; .example is reserved for such use (RFC 2606).
NAMES = {"www.example": INTERNET, "far.example": BEYOND}
TEXT_NAME = "text.example"
TEXT = "the tide comes in"


@dataclass(frozen=True)
class Services:
    """The servers on `internet`, and the web server and the echo server on `beyond`."""

    web: Process
    far_web: Process
    dns: Process
    iperf: Process
    echo: Process
    far_echo: Process


def start_services(lab: Lab) -> Services:
    """Starts the web, echo, DNS and iperf3 servers and returns once all of them answer."""
    web = start_web_server(lab.internet, INTERNET)
    far_web = start_web_server(lab.beyond, BEYOND)
    dns = start_dns_server(lab.internet, INTERNET)
    iperf = start_iperf_server(lab.internet, INTERNET)
    echo = start_echo_server(lab.internet, INTERNET)
    far_echo = start_echo_server(lab.beyond, BEYOND)
    for process in (web, far_web):
        process.wait_for(webserver.READY)
    for process in (echo, far_echo):
        process.wait_for(udpecho.READY)
    return Services(web, far_web, dns, iperf, echo, far_echo)


def start_web_server(host: Namespace, *addresses: str, port: int = 80) -> Process:
    """Starts `tidegate.lab.webserver`; ready when it says so (`webserver.READY`)."""
    return host.popen(
        [sys.executable, "-m", webserver.__name__, *addresses, "--port", str(port)], name="webserver"
    )


def start_echo_server(host: Namespace, address: str) -> Process:
    """Starts `tidegate.lab.udpecho`; ready when it says so (`udpecho.READY`)."""
    return host.popen([sys.executable, "-m", udpecho.__name__, address], name="udpecho")


def start_dns_server(host: Namespace, address: str) -> Process:
    """Starts dnsmasq, which knows `NAMES` and nothing else, and returns once it answers."""
    records = [f"--host-record={name},{target}" for name, target in NAMES.items()]
    command = [
        "dnsmasq",
        "--keep-in-foreground",
        "--no-resolv",
        "--no-hosts",
        "--conf-file=/dev/null",
        "--pid-file=",
    ]
    command += [
        "--user=root",
        "--group=root",
        f"--listen-address={address}",
        "--bind-interfaces",
        "--log-facility=-",
    ]
    process = host.popen([*command, *records, f"--txt-record={TEXT_NAME},{TEXT}", "--local-ttl=60"])
    wait_until(lambda: _listens(host, process, 53), f"the DNS server on {address}")
    return process


def start_iperf_server(host: Namespace, address: str, port: int = IPERF_PORT) -> Process:
    """Starts an iperf3 server and returns once it listens."""
    process = host.popen(["iperf3", "-s", "-B", address, "-p", str(port), "--forceflush"])
    wait_until(lambda: _listens(host, process, port), f"the iperf3 server on {address}")
    return process


def _listens(host: Namespace, process: Process, port: int) -> bool:
    if not process.running:
        raise CommandError(process.command, process.returncode or 0, process.output())
    return host.run(["ss", "-Htln", f"sport = :{port}"]).stdout.strip() != ""
