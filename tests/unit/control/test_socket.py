"""The control socket against clients that misbehave."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.running import open_sockets, until
from tidegate.control.client import ControlClient
from tidegate.control.commands import Answer, Command, NatList, PeerList, PeerListed, PeerRemove, PeerView
from tidegate.control.server import LAST_ANSWER, ControlServer
from tidegate.control.wire import MAX_REQUEST_BYTES, RemoteError, decode_request, encode_request
from tidegate.errors import ControlError, NotFoundError, NotRunningError, PrivilegeError, UnansweredError
from tidegate.lifecycle import STOP_DEADLINE

Execute = Callable[[Command[Any]], Answer]


def nothing(_command: Command[Any]) -> Answer:
    return PeerListed(running=True, peers=[])


@asynccontextmanager
async def server(directory: Path, execute: Execute = nothing) -> AsyncIterator[ControlServer]:
    control = ControlServer(directory / "control.sock", execute)
    control.open()
    task = asyncio.create_task(control.run())
    await asyncio.sleep(0.02)
    try:
        yield control
    finally:
        task.cancel()
        async with asyncio.timeout(1):
            await asyncio.gather(task, return_exceptions=True)
        control.close()
        control.close()


async def say(directory: Path, *lines: bytes) -> list[dict[str, Any]]:
    reader, writer = await asyncio.open_unix_connection(str(directory / "control.sock"))
    try:
        answers = []
        async with asyncio.timeout(3):
            for line in lines:
                writer.write(line)
                await writer.drain()
                answers.append(json.loads(await reader.readline()))
        return answers
    finally:
        writer.close()


def test_garbage_is_answered_with_an_error_and_the_connection_lives_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with server(tmp_path):
            answers = await say(
                tmp_path,
                b"hello\n",
                b"{}\n",
                b'{"version": 1, "request": {"command": "reboot"}}\n',
                b'{"version": 1, "request": {"command": "peer.list", "extra": 1}}\n',
                b'{"version": 9, "request": {"command": "peer.list"}}\n',
                b'{"version": 1, "request": {"command": "peer.list"}}\n',
            )
            assert ["error" in answer for answer in answers] == [True] * 5 + [False]
            assert "version 9" in answers[4]["error"]["message"]

    asyncio.run(scenario())


def test_a_request_that_never_ends_is_cut_off(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with server(tmp_path):
            (answer,) = await say(tmp_path, b"x" * (MAX_REQUEST_BYTES + 10))
            assert str(MAX_REQUEST_BYTES) in answer["error"]["message"]

    asyncio.run(scenario())


def test_connections_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidegate.control.server.MAX_CONNECTIONS", 2)

    async def scenario() -> None:
        async with server(tmp_path):
            path = str(tmp_path / "control.sock")
            held = [await asyncio.open_unix_connection(path) for _ in range(2)]
            await asyncio.sleep(0.05)
            reader, writer = await asyncio.open_unix_connection(path)
            async with asyncio.timeout(1):
                assert await reader.read() == b""
            for _, other in (*held, (reader, writer)):
                other.close()

    asyncio.run(scenario())


def test_an_open_connection_ends_with_the_server_and_without_complaint(tmp_path: Path) -> None:
    complaints: list[dict[str, Any]] = []

    async def scenario() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        async with server(tmp_path):
            reader, writer = await asyncio.open_unix_connection(str(tmp_path / "control.sock"))
            await asyncio.sleep(0.02)
        async with asyncio.timeout(1):
            assert await reader.read() == b""
        writer.close()

    asyncio.run(scenario())
    assert complaints == []


def test_an_answer_that_is_too_large_is_refused_with_a_way_to_ask_for_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate.control.server.MAX_ANSWER_BYTES", 1000)
    peers = [
        PeerView(name=f"p{n}", address="10.66.77.2", public_key="k" * 44, created_at=0.0) for n in range(9)
    ]

    def listed(command: Command[Any]) -> Answer:
        assert isinstance(command, PeerList)
        return PeerListed(running=True, peers=[peer for peer in peers if command.name in (None, peer.name)])

    async def scenario() -> None:
        async with server(tmp_path, listed):
            client = await asyncio.to_thread(ControlClient.connect, tmp_path)
            with pytest.raises(RemoteError, match="too large") as refused:
                await asyncio.to_thread(client.execute, PeerList())
            assert refused.value.hint == "ask about one peer, with `tidegate peer show NAME`"
            answer = await asyncio.to_thread(client.execute, PeerList(name="p3"))
            assert [peer.name for peer in answer.peers] == ["p3"]
            client.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("then", ["waits", "says that it is done"])
def test_one_who_does_not_take_an_answer_is_let_go_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    monkeypatch.setattr("tidegate.control.server.IDLE_TIMEOUT", 0.2)
    peer = PeerView(name="p" * 63, address="10.66.77.2", public_key="k" * 44, created_at=0.0)

    def much(_command: Command[Any]) -> Answer:
        return PeerListed(running=True, peers=[peer] * 20_000)

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with server(tmp_path, much):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as deaf:
                before = open_sockets()
                await loop.sock_connect(deaf, str(tmp_path / "control.sock"))
                await loop.sock_sendall(deaf, b'{"version": 1, "request": {"command": "peer.list"}}\n')
                if then != "waits":
                    deaf.shutdown(socket.SHUT_WR)
                await asyncio.sleep(0.02)
                assert not open_sockets() <= before
                await until(lambda: open_sockets() <= before)

    asyncio.run(scenario())


LIST = b'{"version": 1, "request": {"command": "peer.list"}}\n'


class Slow:
    """Carries out commands, each when it is told to."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self.count = 0

    def __call__(self, _command: Command[Any]) -> Answer:
        self.count += 1
        self.begun.set()
        assert self.go_on.wait(5)
        return PeerListed(running=True, peers=[])


def test_a_server_that_stops_answers_the_command_under_way_and_refuses_those_behind_it(
    tmp_path: Path,
) -> None:
    slow = Slow()

    async def scenario() -> None:
        async with server(tmp_path, slow):
            first = asyncio.create_task(say(tmp_path, LIST))
            assert await asyncio.to_thread(slow.begun.wait, 5)
            second = asyncio.create_task(say(tmp_path, LIST))
            await asyncio.sleep(0.05)
            asyncio.get_running_loop().call_later(0.2, slow.go_on.set)
        (answer,), (refusal,) = await asyncio.gather(first, second)
        assert answer["answer"]["running"] is True
        assert "the gateway is shutting down" in refusal["error"]["message"]
        assert slow.count == 1

    asyncio.run(scenario())


def test_a_server_that_stops_does_not_wait_for_a_command_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate.control.server.LAST_ANSWER", 0.1)
    assert LAST_ANSWER < STOP_DEADLINE
    slow = Slow()

    async def scenario() -> None:
        async with server(tmp_path, slow):
            reader, writer = await asyncio.open_unix_connection(str(tmp_path / "control.sock"))
            writer.write(LIST)
            assert await asyncio.to_thread(slow.begun.wait, 5)
        async with asyncio.timeout(1):
            assert await reader.read() == b""
        writer.close()
        slow.go_on.set()

    asyncio.run(scenario())


def test_a_refusal_keeps_its_words_and_its_exit_code(tmp_path: Path) -> None:
    def refuse(_command: Command[Any]) -> Answer:
        raise NotFoundError("no such peer", hint="look again")

    def ask() -> None:
        client = ControlClient.connect(tmp_path)
        with pytest.raises(RemoteError, match="^no such peer; look again$") as refused:
            client.execute(PeerRemove(name="x"))
        assert refused.value.exit_code == 1
        client.close()

    async def scenario() -> None:
        async with server(tmp_path, refuse):
            await asyncio.to_thread(ask)

    asyncio.run(scenario())


def test_a_failure_inside_the_gateway_is_an_answer_and_not_the_end(tmp_path: Path) -> None:
    def fail(_command: Command[Any]) -> Answer:
        raise ZeroDivisionError("oops")

    async def scenario() -> None:
        async with server(tmp_path, fail):
            request = b'{"version": 1, "request": {"command": "peer.list"}}\n'
            answers = await say(tmp_path, request, request)
            assert ["ZeroDivisionError" in answer["error"]["message"] for answer in answers] == [True, True]

    asyncio.run(scenario())


def test_without_a_gateway_the_client_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotRunningError, match="no gateway is running"):
        ControlClient.connect(tmp_path)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "control.sock"))
    with pytest.raises(NotRunningError, match="no gateway is running"):
        ControlClient.connect(tmp_path)


def test_a_socket_that_may_not_be_opened_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_socket: socket.socket, _path: str) -> None:
        raise PermissionError

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(PrivilegeError, match="permission denied; run as root"):
        ControlClient.connect(tmp_path)


def test_an_answer_that_breaks_off_is_told(tmp_path: Path) -> None:
    def hang_up(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.recv(1000)
        connection.sendall(b'{"version": 1, "ans')
        connection.close()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "control.sock"))
        listener.listen()
        thread = threading.Thread(target=hang_up, args=(listener,))
        thread.start()
        with pytest.raises(UnansweredError, match="closed the connection before it answered"):
            ControlClient.connect(tmp_path).execute(PeerList())
        thread.join(5)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_a_control_error(line: bytes) -> None:
    with pytest.raises(ControlError):
        decode_request(line)


def test_a_request_says_nothing_of_what_it_does_not_ask_for() -> None:
    """A gateway that was not restarted after an upgrade refuses fields that it does not know."""
    assert json.loads(encode_request(PeerList()))["request"] == {"command": "peer.list"}
    assert json.loads(encode_request(NatList(limit=5)))["request"] == {"command": "nat.list", "limit": 5}


@pytest.mark.parametrize(
    "command",
    [PeerList(), PeerList(name="alice"), NatList(), NatList(peer="alice", external=(None, 443))],
    ids=str,
)
def test_a_request_arrives_as_it_was_sent(command: Command[Any]) -> None:
    assert decode_request(encode_request(command)) == command
