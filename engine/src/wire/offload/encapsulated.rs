//! A TCP superpacket inside a tunnel that passes through: split where it enters.
//!
//! # Theory of operation
//!
//! The kernel's GRO looks into GRE, IP in IP and 6in4, although no such tunnel ends on the host, and merges the TCP
//! segments inside. The frame then says `GSO_TCPV4` or `GSO_TCPV6`, and its outer protocol is the tunnel's. Behind the
//! entrance nobody looks into a protocol that has no ports, so there it becomes again what was sent: [`Layers::parse`]
//! walks the headers down to TCP, and each segment gets a copy of them all, in which is made anew:
//!
//! | word | value |
//! |---|---|
//! | total length of each IPv4 header, payload length of IPv6 | of the segment |
//! | identification of each IPv4 header | plus one per segment |
//! | sequence number | plus the payload before it |
//! | FIN, PSH | on the last only |
//! | CWR | on the first only (RFC 3168 §6.1.2) |
//! | checksums of TCP, IPv4, and of GRE if it has one | complete |
//!
//! What GRO merges is known here, except for IPv6 with extension headers. What is built otherwise, or whose lengths do
//! not agree, is refused; so is what has more segments than anybody makes ([`VirtioNetHeader::MAX_SPLIT_SEGMENTS`]).

use super::{F_NEEDS_CSUM, GSO_ECN, GSO_TCPV4, GSO_TCPV6, VirtioNetHeader};
use crate::wire::checksum::{Sum, checksum};
use crate::wire::ipv4::{MAX_PACKET_LEN, protocol, put_u16, tcp_flags, u16_at, u32_at};

/// IPv4 in IPv4 (RFC 2003).
const IPIP: u8 = 4;
/// IPv6 in IPv4 (RFC 4213).
const IPV6: u8 = 41;
/// GRE (RFC 2784, RFC 2890).
const GRE: u8 = 47;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
/// The tags of VLANs (IEEE 802.1Q, 802.1ad).
const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_SERVICE_VLAN: u16 = 0x88a8;
/// As many of them as a frame has in practice: the provider's, and the customer's.
const MAX_VLAN_TAGS: usize = 2;
/// Transparent Ethernet bridging: an Ethernet frame.
const ETHERTYPE_BRIDGED: u16 = 0x6558;

const GRE_CHECKSUM: u16 = 0x8000;
const GRE_KEY: u16 = 0x2000;

const IPV6_HEADER_LEN: usize = 40;
/// Where TCP's checksum is.
const TCP_CHECKSUM: usize = 16;
/// The least length of its header.
const TCP_HEADER_LEN: usize = 20;

/// Bytes that the segments of one superpacket may be together, headers included: they are all in memory at once.
const MAX_BYTES: usize = 4 * MAX_PACKET_LEN;

impl VirtioNetHeader {
    /// Segments of one superpacket that [`Self::split_encapsulated`] makes, at most. Ethernet's frames make some 45,
    /// and an MSS of 536, which is small, 123. Should they be many more, nobody sends them legitimately, and each is a
    /// packet to route.
    pub const MAX_SPLIT_SEGMENTS: usize = 512;

    /// The segments of `packet`, an IPv4 packet that came with this header and carries a TCP superpacket in a tunnel;
    /// `None` if it is anything else, or its lengths do not agree.
    pub fn split_encapsulated(self, packet: &[u8]) -> Option<Vec<Vec<u8>>> {
        let inner = match self.gso_type & !GSO_ECN {
            GSO_TCPV4 => ETHERTYPE_IPV4,
            GSO_TCPV6 => ETHERTYPE_IPV6,
            _ => return None,
        };
        // Ethernet's padding does not count.
        let packet = packet.get(..usize::from(u16_at(packet.get(..4)?, 2)))?;
        let layers = Layers::parse(packet)?;
        let is_described = self.flags & F_NEEDS_CSUM != 0
            && usize::from(self.csum_start) == layers.tcp
            && usize::from(self.csum_offset) == TCP_CHECKSUM;
        let (headers, payload) = packet.split_at(layers.payload);
        let size = usize::from(self.gso_size);
        if layers.inner_kind != inner || !is_described || size == 0 || payload.is_empty() {
            return None;
        }
        let count = payload.len().div_ceil(size);
        if count > Self::MAX_SPLIT_SEGMENTS || count * headers.len() + payload.len() > MAX_BYTES {
            return None;
        }
        let segments = payload.chunks(size).enumerate();
        Some(
            segments
                .map(|(n, payload)| layers.segment(headers, payload, n, n * size, n + 1 == count))
                .collect(),
        )
    }
}

/// Where the headers of an encapsulated TCP segment begin, in bytes from the outer IPv4 header.
struct Layers {
    /// A GRE header with a checksum.
    summed_gre: Option<usize>,
    /// The inner IP header.
    inner: usize,
    /// Its kind, as an ethertype.
    inner_kind: u16,
    /// The TCP header.
    tcp: usize,
    /// TCP's payload.
    payload: usize,
}

impl Layers {
    /// Walks down to TCP; `None` if the way does not lead there.
    fn parse(packet: &[u8]) -> Option<Self> {
        let outer_len = ipv4_header_len(packet)?;
        let (mut summed_gre, mut inner) = (None, outer_len);
        let inner_kind = match packet[9] {
            IPIP => ETHERTYPE_IPV4,
            IPV6 => ETHERTYPE_IPV6,
            GRE => {
                let header = packet.get(outer_len..outer_len + 4)?;
                let (flags, mut kind) = (u16_at(header, 0), u16_at(header, 2));
                if flags & !(GRE_CHECKSUM | GRE_KEY) != 0 {
                    return None; // sequence numbers, routing, another version: GRO merges none of these
                }
                summed_gre = (flags & GRE_CHECKSUM != 0).then_some(outer_len);
                inner += 4 + 4 * flags.count_ones() as usize; // each flag stands for one more word
                if kind == ETHERTYPE_BRIDGED {
                    inner += 2 * 6; // the addresses
                    kind = u16_at(packet.get(inner..inner + 2)?, 0);
                    for _ in 0..MAX_VLAN_TAGS {
                        if kind == ETHERTYPE_VLAN || kind == ETHERTYPE_SERVICE_VLAN {
                            inner += 4;
                            kind = u16_at(packet.get(inner..inner + 2)?, 0);
                        }
                    }
                    inner += 2;
                }
                kind
            }
            _ => return None,
        };
        let datagram = packet.get(inner..)?;
        let (inner_len, inner_protocol) = match inner_kind {
            ETHERTYPE_IPV4 => (ipv4_header_len(datagram)?, datagram[9]),
            ETHERTYPE_IPV6 => (ipv6_header_len(datagram)?, datagram[6]),
            _ => return None,
        };
        let tcp = inner + inner_len;
        let tcp_len = usize::from(packet.get(tcp + 12)? >> 4) * 4;
        let payload = tcp + tcp_len;
        let is_tcp = inner_protocol == protocol::TCP && tcp_len >= TCP_HEADER_LEN && payload <= packet.len();
        is_tcp.then_some(Self { summed_gre, inner, inner_kind, tcp, payload })
    }

    /// The segment number `n`, with `before` bytes of payload before its own.
    fn segment(&self, headers: &[u8], payload: &[u8], n: usize, before: usize, is_last: bool) -> Vec<u8> {
        let mut segment = [headers, payload].concat();
        // From the inside to the outside, so that a checksum covers what is finished.
        let (ip, tcp) = segment[self.inner..].split_at_mut(self.tcp - self.inner);
        let is_ipv4 = self.inner_kind == ETHERTYPE_IPV4;
        let addresses = if is_ipv4 { &ip[12..20] } else { &ip[8..IPV6_HEADER_LEN] };
        let pseudo_header =
            Sum::ZERO.add_bytes(addresses).add_word(tcp.len() as u16).add_word(u16::from(protocol::TCP));
        let sequence = u32_at(tcp, 4).wrapping_add(before as u32);
        tcp[4..8].copy_from_slice(&sequence.to_be_bytes());
        if n > 0 {
            tcp[13] &= !tcp_flags::CWR;
        }
        if !is_last {
            tcp[13] &= !(tcp_flags::FIN | tcp_flags::PSH);
        }
        put_u16(tcp, TCP_CHECKSUM, 0);
        let sum = pseudo_header.add_bytes(tcp).finish();
        put_u16(tcp, TCP_CHECKSUM, sum);
        if is_ipv4 {
            finish_ipv4(ip, ip.len() + tcp.len(), n);
        } else {
            put_u16(ip, 4, tcp.len() as u16);
        }
        if let Some(gre) = self.summed_gre {
            put_u16(&mut segment, gre + 4, 0);
            let sum = checksum(&segment[gre..]);
            put_u16(&mut segment, gre + 4, sum);
        }
        let len = segment.len();
        finish_ipv4(&mut segment, len, n);
        segment
    }
}

/// The length of the header of an IPv4 packet that is `packet` to its last byte, and no fragment.
fn ipv4_header_len(packet: &[u8]) -> Option<usize> {
    let len = usize::from(packet.get(..20)?[0] & 0x0f) * 4;
    let is_whole = packet[0] >> 4 == 4
        && (20..=packet.len()).contains(&len)
        && usize::from(u16_at(packet, 2)) == packet.len()
        && u16_at(packet, 6) & 0x3fff == 0; // More Fragments, and the offset
    is_whole.then_some(len)
}

/// The same of IPv6 (RFC 8200 §3). What follows must be TCP: extension headers are not looked through.
fn ipv6_header_len(packet: &[u8]) -> Option<usize> {
    let payload_len = packet.len().checked_sub(IPV6_HEADER_LEN)?;
    let is_whole = packet[0] >> 4 == 6 && usize::from(u16_at(packet, 4)) == payload_len;
    is_whole.then_some(IPV6_HEADER_LEN)
}

/// Makes the IPv4 header at the beginning of `packet` that of the segment number `n`.
fn finish_ipv4(packet: &mut [u8], total_len: usize, n: usize) {
    let header_len = usize::from(packet[0] & 0x0f) * 4;
    let header = &mut packet[..header_len];
    let identification = u16_at(header, 4).wrapping_add(n as u16);
    put_u16(header, 2, total_len as u16);
    put_u16(header, 4, identification);
    put_u16(header, 10, 0);
    let sum = checksum(header);
    put_u16(header, 10, sum);
}

#[cfg(test)]
mod tests;
