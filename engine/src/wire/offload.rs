//! Offload metadata: what a *superpacket* carries beside its bytes, and its form in the kernel (`virtio_net_hdr`).
//!
//! A superpacket is one IPv4 packet of up to 65,535 bytes that stands for a train of segments. It stays whole through
//! router and NAT and is split only where it is sealed, or by the NIC.

use super::ipv4::{Ipv4Packet, Transport};
use super::shape::Shape;

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

    /// The header for `packet`, see [`Self::for_shape`].
    pub fn for_packet(packet: &Ipv4Packet<'_>, link_header: u16) -> Self {
        Self::for_shape(packet.shape(), link_header)
    }

    /// The header for a packet of this shape; `link_header` is the length of the link header that precedes it (0 on TUN, 14 on
    /// Ethernet: `csum_start` and `hdr_len` count from the frame's first byte).
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
