"""The gateway comes, leaves the host as it was, and goes without a trace; also when it is killed.

::

    client ─── tunnel ─── gateway ─── internet
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tidegate.engine import AccessPolicy, GatewayOptions, load
from tidegate.host.external import external_link
from tidegate.host.netlink import LinuxHost
from tidegate.lab import checks, hoststate
from tidegate.lab.hoststate import HostState
from tidegate.lab.processes import Process
from tidegate.lab.services import start_services
from tidegate.lab.stacks import (
    INNER_GATEWAY,
    LISTEN_PORT,
    TidegateClient,
    TidegateGateway,
    WireguardGoClient,
    tidegate_command,
)
from tidegate.lab.topology import CLIENT, GATEWAY_ACCESS, INTERNET, Lab, Namespace
from tidegate.lab.waiting import pause, wait_until
from tidegate.settings import Settings

from .conftest import Scale

pytestmark = pytest.mark.namespaces

STOP_SECONDS = 2.0


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as built:
        start_services(built)
        yield built


def sockets(host: Namespace) -> list[str]:
    """Every socket of the namespace: TCP, UDP, raw and packet sockets."""
    return host.run(["ss", "-Hanp", "-t", "-u", "-w", "-0"]).stdout.splitlines()


def under_traffic(lab: Lab) -> Process:
    """Traffic in both directions until it is stopped."""
    process = lab.client.popen(["iperf3", "-c", INTERNET, "-t", "60", "--bidir"])
    flowing = ["ss", "-Htn", "state", "established", f"dst {INTERNET}"]
    wait_until(lambda: len(lab.client.run(flowing).stdout.splitlines()) > 2, "traffic to flow")
    return process


def wakings(process: Process) -> int:
    """How often the threads of a process have been woken from a wait (proc_pid_status(5))."""
    statuses = [path.read_text() for path in Path(f"/proc/{process.pid}/task").glob("*/status")]
    return sum(int(count) for text in statuses for count in re.findall(r"^voluntary_\w+:\t(\d+)", text, re.M))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_the_host_reads_the_same_before_during_and_after(lab: Lab, number: signal.Signals) -> None:
    before = HostState.read(lab.gateway)
    gateway = TidegateGateway(lab)
    gateway.start()
    client = TidegateClient(lab.client, gateway.add_peer("alice"))
    client.start()
    under_traffic(lab)
    own = hoststate.tun_devices(lab.gateway)
    assert len(own) == 1
    during = hoststate.compare(before, HostState.read(lab.gateway), own)
    assert during.differences == []
    assert set(during.set_apart) == {"routes", "sysctls", "NIC features", "links", "addresses"}

    taken = gateway.process.stop(number, grace=10.0)
    # 128 + SIGINT is what shells expect of a program that Ctrl-C has ended.
    expected = {0} if number is signal.SIGTERM else {0, 130}
    assert gateway.process.returncode in expected, gateway.process.output()[-2000:]
    assert taken < STOP_SECONDS
    assert lab.gateway.pids() == set()
    assert sockets(lab.gateway) == []
    assert hoststate.compare(before, HostState.read(lab.gateway), set()).differences == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
def test_the_client_leaves_its_own_host_as_it_was(lab: Lab, number: signal.Signals) -> None:
    gateway = TidegateGateway(lab)
    gateway.start()
    profile = gateway.add_peer("alice")
    lab.client.resolve_with("203.0.113.9")
    before = HostState.read(lab.client)
    resolver = lab.client.run(["cat", "/etc/resolv.conf"]).stdout
    client = TidegateClient(lab.client, profile, set_resolver=False)
    client.start()
    assert hoststate.tun_devices(lab.client)
    taken = client.process.stop(number, grace=10.0)
    assert client.process.returncode == 0, client.process.output()[-2000:]
    assert taken < STOP_SECONDS
    assert lab.client.pids() == set()
    assert hoststate.compare(before, HostState.read(lab.client), set()).differences == []
    assert lab.client.run(["cat", "/etc/resolv.conf"]).stdout == resolver


@pytest.mark.waits
def test_after_sigkill_the_tun_device_is_gone_the_next_start_works_and_the_client_returns_by_itself(
    lab: Lab,
) -> None:
    gateway = TidegateGateway(lab)
    gateway.start()
    client = TidegateClient(lab.client, gateway.add_peer("alice"))
    client.start()
    assert hoststate.tun_devices(lab.gateway) != set()
    gateway.process.stop(signal.SIGKILL)
    assert gateway.process.returncode == -signal.SIGKILL
    wait_until(lambda: hoststate.tun_devices(lab.gateway) == set(), "the kernel to remove the TUN device")
    again = TidegateGateway(lab, state=gateway.state)
    again.start()
    # A client notices that nobody answers after 15 s (KEEPALIVE_TIMEOUT + REKEY_TIMEOUT) and shakes hands again.
    wait_until(
        lambda: checks.ping(lab.client, INTERNET, count=2).complete, "the client to return", timeout=60
    )
    assert again.status()["peers"], "the peers were forgotten"
    again.stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
@pytest.mark.parametrize("kind", [TidegateClient, WireguardGoClient], ids=["own client", "wireguard-go"])
def test_after_a_restart_the_gateway_calls_the_client_that_was_connected(
    lab: Lab, kind: type[TidegateClient] | type[WireguardGoClient], number: signal.Signals
) -> None:
    gateway = TidegateGateway(lab)
    gateway.start()
    client = kind(lab.client, gateway.add_peer("alice"))
    client.start()
    where = f"name=alice endpoint={CLIENT}:"
    wait_until(lambda: f'"peer connected" {where}' in gateway.process.output(), "the log to say so")
    pause(1.0)  # it is written down right after
    gateway.process.stop(number)
    again = TidegateGateway(lab, state=gateway.state)
    again.start()
    # The client says nothing, and would notice at its next rekey; at the earliest it would begin anew after 15 s.
    wait_until(lambda: f'"peer connected" {where}' in again.process.output(), "the client", timeout=10.0)
    inner = again.status()["peers"][0]["address"]
    assert checks.ping(lab.gateway, inner, count=2).complete
    assert checks.ping(lab.client, INTERNET, count=2).complete
    client.stop()
    again.stop()


def test_a_client_that_is_refused_is_in_the_log_with_the_reason(lab: Lab) -> None:
    gateway = TidegateGateway(lab)
    gateway.start()
    profile = gateway.add_peer("alice")
    gateway.command("peer", "remove", "alice")
    client = lab.client.popen([*tidegate_command(), "connect", str(profile)])
    refused = rf'"handshake refused" detail="unknown_peer from {CLIENT}:\d+: '
    wait_until(lambda: re.search(refused, gateway.process.output()), "the log to say so", timeout=10.0)
    client.stop()
    gateway.stop()


def test_a_client_that_was_killed_does_not_stand_in_the_way_of_the_next(lab: Lab) -> None:
    gateway = TidegateGateway(lab)
    gateway.start()
    profile = gateway.add_peer("alice")
    first = TidegateClient(lab.client, profile)
    first.start()
    first.process.stop(signal.SIGKILL)
    second = TidegateClient(lab.client, profile)
    second.start()
    assert checks.ping(lab.client, INTERNET, count=5).complete
    second.stop()
    gateway.stop()


@pytest.mark.waits
def test_a_client_finds_its_gateway_again_when_its_name_means_another_address(lab: Lab) -> None:
    """As with dynamic DNS. The tunnel takes everything, what its client asks its resolver included: so it is asked
    past the tunnel."""
    name, moved, resolver = "gateway.example", "198.51.100.77", "198.18.0.53"

    def name_server(address: str) -> Process:
        options = [
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--no-resolv",
            "--no-hosts",
            "--pid-file=",
        ]
        options += ["--bind-interfaces", f"--listen-address={resolver}", f"--address=/{name}/{address}"]
        return lab.gateway.popen(["dnsmasq", *options])

    lab.gateway.ip(f"address add {resolver}/32 dev lo")
    names = name_server(GATEWAY_ACCESS)
    lab.client.resolve_with(resolver)
    gateway = TidegateGateway(lab)
    gateway.start()
    profile = gateway.add_peer("alice")
    profile.write_text(profile.read_text().replace(GATEWAY_ACCESS, name))
    client = TidegateClient(lab.client, profile, set_resolver=False)
    client.start()
    # Where nothing stands before the client, the gateway would call it from the new address, and be heard.
    for line in (
        "add table ip firewall",
        "add chain ip firewall in { type filter hook input priority filter ; }",
        "add rule ip firewall in iifname access ct state new drop",
    ):
        lab.client.run(["nft", line])
    gateway.stop()
    lab.gateway.sysctl("net.ipv4.conf.access.promote_secondaries", "1")
    lab.gateway.ip(f"address add {moved}/24 dev access")
    lab.gateway.ip(f"address delete {GATEWAY_ACCESS}/24 dev access")
    lab.client.ip(f"route replace default via {moved}")
    names.stop()
    name_server(moved)
    again = TidegateGateway(lab, state=gateway.state)
    again.start()
    # 15 s until the client notices that nobody answers, 15 s and some until it looks the name up, 10 s without an
    # answer.
    wait_until(
        lambda: checks.ping(lab.client, INTERNET, count=2).complete, "the client to return", timeout=90
    )
    assert re.search(rf"trying another address.*now={moved}", client.process.output())
    client.stop()
    again.stop()


def test_a_second_gateway_on_the_same_state_is_refused_and_disturbs_nobody(lab: Lab) -> None:
    gateway = TidegateGateway(lab)
    gateway.start()
    client = TidegateClient(lab.client, gateway.add_peer("alice"))
    client.start()
    second = lab.gateway.run(
        [*tidegate_command(), "serve", "--state-dir", str(gateway.state), "--listen", "0.0.0.0:51999"],
        check=False,
    )
    assert second.returncode == 1
    assert "Traceback" not in second.stderr
    assert str(gateway.state) in second.stderr
    assert checks.ping(lab.client, INTERNET, count=5).complete
    gateway.stop()


def test_every_counter_is_there_before_its_first_event(lab: Lab) -> None:
    gateway = TidegateGateway(lab)
    gateway.start()
    shown = gateway.command("status", "--prometheus").splitlines()
    for never_yet in ('dropped_packets_total{reason="queue_delay"}', 'dns_events_total{event="servfail"}'):
        assert f"tidegate_{never_yet} 0" in shown
    gateway.stop()


def test_a_peer_that_is_removed_is_cut_off_at_once_and_others_are_not(lab: Lab) -> None:
    gateway = TidegateGateway(lab)
    gateway.start()
    client = TidegateClient(lab.client, gateway.add_peer("alice"))
    client.start()
    gateway.add_peer("bob")
    gateway.command("peer", "remove", "bob")
    assert checks.ping(lab.client, INTERNET, count=5).complete
    gateway.command("peer", "remove", "alice")
    assert checks.ping(lab.client, INTERNET, count=3).round_trips == []
    gateway.stop()


def test_a_client_whose_device_was_down_for_a_moment_routes_through_it_again(lab: Lab) -> None:
    gateway = TidegateGateway(lab)
    gateway.start()
    client = TidegateClient(lab.client, gateway.add_peer("alice"))
    client.start()

    def way() -> str:
        return lab.client.run(["ip", "route", "get", INTERNET]).stdout

    lab.client.ip("link set tidegate-client down")
    wait_until(lambda: "is down" in client.process.output(), "the client to notice")
    lab.client.ip("link set tidegate-client up")
    wait_until(lambda: "dev tidegate-client" in way(), "the way through the tunnel to come back")
    assert checks.ping(lab.client, INTERNET, count=5).complete
    client.stop()
    gateway.stop()


@pytest.mark.parametrize("taken", ["address flush dev tidegate0", "link set tidegate0 down"])
def test_a_gateway_whose_tun_device_lost_its_address_or_was_set_down_gets_it_back(
    lab: Lab, taken: str
) -> None:
    """As a network manager may do that takes the device for its own."""
    gateway = TidegateGateway(lab)
    gateway.start()
    client = TidegateClient(lab.client, gateway.add_peer("alice"))
    client.start()
    for _ in range(2):
        lab.gateway.ip(taken)
        wait_until(
            lambda: checks.ping(lab.client, INNER_GATEWAY, count=1).complete, "the gateway to answer again"
        )
        assert checks.lookup(lab.client, "www.example", INNER_GATEWAY) == [INTERNET]
        assert checks.ping(lab.client, INTERNET, count=5).complete
    assert gateway.process.output().count("TUN device has lost its address or was set down") == 1
    client.stop()
    gateway.stop()


def test_whose_tun_device_is_deleted_says_so_and_ends(lab: Lab) -> None:
    gateway = TidegateGateway(lab)
    gateway.start()
    client = TidegateClient(lab.client, gateway.add_peer("alice"))
    client.start()
    for host, process, device in (
        (lab.client, client.process, "tidegate-client"),
        (lab.gateway, gateway.process, "tidegate0"),
    ):
        host.ip(f"link delete {device}")
        assert process.wait(10) == 1
        assert f"the TUN device {device} was deleted" in process.output()
        assert "Traceback" not in process.output()
    assert not lab.client.run(["ip", "rule"]).stdout.count("29798"), "and takes its routes back"


@pytest.mark.timeout(180)
@pytest.mark.alone
def test_an_idle_gateway_uses_no_cpu_with_peers_connected(lab: Lab, scale: Scale) -> None:
    gateway = TidegateGateway(lab)
    gateway.start()
    client = TidegateClient(lab.client, gateway.add_peer("alice"))
    client.start()
    checks.download(lab.client, f"http://{INTERNET}/blob/idle/1000000")  # mappings exist, timers are set
    pause(3.0)  # what follows a transfer (delayed ACKs, FIN, keepalive) is no idling
    before = gateway.process.cpu_seconds(), client.process.cpu_seconds()
    woken = wakings(gateway.process), wakings(client.process)
    pause(scale.idle_seconds)
    woken = wakings(gateway.process) - woken[0], wakings(client.process) - woken[1]
    after = gateway.process.cpu_seconds(), client.process.cpu_seconds()
    used = [round(until - since, 2) for since, until in zip(before, after, strict=True)]  # whole ticks
    one_tick = 0.01
    assert used[0] <= one_tick, f"the gateway used {used[0]:.2f} s of {scale.idle_seconds:g} s"
    assert used[1] <= one_tick, f"the client used {used[1]:.2f} s of {scale.idle_seconds:g} s"
    # No device is read, no timer looks around: what is left is a keepalive, and a mapping that expires.
    print(f"woken {woken[0]} and {woken[1]} times in {scale.idle_seconds:g} s")
    assert max(woken) < scale.idle_seconds, f"gateway and client were woken {woken} times"
    gateway.stop()


def test_an_engine_that_was_stopped_takes_no_more_peers(lab: Lab) -> None:
    """A command may still be under way when its gateway goes."""
    settings = Settings()

    def outlive_it() -> None:
        engine = load().gateway(
            GatewayOptions(
                private_key=bytes(range(32)),
                listen=("0.0.0.0", LISTEN_PORT),
                subnet="10.66.77.0/24",
                gateway_address="10.66.77.1",
                tun_name="tidegate0",
                tunnel_mtu=1420,
                external=external_link(LinuxHost().read_network(), settings.external),
                host_addresses=(),
                access=AccessPolicy(),
                nat=settings.nat,
                kept_ports=None,
                offloads=settings.offloads,
                shards=2,
            )
        )
        for number in (2, 3):  # one on each shard
            engine.set_peer(bytes([number]) * 32, f"10.66.77.{number}")
        engine.stop()
        with pytest.raises(RuntimeError, match="the engine was stopped"):
            engine.set_peer(bytes([4]) * 32, "10.66.77.4")

    lab.gateway.call(outlive_it)


def test_the_port_that_clients_connect_to_is_the_one_that_was_asked_for(lab: Lab) -> None:
    gateway = TidegateGateway(lab)
    gateway.start()
    listening = lab.gateway.run(["ss", "-Huln", f"sport = :{LISTEN_PORT}"]).stdout
    assert f"0.0.0.0:{LISTEN_PORT}" in listening
    gateway.stop()
