"""How much memory a gateway takes for many peers and many mappings.

A gateway in a lab of its own serves 10.66.0.0/16 and translates to several external addresses; its peers are written
to the store before it starts. ``engine/examples/crowd.rs`` then plays all of them from the client's namespace: real
handshakes, and for every mapping a request that must be answered. A tenth of the mappings are UDP ports, each of which
the gateway reserves with a socket, and so an open file, of which processes can commonly have 20,000. The rest are ICMP
identifiers, which need none. In the gateway's tables both take the same space.
"""

from __future__ import annotations

import itertools
import json
import time
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from tidegate.identity.keys import load_or_make_private_key, make_private_key, public_key_of
from tidegate.lab import udpecho
from tidegate.lab.processes import CommandError
from tidegate.lab.services import start_echo_server
from tidegate.lab.stacks import LISTEN_PORT, REPOSITORY, TidegateGateway
from tidegate.lab.topology import GATEWAY_ACCESS, INTERNET, Lab
from tidegate.state_dir import StateDir
from tidegate.store.sqlite import SqliteStore

COMMAND = REPOSITORY / "target/release/examples/crowd"

_SUBNET = IPv4Network("10.66.0.0/16")
_INNER_GATEWAY = IPv4Address("10.66.0.1")
_EXTERNAL = [f"203.0.113.{n}" for n in range(1, 5)]
_SETTINGS = f"""
[external]
addresses = {json.dumps(_EXTERNAL)}
[nat]
icmp_timeout = 600  # on a slow machine the first mappings must outlive the opening of the last ones
[gateway]
subnet = "{_SUBNET}"
"""


def resident_mib(
    peers: int,
    mappings: int,
    *,
    command: Path = COMMAND,
    shards: int = 0,
    open_files: int | None = None,
) -> float:
    """A gateway's resident set, in MiB, with `peers` live sessions and `mappings` NAT mappings.

    `shards` is the gateway's number of shards (0: its default), `open_files` its limit of open files (None: that of
    this process). Raises `CommandError` if a handshake or a request was not answered.
    """
    with Lab() as lab:
        start_echo_server(lab.internet, INTERNET).wait_for(udpecho.READY)
        for address in _EXTERNAL[1:]:
            lab.gateway.ip(f"address add {address}/24 dev external")
        gateway = TidegateGateway(
            lab,
            config=f"{_SETTINGS}shards = {shards}\n",
            address=str(_INNER_GATEWAY),
            open_files=open_files,
        )
        gateway_key, clients = _register(StateDir(gateway.state), peers)
        gateway.start()
        endpoint = f"{GATEWAY_ACCESS}:{LISTEN_PORT}"
        play = [str(command), endpoint, gateway_key, str(_INNER_GATEWAY), INTERNET, str(mappings)]
        lab.client.run(play, stdin=clients, timeout=120.0)
        resident = gateway.process.resident_bytes()
        counted = json.loads(gateway.command("nat", "stats", "--json"))["mappings"]
        if sum(counted.values()) < mappings:
            raise CommandError(play, 0, f"{mappings} mappings were answered, the gateway has {counted}")
        return resident / (1 << 20)


def _register(state: StateDir, peers: int) -> tuple[str, str]:
    """Writes peers to the store. Returns the gateway's public key and the clients, in the format that the crowd
    reads."""
    state.prepare()
    gateway_key = public_key_of(load_or_make_private_key(state.key)).hex()
    store = SqliteStore(state.database)
    lines = []
    try:
        for number, address in enumerate(itertools.islice(_SUBNET.hosts(), 1, peers + 1)):
            key = make_private_key()
            store.add_peer(
                f"client{number}",
                public_key_of(key),
                None,
                subnet=_SUBNET,
                reserved=frozenset((_INNER_GATEWAY,)),
                address=address,
                now=time.time(),
            )
            lines.append(f"{key.hex()} {address}\n")
    finally:
        store.close()
    return gateway_key, "".join(lines)
