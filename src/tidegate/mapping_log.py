"""The log of mappings: which client had which external port, and when (RFC 6888 REQ-12). It names no destinations.

The engine keeps records in a bounded queue until they are read here, some at a time, between everything else that
the event loop does. What found no room there is told as a number, so that a log with gaps says that it has them.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import structlog

from tidegate.engine import EngineGateway, MappingRecord

log = structlog.get_logger("tidegate.nat")

BATCH = 256
"""Records that are logged before others of the loop have their turn."""


class MappingLog:
    """Writes one line for each mapping that began or ended."""

    def __init__(self, engine: EngineGateway, peer_at: Callable[[str], str | None]) -> None:
        """`peer_at` gives the name of the peer that holds an address, or held it last."""
        self._engine = engine
        self._peer_at = peer_at

    def write(self) -> None:
        """Logs some of what is there. If that was not all, the engine's descriptor stays readable."""
        records, missing = self._engine.poll_mapping_log(BATCH)
        for record in records:
            self._line(record)
        if missing:
            log.warning("mapping records were not logged", count=missing)

    def _line(self, record: MappingRecord) -> None:
        lasted = {} if record.event == "created" else {"seconds": round(record.age, 3)}
        log.info(
            f"mapping {record.event}",
            at=datetime.fromtimestamp(record.time, UTC).isoformat(timespec="milliseconds"),
            protocol=record.protocol,
            peer=self._peer_at(record.internal[0]),
            internal="{}:{}".format(*record.internal),
            external="{}:{}".format(*record.external),
            **lasted,
        )
