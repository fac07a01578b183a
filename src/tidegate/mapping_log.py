"""The log of mappings: which client had which external port, and when (RFC 6888 REQ-12). It names no destinations.

The engine keeps records in a bounded queue until they are read here, a batch at a time, so that the event loop's other
work gets its turn. Records that found no room there are counted, so that a log with gaps says that it has them.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import structlog

from tidegate.engine import EngineGateway, MappingRecord

log = structlog.get_logger("tidegate.nat")

BATCH = 256
"""Records that are logged before the event loop's other work gets its turn."""


class MappingLog:
    """Writes one line for each mapping that began or ended."""

    def __init__(self, engine: EngineGateway, peer_at: Callable[[str], str | None]) -> None:
        """`peer_at` gives the name of the peer that holds an address, or held it last."""
        self._engine = engine
        self._peer_at = peer_at

    def write(self) -> None:
        """Logs one batch. If more records wait, the engine's descriptor stays readable."""
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
