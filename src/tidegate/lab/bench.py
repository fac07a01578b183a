"""``tidegate bench``: Tidegate beside what a user would pick instead, on this machine, in one run.

Every variant stands in a lab of its own, all at the same time, idle but for the one that is being measured. The rounds
are interleaved (every variant once, then again), because a machine's mood changes more between minutes than variants
differ. Reported are the median and the spread of at least five rounds, and the ratio to the plain kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tidegate.lab import shortserver
from tidegate.lab.openvpn import OpenVpnClient, OpenVpnGateway
from tidegate.lab.processes import CommandError
from tidegate.lab.services import start_services
from tidegate.lab.stacks import (
    Client,
    Gateway,
    KernelGateway,
    TidegateClient,
    TidegateGateway,
    WireguardGoClient,
    WireguardGoGateway,
)
from tidegate.lab.topology import INTERNET, Lab, LabError, Namespace
from tidegate.lab.waiting import WaitTimeoutError
from tidegate.lab.workloads import WORKLOADS, Rig, Workload

# The limits that protect a gateway from one client are not what is measured here.
_SETTINGS = """
[nat]
max_new_mappings_per_second = 100000
max_mappings_per_client = 65536
"""
LEAST_ROUNDS = 5
_SPREAD_QUARTILES = 4


@dataclass(frozen=True)
class Variant:
    """One way from a client to the internet."""

    name: str
    gateway: Callable[[Lab], Gateway] | None
    """None: the kernel alone."""
    client: Callable[[Namespace, Path], Client] | None = None
    needs: Sequence[str] = ()
    """Commands that must be installed."""

    def set_up(self, lab: Lab) -> Rig:
        """Starts it in a lab that has its services."""
        if self.gateway is None or self.client is None:
            KernelGateway(lab).start()
            return Rig(lab, None)
        gateway = self.gateway(lab)
        gateway.start()
        for host in lab.clients:
            self.client(host, gateway.add_peer(host.role)).start()
        return Rig(lab, gateway.process)


KERNEL = "kernel forwarding + masquerade"
VARIANTS = [
    Variant(KERNEL, None),
    Variant("Tidegate", lambda lab: TidegateGateway(lab, config=_SETTINGS), TidegateClient),
    Variant(
        "Tidegate, AES-256-GCM",
        lambda lab: TidegateGateway(lab, config=_SETTINGS, cipher="aes-256-gcm"),
        TidegateClient,
    ),
    Variant(
        "Tidegate, wireguard-go as client",
        lambda lab: TidegateGateway(lab, config=_SETTINGS),
        WireguardGoClient,
        ("wireguard-go", "wg"),
    ),
    Variant("wireguard-go + kernel NAT", WireguardGoGateway, WireguardGoClient, ("wireguard-go", "wg")),
    Variant("OpenVPN + kernel NAT", OpenVpnGateway, OpenVpnClient, ("openvpn", "openssl")),
]


@dataclass
class Series:
    """The figures of one workload with one variant."""

    values: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def median(self) -> float | None:
        return statistics.median(self.values) if self.values else None

    @property
    def spread(self) -> tuple[float, float] | None:
        """The first and third quartile."""
        if len(self.values) < _SPREAD_QUARTILES:
            return (min(self.values), max(self.values)) if self.values else None
        first, _, third = statistics.quantiles(self.values, n=_SPREAD_QUARTILES)
        return first, third


Results = dict[str, dict[str, Series]]
"""Workload, then variant."""


def run_bench(
    *,
    json_output: bool = False,
    rounds: int = LEAST_ROUNDS,
    variants: Sequence[str] = (),
    workloads: Sequence[str] = (),
    output: Path | None = None,
) -> int:
    """Measures and reports; returns the exit code (1: a measurement failed, 130: interrupted).

    `variants` and `workloads` choose by a part of the name. The table goes to standard output, or JSON with
    `json_output`; `output` names a folder for ``benchmark.json``, ``benchmark.md`` and, where matplotlib is installed,
    ``benchmark.png``.
    """
    console = Console(stderr=json_output)
    chosen = [v for v in VARIANTS if _chosen(v.name, variants)]
    for variant in list(chosen):
        if missing := [command for command in variant.needs if shutil.which(command) is None]:
            console.print(f"[yellow]left out:[/] {variant.name} ({', '.join(missing)} not installed)")
            chosen.remove(variant)
    tasks = [w for w in WORKLOADS if _chosen(w.name, workloads)]
    try:
        results = _measure(console, chosen, tasks, rounds)
    except KeyboardInterrupt:
        console.print("[yellow]Interrupted; everything is cleaned up.[/]")
        return 130
    except LabError as error:
        console.print(f"[red]The benchmark cannot run here:[/] {error}")
        return 1
    report = _report(results, rounds)
    console.print(_table(results, [variant.name for variant in chosen]))
    if json_output:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    if output is not None:
        _write(output, report, results, console)
    failures = [
        error for by_variant in results.values() for series in by_variant.values() for error in series.errors
    ]
    for failure in failures:
        console.print(f"[red]failed:[/] {failure}")
    return 1 if failures else 0


def _chosen(name: str, parts: Sequence[str]) -> bool:
    return not parts or any(part.lower() in name.lower() for part in parts)


def _measure(console: Console, variants: list[Variant], workloads: list[Workload], rounds: int) -> Results:
    results: Results = {w.name: {v.name: Series() for v in variants} for w in workloads}
    with ExitStack() as labs, Progress(console=console) as progress:
        sizes = sorted({workload.clients for workload in workloads})
        setting_up = progress.add_task("setting up", total=len(variants) * len(sizes))
        rigs: dict[tuple[str, int], Rig] = {}
        for variant in variants:
            for clients in sizes:
                lab = labs.enter_context(Lab(clients=clients))
                start_services(lab)
                short = [sys.executable, "-m", shortserver.__name__, INTERNET]
                lab.internet.popen(short, name="shortserver").wait_for(shortserver.READY)
                rigs[variant.name, clients] = variant.set_up(lab)
                progress.advance(setting_up)
        measuring = progress.add_task("measuring", total=rounds * len(workloads) * len(variants))
        for number in range(rounds):
            for workload in workloads:
                for variant in variants:
                    progress.update(
                        measuring,
                        description=f"round {number + 1} of {rounds}: {workload.name}, {variant.name}",
                    )
                    _once(rigs[variant.name, workload.clients], workload, variant, results)
                    progress.advance(measuring)
    return results


def _once(rig: Rig, workload: Workload, variant: Variant, results: Results) -> None:
    series = results[workload.name][variant.name]
    try:
        value = workload.measure(rig)
    except (CommandError, WaitTimeoutError, OSError, ValueError, ArithmeticError) as failure:
        series.errors.append(f"{workload.name}, {variant.name}: {failure}")
    else:
        if value is not None:
            series.values.append(value)


def _report(results: Results, rounds: int) -> dict[str, Any]:
    units = {workload.name: workload for workload in WORKLOADS}
    figures = [
        {
            "workload": workload,
            "unit": units[workload].unit,
            "better": units[workload].better,
            "variant": variant,
            "median": series.median,
            "quartiles": series.spread,
            "to_kernel": _ratio(series, by_variant.get(KERNEL)),
            "values": series.values,
            "errors": series.errors,
        }
        for workload, by_variant in results.items()
        for variant, series in by_variant.items()
    ]
    machine = {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "cpu": _cpu(),
    }
    return {"machine": machine, "rounds": rounds, "figures": figures}


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _ratio(series: Series, limit: Series | None) -> float | None:
    if limit is None or not limit.median or series.median is None:
        return None
    return series.median / limit.median


def _table(results: Results, variants: list[str]) -> Table:
    table = Table(title="Medians (quartiles), and the ratio to the plain kernel")
    table.add_column("workload")
    for variant in variants:
        table.add_column(variant, justify="right")
    units = {workload.name: workload.unit for workload in WORKLOADS}
    for workload, by_variant in results.items():
        cells = [_cell(by_variant[variant], by_variant.get(KERNEL)) for variant in variants]
        table.add_row(f"{workload} [{units[workload]}]".replace("[", "\\["), *cells)
    return table


def _cell(series: Series, limit: Series | None) -> str:
    if series.median is None or series.spread is None:
        return "failed" if series.errors else "–"
    low, high = series.spread
    ratio = _ratio(series, limit)
    return f"{_figure(series.median)} ({_figure(low)}–{_figure(high)})" + (f" ×{ratio:.2f}" if ratio else "")


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _write(folder: Path, report: dict[str, Any], results: Results, console: Console) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / "benchmark.md").write_text(_markdown(report, results))
    if _plot(folder / "benchmark.png", results):
        console.print(f"written: {folder}/benchmark.json, benchmark.md, benchmark.png")
    else:
        console.print(
            f"written: {folder}/benchmark.json, benchmark.md (no plot: matplotlib is not installed)"
        )


def _markdown(report: dict[str, Any], results: Results) -> str:
    machine = report["machine"]
    variants = list(next(iter(results.values()))) if results else []
    units = {workload.name: workload.unit for workload in WORKLOADS}
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}; medians (quartiles) of "
        f"{report['rounds']} interleaved rounds, and the ratio to the plain kernel.",
        "",
        "| workload | " + " | ".join(variants) + " |",
        "|---|" + "---:|" * len(variants),
    ]
    for workload, by_variant in results.items():
        cells = [_cell(by_variant[variant], by_variant.get(KERNEL)) for variant in variants]
        lines.append(f"| {workload}, {units[workload]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _plot(file: Path, results: Results) -> bool:
    """Bars of the throughputs; False where matplotlib, an optional extra, is not installed."""
    try:
        from matplotlib import pyplot  # noqa: PLC0415  # seconds to import, and rarely wanted
    except ImportError:
        return False
    shown = [
        workload for workload in WORKLOADS if workload.name in results and workload.name.startswith("TCP")
    ]
    if not shown:
        return False
    figure, axes = pyplot.subplots(figsize=(10, 4.5), layout="constrained")
    variants = list(results[shown[0].name])
    width = 0.8 / len(variants)
    for n, variant in enumerate(variants):
        heights = [results[workload.name][variant].median or 0.0 for workload in shown]
        bars = axes.bar([x + n * width for x in range(len(shown))], heights, width, label=variant)
        axes.bar_label(bars, fmt="%.2g", fontsize=7)
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(shown))], [workload.name for workload in shown])
    axes.set_ylabel("Gb/s")
    axes.legend()
    figure.savefig(file, dpi=150)
    return True


def main() -> None:
    """The benchmark without the command line of the package."""
    parser = argparse.ArgumentParser(prog="python -m tidegate.lab.bench", description=__doc__)
    parser.add_argument("--json", action="store_true", help="the result as JSON on standard output")
    parser.add_argument("--rounds", type=int, default=LEAST_ROUNDS)
    parser.add_argument(
        "--variant", action="append", default=[], metavar="PART", help="only variants named so"
    )
    parser.add_argument(
        "--workload", action="append", default=[], metavar="PART", help="only workloads named so"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="where to write JSON, Markdown and a plot"
    )
    arguments = parser.parse_args()
    sys.exit(
        run_bench(
            json_output=arguments.json,
            rounds=arguments.rounds,
            variants=arguments.variant,
            workloads=arguments.workload,
            output=arguments.output,
        )
    )


if __name__ == "__main__":
    main()
