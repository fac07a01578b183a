"""Many clients over four external addresses: ports for all of them, and the memory that they take.

::

    WireGuard clients in one process ─── gateway 203.0.113.1 to .4 ─── internet 203.0.113.9

Each TCP or UDP port of the NAT is an open file of the gateway, so its pools (one for each address, protocol and shard)
share what the process may have: each grows while others do, and none may find that the others have taken all.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tidegate.lab import crowd
from tidegate.lab.stacks import REPOSITORY

pytestmark = pytest.mark.namespaces

MOST_MIB = 200


@pytest.fixture(scope="module")
def command(request: pytest.FixtureRequest) -> Path:
    if request.config.getoption("--reference"):
        pytest.skip("about Tidegate only")
    # `cargo test` has built it already.
    build = ["cargo", "build", "--quiet", "--locked", "-p", "tidegate-engine", "--example", "crowd"]
    subprocess.run(build, cwd=REPOSITORY, check=True)
    return REPOSITORY / "target/debug/examples/crowd"


@pytest.mark.timeout(180)
def test_a_hundred_thousand_mappings_are_all_answered_and_take_little_memory(command: Path) -> None:
    # 10,000 of them are UDP ports, of at most 20,000 open files.
    assert crowd.resident_mib(100, 100_000, command=command) < MOST_MIB


@pytest.mark.timeout(180)
def test_with_few_open_files_clients_of_every_shard_and_address_have_ports(command: Path) -> None:
    # 16 pools of TCP ports and as many of UDP ports share 768. Each of 40 clients asks for one UDP port.
    crowd.resident_mib(40, 400, command=command, shards=4, open_files=1_024)
