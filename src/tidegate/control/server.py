"""The gateway's end of the control socket: STATE_DIR/control.sock, for root alone (0600)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from tidegate.control.commands import Answer, Command
from tidegate.control.wire import (
    MAX_ANSWER_BYTES,
    MAX_REQUEST_BYTES,
    decode_request,
    encode_answer,
    encode_error,
)
from tidegate.errors import ControlError, EngineUnresponsiveError, TidegateError

log = structlog.get_logger("tidegate.control")

MAX_CONNECTIONS = 32
IDLE_TIMEOUT = 30.0  # seconds until a connection that says nothing is closed
LESS = "ask about one peer, with `tidegate peer show NAME`"
"""Only lists of peers can get too large: from about 50,000 on."""
LAST_ANSWER = 1.0
"""Seconds that a command in progress has when the server stops; less than the Supervisor's `STOP_DEADLINE`."""


class ControlServer:
    """Answers commands. `run` is a task for the Supervisor; the socket exists from `open` to `close`."""

    def __init__(self, path: Path, execute: Callable[[Command[Any]], Answer]) -> None:
        """`execute` is called in a worker thread, never twice at once."""
        self._path = path
        self._execute = execute
        self._one_at_a_time = asyncio.Lock()
        self._connections: set[asyncio.Task[None]] = set()
        self._answering: set[asyncio.Task[Any]] = set()
        """Connections that wait for an answer."""
        self._stopping = False
        self._listener: socket.socket | None = None

    def open(self) -> None:
        """Makes the socket, replacing one that a killed process left behind (we hold the state directory's lock, so
        nobody listens there). Raises `ControlError`."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        before = os.umask(0o177)  # mode 0600, with no moment at which others could connect
        try:
            self._path.unlink(missing_ok=True)
            listener.bind(str(self._path))
            listener.listen()
        except OSError as cause:
            listener.close()
            raise ControlError(
                f"{self._path}: cannot listen: {cause.strerror or cause}",
                hint="a socket's path can have at most 107 bytes; choose a shorter --state-dir"
                if not cause.strerror
                else None,
            ) from cause
        finally:
            os.umask(before)
        self._listener = listener

    async def run(self) -> None:
        """Accepts connections until cancelled. A command in progress is still answered then, so that its sender learns
        the outcome; commands that wait behind it are refused."""
        if self._listener is None:
            raise RuntimeError("ControlServer.run before open")
        server = await asyncio.start_unix_server(self._accept, sock=self._listener, limit=MAX_REQUEST_BYTES)
        try:
            await asyncio.get_running_loop().create_future()  # until cancelled
        finally:
            self._stopping = True
            server.close()
            for connection in self._connections - self._answering:
                connection.cancel()
            if self._answering:
                await asyncio.wait(self._answering, timeout=LAST_ANSWER)
            for connection in self._connections:
                connection.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    def close(self) -> None:
        """Removes the socket. Idempotent."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Not a coroutine: asyncio would make a task of it, and Python 3.11 logs an error for each one that is
        cancelled."""
        if len(self._connections) >= MAX_CONNECTIONS:
            writer.close()
            return

        def ended(task: asyncio.Task[None]) -> None:
            writer.transport.abort()  # close would wait for ever for a client that reads nothing
            self._connections.discard(task)
            if not task.cancelled() and (cause := task.exception()) is not None:
                log.error("a control connection failed unexpectedly", cause=repr(cause))

        task = asyncio.create_task(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(ended)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._converse(reader, writer)
            writer.close()
            await asyncio.wait_for(writer.wait_closed(), IDLE_TIMEOUT)
        except (OSError, TimeoutError) as cause:
            log.debug("control connection ended", cause=str(cause) or type(cause).__name__)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.current_task()
        assert connection is not None, "a coroutine runs in a task"
        while not self._stopping:
            try:
                line = await asyncio.wait_for(reader.readline(), IDLE_TIMEOUT)
            except ValueError:  # longer than the limit
                too_long = ControlError(f"the request is longer than {MAX_REQUEST_BYTES} bytes")
                writer.write(encode_error(too_long))
                await writer.drain()
                return
            if not line.endswith(b"\n"):
                return
            self._answering.add(connection)
            try:
                writer.write(await self._answer(line))
                await asyncio.wait_for(writer.drain(), IDLE_TIMEOUT)
            finally:
                self._answering.discard(connection)

    async def execute(self, command: Command[Any]) -> Answer:
        """Carries out a command, after those before it. Raises `TidegateError`."""
        async with self._one_at_a_time:
            if self._stopping:
                raise ControlError("the gateway is shutting down and accepts no more commands")
            # Shielded: a command that has begun is finished even if its sender is gone.
            return await asyncio.shield(asyncio.to_thread(self._execute, command))

    async def _answer(self, line: bytes) -> bytes:
        try:
            encoded = encode_answer(await self.execute(decode_request(line)))
        except TidegateError as refused:
            if isinstance(refused, EngineUnresponsiveError):
                log.error("a command was not answered", cause=refused.message)
            return encode_error(refused)
        except Exception as cause:
            log.exception("a command failed unexpectedly")
            return encode_error(ControlError(f"the gateway failed: {type(cause).__name__}: {cause}"))
        if len(encoded) > MAX_ANSWER_BYTES:
            return encode_error(ControlError("the answer is too large", hint=LESS))
        return encoded
