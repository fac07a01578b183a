//! The in-order segments of one flow become one superpacket, without a copy.
//!
//! # Theory of operation
//!
//! What a turn of the loop has opened is pushed packet by packet, each with a *tag* that says whose it is (a peer).
//! A packet becomes an *item* of its own, or continues the item that its flow has open: then its payload's [`Span`] is
//! appended to that item's gather list and its headers are forgotten. [`Coalescer::drain`] hands the items out in the
//! order of their first packets, after it has written length, flags and partial checksum into the head of each item
//! that grew.
//!
//! A segment continues an item only if splitting the superpacket again gives back the very segments that went in (but
//! for the identification of atomic datagrams, which means nothing: RFC 6864 §4):
//!
//! - same tag, addresses, ports, TOS, TTL and DF; no IP options, no fragments;
//! - the identification is the next one, or DF is set;
//! - TCP: the sequence number is the next one; acknowledgment, window and options are equal; no flags but ACK, and PSH
//!   or FIN, which end the item;
//! - UDP (USO, where it is enabled): it has a checksum, and its length is that of the IP payload;
//! - all payloads are equally long, and only the last may be shorter, which ends the item.
//!
//! Any other packet of a flow ends what the flow has open, so that order within a flow is kept.
//!
//! A wrong transport checksum is never made right. The superpacket's is made anew, so no segment may join it
//! unverified; and so that it does not depend on its neighbours whether damage gets through, a packet that travels
//! alone is verified as well.

use crate::arena::{Arena, Span};
use crate::drop_reason::DropReason;

use super::checksum::{self, Sum};
use super::ipv4::{
    Ipv4Packet, MAX_PACKET_LEN, MIN_HEADER_LEN, Transport, address_at, protocol, put_u16, tcp_flags,
};
use super::offload::{ChecksumState, Gso, GsoKind, Offload};

/// Items that may wait for a drain.
pub const MAX_ITEMS: usize = 512;
/// Segments of one superpacket: Linux splits no UDP superpacket of more (`UDP_MAX_SEGMENTS` before 6.9).
pub const MAX_SEGMENTS: usize = 64;
/// Flows that may have an item open; the one that was idle longest makes room.
pub const MAX_OPEN_FLOWS: usize = 16;

/// DF in the byte that holds the IP flags (RFC 791 §3.1).
const DONT_FRAGMENT: u8 = 0x40;

/// No further tail.
const END: u32 = u32::MAX;

/// What is to be merged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CoalesceOptions {
    /// Merge at all.
    pub enabled: bool,
    /// Merge UDP datagrams too: only for a receiver that splits them (USO).
    pub udp: bool,
}

impl Default for CoalesceOptions {
    fn default() -> Self {
        Self { enabled: true, udp: false }
    }
}

/// An item as it is handed out: a packet, or a superpacket with its gather list.
#[derive(Clone, Copy, Debug)]
pub struct Gathered<'a, T> {
    /// The first segment, whole.
    pub head: Span,
    /// The payloads of the segments that follow.
    pub tails: &'a [Span],
    /// The sum of their lengths, as [`Ipv4Packet::parse`] wants to know it.
    pub tail_len: usize,
    /// How to split it, and what its checksum field holds.
    pub offload: Offload,
    /// The tag under which its packets were pushed.
    pub tag: T,
}

/// Merges the packets of one turn.
#[derive(Debug)]
pub struct Coalescer<T> {
    options: CoalesceOptions,
    items: Vec<Item<T>>,
    /// The gather lists of all items, linked through `next`.
    tails: Vec<Tail>,
    /// Most recently used last.
    open: Vec<OpenFlow<T>>,
    /// The gather list that is being handed out.
    gather: Vec<Span>,
}

#[derive(Debug)]
struct Item<T> {
    tag: T,
    head: Span,
    offload: Offload,
    kind: GsoKind,
    /// PSH and FIN of the last segment.
    last_flags: u8,
    segments: u8,
    segment_size: u16,
    total_len: u16,
    first_tail: u32,
    last_tail: u32,
}

#[derive(Clone, Copy, Debug)]
struct Tail {
    span: Span,
    next: u32,
}

/// A flow whose item may be continued, and what the next segment must look like.
#[derive(Debug)]
struct OpenFlow<T> {
    key: FlowKey,
    tag: T,
    item: u32,
    constant: Constant,
    next_identification: u16,
    next_sequence: u32,
}

/// Protocol, addresses and ports.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct FlowKey(u128);

/// What all segments of an item have in common.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Constant {
    tos: u8,
    ttl: u8,
    /// Reserved bit and DF, as they stand on the wire.
    ip_flags: u8,
    options_len: u8,
    window: u16,
    acknowledgment: u32,
    options: [u8; 40],
}

/// A packet that may be merged with others of its kind.
struct Candidate {
    constant: Constant,
    kind: GsoKind,
    identification: u16,
    sequence: u32,
    /// PSH and FIN: nothing may follow.
    last_flags: u8,
    transport_header_len: u8,
    payload_len: u16,
}

impl<T> Default for Coalescer<T> {
    /// Merges with the default options. Allocates nothing yet: what [`std::mem::take`] leaves behind.
    fn default() -> Self {
        Self {
            options: CoalesceOptions::default(),
            items: Vec::new(),
            tails: Vec::new(),
            open: Vec::new(),
            gather: Vec::new(),
        }
    }
}

impl<T: Copy + Eq> Coalescer<T> {
    /// An empty coalescer.
    pub fn new(options: CoalesceOptions) -> Self {
        Self {
            options,
            items: Vec::with_capacity(MAX_ITEMS),
            tails: Vec::with_capacity(MAX_ITEMS),
            open: Vec::with_capacity(MAX_OPEN_FLOWS),
            gather: Vec::with_capacity(MAX_SEGMENTS),
        }
    }

    /// How many items wait for a drain.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether nothing waits for a drain.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Whether the next packet may find no room: drain first.
    pub fn is_full(&self) -> bool {
        self.items.len() >= MAX_ITEMS
    }

    /// Takes the packet in `span`, which has a complete checksum, from `tag`.
    ///
    /// # Errors
    /// The reason to drop it: those of [`Ipv4Packet::parse`] and [`Self::push_packet`].
    pub fn push(&mut self, arena: &mut Arena, span: Span, tag: T) -> Result<(), DropReason> {
        let packet = Ipv4Packet::parse(arena.get_mut(span), 0, Offload::NONE)?;
        self.push_packet(&packet, span, tag)
    }

    /// Takes a packet that has been checked already: `packet` is the view of `span`'s bytes, without a gather list.
    ///
    /// # Errors
    /// [`DropReason::BadTransportChecksum`], or [`DropReason::QueueFull`] if it [is full](Self::is_full).
    pub fn push_packet(&mut self, packet: &Ipv4Packet<'_>, span: Span, tag: T) -> Result<(), DropReason> {
        let span = span.take(packet.total_len());
        if !packet.transport_checksum_ok() {
            return Err(DropReason::BadTransportChecksum);
        }
        let key = FlowKey::of(packet);
        let Some(candidate) = Candidate::of(packet, self.options) else {
            self.close(packet, key, tag);
            return self.add_item(packet, span, tag, None).map(|_| ());
        };
        let open = key.and_then(|key| self.open.iter().rposition(|flow| flow.key == key && flow.tag == tag));
        if let Some(at) = open {
            if self.continues(at, &candidate) {
                self.append(at, &candidate, span);
                return Ok(());
            }
            self.open.remove(at);
        }
        let item = self.add_item(packet, span, tag, Some(&candidate))?;
        if let (Some(key), 0) = (key, candidate.last_flags) {
            let constant = candidate.constant;
            let mut flow = OpenFlow { key, tag, item, constant, next_identification: 0, next_sequence: 0 };
            flow.expect_after(&candidate);
            self.open_flow(flow);
        }
        Ok(())
    }

    /// Hands out every item, in the order of their first packets, and forgets them.
    pub fn drain(&mut self, arena: &mut Arena, mut deliver: impl FnMut(&mut Arena, Gathered<'_, T>)) {
        self.open.clear();
        for item in self.items.drain(..) {
            self.gather.clear();
            let mut tail_len = 0;
            let mut next = item.first_tail;
            while let Some(tail) = self.tails.get(next as usize) {
                self.gather.push(tail.span);
                tail_len += tail.span.len as usize;
                next = tail.next;
            }
            let mut offload = item.offload;
            if !self.gather.is_empty() {
                write_head(arena.get_mut(item.head), &item);
                offload = Offload {
                    gso: Some(Gso { kind: item.kind, segment_size: item.segment_size }),
                    checksum: ChecksumState::Partial,
                };
            }
            deliver(
                arena,
                Gathered { head: item.head, tails: &self.gather, tail_len, offload, tag: item.tag },
            );
        }
        self.tails.clear();
    }

    /// Whether the candidate continues the item of the open flow at `at`.
    fn continues(&self, at: usize, candidate: &Candidate) -> bool {
        let flow = &self.open[at];
        let item = &self.items[flow.item as usize];
        // The key names the protocol, so the kind is the same.
        flow.constant == candidate.constant
            && (candidate.constant.ip_flags & DONT_FRAGMENT != 0
                || flow.next_identification == candidate.identification)
            && (item.kind == GsoKind::Udp4 || flow.next_sequence == candidate.sequence)
            && candidate.payload_len <= item.segment_size
            && usize::from(item.total_len) + usize::from(candidate.payload_len) <= MAX_PACKET_LEN
    }

    /// Appends the candidate, whose packet is `span`, to the item of the open flow at `at`.
    fn append(&mut self, at: usize, candidate: &Candidate, span: Span) {
        let flow = &mut self.open[at];
        let item = &mut self.items[flow.item as usize];
        let headers_len = MIN_HEADER_LEN + usize::from(candidate.transport_header_len);
        let tail = self.tails.len() as u32;
        self.tails.push(Tail { span: span.skip(headers_len), next: END });
        match self.tails.get_mut(item.last_tail as usize) {
            Some(last) => last.next = tail,
            None => item.first_tail = tail,
        }
        item.last_tail = tail;
        item.total_len += candidate.payload_len;
        item.segments += 1;
        item.last_flags = candidate.last_flags;
        flow.expect_after(candidate);
        let ends = candidate.last_flags != 0
            || candidate.payload_len < item.segment_size
            || usize::from(item.segments) == MAX_SEGMENTS;
        if ends {
            self.open.remove(at);
        } else {
            self.open[at..].rotate_left(1);
        }
    }

    fn open_flow(&mut self, flow: OpenFlow<T>) {
        if self.open.len() == MAX_OPEN_FLOWS {
            self.open.remove(0);
        }
        self.open.push(flow);
    }

    /// Ends what the packet's flow has open. A fragment has no ports: it ends what its addresses have open.
    fn close(&mut self, packet: &Ipv4Packet<'_>, key: Option<FlowKey>, tag: T) {
        if let Some(key) = key {
            self.open.retain(|flow| flow.key != key || flow.tag != tag);
        } else if packet.is_fragment() {
            let addresses = FlowKey::without_ports(packet);
            self.open.retain(|flow| flow.key.addresses() != addresses || flow.tag != tag);
        }
    }

    fn add_item(
        &mut self,
        packet: &Ipv4Packet<'_>,
        head: Span,
        tag: T,
        candidate: Option<&Candidate>,
    ) -> Result<u32, DropReason> {
        if self.is_full() {
            return Err(DropReason::QueueFull);
        }
        self.items.push(Item {
            tag,
            head,
            offload: packet.offload(),
            kind: candidate.map_or(GsoKind::Tcp4, |candidate| candidate.kind),
            last_flags: 0,
            segments: 1,
            segment_size: candidate.map_or(0, |candidate| candidate.payload_len),
            total_len: packet.total_len() as u16,
            first_tail: END,
            last_tail: END,
        });
        Ok((self.items.len() - 1) as u32)
    }
}

impl<T> OpenFlow<T> {
    /// The next segment must follow `candidate`.
    fn expect_after(&mut self, candidate: &Candidate) {
        self.next_identification = candidate.identification.wrapping_add(1);
        self.next_sequence = candidate.sequence.wrapping_add(u32::from(candidate.payload_len));
    }
}

impl FlowKey {
    /// The flow of a TCP or UDP packet.
    fn of(packet: &Ipv4Packet<'_>) -> Option<Self> {
        let (source, destination) = packet.ports()?;
        Some(Self(Self::without_ports(packet).0 | u128::from(source) << 16 | u128::from(destination)))
    }

    /// Protocol and addresses alone.
    fn without_ports(packet: &Ipv4Packet<'_>) -> Self {
        let source = u128::from(packet.source().to_bits());
        let destination = u128::from(packet.destination().to_bits());
        Self(u128::from(packet.protocol()) << 96 | source << 64 | destination << 32)
    }

    fn addresses(self) -> Self {
        Self(self.0 & !0xffff_ffff)
    }
}

impl Candidate {
    /// `None` for a packet that must travel alone.
    fn of(packet: &Ipv4Packet<'_>, options: CoalesceOptions) -> Option<Self> {
        let payload_len = packet.transport_payload_len();
        if !options.enabled
            || packet.offload() != Offload::NONE
            || packet.header_len() != MIN_HEADER_LEN
            || packet.tail_len() != 0
            || payload_len == 0
        {
            return None;
        }
        let transport = packet.transport_bytes();
        let mut constant = Constant {
            tos: packet.tos(),
            ttl: packet.ttl(),
            ip_flags: packet.head()[6],
            options_len: 0,
            window: 0,
            acknowledgment: 0,
            options: [0; 40],
        };
        let (kind, sequence, last_flags) = match packet.transport() {
            Transport::Tcp { header_len } => {
                let tcp = packet.tcp()?;
                let last_flags = tcp.flags & (tcp_flags::PSH | tcp_flags::FIN);
                // The reserved bits and AE (RFC 9768) beside the data offset are flags, too.
                if tcp.flags & !last_flags != tcp_flags::ACK
                    || transport[12] & 0x0f != 0
                    || transport[18..20] != [0, 0]
                {
                    return None;
                }
                let options = transport.get(20..usize::from(header_len))?;
                constant.options.get_mut(..options.len())?.copy_from_slice(options);
                constant.options_len = options.len() as u8;
                constant.window = tcp.window;
                constant.acknowledgment = tcp.acknowledgment;
                (GsoKind::Tcp4, tcp.sequence, last_flags)
            }
            Transport::Udp => {
                let length = usize::from(u16::from_be_bytes([transport[4], transport[5]]));
                let has_checksum = transport[6..8] != [0, 0];
                if !options.udp || !has_checksum || length != transport.len() {
                    return None;
                }
                (GsoKind::Udp4, 0, 0)
            }
            Transport::Icmp | Transport::Other => return None,
        };
        Some(Self {
            constant,
            kind,
            identification: packet.identification(),
            sequence,
            last_flags,
            transport_header_len: packet.transport_header_len() as u8,
            payload_len: payload_len as u16,
        })
    }
}

/// Makes the first segment's headers those of the superpacket.
fn write_head<T>(head: &mut [u8], item: &Item<T>) {
    let (ip, transport) = head.split_at_mut(MIN_HEADER_LEN);
    put_u16(ip, 2, item.total_len);
    put_u16(ip, 10, 0);
    let ip_checksum = checksum::checksum(ip);
    put_u16(ip, 10, ip_checksum);

    let length = item.total_len - MIN_HEADER_LEN as u16;
    let pseudo_header: Sum = checksum::pseudo_header(address_at(ip, 12), address_at(ip, 16), ip[9], length);
    if ip[9] == protocol::UDP {
        put_u16(transport, 4, length);
        put_u16(transport, 6, pseudo_header.partial());
    } else {
        transport[13] |= item.last_flags;
        put_u16(transport, 16, pseudo_header.partial());
    }
}

#[cfg(test)]
mod tests;
