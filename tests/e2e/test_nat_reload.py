"""Settings of the NAT that change under mappings that are in use.

::

    client ─── tunnel ─── gateway (two shards) ─── internet 203.0.113.9 (UDP echo)
"""

from __future__ import annotations

import json
import signal
import socket

import pytest

from tidegate.lab import udpecho
from tidegate.lab.processes import CommandError
from tidegate.lab.topology import GATEWAY_EXTERNAL, INTERNET, Lab
from tidegate.lab.waiting import wait_until

from .conftest import MakeWorld

pytestmark = pytest.mark.namespaces

BEFORE, AFTER, LAST = range(40_000, 40_100), range(41_000, 41_100), range(42_000, 42_100)


def settings(ports: range, more: str = "") -> str:
    return f"[gateway]\nshards = 2\n[nat]\nport_range = [{ports[0]}, {ports[-1]}]\n{more}"


def flow(lab: Lab) -> socket.socket:
    """A client's socket that talks to the echo server."""
    made = lab.client.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    made.settimeout(3)
    made.connect((INTERNET, udpecho.PORT))
    return made


def port_of(flow: socket.socket) -> int | None:
    """The external port from which the flow's datagrams come; None if they get lost."""
    flow.send(udpecho.WHOAMI)
    try:
        return int(flow.recv(100).rpartition(b":")[2])
    except TimeoutError:  # as where the first ports of a new range are still being reserved
        return None


def ports_of_the_host(lab: Lab, ports: range) -> set[int]:
    """Those of the ports that a program on the gateway's host can bind now."""

    def bind() -> set[int]:
        free = set()
        for port in ports:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as program:
                try:
                    program.bind((GATEWAY_EXTERNAL, port))
                except OSError:
                    continue  # the NAT has it
                free.add(port)
        return free

    return lab.gateway.call(bind)


def test_another_port_range_holds_for_new_mappings_and_leaves_those_alone_that_there_are(
    make_world: MakeWorld,
) -> None:
    world = make_world(config=settings(BEFORE))
    lab, gateway = world.lab, world.tidegate
    world.connect(lab.client)
    offloads = gateway.settings_file.read_text().removeprefix(settings(BEFORE))  # as --offloads-off has them
    with flow(lab) as old, flow(lab) as new, flow(lab) as last:
        kept = port_of(old)
        assert kept is not None and kept in BEFORE
        assert ports_of_the_host(lab, BEFORE) == set(), "a range as small as this is reserved whole"

        gateway.settings_file.write_text(settings(AFTER, 'filtering = "none"\n') + offloads)
        with pytest.raises(CommandError, match=r"settings-\d+.toml:5: nat.filtering"):
            gateway.command("reload")
        assert port_of(old) == kept

        fewer_shards = settings(AFTER).replace("shards = 2", "shards = 1")
        gateway.settings_file.write_text(fewer_shards + offloads)
        answer = json.loads(gateway.command("reload", "--json"))
        assert (answer["applied"], answer["needs_restart"]) == (["nat.port_range"], ["gateway.shards"])
        assert port_of(old) == kept, "what was mapped stays mapped"
        wait_until(lambda: port_of(new) in AFTER, "a mapping from the new range")
        everything_else = set(BEFORE) - {kept}
        wait_until(
            lambda: ports_of_the_host(lab, BEFORE) == everything_else, "the host to have its ports again"
        )

        gateway.settings_file.write_text(settings(LAST) + offloads)
        gateway.process.send_signal(signal.SIGHUP)
        wait_until(lambda: gateway.process.output().count("settings reloaded") == 2, "the second reload")
        wait_until(lambda: port_of(last) in LAST, "a mapping from the last range")
        assert port_of(old) == kept
    gateway.stop()


def test_a_part_of_the_ports_that_the_host_draws_from_is_left_to_it_unless_a_range_is_set(
    make_world: MakeWorld,
) -> None:
    unset, left = "[gateway]\nshards = 2\n", range(50_000, 60_000)

    def reserved() -> set[int]:
        listed = lab.gateway.run(["ss", "-Hltun", "src", GATEWAY_EXTERNAL]).stdout
        return {int(line.split()[4].rpartition(":")[2]) for line in listed.splitlines()}

    def reload(config: str) -> None:
        gateway.settings_file.write_text(config + offloads)
        assert json.loads(gateway.command("reload", "--json"))["applied"] == ["nat.port_range"]

    def few_ports(lab: Lab) -> None:
        lab.gateway.sysctl("net.ipv4.ip_local_port_range", "20000 59999")

    world = make_world(config=unset, prepare=few_ports)
    lab, gateway = world.lab, world.tidegate
    world.connect(lab.client)
    offloads = gateway.settings_file.read_text().removeprefix(unset)  # as --offloads-off has them
    with flow(lab) as first, flow(lab) as second:
        assert port_of(first) is not None
        assert len(reserved()) > 1_000
        assert reserved() & set(left) == set()

        reload(settings(left))
        wait_until(lambda: port_of(second) in left, "a port that is the gateway's by its settings")
        port = port_of(second)

        reload(unset)
        wait_until(lambda: reserved() & set(left) == {port}, "the host to have its ports again")
        assert port_of(second) == port, "what was mapped stays mapped"
    gateway.stop()
