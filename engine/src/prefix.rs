//! IPv4 prefixes (RFC 4632).

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// An IPv4 prefix: all addresses that share its first `len` bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Prefix {
    network: u32,
    len: u8,
}

impl Prefix {
    /// The prefix of `len` bits (at most 32) that contains `address`.
    pub fn new(address: Ipv4Addr, len: u8) -> Option<Self> {
        (len <= 32).then(|| Self { network: u32::from(address) & mask(len), len })
    }

    /// Whether `address` is in it.
    pub fn contains(self, address: Ipv4Addr) -> bool {
        u32::from(address) & mask(self.len) == self.network
    }

    /// How many bits are fixed.
    pub fn len(self) -> u8 {
        self.len
    }

    /// Whether it contains every address.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The lowest address.
    pub fn network(self) -> Ipv4Addr {
        self.network.into()
    }

    /// Its directed broadcast address (RFC 919 §7), unless it is too small to have one (RFC 3021).
    pub fn broadcast(self) -> Option<Ipv4Addr> {
        (self.len < 31).then(|| (self.network | !mask(self.len)).into())
    }

    /// Whether `address` is the network's own or its directed broadcast address. A /31 or /32 has neither (RFC 3021).
    pub fn is_edge(self, address: Ipv4Addr) -> bool {
        self.broadcast().is_some_and(|broadcast| address == broadcast || address == self.network())
    }
}

fn mask(len: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(len)).unwrap_or(0)
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network(), self.len)
    }
}

impl FromStr for Prefix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (address, len) = text.split_once('/').unwrap_or((text, "32"));
            Self::new(address.parse().ok()?, len.parse().ok()?)
        };
        parse().ok_or_else(|| format!("{text:?} is not an IPv4 prefix such as 10.66.77.0/24"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_route_contains_every_address() {
        let default: Prefix = "0.0.0.0/0".parse().unwrap();
        assert!(default.contains(Ipv4Addr::BROADCAST) && default.contains(Ipv4Addr::UNSPECIFIED));
    }

    #[test]
    fn host_bits_are_ignored_and_the_edges_belong_to_it() {
        let prefix: Prefix = "10.66.77.9/24".parse().unwrap();
        assert_eq!(prefix.to_string(), "10.66.77.0/24");
        assert_eq!(prefix.broadcast(), Some(Ipv4Addr::new(10, 66, 77, 255)));
        assert!(prefix.contains(Ipv4Addr::new(10, 66, 77, 255)));
        assert!(!prefix.contains(Ipv4Addr::new(10, 66, 78, 0)));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "10.0.0.0/33", "10.0.0/8", "10.0.0.0/", "a/8", "::/0"] {
            assert!(text.parse::<Prefix>().is_err(), "{text}");
        }
    }
}
