"""``tidegate demo`` and ``tidegate bench``: the lab's network namespaces, from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tidegate.cli.options import JsonOption, examples

DEMO_EXAMPLES = examples(
    ("tidegate demo", "client, gateway and internet host in network namespaces, checked step by step")
)
BENCH_EXAMPLES = examples(
    ("tidegate bench", "compare with the kernel, wireguard-go and others (half an hour)"),
    ("tidegate bench --variant tidegate --workload '1 flow, down' --rounds 1", "a quick look"),
)


def demo(
    json: JsonOption = False,
    reference: Annotated[
        bool,
        typer.Option("--reference", hidden=True, help="wireguard-go and kernel NAT in Tidegate's place."),
    ] = False,
) -> int:
    """Run client, gateway and internet on this machine, in network namespaces of their own, and clean up."""
    from tidegate.lab.demo import run_demo

    return run_demo(json_output=json, reference=reference)


def bench(
    rounds: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Rounds of each measurement.", show_default=False)
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Only variants with this in their name; repeatable. An unknown one lists all of them.",
        ),
    ] = None,
    workload: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="The same for workloads.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write benchmark.json, .md and .png there.")
    ] = None,
    json: JsonOption = False,
) -> int:
    """Compare Tidegate with other VPNs on this machine, in network namespaces of their own."""
    from tidegate.lab.bench import LEAST_ROUNDS, run_bench

    return run_bench(
        json_output=json,
        rounds=rounds or LEAST_ROUNDS,
        variants=variant or (),
        workloads=workload or (),
        output=output,
    )
