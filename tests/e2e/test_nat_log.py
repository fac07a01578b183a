"""The log of mappings, as an operator reads it who is asked whose packet came from which port, and when.

::

    client (alice) ─── tunnel ─── gateway ─── internet 203.0.113.9 (UDP echo)
"""

from __future__ import annotations

import re
import socket
from datetime import UTC, datetime, timedelta

import pytest

from tidegate.lab import udpecho
from tidegate.lab.topology import INTERNET
from tidegate.lab.waiting import wait_until

from .conftest import MakeWorld

pytestmark = pytest.mark.namespaces

CONFIG = "[nat]\nlog_mappings = true\nudp_timeout = 2\n"


def test_the_log_says_which_client_had_a_port_from_when_to_when_and_names_no_destination(
    make_world: MakeWorld,
) -> None:
    world = make_world(config=CONFIG)
    lab, gateway = world.lab, world.tidegate
    world.connect(lab.client, name="alice")
    began = datetime.now(UTC)
    with lab.client.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as flow:
        flow.settimeout(5)
        flow.connect((INTERNET, udpecho.PORT))
        for _ in range(20):
            flow.send(udpecho.WHOAMI)
            seen = flow.recv(100).decode()
        inside = "{}:{}".format(*flow.getsockname())

    def lines(event: str) -> list[str]:
        log = gateway.process.output().splitlines()
        return [line for line in log if f'event="mapping {event}"' in line and f"external={seen}" in line]

    wait_until(lambda: lines("ended"), "the end of the mapping", timeout=10)
    (created,), (ended,) = lines("created"), lines("ended")
    for line in (created, ended):
        assert "peer=alice" in line and f"internal={inside}" in line and "protocol=udp" in line
        assert INTERNET not in line, "RFC 6888 REQ-12"
    at = [datetime.fromisoformat(re.findall(r" at=(\S+)", line)[0]) for line in (created, ended)]
    assert began - timedelta(seconds=0.1) <= at[0] < at[1] <= datetime.now(UTC)
    seconds = float(re.findall(r"seconds=(\S+)", ended)[0])
    assert abs((at[1] - at[0]).total_seconds() - seconds) < 0.01
    assert "[nat] udp_timeout is 2 s, but RFC 4787 REQ-5 requires at least 120 s" in gateway.process.output()
    gateway.stop()
