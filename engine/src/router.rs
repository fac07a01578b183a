//! `PacketRouter`: where a packet goes, by its destination alone.
//!
//! Theory of operation. [`PacketRouter::route`] asks, in this order: Is it the gateway's own address? Inside the VPN
//! subnet? An address that no router may forward to (RFC 6890)? One of the host's addresses? Whatever is left lies
//! behind the external interface, private networks (RFC 1918) included: they may well be on its link.

use std::net::Ipv4Addr;

use crate::drop_reason::DropReason;
use crate::prefix::Prefix;

/// Where a packet goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// To the peer that holds this address, if one does.
    Peer(Ipv4Addr),
    /// To the host's kernel, through the gateway's TUN device.
    Host,
    /// Through the NAT, to the external interface.
    External,
    /// Nowhere.
    Drop(DropReason),
}

/// Gives verdicts.
#[derive(Clone, Debug)]
pub struct PacketRouter {
    subnet: Prefix,
    gateway: Ipv4Addr,
    host_addresses: Vec<Ipv4Addr>,
    on_link: Vec<Prefix>,
}

impl PacketRouter {
    /// A router for the VPN subnet `subnet`, in which the gateway itself is `gateway`; packets to `host_addresses`
    /// are the host's.
    pub fn new(
        subnet: Prefix,
        gateway: Ipv4Addr,
        host_addresses: impl IntoIterator<Item = Ipv4Addr>,
    ) -> Self {
        let host_addresses = host_addresses.into_iter().collect();
        Self { subnet, gateway, host_addresses, on_link: Vec::new() }
    }

    /// Tells it the networks on the external interface's link, whose directed broadcasts are dropped (RFC 2644).
    pub fn with_on_link(mut self, networks: impl IntoIterator<Item = Prefix>) -> Self {
        self.on_link = networks.into_iter().collect();
        self
    }

    /// The verdict on a packet to `destination`.
    pub fn route(&self, destination: Ipv4Addr) -> Verdict {
        if destination == self.gateway {
            Verdict::Host
        } else if self.subnet.contains(destination) {
            if self.subnet.is_edge(destination) {
                Verdict::Drop(DropReason::BogonDestination)
            } else {
                Verdict::Peer(destination)
            }
        } else if is_bogon(destination) {
            Verdict::Drop(DropReason::BogonDestination)
        } else if self.host_addresses.contains(&destination) {
            Verdict::Host
        } else if self.on_link.iter().any(|network| network.is_edge(destination)) {
            Verdict::Drop(DropReason::BogonDestination)
        } else {
            Verdict::External
        }
    }

    /// Whether a packet from `source` may come from the host's kernel: one that forwards brings others' packets, too.
    pub fn is_the_hosts(&self, source: Ipv4Addr) -> bool {
        source == self.gateway || self.host_addresses.contains(&source)
    }

    /// Whether `address` lies inside the VPN subnet, and so must not appear on the external side.
    pub fn is_inner(&self, address: Ipv4Addr) -> bool {
        self.subnet.contains(address)
    }
}

/// Whether a router must never forward a packet from or to `address` (RFC 6890 §2.2.2, RFC 1812 §5.3.7).
///
/// Shared (100.64.0.0/10), private and documentation addresses are none: they may be on the external link.
pub fn is_bogon(address: Ipv4Addr) -> bool {
    match address.octets() {
        [0, ..] => true,         // 0.0.0.0/8, "this network" (RFC 1122 §3.2.1.3)
        [127, ..] => true,       // loopback (RFC 1122 §3.2.1.3)
        [169, 254, ..] => true,  // link-local (RFC 3927 §2.7)
        [224..=239, ..] => true, // multicast (RFC 5771): Tidegate is no multicast router
        [240..=255, ..] => true, // reserved (RFC 1112 §4) and limited broadcast (RFC 919 §7)
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HOST: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 5);

    fn router() -> PacketRouter {
        let prefix = |text: &str| text.parse::<Prefix>().unwrap();
        PacketRouter::new(prefix("10.66.77.0/24"), Ipv4Addr::new(10, 66, 77, 1), [HOST, Ipv4Addr::LOCALHOST])
            .with_on_link([prefix("203.0.113.0/24"), prefix("192.0.2.8/31")])
    }

    fn route(destination: &str) -> Verdict {
        router().route(destination.parse().unwrap())
    }

    const BOGON: Verdict = Verdict::Drop(DropReason::BogonDestination);

    #[test]
    fn the_gateway_and_the_hosts_addresses_belong_to_the_host() {
        assert_eq!(route("10.66.77.1"), Verdict::Host);
        assert_eq!(route("203.0.113.5"), Verdict::Host);
    }

    #[test]
    fn the_vpn_subnet_belongs_to_peers_but_for_its_edges() {
        assert_eq!(route("10.66.77.2"), Verdict::Peer(Ipv4Addr::new(10, 66, 77, 2)));
        assert_eq!(route("10.66.77.254"), Verdict::Peer(Ipv4Addr::new(10, 66, 77, 254)));
        assert_eq!(route("10.66.77.0"), BOGON);
        assert_eq!(route("10.66.77.255"), BOGON);
    }

    #[test]
    fn what_no_router_forwards_is_dropped() {
        for destination in [
            "0.0.0.0",
            "0.255.255.255",
            "127.0.0.1",
            "127.255.255.255",
            "169.254.0.0",
            "169.254.255.255",
            "224.0.0.1",
            "239.255.255.255",
            "240.0.0.0",
            "255.255.255.254",
            "255.255.255.255",
        ] {
            assert_eq!(route(destination), BOGON, "{destination}");
        }
    }

    #[test]
    fn the_internet_and_private_networks_lie_behind_the_external_interface() {
        for destination in [
            "1.0.0.0",
            "126.255.255.255",
            "128.0.0.0",
            "169.253.255.255",
            "169.255.0.0",
            "223.255.255.255",
            "10.66.76.255",
            "10.66.78.0",
            "172.16.0.1",
            "192.168.1.255",
            "100.64.0.1",
            "198.51.100.7",
        ] {
            assert_eq!(route(destination), Verdict::External, "{destination}");
        }
    }

    #[test]
    fn a_directed_broadcast_on_the_external_link_is_dropped() {
        assert_eq!(route("203.0.113.255"), BOGON);
        assert_eq!(route("203.0.113.0"), BOGON);
        assert_eq!(route("203.0.113.6"), Verdict::External);
        assert_eq!(route("192.0.2.8"), Verdict::External, "a /31 has no broadcast address");
        assert_eq!(route("192.0.2.9"), Verdict::External);
    }

    #[test]
    fn only_the_gateways_and_the_hosts_addresses_are_sources_of_the_host() {
        for (source, expected) in
            [("10.66.77.1", true), ("203.0.113.5", true), ("203.0.113.6", false), ("10.66.77.2", false)]
        {
            assert_eq!(router().is_the_hosts(source.parse().unwrap()), expected, "{source}");
        }
    }

    #[test]
    fn inner_addresses_are_those_of_the_subnet() {
        assert!(router().is_inner(Ipv4Addr::new(10, 66, 77, 255)));
        assert!(!router().is_inner(Ipv4Addr::new(10, 66, 78, 0)));
    }

    proptest! {
        #[test]
        fn nothing_of_the_subnet_ever_leaves_and_no_bogon_is_forwarded(bits in any::<u32>()) {
            let destination = Ipv4Addr::from(bits);
            if router().is_inner(destination) || is_bogon(destination) {
                prop_assert_ne!(router().route(destination), Verdict::External);
            }
        }
    }
}
