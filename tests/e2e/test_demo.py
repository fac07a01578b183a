"""`tidegate demo` itself: green, and leaving nothing behind even when stopped half-way. Nor does the benchmark."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
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
@pytest.mark.alone
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
    command = [sys.executable, "-m", "tidegate.lab.demo", "--json", "--reference", "--mib", "16"]
    done = run(command, timeout=110, check=False)
    assert done.returncode == 1
    failed = [check["name"] for check in json.loads(done.stdout)["checks"] if not check["ok"]]
    assert failed == [
        "Host untouched, under traffic",
        "Host's kernel forwards nothing",
        "SIGTERM",
        "Host untouched, afterwards",
    ]


DEMO = [sys.executable, "-m", "tidegate.lab.demo", "--reference"]
BENCH = [
    *(sys.executable, "-m", "tidegate.lab.bench", "--variant", "kernel forwarding"),
    *("--workload", "ping, idle", "--rounds", "100"),
]
INTERRUPTIONS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
interruptions = pytest.mark.parametrize(
    ("number", "code"), INTERRUPTIONS.items(), ids=["Ctrl-C", "SIGTERM", "SIGHUP"]
)
AT_ONCE = 3


@dataclass(frozen=True)
class Interrupted:
    """A demo or a benchmark that was sent a signal half-way."""

    before: list[str]
    """The traces of its lab when the signal was sent."""
    after: list[str]
    code: int | None

    @classmethod
    def half_way(cls, command: list[str], half_way: str, number: signal.Signals, log: Path) -> Interrupted:
        process = Process(log.stem, command, log)
        try:
            process.wait_for(half_way, timeout=60)
            before = traces(process.pid)
            process.stop(number, grace=30)
        finally:
            process.stop()
        return cls(before, traces(process.pid), process.returncode)


Interruptions = dict[signal.Signals, Future[Interrupted]]


@pytest.fixture(scope="module")
def several_at_once() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield pool


@pytest.fixture(scope="module")
def demos(several_at_once: ThreadPoolExecutor, tmp_path_factory: pytest.TempPathFactory) -> Interruptions:
    logs = tmp_path_factory.mktemp("demos")
    return {
        number: several_at_once.submit(
            Interrupted.half_way, DEMO, "Ping", number, logs / f"demo-{number.name}.log"
        )
        for number in INTERRUPTIONS
    }


@pytest.fixture(scope="module")
def benches(several_at_once: ThreadPoolExecutor, tmp_path_factory: pytest.TempPathFactory) -> Interruptions:
    logs = tmp_path_factory.mktemp("benches")
    done = "round 1 of 100 is done"
    return {
        number: several_at_once.submit(
            Interrupted.half_way, BENCH, done, number, logs / f"bench-{number.name}.log"
        )
        for number in INTERRUPTIONS
    }


@interruptions
def test_a_demo_that_is_interrupted_cleans_up(
    demos: Interruptions, number: signal.Signals, code: int
) -> None:
    demo = demos[number].result()
    assert demo.before != []
    assert demo.code == code
    assert demo.after == []


@interruptions
def test_a_benchmark_that_is_interrupted_cleans_up(
    benches: Interruptions, number: signal.Signals, code: int
) -> None:
    bench = benches[number].result()
    assert bench.before != []
    assert bench.code == code
    assert bench.after == []


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


def test_what_a_killed_demo_left_is_removed_by_the_next_lab(tmp_path: Path) -> None:
    demo = Process("demo", DEMO, tmp_path / "demo.log")
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
