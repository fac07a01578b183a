"""What the DNS proxy counts."""

from __future__ import annotations

from collections import Counter
from typing import Literal, get_args

DnsEvent = Literal[
    "queries_udp",
    "queries_tcp",
    "answered",
    "unsent",
    "malformed",
    "servfail",
    "truncated",
    "overloaded",
    "over_share",
    "refused_source",
    "upstream_timeout",
    "upstream_error",
    "upstream_mismatch",
    "tcp_connections_refused",
    "tcp_connections_over_share",
    "failed",
]
"""docs/operation.md says what they mean."""
DNS_EVENTS: tuple[DnsEvent, ...] = get_args(DnsEvent)

DnsCounters = Counter[DnsEvent]


def none_yet() -> DnsCounters:
    """Every event, with 0: who watches sees the first one as a rise."""
    return Counter(dict.fromkeys(DNS_EVENTS, 0))
