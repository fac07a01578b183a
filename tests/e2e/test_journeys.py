"""A client reaches the internet through the gateway: our own client, and one that is not ours.

::

    client ─── tunnel ─── gateway ─── internet ─── beyond
    198.51.100.2          10.66.77.1   203.0.113.9   192.0.2.9
                          203.0.113.1  (servers)     (web and echo server)
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from scapy.layers.inet import ICMP, IP

from tidegate.lab import checks, udpecho
from tidegate.lab.blob import blob, blob_sha256
from tidegate.lab.stacks import INNER_GATEWAY, Client, TidegateClient, WireguardGoClient
from tidegate.lab.topology import BEYOND, GATEWAY_EXTERNAL, INTERNET, INTERNET_BEYOND, Lab

from .conftest import ClientKind, MakeWorld, Scale, World

pytestmark = pytest.mark.namespaces

MIB = 1 << 20
TIMESTAMP, TIMESTAMP_REPLY = 13, 14  # RFC 792


@dataclass
class Journey:
    world: World
    client: Client

    @property
    def lab(self) -> Lab:
        return self.world.lab

    def drops(self) -> dict[str, int]:
        """What Tidegate has dropped, by reason; of another gateway nothing is known. Segments that come after their
        connection has ended, such as those of the test before, are left out."""
        if self.world.reference:
            return {}
        counted: dict[str, int] = self.world.tidegate.status()["drops"]
        return {reason: count for reason, count in counted.items() if reason != "tcp_out_of_state"}


@pytest.fixture(
    scope="module", params=[TidegateClient, WireguardGoClient], ids=["own client", "wireguard-go"]
)
def journey(request: pytest.FixtureRequest, make_world: MakeWorld) -> Iterator[Journey]:
    kind: ClientKind = request.param
    world = make_world()
    if world.reference and kind is TidegateClient:
        pytest.skip("about Tidegate only")
    client = world.connect(world.lab.client, kind)
    yield Journey(world, client)
    client.stop()
    world.gateway.stop()


def test_the_gateway_and_the_internet_answer_pings(journey: Journey) -> None:
    for address in (INNER_GATEWAY, INTERNET, BEYOND, GATEWAY_EXTERNAL):
        result = checks.ping(journey.lab.client, address, count=20, interval=0.02)
        assert result.complete, f"{address}: {result}"


def test_the_internet_answers_timestamp_queries(journey: Journey) -> None:
    identifiers = set(range(1_000, 1_016))  # so many that every shard gets some

    def answered() -> set[int]:
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as client:
            client.settimeout(5)
            for identifier in identifiers:
                client.sendto(bytes(ICMP(type=TIMESTAMP, id=identifier, seq=1)), (INTERNET, 0))
            seen: set[int] = set()
            with contextlib.suppress(TimeoutError):
                while seen != identifiers:
                    answer = IP(client.recv(200))
                    if answer[ICMP].type == TIMESTAMP_REPLY and answer.src == INTERNET:
                        seen.add(answer[ICMP].id)
            return seen

    assert journey.lab.client.call(answered) == identifiers


def test_names_are_resolved_over_udp_and_tcp(journey: Journey) -> None:
    for tcp in (False, True):
        assert checks.lookup(journey.lab.client, "www.example", INNER_GATEWAY, tcp=tcp) == [INTERNET]


def test_programs_of_the_client_resolve_names_without_further_ado(journey: Journey) -> None:
    page = journey.lab.client.run(["curl", "-sS", "--fail", "--max-time", "10", "http://far.example/"])
    assert page.stdout.startswith("Hello")


def test_traceroute_shows_the_gateway_and_what_lies_beyond(journey: Journey) -> None:
    for method in ("-I", "-U", "-T"):
        hops = checks.traceroute(journey.lab.client, BEYOND, method=method)
        assert hops == [INNER_GATEWAY, INTERNET, BEYOND], f"traceroute {method}"


def test_the_internet_sees_the_address_of_the_gateway(journey: Journey) -> None:
    answer = journey.lab.client.run(["curl", "-sS", "--fail", f"http://{INTERNET}/whoami"])
    assert json.loads(answer.stdout)["address"] == GATEWAY_EXTERNAL


@pytest.mark.timeout(600)
def test_a_large_transfer_is_intact_each_way(journey: Journey, scale: Scale) -> None:
    size = scale.transfer_bytes
    down = checks.download(journey.lab.client, f"http://{INTERNET}/blob/down/{size}", timeout=280)
    assert (down.size, down.sha256) == (size, blob_sha256("down", size))
    file = journey.lab.scratch / "up"
    checks.write_blob(file, "up", size)
    up = checks.upload(journey.lab.client, f"http://{INTERNET}/upload", file, timeout=280)
    file.unlink()
    assert (up.size, up.sha256) == (size, blob_sha256("up", size))


def test_a_hundred_parallel_downloads_are_intact(journey: Journey) -> None:
    folder = journey.lab.scratch / "parallel"
    folder.mkdir(exist_ok=True)
    command = ["curl", "-sS", "--fail", "--parallel", "--parallel-immediate", "--parallel-max", "100"]
    for n in range(100):
        command += [f"http://{INTERNET}/blob/parallel-{n}/{MIB}", "-o", str(folder / str(n))]
    journey.lab.client.run(command, timeout=110)
    damaged = [
        n for n in range(100) if (folder / str(n)).read_bytes() != b"".join(blob(f"parallel-{n}", MIB))
    ]
    assert damaged == []


def test_iperf3_runs_in_both_directions_at_once(journey: Journey) -> None:
    report = checks.iperf(journey.lab.client, INTERNET, "--bidir", seconds=2.0, flows=2)
    assert report["end"]["sum_received"]["bytes"] > 8 * MIB
    assert report["end"]["sum_received_bidir_reverse"]["bytes"] > 8 * MIB


def test_udp_arrives_at_a_moderate_rate_without_loss(journey: Journey) -> None:
    before = journey.drops()
    # The receiver gets a buffer in which a pause of its own process does not look like a loss on the way.
    options = ["-u", "-b", "20M", "-l", "1300", "-w", "4M"]
    report = checks.iperf(journey.lab.client, INTERNET, *options, seconds=2.0)
    assert report["end"]["sum"]["packets"] > 3000
    assert report["end"]["sum"]["lost_percent"] < 0.1
    assert journey.drops() == before


def test_datagrams_of_every_size_up_to_fragments_of_64_kib_come_back(journey: Journey) -> None:
    with journey.lab.client.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as client:
        client.connect((INTERNET, udpecho.PORT))
        # Around the limits of the tunnel (1420 - 28) and of the link (1500 - 28), 8 KiB, and the largest there is.
        for size in (0, 1, 1391, 1392, 1393, 1471, 1472, 1473, 2000, 8192, 20_000, 65_507):
            sent = b"".join(blob(f"datagram-{size}", size))
            # The answer of 1,393 to 1,472 bytes fits the far link but not the tunnel: the first one is lost, and
            # the frag-needed that tells the server so lets the next one through (RFC 1191).
            for attempt in range(3):
                client.settimeout(1 if (size, attempt) == (1393, 0) else 5)
                client.send(sent)
                try:
                    received = client.recv(65_535)
                    break
                except TimeoutError:
                    assert 1392 < size <= 1472, f"{size} bytes: no answer"
                    assert attempt < 2, f"{size} bytes: the server never learned the MTU of the path"
            assert received == sent, f"{size} bytes"


def test_a_packet_that_is_too_big_for_a_later_hop_is_reported_to_the_client(make_world: MakeWorld) -> None:
    world = make_world(beyond_mtu=1280)
    world.connect(world.lab.client)
    answer = world.lab.client.run(["ping", "-n", "-c", "2", "-M", "do", "-s", "1300", BEYOND], check=False)
    assert f"From {INTERNET}" in answer.stdout, answer.stdout
    assert "mtu = 1280" in answer.stdout, answer.stdout
    assert INTERNET_BEYOND not in answer.stdout
    size = 8 * MIB
    down = checks.download(world.lab.client, f"http://{BEYOND}/blob/narrow/{size}", timeout=60)
    assert down.sha256 == blob_sha256("narrow", size)
    file = world.lab.scratch / "narrow"
    checks.write_blob(file, "narrow", size)
    up = checks.upload(world.lab.client, f"http://{BEYOND}/upload", file, timeout=60)
    assert up.sha256 == blob_sha256("narrow", size)


def test_a_packet_too_big_for_the_tunnel_is_refused_with_the_mtu(journey: Journey) -> None:
    answer = journey.lab.client.run(
        ["ping", "-n", "-c", "1", "-W", "2", "-M", "do", "-s", "1472", INTERNET], check=False
    )
    assert answer.returncode != 0
    assert "mtu=1420" in answer.stderr + answer.stdout or "mtu = 1420" in answer.stdout, answer
