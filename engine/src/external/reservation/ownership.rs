//! Which ports are reserved, for every shard to read without a lock.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use super::PortProtocol;
use crate::external::MAX_ADDRESSES;

/// 65,536 ports, one bit each.
type Bitmap = [AtomicU64; 1024];

/// The reserved ports of every external address. Clones share their contents.
///
/// Only the owner of the sockets writes; a reader sees a port as reserved only while its socket holds it (and perhaps
/// not yet, or not any more, while that is changing). An address without ports makes room for another one.
#[derive(Clone, Debug)]
pub struct PortOwnership(Arc<[OnceLock<AddressPorts>; MAX_ADDRESSES]>);

#[derive(Debug)]
struct AddressPorts {
    address: AtomicU32,
    tcp: Box<Bitmap>,
    udp: Box<Bitmap>,
}

impl Default for PortOwnership {
    fn default() -> Self {
        Self::new()
    }
}

impl PortOwnership {
    /// Nothing is reserved.
    pub fn new() -> Self {
        Self(Arc::new([const { OnceLock::new() }; MAX_ADDRESSES]))
    }

    /// Whether the NAT owns this port.
    pub fn is_reserved(&self, protocol: PortProtocol, address: Ipv4Addr, port: u16) -> bool {
        self.0
            .iter()
            .map_while(OnceLock::get)
            .find(|ports| ports.is_of(address))
            .is_some_and(|ports| word(ports.of(protocol), port).load(Ordering::Relaxed) & bit(port) != 0)
    }

    /// How many ports the NAT owns, of all addresses together.
    pub fn count(&self, protocol: PortProtocol) -> usize {
        let words = self.0.iter().map_while(OnceLock::get).flat_map(|ports| ports.of(protocol));
        words.map(|word| word.load(Ordering::Relaxed).count_ones() as usize).sum()
    }

    /// Notes that a port was reserved, or is so no longer; false if there were more than [`MAX_ADDRESSES`] addresses.
    /// For the owner of the sockets alone (and for tests that have none).
    pub fn set(&self, protocol: PortProtocol, port: SocketAddrV4, reserved: bool) -> bool {
        let Some(ports) = self.slot(*port.ip(), reserved) else { return false };
        let word = word(ports.of(protocol), port.port());
        if reserved {
            word.fetch_or(bit(port.port()), Ordering::Relaxed);
        } else {
            word.fetch_and(!bit(port.port()), Ordering::Relaxed);
        }
        true
    }

    /// Where the ports of `address` are noted. If they are nowhere and `new` is wanted: an unused place, or else that
    /// of an address without ports.
    fn slot(&self, address: Ipv4Addr, new: bool) -> Option<&AddressPorts> {
        let known = self.0.iter().map_while(OnceLock::get).find(|ports| ports.is_of(address));
        if known.is_some() || !new {
            return known;
        }
        if let Some(unused) = self.0.iter().find(|slot| slot.get().is_none()) {
            return Some(unused.get_or_init(|| AddressPorts::new(address)));
        }
        let empty = self.0.iter().filter_map(OnceLock::get).find(|ports| ports.is_empty())?;
        empty.address.store(address.to_bits(), Ordering::Relaxed);
        Some(empty)
    }
}

impl AddressPorts {
    fn new(address: Ipv4Addr) -> Self {
        let bitmap = || Box::new([const { AtomicU64::new(0) }; 1024]);
        Self { address: AtomicU32::new(address.to_bits()), tcp: bitmap(), udp: bitmap() }
    }

    fn is_of(&self, address: Ipv4Addr) -> bool {
        self.address.load(Ordering::Relaxed) == address.to_bits()
    }

    fn is_empty(&self) -> bool {
        self.tcp.iter().chain(self.udp.iter()).all(|word| word.load(Ordering::Relaxed) == 0)
    }

    fn of(&self, protocol: PortProtocol) -> &Bitmap {
        match protocol {
            PortProtocol::Tcp => &self.tcp,
            PortProtocol::Udp => &self.udp,
        }
    }
}

fn word(bitmap: &Bitmap, port: u16) -> &AtomicU64 {
    &bitmap[usize::from(port / 64)]
}

fn bit(port: u16) -> u64 {
    1 << (port % 64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_of_different_protocols_and_addresses_are_kept_apart() {
        let ownership = PortOwnership::new();
        let addresses: Vec<_> = (0..MAX_ADDRESSES as u8).map(|i| Ipv4Addr::new(203, 0, 113, i)).collect();
        for (i, &address) in addresses.iter().enumerate() {
            assert!(ownership.set(PortProtocol::Udp, SocketAddrV4::new(address, i as u16 * 999), true));
        }
        for (i, &address) in addresses.iter().enumerate() {
            let port = i as u16 * 999;
            assert!(ownership.is_reserved(PortProtocol::Udp, address, port));
            assert!(!ownership.is_reserved(PortProtocol::Tcp, address, port));
            assert!(!ownership.is_reserved(PortProtocol::Udp, address, port + 1));
        }
        assert_eq!(ownership.count(PortProtocol::Udp), MAX_ADDRESSES);
        let one_more = SocketAddrV4::new(Ipv4Addr::new(198, 51, 100, 1), 1);
        assert!(!ownership.set(PortProtocol::Udp, one_more, true));

        // A host whose address changes every day has had more than these in a year.
        assert!(ownership.set(PortProtocol::Udp, SocketAddrV4::new(addresses[7], 7 * 999), false));
        assert!(ownership.set(PortProtocol::Udp, one_more, true));
        assert!(ownership.is_reserved(PortProtocol::Udp, *one_more.ip(), 1));
        assert!(!ownership.is_reserved(PortProtocol::Udp, addresses[7], 7 * 999));
        assert_eq!(ownership.count(PortProtocol::Udp), MAX_ADDRESSES);
    }
}
