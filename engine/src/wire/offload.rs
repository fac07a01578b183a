//! Offload metadata: what a *superpacket* carries beside its bytes, and its form in the kernel (`virtio_net_hdr`).
//!
//! A superpacket is one IPv4 packet of up to 65,535 bytes that stands for a train of segments. It stays whole through
//! router and NAT and is split only where it is sealed, or by the NIC.

use super::checksum;
use super::ipv4::{Ipv4Packet, Transport, protocol, put_u16};
use super::shape::Shape;

mod encapsulated;

/// How a superpacket is to be split.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gso {
    /// The transport.
    pub kind: GsoKind,
    /// Payload bytes per segment (the MSS for TCP); every segment but the last carries exactly this many.
    pub segment_size: u16,
}

/// The transports that the kernel splits for us.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GsoKind {
    /// TCP over IPv4 without CWR.
    Tcp4,
    /// TCP over IPv4 whose first segment carries CWR (RFC 3168): only the first segment may keep it.
    Tcp4Ecn,
    /// UDP over IPv4 (USO): every segment is a datagram of its own.
    Udp4,
}

/// What the transport checksum field holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum ChecksumState {
    /// A complete checksum, which nobody has verified yet.
    #[default]
    Complete,
    /// Only the sum of the pseudo-header, not complemented; whoever puts the packet on a real wire finishes it.
    Partial,
}

/// The metadata of one packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Offload {
    /// Set for a superpacket.
    pub gso: Option<Gso>,
    /// What the transport checksum field holds.
    pub checksum: ChecksumState,
}

impl Offload {
    /// An ordinary packet with a complete checksum.
    pub const NONE: Self = Self { gso: None, checksum: ChecksumState::Complete };
}

/// `struct virtio_net_hdr` of `linux/virtio_net.h`, 10 bytes, in the machine's byte order.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VirtioNetHeader {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
}

const F_NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

impl VirtioNetHeader {
    /// Its size in bytes.
    pub const SIZE: usize = 10;

    /// Reads a header that the kernel wrote.
    pub fn from_bytes(b: [u8; Self::SIZE]) -> Self {
        Self {
            flags: b[0],
            gso_type: b[1],
            hdr_len: u16::from_ne_bytes([b[2], b[3]]),
            gso_size: u16::from_ne_bytes([b[4], b[5]]),
            csum_start: u16::from_ne_bytes([b[6], b[7]]),
            csum_offset: u16::from_ne_bytes([b[8], b[9]]),
        }
    }

    /// The header's bytes for the kernel.
    pub fn to_bytes(self) -> [u8; Self::SIZE] {
        let mut b = [0; Self::SIZE];
        b[0] = self.flags;
        b[1] = self.gso_type;
        b[2..4].copy_from_slice(&self.hdr_len.to_ne_bytes());
        b[4..6].copy_from_slice(&self.gso_size.to_ne_bytes());
        b[6..8].copy_from_slice(&self.csum_start.to_ne_bytes());
        b[8..10].copy_from_slice(&self.csum_offset.to_ne_bytes());
        b
    }

    /// The metadata of `packet`, an IPv4 packet that came with this header; `None` for a kind that Tidegate never asked
    /// for, and for what has to be split first ([`Self::split_encapsulated`]).
    ///
    /// A partial checksum that is not the packet's own, but of what it carries (in GRE, say), is finished here: from
    /// here on a packet's checksum is that of its transport header, and nobody would know of another.
    pub fn offload_of(self, packet: &mut [u8]) -> Option<Offload> {
        let offload = self.offload()?;
        if let Some(gso) = offload.gso {
            // Merged segments of what a packet carries are for `split_encapsulated`.
            let own = if gso.kind == GsoKind::Udp4 { protocol::UDP } else { protocol::TCP };
            return (*packet.get(9)? == own).then_some(offload);
        }
        if offload.checksum == ChecksumState::Complete {
            return Some(offload);
        }
        let header_len = usize::from(packet.first()? & 0x0f) * 4;
        let start = usize::from(self.csum_start);
        let field = start + usize::from(self.csum_offset);
        let own = match *packet.get(9)? {
            protocol::TCP => (header_len, header_len + 16),
            protocol::UDP => (header_len, header_len + 6),
            protocol::SCTP => return None, // its checksum is none of the kind that can be finished (RFC 9260 §6.8)
            _ => (0, 0),
        };
        if (start, field) == own {
            return Some(offload);
        }
        let total_len = usize::from(u16::from_be_bytes([packet[2], packet[3]])).min(packet.len());
        let covered = packet.get(start..total_len)?;
        covered.get(field - start..field - start + 2)?;
        // As the kernel's skb_checksum_help(): of zero, the other form, for in UDP zero means none.
        let sum = match checksum::checksum(covered) {
            0 => 0xffff,
            sum => sum,
        };
        put_u16(packet, field, sum);
        Some(Offload::NONE)
    }

    /// The metadata that this header expresses, or `None` for a kind that Tidegate never asked for.
    pub fn offload(self) -> Option<Offload> {
        let checksum =
            if self.flags & F_NEEDS_CSUM != 0 { ChecksumState::Partial } else { ChecksumState::Complete };
        let kind = match (self.gso_type & !GSO_ECN, self.gso_type & GSO_ECN != 0) {
            (GSO_NONE, _) => return Some(Offload { gso: None, checksum }),
            (GSO_TCPV4, false) => GsoKind::Tcp4,
            (GSO_TCPV4, true) => GsoKind::Tcp4Ecn,
            (GSO_UDP_L4, _) => GsoKind::Udp4,
            _ => return None,
        };
        if self.gso_size == 0 {
            return None;
        }
        // A superpacket's checksum is always to be made anew per segment, whatever the flag says.
        Some(Offload {
            gso: Some(Gso { kind, segment_size: self.gso_size }),
            checksum: ChecksumState::Partial,
        })
    }

    /// The length of all headers of a superpacket's frame, as [`Self::for_shape`] has noted it.
    pub fn headers_len(self) -> usize {
        usize::from(self.hdr_len)
    }

    /// How many segments `payload_len` bytes make behind the headers of a packet with this header: one, if it is no
    /// superpacket.
    pub fn segment_count(self, payload_len: usize) -> usize {
        let is_superpacket = self.gso_type & !GSO_ECN != GSO_NONE && self.gso_size > 0;
        if is_superpacket { payload_len.div_ceil(usize::from(self.gso_size)).max(1) } else { 1 }
    }

    /// The header for `packet`, see [`Self::for_shape`].
    pub fn for_packet(packet: &Ipv4Packet<'_>, link_header: u16) -> Self {
        Self::for_shape(packet.shape(), link_header)
    }

    /// The header for a packet of this shape; `link_header` is the length of the link header that precedes it (0 on
    /// TUN, 14 on Ethernet: `csum_start` and `hdr_len` count from the frame's first byte).
    pub fn for_shape(shape: Shape, link_header: u16) -> Self {
        let mut header = Self::default();
        let offload = shape.offload();
        let transport = shape.ip_header_len() as u16;
        let (transport_len, checksum_offset) = match shape.transport() {
            Transport::Tcp { header_len } => (u16::from(header_len), 16),
            Transport::Udp => (8, 6),
            Transport::Icmp | Transport::Other => return header,
        };
        if offload.checksum == ChecksumState::Partial {
            header.flags = F_NEEDS_CSUM;
            header.csum_start = link_header + transport;
            header.csum_offset = checksum_offset;
        }
        if let Some(gso) = offload.gso {
            header.gso_type = match gso.kind {
                GsoKind::Tcp4 => GSO_TCPV4,
                GsoKind::Tcp4Ecn => GSO_TCPV4 | GSO_ECN,
                GsoKind::Udp4 => GSO_UDP_L4,
            };
            header.gso_size = gso.segment_size;
            header.hdr_len = link_header + transport + transport_len;
        }
        header
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UDP_IN_GRE: usize = 20 + 4 + 20;

    /// `struct virtio_net_hdr` of a packet whose checksum is partial.
    fn partial(start: u16, offset: u16) -> VirtioNetHeader {
        VirtioNetHeader { flags: F_NEEDS_CSUM, csum_start: start, csum_offset: offset, ..Default::default() }
    }

    /// IPv4, of `protocol`, that carries `payload`.
    fn ipv4(protocol: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        packet.extend_from_slice(payload);
        let total_len = packet.len() as u16;
        put_u16(&mut packet, 2, total_len);
        packet
    }

    /// IPv4, GRE, IPv4, UDP; the sum of the inner pseudo-header stands in the checksum field.
    fn tunnelled() -> Vec<u8> {
        let sum = checksum::pseudo_header([10, 0, 0, 1].into(), [10, 0, 0, 2].into(), protocol::UDP, 12);
        let mut udp = vec![0, 53, 0, 53, 0, 12, 0, 0, 1, 2, 3, 4];
        put_u16(&mut udp, 6, sum.partial());
        ipv4(47, &[&[0, 0, 8, 0][..], &ipv4(protocol::UDP, &udp)].concat())
    }

    #[test]
    fn a_checksum_of_what_a_packet_carries_is_finished() {
        let mut packet = tunnelled();
        packet.extend([0xff; 6]); // Ethernet's padding does not count
        assert_eq!(partial(UDP_IN_GRE as u16, 6).offload_of(&mut packet), Some(Offload::NONE));
        let sum = checksum::pseudo_header([10, 0, 0, 1].into(), [10, 0, 0, 2].into(), protocol::UDP, 12);
        assert_eq!(sum.add_bytes(&packet[UDP_IN_GRE..packet.len() - 6]).finish(), 0, "it verifies");
    }

    #[test]
    fn a_packets_own_is_carried_along() {
        for (protocol, offset) in [(protocol::TCP, 16), (protocol::UDP, 6)] {
            let before = ipv4(protocol, &[7; 40]);
            let mut packet = before.clone();
            let offload = Offload { gso: None, checksum: ChecksumState::Partial };
            assert_eq!(partial(20, offset).offload_of(&mut packet), Some(offload));
            assert_eq!(packet, before);
        }
        let mut packet = tunnelled();
        assert_eq!(VirtioNetHeader::default().offload_of(&mut packet), Some(Offload::NONE));
        assert_eq!(packet, tunnelled(), "nothing is to be finished");
    }

    #[test]
    fn a_superpacket_is_the_packets_own_or_is_refused() {
        let superpacket = |gso_type| VirtioNetHeader { gso_type, gso_size: 1_000, ..partial(20, 16) };
        for (gso_type, protocol) in [(GSO_TCPV4, protocol::TCP), (GSO_UDP_L4, protocol::UDP)] {
            let offload = superpacket(gso_type).offload();
            assert!(offload.is_some());
            assert_eq!(superpacket(gso_type).offload_of(&mut ipv4(protocol, &[7; 3_000])), offload);
            assert_eq!(
                superpacket(gso_type).offload_of(&mut ipv4(47, &[7; 3_000])),
                None,
                "merged inside GRE"
            );
        }
    }

    #[test]
    fn what_cannot_be_finished_is_refused() {
        for (start, offset) in [(64, 6), (44, 11), (44, 12), (0, 0xffff), (0xffff, 0xffff)] {
            assert_eq!(partial(start, offset).offload_of(&mut tunnelled()), None, "{start} {offset}");
        }
        assert_eq!(partial(20, 8).offload_of(&mut ipv4(protocol::SCTP, &[7; 12])), None, "a CRC");
        for len in 0..20 {
            assert_eq!(partial(20, 6).offload_of(&mut ipv4(47, &[])[..len]), None, "{len} bytes");
        }
    }
}
