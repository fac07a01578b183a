"""``tidegate bench``: Tidegate compared with what a user would pick instead, on this machine, in one run.

Every variant has a lab of its own; all of them are up at the same time, and idle except for the one being measured. The
rounds are interleaved (every variant once, then again), because a machine's speed changes more from minute to minute
than variants differ. The report has the median and the spread of at least five rounds, the ratios to the plain kernel
and to wireguard-go, and whether the goals are met.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tidegate.errors import TidegateError, UsageError
from tidegate.lab import crowd, report, shortserver
from tidegate.lab.command import end_with, make_console, until_interrupted
from tidegate.lab.figures import Results, Series, has_failed
from tidegate.lab.processes import CommandError
from tidegate.lab.services import start_services
from tidegate.lab.topology import INTERNET, Lab, require_lab_abilities
from tidegate.lab.variants import TIDEGATE, VARIANTS, Variant, chosen_variants
from tidegate.lab.waiting import WaitTimeoutError
from tidegate.lab.workloads import WORKLOADS, Rig, Workload
from tidegate.net import quoted

LEAST_ROUNDS = 5

Pair = tuple[Workload, Variant]


def run_bench(
    *,
    json_output: bool = False,
    rounds: int = LEAST_ROUNDS,
    variants: Sequence[str] = (),
    workloads: Sequence[str] = (),
    output: Path | None = None,
) -> int:
    """Measures and reports. Returns the exit code (1: `has_failed`, 130: Ctrl-C, 128 + the number of another signal).

    `variants` and `workloads` select by part of the name. The table goes to standard output, or JSON with
    `json_output`; `output` is a folder for ``benchmark.json``, ``benchmark.md`` and, if matplotlib is installed,
    ``benchmark.png``. Raises `TidegateError` if there is nothing to measure, or no way to measure it.
    """
    console = make_console(json_output=json_output)
    return until_interrupted(console, lambda: _run(console, json_output, rounds, variants, workloads, output))


def _run(
    console: Console,
    json_output: bool,
    rounds: int,
    variants: Sequence[str],
    workloads: Sequence[str],
    output: Path | None,
) -> int:
    chosen = _selected(variants, workloads)
    pairs, left_out = _possible(chosen)
    if not pairs:
        raise TidegateError(
            f"nothing can be measured here: {'; '.join(left_out)}",
            hint="`make bench` installs what is missing",
        )
    require_lab_abilities()
    if output is not None:
        with _writing(output):
            _make_writable(output)
    if left_out:
        console.print(
            f"[yellow]left out, {len(left_out)}:[/] {'; '.join(left_out)}. `make bench` installs what is missing"
        )
    results = _measure(console, pairs, rounds)
    console.print(report.as_table(results))
    if (goals := report.goals_table(results)) is not None:
        console.print(goals)
    if json_output:
        sys.stdout.write(json.dumps(report.as_json(results, rounds), indent=2) + "\n")
    if output is not None:
        with _writing(output):
            written = _write(output, results, rounds)
        console.print(f"written: {written}")
    failures = [
        error for by_variant in results.values() for series in by_variant.values() for error in series.errors
    ]
    for failure in failures:
        console.print(f"[red]failed:[/] {failure}")
    return 1 if has_failed(results) else 0


def _selected(variants: Sequence[str], workloads: Sequence[str]) -> list[Pair]:
    """The pairs of workload and variant to measure. Raises `UsageError`."""
    _check_names("--variant", variants, [variant.name for variant in VARIANTS])
    _check_names("--workload", workloads, [workload.name for workload in WORKLOADS])
    chosen = chosen_variants(variants)
    pairs = [(w, v) for w in WORKLOADS if _chosen(w.name, workloads) for v in chosen if _measured(w, v)]
    if not pairs:
        known = [(v.name, [w.name for w in WORKLOADS if _measured(w, v)]) for v in chosen]
        raise UsageError(
            "none of these variants is measured with any of these workloads",
            hint="; ".join(f'"{variant}" is measured with {_listed(names)}' for variant, names in known),
        )
    return pairs


def _check_names(flag: str, parts: Sequence[str], names: Sequence[str]) -> None:
    for part in parts:
        if not any(_chosen(name, [part]) for name in names):
            raise UsageError(f"{flag}: no name contains {quoted(part)}", hint=f"choose from {_listed(names)}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _chosen(name: str, parts: Sequence[str]) -> bool:
    return not parts or any(part.lower() in name.lower() for part in parts)


def _possible(pairs: list[Pair]) -> tuple[list[Pair], list[str]]:
    """The pairs that can be measured here, and why each of the other variants and workloads cannot."""
    cannot = {
        v.name: f"{v.name} ({', '.join(missing)} not installed)" for _, v in pairs if (missing := v.missing())
    }
    if not crowd.COMMAND.exists():
        cannot |= {w.name: f"{w.name} ({crowd.COMMAND.name} not built)" for w, _ in pairs if w.own_lab}
    return [(w, v) for w, v in pairs if not {w.name, v.name} & cannot.keys()], list(cannot.values())


def _measured(workload: Workload, variant: Variant) -> bool:
    return variant.name == TIDEGATE if workload.own_lab else variant.measured_with(workload.name)


def _measure(console: Console, pairs: list[Pair], rounds: int) -> Results:
    pairs = list(pairs)
    results: Results = {}
    for workload, variant in pairs:
        results.setdefault(workload.name, {})[variant.name] = Series()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with ExitStack() as labs, Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        needed = dict.fromkeys((v.name, w.clients) for w, v in pairs if not w.own_lab)
        setting_up = progress.add_task("setting up", total=len(needed))
        rigs: dict[tuple[str, int], Rig] = {}
        by_name = {variant.name: variant for _, variant in pairs}
        for name, clients in needed:
            lab = labs.enter_context(Lab(clients=clients))
            start_services(lab)
            short = [sys.executable, "-m", shortserver.__name__, INTERNET]
            lab.internet.popen(short, name="shortserver").wait_for(shortserver.READY)
            try:
                rigs[name, clients] = by_name[name].set_up(lab)
            except (CommandError, WaitTimeoutError) as failure:
                cannot = [
                    (w, v) for w, v in pairs if v.name == name and w.clients == clients and not w.own_lab
                ]
                for workload, variant in cannot:
                    results[workload.name][name].errors.append(f"{name} cannot be set up: {failure}")
                    pairs.remove((workload, variant))
            progress.advance(setting_up)
        measuring = progress.add_task("measuring", total=rounds * len(pairs))
        for number in range(rounds):
            for workload, variant in pairs:
                at = f"round {number + 1} of {rounds}: {workload.name}, {variant.name}"
                progress.update(measuring, description=at)
                _once(rigs.get((variant.name, workload.clients)), workload, variant, results)
                progress.advance(measuring)
            console.print(f"round {number + 1} of {rounds} is done")
    return results


def _once(rig: Rig | None, workload: Workload, variant: Variant, results: Results) -> None:
    series = results[workload.name][variant.name]
    try:
        value = workload.once(rig)
    except (CommandError, WaitTimeoutError, OSError, ValueError, ArithmeticError) as failure:
        series.errors.append(f"{workload.name}, {variant.name}: {failure}")
    else:
        if value is not None:
            series.values.append(value)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as cause:
        raise TidegateError(f"--output {folder}: cannot be written: {cause.strerror or cause}") from cause


def _make_writable(folder: Path) -> None:
    """Fails now, rather than after half an hour, if the folder cannot be written to. Raises `OSError`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def _write(folder: Path, results: Results, rounds: int) -> str:
    """Writes the reports. Returns the names of the files."""
    (folder / "benchmark.json").write_text(json.dumps(report.as_json(results, rounds), indent=2) + "\n")
    (folder / "benchmark.md").write_text(report.as_markdown(results, rounds))
    if report.plot(folder / "benchmark.png", results):
        return f"{folder}/benchmark.json, benchmark.md, benchmark.png"
    why = "matplotlib is not installed, or there is no throughput to show"
    return f"{folder}/benchmark.json, benchmark.md (no plot: {why})"


def main() -> None:
    """The benchmark without the command line of the package."""
    parser = argparse.ArgumentParser(prog="python -m tidegate.lab.bench", description=__doc__)
    parser.add_argument("--json", action="store_true", help="the result as JSON on standard output")
    parser.add_argument("--rounds", type=int, default=LEAST_ROUNDS)
    parser.add_argument(
        "--variant", action="append", default=[], metavar="PART", help="only variants with this in their name"
    )
    parser.add_argument(
        "--workload",
        action="append",
        default=[],
        metavar="PART",
        help="only workloads with this in their name",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="where to write JSON, Markdown and a plot"
    )
    arguments = parser.parse_args()
    end_with(
        lambda: run_bench(
            json_output=arguments.json,
            rounds=arguments.rounds,
            variants=arguments.variant,
            workloads=arguments.workload,
            output=arguments.output,
        )
    )


if __name__ == "__main__":
    main()
