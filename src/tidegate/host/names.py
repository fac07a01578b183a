"""Resolves host names without holding anything up: the C library's look-up cannot be cancelled, so it runs in a thread
of its own, which nothing waits for at the end."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from ipaddress import AddressValueError, IPv4Address
from typing import TypeVar

from tidegate.errors import HostNetworkError
from tidegate.net import Endpoint

T = TypeVar("T")

RESOLVE_TIMEOUT = 10.0  # seconds


async def resolve(endpoint: Endpoint) -> IPv4Address:
    """The endpoint's IPv4 address. May be cancelled. Raises `HostNetworkError`."""
    with suppress(AddressValueError):
        return IPv4Address(endpoint.host)
    try:
        async with asyncio.timeout(RESOLVE_TIMEOUT):
            return await _in_daemon_thread(lambda: _look_up(endpoint))
    except TimeoutError:
        raise HostNetworkError(
            f"{endpoint.host} could not be resolved within {RESOLVE_TIMEOUT:g} s"
        ) from None
    except OSError as cause:
        raise HostNetworkError(f"{endpoint.host} cannot be resolved: {cause.strerror}") from cause


def _look_up(endpoint: Endpoint) -> IPv4Address:
    try:
        found = socket.getaddrinfo(
            endpoint.host, endpoint.port, family=socket.AF_INET, type=socket.SOCK_DGRAM
        )
    except UnicodeError:  # no IDNA encoding, as for labels of more than 63 letters
        raise socket.gaierror(socket.EAI_NONAME, "not a host name") from None
    return IPv4Address(found[0][4][0])


async def _in_daemon_thread(work: Callable[[], T]) -> T:
    """As `asyncio.to_thread`, but neither `asyncio.run` nor the interpreter waits for the thread at the end. `work`
    may raise `OSError`."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        settle: Callable[[], None]
        try:
            settle = partial(outcome.set_result, work())
        except OSError as cause:
            settle = partial(outcome.set_exception, cause)

        def deliver() -> None:
            if not outcome.done():  # otherwise nobody is waiting any more
                settle()

        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(deliver)

    threading.Thread(target=run, name="look-up", daemon=True).start()
    return await outcome
