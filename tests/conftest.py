"""What all tests share: signals as at a terminal, and that tests of namespaces are not skipped where they must run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

from tidegate.lab.topology import LabError, require_lab_abilities

# How long an example takes says more about the machine than about the code; whole tests have a timeout.
settings.register_profile("tidegate", deadline=None)
settings.load_profile("tidegate")

# `make test &` in a script begins with SIGINT ignored, which programs under test would inherit; some are sent it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Likewise `nohup make test` and SIGHUP. A handler is not inherited, and the tests themselves go on as they were to.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--reference",
        action="store_true",
        help="end-to-end tests against wireguard-go and kernel NAT instead of Tidegate: a test of the tests",
    )
    parser.addoption(
        "--offloads-off",
        action="store_true",
        help="end-to-end tests with every offload of the gateway and of its own client switched off",
    )
    parser.addoption(
        "--image",
        metavar="NAME",
        help="also the tests of a container image, which Podman has under this name",
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves out the tests of a container image unless one is named, or they themselves are: CI skips nothing."""
    is_left_out = collection_path.name == "test_container.py" and collection_path.parent.name == "e2e"
    return True if is_left_out and config.getoption("--image") is None else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Shares the tests among two workers (xdist's ``--dist loadgroup``), so that neither disturbs what the other sees.

    One has the end-to-end tests, one after another. The other begins with those that mostly wait, and goes on with the
    rest, a file at a time.
    """
    items.sort(key=lambda item: item.get_closest_marker("waits") is None)
    end_to_end = config.rootpath / "tests" / "e2e"
    for item in items:
        group = str(item.path) if end_to_end not in item.path.parents else "end to end"
        item.add_marker(pytest.mark.xdist_group("waits" if item.get_closest_marker("waits") else group))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("namespaces") is None:
        return
    try:
        require_lab_abilities()
    except LabError as cannot:
        if os.environ.get("CI"):
            pytest.fail(f"CI must run this, but {cannot}", pytrace=False)
        pytest.skip(str(cannot))
