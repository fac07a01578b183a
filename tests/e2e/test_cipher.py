"""AES-256-GCM between Tidegate's own ends: everything passes where both have it, and nothing where only one has."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import pytest

from tidegate.engine import load
from tidegate.lab import checks
from tidegate.lab.blob import blob_sha256
from tidegate.lab.stacks import (
    LISTEN_PORT,
    TidegateClient,
    TidegateGateway,
    tidegate_command,
)
from tidegate.lab.topology import GATEWAY_ACCESS, INTERNET
from tidegate.lab.waiting import wait_until

from .conftest import MakeWorld

pytestmark = pytest.mark.namespaces

MIB = 1 << 20


def cpu_has_aes() -> bool:
    """As the kernel says, not the engine: where it is right, its tests may not be skipped because the engine is not."""
    needed = {"x86_64": {"aes", "pclmulqdq"}, "aarch64": {"aes", "pmull"}}[platform.machine()]
    listed = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return listed is not None and needed <= set(listed[1].split())


def profile_with_aes(gateway: TidegateGateway, profile: Path) -> Path:
    """Registers a peer for the cipher, and writes its profile to `profile`, whose name is the peer's."""
    if not cpu_has_aes():
        pytest.skip("this CPU has no AES instructions")
    assert load().aes_available(), "the engine does not see what the kernel says that the CPU has"
    endpoint = f"{GATEWAY_ACCESS}:{LISTEN_PORT}"
    options = ["--cipher", "aes-256-gcm", "--endpoint", endpoint, "--out", str(profile)]
    gateway.command("peer", "add", profile.stem, *options)
    return profile


def test_data_passes_where_both_ends_have_the_cipher(make_world: MakeWorld) -> None:
    world = make_world()
    host, gateway = world.lab.client, world.tidegate
    client = TidegateClient(host, profile_with_aes(gateway, world.lab.scratch / "fast.conf"))
    client.start()
    transfer = checks.download(host, f"http://{INTERNET}/blob/cipher/{64 * MIB}")
    assert transfer.sha256 == blob_sha256("cipher", 64 * MIB)
    assert checks.ping(host, INTERNET, count=3).complete
    (peer,) = gateway.status()["peers"]
    assert peer["cipher"] == "aes-256-gcm"
    assert peer["sent_bytes"] > 64 * MIB
    assert "bad_authentication" not in gateway.status()["drops"]
    assert "aes-256-gcm" in gateway.command("peer", "list")
    client.stop()
    gateway.stop()


@pytest.mark.waits
def test_nothing_passes_where_only_the_gateway_has_it_and_the_gateway_counts_it(
    make_world: MakeWorld,
) -> None:
    world = make_world()
    gateway, host = world.tidegate, world.lab.client
    profile = profile_with_aes(gateway, world.lab.scratch / "stubborn.conf")
    profile.write_text(
        "".join(line for line in profile.read_text().splitlines(True) if "Tidegate-Cipher" not in line)
    )
    command = [*tidegate_command(), "connect", str(profile), "--json"]
    process = host.popen(command, name="tidegate-connect")
    wait_until(lambda: '"connected"' in process.output(), "the handshake", timeout=10.0)
    assert checks.ping(host, INTERNET, count=3).round_trips == []
    assert _refused(gateway) > 0
    (peer,) = gateway.status()["peers"]
    assert (peer["received_packets"], peer["sent_packets"]) == (0, 0)
    wait_until(lambda: '"silent"' in process.output(), "the client's remark", timeout=30.0)
    process.stop()
    gateway.stop()


def _refused(gateway: TidegateGateway) -> int:
    count: int = gateway.status()["drops"].get("bad_authentication", 0)
    return count
