"""What all tests share: signals as at a terminal, and that tests of namespaces are not skipped where they must run."""

from __future__ import annotations

import os
import signal

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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What mostly waits comes first: where several workers share the tests, one waits while the others work.

    The tests of a file stay with one worker, because they share fixtures (xdist's ``--dist loadgroup``).
    """
    items.sort(key=lambda item: item.get_closest_marker("waits") is None)
    for item in items:
        group = "waits" if item.get_closest_marker("waits") else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("namespaces") is None:
        return
    try:
        require_lab_abilities()
    except LabError as cannot:
        if os.environ.get("CI"):
            pytest.fail(f"CI must run this, but {cannot}", pytrace=False)
        pytest.skip(str(cannot))
