"""The gateway's traffic goes past its host's routing and firewall, and it needs three capabilities of root's.

::

    client ─── tunnel ─── gateway ─── internet ─── beyond
                          nftables: on `external` nothing in or out, nothing forwarded
"""

from __future__ import annotations

import re
import shlex
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tidegate.lab import checks, udpecho
from tidegate.lab.blob import blob_sha256
from tidegate.lab.services import start_services
from tidegate.lab.stacks import INNER_GATEWAY, TidegateClient, TidegateGateway
from tidegate.lab.topology import BEYOND, INTERNET, Lab

from .conftest import MakeWorld, World

pytestmark = pytest.mark.namespaces

MIB = 1 << 20
RULESET = """
table inet strict {
    chain input {
        type filter hook input priority filter;
        iifname external counter drop
    }
    chain forward {
        type filter hook forward priority filter; policy drop;
        counter
    }
    chain output {
        type filter hook output priority filter;
        oifname external counter drop
    }
}
"""
DROPS_WHAT_COMES_IN = """
table inet filter {
    chain input {
        type filter hook input priority filter; policy drop;
        iifname lo accept
        ct state established,related accept
        meta l4proto icmp accept
    }
}
"""
OPERATION = Path(__file__).parents[2] / "docs" / "operation.md"
# As in packaging/tidegate.service, without CAP_BPF, which is optional.
THREE_CAPABILITIES = (
    "setpriv",
    "--bounding-set=-all,+net_admin,+net_raw,+net_bind_service",
    "--no-new-privs",
)


@pytest.fixture(scope="module")
def world(make_world: MakeWorld) -> Iterator[World]:
    def forbid_everything(lab: Lab) -> None:
        lab.gateway.run(["nft", "-f", "/dev/stdin"], stdin=RULESET)

    world = make_world(prepare=forbid_everything)
    world.connect(world.lab.client)
    yield world
    world.gateway.stop()


def test_a_firewall_of_the_host_that_lets_nothing_through_does_not_stop_the_clients(world: World) -> None:
    host = world.lab.client
    assert checks.ping(world.lab.gateway, INTERNET, count=1).round_trips == [], "the firewall is not in force"
    for address in (INTERNET, BEYOND):
        assert checks.ping(host, address, count=5, interval=0.02).complete
    transfer = checks.download(host, f"http://{INTERNET}/blob/firewall/{8 * MIB}")
    assert transfer.sha256 == blob_sha256("firewall", 8 * MIB)

    def echo() -> bytes:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(5)
            client.sendto(b"past the firewall", (BEYOND, udpecho.PORT))
            return client.recv(100)

    assert host.call(echo) == b"past the firewall"
    forwarded = world.lab.gateway.run(["nft", "list", "chain", "inet", "strict", "forward"]).stdout
    assert "counter packets 0 bytes 0" in forwarded, "the host's kernel was given packets to forward"


def test_three_capabilities_and_no_way_to_more_are_enough(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--reference"):
        pytest.skip("about Tidegate only")
    with Lab() as lab:
        start_services(lab)
        gateway = TidegateGateway(lab, under=THREE_CAPABILITIES)
        gateway.start()
        status = Path(f"/proc/{gateway.process.pid}/status").read_text()
        assert re.search(r"^CapEff:\t0*3400$", status, re.MULTILINE), status  # bits 10, 12 and 13
        assert re.search(r"^NoNewPrivs:\t1$", status, re.MULTILINE), status
        client = TidegateClient(lab.client, gateway.add_peer("alice"))
        client.start()
        assert checks.ping(lab.client, INTERNET, count=5, interval=0.02).complete
        assert checks.lookup(lab.client, "www.example", INNER_GATEWAY) == [INTERNET]
        client.stop()
        gateway.stop()
        assert gateway.process.returncode == 0, gateway.process.output()[-2000:]


def test_the_documented_rules_are_what_a_firewall_that_drops_what_comes_in_needs(
    request: pytest.FixtureRequest,
) -> None:
    if request.config.getoption("--reference"):
        pytest.skip("about Tidegate only")
    tunnel, dns = re.findall(r"^# (nft add rule .*)$", OPERATION.read_text(), re.MULTILINE)
    with Lab() as lab:
        start_services(lab)
        lab.gateway.run(["nft", "-f", "/dev/stdin"], stdin=DROPS_WHAT_COMES_IN)
        gateway = TidegateGateway(lab)
        gateway.start()
        client = TidegateClient(lab.client, gateway.add_peer("alice"))
        asking = ["dig", "+short", "+time=1", "+tries=1", f"@{INNER_GATEWAY}", "www.example"]
        lab.gateway.run(shlex.split(tunnel))
        client.start()
        assert checks.ping(lab.client, INTERNET, count=5, interval=0.02).complete
        for transport in ("+notcp", "+tcp"):
            assert lab.client.run([*asking, transport], check=False).returncode == 9, "no answer"
        lab.gateway.run(shlex.split(dns))
        for tcp in (False, True):
            assert checks.lookup(lab.client, "www.example", INNER_GATEWAY, tcp=tcp) == [INTERNET]
        client.stop()
        gateway.stop()
