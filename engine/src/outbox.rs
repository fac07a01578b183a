//! What a turn of the loop produces: packets for the devices, sealed trains for the transport.
//!
//! The core decides and rewrites headers in place; the payload stays in the [`Arena`] and is only named here, until
//! [`send_to_peers`] seals it out of there. The shell ([`crate::shard`]) hands the outbox to the devices at the end of
//! the turn.

use std::ops::Range;

use crate::arena::{Arena, Span};
use crate::clock::Timestamp;
use crate::core::Core;
use crate::drop_reason::{DropCounters, DropReason};
use crate::external::MacAddress;
use crate::external::neighbor::ArpFrame;
use crate::handoffs::Handoff;
use crate::path::Path;
use crate::transport::{MAX_TRAIN_BYTES, MAX_TRAIN_SEGMENTS, SendTrain};
use crate::tunnel::{Outgoing, PeerId, Sealer, Tunnel};
use crate::wire::{Segments, SegmentsInPlace, Shape, VirtioNetHeader};

mod padding;
mod round_robin;

use self::padding::Run;
use self::round_robin::RoundRobin;

/// Where a packet's head lies.
#[derive(Debug)]
pub enum Bytes {
    /// In the arena, where it was received (the rule).
    Arena(Span),
    /// On its own: an ICMP error of the gateway, a reassembled datagram, a fragment, a packet of another shard.
    Owned(Vec<u8>),
}

impl Bytes {
    /// The bytes.
    pub fn get<'a>(&'a self, arena: &'a Arena) -> &'a [u8] {
        match self {
            Self::Arena(span) => arena.get(*span),
            Self::Owned(bytes) => bytes,
        }
    }

    /// The bytes, to be changed.
    pub fn get_mut<'a>(&'a mut self, arena: &'a mut Arena) -> &'a mut [u8] {
        match self {
            Self::Arena(span) => arena.get_mut(*span),
            Self::Owned(bytes) => bytes,
        }
    }
}

/// A packet on its way out: its head, and the gather list of its payload's rest.
#[derive(Debug)]
pub struct Gather {
    /// Headers, and the payload as far as it is not in the gather list.
    pub head: Bytes,
    /// Indices into [`Outbox::tails`].
    pub tails: Range<usize>,
}

impl Gather {
    /// A packet that lies in one piece.
    pub fn whole(head: Bytes) -> Self {
        Self { head, tails: 0..0 }
    }

    /// Its gather list among those of the outbox.
    pub fn tails_of<'a>(&self, tails: &'a [Span]) -> &'a [Span] {
        &tails[self.tails.clone()]
    }

    /// It, cut into what it has to be split into.
    pub fn segments<'a>(
        &'a self,
        shape: Shape,
        tails: &'a [Span],
        arena: &'a Arena,
    ) -> Segments<'a, impl Iterator<Item = &'a [u8]>> {
        let slices = self.tails_of(tails).iter().map(|&tail| arena.get(tail));
        Segments::new(self.head.get(arena), shape, slices)
    }
}

/// A packet for a device of the kernel.
#[derive(Debug)]
pub struct DeviceFrame {
    /// The packet.
    pub packet: Gather,
    /// Its offload metadata, as this device wants it.
    pub header: VirtioNetHeader,
    /// Its shape, in case the device refuses the superpacket and it has to be split here.
    pub shape: Shape,
    /// The next hop's link address; zero on a TUN device.
    pub destination_mac: MacAddress,
}

/// A packet for a peer, to be split and sealed.
#[derive(Debug)]
pub struct PeerFrame {
    /// The peer.
    pub peer: PeerId,
    /// The packet.
    pub packet: Gather,
    /// Its shape.
    pub shape: Shape,
    /// In which of its peer's rounds it is sealed, see [`RoundRobin`].
    round: u32,
}

impl PeerFrame {
    /// A packet for `peer`.
    pub fn new(peer: PeerId, packet: Gather, shape: Shape) -> Self {
        Self { peer, packet, shape, round: 0 }
    }
}

/// Everything that one turn sends.
#[derive(Default, Debug)]
pub struct Outbox {
    /// IPv4 packets for the external interface.
    pub external: Vec<DeviceFrame>,
    /// IPv4 packets for the TUN device.
    pub tun: Vec<DeviceFrame>,
    /// IPv4 packets to be sealed.
    pub peers: Vec<PeerFrame>,
    /// ARP requests.
    pub arp: Vec<ArpFrame>,
    /// Packets for other shards.
    pub handoffs: Vec<(u8, Handoff)>,
    /// How many datagrams of this turn were for sessions of other shards.
    pub misdirected: usize,
    /// WireGuard messages that are ready: handshakes, cookies, keepalives, flushed queues.
    pub datagrams: Outgoing,
    /// The gather lists, one after another.
    pub tails: Vec<Span>,
    order: RoundRobin,
}

impl Outbox {
    /// Appends a gather list and returns its place.
    pub fn push_tails(&mut self, tails: &[Span]) -> Range<usize> {
        let start = self.tails.len();
        self.tails.extend_from_slice(tails);
        start..self.tails.len()
    }

    /// Copies a packet into one piece.
    pub fn to_vec(&self, packet: &Gather, arena: &Arena) -> Vec<u8> {
        let mut bytes = packet.head.get(arena).to_vec();
        for &tail in packet.tails_of(&self.tails) {
            bytes.extend_from_slice(arena.get(tail));
        }
        bytes
    }

    /// Forgets everything, keeps the memory.
    pub fn clear(&mut self) {
        self.external.clear();
        self.tun.clear();
        self.peers.clear();
        self.arp.clear();
        self.handoffs.clear();
        self.misdirected = 0;
        self.datagrams.datagrams.clear();
        self.tails.clear();
    }
}

/// A train: datagrams of equal size on one path (the last may be shorter), one behind another.
#[derive(Clone, Debug)]
pub struct SealedTrain {
    /// The path.
    pub to: Path,
    /// Its bytes within the buffer.
    pub range: Range<usize>,
    /// Bytes of each datagram but the last.
    pub segment_size: usize,
    last: usize,
}

/// Room for the sealed datagrams between two sends.
#[derive(Debug)]
pub struct TrainBuffer {
    bytes: Box<[u8]>,
    used: usize,
    trains: Vec<SealedTrain>,
    /// Whose the last datagram is.
    last_peer: Option<PeerId>,
}

/// Enough for four full trains, and little enough to stay in the cache.
const TRAIN_BUFFER_SIZE: usize = 256 * 1024;
/// Bytes whose sealing takes longer than sending what is ready.
const BULK_BYTES: usize = 16 * 1024;
/// What sealing adds to a packet, at most: header and tag, and padding to a multiple of 16.
const MAX_SEALING_OVERHEAD: usize = Sealer::OVERHEAD + 15;
impl Default for TrainBuffer {
    fn default() -> Self {
        Self {
            bytes: vec![0; TRAIN_BUFFER_SIZE].into_boxed_slice(),
            used: 0,
            trains: Vec::new(),
            last_peer: None,
        }
    }
}

impl TrainBuffer {
    /// A train's bytes.
    fn bytes(&self, train: &SealedTrain) -> &[u8] {
        &self.bytes[train.range.clone()]
    }

    /// Whether what is in it is to be sent before up to `bytes` bytes for `peer` are sealed: because they do not fit,
    /// or because a ping of somebody else's should not wait until they are done.
    fn is_due(&self, peer: PeerId, bytes: usize) -> bool {
        let is_full = self.used + bytes > self.bytes.len();
        let others_wait = self.last_peer != Some(peer) && bytes >= BULK_BYTES;
        self.used > 0 && (is_full || others_wait)
    }

    /// The room behind the last datagram.
    fn room(&mut self) -> &mut [u8] {
        &mut self.bytes[self.used..]
    }

    /// Forgets the trains, keeps the memory.
    fn clear(&mut self) {
        self.used = 0;
        self.trains.clear();
        self.last_peer = None;
    }

    /// Takes the `len` bytes that were just written behind the last datagram as the next one.
    fn commit(&mut self, to: Path, len: usize) {
        let range = self.used..self.used + len;
        self.used = range.end;
        if let Some(train) = self.trains.last_mut() {
            // Only the last datagram of a train may be shorter (udp(7), UDP_SEGMENT).
            let open = train.last == train.segment_size && len <= train.segment_size;
            let room = train.range.len() + len <= MAX_TRAIN_BYTES
                && train.range.len() / train.segment_size < MAX_TRAIN_SEGMENTS;
            if train.to == to && open && room {
                train.range.end = range.end;
                train.last = len;
                return;
            }
        }
        self.trains.push(SealedTrain { to, range, segment_size: len, last: len });
    }
}

/// Seals the packets for peers, and hands all that is for peers to `send`, some trains at a time, in the order in which
/// it leaves.
///
/// What the tunnel has made itself comes first: packets that waited for a session are older than what came in the turn
/// that brought it. What it adds meanwhile, handshakes of peers without a session, comes last.
pub fn send_to_peers<C: Core>(
    outbox: &mut Outbox,
    core: &mut C,
    arena: &mut Arena,
    buffer: &mut TrainBuffer,
    now: Timestamp,
    mut send: impl FnMut(&[SendTrain<'_>], &mut C),
) {
    send_ready(&mut outbox.datagrams, core, &mut send);
    outbox.order.arrange(&mut outbox.peers);
    let (mut next, mut more) = (0, true);
    while more {
        let (tunnel, drops) = core.sealing();
        more = seal_frames(outbox, &mut next, arena, tunnel, buffer, now, drops);
        let trains = buffer.trains.iter().map(|train| SendTrain {
            to: train.to,
            bytes: buffer.bytes(train),
            segment_size: train.segment_size,
        });
        send_all(trains, core, &mut send);
        buffer.clear();
    }
    send_ready(&mut outbox.datagrams, core, &mut send);
}

/// Sends what the tunnel has made itself.
fn send_ready<C: Core>(ready: &mut Outgoing, core: &mut C, send: &mut impl FnMut(&[SendTrain<'_>], &mut C)) {
    let messages = ready.datagrams.iter();
    let trains = messages.map(|(to, bytes)| SendTrain { to: *to, bytes, segment_size: bytes.len() });
    send_all(trains, core, send);
    ready.datagrams.clear();
}

fn send_all<'a, C: Core>(
    trains: impl Iterator<Item = SendTrain<'a>>,
    core: &mut C,
    send: &mut impl FnMut(&[SendTrain<'_>], &mut C),
) {
    let trains: Vec<SendTrain<'a>> = trains.collect();
    if !trains.is_empty() {
        send(&trains, core);
    }
}

/// Splits and seals the packets for peers, from `*next` on, until all are done or `buffer` is full.
///
/// Returns whether there is more: the caller then sends the trains, clears `buffer`, and calls again. A packet for a
/// peer without a session goes to the tunnel's queue, which starts a handshake. Packets that lie in one piece are split
/// where they lie: their bytes are of no use to anybody afterwards.
pub fn seal_frames(
    outbox: &mut Outbox,
    next: &mut usize,
    arena: &mut Arena,
    tunnel: &mut Tunnel,
    buffer: &mut TrainBuffer,
    now: Timestamp,
    drops: &mut DropCounters,
) -> bool {
    let mut run = Run::default();
    while *next < outbox.peers.len() {
        let padded_len = run.padded_len(&outbox.peers, *next);
        let Outbox { peers, tails, datagrams, .. } = &mut *outbox;
        let PeerFrame { peer, packet, shape, .. } = &mut peers[*next];
        let (peer, shape) = (*peer, *shape);
        let worst = shape.segment_count() * (shape.segment_len().max(padded_len) + MAX_SEALING_OVERHEAD);
        if buffer.is_due(peer, worst) {
            return true;
        }
        buffer.last_peer = Some(peer);
        *next += 1;
        if worst > buffer.bytes.len() {
            // Segments so small that their headers outweigh them a hundred times: nobody sends that legitimately.
            drops.count_segments(DropReason::TooBig, shape);
            continue;
        }
        let Some(mut sealer) = tunnel.sealer(peer, now) else {
            let mut segments = packet.segments(shape, tails, arena);
            while let Some(len) = segments.next_into(buffer.room()) {
                if let Err(reason) = tunnel.enqueue(peer, &buffer.room()[..len], now, datagrams) {
                    drops.count(reason);
                }
            }
            continue;
        };
        let to = sealer.endpoint();
        sealer.pad_to(padded_len);
        let mut commit = |buffer: &mut TrainBuffer, sealed| match sealed {
            Ok(len) => buffer.commit(to, len),
            Err(reason) => drops.count(reason),
        };
        if packet.tails.is_empty() {
            let mut segments = SegmentsInPlace::new(packet.head.get_mut(arena), shape);
            while let Some(segment) = segments.next_segment() {
                let sealed = sealer.seal_from(segment, buffer.room());
                commit(buffer, sealed);
            }
        } else {
            let mut segments = packet.segments(shape, tails, arena);
            while let Some(len) = segments.next_into(&mut buffer.room()[Sealer::HEADER_LEN..]) {
                let sealed = sealer.seal(buffer.room(), len);
                commit(buffer, sealed);
            }
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddrV4};

    use super::*;

    #[test]
    fn what_is_sealed_for_one_peer_does_not_wait_for_anothers_superpacket() {
        let (one, other) = (PeerId(1), PeerId(2));
        let mut buffer = TrainBuffer::default();
        assert!(!buffer.is_due(other, 60_000), "there is nothing to send yet");
        buffer.last_peer = Some(one);
        buffer.commit(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 1).into(), 120);
        assert!(buffer.is_due(other, 60_000));
        assert!(!buffer.is_due(one, 60_000), "its own packets travel together");
        assert!(!buffer.is_due(other, 120), "small packets of many peers do, too");
        assert!(buffer.is_due(one, TRAIN_BUFFER_SIZE));
    }
}
