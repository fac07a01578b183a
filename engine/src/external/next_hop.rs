//! To which neighbour a packet for the internet goes.

use std::net::Ipv4Addr;

use super::MacAddress;
use crate::prefix::Prefix;

/// What the host's kernel says about the external interface. Read, never changed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExternalLink {
    /// The interface's name.
    pub interface: String,
    /// Its number (`ifindex`).
    pub index: u32,
    /// Its link address.
    pub mac: MacAddress,
    /// Its MTU, in bytes of IPv4 packet.
    pub mtu: usize,
    /// The external addresses to translate to; the first is the gateway's own face.
    pub addresses: Vec<Ipv4Addr>,
    /// Prefixes that are reached without a router.
    pub on_link: Vec<Prefix>,
    /// The default router.
    pub router: Option<Ipv4Addr>,
}

/// Where to send a packet on the link.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NextHop {
    /// To this neighbour.
    Neighbor(Ipv4Addr),
    /// Nowhere: a directed broadcast, which is not forwarded (RFC 2644).
    Broadcast,
    /// Nowhere: neither on the link nor is there a router.
    NoRoute,
}

impl ExternalLink {
    /// The next hop for `destination`: itself if it is on the link, else the default router.
    pub fn next_hop(&self, destination: Ipv4Addr) -> NextHop {
        match self.on_link.iter().find(|prefix| prefix.contains(destination)) {
            Some(prefix) if prefix.broadcast() == Some(destination) => NextHop::Broadcast,
            Some(_) => NextHop::Neighbor(destination),
            None => self.router.map_or(NextHop::NoRoute, NextHop::Neighbor),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(router: Option<&str>) -> ExternalLink {
        ExternalLink {
            interface: "eth0".into(),
            index: 2,
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
            addresses: vec!["192.0.2.10".parse().unwrap()],
            on_link: vec!["192.0.2.0/24".parse().unwrap(), "203.0.113.7/32".parse().unwrap()],
            router: router.map(|router| router.parse().unwrap()),
        }
    }

    #[test]
    fn a_neighbour_is_its_own_next_hop_and_everyone_else_is_behind_the_router() {
        let link = link(Some("192.0.2.1"));
        let hop = |destination: &str| link.next_hop(destination.parse().unwrap());
        assert_eq!(hop("192.0.2.77"), NextHop::Neighbor("192.0.2.77".parse().unwrap()));
        assert_eq!(hop("203.0.113.7"), NextHop::Neighbor("203.0.113.7".parse().unwrap()));
        assert_eq!(hop("203.0.113.8"), NextHop::Neighbor("192.0.2.1".parse().unwrap()));
        assert_eq!(hop("192.0.2.255"), NextHop::Broadcast);
    }

    #[test]
    fn without_a_router_only_neighbours_are_reached() {
        let link = link(None);
        assert_eq!(link.next_hop(Ipv4Addr::new(198, 51, 100, 1)), NextHop::NoRoute);
        assert_eq!(
            link.next_hop(Ipv4Addr::new(192, 0, 2, 3)),
            NextHop::Neighbor(Ipv4Addr::new(192, 0, 2, 3))
        );
    }
}
