"""A shard that hangs takes its own clients with it, and nobody else: `status` names it, and the gateway still ends.

::

    client  ─── tunnel ─── shard 0 ─┐
    client2 ─── tunnel ─── shard 1 ─┴─ internet
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from tidegate.control.commands import PublicationView, PublishAdd, PublishList
from tidegate.lab import checks
from tidegate.lab.hoststate import tun_devices
from tidegate.lab.services import start_services
from tidegate.lab.stacks import INNER_GATEWAY, TidegateClient, TidegateGateway, tidegate_command
from tidegate.lab.topology import GATEWAY_ACCESS, GATEWAY_EXTERNAL, INTERNET, Lab
from tidegate.lab.waiting import wait_until

from .lab.halt import halted

pytestmark = [pytest.mark.namespaces, pytest.mark.alone]

OTHER_FACE = "203.0.113.77"
ANSWER_SECONDS = 5.0
"""The engine waits 2 s for a shard; the rest is for a command to start on a busy machine."""
END_SECONDS = 10.0
"""The engine waits 5 s for a shard to end."""


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(clients=2) as built:
        start_services(built)
        yield built


@pytest.fixture
def gateway(lab: Lab) -> TidegateGateway:
    gateway = TidegateGateway(lab, config="[gateway]\nshards = 2\n")
    gateway.start()
    for client in lab.clients:  # the first lives on shard 0, the second on shard 1
        TidegateClient(client, gateway.add_peer(client.role)).start()
    return gateway


def reached(lab: Lab, number: int) -> bool:
    return checks.ping(lab.clients[number], INTERNET, count=2).complete


def test_a_hung_shard_is_reported_and_the_others_go_on(lab: Lab, gateway: TidegateGateway) -> None:
    assert reached(lab, 0) and reached(lab, 1)
    status = [*tidegate_command(), "status", "--state-dir", str(gateway.state)]
    with halted(lab.gateway, gateway.process, "shard-1"):
        assert not reached(lab, 1)
        assert reached(lab, 0)
        assert checks.lookup(lab.clients[0], "www.example", INNER_GATEWAY) == [INTERNET]

        asked = time.monotonic()
        answer = lab.gateway.run(status, check=False)
        assert time.monotonic() - asked < ANSWER_SECONDS
        assert answer.returncode == 1
        assert "shard 1 did not answer" in answer.stderr and "restart" in answer.stderr
        assert "Traceback" not in gateway.process.output()

        gateway.command("peer", "add", "carol", "--endpoint", f"{GATEWAY_ACCESS}:51820")
        gateway.command("peer", "remove", "carol")
        assert reached(lab, 0)
    wait_until(lambda: reached(lab, 1), "the shard to go on", timeout=10.0)
    lab.gateway.run(status)


def test_ports_that_move_to_another_address_wait_for_a_hung_shard_once_and_not_each(
    lab: Lab, gateway: TidegateGateway
) -> None:
    first, count = 9000, 30
    gateway.ask(
        PublishAdd(
            protocol="tcp",
            first_port=first,
            last_port=first + count - 1,
            peer=lab.clients[0].role,
            internal_port=first,
        )
    )

    def published() -> PublicationView:
        (view,) = gateway.ask(PublishList()).publications
        return view

    with halted(lab.gateway, gateway.process, "shard-1"):
        lab.gateway.sysctl("net.ipv4.conf.external.promote_secondaries", "1")
        lab.gateway.ip(f"address add {OTHER_FACE}/24 dev external")
        lab.gateway.ip(f"address delete {GATEWAY_EXTERNAL}/24 dev external")
        lab.gateway.ip(f"route replace default via {INTERNET}")
        wait_until(lambda: "publication failed" in gateway.process.output(), "the first port to fail")
        asked = time.monotonic()
        told = published()
        assert time.monotonic() - asked < ANSWER_SECONDS
        assert told.detail == f"tcp/{first} on {OTHER_FACE}: shard 1 did not answer within 2s"
    wait_until(lambda: reached(lab, 1), "the shard to go on", timeout=10.0)
    lab.gateway.ip(f"address add {GATEWAY_EXTERNAL}/24 dev external")  # any change of the link
    wait_until(lambda: published().state == "active", "all ports to be published")


def test_a_gateway_ends_although_a_shard_does_not(lab: Lab, gateway: TidegateGateway) -> None:
    with halted(lab.gateway, gateway.process, "shard-1"):
        taken = gateway.process.stop(signal.SIGTERM, grace=END_SECONDS)
    assert taken < END_SECONDS
    assert gateway.process.returncode == 1
    assert "shard-1 did not end" in gateway.process.output()
    assert "Traceback" not in gateway.process.output()
    assert not tun_devices(lab.gateway)
