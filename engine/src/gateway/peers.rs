//! Who lives where: peers come, change and go while the gateway runs, and nobody else notices.

use super::*;

impl Gateway {
    /// Adds a peer of this shard, or changes its preshared key. (A changed address is a removal and an addition: the
    /// mappings of the former address must not speak for the new one.)
    pub fn set_peer(&mut self, config: PeerConfig, address: Ipv4Addr, now: Timestamp) {
        let peer = self.tunnel.set_peer(config, now);
        self.addresses.insert(peer, address);
        self.places.insert(address, Place::Here(peer));
    }

    /// Learns that a peer lives on another shard.
    pub fn set_peer_elsewhere(&mut self, public_key: [u8; 32], address: Ipv4Addr, shard: u8) {
        self.tunnel.set_peer_elsewhere(public_key, shard);
        self.places.insert(address, Place::OnShard(shard));
    }

    /// Forgets a peer, its sessions and its mappings.
    pub fn remove_peer(&mut self, public_key: &[u8; 32], address: Ipv4Addr) {
        if let Some(peer) = self.tunnel.remove_peer(public_key) {
            self.addresses.remove(&peer);
        }
        self.nat.remove_client(address);
        self.places.remove(&address);
    }

    /// The address assigned to a peer of this shard.
    pub fn address_of(&self, peer: PeerId) -> Option<Ipv4Addr> {
        self.addresses.get(&peer).copied()
    }
}
