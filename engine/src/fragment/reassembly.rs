//! Fragments become the datagram that they were cut from (RFC 791 §3.2, RFC 815).
//!
//! # Theory of operation
//!
//! [`Reassembly::push`] keeps a copy of each fragment under its datagram's key: source, destination, protocol,
//! identification. Pieces are kept in order and never overlap, so a datagram is complete as soon as its end is known
//! and the lengths of its pieces add up to it.
//!
//! Fragments that overlap, or disagree about where the datagram ends, are an attack (RFC 1858, RFC 3128, *teardrop*),
//! not an accident: the whole datagram is refused, and so are the fragments of it that are still to come, until it
//! expires (RFC 5722 §4, which says so for IPv6). A fragment that arrives twice, byte for byte, changes nothing.
//!
//! A flood of fragments must not stop anybody's fragments but its sender's (RFC 4787 REQ-14a): each source has its own
//! share of datagrams and memory, within which its oldest datagram makes room. Where all shares together leave no room,
//! the oldest datagram of the source that holds the most does: whoever forges a hundred sources holds as much of each
//! as anybody, and must not keep what it has against those who come later. [`Reassembly::expire`] is the one place
//! where time takes its toll.

use std::cmp::Reverse;
use std::net::Ipv4Addr;
use std::time::Duration;

use foldhash::quality::RandomState;
use hashbrown::HashMap;

use crate::clock::Timestamp;
use crate::drop_reason::{DropCounters, DropReason};
use crate::wire::checksum;
use crate::wire::ipv4::{Ipv4Packet, MAX_PACKET_LEN, put_u16};

/// How long the missing fragments may take, counted from the first that arrives: RFC 791 §3.2 suggests 15 s.
pub const TIMEOUT: Duration = Duration::from_secs(15);
/// Incomplete datagrams in all, and of one source.
pub const MAX_DATAGRAMS: usize = 256;
/// Incomplete datagrams of one source.
pub const MAX_DATAGRAMS_PER_SOURCE: usize = 32;
/// Fragments of one datagram: 64 KiB in pieces of 512 bytes.
pub const MAX_FRAGMENTS: usize = 128;
/// Memory of all fragments, in bytes.
pub const MAX_BYTES: usize = 4 << 20;
/// Memory of one source's fragments, in bytes.
pub const MAX_BYTES_PER_SOURCE: usize = 1 << 20;

/// What keeping a fragment costs beside its payload: allocation and list entry.
const PIECE_OVERHEAD: usize = 64;
/// The reserved bit, as it stands in the header's byte 6. DF is not kept: it forbade to cut the fragments further, and
/// says nothing about the datagram, whose sender has cut it himself.
const RESERVED: u8 = 0x80;
/// The congestion-experienced codepoint (RFC 3168 §5), and the mask of the ECN field.
const CE: u8 = 0b11;
/// Offsets count in units of 8 bytes (RFC 791 §3.1).
const UNIT: usize = 8;

/// Incomplete datagrams.
#[derive(Debug, Default)]
pub struct Reassembly {
    // Keyed (seeded by the system): the senders choose what is hashed.
    datagrams: HashMap<Key, Datagram, RandomState>,
    sources: HashMap<Ipv4Addr, Share, RandomState>,
    bytes: usize,
    /// No datagram expires before.
    next_expiry: Option<Timestamp>,
    discarded: DropCounters,
}

/// RFC 791 §3.2: what all fragments of a datagram have in common.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Key {
    source: Ipv4Addr,
    destination: Ipv4Addr,
    protocol: u8,
    identification: u16,
}

#[derive(Debug)]
struct Datagram {
    expires: Timestamp,
    /// In order of their offsets, without overlap.
    pieces: Vec<Piece>,
    /// The payload's length, once the last fragment has arrived.
    end: Option<usize>,
    /// The first fragment's header, once it has arrived.
    header: Vec<u8>,
    /// A bit for each ECN codepoint among the fragments.
    ecn: u8,
    /// The pieces' payloads.
    payload_bytes: usize,
    /// What the pieces cost, overhead included.
    bytes: usize,
    /// Why none of its fragments is taken any more.
    refused: Option<DropReason>,
}

#[derive(Debug)]
struct Piece {
    offset: usize,
    payload: Box<[u8]>,
}

impl Piece {
    fn end(&self) -> usize {
        self.offset + self.payload.len()
    }
}

/// What one source holds.
#[derive(Clone, Copy, Default, Debug)]
struct Share {
    datagrams: usize,
    bytes: usize,
}

impl Reassembly {
    /// Takes a fragment, whose payload is in the head; returns the whole datagram if it was the last one missing.
    ///
    /// The datagram has the header of its first fragment, with length, fragment fields, ECN (RFC 3168 §5.3) and
    /// checksum set right. A packet that is no fragment comes back as it is.
    ///
    /// # Errors
    /// [`DropReason::BadFragment`] or [`DropReason::FragmentLimit`]: the fragment was not kept. What had been kept of
    /// its datagram may be given up too, see [`Self::take_discarded`].
    pub fn push(&mut self, packet: &Ipv4Packet<'_>, now: Timestamp) -> Result<Option<Vec<u8>>, DropReason> {
        if !packet.is_fragment() {
            return Ok(Some(packet.head().to_vec()));
        }
        check_alone(packet)?;
        let key = Key {
            source: packet.source(),
            destination: packet.destination(),
            protocol: packet.protocol(),
            identification: packet.identification(),
        };
        if !self.datagrams.contains_key(&key) {
            self.make_room_for_datagram(key.source)?;
            self.open(key, now);
        }
        let cost = packet.transport_bytes().len() + PIECE_OVERHEAD;
        self.make_room_for_bytes(key, cost)?;

        let Some(datagram) = self.datagrams.get_mut(&key) else { return Err(DropReason::FragmentLimit) };
        match datagram.insert(packet) {
            Ok(Inserted::Duplicate) => Ok(None),
            Ok(Inserted::Kept) => {
                datagram.bytes += cost;
                let complete = datagram.is_complete();
                self.bytes += cost;
                self.sources.entry(key.source).or_default().bytes += cost;
                if complete { self.complete(key) } else { Ok(None) }
            }
            Err(reason) => {
                self.refuse(key, reason);
                Err(reason)
            }
        }
    }

    /// Gives up the datagrams whose fragments took too long, and returns how many fragments of theirs were kept: they
    /// are to be counted under [`DropReason::FragmentTimeout`].
    pub fn expire(&mut self, now: Timestamp) -> u64 {
        self.expire_with(now, |_| {})
    }

    /// Like [`Self::expire`], and hands out the first fragment, where it had arrived, as a packet: an ICMP error
    /// *reassembly time exceeded* is due (RFC 792, RFC 1122 §3.3.2).
    pub fn expire_with(&mut self, now: Timestamp, mut timed_out: impl FnMut(&mut [u8])) -> u64 {
        if self.next_expiry.is_none_or(|next| now < next) {
            return 0;
        }
        let expired: Vec<Key> = self
            .datagrams
            .iter()
            .filter(|(_, datagram)| datagram.expires <= now)
            .map(|(key, _)| *key)
            .collect();
        let mut fragments = 0;
        for key in expired {
            if let Some(datagram) = self.close(key) {
                fragments += datagram.pieces.len() as u64;
                if let Some(mut first) = datagram.first_fragment() {
                    timed_out(&mut first);
                }
            }
        }
        self.next_expiry = self.datagrams.values().map(|datagram| datagram.expires).min();
        fragments
    }

    /// When [`Self::expire`] should be called next; `None` while nothing is kept.
    pub fn next_expiry(&self) -> Option<Timestamp> {
        self.next_expiry
    }

    /// Fragments that had been kept and were then given up for another reason than time, since the last call.
    pub fn take_discarded(&mut self) -> DropCounters {
        std::mem::take(&mut self.discarded)
    }

    /// How many datagrams are incomplete.
    pub fn len(&self) -> usize {
        self.datagrams.len()
    }

    /// Whether nothing is kept.
    pub fn is_empty(&self) -> bool {
        self.datagrams.is_empty()
    }

    /// Whether every count is back at zero: what a test may expect after the last expiry.
    #[cfg(test)]
    pub(super) fn holds_nothing(&self) -> bool {
        self.datagrams.is_empty() && self.sources.is_empty() && self.bytes == 0 && self.next_expiry.is_none()
    }

    fn make_room_for_datagram(&mut self, source: Ipv4Addr) -> Result<(), DropReason> {
        if self.share(source).datagrams >= MAX_DATAGRAMS_PER_SOURCE {
            self.evict_oldest(|key, _| key.source == source, |_| 0)?;
        } else if self.datagrams.len() >= MAX_DATAGRAMS {
            self.evict_oldest(|_, _| true, |share| share.datagrams)?;
        }
        Ok(())
    }

    fn make_room_for_bytes(&mut self, key: Key, cost: usize) -> Result<(), DropReason> {
        while self.share(key.source).bytes + cost > MAX_BYTES_PER_SOURCE {
            self.evict_oldest(|other, _| other.source == key.source && *other != key, |_| 0)?;
        }
        while self.bytes + cost > MAX_BYTES {
            self.evict_oldest(|other, datagram| *other != key && datagram.bytes > 0, |share| share.bytes)?;
        }
        Ok(())
    }

    /// What `source` holds.
    fn share(&self, source: Ipv4Addr) -> Share {
        self.sources.get(&source).copied().unwrap_or_default()
    }

    /// Gives up one datagram of those that `may_go`: the oldest of the source with the most, by `measure`.
    fn evict_oldest(
        &mut self,
        may_go: impl Fn(&Key, &Datagram) -> bool,
        measure: impl Fn(Share) -> usize,
    ) -> Result<(), DropReason> {
        // Shares are looked up only where they differ: a flood from forged sources should cost little.
        let most = self.sources.values().map(|&share| measure(share)).max().unwrap_or(0);
        let differ = self.sources.values().any(|&share| measure(share) != most);
        let rank = |key: &Key| if differ { Reverse(measure(self.share(key.source))) } else { Reverse(most) };
        let oldest = self
            .datagrams
            .iter()
            .filter(|(key, datagram)| may_go(key, datagram))
            .min_by_key(|(key, datagram)| (rank(key), datagram.expires))
            .map(|(key, _)| *key)
            .ok_or(DropReason::FragmentLimit)?;
        if let Some(datagram) = self.close(oldest) {
            self.discarded.add(DropReason::FragmentLimit, datagram.pieces.len() as u64);
        }
        Ok(())
    }

    fn open(&mut self, key: Key, now: Timestamp) {
        let expires = now + TIMEOUT;
        self.next_expiry.get_or_insert(expires);
        self.sources.entry(key.source).or_default().datagrams += 1;
        self.datagrams.insert(
            key,
            Datagram {
                expires,
                pieces: Vec::new(),
                end: None,
                header: Vec::new(),
                ecn: 0,
                payload_bytes: 0,
                bytes: 0,
                refused: None,
            },
        );
    }

    fn close(&mut self, key: Key) -> Option<Datagram> {
        let datagram = self.datagrams.remove(&key)?;
        self.release(key.source, datagram.bytes);
        if let Some(share) = self.sources.get_mut(&key.source) {
            share.datagrams -= 1;
            if share.datagrams == 0 {
                self.sources.remove(&key.source);
            }
        }
        if self.datagrams.is_empty() {
            self.next_expiry = None;
        }
        Some(datagram)
    }

    fn complete(&mut self, key: Key) -> Result<Option<Vec<u8>>, DropReason> {
        let Some(datagram) = self.close(key) else { return Ok(None) };
        assemble(&datagram).map(Some).inspect_err(|&reason| {
            // The caller counts the last fragment.
            self.discarded.add(reason, datagram.pieces.len() as u64 - 1);
        })
    }

    /// Forgets a datagram's fragments, and takes no more of them until it expires.
    fn refuse(&mut self, key: Key, reason: DropReason) {
        let Some(datagram) = self.datagrams.get_mut(&key) else { return };
        let pieces = std::mem::take(&mut datagram.pieces);
        let bytes = std::mem::take(&mut datagram.bytes);
        datagram.refused = Some(reason);
        self.discarded.add(reason, pieces.len() as u64);
        self.release(key.source, bytes);
    }

    fn release(&mut self, source: Ipv4Addr, bytes: usize) {
        self.bytes -= bytes;
        if let Some(share) = self.sources.get_mut(&source) {
            share.bytes -= bytes;
        }
    }
}

enum Inserted {
    Kept,
    Duplicate,
}

impl Datagram {
    fn insert(&mut self, packet: &Ipv4Packet<'_>) -> Result<Inserted, DropReason> {
        if let Some(reason) = self.refused {
            return Err(reason);
        }
        let offset = packet.fragment_offset();
        let payload = packet.transport_bytes();
        let end = offset + payload.len();
        let is_last = !packet.more_fragments();

        let at = self.pieces.partition_point(|piece| piece.offset < offset);
        if let Some(piece) = self.pieces.get(at).filter(|piece| piece.offset == offset) {
            let same = *piece.payload == *payload && is_last == (self.end == Some(end));
            return if same { Ok(Inserted::Duplicate) } else { Err(DropReason::BadFragment) };
        }
        let overlaps_previous = at > 0 && self.pieces[at - 1].end() > offset;
        let overlaps_next = self.pieces.get(at).is_some_and(|piece| piece.offset < end);
        let is_behind_end = self.end.is_some_and(|known| end > known);
        let is_second_end =
            is_last && (self.end.is_some() || self.pieces.last().is_some_and(|piece| piece.end() > end));
        if overlaps_previous || overlaps_next || is_behind_end || is_second_end {
            return Err(DropReason::BadFragment);
        }
        if self.pieces.len() == MAX_FRAGMENTS {
            return Err(DropReason::FragmentLimit);
        }
        if is_last {
            self.end = Some(end);
        }
        if offset == 0 {
            self.header = packet.head()[..packet.header_len()].to_vec();
        }
        self.ecn |= 1 << (packet.tos() & CE);
        self.payload_bytes += payload.len();
        self.pieces.insert(at, Piece { offset, payload: payload.into() });
        Ok(Inserted::Kept)
    }

    fn is_complete(&self) -> bool {
        self.end == Some(self.payload_bytes)
    }

    /// The fragment with offset zero, as it arrived.
    fn first_fragment(&self) -> Option<Vec<u8>> {
        let first = self.pieces.first().filter(|piece| piece.offset == 0)?;
        Some([&self.header, &*first.payload].concat())
    }
}

/// What can be said of a fragment without the others.
fn check_alone(packet: &Ipv4Packet<'_>) -> Result<(), DropReason> {
    let len = packet.transport_bytes().len();
    let is_cut_right = !packet.more_fragments() || len % UNIT == 0;
    let fits = packet.header_len() + packet.fragment_offset() + len <= MAX_PACKET_LEN;
    if len > 0 && is_cut_right && fits { Ok(()) } else { Err(DropReason::BadFragment) }
}

/// Puts a complete datagram together.
fn assemble(datagram: &Datagram) -> Result<Vec<u8>, DropReason> {
    let total_len = datagram.header.len() + datagram.payload_bytes;
    let saw = |codepoint: u8| datagram.ecn & 1 << codepoint != 0;
    // RFC 3168 §5.3: congestion must not be forgotten, and Not-ECT beside CE is somebody's fraud.
    if total_len > MAX_PACKET_LEN || datagram.header.is_empty() || saw(CE) && saw(0) {
        return Err(DropReason::BadFragment);
    }
    let mut packet = Vec::with_capacity(total_len);
    packet.extend_from_slice(&datagram.header);
    for piece in &datagram.pieces {
        packet.extend_from_slice(&piece.payload);
    }
    if saw(CE) {
        packet[1] |= CE;
    }
    put_u16(&mut packet, 2, total_len as u16);
    packet[6] &= RESERVED;
    packet[7] = 0;
    put_u16(&mut packet, 10, 0);
    let sum = checksum::checksum(&packet[..datagram.header.len()]);
    put_u16(&mut packet, 10, sum);
    Ok(packet)
}
