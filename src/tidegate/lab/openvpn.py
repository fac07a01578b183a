"""OpenVPN with kernel NAT, for comparison: AES-256-GCM over UDP, no kernel offload, certificates by fingerprint."""

from __future__ import annotations

import itertools
from pathlib import Path

from tidegate.lab.processes import Process, run
from tidegate.lab.stacks import let_kernel_forward, wait_for_gateway
from tidegate.lab.topology import GATEWAY_ACCESS, Lab, Namespace

_PORT = 1194  # IANA
_READY = "Initialization Sequence Completed"
_COMMON = [
    "--dev",
    "tun",
    "--proto",
    "udp4",
    "--port",
    str(_PORT),
    "--disable-dco",
    "--data-ciphers",
    "AES-256-GCM",
]
_COMMON += ["--sndbuf", "4194304", "--rcvbuf", "4194304", "--txqueuelen", "1000", "--verb", "3"]


class OpenVpnGateway:
    """An OpenVPN server; the gateway's kernel does routing and NAT."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._serial = itertools.count(1)
        self._server = _certificate(lab.scratch, "openvpn-server")
        self._clients = [_certificate(lab.scratch, f"openvpn-client-{n}") for n in range(len(lab.clients))]
        self.process: Process

    def start(self) -> None:
        fingerprints = self._lab.scratch / "openvpn-peers"
        known = "\n".join(_fingerprint(client) for client in self._clients)
        fingerprints.write_text(f"<peer-fingerprint>\n{known}\n</peer-fingerprint>\n")
        command = ["openvpn", *_COMMON, "--local", GATEWAY_ACCESS, "--server", "10.66.77.0", "255.255.255.0"]
        command += [
            "--topology",
            "subnet",
            "--dh",
            "none",
            "--cert",
            str(self._server),
            "--key",
            str(self._server),
        ]
        command += ["--duplicate-cn", "--config", str(fingerprints)]
        self.process = self._lab.gateway.popen(command)
        self.process.wait_for(_READY)
        let_kernel_forward(self._lab.gateway)

    def stop(self) -> None:
        self.process.stop()

    def add_peer(self, name: str) -> Path:
        """The client's settings, as an OpenVPN file."""
        certificate = self._clients[next(self._serial) - 1]
        profile = self._lab.scratch / f"{name}.ovpn"
        profile.write_text(
            f"client\nremote {GATEWAY_ACCESS}\nnobind\nredirect-gateway def1\ncert {certificate}\nkey {certificate}\n"
            f"peer-fingerprint {_fingerprint(self._server)}\n"
        )
        return profile


class OpenVpnClient:
    """An OpenVPN client that sends everything through the tunnel."""

    def __init__(self, host: Namespace, profile: Path) -> None:
        self._host = host
        self._profile = profile
        self.process: Process

    def start(self) -> None:
        self.process = self._host.popen(["openvpn", *_COMMON, "--config", str(self._profile)])
        self.process.wait_for(_READY)
        wait_for_gateway(self._host, self.process)

    def stop(self) -> None:
        self.process.stop()


def _certificate(folder: Path, name: str) -> Path:
    """A self-signed certificate and its key, in one file."""
    file, key = folder / f"{name}.pem", folder / f"{name}.key"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    files = ["-keyout", str(key), "-out", str(file)]
    run(["openssl", "req", "-x509", *curve, "-nodes", "-days", "2", "-subj", f"/CN={name}", *files])
    file.write_text(file.read_text() + key.read_text())
    key.unlink()
    return file


def _fingerprint(certificate: Path) -> str:
    printed = run(["openssl", "x509", "-in", str(certificate), "-noout", "-fingerprint", "-sha256"]).stdout
    return printed.strip().partition("=")[2]
