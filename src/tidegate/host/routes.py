"""The client's routes: planned as a value, then added and removed through netlink.

A tunnel that carries everything must not carry its own datagrams. So, as with wg-quick, the tunnel's routes go into a
table of their own; a rule sends everything there that does not carry the transport socket's mark, and another rule
before it lets the main table's more specific routes (the local network) win:

    29797: from all to 192.0.2.7 ipproto udp dport 51820 lookup main
    29798: from all lookup main suppress_prefixlength 7
    29799: not from all fwmark 0x7467 lookup 29799

The main table is not the user's alone: the network that the host is in writes to it (DHCP option 121, router
advertisements). wg-quick sets aside its default route only, so that two routes for half of all addresses each, or one
for 2000::/3, are enough to pull everything out of the tunnel (CVE-2024-3661, "TunnelVision"). Here nothing wins that is
too wide for a local network: prefixes up to /7, and up to /31 for IPv6. More specific ones do, whoever wrote them.
`wide_routes` finds those that were set aside.

The first rule (IPv4 only) is for strict reverse path filtering (`rp_filter` 1). The kernel then looks for the way back
to the sender of each packet that arrives, and drops the packet if that way is not through the device that it came from.
The gateway's answers carry no mark on arrival, so without that rule the way back to the gateway would be the tunnel.
(wg-quick has netfilter restore the mark.) The rule moves with the gateway (`RoutePlan.towards`). What else it lets past
the tunnel is other programs' datagrams to the gateway's own tunnel port, and nothing more: the kernel looks with the
packet's protocol and ports, swapped. A fragment has no ports; so, with strict filtering, fragmented answers pass only
where netfilter's connection tracking, as a firewall uses it, reassembles them before.

IPv6 is not carried, so where a profile claims it (``::/0``), the table has an *unreachable* route for it:
programs fall back to IPv4 at once, and do not use IPv6 past the tunnel, except in the local network.

A client that is killed (SIGKILL) cannot undo anything. Its device disappears with it, and the device's routes; the
rules, the *unreachable* route (which belongs to no device) and `src_valid_mark` stay: IPv4 goes its old way, IPv6 is
blocked. Table, mark and priorities are constants, so that the next client recognises what it finds, and removes it
before it does anything else. A client that routes only some networks leaves its *unreachable* routes among those of the
host; the next one that wants the same routes recognises them by their protocol number, and takes them over.
`src_valid_mark` is left as it is found: it may be the administrator's.

Others remove things while a client runs: the kernel, the routes of a device that goes down; systemd-networkd, when it
starts, all rules and routes that are not its own. `renew_routes` adds what is missing.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import structlog

from tidegate.errors import ConflictError, HostNetworkError
from tidegate.host import MAIN_TABLE
from tidegate.host.full_tunnel_lock import PATIENCE, already_routed_error, full_tunnel_lock
from tidegate.host.netlink import IFF_UP, INET6_PROC, RTN_UNICAST, RTN_UNREACHABLE, rtnetlink
from tidegate.host.route_dump import RTA_GATEWAY, RTA_OIF, RTA_TABLE, dump_routes, number

log = structlog.get_logger("tidegate.routes")

FWMARK = 0x7467  # "tg"
TABLE = FWMARK
PRIORITY_GATEWAY, PRIORITY_MAIN, PRIORITY_TUNNEL = TABLE - 2, TABLE - 1, TABLE
PROTOCOL = 0x74  # "t": the origin of a route (rtnetlink(7), rtm_protocol)
FIB_RULE_INVERT = 2  # linux/fib_rules.h
WIDEST_LOCAL = {4: 8, 6: 32}
"""The shortest prefix of the main table that goes before the tunnel: 10.0.0.0/8, a provider's whole IPv6 network."""
MOST_NAMED = 8
"""How many wide routes `wide_routes` describes."""
SRC_VALID_MARK = Path("/proc/sys/net/ipv4/conf/all/src_valid_mark")
_GONE = {errno.ENOENT, errno.ESRCH, errno.ENODEV, errno.EAFNOSUPPORT}

_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}

Network = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True)
class TunnelRoute:
    """Sends a prefix into the tunnel, or nowhere (`unreachable`)."""

    destination: Network
    table: int
    unreachable: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """A policy routing rule (ip-rule(8))."""

    version: int
    """4 or 6."""
    priority: int
    table: int
    unless_fwmark: int | None = None
    suppress_prefixlength: int | None = None
    gateway: tuple[IPv4Address, int] | None = None
    """Applies only to UDP datagrams to this address and port."""


@dataclass(frozen=True, slots=True)
class RoutePlan:
    """What the client changes on its host, in order."""

    fwmark: int
    """The mark of the transport socket; 0: none."""
    routes: tuple[TunnelRoute, ...]
    rules: tuple[Rule, ...]

    @property
    def has_policy(self) -> bool:
        return bool(self.rules)

    def towards(self, endpoint: IPv4Address, port: int) -> RoutePlan:
        """The plan for a gateway that has moved there."""
        rules = (
            replace(rule, gateway=(endpoint, port)) if rule.gateway is not None else rule
            for rule in self.rules
        )
        return replace(self, rules=tuple(rules))


Renewal = Literal["whole", "renewed", "down"]
"""The state of the plan. *whole*: nothing was missing; *renewed*: what was missing has been added; *down*: the tunnel's
device is down, and traffic bypasses it."""


def plan_routes(allowed_ips: tuple[Network, ...], endpoint: IPv4Address, port: int) -> RoutePlan:
    """Plain routes if they cannot carry the tunnel's own datagrams, policy routing if they would. Pure."""
    swallows_itself = any(isinstance(network, IPv4Network) and endpoint in network for network in allowed_ips)
    defaults = any(network.prefixlen == 0 for network in allowed_ips)
    policy = swallows_itself or defaults
    table = TABLE if policy else MAIN_TABLE
    routes = tuple(TunnelRoute(network, table, unreachable=network.version == 6) for network in allowed_ips)
    if not policy:
        return RoutePlan(0, routes, ())
    rules: list[Rule] = []
    for version in sorted({network.version for network in allowed_ips}):
        if version == 4:
            rules.append(Rule(version, PRIORITY_GATEWAY, MAIN_TABLE, gateway=(endpoint, port)))
        too_wide = WIDEST_LOCAL[version] - 1
        rules.append(Rule(version, PRIORITY_MAIN, MAIN_TABLE, suppress_prefixlength=too_wide))
        rules.append(Rule(version, PRIORITY_TUNNEL, TABLE, unless_fwmark=FWMARK))
    return RoutePlan(FWMARK, routes, tuple(rules))


@contextmanager
def apply_routes(plan: RoutePlan, tun_name: str) -> Iterator[RoutePlan]:
    """Keeps the plan in force while the block lasts, and yields the part of it that this kernel supports. Raises
    `HostNetworkError`, with nothing left behind; `ConflictError` if another client of this host (network namespace)
    already routes everything."""
    with ExitStack() as undo:
        if plan.has_policy:
            undo.enter_context(full_tunnel_lock(patience=PATIENCE))
            _remove_ours(own=tun_name)
        with rtnetlink(f"find {tun_name}") as ip:
            device = next(iter(ip.link_lookup(ifname=tun_name)), 0)
        if not device:
            raise HostNetworkError(f"the TUN device {tun_name} is gone")
        possible = _possible(plan)
        for route in possible.routes:
            undo.enter_context(_added_route(route, device))
        for rule in possible.rules:
            undo.enter_context(_added_rule(rule))
        if plan.has_policy:
            undo.enter_context(_source_check_sees_mark())
        yield possible


def renew_routes(plan: RoutePlan, tun_name: str) -> Renewal:
    """Adds what is missing of the plan that `apply_routes` yielded, or of that plan `towards` a gateway that has moved
    (the rule for where it was is removed once all is there); nothing while the tunnel's device is down, which cannot
    have routes.

    Raises `HostNetworkError` after adding as much as possible.
    """
    with rtnetlink(f"look at the routes through {tun_name}") as ip:
        [*found] = ip.get_links(ifname=tun_name)
        if not found or not found[0]["flags"] & IFF_UP:
            return "down"
        device = found[0]["index"]
        routes_there, rules_there = _routes_there(plan.routes, device), _rules_there(ip, plan)
    missing: list[Callable[[], object]] = [
        *(partial(_add_rule, rule) for rule in plan.rules if rule not in rules_there),
        *(partial(_add_route, route, device) for route in plan.routes if route not in routes_there),
    ]
    refusals = []
    for add in missing:
        try:
            add()
        except HostNetworkError as refused:
            refusals.append(refused)
    if refusals:
        raise refusals[0]
    outdated = _outdated(rules_there, plan)
    for rule in outdated:
        _remove_rule(rule)
    return "renewed" if missing or outdated else "whole"


def wide_routes(plan: RoutePlan) -> tuple[str, ...]:
    """Describes the main table's routes that are no default ones, but too wide to go before the tunnel: either the
    network is hostile, or another VPN has made them. Raises `HostNetworkError`."""
    versions = sorted(rule.version for rule in plan.rules if rule.suppress_prefixlength is not None)
    found = []
    with rtnetlink("look for wide routes") as ip:
        for version in versions:
            for message in dump_routes(_FAMILIES[version], table=MAIN_TABLE, kind=RTN_UNICAST):
                if not 0 < message.prefix_length < WIDEST_LOCAL[version]:
                    continue
                if message.table != MAIN_TABLE or message.kind != RTN_UNICAST:
                    continue
                attributes = message.attributes()
                destination, router = message.destination(attributes), attributes.get(RTA_GATEWAY)
                if not destination.is_multicast:
                    way = ip_address(router) if router else None
                    found.append((str(destination), way, number(attributes, RTA_OIF)))
        names = {link["index"]: link.get("IFLA_IFNAME") for link in ip.get_links()} if found else {}
    described = [
        destination
        + (f" via {router}" if router else "")
        + (f" dev {names.get(index, index)}" if index else "")
        for destination, router, index in found
    ]
    more = len(described) - MOST_NAMED
    return (*described[:MOST_NAMED], *([f"{more} more"] if more > 0 else []))


def _possible(plan: RoutePlan) -> RoutePlan:
    """The part of the plan that this kernel supports: no IPv6 if that is switched off."""
    if INET6_PROC.exists():
        return plan
    return replace(
        plan,
        routes=tuple(route for route in plan.routes if route.destination.version == 4),
        rules=tuple(rule for rule in plan.rules if rule.version == 4),
    )


def _routes_there(wanted: Iterable[TunnelRoute], device: int) -> set[TunnelRoute]:
    """The routes into `device`, and the unreachable ones, in the tables of the wanted routes."""
    there = set()
    for version, table in {(route.destination.version, route.table) for route in wanted}:
        family = _FAMILIES[version]
        for message in chain(
            dump_routes(family, table=table, device=device),
            dump_routes(family, table=table, kind=RTN_UNREACHABLE),
        ):
            attributes = message.attributes()
            nowhere = message.kind == RTN_UNREACHABLE
            if nowhere or number(attributes, RTA_OIF) == device:
                destination = message.destination(attributes)
                there.add(TunnelRoute(destination, number(attributes, RTA_TABLE), unreachable=nowhere))
    return there


def _rules_there(ip: Any, plan: RoutePlan) -> set[Rule]:
    """The rules of the plan that are there, and our earlier ones for a gateway that has moved."""
    expected = {(rule.version, rule.priority, rule.table): rule for rule in plan.rules}
    there = set()
    for version in {rule.version for rule in plan.rules}:
        for message in ip.get_rules(family=_FAMILIES[version]):
            rule = expected.get((version, message.get("FRA_PRIORITY"), message.get("FRA_TABLE")))
            if rule is not None and rule.gateway is None:
                there.add(rule)
            elif rule is not None and (gateway := _gateway_of(message)) is not None:
                there.add(replace(rule, gateway=gateway))
    return there


def _gateway_of(message: Any) -> tuple[IPv4Address, int] | None:
    """To which address and UDP port a rule applies; `None` if it is not limited like that."""
    address, ports = message.get("FRA_DST"), message.get("FRA_DPORT_RANGE")
    if (
        not address
        or not ports
        or message["dst_len"] != 32
        or message.get("FRA_IP_PROTO") != socket.IPPROTO_UDP
    ):
        return None
    first, _, last = str(ports).partition(":")
    return (IPv4Address(address), int(first)) if first == last else None


def _outdated(rules_there: set[Rule], plan: RoutePlan) -> set[Rule]:
    """The rules for a gateway that has moved."""
    return {rule for rule in rules_there if rule.gateway is not None and rule not in plan.rules}


def remove_leftovers() -> None:
    """Removes what a killed client left behind; does nothing while one is running. Raises `HostNetworkError`."""
    import pyroute2  # noqa: F401, PLC0415 -- slow to import: not while we hold the lock

    with ExitStack() as held:
        try:
            held.enter_context(full_tunnel_lock())
        except ConflictError:
            return
        except HostNetworkError as cause:  # a client that wants the lock will report it
            log.debug("cannot find out whether another client is running", cause=cause.message)
            return
        with suppress(ConflictError):
            _remove_ours()


def _remove_ours(own: str | None = None) -> None:
    """Removes whatever has our priorities or is in our table. The caller holds the lock. Raises `ConflictError` if
    another client is running that has its lock elsewhere (another mount of /proc), on another device than `own`."""
    with rtnetlink("look for another client's routes") as ip:
        # A killed client's routes went with its device; if the device is persistent, it has no carrier.
        alive = {
            link["index"]: name
            for link in ip.get_links()
            if link.get("IFLA_CARRIER") and (name := link.get("IFLA_IFNAME")) != own
        }
        for message in dump_routes(socket.AF_INET, table=TABLE):
            attributes = message.attributes()
            device = alive.get(number(attributes, RTA_OIF))
            if device and number(attributes, RTA_TABLE) == TABLE:
                raise already_routed_error(f", {device}")
    for family in (socket.AF_INET, socket.AF_INET6) if INET6_PROC.exists() else (socket.AF_INET,):
        with rtnetlink("remove an earlier client's rules") as ip:
            for message in list(ip.get_rules(family=family)):
                priority = message.get("FRA_PRIORITY")
                if priority in (PRIORITY_GATEWAY, PRIORITY_MAIN, PRIORITY_TUNNEL):
                    log.info("removing a rule that an earlier client left", priority=priority)
                    ip.rule("del", family=family, priority=priority, table=message.get("FRA_TABLE"))
            if any(
                number(message.attributes(), RTA_TABLE) == TABLE
                for message in dump_routes(family, table=TABLE)
            ):
                ip.flush_routes(family=family, table=TABLE)  # decodes every route of the host


def _route_arguments(route: TunnelRoute, device: int) -> dict[str, Any]:
    family = _FAMILIES[route.destination.version]
    common = {"dst": str(route.destination), "table": route.table, "family": family, "proto": PROTOCOL}
    return common | ({"type": "unreachable"} if route.unreachable else {"oif": device, "scope": "link"})


@contextmanager
def _added_route(route: TunnelRoute, device: int) -> Iterator[None]:
    ours = _add_route(route, device)
    try:
        yield
    finally:
        if ours:
            _undo(f"remove the route to {route.destination}", "route", _route_arguments(route, device))


def _add_route(route: TunnelRoute, device: int) -> bool:
    """Adds the route, unless it exists: the kernel makes one for the network of the device's own address, and a killed
    client leaves its unreachable ones. Returns whether the route is ours to remove. Another running client may have
    made the same unreachable route: it adds it again after we have removed it (`renew_routes`)."""
    from pyroute2 import NetlinkError  # noqa: PLC0415 -- slow to import

    with rtnetlink(f"add a route to {route.destination}") as ip:
        try:
            ip.route("add", **_route_arguments(route, device))
        except NetlinkError as cause:
            if cause.code != errno.EEXIST:
                raise
        else:
            return True
        if route not in _routes_there((route,), device):
            raise HostNetworkError(
                f"this host already has another route to {route.destination}",
                hint="remove it from AllowedIPs, or use --no-routes",
            )
        ours = route.unreachable and _is_of_a_client(route)
    if ours:
        log.info("taking over another client's unreachable route", destination=str(route.destination))
    return ours


def _is_of_a_client(route: TunnelRoute) -> bool:
    family = _FAMILIES[route.destination.version]
    return any(
        message.protocol == PROTOCOL and message.destination(message.attributes()) == route.destination
        for message in dump_routes(family, table=route.table, kind=RTN_UNREACHABLE)
    )


def _rule_arguments(rule: Rule) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "family": _FAMILIES[rule.version],
        "priority": rule.priority,
        "table": rule.table,
    }
    if rule.unless_fwmark is not None:
        arguments |= {"fwmark": rule.unless_fwmark, "flags": FIB_RULE_INVERT}
    if rule.suppress_prefixlength is not None:
        arguments["FRA_SUPPRESS_PREFIXLEN"] = rule.suppress_prefixlength
    if rule.gateway is not None:
        address, port = rule.gateway
        arguments |= {
            "dst": str(address),
            "dst_len": 32,
            "FRA_IP_PROTO": socket.IPPROTO_UDP,
            "FRA_DPORT_RANGE": f"{port}:{port}",
        }
    return arguments


@contextmanager
def _added_rule(rule: Rule) -> Iterator[None]:
    _add_rule(rule)
    try:
        yield
    finally:
        if rule.gateway is None:
            _remove_rule(rule)
        else:
            _remove_gateway_rules(rule)


def _add_rule(rule: Rule) -> None:
    with rtnetlink(f"add rule {rule.priority}") as ip:
        ip.rule("add", **_rule_arguments(rule))


def _remove_rule(rule: Rule) -> None:
    _undo(f"remove rule {rule.priority}", "rule", _rule_arguments(rule))


def _remove_gateway_rules(rule: Rule) -> None:
    """Removes `rule`, wherever it has moved meanwhile."""
    with rtnetlink(f"look for rule {rule.priority}") as ip:
        there = _rules_there(ip, RoutePlan(0, (), (rule,)))
    for moved in there:
        _remove_rule(moved)


def _undo(doing: str, kind: str, arguments: dict[str, Any]) -> None:
    """Removes a route or rule; it is fine if that is gone already."""
    from pyroute2 import NetlinkError  # noqa: PLC0415 -- slow to import

    with rtnetlink(doing) as ip:
        try:
            getattr(ip, kind)("del", **arguments)
        except NetlinkError as cause:
            if cause.code not in _GONE:
                log.warning(f"cannot {doing}", cause=os.strerror(cause.code))


@contextmanager
def _source_check_sees_mark() -> Iterator[None]:
    """Sets src_valid_mark (ip-sysctl), as wg-quick does, so that strict reverse path filtering considers the mark of
    an arriving packet: netfilter may have given it the one of the packet that it answers."""
    try:
        before = SRC_VALID_MARK.read_text().strip()
        if before != "1":
            SRC_VALID_MARK.write_text("1\n")
    except OSError as cause:
        log.warning(
            "src_valid_mark cannot be set; strict reverse path filtering may drop answers",
            cause=cause.strerror,
        )
        before = "1"
    try:
        yield
    finally:
        if before != "1":
            SRC_VALID_MARK.write_text(f"{before}\n")
