"""What a gateway and a client share about their packet engine: its events, and its errors in plain words."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Mapping
from types import MappingProxyType

import structlog

from tidegate.engine import EngineLifecycle
from tidegate.errors import ConflictError, EngineError, PrivilegeError, TidegateError
from tidegate.lifecycle import Supervisor
from tidegate.log import RateLimit

log = structlog.get_logger("tidegate.engine")


async def watch_engine(
    engine: EngineLifecycle,
    supervisor: Supervisor,
    also: Callable[[], None] = lambda: None,
    *,
    heeded: Mapping[str, Callable[[], None]] = MappingProxyType({}),
    noticed: Mapping[str, Callable[[], None]] = MappingProxyType({}),
) -> None:
    """Logs what the engine tells, at a bounded rate; a shard that failed takes the process down. `also` reads
    what else the engine's descriptor stands for. Events of the kinds in `heeded` are not logged, but call that;
    those in `noticed` are logged, and call that as well."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    admit = RateLimit(loop.time).admit
    descriptor = engine.event_fd()
    while True:
        # Waiting for one event at a time keeps a level-triggered descriptor from waking the loop again and
        # again.
        loop.add_reader(descriptor, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(descriptor)
        readable.clear()
        for event in engine.poll_events():
            if event.kind == "shard_failed":
                supervisor.fail(EngineError(f"the packet engine failed: {event.detail}"))
            if event.kind in heeded:
                heeded[event.kind]()
                continue
            if event.kind in noticed:
                noticed[event.kind]()
            suppressed = admit(event.kind)
            if suppressed is not None:
                log.warning(event.kind.replace("_", " "), detail=event.detail, suppressed=suppressed)
        also()


def explain_engine(cause: OSError, tun_name: str, *, naming: str, port: str) -> TidegateError:
    """Why the engine could not open something, in one line. `naming` and `port` are what the user chooses the
    device's name and the port with."""
    told = str(cause.strerror or cause)
    match cause.errno:
        case errno.EPERM | errno.EACCES:
            return PrivilegeError(told, hint="run as root")
        case errno.EBUSY:
            return ConflictError(told, hint=f"is the interface {tun_name} in use? choose another {naming}")
        case errno.EINVAL if "create the TUN device" in told:
            return ConflictError(
                told, hint=f"is {tun_name} an interface of another kind? choose another {naming}"
            )
        case errno.EADDRINUSE:
            return ConflictError(told, hint=f"choose another {port}")
    return EngineError(told)
