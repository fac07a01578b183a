"""Peers and publications in SQLite: addresses, conflicts, and processes at the same time."""

from __future__ import annotations

import multiprocessing
import stat
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from tidegate.errors import ConflictError, NotFoundError, UsageError
from tidegate.store import Publication, check_peer_name
from tidegate.store.sqlite import SqliteStore

SUBNET = IPv4Network("10.66.77.0/24")
GATEWAY = frozenset({IPv4Address("10.66.77.1")})


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


def test_a_peer_gets_the_lowest_free_address(store: SqliteStore) -> None:
    assert [add(store, name) for name in "abc"] == ["10.66.77.2", "10.66.77.3", "10.66.77.4"]
    store.remove_peer("b")
    assert add(store, "d") == "10.66.77.3"
    assert add(store, "e") == "10.66.77.5"


def test_a_chosen_address_is_kept_and_not_given_twice(store: SqliteStore) -> None:
    assert add(store, "a", address="10.66.77.2") == "10.66.77.2"
    assert add(store, "b") == "10.66.77.3"
    with pytest.raises(ConflictError, match=r"10\.66\.77\.2 belongs to peer 'a'"):
        add(store, "c", address="10.66.77.2")


def test_a_name_and_a_key_belong_to_one_peer(store: SqliteStore) -> None:
    add(store, "a")
    with pytest.raises(ConflictError, match=r"named 'a' exists already \(10\.66\.77\.2\)"):
        add(store, "a", key=b"k" * 32)
    with pytest.raises(ConflictError, match="peer 'a' has this public key"):
        add(store, "b", key=b"a".ljust(32, b"\0"))
    assert [peer.name for peer in store.peers()] == ["a"]


def test_a_full_subnet_is_told_and_nothing_is_evicted(store: SqliteStore) -> None:
    small = IPv4Network("10.66.77.0/30")
    assert add(store, "a", subnet=small) == "10.66.77.2"
    with pytest.raises(ConflictError, match="every address of 10.66.77.0/30 is taken"):
        add(store, "b", subnet=small)
    assert len(store.peers()) == 1


def test_peers_survive_and_come_in_the_order_of_their_addresses(tmp_path: Path) -> None:
    path = tmp_path / "tidegate.db"
    first = SqliteStore(path)
    add(first, "late", address="10.66.77.20")
    add(first, "early", address="10.66.77.3")
    first.close()
    assert [peer.name for peer in SqliteStore(path).peers()] == ["early", "late"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_an_unknown_peer_is_not_found(store: SqliteStore) -> None:
    with pytest.raises(NotFoundError, match="no peer named 'x'"):
        store.peer("x")
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
    ("first", "last"), [(8000, 8000), (8010, 8020), (7990, 8000), (7000, 9000), (8005, 8006)]
)
def test_publications_do_not_overlap(store: SqliteStore, first: int, last: int) -> None:
    add(store, "a")
    store.add_publication(Publication("tcp", 8000, 8010, "a", 80))
    with pytest.raises(ConflictError, match="tcp/8000-8010 is published to a:80-90 already"):
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
