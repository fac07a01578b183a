//! The ICMP errors that the gateway itself sends (RFC 792, RFC 1122 §3.2.2, RFC 1812 §4.3).
//!
//! Theory of operation. [`IcmpErrors::build`] asks whether the packet may be answered at all, then whether the rate
//! limits admit one more, and then quotes as much of the packet as fits. Two token buckets have to agree: one for the
//! destination of the error, so that one sender's flood does not silence the gateway for the others, and one for all
//! together. What an error costs the common bucket is random, so that nobody can count, by the errors that he
//! receives, those that others have provoked (SAD DNS, CVE-2020-25705).

use std::hash::BuildHasher;
use std::net::Ipv4Addr;

use foldhash::SharedSeed;
use foldhash::quality::SeedableRandomState;

use crate::clock::Timestamp;
use crate::rate_limit::TokenBucket;
use crate::router::is_bogon;
use crate::wire::ipv4::{Ipv4Packet, MIN_HEADER_LEN, protocol, put_u16};
use crate::wire::{checksum, checksum::Change};

/// The longest ICMP error, IP header included (RFC 1812 §4.3.2.3).
const MAX_LEN: usize = 576;
/// Type, code, checksum and the word that depends on the kind.
const ICMP_HEADER_LEN: usize = 8;
/// How much of the original an error quotes at most, in bytes: what fits behind its own headers. All headers of the
/// original do, which have 120 bytes at most.
pub const MAX_QUOTE_LEN: usize = MAX_LEN - MIN_HEADER_LEN - ICMP_HEADER_LEN;
/// Precedence *internetwork control* (RFC 1812 §4.3.2.5).
const TOS: u8 = 0xc0;
const TTL: u8 = 64; // RFC 1700

/// Errors per second to all destinations together, and at once; as in Linux (`icmp_msgs_per_sec`, `icmp_msgs_burst`).
const GLOBAL_RATE: u32 = 1_000;
const GLOBAL_BURST: u32 = 50;
/// Errors per second to one destination, and at once: enough for several traceroutes at a time.
const DESTINATION_RATE: u32 = 10;
const DESTINATION_BURST: u32 = 20;
/// Buckets that the destinations share by a keyed hash: no table that grows, nothing to expire.
const DESTINATION_BUCKETS: usize = 1_024;

/// What went wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IcmpErrorKind {
    /// Destination unreachable: network (3/0).
    NetUnreachable,
    /// Destination unreachable: host (3/1).
    HostUnreachable,
    /// Destination unreachable: port (3/3).
    PortUnreachable,
    /// Destination unreachable: fragmentation needed, but DF is set (3/4).
    FragmentationNeeded {
        /// The next hop's MTU in bytes (RFC 1191 §4).
        mtu: u16,
    },
    /// Destination unreachable: communication administratively prohibited (3/13, RFC 1812 §5.2.7.1).
    AdminProhibited,
    /// The TTL reached zero in transit (11/0).
    TimeExceeded,
    /// Fragments were missing for too long (11/1). The original is the first fragment.
    ReassemblyTimeExceeded,
}

impl IcmpErrorKind {
    /// Type, code, and the last word of the ICMP header.
    const fn fields(self) -> (u8, u8, u16) {
        match self {
            Self::NetUnreachable => (3, 0, 0),
            Self::HostUnreachable => (3, 1, 0),
            Self::PortUnreachable => (3, 3, 0),
            Self::FragmentationNeeded { mtu } => (3, 4, mtu),
            Self::AdminProhibited => (3, 13, 0),
            Self::TimeExceeded => (11, 0, 0),
            Self::ReassemblyTimeExceeded => (11, 1, 0),
        }
    }
}

/// Builds ICMP errors, at a bounded rate.
#[derive(Debug)]
pub struct IcmpErrors {
    global: TokenBucket,
    destinations: Vec<TokenBucket>,
    random: SeedableRandomState,
    drawn: u64,
}

impl IcmpErrors {
    /// `seed` is secret randomness; it keys the hash of destinations, and is where the jitter comes from.
    pub fn new(seed: [u8; 32]) -> Self {
        let [a, b, c, d, e, f, g, h, ..] = seed;
        let key = u64::from_ne_bytes([a, b, c, d, e, f, g, h]);
        Self {
            global: TokenBucket::new(GLOBAL_RATE, GLOBAL_BURST),
            destinations: vec![TokenBucket::new(DESTINATION_RATE, DESTINATION_BURST); DESTINATION_BUCKETS],
            random: SeedableRandomState::with_seed(key, SharedSeed::global_random()),
            drawn: 0,
        }
    }

    /// Makes `out` the error that tells `original`'s sender what went wrong with it, sent from `source`.
    ///
    /// False, with `out` empty, if the original must not be answered or the rate limits forbid it.
    pub fn build(
        &mut self,
        kind: IcmpErrorKind,
        original: &Ipv4Packet<'_>,
        source: Ipv4Addr,
        now: Timestamp,
        out: &mut Vec<u8>,
    ) -> bool {
        self.build_for(original.source(), kind, original, source, now, out)
    }

    /// As [`Self::build`], but the rate limited is that of errors to `recipient`: whoever is behind the original's source
    /// address, which others may share (NAT).
    pub fn build_for(
        &mut self,
        recipient: Ipv4Addr,
        kind: IcmpErrorKind,
        original: &Ipv4Packet<'_>,
        source: Ipv4Addr,
        now: Timestamp,
        out: &mut Vec<u8>,
    ) -> bool {
        out.clear();
        let due = may_be_answered(original) && self.admits(recipient, now);
        if due {
            write_error(kind, original, source, self.draw() as u16, out);
        }
        due
    }

    /// Whether the rate limits admit an error to `destination` now, or another answer of its kind (a RST); counts it if
    /// so.
    pub fn admits(&mut self, destination: Ipv4Addr, now: Timestamp) -> bool {
        let bucket = self.random.hash_one(destination) as usize % DESTINATION_BUCKETS;
        // One token on average, as in Linux since 5.10 ("icmp: randomize the global rate limiter").
        let cost = (self.draw() % 3) as u32;
        self.destinations[bucket].take(now) && self.global.take_cost(now, cost)
    }

    fn draw(&mut self) -> u64 {
        self.drawn = self.drawn.wrapping_add(1);
        self.random.hash_one(self.drawn)
    }
}

/// Whether an error may be sent about `original` (RFC 1122 §3.2.2, RFC 1812 §4.3.2.7).
fn may_be_answered(original: &Ipv4Packet<'_>) -> bool {
    let destination = original.destination();
    original.fragment_offset() == 0
        && !is_bogon(original.source())
        && !destination.is_broadcast()
        && !destination.is_multicast()
        && (original.protocol() != protocol::ICMP || is_icmp_query(original))
}

/// Whether an ICMP message is known to be a query or its reply. Everything else may be an error, and gets silence.
fn is_icmp_query(packet: &Ipv4Packet<'_>) -> bool {
    // Echo reply, echo, router advertisement and solicitation, timestamp, information, address mask (and replies).
    matches!(packet.transport_bytes().first(), Some(0 | 8..=10 | 13..=18))
}

fn write_error(
    kind: IcmpErrorKind,
    original: &Ipv4Packet<'_>,
    source: Ipv4Addr,
    identification: u16,
    out: &mut Vec<u8>,
) {
    let (icmp_type, code, word) = kind.fields();
    out.resize(MIN_HEADER_LEN + ICMP_HEADER_LEN, 0);
    write_quote(original, out);

    let total_len = out.len() as u16;
    let (ip, icmp) = out.split_at_mut(MIN_HEADER_LEN);
    ip[0] = 0x45;
    ip[1] = TOS;
    put_u16(ip, 2, total_len);
    // DF is off: the error must get through whatever the path's MTU is.
    put_u16(ip, 4, identification);
    ip[8] = TTL;
    ip[9] = protocol::ICMP;
    ip[12..16].copy_from_slice(&source.octets());
    ip[16..20].copy_from_slice(&original.source().octets());
    let sum = checksum::checksum(ip);
    put_u16(ip, 10, sum);

    icmp[0] = icmp_type;
    icmp[1] = code;
    put_u16(icmp, 6, word);
    let sum = checksum::checksum(icmp);
    put_u16(icmp, 2, sum);
}

/// Appends the original's headers and as much of what follows as fits.
///
/// A superpacket was never on a wire: its first segment is quoted instead.
fn write_quote(original: &Ipv4Packet<'_>, out: &mut Vec<u8>) {
    let segment_len = original.shape().segment_len();
    let quote = original.head();
    let quote = &quote[..quote.len().min(segment_len).min(MAX_QUOTE_LEN)];
    let at = out.len();
    out.extend_from_slice(quote);
    if segment_len < original.total_len() {
        let header = &mut out[at..];
        let change = Change::NONE.word(original.total_len() as u16, segment_len as u16);
        let sum = change.apply(u16::from_be_bytes([header[10], header[11]]));
        put_u16(header, 2, segment_len as u16);
        put_u16(header, 10, sum);
    }
}

#[cfg(test)]
mod tests;
