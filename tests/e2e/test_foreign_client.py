"""Clients that stay long and move: new keys after two minutes, a new source address in the middle of a transfer.

::

    client ─── tunnel ─── gateway ─── internet
    198.51.100.2, later .77            203.0.113.9
"""

from __future__ import annotations

import re
import signal
import subprocess
from socket import AF_INET, SOCK_DGRAM, socket

import pytest

from tidegate.lab import checks, udpecho
from tidegate.lab.blob import blob_sha256
from tidegate.lab.services import start_services
from tidegate.lab.stacks import (
    INNER_GATEWAY,
    LISTEN_PORT,
    TidegateClient,
    TidegateGateway,
    WireguardGoClient,
    WireguardGoGateway,
)
from tidegate.lab.topology import GATEWAY_ACCESS, INTERNET, Lab
from tidegate.lab.waiting import pause, wait_until

from .conftest import ClientKind, MakeWorld

pytestmark = pytest.mark.namespaces

MIB = 1 << 20
REJECT_AFTER_TIME = 180  # WireGuard whitepaper, 6.1: no session is used for longer


@pytest.mark.parametrize("kind", [TidegateClient, WireguardGoClient], ids=["own client", "wireguard-go"])
def test_a_client_may_change_its_source_address_in_the_middle_of_a_download(
    make_world: MakeWorld, kind: ClientKind
) -> None:
    world = make_world()
    if world.reference and kind is TidegateClient:
        pytest.skip("about Tidegate only")
    host = world.lab.client
    client = world.connect(host, kind)
    host.sysctl("net.ipv4.conf.access.promote_secondaries", "1")
    size = 64 * MIB
    # Slow enough to last for some seconds.
    url = f"http://{INTERNET}/blob/roaming/{size}"
    running = subprocess.Popen(
        host.inside(["bash", "-c", f"set -o pipefail; curl -sS --fail --limit-rate 16M {url} | sha256sum"]),
        stdout=subprocess.PIPE,
        text=True,
    )
    pause(1.0)
    host.ip("address add 198.51.100.77/24 dev access")
    host.ip("address delete 198.51.100.2/24 dev access")
    host.ip(f"route replace default via {GATEWAY_ACCESS}")
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 0
    assert output.split()[0] == blob_sha256("roaming", size)
    assert checks.ping(host, INTERNET, count=5).complete
    client.stop()
    world.gateway.stop()


def test_a_device_that_made_its_own_keys_connects_with_its_completed_profile(
    request: pytest.FixtureRequest,
) -> None:
    if request.config.getoption("--reference"):
        pytest.skip("about Tidegate only")
    with Lab() as lab:
        start_services(lab)
        gateway = TidegateGateway(lab)
        gateway.start()
        private = subprocess.check_output(["wg", "genkey"], text=True).strip()
        public = subprocess.check_output(["wg", "pubkey"], input=private, text=True).strip()
        file = lab.scratch / "alice.conf"
        where = ("--endpoint", f"{GATEWAY_ACCESS}:{LISTEN_PORT}", "--out", str(file))
        gateway.command("peer", "add", "alice", "--public-key", public, *where)
        profile = file.read_text()
        assert private not in profile
        file.write_text(re.sub(r"^# PrivateKey = .*", f"PrivateKey = {private}", profile, flags=re.MULTILINE))
        client = WireguardGoClient(lab.client, file)
        client.start()
        assert checks.ping(lab.client, INTERNET, count=5).complete
        client.stop()
        gateway.stop()


@pytest.mark.parametrize("ours", ["client", "gateway"])
def test_wireguard_go_cuts_off_what_small_packets_are_padded_with(
    ours: str, request: pytest.FixtureRequest
) -> None:
    if request.config.getoption("--reference"):
        pytest.skip("about Tidegate only")
    with Lab() as lab:
        start_services(lab)
        gateway = WireguardGoGateway(lab) if ours == "client" else TidegateGateway(lab)
        gateway.start()
        kind = TidegateClient if ours == "client" else WireguardGoClient
        client = kind(lab.client, gateway.add_peer("client"))
        client.start()
        # Neighbours of one turn are padded to the longest of them; how many meet in a turn is up to the scheduler.
        burst = sorted(bytes([number]) * (1 + 37 * number % 130) for number in range(48))
        with lab.client.call(lambda: socket(AF_INET, SOCK_DGRAM)) as echo:
            echo.settimeout(5)
            for _ in range(20):
                for datagram in burst:
                    echo.sendto(datagram, (INTERNET, udpecho.PORT))
                assert sorted(echo.recv(1000) for _ in burst) == burst
        client.stop()
        gateway.stop()


@pytest.mark.waits
@pytest.mark.timeout(400)
def test_wireguard_go_changes_keys_without_losing_a_packet(make_world: MakeWorld) -> None:
    world = make_world()
    host = world.lab.client
    client = WireguardGoClient(host, world.gateway.add_peer("long"))
    client.start()
    first_handshake = client.latest_handshake()
    pings = host.popen(["ping", "-n", "-i", "1", INTERNET])
    pause(REJECT_AFTER_TIME + 10)
    assert client.latest_handshake() > first_handshake, "no new handshake in 190 s"
    pings.stop(signal.SIGINT)
    counted = re.search(r"(\d+) packets transmitted, (\d+) received", pings.output())
    assert counted is not None, pings.output()[-500:]
    sent, received = map(int, counted.groups())
    assert sent > REJECT_AFTER_TIME
    assert received == sent
    assert checks.lookup(host, "www.example", INNER_GATEWAY) == [INTERNET]
    transfer = checks.download(host, f"http://{INTERNET}/blob/rekey/{32 * MIB}")
    assert transfer.sha256 == blob_sha256("rekey", 32 * MIB)
    assert checks.tcp_throughput(host, INTERNET, seconds=1.0) > 0


def test_a_client_that_vanished_without_a_word_can_come_back(make_world: MakeWorld) -> None:
    world = make_world()
    host = world.lab.client
    profile = world.gateway.add_peer("phoenix")
    kind = WireguardGoClient if world.reference else TidegateClient
    first = kind(host, profile)
    first.start()
    first.stop()
    second = kind(host, profile)
    second.start()
    wait_until(lambda: checks.ping(host, INTERNET, count=3).complete, "the second session", timeout=20)
    second.stop()
    world.gateway.stop()
