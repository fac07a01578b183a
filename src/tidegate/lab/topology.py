"""The network namespaces of the lab, and their clean-up.

With one client::

    client                     gateway                      internet                     beyond
    198.51.100.2/24 --------- 198.51.100.1/24
      access           access  203.0.113.1/24 ------------ 203.0.113.9/24
                                 external         external   192.0.2.1/24 ------------ 192.0.2.9/24
                                                               beyond          beyond

The gateway's default route leads to `internet`, a host with services that is also the router to `beyond`. With more
clients (client, client2, …: 198.51.100.2, .3, …) a bridge in a namespace of its own, `switch`, replaces the cable
between client and gateway. Only the gateway has a route back to the clients.

Namespaces are named ``tg<pid>-<serial>-<role>``, after the process that owns them: so concurrent runs do not collide,
and the next run finds and removes what a killed one left behind. No interface ever appears in the caller's namespace.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from tidegate.errors import TidegateError
from tidegate.lab.processes import CommandError, Process, run, which
from tidegate.lab.waiting import WaitTimeoutError, wait_until

GATEWAY_ACCESS = "198.51.100.1"
CLIENT = "198.51.100.2"
GATEWAY_EXTERNAL = "203.0.113.1"  # TEST-NET-3, RFC 5737
INTERNET = "203.0.113.9"
INTERNET_BEYOND = "192.0.2.1"  # TEST-NET-1, RFC 5737
BEYOND = "192.0.2.9"

MAX_CLIENTS = 100

_T = TypeVar("_T")
_CLONE_NEWNET = 0x40000000  # linux/sched.h
_NETNS = Path("/run/netns")
_ETC_NETNS = Path("/etc/netns")
_OWNED = re.compile(r"tg(?P<pid>\d+)-\d+-[a-z0-9]+")
_serial = itertools.count()


class LabError(TidegateError):
    """The lab cannot be built here; the message says why, and what to do."""


class Namespace:
    """One network namespace, which represents one host."""

    def __init__(self, name: str, role: str, logs: Path) -> None:
        self.name = name
        self.role = role
        self._logs = logs
        self._processes: list[Process] = []
        self._log_serial = itertools.count(1)

    def create(self) -> None:
        _ip("netns", "add", self.name)
        self.ip("link set lo up")
        # Duplicate address detection and router solicitations would change routes while the lab is being watched.
        self.sysctl("net.ipv6.conf.default.accept_dad", "0")
        self.sysctl("net.ipv6.conf.default.router_solicitations", "0")

    def destroy(self) -> None:
        """Ends the namespace's processes, newest first, and removes it. Never raises: it runs in clean-up."""
        for process in reversed(self._processes):
            process.stop()
        self._processes.clear()
        _end_processes_of(self.name)  # and what they have forked, as SoftEther's watchdog does
        _remove_namespace(self.name)

    def ip(self, arguments: str) -> None:
        """Runs ``ip`` on this namespace."""
        _ip("-n", self.name, *arguments.split())

    def sysctl(self, key: str, value: str) -> None:
        self.run(["sysctl", "-qw", f"{key}={value}"])

    def resolve_with(self, *nameservers: str) -> None:
        """Gives the namespace a resolv.conf of its own (``ip netns exec`` mounts it over the host's)."""
        folder = _ETC_NETNS / self.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "resolv.conf").write_text("".join(f"nameserver {server}\n" for server in nameservers))

    def inside(self, command: Sequence[str]) -> list[str]:
        """`command`, prefixed so that it runs in this namespace."""
        return ["ip", "netns", "exec", self.name, *command]

    def run(
        self,
        command: Sequence[str],
        *,
        timeout: float = 30.0,
        check: bool = True,
        stdin: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command in the namespace to its end; see `processes.run`."""
        return run(self.inside(command), timeout=timeout, check=check, stdin=stdin, env=env)

    def popen(
        self, command: Sequence[str], *, name: str | None = None, env: Mapping[str, str] | None = None
    ) -> Process:
        """Starts a process in the namespace. It ends with the lab at the latest."""
        name = name or Path(command[0]).name
        log = self._logs / f"{self.role}-{next(self._log_serial)}-{name}.log"
        process = Process(f"{name} ({self.role})", self.inside(command), log, env)
        self._processes.append(process)
        return process

    def call(self, function: Callable[[], _T]) -> _T:
        """Calls `function` in a thread that is in the namespace; sockets that it opens stay in the namespace."""

        def enter() -> None:
            with (_NETNS / self.name).open("rb") as namespace:
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET) != 0:
                    error = ctypes.get_errno()
                    raise OSError(error, f"setns to {self.name}: {os.strerror(error)}")

        with ThreadPoolExecutor(1, initializer=enter) as thread:
            return thread.submit(function).result()

    @contextlib.contextmanager
    def capture(self, interface: str, expression: str = "", *, snaplen: int = 1600) -> Iterator[Capture]:
        """Records the packets of an interface while the context lasts; read them afterwards."""
        serial = next(self._log_serial)
        pcap = self._logs / f"{self.role}-{serial}-{interface}.pcap"
        command = [
            "tcpdump",
            "-i",
            interface,
            "-n",
            "-U",
            "--immediate-mode",
            "-B",
            "65536",
            "-s",
            str(snaplen),
            "-Z",
            "root",
        ]
        process = self.popen([*command, "-w", str(pcap), *expression.split()], name="tcpdump")
        process.wait_for("listening on")
        recording = Capture(pcap, process)
        try:
            yield recording
        finally:
            recording.finish()

    def interfaces(self) -> set[str]:
        """The names of the namespace's interfaces."""
        listed = _ip("-n", self.name, "-o", "link", "show").stdout
        return {line.split(": ")[1].partition("@")[0] for line in listed.splitlines()}

    def pids(self) -> set[int]:
        """Every process that runs in the namespace."""
        return {int(pid) for pid in _ip("netns", "pids", self.name).stdout.split()}


class Capture:
    """Packets recorded by tcpdump."""

    def __init__(self, pcap: Path, process: Process) -> None:
        self.pcap = pcap
        self._process = process

    def finish(self) -> None:
        """Ends the recording; everything up to now is in the file."""
        self._process.stop(signal.SIGINT)

    @property
    def lost(self) -> int:
        """Packets that the kernel could not hand to tcpdump (known once finished)."""
        found = re.search(r"(\d+) packets? dropped by kernel", self._process.output())
        return int(found[1]) if found else 0

    def lines(self, expression: str = "", *, verbose: bool = False) -> list[str]:
        """The recorded packets that match, one text line each (several with `verbose`, which checks checksums)."""
        detail = ["-vv"] if verbose else []
        command = ["tcpdump", "-n", "-tt", *detail, "-r", str(self.pcap), *expression.split()]
        return run(command, timeout=120).stdout.splitlines()


class Lab:
    """The namespaces, as a context manager: leaving it, however, ends every process and removes every trace."""

    def __init__(self, *, clients: int = 1, beyond_mtu: int = 1500) -> None:
        if not 1 <= clients <= MAX_CLIENTS:
            raise ValueError(f"a lab has 1 to {MAX_CLIENTS} clients, not {clients}")
        self._prefix = f"tg{os.getpid()}-{next(_serial)}"
        self._beyond_mtu = beyond_mtu
        self._stack = contextlib.ExitStack()
        self.scratch = Path(tempfile.mkdtemp(prefix=f"{self._prefix}-"))
        self.logs = self.scratch / "logs"
        self.logs.mkdir()
        self.gateway = self._namespace("gateway")
        self.internet = self._namespace("internet")
        self.beyond = self._namespace("beyond")
        self.clients = [self._namespace("client" if n == 1 else f"client{n}") for n in range(1, clients + 1)]
        self._switch = self._namespace("switch") if clients > 1 else None

    @property
    def client(self) -> Namespace:
        """The first client."""
        return self.clients[0]

    @staticmethod
    def client_address(number: int) -> str:
        """The address of a client on the access network; `number` counts from 0."""
        return f"198.51.100.{2 + number}"

    def __enter__(self) -> Self:
        try:
            self._stack.callback(shutil.rmtree, self.scratch, ignore_errors=True)
            require_lab_abilities()
            remove_leftovers()
            for namespace in self._namespaces():
                self._stack.callback(namespace.destroy)
                namespace.create()
            self._connect()
        except BaseException:
            self._take_down()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._take_down()

    def _take_down(self) -> None:
        # Neither a second Ctrl-C nor closing the terminal after the first must stop the clean-up half-way.
        with _interrupts_held_back():
            self._stack.close()

    def _namespace(self, role: str) -> Namespace:
        return Namespace(f"{self._prefix}-{role}", role, self.logs)

    def _namespaces(self) -> list[Namespace]:
        switch = [self._switch] if self._switch else []
        return [self.gateway, self.internet, self.beyond, *self.clients, *switch]

    def _connect(self) -> None:
        if self._switch is None:
            _cable(self.client, "access", self.gateway, "access")
        else:
            self._switch.ip("link add bridge type bridge")
            self._switch.ip("link set bridge up")
            for number, host in enumerate([self.gateway, *self.clients]):
                _cable(host, "access", self._switch, f"port{number}")
                self._switch.ip(f"link set port{number} master bridge")
        _cable(self.gateway, "external", self.internet, "external")
        _cable(self.internet, "beyond", self.beyond, "beyond", mtu=self._beyond_mtu)

        self.gateway.ip(f"address add {GATEWAY_ACCESS}/24 dev access")
        self.gateway.ip(f"address add {GATEWAY_EXTERNAL}/24 dev external")
        self.internet.ip(f"address add {INTERNET}/24 dev external")
        self.internet.ip(f"address add {INTERNET_BEYOND}/24 dev beyond")
        self.beyond.ip(f"address add {BEYOND}/24 dev beyond")
        self.gateway.ip(f"route add default via {INTERNET}")
        self.beyond.ip(f"route add default via {INTERNET_BEYOND}")
        for number, client in enumerate(self.clients):
            client.ip(f"address add {self.client_address(number)}/24 dev access")
            client.ip(f"route add default via {GATEWAY_ACCESS}")
        # A new namespace may inherit the machine's setting; only `internet` is a router here.
        for host in [self.gateway, self.beyond, *self.clients]:
            host.sysctl("net.ipv4.ip_forward", "0")
        self.internet.sysctl("net.ipv4.ip_forward", "1")
        self.gateway.resolve_with(INTERNET)


def require_lab_abilities() -> None:
    """Raises `LabError`, with what to do about it, if a lab cannot be built here."""
    if os.geteuid() != 0:
        raise LabError("network namespaces need root", hint="run it with sudo")
    if not Path("/dev/net/tun").exists():
        raise LabError(
            "/dev/net/tun is missing", hint="load the module with `modprobe tun`, or pass the device in"
        )
    tools = (
        "ip",
        "sysctl",
        "tcpdump",
        "ping",
        "curl",
        "dig",
        "traceroute",
        "iperf3",
        "dnsmasq",
        "ethtool",
        "nft",
    )
    if missing := [tool for tool in tools if which(tool) is None]:
        raise LabError(
            f"not installed: {', '.join(missing)}", hint="`make build` installs what the lab needs"
        )


def remove_leftovers() -> list[str]:
    """Removes the namespaces of runs whose process is gone (killed, for example), and returns their names."""
    gone = []
    for place in (_NETNS, _ETC_NETNS, Path(tempfile.gettempdir())):
        for entry in place.glob("tg*") if place.exists() else ():
            owner = re.match(r"tg(\d+)-\d+-", entry.name)
            if owner is None or Path(f"/proc/{owner[1]}").exists():
                continue  # not ours, or somebody is still using it
            if place == _NETNS and _OWNED.fullmatch(entry.name):
                _end_processes_of(entry.name)
                _remove_namespace(entry.name)
                gone.append(entry.name)
            else:
                shutil.rmtree(entry, ignore_errors=True)
    return gone


def _ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run(["ip", *arguments], check=check)


def _cable(left: Namespace, left_name: str, right: Namespace, right_name: str, *, mtu: int = 1500) -> None:
    """Makes a veth pair, directly in its two namespaces, so that the names need not be unique on the machine."""
    left.ip(f"link add {left_name} mtu {mtu} type veth peer name {right_name} mtu {mtu} netns {right.name}")
    left.ip(f"link set {left_name} up")
    right.ip(f"link set {right_name} up")


def _end_processes_of(namespace: str) -> None:
    """Ends the processes that a dead run left running in its own namespace."""

    def pids() -> list[int]:
        return [int(pid) for pid in _ip("netns", "pids", namespace, check=False).stdout.split()]

    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        with contextlib.suppress(WaitTimeoutError):
            wait_until(lambda: not pids(), f"the processes of {namespace} to end", timeout=3.0)
            return


def _remove_namespace(name: str) -> None:
    with contextlib.suppress(CommandError):
        if (_NETNS / name).exists():
            _ip("netns", "delete", name)
    shutil.rmtree(_ETC_NETNS / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        _ETC_NETNS.rmdir()  # only if nobody else uses it


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
