"""sd_notify(3): tells the service manager about the gateway's state, if one asked for it."""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import Mapping

import structlog

MOST_WAITING = 8
"""Messages that wait for a manager that does not read. Beyond that the oldest are dropped: a manager goes by the last
that it was told."""

log = structlog.get_logger("tidegate.notify")


class ServiceManager:
    """The service manager that ``NOTIFY_SOCKET`` names, or none. For use in an event loop, which it never blocks."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        if address.startswith("@"):  # the abstract namespace, unix(7)
            address = "\0" + address[1:]
        self._address = address if address.startswith(("/", "\0")) else None
        self._waiting: deque[str] = deque(maxlen=MOST_WAITING)
        self._socket: socket.socket | None = None
        """While messages wait for room in the manager's socket."""

    def tell(self, state: str) -> None:
        """Sends e.g. ``READY=1``: at once, or as soon as there is room for it, in the order of the calls. What finds no
        room is not dropped: a manager waits for the ``READY=1`` of a start or a reload, and ends a service without
        one."""
        if self._address is None:
            return
        self._waiting.append(state)
        if self._socket is None:
            self._send(self._address)

    def _send(self, address: str) -> None:
        try:
            manager = self._socket = self._socket or socket.socket(
                socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
            )
            manager.connect(address)  # so that the event loop sees whether there is room
            while self._waiting:
                manager.send(self._waiting[0].encode())
                self._waiting.popleft()
        except BlockingIOError:
            asyncio.get_running_loop().add_writer(manager, self._send, address)
            return
        except OSError as cause:
            where = address.replace("\0", "@", 1)
            log.warning(
                "the service manager cannot be told", socket=where, cause=cause.strerror or str(cause)
            )
        self.close()

    def close(self) -> None:
        """Drops what waits. Idempotent."""
        self._waiting.clear()
        if self._socket is not None:
            asyncio.get_running_loop().remove_writer(self._socket)
            self._socket.close()
            self._socket = None
