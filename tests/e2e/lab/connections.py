"""Many TCP connections: a server, and clients that hold them or open one after the other.

::

    python tests/e2e/lab/connections.py serve ADDRESS PORT…
    python tests/e2e/lab/connections.py hold ADDRESS PORT COUNT
    python tests/e2e/lab/connections.py churn ADDRESS PORT COUNT

``hold`` prints how many connections it holds; on SIGUSR1 it sends something on each, and prints how many answered.
``churn`` prints how many succeeded, and why others did not. A process has few descriptors, so run several of them.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import resource
import signal
import socket
import sys
from collections import Counter
from time import monotonic

READY = "connection server is ready"
HELD, ALIVE, DONE = "held", "alive", "done"
"""What `hold` prints, and answers to SIGUSR1; what `churn` prints. Figures follow."""

HANG_UP = b"q"
"""Answered like anything else; then the server closes first."""

_PATIENCE = 20.0
_AT_ONCE = 64
_BACKLOG = 4096


class _Echo(asyncio.Protocol):
    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)
        if data == HANG_UP:
            self.transport.close()


async def _serve(address: str, ports: list[int]) -> None:
    loop = asyncio.get_running_loop()
    for port in ports:
        await loop.create_server(_Echo, address, port, backlog=_BACKLOG)
    print(READY, flush=True)
    await asyncio.Event().wait()


class _Held:
    """Connections that are kept."""

    def __init__(self, address: str, port: int) -> None:
        self._endpoint = (address, port)
        self._streams: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._turn = asyncio.Semaphore(_AT_ONCE)
        self.failures: Counter[str] = Counter()

    async def open(self, count: int) -> int:
        await asyncio.gather(*(self._open_one(number) for number in range(count)))
        return len(self._streams)

    async def speak(self) -> int:
        """How many connections answer."""
        answers = await asyncio.gather(
            *(self._speak_on(number, stream) for number, stream in enumerate(self._streams))
        )
        return sum(answers)

    async def _open_one(self, number: int) -> None:
        async with self._turn:
            try:
                stream = await asyncio.wait_for(asyncio.open_connection(*self._endpoint), _PATIENCE)
            except (OSError, TimeoutError) as cause:
                self.failures[_name(cause)] += 1
                return
        if await self._speak_on(number, stream):
            self._streams.append(stream)

    async def _speak_on(self, number: int, stream: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> bool:
        reader, writer = stream
        said = number.to_bytes(4, "big")
        async with self._turn:
            try:
                writer.write(said)
                return await asyncio.wait_for(reader.readexactly(4), _PATIENCE) == said
            except (OSError, TimeoutError, asyncio.IncompleteReadError) as cause:
                self.failures[_name(cause)] += 1
                return False


async def _hold(address: str, port: int, count: int) -> None:
    held = _Held(address, port)
    asked = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, asked.set)
    begun = monotonic()
    opened = await held.open(count)
    print(f"{HELD} {opened} of {count} in {monotonic() - begun:.1f} s {dict(held.failures)}", flush=True)
    while True:
        await asked.wait()
        asked.clear()
        print(f"{ALIVE} {await held.speak()} {dict(held.failures)}", flush=True)


def _churn(address: str, port: int, count: int) -> None:
    failures: Counter[str] = Counter()
    begun = monotonic()
    for number in range(count):
        # The client and the server take turns to close first, and so to have the connection in TIME-WAIT.
        said = HANG_UP if number % 2 else b"x"
        try:
            with socket.create_connection((address, port), timeout=_PATIENCE) as connection:
                connection.sendall(said)
                if connection.recv(1) != said:
                    failures["wrong answer"] += 1
                elif said == HANG_UP and connection.recv(1):
                    failures["not closed"] += 1
        except OSError as cause:
            failures[_name(cause)] += 1
    good = count - failures.total()
    print(f"{DONE} {good} of {count} in {monotonic() - begun:.1f} s {dict(failures)}", flush=True)


def _name(cause: BaseException) -> str:
    number = getattr(cause, "errno", None)
    return errno.errorcode.get(number, "") if isinstance(number, int) else type(cause).__name__


def main() -> None:
    """Serves, holds or churns."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("role", choices=["serve", "hold", "churn"])
    parser.add_argument("address")
    parser.add_argument("numbers", type=int, nargs="+", metavar="PORT… or PORT COUNT")
    arguments = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if arguments.role == "serve":
        asyncio.run(_serve(arguments.address, arguments.numbers))
        return
    if len(arguments.numbers) != 2:
        sys.exit(f"{arguments.role} takes a port and a count")
    port, count = arguments.numbers
    if arguments.role == "hold":
        asyncio.run(_hold(arguments.address, port, count))
    else:
        _churn(arguments.address, port, count)


if __name__ == "__main__":
    main()
