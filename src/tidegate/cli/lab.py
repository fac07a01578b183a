"""``tidegate demo`` and ``tidegate bench``: the lab's network namespaces, from the command line."""

from __future__ import annotations

from typing import Annotated

import typer

from tidegate.cli.options import JsonOption, examples

DEMO_EXAMPLES = examples(
    ("tidegate demo", "client, gateway and internet host in network namespaces, checked step by step")
)
BENCH_EXAMPLES = examples(("tidegate bench", "throughput, in network namespaces"))


def demo(
    json: JsonOption = False,
    reference: Annotated[
        bool,
        typer.Option("--reference", hidden=True, help="wireguard-go and kernel NAT in Tidegate's place."),
    ] = False,
) -> int:
    """Show the whole path on this machine, in network namespaces of its own, and clean up."""
    from tidegate.lab.demo import run_demo

    return run_demo(json_output=json, reference=reference)


def bench(json: JsonOption = False) -> int:
    """Measure throughput on this machine, in network namespaces of its own."""
    from tidegate.lab.bench import run_bench

    return run_bench(json_output=json)
