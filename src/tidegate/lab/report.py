"""The benchmark's report: a table for the terminal, JSON, Markdown, and a plot."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from rich.table import Table

from tidegate.engine import load
from tidegate.lab.figures import RATIO, Goal, Results, Series, Verdict, ratio, verdicts
from tidegate.lab.variants import KERNEL, WIREGUARD_GO
from tidegate.lab.workloads import WORKLOADS

_NOT_MEASURED = "–"
_WORDS = {True: "met", False: "falls short", None: "not measured"}
_WORKLOADS = {workload.name: workload for workload in WORKLOADS}
_PLOTTED_UNITS = ("Gb/s", "k packets/s", "1/s")


def as_json(results: Results, rounds: int) -> dict[str, Any]:
    """Everything, for programs."""
    figures = [
        {
            "workload": workload,
            "unit": _WORKLOADS[workload].unit,
            "better": _WORKLOADS[workload].better,
            "variant": variant,
            "median": series.median,
            "quartiles": series.spread,
            "to_kernel": ratio(results, workload, variant, KERNEL),
            "to_wireguard_go": ratio(results, workload, variant, WIREGUARD_GO),
            "values": series.values,
            "errors": series.errors,
        }
        for workload, by_variant in results.items()
        for variant, series in by_variant.items()
    ]
    goals = [
        {
            "variant": verdict.goal.variant,
            "workload": verdict.workload,
            "to": verdict.goal.to,
            "wanted": wanted(verdict.goal),
            "measured": verdict.measured,
            "met": verdict.met,
        }
        for verdict in verdicts(results)
    ]
    return {"machine": _machine(), "rounds": rounds, "figures": figures, "goals": goals}


def _machine() -> dict[str, Any]:
    return {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "cpu": _cpu(),
        "aead": load().aead_library(os.cpu_count() or 1),
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def as_table(results: Results) -> Table:
    """For a terminal: one line per figure, because there are too many variants for columns."""
    table = Table(title="Medians (quartiles), and ratios to the plain kernel and to wireguard-go")
    table.add_column("workload")
    table.add_column("variant")
    for column in ("figure", "to kernel", "to wg-go"):
        table.add_column(column, justify="right", no_wrap=True)
    for workload, by_variant in results.items():
        for n, variant in enumerate(by_variant):
            name = f"{workload} [{_WORKLOADS[workload].unit}]".replace("[", "\\[") if n == 0 else ""
            ratios = (ratio(results, workload, variant, reference) for reference in (KERNEL, WIREGUARD_GO))
            shown = (_NOT_MEASURED if value is None else f"×{figure(value)}" for value in ratios)
            table.add_row(
                name, variant, spread(by_variant[variant]), *shown, end_section=n == len(by_variant) - 1
            )
    return table


def goals_table(results: Results) -> Table | None:
    """The goals that this run has figures for, for a terminal; None if there are none."""
    table = Table(title="Goals, against the medians above")
    for column in ("variant", "workload", "wanted", "measured", ""):
        table.add_column(column)
    for verdict in verdicts(results):
        if verdict.met is not None:
            word = _WORDS[verdict.met]
            style = "green" if verdict.met else "yellow"
            said = (verdict.goal.variant, verdict.workload, wanted(verdict.goal), measured(verdict))
            table.add_row(*said, f"[{style}]{word}[/]")
    return table if table.row_count else None


def as_markdown(results: Results, rounds: int) -> str:
    """Figures and goals, in the form of docs/performance.md."""
    machine = _machine()
    variants = list(dict.fromkeys(variant for by_variant in results.values() for variant in by_variant))
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}; medians (quartiles) of "
        f"{rounds} interleaved rounds; × is the ratio to the plain kernel, w× that to {WIREGUARD_GO}.",
        "",
        "| workload | " + " | ".join(variants) + " |",
        "|---|" + "---:|" * len(variants),
    ]
    for workload in results:
        cells = [cell(results, workload, variant) for variant in variants]
        lines.append(f"| {workload}, {_WORKLOADS[workload].unit} | " + " | ".join(cells) + " |")
    lines += ["", "## Goals", "", "| variant | workload | wanted | measured | |", "|---|---|---|---:|---|"]
    for verdict in verdicts(results):
        said = (verdict.goal.variant, verdict.workload, wanted(verdict.goal), measured(verdict))
        lines.append("| " + " | ".join((*said, _WORDS[verdict.met])) + " |")
    return "\n".join(lines) + "\n"


def cell(results: Results, workload: str, variant: str) -> str:
    """A median with its spread and its ratios."""
    text = spread(results[workload].get(variant, Series()))
    for mark, reference in (("×", KERNEL), ("w×", WIREGUARD_GO)):
        if variant != reference and (value := ratio(results, workload, variant, reference)) is not None:
            text += f" {mark}{figure(value)}"
    return text


def spread(series: Series) -> str:
    """A median with its quartiles, and how many rounds gave no figure."""
    if series.median is None or series.spread is None:
        return "failed" if series.errors else _NOT_MEASURED
    low, high = series.spread
    failed = f", {len(series.errors)} failed" if series.errors else ""
    return f"{figure(series.median)} ({figure(low)}–{figure(high)}{failed})"


def figure(value: float) -> str:
    """Three significant digits, or all those before the decimal point."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def wanted(goal: Goal) -> str:
    bound = "at least" if goal.at_least else "at most"
    if goal.to is None:
        return f"{bound} {goal.bound:g}{goal.unit}"
    if goal.unit == RATIO:
        return f"{bound} {goal.bound:g} × {goal.to}"
    return f"{bound} {goal.bound:g}{goal.unit} above {goal.to}"


def measured(verdict: Verdict) -> str:
    if verdict.measured is None:
        return _NOT_MEASURED
    sign = "+" if verdict.goal.to and verdict.goal.unit != RATIO and verdict.measured >= 0 else ""
    unit = " ×" if verdict.goal.unit == RATIO else verdict.goal.unit
    return f"{sign}{figure(verdict.measured)}{unit}"


def plot(file: Path, results: Results) -> bool:
    """Plots bars of all throughputs, one picture per unit. Returns False without matplotlib (an optional extra), or
    without throughputs."""
    try:
        import matplotlib  # noqa: PLC0415  # seconds to import, and rarely wanted
    except ImportError:
        return False
    matplotlib.use("Agg")  # a file, no screen
    from matplotlib import pyplot  # noqa: PLC0415  # after the choice above
    from matplotlib.patches import Patch  # noqa: PLC0415

    by_unit = {unit: [name for name in results if _WORKLOADS[name].unit == unit] for unit in _PLOTTED_UNITS}
    by_unit = {unit: names for unit, names in by_unit.items() if names}
    if not by_unit:
        return False
    variants = list(dict.fromkeys(variant for by_variant in results.values() for variant in by_variant))
    palette = matplotlib.colormaps["tab10"]  # ten colours
    colours = {variant: palette(n % 10) for n, variant in enumerate(variants)}
    # A column per unit, as high as it has workloads; horizontal bars, so that their names can be horizontal too.
    rows = max(len(names) for names in by_unit.values())
    figure_, columns = pyplot.subplots(
        1, len(by_unit), squeeze=False, figsize=(5.5 * len(by_unit), 1 + 1.9 * rows), layout="constrained"
    )
    for axes, (unit, names) in zip(columns[0], by_unit.items(), strict=True):
        ticks = []
        at = 0.0
        for name in names:
            shown = [v for v in variants if v in results[name] and results[name][v].values]
            for variant in shown:
                value = results[name][variant].median or 0.0
                bars = axes.barh(at, value, 0.9, color=colours[variant])
                axes.bar_label(bars, labels=[figure(value)], fontsize=7, padding=2)
                at += 1
            ticks.append((at - 0.5 - len(shown) / 2, name))
            at += 1
        axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks])
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel(unit)
        axes.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=colours[variant]) for variant in variants]
    figure_.legend(handles, variants, loc="outside lower center", ncols=3, frameon=False)
    figure_.savefig(file, dpi=120)
    pyplot.close(figure_)
    return True
