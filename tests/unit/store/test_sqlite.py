"""Peers and publications in SQLite: addresses, conflicts, and processes at the same time."""

from __future__ import annotations

import multiprocessing
import sqlite3
import stat
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from types import SimpleNamespace

import pytest

from tidegate.errors import ConflictError, NotFoundError, StoreError, UsageError
from tidegate.store import LastSeen, Publication, check_peer_name
from tidegate.store.sqlite import SCHEMA_VERSION, SqliteStore

SUBNET = IPv4Network("10.66.77.0/24")
GATEWAY = frozenset({IPv4Address("10.66.77.1")})


VERSION_1 = """
CREATE TABLE schema_version (version INTEGER NOT NULL);
INSERT INTO schema_version VALUES (1);
CREATE TABLE peers (
    id INTEGER NOT NULL PRIMARY KEY,
    name VARCHAR NOT NULL UNIQUE,
    public_key BLOB NOT NULL CHECK (length(public_key) = 32) UNIQUE,
    preshared_key BLOB CHECK (length(preshared_key) = 32),
    address VARCHAR NOT NULL UNIQUE,
    created_at FLOAT NOT NULL
);
CREATE TABLE publications (
    id INTEGER NOT NULL PRIMARY KEY,
    protocol VARCHAR NOT NULL CHECK (protocol IN ('tcp', 'udp')),
    first_port INTEGER NOT NULL,
    last_port INTEGER NOT NULL,
    peer_id INTEGER NOT NULL REFERENCES peers (id) ON DELETE CASCADE,
    internal_port INTEGER NOT NULL,
    CHECK (1 <= first_port AND first_port <= last_port AND last_port <= 65535),
    UNIQUE (protocol, first_port)
);
INSERT INTO peers VALUES (1, 'a', CAST('kkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkk' AS BLOB), NULL, '10.66.77.2', 1000.0);
INSERT INTO publications VALUES (1, 'tcp', 8000, 8000, 1, 80);
"""
"""A store as Tidegate made it before peers had ciphers."""


def add(
    store: SqliteStore,
    name: str,
    *,
    address: str | None = None,
    key: bytes | None = None,
    subnet: IPv4Network = SUBNET,
) -> str:
    peer = store.add_peer(
        name,
        key or name.encode().ljust(32, b"\0"),
        None,
        subnet=subnet,
        reserved=GATEWAY,
        address=IPv4Address(address) if address else None,
        now=1000.0,
    )
    return str(peer.address)


@pytest.fixture
def store(tmp_path: Path) -> SqliteStore:
    return SqliteStore(tmp_path / "tidegate.db")


@pytest.mark.parametrize("name", ["a?b", "a%41b", "a#b", "a b", "?mode=ro", "file:x"])
def test_the_file_is_where_its_path_says_whatever_characters_it_has(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    for _ in range(2):
        SqliteStore(folder / "tidegate.db").close()
    assert stat.S_IMODE((folder / "tidegate.db").stat().st_mode) == 0o600
    assert [entry.name for entry in folder.iterdir()] == ["tidegate.db"]
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_a_database_that_others_may_read_is_closed_to_them(tmp_path: Path, store: SqliteStore) -> None:
    add(store, "a")
    files = [tmp_path / name for name in ("tidegate.db", "tidegate.db-shm", "tidegate.db-wal")]
    for file in files:
        file.chmod(0o644)  # as one is that was restored with `cp`
    (tmp_path / "link.db").symlink_to("tidegate.db")
    SqliteStore(tmp_path / "link.db").close()
    assert [oct(stat.S_IMODE(file.stat().st_mode)) for file in files] == ["0o600"] * 3


def test_an_empty_file_that_others_may_read_is_closed_to_them(tmp_path: Path) -> None:
    path = tmp_path / "tidegate.db"
    path.touch(0o644)
    SqliteStore(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_peer_gets_the_lowest_free_address(store: SqliteStore) -> None:
    assert [add(store, name) for name in "abc"] == ["10.66.77.2", "10.66.77.3", "10.66.77.4"]
    store.remove_peer("b")
    assert add(store, "d") == "10.66.77.3"
    assert add(store, "e") == "10.66.77.5"


def test_a_chosen_address_is_kept_and_not_given_twice(store: SqliteStore) -> None:
    assert add(store, "a", address="10.66.77.2") == "10.66.77.2"
    assert add(store, "b") == "10.66.77.3"
    with pytest.raises(ConflictError, match=r"10\.66\.77\.2 already belongs to peer 'a'"):
        add(store, "c", address="10.66.77.2")


def test_a_name_and_a_key_belong_to_one_peer(store: SqliteStore) -> None:
    add(store, "a")
    with pytest.raises(ConflictError, match=r"named 'a' already exists \(10\.66\.77\.2\)"):
        add(store, "a", key=b"k" * 32)
    with pytest.raises(ConflictError, match="peer 'a' already has this public key"):
        add(store, "b", key=b"a".ljust(32, b"\0"))
    assert [peer.name for peer in store.peers()] == ["a"]


def test_a_full_subnet_is_told_and_nothing_is_evicted(store: SqliteStore) -> None:
    small = IPv4Network("10.66.77.0/30")
    assert add(store, "a", subnet=small) == "10.66.77.2"
    with pytest.raises(ConflictError, match="every address of 10.66.77.0/30 is taken"):
        add(store, "b", subnet=small)
    assert len(store.peers()) == 1


def test_a_full_disk_is_told_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SqliteStore(tmp_path / "tidegate.db").close()

    def small(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA max_page_count = 1")  # no more than it has

    monkeypatch.setattr("tidegate.store.sqlite._configure", small)
    store = SqliteStore(tmp_path / "tidegate.db")
    with pytest.raises(StoreError, match=r"tidegate\.db: the disk is full; free some space"):
        for number in range(200):
            add(store, f"peer{number}", subnet=IPv4Network("10.0.0.0/8"))


@pytest.mark.parametrize(("free", "told"), [(8192, "the disk is full"), (1 << 30, "disk I/O error")])
def test_an_error_of_a_disk_that_has_no_room_is_that_of_a_full_one(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch, free: int, told: str
) -> None:
    def fail(*_: object) -> None:
        failure = sqlite3.OperationalError("disk I/O error")
        failure.sqlite_errorcode = sqlite3.SQLITE_IOERR_SHMSIZE
        raise failure

    monkeypatch.setattr("tidegate.store.sqlite._peer_row", fail)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(StoreError, match=told):
        store.peer("a")


def test_peers_survive_and_come_in_the_order_of_their_addresses(tmp_path: Path) -> None:
    path = tmp_path / "tidegate.db"
    first = SqliteStore(path)
    add(first, "late", address="10.66.77.20")
    add(first, "early", address="10.66.77.3")
    first.close()
    assert [peer.name for peer in SqliteStore(path).peers()] == ["early", "late"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_cipher_is_kept(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "tidegate.db")
    add(store, "slow")
    store.add_peer(
        "fast",
        b"k" * 32,
        None,
        subnet=SUBNET,
        reserved=GATEWAY,
        address=None,
        now=1000.0,
        cipher="aes-256-gcm",
    )
    store.close()
    ciphers = {peer.name: peer.cipher for peer in SqliteStore(tmp_path / "tidegate.db").peers()}
    assert ciphers == {"slow": "chacha20-poly1305", "fast": "aes-256-gcm"}


def test_a_store_of_version_1_is_upgraded_with_all_that_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "tidegate.db"
    with sqlite3.connect(path) as old:
        old.executescript(VERSION_1)
    old.close()
    for _ in range(2):
        store = SqliteStore(path)
        (peer,) = store.peers()
        assert (peer.name, peer.public_key, peer.cipher) == ("a", b"k" * 32, "chacha20-poly1305")
        assert peer.enabled is True
        assert [entry.external_text for entry in store.publications()] == ["tcp/8000"]
        store.close()
    with sqlite3.connect(path) as upgraded:
        assert upgraded.execute("SELECT version FROM schema_version").fetchall() == [(SCHEMA_VERSION,)]
        for nonsense in ("cipher = 'rot13'", "enabled = 2"):
            with pytest.raises(sqlite3.IntegrityError, match="CHECK"):
                upgraded.execute(f"UPDATE peers SET {nonsense}")
    upgraded.close()


def test_a_disabled_peer_is_kept_with_all_that_it_has(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "tidegate.db")
    add(store, "a")
    store.add_publication(Publication("tcp", 8000, 8000, "a", 80))
    before = store.peer("a")
    disabled = store.set_peer_enabled("a", False)
    assert (disabled.enabled, disabled.public_key) == (False, before.public_key)
    store.close()
    store = SqliteStore(tmp_path / "tidegate.db")
    assert store.peers() == [disabled]
    assert [entry.external_text for entry in store.publications()] == ["tcp/8000"]
    assert add(store, "b") == "10.66.77.3", "its address is its own"
    assert store.set_peer_enabled("a", True) == before


def test_a_renamed_peer_keeps_all_but_its_name(store: SqliteStore) -> None:
    add(store, "a")
    add(store, "b")
    before = store.peer("a")
    store.add_publication(Publication("tcp", 8000, 8000, "a", 80))
    assert store.rename_peer("a", "c") == replace(before, name="c") == store.peer("c")
    assert [entry.internal_text for entry in store.publications()] == ["c:80"]
    for taken in ("b", "c"):
        with pytest.raises(ConflictError, match=rf"named '{taken}' already exists \(10\.66\.77\.\d\)"):
            store.rename_peer("c", taken)
    assert [peer.name for peer in store.peers()] == ["c", "b"]


def test_new_keys_are_nobodys_and_all_else_stays(store: SqliteStore) -> None:
    add(store, "a")
    add(store, "b")
    before = store.peer("a")
    store.add_publication(Publication("tcp", 8000, 8000, "a", 80))
    renewed = store.replace_keys("a", b"n" * 32, b"p" * 32)
    assert renewed == replace(before, public_key=b"n" * 32, preshared_key=b"p" * 32) == store.peer("a")
    assert [entry.internal_text for entry in store.publications()] == ["a:80"]
    for holder, key in (("a", b"n" * 32), ("b", store.peer("b").public_key)):
        with pytest.raises(ConflictError, match=f"peer '{holder}' already has this public key"):
            store.replace_keys("a", key, None)
    assert store.peer("a") == renewed


def test_an_upgraded_store_has_the_tables_of_a_new_one(tmp_path: Path) -> None:
    old, new = tmp_path / "old.db", tmp_path / "new.db"
    with sqlite3.connect(old) as made:
        made.executescript(VERSION_1)
    made.close()

    def columns(path: Path) -> set[tuple[object, ...]]:
        SqliteStore(path).close()
        with sqlite3.connect(path) as opened:
            tables = opened.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall()
            found = {
                (table, *column[1:4], bool(column[5]))
                for (table,) in tables
                for column in opened.execute(f"PRAGMA table_info({table})")
            }
        opened.close()
        return found

    assert columns(old) == columns(new)


HERE = LastSeen(2000.5, ("203.0.113.9", 4000))


def test_when_and_where_a_peer_was_last_seen_is_kept(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "tidegate.db")
    add(store, "a", key=b"a" * 32)
    add(store, "b", key=b"b" * 32)
    assert store.last_seen() == {}
    store.set_last_seen({b"a" * 32: LastSeen(1000.0, ("198.51.100.7", 1)), b"x" * 32: HERE})
    store.set_last_seen({b"a" * 32: HERE})
    store.set_last_seen({})
    store.close()
    again = SqliteStore(tmp_path / "tidegate.db")
    assert again.last_seen() == {b"a" * 32: HERE}
    again.remove_peer("a")
    add(again, "a", key=b"a" * 32)
    assert again.last_seen() == {}, "it goes with its peer"


def test_a_peer_with_another_key_has_not_been_seen(tmp_path: Path) -> None:
    """As where the old key was stolen: nobody is to be called where its holder was."""
    path = tmp_path / "tidegate.db"
    store = SqliteStore(path)
    add(store, "a", key=b"a" * 32)
    store.set_last_seen({b"a" * 32: HERE})
    with sqlite3.connect(path) as renewed:
        renewed.execute("UPDATE peers SET public_key = ?", (b"n" * 32,))
    renewed.close()
    assert store.last_seen() == {}
    store.set_last_seen({b"n" * 32: HERE})
    assert store.last_seen() == {b"n" * 32: HERE}


def test_an_endpoint_that_is_none_is_told_as_damage(store: SqliteStore) -> None:
    add(store, "a", key=b"a" * 32)
    store.set_last_seen({b"a" * 32: LastSeen(1000.0, ("nowhere", 4000))})
    with pytest.raises(StoreError, match="the database is damaged .a peer was last seen at 'nowhere'"):
        store.last_seen()


def test_an_unknown_peer_is_not_found(store: SqliteStore) -> None:
    with pytest.raises(NotFoundError, match="no peer named 'x'"):
        store.peer("x")
    with pytest.raises(NotFoundError, match="no peer named 'x'"):
        store.set_peer_enabled("x", False)
    with pytest.raises(NotFoundError, match="no peer named 'x'"):
        store.rename_peer("x", "y")
    with pytest.raises(NotFoundError, match="no peer named 'x'"):
        store.replace_keys("x", b"k" * 32, None)
    with pytest.raises(NotFoundError, match="no peer named 'x'"):
        store.remove_peer("x")
    with pytest.raises(NotFoundError, match="no peer named 'x'"):
        store.add_publication(Publication("tcp", 80, 80, "x", 80))


def test_a_peers_publications_go_with_it(store: SqliteStore) -> None:
    add(store, "a")
    add(store, "b")
    store.add_publication(Publication("tcp", 8000, 8010, "a", 80))
    store.add_publication(Publication("tcp", 9000, 9000, "b", 90))
    peer, publications = store.remove_peer("a")
    assert peer.name == "a"
    assert [entry.external_text for entry in publications] == ["tcp/8000-8010"]
    assert [entry.external_text for entry in store.publications()] == ["tcp/9000"]


@pytest.mark.parametrize(
    ("first", "last", "internal"), [(9000, 9000, 85), (9000, 9020, 70), (9000, 9001, 90)]
)
def test_a_port_of_a_client_is_published_once(
    store: SqliteStore, first: int, last: int, internal: int
) -> None:
    add(store, "a")
    add(store, "b")
    store.add_publication(Publication("tcp", 8000, 8010, "a", 80))
    with pytest.raises(ConflictError, match="a:80-90 is already on the list of .*, as tcp/8000-8010; see"):
        store.add_publication(Publication("tcp", first, last, "a", internal))
    store.add_publication(Publication("udp", first, last, "a", internal))
    store.add_publication(Publication("tcp", first, last, "b", internal))


@pytest.mark.parametrize(
    ("first", "last"), [(8000, 8000), (8010, 8020), (7990, 8000), (7000, 9000), (8005, 8006)]
)
def test_publications_do_not_overlap(store: SqliteStore, first: int, last: int) -> None:
    add(store, "a")
    store.add_publication(Publication("tcp", 8000, 8010, "a", 80))
    with pytest.raises(ConflictError, match="tcp/8000-8010 is already on the list of .*, for a:80-90; see"):
        store.add_publication(Publication("tcp", first, last, "a", 1000))
    store.add_publication(Publication("udp", first, last, "a", 1000))


def test_a_publication_is_removed_by_its_exact_ports(store: SqliteStore) -> None:
    add(store, "a")
    store.add_publication(Publication("tcp", 8000, 8010, "a", 80))
    with pytest.raises(NotFoundError, match="tcp/8000 is not published"):
        store.remove_publication("tcp", 8000, 8000)
    assert store.remove_publication("tcp", 8000, 8010).internal_text == "a:80-90"
    assert store.publications() == []


def _add_many(path: Path, prefix: str, count: int) -> None:
    store = SqliteStore(path)
    for number in range(count):
        add(store, f"{prefix}{number}")
    store.close()


def test_processes_that_add_at_the_same_time_get_different_addresses(tmp_path: Path) -> None:
    path = tmp_path / "tidegate.db"
    SqliteStore(path).close()
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_add_many, args=(path, prefix, 15)) for prefix in "xyz"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    addresses = [peer.address for peer in SqliteStore(path).peers()]
    assert addresses == [IPv4Address("10.66.77.2") + n for n in range(45)]


@pytest.mark.parametrize("name", ["a", "alice", "Alice-2.phone_x", "7", "a" * 63])
def test_ordinary_names_are_taken(name: str) -> None:
    assert check_peer_name(name) == name


@pytest.mark.parametrize("name", ["", "-a", "a.", "a b", "a/b", "ä", "a\n", "a" * 64, "--json"])
def test_names_that_would_trouble_files_or_shells_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="is not a peer name"):
        check_peer_name(name)


def test_a_peer_shows_no_keys(store: SqliteStore) -> None:
    add(store, "a")
    assert "key" not in repr(store.peer("a"))
