//! One superpacket becomes the segments that it stands for.
//!
//! # Theory of operation
//!
//! A superpacket is a head (all headers, perhaps payload) and a gather list of payload slices. [`Segments`] walks it
//! once: [`Segments::next_into`] writes one complete IPv4 packet after another into the caller's buffers. Where the
//! whole superpacket lies in one piece, as almost always, [`SegmentsInPlace`] need not copy: it puts each segment
//! together where its payload lies, by writing its headers over the end of the payload before it, which has been sealed
//! by then.
//!
//! Per superpacket the headers are summed once, without the words that differ from segment to segment; per segment the
//! headers are copied, and the differing words are set and added:
//!
//! | word | TCP | UDP (USO) |
//! |---|---|---|
//! | IP total length | of the segment | of the datagram |
//! | IP identification | plus one per segment | plus one per datagram |
//! | sequence number | plus the payload before it | - |
//! | FIN, PSH | on the last only | - |
//! | CWR | on the first only (RFC 3168 §6.1.2) | - |
//! | UDP length | - | of the datagram |
//! | checksums | complete | complete |
//!
//! A packet that is no superpacket comes out as it is, with its checksum completed.

use super::checksum::{self, Sum};
use super::ipv4::{Ipv4Packet, Transport, address_at, put_u16, tcp_flags, u16_at, u32_at};
use super::offload::{ChecksumState, GsoKind};
use super::shape::Shape;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    /// A TCP superpacket.
    Tcp,
    /// A UDP superpacket.
    Udp,
    /// One packet, whose partial checksum is to be completed.
    Unfinished,
    /// One packet, to be copied.
    Verbatim,
}

/// What is to be done, and with how many payload bytes at a time.
fn plan(shape: Shape) -> (Kind, usize) {
    let payload_len = shape.payload_len();
    match (shape.gso(), shape.transport()) {
        (Some((GsoKind::Tcp4 | GsoKind::Tcp4Ecn, size)), _) => (Kind::Tcp, size),
        (Some((GsoKind::Udp4, size)), _) => (Kind::Udp, size),
        (None, Transport::Tcp { .. } | Transport::Udp)
            if shape.offload().checksum == ChecksumState::Partial =>
        {
            (Kind::Unfinished, payload_len)
        }
        (None, _) => (Kind::Verbatim, payload_len),
    }
}

/// Makes the headers of one segment after another.
#[derive(Debug)]
struct Cutter {
    shape: Shape,
    kind: Kind,
    segment_size: usize,
    /// Payload bytes of the segments to come.
    remaining: usize,
    next: usize,
    count: usize,
    /// The IP header's sum without total length, identification and checksum.
    ip_sum: Sum,
    /// The sum of pseudo-header and transport header without the words that differ.
    transport_sum: Sum,
}

impl Cutter {
    /// For the packet of which `shape` was taken; there are no segments if `headers`, its beginning, is `None`.
    fn new(headers: Option<&[u8]>, shape: Shape) -> Self {
        let (kind, segment_size) = plan(shape);
        let (ip_sum, transport_sum) = match (kind, headers) {
            (Kind::Tcp | Kind::Udp, Some(headers)) => constant_sums(headers, shape.ip_header_len(), kind),
            _ => (Sum::ZERO, Sum::ZERO),
        };
        let count = if headers.is_some() { shape.segment_count() } else { 0 };
        let remaining = shape.payload_len();
        Self { shape, kind, segment_size, remaining, next: 0, count, ip_sum, transport_sum }
    }

    /// Payload bytes of the next segment; `None` when there are no more.
    fn next_payload_len(&self) -> Option<usize> {
        (self.next < self.count).then(|| self.remaining.min(self.segment_size))
    }

    /// Bytes are missing: there are no more segments.
    fn end(&mut self) {
        self.count = self.next;
    }

    /// Makes the next segment of `packet`: the superpacket's headers, and the segment's payload.
    fn finish(&mut self, packet: &mut [u8]) {
        let (headers, payload) = packet.split_at_mut(self.shape.headers_len());
        self.remaining -= payload.len();
        match self.kind {
            Kind::Tcp => {
                self.finish_ip(headers, payload.len());
                self.finish_tcp(headers, payload);
            }
            Kind::Udp => {
                self.finish_ip(headers, payload.len());
                self.finish_udp(headers, payload);
            }
            Kind::Unfinished => complete_checksum(packet, self.shape),
            Kind::Verbatim => {}
        }
        self.next += 1;
    }

    fn finish_ip(&self, headers: &mut [u8], payload_len: usize) {
        let total_len = (headers.len() + payload_len) as u16;
        let identification = u16_at(headers, 4).wrapping_add(self.next as u16);
        put_u16(headers, 2, total_len);
        put_u16(headers, 4, identification);
        put_u16(headers, 10, self.ip_sum.add_word(total_len).add_word(identification).finish());
    }

    fn finish_tcp(&self, headers: &mut [u8], payload: &[u8]) {
        let tcp = &mut headers[self.shape.ip_header_len()..];
        let before = (self.next * self.segment_size) as u32;
        let sequence = u32_at(tcp, 4).wrapping_add(before);
        tcp[4..8].copy_from_slice(&sequence.to_be_bytes());
        if self.next > 0 {
            tcp[13] &= !tcp_flags::CWR;
        }
        if self.next + 1 < self.count {
            tcp[13] &= !(tcp_flags::FIN | tcp_flags::PSH);
        }
        let sum = self
            .transport_sum
            .add_word((tcp.len() + payload.len()) as u16)
            .add_bytes(&tcp[4..8])
            .add_bytes(&tcp[12..14])
            .add_bytes(payload);
        put_u16(tcp, 16, sum.finish());
    }

    fn finish_udp(&self, headers: &mut [u8], payload: &[u8]) {
        let udp = &mut headers[self.shape.ip_header_len()..];
        let length = (udp.len() + payload.len()) as u16;
        put_u16(udp, 4, length);
        // The length is summed twice: in the pseudo-header and in the header (RFC 768).
        let sum = self.transport_sum.add_word(length).add_word(length).add_bytes(payload);
        put_u16(udp, 6, nonzero(sum.finish()));
    }
}

/// The segments of one packet, in order, copied out of it.
///
/// `I` yields the slices of the gather list.
#[derive(Debug)]
pub struct Segments<'a, I> {
    cutter: Cutter,
    headers: &'a [u8],
    /// The unread part of the slice that is being read.
    slice: &'a [u8],
    tails: I,
}

impl<'a> Segments<'a, std::iter::Empty<&'a [u8]>> {
    /// The segments of a packet that lies wholly in its head.
    pub fn whole(packet: &'a Ipv4Packet<'_>) -> Self {
        Self::new(packet.head(), packet.shape(), std::iter::empty())
    }
}

impl<'a, I: Iterator<Item = &'a [u8]>> Segments<'a, I> {
    /// The segments of the packet that `shape` was taken of, whose bytes are `head` and then the slices of `tails`.
    ///
    /// If the bytes are fewer than the shape says, the segments end where they do.
    pub fn new(head: &'a [u8], shape: Shape, tails: impl IntoIterator<IntoIter = I>) -> Self {
        let parts = head.split_at_checked(shape.headers_len());
        let (headers, slice) = parts.unwrap_or_default();
        let cutter = Cutter::new(parts.map(|_| headers), shape);
        Self { cutter, headers, slice, tails: tails.into_iter() }
    }

    /// How many segments the whole packet stands for.
    pub fn segment_count(&self) -> usize {
        self.cutter.count
    }

    /// The length of the longest segment, IP header included: what `out` must hold.
    pub fn max_segment_len(&self) -> usize {
        self.cutter.shape.segment_len()
    }

    /// Writes the next segment to the front of `out` and returns its length; `None` when there are no more.
    ///
    /// `out` shorter than [`Self::max_segment_len`] may also give `None`, and loses nothing: ask again with more.
    pub fn next_into(&mut self, out: &mut [u8]) -> Option<usize> {
        let len = self.headers.len() + self.cutter.next_payload_len()?;
        let segment = out.get_mut(..len)?;
        let (headers, payload) = segment.split_at_mut(self.headers.len());
        headers.copy_from_slice(self.headers);
        if !self.gather(payload) {
            self.cutter.end();
            return None;
        }
        self.cutter.finish(segment);
        Some(len)
    }

    /// Fills `out` with the next payload bytes; false if there are too few.
    fn gather(&mut self, out: &mut [u8]) -> bool {
        let mut filled = 0;
        while filled < out.len() {
            if self.slice.is_empty() {
                let Some(slice) = self.tails.next() else { return false };
                self.slice = slice;
            }
            let (now, later) = self.slice.split_at(self.slice.len().min(out.len() - filled));
            out[filled..filled + now.len()].copy_from_slice(now);
            filled += now.len();
            self.slice = later;
        }
        true
    }
}

/// The longest IP and transport header together (RFC 791 §3.1, RFC 9293 §3.1).
const MAX_HEADERS_LEN: usize = 60 + 60;

/// The segments of one packet that lies in one piece, in order, each put together where its payload lies.
#[derive(Debug)]
pub struct SegmentsInPlace<'a> {
    cutter: Cutter,
    packet: &'a mut [u8],
    headers: [u8; MAX_HEADERS_LEN],
}

impl<'a> SegmentsInPlace<'a> {
    /// The segments of `packet`, which `shape` was taken of. Nothing of it may be needed afterwards.
    ///
    /// If the bytes are fewer than the shape says, the segments end where they do.
    pub fn new(packet: &'a mut [u8], shape: Shape) -> Self {
        let mut headers = [0; MAX_HEADERS_LEN];
        let kept =
            packet.get(..shape.headers_len()).inspect(|bytes| headers[..bytes.len()].copy_from_slice(bytes));
        Self { cutter: Cutter::new(kept, shape), packet, headers }
    }

    /// The next segment, until the one after it is asked for; `None` when there are no more.
    pub fn next_segment(&mut self) -> Option<&[u8]> {
        let headers_len = self.cutter.shape.headers_len();
        let len = headers_len + self.cutter.next_payload_len()?;
        let begin = self.cutter.next * self.cutter.segment_size;
        let Some(segment) = self.packet.get_mut(begin..begin + len) else {
            self.cutter.end();
            return None;
        };
        segment[..headers_len].copy_from_slice(&self.headers[..headers_len]);
        self.cutter.finish(segment);
        Some(segment)
    }
}

/// The sums of the words that all segments share: of the IP header, and of pseudo-header and transport header.
fn constant_sums(headers: &[u8], ip_header_len: usize, kind: Kind) -> (Sum, Sum) {
    let (ip, transport) = headers.split_at(ip_header_len);
    let ip_sum = Sum::ZERO.add_bytes(&ip[..2]).add_bytes(&ip[6..10]).add_bytes(&ip[12..]);
    let pseudo = checksum::pseudo_header(address_at(ip, 12), address_at(ip, 16), ip[9], 0);
    let transport_sum = match kind {
        // Without sequence number, data offset and flags, checksum.
        Kind::Tcp => pseudo
            .add_bytes(&transport[..4])
            .add_bytes(&transport[8..12])
            .add_bytes(&transport[14..16])
            .add_bytes(&transport[18..]),
        // The ports alone.
        _ => pseudo.add_bytes(&transport[..4]),
    };
    (ip_sum, transport_sum)
}

/// Makes the partial checksum of one whole TCP or UDP packet complete.
fn complete_checksum(packet: &mut [u8], shape: Shape) {
    let (ip, transport) = packet.split_at_mut(shape.ip_header_len());
    let (at, covered) = match shape.transport() {
        Transport::Udp => (6, usize::from(u16_at(transport, 4)).min(transport.len())),
        _ => (16, transport.len()),
    };
    put_u16(transport, at, 0);
    let sum = checksum::pseudo_header(address_at(ip, 12), address_at(ip, 16), ip[9], covered as u16)
        .add_bytes(&transport[..covered])
        .finish();
    put_u16(transport, at, if shape.transport() == Transport::Udp { nonzero(sum) } else { sum });
}

/// A UDP checksum of zero would mean "none" (RFC 768).
fn nonzero(checksum: u16) -> u16 {
    if checksum == 0 { 0xffff } else { checksum }
}

#[cfg(test)]
mod tests;
