"""What follows from measured figures: ratios, goals, and what the report says of them."""

from __future__ import annotations

import json
from io import StringIO

import pytest
from rich.console import Console

from tidegate.lab import report
from tidegate.lab.figures import GOALS, Goal, Results, Series, Verdict, has_failed, ratio, verdicts
from tidegate.lab.variants import (
    BORINGTUN_KERNEL,
    KERNEL,
    TIDEGATE,
    TIDEGATE_AES,
    WIREGUARD_GO,
    chosen_variants,
)
from tidegate.lab.workloads import CROWD_MEMORY, PING, TCP_1_UP, WORKLOADS

RESULTS: Results = {
    TCP_1_UP: {
        KERNEL: Series([9.0, 10.0, 11.0, 10.0, 10.0]),
        TIDEGATE: Series([3.0, 3.0, 2.0, 4.0, 3.0]),
        TIDEGATE_AES: Series(errors=["it broke"]),
        WIREGUARD_GO: Series([0.3]),
    },
    PING: {KERNEL: Series([0.07]), TIDEGATE: Series([0.27]), WIREGUARD_GO: Series([0.5])},
    CROWD_MEMORY: {TIDEGATE: Series([250.0])},
}


def _verdict(goal: Goal) -> Verdict:
    [verdict] = goal.verdicts(RESULTS)
    return verdict


def test_the_middle_of_the_rounds_counts_and_one_wild_round_does_not() -> None:
    series = Series([3.0, 2.9, 3.1, 0.01, 3.2])
    assert series.median == 3.0
    assert Series([1.0, 2.0, 3.0, 4.0, 5.0]).spread == (1.5, 4.5)
    assert Series([2.0, 1.0]).spread == (1.0, 2.0)  # too few for quartiles
    assert Series().median is None
    assert Series().spread is None


def test_a_ratio_is_of_medians_and_absent_where_one_was_not_measured() -> None:
    assert ratio(RESULTS, TCP_1_UP, TIDEGATE, KERNEL) == pytest.approx(0.3)
    assert ratio(RESULTS, TCP_1_UP, TIDEGATE, WIREGUARD_GO) == pytest.approx(10.0)
    assert ratio(RESULTS, TCP_1_UP, TIDEGATE_AES, KERNEL) is None
    assert ratio(RESULTS, CROWD_MEMORY, TIDEGATE, KERNEL) is None
    assert ratio(RESULTS, "no such workload", TIDEGATE, KERNEL) is None


def test_a_goal_to_another_variant_is_a_ratio() -> None:
    assert _verdict(Goal(TIDEGATE, (TCP_1_UP,), 0.27, KERNEL)).met is True
    assert _verdict(Goal(TIDEGATE, (TCP_1_UP,), 12, WIREGUARD_GO)).met is False
    assert _verdict(Goal(TIDEGATE, (PING,), 0.5, WIREGUARD_GO, at_least=False)).met is False


def test_a_goal_in_milliseconds_beside_another_variant_is_a_difference() -> None:
    goal = Goal(TIDEGATE, (PING,), 0.25, KERNEL, at_least=False, unit=" ms")
    verdict = _verdict(goal)
    assert verdict.measured == pytest.approx(0.2)
    assert verdict.met is True
    assert report.wanted(goal) == f"at most 0.25 ms above {KERNEL}"
    assert report.measured(verdict) == "+0.2 ms"


def test_a_goal_beside_nobody_is_the_figure_itself() -> None:
    verdict = _verdict(Goal(TIDEGATE, (CROWD_MEMORY,), 200, at_least=False, unit=" MiB"))
    assert (verdict.measured, verdict.met) == (250.0, False)
    assert report.wanted(verdict.goal) == "at most 200 MiB"


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    verdict = _verdict(Goal(TIDEGATE_AES, (TCP_1_UP,), 0.42, KERNEL))
    assert verdict.met is None
    assert report.measured(verdict) == "–"


def test_every_goal_speaks_of_a_workload_and_of_variants_that_are_measured_with_it() -> None:
    variants = {variant.name: variant for variant in chosen_variants(())}
    workloads = {workload.name: workload for workload in WORKLOADS}
    for goal in GOALS:
        for workload in goal.workloads:
            assert workload in workloads
            for name in (goal.variant, *([goal.to] if goal.to else [])):
                assert variants[name].measured_with(workload), f"{name} is left out of {workload}"


def test_markdown_shows_both_ratios_failures_and_gaps() -> None:
    lines = report.as_markdown(RESULTS, 5).splitlines()
    [bulk] = [line for line in lines if line.startswith(f"| {TCP_1_UP}, Gb/s")]
    assert "| 3 (2.5–3.5) ×0.3 w×10 |" in bulk
    assert "| failed |" in bulk
    [memory] = [line for line in lines if line.startswith(f"| {CROWD_MEMORY}, MiB")]
    assert memory.count("–") == 3 + 1  # three variants without it, and the spread of the one that has it
    assert f"| {TIDEGATE} | {TCP_1_UP} | at least 12 × {WIREGUARD_GO} | 10 × | falls short |" in lines
    assert f"| {TIDEGATE} | {TCP_1_UP} | at least 0.27 × {KERNEL} | 0.3 × | met |" in lines


def test_json_holds_ratios_goals_and_every_single_value() -> None:
    told = json.loads(json.dumps(report.as_json(RESULTS, 5)))
    [own] = [f for f in told["figures"] if (f["workload"], f["variant"]) == (TCP_1_UP, TIDEGATE)]
    assert (own["to_kernel"], own["to_wireguard_go"]) == (pytest.approx(0.3), pytest.approx(10.0))
    assert own["values"] == [3.0, 3.0, 2.0, 4.0, 3.0]
    assert len(told["goals"]) == len(verdicts(RESULTS))
    assert {goal["met"] for goal in told["goals"]} == {True, False, None}


def test_the_terminal_shows_a_line_for_each_figure_and_only_goals_that_were_measured() -> None:
    console = Console(file=StringIO(), width=140)
    goals = report.goals_table(RESULTS)
    assert goals is not None
    console.print(report.as_table(RESULTS), goals)
    printed = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    assert "3 (2.5–3.5)" in printed
    assert "[Gb/s]" in printed
    assert "not measured" not in printed
    assert report.goals_table({}) is None


def test_shards_are_measured_only_where_they_are_asked_for() -> None:
    assert not [v for v in chosen_variants(()) if "shard" in v.name]
    assert [v.name for v in chosen_variants(["shard"])] == [
        f"{TIDEGATE}, {n}" for n in ("1 shard", "2 shards", "4 shards")
    ]
    assert [v.name for v in chosen_variants(["KERNEL NAT", "softether"])] == [
        WIREGUARD_GO,
        "boringtun + kernel NAT",
        "OpenVPN + kernel NAT",
        "SoftEther with SecureNAT",
    ]


@pytest.mark.parametrize(
    ("variant", "series", "failed"),
    [
        (TIDEGATE, Series([3.0, 3.0]), False),
        (TIDEGATE_AES, Series([3.0, 3.0], ["it broke once"]), True),
        (BORINGTUN_KERNEL, Series([3.0], ["it broke"] * 4), False),
        (BORINGTUN_KERNEL, Series(errors=["it broke"] * 5), True),
        (BORINGTUN_KERNEL, Series(), False),  # left out
    ],
)
def test_a_run_fails_with_anything_of_ours_or_where_there_is_no_figure_at_all(
    variant: str, series: Series, failed: bool
) -> None:
    assert has_failed({TCP_1_UP: {variant: series}}) is failed


def test_the_report_says_how_many_rounds_failed() -> None:
    assert report.spread(Series([2.0, 1.0], ["it broke"])) == "1.5 (1–2, 1 failed)"
    assert report.spread(Series([2.0, 1.0])) == "1.5 (1–2)"
    assert report.spread(Series(errors=["it broke"])) == "failed"
