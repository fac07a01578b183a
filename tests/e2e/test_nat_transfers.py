"""Transfers with a second connection, which other NATs read payloads for; and the segment size of all of them.

::

    client ─── tunnel (MTU 1420) ─── gateway ─── internet 203.0.113.9 (the file server)
                                     203.0.113.1
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tidegate.lab.blob import blob
from tidegate.lab.stacks import TidegateGateway
from tidegate.lab.topology import GATEWAY_EXTERNAL, INTERNET, Lab

from .conftest import MakeWorld

pytestmark = pytest.mark.namespaces

CONTROL, DATA = 2_100, 2_000  # ports of the server; 21 and 20 would be FTP's (RFC 959 §3.2)
FILE = b"".join(blob("file", 300_000))
CLAMPED = 1_420 - 40  # the tunnel's MTU without IPv4 and TCP header


@dataclass
class Scene:
    lab: Lab
    gateway: TidegateGateway


@pytest.fixture(scope="module")
def scene(make_world: MakeWorld) -> Iterator[Scene]:
    world = make_world()
    world.connect(world.lab.client, name="alice")
    yield Scene(world.lab, world.tidegate)
    world.gateway.stop()


def listening(port: int, *, reuse: bool = False) -> socket.socket:
    server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    server.settimeout(10)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if reuse:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    server.bind(("", port))
    server.listen()
    return server


def calling(to: tuple[str, int], *, port: int = 0, reuse: bool = False) -> socket.socket:
    caller = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    caller.settimeout(10)
    caller.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if reuse:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    caller.bind(("", port))
    caller.connect(to)
    return caller


def received(connection: socket.socket) -> bytes:
    """Everything until the other end closes."""
    parts = []
    while part := connection.recv(65_536):
        parts.append(part)
    return b"".join(parts)


def test_a_passive_transfer_is_an_ordinary_second_connection(scene: Scene) -> None:
    client, server = scene.lab.client, scene.lab.internet
    with (
        server.call(lambda: listening(CONTROL)) as control,
        server.call(lambda: listening(DATA)) as data,
        client.call(lambda: calling((INTERNET, CONTROL))) as session,
    ):
        control.accept()[0].sendall(
            b"227 203,0,113,9,7,208"
        )  # an address that stands in a payload stays as it is
        assert session.recv(100) == b"227 203,0,113,9,7,208"
        with client.call(lambda: calling((INTERNET, DATA))) as download:
            with data.accept()[0] as upload:
                upload.sendall(FILE)
            assert received(download) == FILE


def test_an_active_transfer_calls_back_to_a_published_port(scene: Scene) -> None:
    scene.gateway.command("publish", "add", "tcp/2121", "--to", "alice")
    client, server = scene.lab.client, scene.lab.internet
    with (
        server.call(lambda: listening(CONTROL)) as control,
        client.call(lambda: listening(2_121)) as data,
        client.call(lambda: calling((INTERNET, CONTROL))) as session,
    ):
        session.sendall(b"PORT 203,0,113,1,8,73")
        with control.accept()[0] as accepted:
            assert accepted.recv(100) == b"PORT 203,0,113,1,8,73"
            with server.call(lambda: calling((GATEWAY_EXTERNAL, 2_121), port=DATA)) as upload:
                download, caller = data.accept()
                assert caller == (INTERNET, DATA)
                upload.sendall(FILE)
            assert received(download) == FILE
            download.close()
    scene.gateway.command("publish", "remove", "tcp/2121")


def test_whom_a_client_has_called_may_call_back_to_the_same_port_without_any_publication(
    scene: Scene,
) -> None:
    # RFC 5382 REQ-1 and REQ-3: one external port for all, open to the addresses that the client has sent to.
    client, server = scene.lab.client, scene.lab.internet
    with (
        server.call(lambda: listening(CONTROL)) as control,
        client.call(lambda: calling((INTERNET, CONTROL), port=5_555, reuse=True)),
        client.call(lambda: listening(5_555, reuse=True)) as data,
    ):
        accepted, face = control.accept()
        with accepted, server.call(lambda: calling(face, port=DATA)) as upload:
            download, caller = data.accept()
            assert caller == (INTERNET, DATA)
            upload.sendall(FILE)
            upload.shutdown(socket.SHUT_WR)
            assert received(download) == FILE
            download.close()


def test_the_segment_size_fits_the_tunnel_both_ways(scene: Scene) -> None:
    client, server = scene.lab.client, scene.lab.internet
    tunnel = next(name for name in client.interfaces() if name.startswith("tidegate"))
    # A client whose device is wider than the tunnel would offer too much.
    client.ip(f"link set {tunnel} mtu 1500")
    syn = "tcp[tcpflags] & tcp-syn != 0"
    with server.capture("external", syn) as outside, client.capture(tunnel, syn) as inside:
        page = client.run(["curl", "-sS", "--fail", "--max-time", "10", f"http://{INTERNET}/"])
        assert page.stdout.startswith("Hello")
    client.ip(f"link set {tunnel} mtu 1420")
    assert any("mss 1460" in line for line in inside.lines(f"dst host {INTERNET}")), "what the client offers"
    assert all(f"mss {CLAMPED}" in line for line in outside.lines(f"dst host {INTERNET}"))
    assert all(f"mss {CLAMPED}" in line for line in inside.lines(f"src host {INTERNET}"))
    assert outside.lines(f"dst host {INTERNET}")
    assert inside.lines(f"src host {INTERNET}")
