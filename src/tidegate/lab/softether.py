"""SoftEther with SecureNAT, for comparison: the other gateway that does routing and NAT in user space.

Server and client keep everything in /var/lib, /var/log and /run. Each gets its own folder of the lab's scratch
directory mounted there instead, in the mount namespace that ``ip netns exec`` makes, so that nothing is left on the
machine. Both are set up through `vpncmd`. The client's virtual Ethernet card (``vpn_lab``) gets its address by hand
rather than by DHCP.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from tidegate.lab.processes import CommandError, Process
from tidegate.lab.stacks import INNER_GATEWAY
from tidegate.lab.topology import GATEWAY_ACCESS, Lab, Namespace
from tidegate.lab.waiting import wait_until

_SERVER_PORT = 5555  # SoftEther's
_CLIENT_CONTROL_PORT = 9931  # of Debian's vpnclient
_NAME = "lab"  # of hub, account and card
_USER, _PASSWORD = "client", "tide"

# $0: the folder; the rest: the command. Each place is hidden behind a tmpfs, and the folder put in.
_ENCLOSE = """
set -e
for place in /var/lib /var/log /run; do
    mkdir -p "$0$place"
    mount -t tmpfs tmpfs "$place"
    mkdir "$place/softether"
    mount --bind "$0$place" "$place/softether"
done
exec "$@"
"""

_SERVER_SETUP = f"""
HubCreate {_NAME} /PASSWORD:none
Hub {_NAME}
UserCreate {_USER} /GROUP:none /REALNAME:none /NOTE:none
UserPasswordSet {_USER} /PASSWORD:{_PASSWORD}
SecureNatHostSet /MAC:none /IP:{INNER_GATEWAY} /MASK:255.255.255.0
NatSet /MTU:1500 /TCPTIMEOUT:3600 /UDPTIMEOUT:60 /LOG:no
LogDisable packet
LogDisable security
SecureNatEnable
"""
_CLIENT_SETUP = f"""
NicCreate {_NAME}
AccountCreate {_NAME} /SERVER:{GATEWAY_ACCESS}:{_SERVER_PORT} /HUB:{_NAME} /USERNAME:{_USER} /NICNAME:{_NAME}
AccountPasswordSet {_NAME} /PASSWORD:{_PASSWORD} /TYPE:standard
AccountConnect {_NAME}
"""


class SoftEtherGateway:
    """SoftEther's server: switch, router and NAT in one process."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._addresses = itertools.count(2)
        self.process: Process

    def start(self) -> None:
        gateway = self._lab.gateway
        self.process = _start(gateway, "vpnserver", self._lab.scratch / "softether-server", _SERVER_PORT)
        commands = self._lab.scratch / "softether-server" / "setup"
        commands.write_text(_SERVER_SETUP.lstrip())
        _set_up(gateway, [f"localhost:{_SERVER_PORT}", "/SERVER"], commands)

    def stop(self) -> None:
        self.process.stop()

    def add_peer(self, name: str) -> Path:
        """A folder for the client, with its address; all clients share user and password."""
        folder = self._lab.scratch / f"softether-{name}"
        folder.mkdir()
        (folder / "address").write_text(f"10.66.77.{next(self._addresses)}/24")
        return folder


class SoftEtherClient:
    """SoftEther's client; its namespace then sends everything through the card that it makes."""

    def __init__(self, host: Namespace, folder: Path) -> None:
        self._host = host
        self._folder = folder
        self.process: Process

    def start(self) -> None:
        self.process = _start(self._host, "vpnclient", self._folder, _CLIENT_CONTROL_PORT)
        commands = self._folder / "setup"
        commands.write_text(_CLIENT_SETUP.lstrip())
        _set_up(self._host, ["localhost", "/CLIENT"], commands)
        card = f"vpn_{_NAME}"
        wait_until(lambda: card in self._host.interfaces(), f"the interface {card}")
        self._host.ip(f"link set {card} up")
        self._host.ip(f"address add {(self._folder / 'address').read_text()} dev {card}")
        self._host.ip(f"route replace default via {INNER_GATEWAY} dev {card}")
        ping = ["ping", "-n", "-c", "1", "-W", "0.5", INNER_GATEWAY]
        wait_until(
            lambda: self._host.run(ping, check=False).returncode == 0,
            f"{INNER_GATEWAY} to answer through {self.process.name}",
            timeout=20.0,
        )

    def stop(self) -> None:
        self.process.stop()


def _start(host: Namespace, program: str, folder: Path, port: int) -> Process:
    """Starts one of SoftEther's daemons in the foreground and returns once its control port listens."""
    process = host.popen(["sh", "-c", _ENCLOSE, str(folder), program, "execsvc"], name=program)

    def listens() -> bool:
        if not process.running:
            raise CommandError(process.command, process.returncode or 0, process.output())
        return host.run(["ss", "-Htln", f"sport = :{port}"]).stdout.strip() != ""

    wait_until(listens, f"{program} to listen on port {port}", timeout=20.0)
    return process


def _set_up(host: Namespace, whom: list[str], commands: Path) -> None:
    """Has `vpncmd` carry out the commands in a file; it ends with an error at the first that fails."""
    host.run(["vpncmd", *whom, f"/IN:{commands}"])
