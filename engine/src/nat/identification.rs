//! The IPv4 identification of outgoing datagrams (RFC 6864).
//!
//! Several clients share one external address, so their own identifications could collide, and fragments of two
//! datagrams be mixed up. Datagrams that may still be fragmented get a new identification from a counter that is
//! chosen by addresses and protocol, as RFC 6864 §4.3 asks; *atomic* ones keep theirs, which nobody looks at.

use std::hash::BuildHasher;

use foldhash::quality::SeedableRandomState;

use super::config::ShardSlice;
use super::random::Random;
use crate::wire::Ipv4Packet;

/// How many counters there are. More means fewer destinations that share one.
const COUNTERS: usize = 1024;

/// The counters of one shard. Each shard counts in its own part of the numbers.
#[derive(Debug)]
pub(super) struct Identifications {
    counters: Box<[u16]>,
    first: u16,
    span: u32,
}

impl Identifications {
    pub(super) fn new(slice: ShardSlice, random: &mut Random) -> Self {
        let span = 65_536 / u32::from(slice.count());
        let counters = (0..COUNTERS).map(|_| random.below(span as usize).unwrap_or(0) as u16).collect();
        Self { counters, first: (span * u32::from(slice.shard)) as u16, span }
    }

    /// Gives the (already translated) datagram a new identification, unless it is atomic.
    pub(super) fn renew(&mut self, packet: &mut Ipv4Packet<'_>, hasher: &SeedableRandomState) {
        if packet.is_atomic() {
            return;
        }
        let key = (u64::from(packet.source().to_bits()) << 32) | u64::from(packet.destination().to_bits());
        let counter = &mut self.counters[hasher.hash_one((key, packet.protocol())) as usize % COUNTERS];
        // A superpacket is sent as that many datagrams, numbered on from the first.
        let datagrams = match packet.offload().gso {
            Some(gso) => packet.transport_payload_len().div_ceil(usize::from(gso.segment_size).max(1)),
            None => 1,
        };
        let datagrams = (datagrams.max(1) as u32).min(self.span);
        let mut at = u32::from(*counter);
        if at + datagrams > self.span {
            at = 0;
        }
        *counter = ((at + datagrams) % self.span) as u16;
        packet.set_identification(self.first.wrapping_add(at as u16));
    }
}
