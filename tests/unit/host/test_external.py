"""Which interface leads out, and what the engine is told about it."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Interface, IPv4Network

import pytest

from tests.unit.fakes import ordinary_network
from tidegate.errors import HostNetworkError
from tidegate.host import MAIN_TABLE, Interface, InterfaceAddress, Route
from tidegate.host.external import check_subnet, external_link, host_addresses
from tidegate.settings import ExternalSettings

EVERYWHERE = IPv4Network("0.0.0.0/0")
WLAN = Interface(3, "wlan0", b"\x02\0\0\0\0\3", 1400, True, True)
TUN = Interface(9, "tidegate0", None, 1420, True, False)


def settings(**values: object) -> ExternalSettings:
    return ExternalSettings.model_validate(values)


def test_the_default_route_with_the_lowest_metric_leads_out() -> None:
    network = ordinary_network(
        interfaces=(WLAN,),
        addresses=(InterfaceAddress(3, IPv4Interface("198.51.100.5/24")),),
        routes=(Route(EVERYWHERE, IPv4Address("198.51.100.1"), 3, 600, MAIN_TABLE, None),),
    )
    assert external_link(network, settings()).interface == "eth0"
    link = external_link(network, settings(interface="wlan0"))
    assert (link.interface, link.addresses, link.router, link.mtu) == (
        "wlan0",
        ("198.51.100.5",),
        "198.51.100.1",
        1400,
    )


def test_default_routes_of_other_tables_do_not_count() -> None:
    network = ordinary_network(
        default=False, routes=(Route(EVERYWHERE, IPv4Address("192.0.2.1"), 2, 0, 51820, None),)
    )
    with pytest.raises(HostNetworkError, match="no default route"):
        external_link(network, settings())


def test_a_named_interface_needs_no_default_route() -> None:
    link = external_link(ordinary_network(default=False), settings(interface="eth0"))
    assert link.router is None
    assert link.on_link == ("192.0.2.0/24",)
    assert not link.has_default_route
    assert external_link(ordinary_network(), settings()).has_default_route


def test_a_default_route_without_a_router_makes_everything_on_link() -> None:
    network = ordinary_network(default=False, routes=(Route(EVERYWHERE, None, 2, 0, MAIN_TABLE, None),))
    link = external_link(network, settings())
    assert link.router is None
    assert "0.0.0.0/0" in link.on_link
    assert link.has_default_route


def test_the_first_address_is_the_one_that_the_kernel_would_send_from() -> None:
    second = InterfaceAddress(2, IPv4Interface("192.0.2.3/24"))
    assert external_link(ordinary_network(addresses=(second,)), settings()).addresses == ("192.0.2.2",)
    preferred = ordinary_network(
        default=False,
        addresses=(second,),
        routes=(Route(EVERYWHERE, IPv4Address("192.0.2.1"), 2, 0, MAIN_TABLE, IPv4Address("192.0.2.3")),),
    )
    assert external_link(preferred, settings()).addresses == ("192.0.2.3",)
    both = settings(addresses=["192.0.2.3", "192.0.2.2"])
    assert external_link(preferred, both).addresses == ("192.0.2.3", "192.0.2.2")


def test_an_address_that_the_interface_does_not_have_is_refused() -> None:
    with pytest.raises(
        HostNetworkError, match=r"192\.0\.2\.77 is not an address of eth0; it has 192\.0\.2\.2"
    ):
        external_link(ordinary_network(), settings(addresses=["192.0.2.77"]))


def test_the_hosts_own_addresses_are_those_without_loopback_and_our_device() -> None:
    network = ordinary_network(
        interfaces=(TUN, WLAN),
        addresses=(
            InterfaceAddress(9, IPv4Interface("10.66.77.1/24")),
            InterfaceAddress(3, IPv4Interface("198.51.100.5/24")),
            InterfaceAddress(1, IPv4Interface("203.0.113.53/32")),  # as of an anycast service
        ),
    )
    assert host_addresses(network, tun_name="tidegate0") == ("192.0.2.2", "198.51.100.5", "203.0.113.53")


def test_our_own_device_and_the_default_route_do_not_overlap_with_the_subnet() -> None:
    network = ordinary_network(
        interfaces=(TUN,),
        addresses=(InterfaceAddress(9, IPv4Interface("10.66.77.1/24")),),
        routes=(Route(IPv4Network("10.66.77.0/24"), None, 9, 0, MAIN_TABLE, None),),
    )
    check_subnet(network, IPv4Network("10.66.77.0/24"), tun_name="tidegate0")
