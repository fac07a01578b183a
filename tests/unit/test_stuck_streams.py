"""Standard streams whose reader lives but does not read: a paused pager, a log driver that hangs."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import TextIO

import pytest

from tests.unit.connecting import PROFILE
from tidegate import streams
from tidegate.control.client import ControlClient
from tidegate.control.commands import PeerList
from tidegate.errors import NotRunningError
from tidegate.lab.waiting import wait_until
from tidegate.lifecycle import STOP_DEADLINE
from tidegate.line_writer import LAST_LINES, MAX_WAITING_LINES
from tidegate.log import configure_logging, report_lost_lines
from tidegate.settings import LogSettings
from tidegate.streams import say, saying_in_background

ROOT = Path(__file__).parents[2]
STOP_SECONDS = 2.0

SERVE = """
import sys
from pathlib import Path
from tests.unit.fakes import FakeEngine, FakeHost, FakeRecord
from tidegate.cli import main
from tidegate.cli.runtime import Runtime

state, port = sys.argv[1:]
engine = FakeEngine()
engine.prepare = lambda gateway: gateway.log_mappings(*(FakeRecord("created", ("10.66.77.2", n)) for n in range(300)))
arguments = ["serve", "--state-dir", state, "--listen", f"127.0.0.1:{port}", "--no-dns"]
code = main(arguments, Runtime(lambda: engine, FakeHost, default_config=Path("/nonexistent")))
print("stopped", engine.gateways[0].stopped)
sys.exit(code)
"""
CONNECT = """
import os, sys
from pathlib import Path
from tests.unit.fakes import FakeClientHost, FakeEngine
from tidegate.cli import main
from tidegate.cli.runtime import Runtime

class Host(FakeClientHost):
    def dns(self, *arguments):
        Path(sys.argv[2]).write_text("has come this far")
        return super().dns(*arguments)

engine, host = FakeEngine(), Host()
if "TROUBLE" in os.environ:
    host.failure = RuntimeError(os.environ["TROUBLE"])
code = main(["connect", *sys.argv[3:], sys.argv[1]], Runtime(lambda: engine, client_host=lambda: host))
Path(sys.argv[2]).write_text(", ".join(host.journal[-2:]))
sys.exit(code)
"""

LOGGING = """
import asyncio, sys, structlog
from tidegate import line_writer
from tidegate.cli.output import remark
from tidegate.log import configure_logging, report_lost_lines
from tidegate.settings import LogSettings
from tidegate.streams import saying_in_background

async def work():
    for number in range(int(sys.argv[1])):
        structlog.get_logger().info("worked", number=number)
        if number % 256 == 0:
            await asyncio.sleep(0)
    raise RuntimeError("crash")

configure_logging(LogSettings(format="logfmt"))
if len(sys.argv) > 2:
    line_writer.PATIENCE = line_writer.LAST_LINES = float(sys.argv[2])
try:
    with saying_in_background(report_lost_lines):
        asyncio.run(work())
except RuntimeError as crash:
    remark(str(crash))
"""


@contextmanager
def full_pipe() -> Iterator[tuple[int, int, int]]:
    """A pipe without room for another byte: its two ends, and how many bytes are in it. Its writing end blocks."""
    reading, writing = os.pipe()
    # A description of its own, so that only our filling does not block.
    filling = os.open(f"/proc/self/fd/{writing}", os.O_WRONLY | os.O_NONBLOCK)
    filled = 0
    with suppress(BlockingIOError):
        while True:
            filled += os.write(filling, b"#" * 4096)
    os.close(filling)
    try:
        yield reading, writing, filled
    finally:
        os.close(reading)
        os.close(writing)


@contextmanager
def child(
    code: str,
    *arguments: object,
    stderr: int,
    stdout: int = subprocess.PIPE,
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    variables = {**os.environ, **(environment or {})}
    with subprocess.Popen(
        command, stdout=stdout, stderr=stderr, text=True, cwd=ROOT, env=variables
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def leads_nowhere(descriptor: int) -> bool:
    return os.fstat(descriptor).st_rdev == os.stat(os.devnull).st_rdev  # noqa: PTH116


def stop(process: subprocess.Popen[str]) -> int:
    """The exit code after SIGTERM, which must not take longer than promised."""
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code = process.wait(STOP_SECONDS)
    assert time.monotonic() - asked < STOP_SECONDS
    return code


def answers(state: Path) -> bool:
    """Whether a gateway listens, and answers."""
    try:
        client = ControlClient.connect(state)
    except NotRunningError:
        return False
    try:
        return client.execute(PeerList()).running
    finally:
        client.close()


def test_a_gateway_whose_log_is_not_read_answers_and_stops(tmp_path: Path, free_port: int) -> None:
    state = tmp_path / "state"
    with full_pipe() as (_, writing, _), child(SERVE, state, free_port, stderr=writing) as gateway:
        wait_until(lambda: answers(state), "the gateway to answer")
        assert stop(gateway) == 0
        assert gateway.stdout is not None
        assert gateway.stdout.read() == "stopped 1\n"
        assert not (state / "control.sock").exists()


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["for people", "for programs"])
def test_a_client_whose_output_is_not_read_takes_its_routes_back(tmp_path: Path, options: list[str]) -> None:
    profile, journal = tmp_path / "alice.conf", tmp_path / "journal"
    profile.write_text(PROFILE.render())
    profile.chmod(0o600)
    with (
        full_pipe() as (_, writing, _),
        child(CONNECT, profile, journal, *options, stderr=writing, stdout=writing) as client,
    ):
        wait_until(journal.exists, "the client to connect")
        assert stop(client) == 0
        assert journal.read_text() == "dns undone, routes undone"


@pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "made non-blocking"])
def test_a_log_that_is_read_loses_no_line_and_no_order_whatever_the_event_loop_is_doing(
    blocking: bool,
) -> None:
    count, patience = (
        5 * MAX_WAITING_LINES,
        10.0,
    )  # a busy machine may not let anybody read for longer than usual
    reading, writing = os.pipe()
    os.set_blocking(writing, blocking)
    with child(LOGGING, count, patience, stderr=writing) as process:
        os.close(writing)
        with open(reading) as log:  # noqa: PTH123 -- a descriptor
            lines = log.read().splitlines()
        assert process.wait(10) == 0
    assert lines.pop() == "tidegate: crash", "after everything that was logged before it"
    assert [int(line.rpartition("number=")[2]) for line in lines] == list(range(count))


def test_a_line_waits_for_room_also_where_somebody_has_made_the_stream_non_blocking() -> None:
    with full_pipe() as (reading, writing, filled):
        os.set_blocking(writing, False)
        code = "from tidegate.cli.output import remark; remark('low tide')"
        with child(code, stderr=writing) as process:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
            with open(reading, "rb", closefd=False) as pipe:
                assert pipe.read(filled) == b"#" * filled
                assert pipe.readline() == b"tidegate: low tide\n"
            assert process.wait(10) == 0


def test_lines_that_find_no_room_are_counted_and_their_place_says_how_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = 3 * MAX_WAITING_LINES
    with full_pipe() as (reading, writing, filled), open(writing, "w", closefd=False) as stream:
        monkeypatch.setattr("sys.stderr", stream)
        configure_logging(LogSettings(format="logfmt", level="error"))
        with saying_in_background(report_lost_lines), open(reading, "rb", closefd=False) as pipe:
            for number in range(said):
                say(str(number), stream)
            assert pipe.read(filled) == b"#" * filled
            heard = []
            while not (line := pipe.readline().decode()).startswith("timestamp"):
                heard.append(int(line))
            say("and on", stream)
            assert pipe.readline() == b"and on\n"
    assert heard == list(range(len(heard)))
    assert len(heard) >= MAX_WAITING_LINES
    assert line.endswith(
        f'event="lines were lost: nobody read them, or they could not be written" count={said - len(heard)}\n'
    )


def test_a_crash_of_a_process_whose_log_is_not_read_ends_it() -> None:
    with full_pipe() as (_, writing, _), child(LOGGING, 10, LAST_LINES, stderr=writing) as process:
        assert process.wait(10) == 0


def test_a_reader_that_is_slow_but_reads_gets_all_of_a_log_and_why_the_process_failed() -> None:
    count = 3_000
    reading, writing = os.pipe()
    log = b""
    with child(LOGGING, count, stderr=writing) as process:
        os.close(writing)
        while piece := os.read(reading, 4096):
            log += piece
            Event().wait(0.02)
        os.close(reading)
        assert process.wait(10) == 0
    lines = log.decode().splitlines()
    assert lines.pop() == "tidegate: crash"
    assert [int(line.rpartition("number=")[2]) for line in lines] == list(range(count))


def test_what_takes_a_slow_reader_too_long_is_counted_before_the_last_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process that was asked to stop has little time."""
    said = 3_000
    heard: list[str] = []
    reading, writing = os.pipe()

    def read_slowly() -> None:
        with open(reading, "rb", buffering=0) as pipe:  # noqa: PTH123 -- a descriptor
            log = b""
            while piece := pipe.read(4096):
                log += piece
                Event().wait(0.02)
            heard.extend(log.decode().splitlines())

    reader = Thread(target=read_slowly)
    reader.start()
    with open(writing, "w") as stream:  # noqa: PTH123 -- a descriptor
        monkeypatch.setattr("sys.stderr", stream)
        configure_logging(LogSettings(format="logfmt", level="error"))
        with saying_in_background(report_lost_lines):
            for number in range(said):
                say(f"{number:99}", stream)
            asked = time.monotonic()
        assert time.monotonic() - asked < STOP_SECONDS - STOP_DEADLINE
        say("and gone", stream)
    reader.join()
    *lines, report, last = heard
    assert last == "and gone"
    assert [int(line) for line in lines] == list(range(len(lines)))
    assert report.endswith(
        f'event="lines were lost: nobody read them, or they could not be written" count={said - len(lines)}'
    )
    assert 0 < len(lines) < said


def test_a_failure_ends_a_client_both_of_whose_streams_are_stuck_in_one_pipe(tmp_path: Path) -> None:
    profile = tmp_path / "alice.conf"
    profile.write_text(PROFILE.render())
    profile.chmod(0o600)
    with (
        full_pipe() as (_, writing, _),
        child(
            CONNECT,
            profile,
            tmp_path / "journal",
            "--json",
            stderr=writing,
            stdout=writing,
            environment={"TROUBLE": "no route"},
        ) as client,
    ):
        assert client.wait(5) == 1


def test_one_stream_that_is_stuck_holds_up_nothing_on_the_other() -> None:
    reading, writing = os.pipe()
    with (
        full_pipe() as (_, stuck, _),
        open(stuck, "w", closefd=False) as stdout,
        open(writing, "w") as stderr,  # noqa: PTH123 -- a descriptor
        open(reading) as log,  # noqa: PTH123 -- a descriptor
    ):
        losses: list[int] = []
        with saying_in_background(losses.append):
            say("stuck", stdout)
            say("one", stderr)
            assert log.readline() == "one\n"
            say("stuck, too", stdout)
            say("two", stderr)
        assert log.readline() == "two\n"
        assert losses == [2]


def test_a_process_without_a_free_descriptor_still_logs_after_it_lost_a_reader() -> None:
    gone, broken = os.pipe()
    os.close(gone)
    reading, writing = os.pipe()
    descriptors: list[int] = []
    with (
        open(broken, "w") as stdout,  # noqa: PTH123 -- a descriptor
        open(writing, "w") as stderr,  # noqa: PTH123 -- a descriptor
        open(reading) as log,  # noqa: PTH123 -- a descriptor
        saying_in_background(lambda _: None),
    ):
        say("before", stderr)
        assert log.readline() == "before\n"
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
            with suppress(OSError):
                while True:
                    descriptors.append(os.dup(0))
            say("lost", stdout)
            wait_until(lambda: leads_nowhere(broken), "the stream to be given up")
            say("after", stderr)
            assert log.readline() == "after\n"
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for descriptor in descriptors:
                os.close(descriptor)


def test_ctrl_c_at_the_end_of_the_block_leaves_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with full_pipe() as (_, writing, _), open(writing, "w", closefd=False) as stream:
        with (
            monkeypatch.context() as patched,
            pytest.raises(KeyboardInterrupt),
            saying_in_background(lambda _: None),
        ):
            say("stuck", stream)
            patched.setattr(Thread, "join", interrupt)
        assert leads_nowhere(writing)
        with saying_in_background(lambda _: None):  # which is refused while another one lasts
            say("goes nowhere", stream)


DISK = """
import resource, sys
from pathlib import Path
from tidegate.lab.waiting import wait_until
from tidegate.log import configure_logging, report_lost_lines
from tidegate.settings import LogSettings
from tidegate.streams import say, saying_in_background

configure_logging(LogSettings(format="logfmt"))
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (99_950, most))
with saying_in_background(report_lost_lines):
    for number in range(2_000):
        say(f"{number:99}", sys.stderr)
    wait_until(lambda: Path(sys.argv[1]).stat().st_size == 99_950, "the disk to be full")
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    say("and on", sys.stderr)
"""


def test_lines_that_a_full_disk_does_not_take_are_counted_and_the_next_one_begins_anew(
    tmp_path: Path,
) -> None:
    log = tmp_path / "log"
    with log.open("wb") as file, child(DISK, log, stderr=file.fileno()) as process:
        assert process.wait(30) == 0
    *lines, last, report = log.read_text().splitlines()
    assert lines.pop(999) == " " * 50, "a torn line"
    numbers = [int(line) for line in lines]
    assert numbers[:999] == list(range(999))
    assert numbers[999:] == list(range(2_000 - len(numbers[999:]), 2_000)), "for which there was room again"
    assert last == "and on"
    assert report.endswith(f"count={2_000 - len(numbers)}")


SLOW_DISK = """
import errno, sys, threading
from tidegate import line_writer
from tidegate.log import configure_logging, report_lost_lines
from tidegate.settings import LogSettings
from tidegate.streams import say, saying_in_background

write, taken = line_writer.write, threading.Event()

def refuse(data, stream):
    if stream is not sys.stdout:
        return write(data, stream)
    taken.set()
    threading.Event().wait(0.05)
    raise OSError(errno.ENOSPC, "No space left on device")

line_writer.write = refuse
configure_logging(LogSettings(format="logfmt"))
with saying_in_background(report_lost_lines):
    say("first", sys.stdout)
    taken.wait()
    say("second", sys.stdout)
"""


def test_what_standard_output_loses_at_the_end_is_reported_on_standard_error(tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    with errors.open("wb") as file, child(SLOW_DISK, stderr=file.fileno()) as process:
        assert process.wait(30) == 0, errors.read_text()
    reports = errors.read_text().splitlines()
    assert sum(int(report.rpartition("count=")[2]) for report in reports) == 2


def test_a_library_that_logs_in_a_destructor_does_not_hang_the_line_that_is_being_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As asyncio does, wherever Python happens to collect garbage."""
    file_of = streams._file_of

    def collect_garbage(stream: TextIO) -> object:
        monkeypatch.setattr(streams, "_file_of", file_of)
        say("of the library", stream)
        return file_of(stream)

    with (tmp_path / "log").open("w") as stream, saying_in_background(lambda _: None):
        monkeypatch.setattr(streams, "_file_of", collect_garbage)
        saying = Thread(target=lambda: say("ours", stream), daemon=True)
        saying.start()
        saying.join(5)
        assert not saying.is_alive()
    assert (tmp_path / "log").read_text() == "of the library\nours\n"
