"""Standard streams that are closed, have lost their reader, or lead to a full disk."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

LOGGING = """
import sys, structlog
from tidegate.log import configure_logging
from tidegate.settings import LogSettings
configure_logging(LogSettings(format=sys.argv[1]))
structlog.get_logger().info("one")
structlog.get_logger().info("two")
"""
DESCRIPTOR = """
import os
from tidegate.streams import occupy_closed_descriptors
occupy_closed_descriptors()
print(os.readlink("/proc/self/fd/2"), os.open("/", os.O_RDONLY) > 2)
"""


def run(code: str, *arguments: str, stderr: int | None, closed: bool = False) -> tuple[int, str]:
    command = [sys.executable, "-c", code, *arguments]
    if closed:
        command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, check=False, timeout=30)
    return done.returncode, done.stdout


@pytest.mark.parametrize("form", ["auto", "console", "json"])
def test_a_log_into_a_closed_stream_is_lost_and_nothing_else(form: str) -> None:
    assert run(LOGGING, form, stderr=None, closed=True) == (0, "")


def test_a_log_whose_reader_is_gone_is_lost_and_does_not_change_the_exit_code() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        assert run(LOGGING, "logfmt", stderr=writing) == (0, "")
    finally:
        os.close(writing)


def test_no_socket_gets_the_number_of_a_closed_stream() -> None:
    assert run(DESCRIPTOR, stderr=None, closed=True) == (0, "/dev/null True\n")


def test_an_error_that_does_not_fit_on_the_disk_does_not_change_the_exit_code() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        code = "import sys; from tidegate.cli import main; sys.exit(main(['swerve']))"
        assert run(code, stderr=full) == (2, "")
        assert run(code, stderr=None, closed=True) == (2, "")
    finally:
        os.close(full)
