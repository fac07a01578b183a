"""What commands show of peers and of the NAT: the store's and the engine's objects, as answers. Nothing here changes
anything.

The store knows names, and when a peer was seen last; the engine knows clients by key or address, and counts since the
gateway's start. A view joins the two.
"""

from __future__ import annotations

from tidegate.control.commands import MappingView, NatCounted, NatList, NatListed, PeerView
from tidegate.engine import EngineGateway, EngineStatus, PeerStatus
from tidegate.identity.keys import encode_key
from tidegate.settings import NatSettings
from tidegate.store import LastSeen, Peer, Store


def peer_view(
    peer: Peer, counters: PeerStatus | None, seen: LastSeen | None = None, now: float = 0.0
) -> PeerView:
    """`seen` tells of a peer that has made no handshake since the gateway's start; `now`: seconds since the epoch."""
    view = PeerView(
        name=peer.name,
        address=str(peer.address),
        public_key=encode_key(peer.public_key),
        created_at=peer.created_at,
        cipher=peer.cipher,
        enabled=peer.enabled,
        endpoint=_pair(seen.endpoint) if seen is not None else None,
        # The clock may have been set back since.
        last_handshake=max(0.0, now - seen.handshake_at) if seen is not None else None,
    )
    if counters is None:
        return view
    return view.model_copy(
        update={
            "endpoint": _pair(counters.endpoint) if counters.endpoint else view.endpoint,
            "last_handshake": (
                counters.last_handshake if counters.last_handshake is not None else view.last_handshake
            ),
            "received_bytes": counters.received_bytes,
            "sent_bytes": counters.sent_bytes,
            "received_packets": counters.received_packets,
            "sent_packets": counters.sent_packets,
            "mappings": counters.mappings,
        }
    )


def nat_listed(command: NatList, engine: EngineGateway, store: Store) -> NatListed:
    """The NAT's mappings. Raises `NotFoundError` for an unknown peer, and `StoreError`."""
    names = {str(peer.address): peer.name for peer in store.peers()}
    address = str(store.peer(command.peer).address) if command.peer is not None else None
    external: tuple[str | None, int] | None = None
    if command.external is not None:
        at, port = command.external
        external = (None if at is None else str(at), port)
    # One more than asked for, to know whether there are more.
    found = engine.mappings(address, command.limit + 1, external=external)
    return NatListed(
        mappings=[
            MappingView(
                protocol=entry.protocol,
                internal=_pair(entry.internal),
                external=_pair(entry.external),
                peer=names.get(entry.internal[0]),
                state=entry.state,
                age=entry.age,
                idle=entry.idle,
                expires_in=entry.expires_in,
                sessions=entry.sessions,
            )
            for entry in found[: command.limit]
        ],
        truncated=len(found) > command.limit,
    )


def nat_counted(status: EngineStatus, nat: NatSettings) -> NatCounted:
    """How full the NAT is, beside the limits in force."""
    return NatCounted(
        mappings=dict(status.mappings),
        sessions=status.sessions,
        clients=status.clients,
        reserved_ports=dict(status.reserved_ports),
        resting_ports=status.resting_ports,
        limits={
            "max_mappings": nat.max_mappings,
            "max_mappings_per_client": nat.max_mappings_per_client,
            "max_new_mappings_per_second": nat.max_new_mappings_per_second,
            "max_sessions_per_mapping": nat.max_sessions_per_mapping,
        },
        drops=dict(status.drops),
        explanations=dict(status.explanations),
    )


def _pair(endpoint: tuple[str, int]) -> str:
    return f"{endpoint[0]}:{endpoint[1]}"
