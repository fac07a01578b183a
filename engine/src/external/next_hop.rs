//! To which neighbour a packet for the internet goes.

use std::net::Ipv4Addr;

use super::MacAddress;
use crate::drop_reason::DropReason;
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
    /// The external addresses to translate to; the first is the gateway's own face ([`Self::face_towards`]).
    pub addresses: Vec<Ipv4Addr>,
    /// Prefixes that are reached without a router.
    pub on_link: Vec<Prefix>,
    /// The default router.
    pub router: Option<Ipv4Addr>,
}

/// The neighbour to which a packet goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NextHop(pub Ipv4Addr);

impl ExternalLink {
    /// The next hop for `destination`: itself if it is on the link, else the default router.
    ///
    /// # Errors
    /// [`DropReason::NoRoute`] if it is neither on the link nor is there a router; [`DropReason::BogonDestination`] for
    /// the network's own and its broadcast address, to which nothing is forwarded (RFC 2644; RFC 3021 for /31 and /32,
    /// which have neither).
    pub fn next_hop(&self, destination: Ipv4Addr) -> Result<NextHop, DropReason> {
        match self.on_link.iter().find(|prefix| prefix.contains(destination)) {
            Some(prefix) if prefix.is_edge(destination) => Err(DropReason::BogonDestination),
            Some(_) => Ok(NextHop(destination)),
            None => self.router.map(NextHop).ok_or(DropReason::NoRoute),
        }
    }

    /// The address under which a neighbour knows us: one in a network that it shares with us, the smallest one, since
    /// many stations do not answer a request from elsewhere. Of several, or if there is none, the first.
    pub fn face_towards(&self, neighbor: Ipv4Addr) -> Ipv4Addr {
        let shared = |&&address: &&Ipv4Addr| {
            let networks = self.on_link.iter().filter(|on_link| on_link.contains(neighbor));
            networks.filter(|network| network.contains(address)).map(|network| network.len()).max()
        };
        let face = self.addresses.iter().rev().max_by_key(shared); // which takes the last of several
        face.copied().unwrap_or(Ipv4Addr::UNSPECIFIED)
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
        assert_eq!(hop("192.0.2.77"), Ok(NextHop("192.0.2.77".parse().unwrap())));
        assert_eq!(hop("203.0.113.7"), Ok(NextHop("203.0.113.7".parse().unwrap())));
        assert_eq!(hop("203.0.113.8"), Ok(NextHop("192.0.2.1".parse().unwrap())));
        assert_eq!(hop("192.0.2.255"), Err(DropReason::BogonDestination));
        assert_eq!(hop("192.0.2.0"), Err(DropReason::BogonDestination));
    }

    #[test]
    fn a_neighbour_knows_us_by_an_address_of_its_own_network() {
        let [first, second] = [Ipv4Addr::new(192, 0, 2, 10), Ipv4Addr::new(198, 51, 100, 70)];
        let mut link = ExternalLink { addresses: vec![first, second], ..link(Some("198.51.100.1")) };
        let face = |link: &ExternalLink, neighbor: &str| link.face_towards(neighbor.parse().unwrap());
        assert_eq!(face(&link, "198.51.100.1"), first, "reached by a route, through no network that we know");
        link.on_link.push("198.51.100.0/24".parse().unwrap());
        assert_eq!(face(&link, "198.51.100.1"), second);
        assert_eq!(face(&link, "192.0.2.1"), first);
        assert_eq!(face(&link, "203.0.113.7"), first, "on the link, but in no network of ours");
        link.on_link.push("192.0.0.0/5".parse().unwrap());
        assert_eq!(face(&link, "198.51.100.1"), second, "the first one shares but a larger network");
        assert_eq!(face(&link, "195.0.0.1"), first);
        link.addresses.clear();
        assert_eq!(face(&link, "192.0.2.1"), Ipv4Addr::UNSPECIFIED);
    }

    #[test]
    fn without_a_router_only_neighbours_are_reached() {
        let link = link(None);
        assert_eq!(link.next_hop(Ipv4Addr::new(198, 51, 100, 1)), Err(DropReason::NoRoute));
        let neighbor = Ipv4Addr::new(192, 0, 2, 3);
        assert_eq!(link.next_hop(neighbor), Ok(NextHop(neighbor)));
    }
}
