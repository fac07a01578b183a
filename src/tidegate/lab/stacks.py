"""Gateways and clients for the lab: Tidegate's, and those that it works with or is compared with.

Each gateway runs in the lab's `gateway` namespace, each client in a client's. The others need what Tidegate does
without: `ip_forward` and a masquerade rule, set only in the lab's own namespace.
"""

from __future__ import annotations

import configparser
import contextlib
import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tidegate.control.client import ControlClient
from tidegate.control.commands import AnswerT, Command, StatusQuery
from tidegate.errors import ControlError, PrivilegeError
from tidegate.lab.processes import CommandError, Process, run
from tidegate.lab.services import start_dns_server
from tidegate.lab.topology import GATEWAY_ACCESS, Lab, Namespace
from tidegate.lab.waiting import wait_until
from tidegate.settings import OffloadSettings

INNER_GATEWAY = "10.66.77.1"
LISTEN_PORT = 51820
REPOSITORY = Path(__file__).parents[3]
"""The repository that the lab runs from: ``scripts/bootstrap --bench`` builds there what only the benchmark needs."""
_FWMARK = 51820  # as wg-quick's

WIREGUARD_GO = ("wireguard-go", "-f")
# By default boringtun gives up root before it has made its control socket.
BORINGTUN = (str(REPOSITORY / "target/tools/bin/boringtun-cli"), "--foreground", "--disable-drop-privileges")

WITHOUT_OFFLOADS = "\n[offloads]\n" + "".join(f"{name} = false\n" for name in OffloadSettings.model_fields)
"""Settings of a gateway that moves one packet per system call; `TidegateClient` has a parameter for it."""

_serial = itertools.count()


class Gateway(Protocol):
    """A VPN gateway in the lab."""

    process: Process

    def start(self) -> None:
        """Starts it, and returns once it accepts clients."""

    def stop(self) -> None: ...

    def add_peer(self, name: str) -> Path:
        """Registers a client and returns its profile, in wg-quick's format."""


class Client(Protocol):
    """A VPN client in the lab; its namespace then sends everything through the tunnel."""

    process: Process

    def start(self) -> None:
        """Starts it, and returns once packets pass."""

    def stop(self) -> None: ...


def tidegate_command() -> list[str]:
    """The installed command, beside the Python that runs this."""
    command = Path(sys.executable).with_name("tidegate")
    if not command.exists():
        raise CommandError([str(command)], 127, "not built yet: run `make build`")
    return [str(command)]


class TidegateGateway:
    """The real thing: ``tidegate serve``."""

    def __init__(
        self,
        lab: Lab,
        *,
        config: str | None = None,
        state: Path | None = None,
        cipher: str | None = None,
        address: str = INNER_GATEWAY,
        listen: str = "0.0.0.0",
        open_files: int | None = None,
        under: Sequence[str] = (),
    ) -> None:
        self._lab = lab
        self._under = under  # a command that starts the gateway, such as setpriv with its options
        self._listen = listen  # the address
        self._address = address  # inside the tunnel, as it follows from `config`
        self._open_files = open_files  # the hard limit; None: that of this process
        self._config = config
        self._cipher = cipher  # of the peers; None: WireGuard's
        self.state = state or lab.scratch / f"state-{next(_serial)}"
        self.settings_file = lab.scratch / f"settings-{next(_serial)}.toml"
        self.process: Process

    def start(self) -> None:
        command = [*tidegate_command(), "serve", "--state-dir", str(self.state)]
        command += ["--listen", f"{self._listen}:{LISTEN_PORT}", "--external", "external"]
        if self._config is not None:
            self.settings_file.write_text(self._config)
            command += ["--config", str(self.settings_file)]
        if self._open_files is not None:
            command = ["prlimit", f"--nofile={self._open_files}:{self._open_files}", *command]
        self.process = self._lab.gateway.popen([*self._under, *command], name="tidegate-serve")

        def serving() -> bool:
            if not self.process.running:
                raise CommandError(command, self.process.returncode or 0, self.process.output())
            transport = self._lab.gateway.run(["ss", "-Hulna", f"sport = :{LISTEN_PORT}"]).stdout
            dns = self._lab.gateway.run(["ss", "-Htln", f"src {self._address}:53"]).stdout
            return bool(transport.strip() and dns.strip())

        wait_until(serving, "the gateway to serve", timeout=20.0, interval=0.05)
        wait_until(self._answers, "the gateway to answer commands", timeout=10.0, interval=0.05)

    def stop(self) -> None:
        self.process.stop()

    def add_peer(self, name: str) -> Path:
        profile = self._lab.scratch / f"{name}.conf"
        endpoint = f"{GATEWAY_ACCESS}:{LISTEN_PORT}"
        cipher = [] if self._cipher is None else ["--cipher", self._cipher]
        self.command("peer", "add", name, "--endpoint", endpoint, "--out", str(profile), *cipher)
        return profile

    def status(self) -> dict[str, Any]:
        """What ``tidegate status --json`` says."""
        return self.ask(StatusQuery()).model_dump(mode="json")

    def ask(self, command: Command[AnswerT]) -> AnswerT:
        """Asks over the control socket as the command line does, which alone takes a second to start. Raises
        `CommandError`, as `command` does."""
        try:
            with contextlib.closing(ControlClient.connect(self.state)) as control:
                return control.execute(command)
        except (ControlError, PrivilegeError) as cause:
            asked: str = command.model_dump()["command"]
            raise CommandError(["tidegate", *asked.split(".")], cause.exit_code, str(cause)) from cause

    def command(self, *arguments: str) -> str:
        """Runs ``tidegate …`` on the gateway host, about this gateway, and returns what it prints."""
        command = [*tidegate_command(), *arguments, "--state-dir", str(self.state)]
        return self._lab.gateway.run(command).stdout

    def _answers(self) -> bool:
        with contextlib.suppress(CommandError):
            self.status()
            return True
        return False


class WireguardGoGateway:
    """wireguard-go, with dnsmasq for DNS; the gateway's kernel does routing and NAT.

    `program` can be another user-space WireGuard with the same control socket; likewise in `WireguardGoClient`.
    """

    def __init__(self, lab: Lab, *, program: Sequence[str] = WIREGUARD_GO) -> None:
        self._lab = lab
        self._program = program
        self._interface = _wireguard_interface()
        self._keys = _Keys.make()
        self._addresses = itertools.count(2)
        self.process: Process

    def start(self) -> None:
        gateway = self._lab.gateway
        self.process = start_wireguard(gateway, self._program, self._interface)
        settings = f"[Interface]\nPrivateKey = {self._keys.private}\nListenPort = {LISTEN_PORT}\n"
        gateway.run(["wg", "setconf", self._interface, "/dev/stdin"], stdin=settings)
        gateway.ip(f"address add {INNER_GATEWAY}/24 dev {self._interface}")
        gateway.ip(f"link set {self._interface} mtu 1420 up")
        let_kernel_forward(gateway)
        self._dns = start_dns_server(gateway, INNER_GATEWAY)

    def stop(self) -> None:
        self._dns.stop()
        self.process.stop()

    def add_peer(self, name: str) -> Path:
        keys, address = _Keys.make(), f"10.66.77.{next(self._addresses)}"
        self._lab.gateway.run(
            ["wg", "set", self._interface, "peer", keys.public, "allowed-ips", f"{address}/32"]
        )
        profile = self._lab.scratch / f"{name}.conf"
        profile.write_text(
            f"[Interface]\nPrivateKey = {keys.private}\nAddress = {address}/32\nDNS = {INNER_GATEWAY}\nMTU = 1420\n\n"
            f"[Peer]\nPublicKey = {self._keys.public}\nAllowedIPs = 0.0.0.0/0\n"
            f"Endpoint = {GATEWAY_ACCESS}:{LISTEN_PORT}\n"
        )
        return profile


class KernelGateway:
    """No VPN at all: the gateway's kernel forwards and masquerades. The upper limit for any gateway here."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab

    def start(self) -> None:
        let_kernel_forward(self._lab.gateway)


class TidegateClient:
    """The real thing: ``tidegate connect PROFILE``."""

    def __init__(
        self, host: Namespace, profile: Path, *, set_resolver: bool = True, offloads: bool = True
    ) -> None:
        self._host = host
        self._profile = profile
        self._set_resolver = set_resolver
        self._offloads = offloads
        self.process: Process

    def start(self) -> None:
        if self._set_resolver:
            self._host.resolve_with(INNER_GATEWAY)
        command = [*tidegate_command(), "connect", str(self._profile)]
        if not self._offloads:
            command.append("--no-offloads")
        self.process = self._host.popen(command, name="tidegate-connect")
        wait_for_gateway(self._host, self.process)

    def stop(self) -> None:
        self.process.stop()


class WireguardGoClient:
    """Somebody else's client: Debian's wireguard-go, set up with `wg` and `ip` as wg-quick does it."""

    def __init__(self, host: Namespace, profile: Path, *, program: Sequence[str] = WIREGUARD_GO) -> None:
        self._host = host
        self._program = program
        self._profile = read_profile(profile)
        self.interface = _wireguard_interface()
        self.process: Process

    def start(self) -> None:
        interface, peer = self._profile["Interface"], self._profile["Peer"]
        self._host.resolve_with(interface["DNS"])
        self.process = start_wireguard(self._host, self._program, self.interface)
        settings = f"[Interface]\nPrivateKey = {interface['PrivateKey']}\nFwMark = {_FWMARK}\n\n[Peer]\n"
        settings += "".join(f"{key} = {value}\n" for key, value in peer.items())
        self._host.run(["wg", "setconf", self.interface, "/dev/stdin"], stdin=settings)
        self._host.ip(f"address add {interface['Address']} dev {self.interface}")
        self._host.ip(f"link set {self.interface} mtu {interface.get('MTU', '1420')} up")
        self._host.sysctl("net.ipv4.conf.all.src_valid_mark", "1")
        self._host.ip(f"route add default dev {self.interface} table {_FWMARK}")
        self._host.ip(f"rule add not fwmark {_FWMARK} table {_FWMARK}")
        self._host.ip("rule add table main suppress_prefixlength 0")
        wait_for_gateway(self._host, self.process)

    def stop(self) -> None:
        # The routes go with the interface, the rules do not.
        self.process.stop()
        self._host.ip("rule delete table main suppress_prefixlength 0")
        self._host.ip(f"rule delete not fwmark {_FWMARK} table {_FWMARK}")

    def latest_handshake(self) -> int:
        """When the last handshake was completed, in seconds since 1970; 0: never."""
        return int(self._host.run(["wg", "show", self.interface, "latest-handshakes"]).stdout.split()[1])


def read_profile(path: Path) -> Mapping[str, Mapping[str, str]]:
    """Reads a profile with one peer in wg-quick's format: section, key, value."""
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # keys keep their case
    parser.read_string(path.read_text())
    return {section: dict(parser[section]) for section in parser.sections()}


def start_wireguard(host: Namespace, program: Sequence[str], interface: str) -> Process:
    """Starts a user-space WireGuard in the foreground and returns once `wg` can talk to it."""
    name = Path(program[0]).name
    process = host.popen(
        [*program, interface], name=name, env={"LOG_LEVEL": "error", "WG_LOG_LEVEL": "error"}
    )
    control = Path(f"/run/wireguard/{interface}.sock")

    def ready() -> bool:
        if not process.running:
            raise CommandError(process.command, process.returncode or 0, process.output())
        return control.exists()

    wait_until(ready, f"{name} ({interface})")
    return process


def let_kernel_forward(gateway: Namespace) -> None:
    """Makes the kernel of the gateway namespace route and masquerade."""
    gateway.sysctl("net.ipv4.ip_forward", "1")
    for line in (
        "add table ip lab",
        "add chain ip lab post { type nat hook postrouting priority srcnat ; }",
        "add rule ip lab post oifname external masquerade",
    ):
        gateway.run(["nft", line])


def wait_for_gateway(client: Namespace, process: Process, *, timeout: float = 15.0) -> None:
    """Waits until the inner address of the gateway answers a ping of the client, through the tunnel.

    Without a tunnel the ping would be answered as well: the gateway's kernel accepts its own addresses on any
    interface.
    """

    def answers() -> bool:
        if not process.running:
            raise CommandError(process.command, process.returncode or 0, process.output())
        if "dev access" in client.run(["ip", "-o", "route", "get", INNER_GATEWAY]).stdout:
            return False
        ping = client.run(["ping", "-n", "-c", "1", "-W", "0.5", INNER_GATEWAY], check=False)
        return ping.returncode == 0

    wait_until(answers, f"{INNER_GATEWAY} to answer through {process.name}", timeout=timeout)


@dataclass(frozen=True)
class _Keys:
    private: str
    public: str

    @classmethod
    def make(cls) -> _Keys:
        private = run(["wg", "genkey"]).stdout.strip()
        return cls(private, run(["wg", "pubkey"], stdin=private).stdout.strip())


def _wireguard_interface() -> str:
    """A name that is unique on the machine, because the control socket in /run/wireguard is named after it."""
    return f"wg{os.getpid()}x{next(_serial)}"
