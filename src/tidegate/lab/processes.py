"""Processes of the lab: each is tracked, logged, and ended by its own pid."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tidegate.lab.waiting import wait_until

_OF_ROOT = ("/usr/local/sbin", "/usr/sbin", "/sbin")
"""Where most of the lab's tools are. Debian's `su` without a dash leaves root with a PATH that lacks them."""


class CommandError(RuntimeError):
    """A command of the lab failed; the message includes its output."""

    def __init__(self, command: Sequence[str], returncode: int, output: str) -> None:
        self.command = list(command)
        self.returncode = returncode
        self.output = output
        super().__init__(f"`{' '.join(command)}` ended with {returncode}: {output.strip() or '(no output)'}")


def which(command: str) -> str | None:
    """The path of a command of the lab; `None` if it is not installed."""
    return shutil.which(command, path=_path())


def _path() -> str:
    given = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return os.pathsep.join([*given, *(folder for folder in _OF_ROOT if folder not in given)])


def _environment(more: Mapping[str, str] | None) -> dict[str, str]:
    return {**os.environ, "PATH": _path(), **(more or {})}


def run(
    command: Sequence[str],
    *,
    timeout: float = 30.0,
    check: bool = True,
    stdin: str | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end. Output is text, with stderr apart. Raises `CommandError` on a timeout, and if `check`,
    on failure."""
    try:
        done = subprocess.run(
            list(command),
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            input=stdin if stdin is not None else "",
            env=_environment(env),
        )
    except subprocess.TimeoutExpired as error:
        said = (error.stderr or error.stdout or b"").decode(errors="replace")
        raise CommandError(command, -signal.SIGKILL, f"not finished after {timeout:g} s. {said}") from error
    if check and done.returncode != 0:
        raise CommandError(command, done.returncode, done.stderr or done.stdout)
    return done


class Process:
    """A long-running process of the lab, with its output in `log`.

    It runs in a session of its own: Ctrl-C on the terminal reaches only the lab, which then takes things down in the
    right order.
    """

    def __init__(
        self, name: str, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.command = list(command)
        self.log = log
        with log.open("wb") as sink:
            self._popen = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=_environment(env),
            )

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, or None while the process runs; negative: the signal that ended it."""
        return self._popen.poll()

    @property
    def running(self) -> bool:
        return self.returncode is None

    def output(self) -> str:
        """Everything that the process has printed so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def send_signal(self, number: signal.Signals) -> None:
        if self.running:
            self._popen.send_signal(number)

    def wait(self, timeout: float) -> int:
        """The exit status; raises `subprocess.TimeoutExpired`."""
        return self._popen.wait(timeout)

    def stop(self, number: signal.Signals = signal.SIGTERM, *, grace: float = 5.0) -> float:
        """Signals the process to end, kills it after `grace` seconds, and returns how many seconds it took."""
        begun = time.monotonic()
        self.send_signal(number)
        try:
            self._popen.wait(grace)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        return time.monotonic() - begun

    def wait_for(self, text: str, *, timeout: float = 10.0) -> None:
        """Waits until `text` was printed; raises `CommandError` as soon as the process has ended without it."""

        def printed() -> bool:
            seen = text in self.output()
            if not seen and not self.running:
                raise CommandError(self.command, self.returncode or 0, self.output())
            return seen

        wait_until(printed, f"`{text}` in the output of {self.name}", timeout=timeout)

    def cpu_seconds(self) -> float:
        """User and system time that the process and its children have used, from /proc (resolution: one tick,
        usually 10 ms)."""
        ticks = 0
        for pid in self._family():
            # The fields after the command name, which may contain blanks: proc(5), fields 3 and on.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])  # fields 14 and 15, utime and stime
        return ticks / os.sysconf("SC_CLK_TCK")

    def resident_bytes(self) -> int:
        """Resident set size, with its children's."""
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self._family())
        return pages * os.sysconf("SC_PAGE_SIZE")

    def _family(self) -> list[int]:
        """The process and its children: a daemon may be the child of a watchdog."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [self.pid, *map(int, children)]
