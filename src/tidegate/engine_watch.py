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

UNLOGGED = frozenset({"handshake_unanswered", "handshake_completed"})
"""Events without a line in the log. A client's attempts tell of the first again and again for as long as the gateway is
away, and the search for it (`Client._search`) logs what comes of it; of the second, `PeerWatch` logs what is new."""


async def watch_engine(
    engine: EngineLifecycle,
    supervisor: Supervisor,
    *,
    handlers: Mapping[str, Callable[[], None]] = MappingProxyType({}),
    read_log: Callable[[], None] = lambda: None,
) -> None:
    """Logs the engine's events, at a bounded rate, until cancelled; a failed shard takes the process down.

    `handlers` maps kinds of events to what they call. `read_log` reads the records of mappings, which the engine's
    descriptor announces as well."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    admit = RateLimit(loop.time).admit
    descriptor = engine.event_fd()
    while True:
        # The descriptor is level-triggered: watched all the time, it would wake the loop again and again.
        loop.add_reader(descriptor, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(descriptor)
        readable.clear()
        for event in engine.poll_events():
            if event.kind == "shard_failed":
                supervisor.fail(EngineError(f"the packet engine failed: {event.detail}"))
            if event.kind in handlers:
                handlers[event.kind]()
            if event.kind in UNLOGGED:
                continue
            # Whoever fills the log with one reason does not hide the others.
            reason = event.detail.partition(" ")[0] if event.kind == "handshake_refused" else ""
            suppressed = admit(event.kind + reason)
            if suppressed is not None:
                log.warning(event.kind.replace("_", " "), detail=event.detail, suppressed=suppressed)
        read_log()


def explain_engine(cause: OSError, tun_name: str, *, naming: str, port: str) -> TidegateError:
    """Why the engine could not open something, in one line. `naming` and `port` say how the user chooses the device's
    name and the port."""
    reason = str(cause.strerror or cause)
    match cause.errno:
        case errno.EPERM | errno.EACCES:
            return PrivilegeError(reason, hint="run as root")
        case errno.EBUSY:
            return ConflictError(reason, hint=f"is the interface {tun_name} in use? choose another {naming}")
        case errno.EINVAL if "create the TUN device" in reason:
            return ConflictError(
                reason, hint=f"is {tun_name} an interface of another kind? choose another {naming}"
            )
        case errno.EADDRINUSE:
            return ConflictError(reason, hint=f"choose another {port}")
    return EngineError(reason)
