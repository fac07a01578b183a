"""A gateway's name is looked up although the tunnel's resolver is out of reach."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from ipaddress import IPv4Address

import dns.message
import dns.rrset
import pytest

from tests.unit.dns.loopback import Resolver, good, servfail, silent
from tidegate.errors import HostNetworkError
from tidegate.net import Endpoint
from tidegate.whereabouts import find_anew

NAME = Endpoint("vpn.example", 51820)
Answer = Callable[[dns.message.Message], "bytes | None"]


@pytest.fixture(autouse=True)
def _the_hosts_own_look_up_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidegate.whereabouts.TIMEOUT", 1.0)

    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", fail)


def alias(query: dns.message.Message) -> bytes:
    response = dns.message.make_response(query)
    name = query.question[0].name
    response.answer.append(dns.rrset.from_text(name, 60, "IN", "CNAME", "host.example."))
    response.answer.append(dns.rrset.from_text("host.example.", 60, "IN", "A", "192.0.2.81"))
    return response.to_wire()


def empty(query: dns.message.Message) -> bytes:
    return dns.message.make_response(query).to_wire()


def find(*answers: Answer) -> IPv4Address:
    async def scenario() -> IPv4Address:
        resolvers = [Resolver(answer) for answer in answers]
        async with contextlib.AsyncExitStack() as stack:
            for resolver in resolvers:
                await stack.enter_async_context(resolver.running())
            return await find_anew(NAME, [resolver.address for resolver in resolvers], 0)

    return asyncio.run(scenario())


def test_the_resolvers_of_before_are_asked_one_after_the_other() -> None:
    assert find(good) == IPv4Address("192.0.2.80")
    assert find(silent, servfail, empty, alias) == IPv4Address("192.0.2.81")


def test_where_nobody_knows_it_the_hosts_own_refusal_is_told() -> None:
    with pytest.raises(HostNetworkError, match=r"vpn\.example cannot be resolved: Temporary failure"):
        find(silent, empty)
    with pytest.raises(HostNetworkError):
        find()
