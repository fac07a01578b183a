"""``tidegate demo``: a client, the gateway and the internet on one machine, shown step by step.

Everything is real except for the cables: it runs ``tidegate serve``, ``tidegate peer add`` and ``tidegate connect``.
The machine is left as it was; so is the gateway's host, and the demo proves that.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tidegate.lab import checks, hoststate
from tidegate.lab.blob import blob_sha256
from tidegate.lab.command import end_with, make_console, until_interrupted
from tidegate.lab.hoststate import HostState
from tidegate.lab.processes import CommandError
from tidegate.lab.services import TEXT, TEXT_NAME, start_services
from tidegate.lab.stacks import (
    INNER_GATEWAY,
    Client,
    Gateway,
    TidegateClient,
    TidegateGateway,
    WireguardGoClient,
    WireguardGoGateway,
)
from tidegate.lab.topology import BEYOND, GATEWAY_EXTERNAL, INTERNET, Lab
from tidegate.lab.waiting import WaitTimeoutError, wait_until

EXIT_OK = 0
EXIT_FAILED = 1

_TRANSFER_MIB = 256
_IPERF_SECONDS = 3.0
_STOP_SECONDS = 2.0  # within which SIGTERM must have stopped everything
_LOG_LINES = 25
_PIPE_WIDTH = 120  # columns, where the output is not a terminal


class CheckFailedError(Exception):
    """A check found something wrong; the message says what was seen."""


@dataclass
class Check:
    """One line of the closing table."""

    name: str
    ok: bool | None = None
    """None: not reached."""
    detail: str = ""
    seconds: float = 0.0


def run_demo(*, json_output: bool = False, reference: bool = False, transfer_mib: int = _TRANSFER_MIB) -> int:
    """Runs the demo. Returns the exit code: 0 only if every check is green, 130 after Ctrl-C, or 128 + the number of
    another signal. Raises `LabError` if it cannot run.

    With `json_output` the result goes to standard output as JSON, and the progress to standard error. `reference` uses
    wireguard-go and kernel NAT in place of Tidegate: a test of the checks, since "host untouched" must then fail.
    `transfer_mib` is the size of the download and of the upload.
    """
    console = make_console(json_output=json_output)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    demo = _Demo(console, reference=reference, transfer_bytes=transfer_mib << 20)
    return until_interrupted(console, lambda: demo.run(json_output=json_output))


class _Demo:
    """The steps of the demo, in order. Each returns what to show, or raises."""

    def __init__(self, console: Console, *, reference: bool, transfer_bytes: int) -> None:
        self._console = console
        self._reference = reference
        self._transfer_bytes = transfer_bytes
        self._lab: Lab
        self._gateway: Gateway
        self._client: Client
        self._before: HostState

    def run(self, *, json_output: bool) -> int:
        steps: list[tuple[str, Callable[[], str]]] = [
            ("Three hosts, in namespaces", self._build),
            ("tidegate serve", self._serve),
            ("tidegate connect", self._connect),
            ("Ping the gateway", lambda: self._ping(INNER_GATEWAY)),
            ("Ping the internet", lambda: self._ping(INTERNET)),
            ("DNS, UDP and TCP", self._resolve),
            ("Traceroute", self._trace),
            ("NAT: what the internet sees", self._face),
            ("Download", self._download),
            ("Upload", self._upload),
            ("TCP throughput up", lambda: self._throughput(reverse=False)),
            ("TCP throughput down", lambda: self._throughput(reverse=True)),
            ("Host untouched, under traffic", self._untouched_during),
            ("Host's kernel forwards nothing", self._kernel_unused),
            ("SIGTERM", self._stop),
            ("Host untouched, afterwards", self._untouched_after),
        ]
        results = [Check(name) for name, _ in steps]
        begun = time.monotonic()
        with Lab() as self._lab:
            for result, (_, step) in zip(results, steps, strict=True):
                if not self._perform(result, step):
                    break
            failed = [result for result in results if not result.ok]
            if failed:
                self._show_logs()
        seconds = time.monotonic() - begun
        self._show_table(results, seconds)
        if json_output:
            report = {"ok": not failed, "seconds": round(seconds, 2), "checks": [asdict(r) for r in results]}
            sys.stdout.write(json.dumps(report, indent=2) + "\n")
        return EXIT_FAILED if failed else EXIT_OK

    def _perform(self, result: Check, step: Callable[[], str]) -> bool:
        """Does one step. Returns False if there is no point in going on."""
        begun = time.monotonic()
        go_on = True
        try:
            with self._console.status(f"{result.name} …"):
                result.detail, result.ok = step(), True
        except CheckFailedError as failure:
            result.detail, result.ok = str(failure), False
        except (CommandError, WaitTimeoutError, OSError, ValueError, subprocess.SubprocessError) as failure:
            result.detail, result.ok = str(failure), False
            # Without a lab, a gateway or a session all that follows would fail for the same reason.
            go_on = step not in (self._build, self._serve, self._connect)
        result.seconds = round(time.monotonic() - begun, 3)
        mark = "[green]✓[/]" if result.ok else "[red]✗[/]"
        self._console.print(f"{mark} {result.name}: {escape(result.detail)}", highlight=False)
        return go_on

    def _build(self) -> str:
        start_services(self._lab)
        self._before = HostState.read(self._lab.gateway)
        return f"client 198.51.100.2, gateway {GATEWAY_EXTERNAL}, internet {INTERNET}, beyond it {BEYOND}"

    def _serve(self) -> str:
        gateway = WireguardGoGateway(self._lab) if self._reference else TidegateGateway(self._lab)
        begun = time.monotonic()
        gateway.start()
        self._gateway = gateway
        return f"ready after {time.monotonic() - begun:.2f} s, process {gateway.process.pid}"

    def _connect(self) -> str:
        profile = self._gateway.add_peer("demo")
        make = WireguardGoClient if self._reference else TidegateClient
        self._client = make(self._lab.client, profile)
        begun = time.monotonic()
        self._client.start()
        shown = f"packets pass after {time.monotonic() - begun:.2f} s"
        if isinstance(self._gateway, TidegateGateway):
            (peer,) = self._gateway.status()["peers"]
            if peer["last_handshake"] is None:
                raise CheckFailedError(f"{shown}, but `tidegate status` knows of no handshake")
            shown += f"; handshake with {peer['endpoint']}, {peer['address']} inside"
        return shown

    def _ping(self, address: str) -> str:
        result = checks.ping(self._lab.client, address, count=20, interval=0.05)
        if not result.complete:
            raise CheckFailedError(
                f"{len(result.round_trips)} of {result.sent} answered, {result.duplicates} duplicates"
            )
        return f"{address}: {result.sent} of {result.sent}, median {result.median:.2f} ms"

    def _resolve(self) -> str:
        for tcp in (False, True):
            answer = checks.lookup(self._lab.client, "www.example", INNER_GATEWAY, tcp=tcp)
            if answer != [INTERNET]:
                raise CheckFailedError(f"www.example {'TCP' if tcp else 'UDP'}: {answer or 'no answer'}")
        text = checks.lookup(self._lab.client, TEXT_NAME, INNER_GATEWAY, kind="TXT")
        if text != [f'"{TEXT}"']:
            raise CheckFailedError(f"{TEXT_NAME} TXT: {text or 'no answer'}")
        return f"www.example is {INTERNET}, says {INNER_GATEWAY}"

    def _trace(self) -> str:
        hops = checks.traceroute(self._lab.client, BEYOND)
        if hops != [INNER_GATEWAY, INTERNET, BEYOND]:
            raise CheckFailedError(f"the path to {BEYOND} reads {' → '.join(hops)}")
        return " → ".join(hops)

    def _face(self) -> str:
        seen = json.loads(self._lab.client.run(["curl", "-sS", "--fail", f"http://{INTERNET}/whoami"]).stdout)
        if seen["address"] != GATEWAY_EXTERNAL:
            raise CheckFailedError(f"the web server saw {seen['address']}")
        return f"{seen['address']}, port {seen['port']}"

    def _download(self) -> str:
        size = self._transfer_bytes
        expected = blob_sha256("demo-down", size)
        transfer = checks.download(self._lab.client, f"http://{INTERNET}/blob/demo-down/{size}")
        return self._intact(transfer, expected)

    def _upload(self) -> str:
        file = self._lab.scratch / "upload"
        checks.write_blob(file, "demo-up", self._transfer_bytes)
        expected = blob_sha256("demo-up", self._transfer_bytes)
        return self._intact(checks.upload(self._lab.client, f"http://{INTERNET}/upload", file), expected)

    @staticmethod
    def _intact(transfer: checks.Transfer, expected: str) -> str:
        if transfer.sha256 != expected:
            raise CheckFailedError(f"{transfer.size} bytes arrived as {transfer.sha256}, not {expected}")
        return f"{transfer.size >> 20} MiB intact ({expected[:12]}…), {_rate(transfer.bits_per_second)}"

    def _throughput(self, *, reverse: bool) -> str:
        rate = checks.tcp_throughput(self._lab.client, INTERNET, seconds=_IPERF_SECONDS, reverse=reverse)
        if not rate:
            raise CheckFailedError("nothing arrived")
        return f"{_rate(rate)}, one flow (iperf3)"

    def _untouched_during(self) -> str:
        traffic = self._lab.client.popen(["iperf3", "-c", INTERNET, "-t", "10", "--bidir"])
        connection = ["ss", "-Htn", "state", "established", f"dst {INTERNET}"]
        wait_until(lambda: len(self._lab.client.run(connection).stdout.splitlines()) > 1, "traffic to flow")
        now = HostState.read(self._lab.gateway)
        traffic.stop()
        own = hoststate.tun_devices(self._lab.gateway)
        comparison = hoststate.compare(self._before, now, own)
        if not comparison.untouched:
            raise CheckFailedError(_differences(comparison))
        apart = ", ".join(f"{len(lines)} {aspect}" for aspect, lines in comparison.set_apart.items())
        return f"unchanged except for the TUN device's own lines ({', '.join(sorted(own))}: {apart})"

    def _kernel_unused(self) -> str:
        gateway = self._lab.gateway
        if HostState.read(gateway).forwards:
            raise CheckFailedError("net.ipv4.ip_forward is 1")
        if ruleset := gateway.run(["nft", "list", "ruleset"]).stdout.strip():
            raise CheckFailedError(f"there is an nftables ruleset: {ruleset}")
        # The file is there only where the module is loaded; another namespace may have loaded it.
        tracked = gateway.run(["cat", "/proc/net/nf_conntrack"], check=False).stdout.splitlines()
        if tracked:
            raise CheckFailedError(f"the kernel tracks {len(tracked)} connections")
        return "ip_forward is 0, the ruleset is empty, the kernel tracks no connection"

    def _stop(self) -> str:
        self._client.stop()
        taken = self._gateway.process.stop(grace=_STOP_SECONDS)
        code = self._gateway.process.returncode
        if code != 0:
            raise CheckFailedError(f"the gateway ended with {code} after {taken:.2f} s")
        if left := hoststate.tun_devices(self._lab.gateway):
            raise CheckFailedError(f"left behind: {', '.join(sorted(left))}")
        if left_processes := self._lab.gateway.pids():
            raise CheckFailedError(f"left behind: processes {sorted(left_processes)}")
        return f"after {taken:.2f} s nothing is left of the gateway"

    def _untouched_after(self) -> str:
        comparison = hoststate.compare(self._before, HostState.read(self._lab.gateway), set())
        if not comparison.untouched:
            raise CheckFailedError(_differences(comparison))
        return f"{', '.join(self._before.aspects)}: every line is as before"

    def _show_logs(self) -> None:
        for name in ("_gateway", "_client"):
            stack: Gateway | Client | None = getattr(self, name, None)
            process = getattr(stack, "process", None)
            if process is None:
                continue
            self._console.rule(f"the last lines of {process.name}")
            for line in process.output().splitlines()[-_LOG_LINES:]:
                self._console.print(line, markup=False, highlight=False)

    def _show_table(self, results: list[Check], seconds: float) -> None:
        table = Table(title=f"Tidegate demo, {seconds:.0f} s")
        table.add_column("")
        table.add_column("Check", no_wrap=True)
        table.add_column("Result", overflow="fold")
        for result in results:
            mark = {True: "[green]✓[/]", False: "[red]✗[/]", None: "[yellow]–[/]"}[result.ok]
            table.add_row(
                mark, result.name, escape(result.detail) if result.ok is not None else "not reached"
            )
        self._console.print(table)


def _differences(comparison: hoststate.Comparison, *, shown: int = 4) -> str:
    more = len(comparison.differences) - shown
    return "; ".join(" ".join(line.split()) for line in comparison.differences[:shown]) + (
        f"; and {more} more" if more > 0 else ""
    )


def _rate(bits_per_second: float) -> str:
    if bits_per_second >= 1e9:
        return f"{bits_per_second / 1e9:.2f} Gb/s"
    return f"{bits_per_second / 1e6:.0f} Mb/s"


def main() -> None:
    """The demo without the command line of the package."""
    parser = argparse.ArgumentParser(prog="python -m tidegate.lab.demo", description=__doc__)
    parser.add_argument("--json", action="store_true", help="the result as JSON on standard output")
    parser.add_argument(
        "--reference",
        action="store_true",
        help="wireguard-go and kernel NAT instead of Tidegate (tests the checks)",
    )
    parser.add_argument(
        "--mib", type=int, default=_TRANSFER_MIB, help="size of each transfer (default: %(default)s)"
    )
    arguments = parser.parse_args()
    end_with(
        lambda: run_demo(
            json_output=arguments.json, reference=arguments.reference, transfer_mib=arguments.mib
        )
    )


if __name__ == "__main__":
    main()
