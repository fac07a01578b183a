//! Receiver indices: the names of sessions and handshakes on the wire.
//!
//! An index's low 8 bits are the number of the shard that gave it out, so that the transport steers a datagram to its
//! shard by one byte, whatever address it comes from; the other 24 bits are random and unused. An index leaves the
//! table together with its session or handshake, so the table is bounded by four entries per peer.

use foldhash::fast::RandomState;
use hashbrown::HashMap;
use hashbrown::hash_map::Entry;

use super::PeerId;
use super::handshake::random_bytes;
use crate::drop_reason::DropReason;

/// Which peer an index belongs to.
pub struct IndexTable {
    shard: u8,
    peers: HashMap<u32, PeerId, RandomState>,
}

impl IndexTable {
    /// An empty table that gives out indices of `shard`.
    pub fn new(shard: u8) -> Self {
        Self { shard, peers: HashMap::default() }
    }

    /// Gives out an unused index.
    ///
    /// # Errors
    /// [`DropReason::NoRandomness`] if the kernel has none to give.
    pub fn allocate(&mut self, peer: PeerId) -> Result<u32, DropReason> {
        // 2^24 names for at most four per peer: the second draw is already improbable.
        loop {
            let [a, b, c] = random_bytes::<3>()?;
            if let Entry::Vacant(entry) = self.peers.entry(u32::from_le_bytes([self.shard, a, b, c])) {
                let index = *entry.key();
                entry.insert(peer);
                return Ok(index);
            }
        }
    }

    /// The peer that `index` was given out for.
    pub fn get(&self, index: u32) -> Option<PeerId> {
        self.peers.get(&index).copied()
    }

    /// Takes an index out of use.
    pub fn release(&mut self, index: u32) {
        self.peers.remove(&index);
    }

    /// How many indices are in use.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.peers.len()
    }
}

/// The shard that gave out `index`.
pub const fn shard_of(index: u32) -> u8 {
    index as u8
}
