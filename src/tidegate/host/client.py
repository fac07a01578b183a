"""The host as a client sees it: its own TUN device, routes, rules and resolver, all restored at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from ipaddress import IPv4Address, IPv4Interface
from typing import Protocol

from tidegate.dns.resolvers import Resolver, host_resolvers
from tidegate.host.netlink import CLIENT_GROUPS, configure_tun, watch
from tidegate.host.privileges import CAP_NET_ADMIN, check_privileges
from tidegate.host.resolver import DnsOutcome, configured_dns, remove_leftover_record
from tidegate.host.routes import Renewal, RoutePlan, apply_routes, remove_leftovers, renew_routes, wide_routes


class ClientHost(Protocol):
    """What a client needs from its host. Methods block briefly."""

    def check_privileges(self) -> None: ...
    def remove_leftovers(self, tun_name: str, *, routes: bool, dns: bool) -> None:
        """Removes routes and rules, or DNS settings, that a killed client with this device name left behind. Raises
        `HostNetworkError`."""

    def configure_tun(self, name: str, address: IPv4Interface, mtu: int) -> None: ...
    def resolvers(self) -> Sequence[Resolver]: ...
    def routes(self, plan: RoutePlan, tun_name: str) -> AbstractContextManager[RoutePlan]:
        """Yields the part of the plan that is in force: as much as this kernel supports."""

    def renew_routes(self, plan: RoutePlan, tun_name: str) -> Renewal: ...
    def wide_routes(self, plan: RoutePlan) -> Sequence[str]:
        """Describes the host's routes that the tunnel goes before because they are too wide for a local network's.
        Raises `HostNetworkError`."""

    def watch(self, changed: Callable[[], None]) -> AbstractContextManager[None]: ...
    def dns(
        self, tun_name: str, servers: Sequence[IPv4Address], search: Sequence[str]
    ) -> AbstractContextManager[DnsOutcome]: ...


class LinuxClientHost(ClientHost):
    """The host that this process runs on (its network namespace)."""

    def check_privileges(self) -> None:
        check_privileges((CAP_NET_ADMIN,))

    def remove_leftovers(self, tun_name: str, *, routes: bool, dns: bool) -> None:
        if dns:
            remove_leftover_record(tun_name)
        if routes:
            remove_leftovers()

    def configure_tun(self, name: str, address: IPv4Interface, mtu: int) -> None:
        configure_tun(name, address, mtu)

    def resolvers(self) -> Sequence[Resolver]:
        return host_resolvers()

    @contextmanager
    def routes(self, plan: RoutePlan, tun_name: str) -> Iterator[RoutePlan]:
        with apply_routes(plan, tun_name) as in_force:
            yield in_force

    def renew_routes(self, plan: RoutePlan, tun_name: str) -> Renewal:
        return renew_routes(plan, tun_name)

    def wide_routes(self, plan: RoutePlan) -> Sequence[str]:
        return wide_routes(plan)

    def watch(self, changed: Callable[[], None]) -> AbstractContextManager[None]:
        return watch(changed, CLIENT_GROUPS)

    @contextmanager
    def dns(
        self, tun_name: str, servers: Sequence[IPv4Address], search: Sequence[str]
    ) -> Iterator[DnsOutcome]:
        with configured_dns(tun_name, servers, search) as outcome:
            yield outcome
