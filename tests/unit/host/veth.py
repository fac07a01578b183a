"""The network of a namespace in which tests run on a real kernel: one interface towards a router, and a TUN device."""

from __future__ import annotations

import subprocess


def setup(tun: str) -> str:
    """Shell commands that make eth0 (192.0.2.2/24, default route via 192.0.2.1) and the TUN device, as the engine would
    make it."""
    return f"""
ip link set lo up
ip link add eth0 type veth peer name other
ip link set eth0 addrgenmode none
ip link set other addrgenmode none
ip addr add 192.0.2.2/24 dev eth0
ip link set eth0 up
ip link set other up
ip route add default via 192.0.2.1
ip tuntap add mode tun name {tun}
"""


def sh(command: str) -> str:
    """What the command prints on standard output, whatever becomes of it."""
    return subprocess.run(command, shell=True, capture_output=True, text=True, check=False).stdout
