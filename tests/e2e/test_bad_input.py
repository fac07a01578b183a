"""Bad input gives one clear message that says what and where, the right exit code, and nothing half-done.

::

    gateway (no tunnel yet) ─── internet
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tidegate.lab import hoststate
from tidegate.lab.processes import run
from tidegate.lab.stacks import tidegate_command
from tidegate.lab.topology import GATEWAY_ACCESS, Lab, Namespace

from .conftest import AS_NOBODY

pytestmark = pytest.mark.namespaces

USAGE, FAILURE = 2, 1  # exit codes: settings and command line; run time
MESSAGE_LINES = 6


@pytest.fixture(scope="module")
def host() -> Iterator[Namespace]:
    with Lab() as lab:
        yield lab.gateway


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """Asserts a clear refusal: exit code, a short message with `words` in it, no traceback."""
    said = done.stderr
    assert done.returncode == code, f"{done.returncode}: {said}{done.stdout}"
    assert "Traceback" not in said
    assert 0 < len(said.strip().splitlines()) <= MESSAGE_LINES, said
    folded = " ".join(said.split())
    for word in words:
        assert word in folded, f"{word!r} is not in: {said}"


def serve(host: Namespace, state: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Tries to serve, which must end by itself at once."""
    command = [*tidegate_command(), "serve", "--state-dir", str(state), *flags]
    return run(host.inside(command), check=False, timeout=15)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[gateway]\nlissen = "0.0.0.0:1"\n', ["settings.toml:2", "lissen", "listen"]),
        ("[gatewya]\n", ["settings.toml:1", "gatewya", "gateway"]),
        ('[gateway]\n\nshards = "two"\n', ["settings.toml:3", "shards"]),
        ("[nat]\nudp_timeout = true\n", ["settings.toml:2", "udp_timeout"]),
        ('[gateway]\nsubnet = "203.0.113.0/24"\n', ["203.0.113.0/24"]),
        ('[gateway]\nsubnet = "10.66.77.0/31"\n', ["settings.toml:2", "10.66.77.0/31"]),
        ('[gateway]\nsubnet = "10.66.77.1/24"\n', ["settings.toml:2", "10.66.77.1/24"]),
        ('[gateway]\nsubnet = "300.66.77.0/24"\n', ["settings.toml:2", "300.66.77.0/24"]),
        ('[gateway]\nlisten = "0.0.0.0:70000"\n', ["settings.toml:2", "70000"]),
        ("[nat]\nport_range = [5000, 4000]\n", ["settings.toml:2", "port_range"]),
        (
            '[external]\ninterface = "a-name-that-is-far-too-long"\n',
            ["settings.toml:2", "a-name-that-is-far-too-long"],
        ),
        ("[gateway\n", ["settings.toml:1", "TOML"]),
        ("\xff", ["settings.toml"]),
    ],
)
def test_a_wrong_settings_file_is_refused_with_its_line(
    host: Namespace, state: Path, tmp_path: Path, text: str, words: list[str]
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(text, encoding="latin-1")
    refused(serve(host, state, "--config", str(file)), USAGE, *words)
    assert not state.exists(), "the state directory was made although nothing could start"
    assert hoststate.tun_devices(host) == set()


def test_a_missing_settings_file_is_named(host: Namespace, state: Path) -> None:
    refused(serve(host, state, "--config", "/nonexistent/tidegate.toml"), USAGE, "/nonexistent/tidegate.toml")


def test_a_missing_interface_is_named_with_those_that_exist(host: Namespace, state: Path) -> None:
    refused(serve(host, state, "--external", "nope0"), FAILURE, "nope0", "external")
    assert hoststate.tun_devices(host) == set()


def test_a_port_in_use_is_named(host: Namespace, state: Path) -> None:
    def hold() -> socket.socket:
        holder = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        holder.bind(("0.0.0.0", 51820))
        return holder

    with host.call(hold):
        refused(serve(host, state), FAILURE, "51820")
    assert hoststate.tun_devices(host) == set()


def test_without_privileges_the_message_says_which_are_needed(host: Namespace, tmp_path: Path) -> None:
    command = [*AS_NOBODY, *tidegate_command(), "serve", "--state-dir", str(tmp_path / "state")]
    done = run(host.inside(command), check=False, timeout=15)
    refused(done, FAILURE)
    assert "root" in done.stderr or "CAP_NET_ADMIN" in done.stderr


def test_a_damaged_database_is_named_and_left_alone(host: Namespace, state: Path) -> None:
    host.run(
        [
            *tidegate_command(),
            "peer",
            "add",
            "alice",
            "--state-dir",
            str(state),
            "--endpoint",
            "192.0.2.1:51820",
        ]
    )
    databases = [file for file in state.iterdir() if file.read_bytes().startswith(b"SQLite format 3")]
    assert len(databases) == 1
    damaged = b"this was a database once" * 400
    databases[0].write_bytes(damaged)
    refused(serve(host, state), FAILURE, databases[0].name)
    assert databases[0].read_bytes() == damaged
    assert hoststate.tun_devices(host) == set()


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("profile")
    command = [
        *tidegate_command(),
        "peer",
        "add",
        "alice",
        "--state-dir",
        str(folder),
        "--endpoint",
        "192.0.2.1:51820",
    ]
    return run(command).stdout


def connect(host: Namespace, file: Path) -> subprocess.CompletedProcess[str]:
    return run(host.inside([*tidegate_command(), "connect", str(file)]), check=False, timeout=15)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("PrivateKey", "tooshort", ["PrivateKey"]),
        ("PublicKey", "!" * 44, ["PublicKey"]),
        ("Address", "10.66.77.300/24", ["Address", "10.66.77.300"]),
        ("Endpoint", "198.51.100.1", ["Endpoint"]),
        ("AllowedIPs", "everything", ["AllowedIPs", "everything"]),
        ("MTU", "-5", ["MTU"]),
    ],
)
def test_a_profile_with_a_broken_line_is_refused_with_that_line(
    host: Namespace, tmp_path: Path, profile: str, key: str, value: str, words: list[str]
) -> None:
    lines = [f"{key} = {value}" if line.startswith(f"{key} ") else line for line in profile.splitlines()]
    number = next(n for n, line in enumerate(lines, start=1) if line == f"{key} = {value}")
    file = tmp_path / "broken.conf"
    file.write_text("\n".join(lines) + "\n")
    refused(connect(host, file), USAGE, f"broken.conf:{number}", *words)
    assert hoststate.tun_devices(host) == set()


def test_a_profile_that_is_none_is_refused(host: Namespace, tmp_path: Path) -> None:
    file = tmp_path / "letter.txt"
    file.write_text("Dear Alice,\n")
    refused(connect(host, file), USAGE, "letter.txt:1")
    refused(connect(host, tmp_path / "missing.conf"), USAGE, "missing.conf")


def test_a_peer_cannot_be_added_twice_nor_without_a_proper_name(host: Namespace, state: Path) -> None:
    def add(name: str) -> subprocess.CompletedProcess[str]:
        command = [*tidegate_command(), "peer", "add", name, "--state-dir", str(state)]
        return run(host.inside([*command, "--endpoint", f"{GATEWAY_ACCESS}:51820"]), check=False)

    assert add("alice").returncode == 0
    refused(add("alice"), FAILURE, "alice")
    refused(add("no/slashes or blanks"), USAGE)


def test_a_peer_that_does_not_exist_cannot_be_removed(host: Namespace, state: Path) -> None:
    host.run(
        [
            *tidegate_command(),
            "peer",
            "add",
            "alice",
            "--state-dir",
            str(state),
            "--endpoint",
            "192.0.2.1:51820",
        ]
    )
    command = [*tidegate_command(), "peer", "remove", "mallory", "--state-dir", str(state)]
    refused(run(host.inside(command), check=False), FAILURE, "mallory")


def test_status_without_a_gateway_says_so(host: Namespace, state: Path) -> None:
    command = [*tidegate_command(), "status", "--state-dir", str(state)]
    refused(run(host.inside(command), check=False), FAILURE, str(state))


def test_a_command_that_does_not_exist_is_a_usage_error(host: Namespace) -> None:
    done = run(host.inside([*tidegate_command(), "swerve"]), check=False)
    assert done.returncode == USAGE
    assert "swerve" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_profile_written_to_a_file_is_for_its_owner_only(
    host: Namespace, state: Path, tmp_path: Path
) -> None:
    out = tmp_path / "alice.conf"

    def add(name: str) -> subprocess.CompletedProcess[str]:
        command = [*tidegate_command(), "peer", "add", name, "--state-dir", str(state), "--out", str(out)]
        return run(host.inside([*command, "--endpoint", f"{GATEWAY_ACCESS}:51820"]), check=False)

    assert add("alice").returncode == 0
    assert out.stat().st_mode & 0o777 == 0o600
    alices = out.read_text()
    refused(add("bob"), USAGE, str(out), "--force")
    assert out.read_text() == alices, "an existing file was overwritten with somebody else's secrets"
    listed = host.run([*tidegate_command(), "peer", "list", "--state-dir", str(state)]).stdout
    assert "alice" in listed and "bob" not in listed
