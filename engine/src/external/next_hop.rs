//! To which neighbour a packet for the internet goes.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use super::MacAddress;

/// An IPv4 prefix, as `192.0.2.0/24` (RFC 4632 §3.1).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Prefix {
    network: u32,
    length: u8,
}

impl Prefix {
    /// The prefix of `length` bits in which `address` lies; `None` if there are no such prefixes.
    pub fn new(address: Ipv4Addr, length: u8) -> Option<Self> {
        (length <= 32).then(|| Self { network: u32::from(address) & mask(length), length })
    }

    /// Whether the address lies in it.
    pub fn contains(self, address: Ipv4Addr) -> bool {
        u32::from(address) & mask(self.length) == self.network
    }

    /// Its directed broadcast address (RFC 919 §7), unless it is too small to have one (RFC 3021).
    pub fn broadcast(self) -> Option<Ipv4Addr> {
        (self.length < 31).then(|| Ipv4Addr::from(self.network | !mask(self.length)))
    }

    /// Its first address.
    pub fn network(self) -> Ipv4Addr {
        Ipv4Addr::from(self.network)
    }
}

fn mask(length: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0)
}

/// A text that is no IPv4 prefix.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct InvalidPrefix;

impl fmt::Display for InvalidPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an IPv4 prefix looks like 192.0.2.0/24")
    }
}

impl std::error::Error for InvalidPrefix {}

impl FromStr for Prefix {
    type Err = InvalidPrefix;

    fn from_str(text: &str) -> Result<Self, InvalidPrefix> {
        let (address, length) = text.split_once('/').ok_or(InvalidPrefix)?;
        let address = address.parse().map_err(|_| InvalidPrefix)?;
        Self::new(address, length.parse().map_err(|_| InvalidPrefix)?).ok_or(InvalidPrefix)
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network(), self.length)
    }
}

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

    #[test]
    fn a_prefix_is_read_and_shown_and_knows_its_addresses() {
        let all: Prefix = "0.0.0.0/0".parse().unwrap();
        assert!(all.contains(Ipv4Addr::BROADCAST) && all.contains(Ipv4Addr::UNSPECIFIED));
        let one: Prefix = "192.0.2.9/32".parse().unwrap();
        assert!(one.contains(Ipv4Addr::new(192, 0, 2, 9)) && !one.contains(Ipv4Addr::new(192, 0, 2, 8)));
        assert_eq!(one.broadcast(), None);
        assert_eq!("192.0.2.9/24".parse::<Prefix>().unwrap().to_string(), "192.0.2.0/24");
        for text in ["192.0.2.0", "192.0.2.0/33", "192.0.2/24", "192.0.2.0/-1", ""] {
            assert_eq!(text.parse::<Prefix>(), Err(InvalidPrefix), "{text}");
        }
    }
}
