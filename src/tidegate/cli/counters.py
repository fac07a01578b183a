"""Tables of counters that several commands show."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType


def ports_table(mappings: dict[str, int], reserved_ports: dict[str, int], heading: str) -> RenderableType:
    """The NAT's mappings and reserved ports, by protocol; `heading` is that of the protocols' column."""
    from tidegate.cli.output import table

    return table(
        None,
        (heading, "mappings>", "reserved ports>"),
        [
            (protocol, str(mappings.get(protocol, 0)), str(reserved_ports.get(protocol, 0)))
            for protocol in sorted({*mappings, *reserved_ports})
        ],
        empty="no mappings",
    )


def drops_table(drops: dict[str, int], explanations: dict[str, str] | None = None) -> RenderableType:
    """Drops by reason, most frequent first; reasons that never occurred are left out. `explanations` fill a column of
    their own."""
    from tidegate.cli.output import table

    rows = sorted(
        ((name, count) for name, count in drops.items() if count), key=lambda row: (-row[1], row[0])
    )
    return table(
        None,
        ("dropped because", "packets>", *(() if explanations is None else ("which means",))),
        [
            (name, str(count), *(() if explanations is None else (explanations.get(name, ""),)))
            for name, count in rows
        ],
        empty="nothing was dropped",
    )
