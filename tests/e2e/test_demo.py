"""`tidegate demo` itself: green, and leaving nothing behind even when stopped half-way. Nor does the benchmark."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tidegate.lab.processes import Process, run
from tidegate.lab.stacks import tidegate_command
from tidegate.lab.topology import remove_leftovers
from tidegate.lab.waiting import wait_until

from .conftest import AS_NOBODY

pytestmark = pytest.mark.namespaces


def traces(pid: int) -> list[str]:
    """Everything that a lab of process `pid` has left on the machine."""
    places = [Path("/run/netns"), Path("/etc/netns"), Path("/tmp")]
    return [str(entry) for place in places if place.exists() for entry in place.glob(f"tg{pid}-*")]


@pytest.mark.timeout(180)
def test_the_demo_is_green_within_a_minute(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--reference"):
        pytest.skip("about Tidegate only")
    done = run([*tidegate_command(), "demo", "--json"], timeout=170, check=False)
    report = json.loads(done.stdout)
    assert [check for check in report["checks"] if not check["ok"]] == []
    assert report["ok"] is True
    assert done.returncode == 0
    assert report["seconds"] < 60


def test_the_demo_sees_what_another_gateway_does_to_its_host() -> None:
    # wireguard-go with kernel NAT does everything except leave the host alone: a test of the demo's own checks.
    done = run([sys.executable, "-m", "tidegate.lab.demo", "--json", "--reference"], timeout=110, check=False)
    assert done.returncode == 1
    failed = [check["name"] for check in json.loads(done.stdout)["checks"] if not check["ok"]]
    assert failed == [
        "Host untouched, under traffic",
        "Host's kernel forwards nothing",
        "SIGTERM",
        "Host untouched, afterwards",
    ]


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
    ids=["Ctrl-C", "SIGTERM", "SIGHUP"],
)
def test_a_demo_that_is_interrupted_cleans_up(tmp_path: Path, number: signal.Signals, code: int) -> None:
    demo = Process("demo", [sys.executable, "-m", "tidegate.lab.demo", "--reference"], tmp_path / "demo.log")
    demo.wait_for("Ping", timeout=30)
    assert traces(demo.pid) != []
    demo.stop(number, grace=15)
    assert demo.returncode == code
    assert traces(demo.pid) == []


def test_a_demo_whose_terminal_is_closed_cleans_up() -> None:
    ours, its = os.openpty()
    command = ["setsid", "--ctty", *tidegate_command(), "demo", "--reference"]
    with subprocess.Popen(command, stdin=its, stdout=its, stderr=its) as demo:
        os.close(its)
        shown = b""
        while b"Ping" not in shown:
            shown += os.read(ours, 4096)
        assert traces(demo.pid) != []
        os.close(ours)
        assert demo.wait(15) == 129
    assert traces(demo.pid) == []


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
    ids=["Ctrl-C", "SIGTERM", "SIGHUP"],
)
def test_a_benchmark_that_is_interrupted_cleans_up(tmp_path: Path, number: signal.Signals, code: int) -> None:
    what = ["--variant", "kernel forwarding", "--workload", "ping, idle", "--rounds", "100"]
    bench = Process("bench", [sys.executable, "-m", "tidegate.lab.bench", *what], tmp_path / "bench.log")
    bench.wait_for("round 1 of 100 is done", timeout=30)
    assert traces(bench.pid) != []
    bench.stop(number, grace=15)
    assert bench.returncode == code
    assert traces(bench.pid) == []


def test_what_a_killed_demo_left_is_removed_by_the_next_lab(tmp_path: Path) -> None:
    demo = Process("demo", [sys.executable, "-m", "tidegate.lab.demo", "--reference"], tmp_path / "demo.log")
    demo.wait_for("Ping", timeout=30)
    demo.stop(signal.SIGKILL)
    assert traces(demo.pid) != []
    remove_leftovers()
    wait_until(lambda: traces(demo.pid) == [], "the leftovers to go")


def test_without_root_the_demo_says_what_it_needs() -> None:
    done = subprocess.run(
        [*AS_NOBODY, sys.executable, "-B", "-m", "tidegate.lab.demo"],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 1
    assert (done.stdout, done.stderr) == ("", "tidegate: network namespaces need root; run it with sudo\n")
