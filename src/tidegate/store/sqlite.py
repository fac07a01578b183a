"""The store in one SQLite file, through SQLAlchemy Core.

Every transaction begins with BEGIN IMMEDIATE, so that what it reads stays true until it writes: two processes that add
a peer at the same time get two addresses. WAL keeps readers out of the writer's way. A file that is damaged, or was
made by a newer Tidegate, is refused before anything is written to it.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    Boolean,
    CheckConstraint,
    Column,
    Connection,
    Float,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    Row,
    String,
    Table,
    UniqueConstraint,
    create_engine,
    delete,
    event,
    insert,
    select,
    update,
)
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from tidegate.ciphers import CIPHERS, WIREGUARD_CIPHER, CipherName
from tidegate.errors import ConflictError, NotFoundError, StoreError
from tidegate.files import PRIVATE_FILE, make_private
from tidegate.store import LastSeen, Peer, Publication, TransportProtocol, key_taken

_CIPHER_CHECK = f"cipher IN {CIPHERS}"
_UPGRADES = (
    # The first upgrades schema version 1 to 2, the next 2 to 3, and so on.
    f"ALTER TABLE peers ADD COLUMN cipher VARCHAR NOT NULL DEFAULT '{WIREGUARD_CIPHER}' CHECK ({_CIPHER_CHECK})",
    "ALTER TABLE peers ADD COLUMN enabled BOOLEAN NOT NULL DEFAULT 1 CHECK (enabled IN (0, 1))",
    """CREATE TABLE last_seen (
        peer_id INTEGER NOT NULL PRIMARY KEY REFERENCES peers (id) ON DELETE CASCADE,
        public_key BLOB NOT NULL,
        handshake_at FLOAT NOT NULL,
        address VARCHAR NOT NULL,
        port INTEGER NOT NULL CHECK (1 <= port AND port <= 65535)
    )""",
)
SCHEMA_VERSION = 1 + len(_UPGRADES)
BUSY_TIMEOUT = 5.0  # seconds to wait for another process's transaction
LEAST_ROOM = 64 << 10
"""Free bytes below which the disk counts as full; SQLite needs 32 KiB to open a file (the index of its log)."""

_metadata = MetaData()

_schema = Table("schema_version", _metadata, Column("version", Integer, nullable=False))

_peers = Table(
    "peers",
    _metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String, nullable=False, unique=True),
    Column(
        "public_key", LargeBinary, CheckConstraint("length(public_key) = 32"), nullable=False, unique=True
    ),
    Column("preshared_key", LargeBinary, CheckConstraint("length(preshared_key) = 32")),
    Column("address", String, nullable=False, unique=True),
    Column("created_at", Float, nullable=False),
    Column("cipher", String, CheckConstraint(_CIPHER_CHECK), nullable=False, server_default=WIREGUARD_CIPHER),
    Column("enabled", Boolean, CheckConstraint("enabled IN (0, 1)"), nullable=False, server_default="1"),
)

_last_seen = Table(
    "last_seen",
    _metadata,
    Column("peer_id", ForeignKey("peers.id", ondelete="CASCADE"), primary_key=True),
    Column("public_key", LargeBinary, nullable=False),  # of the peer then: with another key it was not seen
    Column("handshake_at", Float, nullable=False),
    Column("address", String, nullable=False),
    Column("port", Integer, CheckConstraint("1 <= port AND port <= 65535"), nullable=False),
)

_publications = Table(
    "publications",
    _metadata,
    Column("id", Integer, primary_key=True),
    Column("protocol", String, CheckConstraint("protocol IN ('tcp', 'udp')"), nullable=False),
    Column("first_port", Integer, nullable=False),
    Column("last_port", Integer, nullable=False),
    Column("peer_id", ForeignKey("peers.id", ondelete="CASCADE"), nullable=False),
    Column("internal_port", Integer, nullable=False),
    CheckConstraint("1 <= first_port AND first_port <= last_port AND last_port <= 65535"),
    UniqueConstraint("protocol", "first_port"),
)


class SqliteStore:
    """`Store` in one file."""

    def __init__(self, path: Path) -> None:
        """Opens the file, or makes it; it is its owner's only (0600), for it has the peers' preshared keys. Raises
        `StoreError`; what is in a file that it cannot use is left unchanged."""
        self._path = path
        with self._explained():
            if not path.exists():
                path.touch(PRIVATE_FILE)
            _make_private(path.resolve())
            if path.stat().st_size:
                _check_integrity(path)
            self._engine = create_engine(
                URL.create("sqlite", database=str(path)),
                connect_args={"timeout": BUSY_TIMEOUT, "isolation_level": None},
            )
            event.listen(self._engine, "connect", _configure)
            event.listen(self._engine, "begin", _begin_immediate)
            try:
                self._prepare_schema()
            except BaseException:
                self._engine.dispose()
                raise

    def _prepare_schema(self) -> None:
        with self._engine.begin() as connection:
            if not self._engine.dialect.has_table(connection, _schema.name):
                _metadata.create_all(connection)
                connection.execute(insert(_schema).values(version=SCHEMA_VERSION))
                return
            version = connection.execute(select(_schema.c.version)).scalar()
            if not isinstance(version, int) or not 1 <= version <= SCHEMA_VERSION:
                raise StoreError(
                    f"{self._path}: has schema version {version}, but this Tidegate knows only up to {SCHEMA_VERSION}",
                    hint="run the Tidegate that made it, or a newer one",
                )
            for upgrade in _UPGRADES[version - 1 :]:
                connection.exec_driver_sql(upgrade)
            if version < SCHEMA_VERSION:
                connection.execute(update(_schema).values(version=SCHEMA_VERSION))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns errors of SQLite, SQLAlchemy and the file system into a `StoreError` of one line."""
        try:
            yield
        except DBAPIError as cause:
            raise self._error(cause.orig or cause) from cause
        except (SQLAlchemyError, sqlite3.Error, OSError) as cause:
            raise self._error(cause) from cause

    def _error(self, cause: BaseException) -> StoreError:
        if isinstance(cause, PermissionError) or "readonly" in str(cause) or "unable to open" in str(cause):
            return StoreError(
                f"{self._path}: cannot be opened ({cause})", hint="run as root, or name another --state-dir"
            )
        if self._is_out_of_room(cause):
            return StoreError(f"{self._path}: the disk is full", hint="free some space and try again")
        if isinstance(cause, sqlite3.OperationalError) and "locked" in str(cause):
            return StoreError(f"{self._path}: is locked by another process", hint="try again")
        if isinstance(cause, sqlite3.DatabaseError) and not isinstance(cause, sqlite3.OperationalError):
            return _damaged(self._path, str(cause))
        reason = cause.strerror if isinstance(cause, OSError) else cause
        return StoreError(f"{self._path}: {reason}")

    def _is_out_of_room(self, cause: BaseException) -> bool:
        if not isinstance(cause, sqlite3.Error):
            return False
        code = getattr(cause, "sqlite_errorcode", None)  # errors of the sqlite3 module itself lack it
        return code == sqlite3.SQLITE_FULL or (
            # SQLite does not expose errno.
            code in (sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE)
            and shutil.disk_usage(self._path.parent).free < LEAST_ROOM
        )

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        with self._explained(), self._engine.begin() as connection:
            yield connection

    def _peer_of(self, row: Row[Any]) -> Peer:
        try:
            return Peer(
                row.name,
                row.public_key,
                row.preshared_key,
                IPv4Address(row.address),
                row.created_at,
                row.cipher,
                row.enabled,
            )
        except ValueError:
            raise _damaged(self._path, f"the address of peer {row.name!r} is {row.address!r}") from None

    def _last_seen_of(self, row: Row[Any]) -> LastSeen:
        try:
            return LastSeen(row.handshake_at, (str(IPv4Address(row.address)), row.port))
        except ValueError:
            raise _damaged(self._path, f"a peer was last seen at {row.address!r}") from None

    def peers(self) -> Sequence[Peer]:
        with self._transaction() as connection:
            found = [self._peer_of(row) for row in connection.execute(select(_peers))]
        return sorted(found, key=lambda peer: peer.address)

    def peer(self, name: str) -> Peer:
        with self._transaction() as connection:
            return self._peer_of(_peer_row(connection, name))

    def add_peer(
        self,
        name: str,
        public_key: bytes,
        preshared_key: bytes | None,
        *,
        subnet: IPv4Network,
        reserved: frozenset[IPv4Address],
        address: IPv4Address | None,
        now: float,
        cipher: CipherName = WIREGUARD_CIPHER,
    ) -> Peer:
        with self._transaction() as connection:
            others = [self._peer_of(row) for row in connection.execute(select(_peers))]
            for other in others:
                if other.name == name:
                    raise ConflictError(
                        f"a peer named {name!r} already exists ({other.address})",
                        hint=f"choose another name, or run `tidegate peer remove {name}` first",
                    )
                if other.public_key == public_key:
                    raise key_taken(other.name)
                if other.address == address:
                    raise ConflictError(f"{address} already belongs to peer {other.name!r}")
            taken = reserved | {other.address for other in others}
            peer = Peer(name, public_key, preshared_key, address or lowest_free(subnet, taken), now, cipher)
            connection.execute(
                insert(_peers).values(
                    name=peer.name,
                    public_key=peer.public_key,
                    preshared_key=peer.preshared_key,
                    address=str(peer.address),
                    created_at=peer.created_at,
                    cipher=peer.cipher,
                )
            )
        return peer

    def remove_peer(self, name: str) -> tuple[Peer, Sequence[Publication]]:
        with self._transaction() as connection:
            row = _peer_row(connection, name)
            publications = [p for p in _all_publications(connection) if p.peer == name]
            # What was seen of it and its publications go with it.
            connection.execute(delete(_peers).where(_peers.c.id == row.id))
            return self._peer_of(row), publications

    def set_peer_enabled(self, name: str, enabled: bool) -> Peer:
        with self._transaction() as connection:
            row = _peer_row(connection, name)
            connection.execute(update(_peers).where(_peers.c.id == row.id).values(enabled=enabled))
            return self._peer_of(_peer_row(connection, name))

    def rename_peer(self, name: str, new_name: str) -> Peer:
        with self._transaction() as connection:
            row = _peer_row(connection, name)
            holder = connection.execute(select(_peers).where(_peers.c.name == new_name)).first()
            if holder is not None:
                raise ConflictError(
                    f"a peer named {new_name!r} already exists ({holder.address})", hint="choose another name"
                )
            connection.execute(update(_peers).where(_peers.c.id == row.id).values(name=new_name))
            return self._peer_of(_peer_row(connection, new_name))

    def replace_keys(self, name: str, public_key: bytes, preshared_key: bytes | None) -> Peer:
        with self._transaction() as connection:
            row = _peer_row(connection, name)
            holder = connection.execute(select(_peers).where(_peers.c.public_key == public_key)).first()
            if holder is not None:
                raise key_taken(holder.name)
            connection.execute(
                update(_peers)
                .where(_peers.c.id == row.id)
                .values(public_key=public_key, preshared_key=preshared_key)
            )
            return self._peer_of(_peer_row(connection, name))

    def last_seen(self) -> Mapping[bytes, LastSeen]:
        with self._transaction() as connection:
            rows = connection.execute(
                select(_last_seen).join(
                    _peers,
                    (_peers.c.id == _last_seen.c.peer_id) & (_peers.c.public_key == _last_seen.c.public_key),
                )
            )
            return {row.public_key: self._last_seen_of(row) for row in rows}

    def set_last_seen(self, seen: Mapping[bytes, LastSeen]) -> None:
        with self._transaction() as connection:
            holders = connection.execute(select(_peers.c.id, _peers.c.public_key)).all()
            rows = [
                {
                    "peer_id": row.id,
                    "public_key": row.public_key,
                    "handshake_at": seen[row.public_key].handshake_at,
                    "address": seen[row.public_key].endpoint[0],
                    "port": seen[row.public_key].endpoint[1],
                }
                for row in holders
                if row.public_key in seen
            ]
            if rows:
                connection.execute(insert(_last_seen).prefix_with("OR REPLACE"), rows)

    def publications(self) -> Sequence[Publication]:
        with self._transaction() as connection:
            return _all_publications(connection)

    def add_publication(self, publication: Publication) -> None:
        with self._transaction() as connection:
            peer = _peer_row(connection, publication.peer)
            for other in _all_publications(connection):
                if (
                    other.protocol == publication.protocol
                    and other.first_port <= publication.last_port
                    and publication.first_port <= other.last_port
                ):
                    raise _listed(
                        other,
                        f"{other.external_text} is already on the list of published ports, for {other.internal_text}",
                    )
                if (
                    (other.protocol, other.peer) == (publication.protocol, publication.peer)
                    and other.internal_port <= publication.internal_of(publication.last_port)
                    and publication.internal_port <= other.internal_of(other.last_port)
                ):
                    # What the client sends from there leaves from one external port (RFC 4787 REQ-1), not two.
                    raise _listed(
                        other,
                        f"{other.internal_text} is already on the list of published ports, as {other.external_text}",
                    )
            connection.execute(
                insert(_publications).values(
                    protocol=publication.protocol,
                    first_port=publication.first_port,
                    last_port=publication.last_port,
                    peer_id=peer.id,
                    internal_port=publication.internal_port,
                )
            )

    def remove_publication(self, protocol: TransportProtocol, first_port: int, last_port: int) -> Publication:
        with self._transaction() as connection:
            for publication in _all_publications(connection):
                if (publication.protocol, publication.first_port, publication.last_port) == (
                    protocol,
                    first_port,
                    last_port,
                ):
                    connection.execute(
                        delete(_publications).where(
                            _publications.c.protocol == protocol, _publications.c.first_port == first_port
                        )
                    )
                    return publication
        wanted = Publication(protocol, first_port, last_port, "", first_port)
        raise NotFoundError(f"{wanted.external_text} is not published", hint="see `tidegate publish list`")

    def close(self) -> None:
        self._engine.dispose()


def lowest_free(subnet: IPv4Network, taken: frozenset[IPv4Address]) -> IPv4Address:
    """The lowest host address of `subnet` that is not taken. Raises `ConflictError` when there is none."""
    for address in subnet.hosts():
        if address not in taken:
            return address
    raise ConflictError(
        f"every address of {subnet} is taken",
        hint="remove a peer, or choose a larger [gateway] subnet",
    )


def _make_private(path: Path) -> None:
    """The file and those that SQLite keeps beside it, which it makes with the mode of the file."""
    for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
        with suppress(FileNotFoundError):
            make_private(path.with_name(name))


def _check_integrity(path: Path) -> None:
    """Checks the whole file, opened read-only. Raises `StoreError` if it is damaged."""
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY_TIMEOUT)
    try:
        verdict = connection.execute("PRAGMA quick_check(1)").fetchone()
    finally:
        connection.close()
    if verdict != ("ok",):
        raise _damaged(path, str(verdict[0] if verdict else "no answer"))


def _damaged(path: Path, cause: str) -> StoreError:
    return StoreError(
        f"{path}: the database is damaged ({cause})",
        hint="restore it from a backup, or move it away to start afresh; nothing was changed",
    )


def _configure(connection: sqlite3.Connection, _record: object) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    # So that a peer that was reported as added survives a power failure.
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _peer_row(connection: Connection, name: str) -> Row[Any]:
    row = connection.execute(select(_peers).where(_peers.c.name == name)).first()
    if row is None:
        raise NotFoundError(f"there is no peer named {name!r}", hint="see `tidegate peer list`")
    return row


def _listed(other: Publication, message: str) -> ConflictError:
    """`message` claims no more than that it is listed: a gateway may have failed to publish it."""
    return ConflictError(
        message,
        hint=f"see `tidegate publish list` for its state, or run `tidegate publish remove {other.external_text}` first",
    )


def _all_publications(connection: Connection) -> list[Publication]:
    rows = connection.execute(
        select(_publications, _peers.c.name.label("peer"))
        .join(_peers, _peers.c.id == _publications.c.peer_id)
        .order_by(_publications.c.protocol, _publications.c.first_port)
    )
    return [
        Publication(row.protocol, row.first_port, row.last_port, row.peer, row.internal_port) for row in rows
    ]
