//! What a checked packet's bytes mean, without a borrow of them.

use super::ipv4::{Ipv4Packet, Transport};
use super::offload::{GsoKind, Offload};

/// The proof that [`Ipv4Packet`] carries, for a caller who gives the view back, to reach the gather list or to send
/// the packet later.
///
/// It stays true as long as nobody changes the packet's lengths; addresses, ports and the like may change.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    head_len: u32,
    total_len: u32,
    ip_header_len: u8,
    transport_header_len: u8,
    transport: Transport,
    offload: Offload,
}

impl Ipv4Packet<'_> {
    /// Its shape.
    pub fn shape(&self) -> Shape {
        Shape {
            head_len: self.head().len() as u32,
            total_len: self.total_len() as u32,
            ip_header_len: self.header_len() as u8,
            transport_header_len: self.transport_header_len() as u8,
            transport: self.transport(),
            offload: self.offload(),
        }
    }
}

impl Shape {
    /// The head's length in bytes: all headers, and the payload as far as it is not in the gather list.
    pub fn head_len(self) -> usize {
        self.head_len as usize
    }

    /// The packet's length in bytes, headers and gather list included.
    pub fn total_len(self) -> usize {
        self.total_len as usize
    }

    /// The IPv4 header's length in bytes, options included.
    pub fn ip_header_len(self) -> usize {
        usize::from(self.ip_header_len)
    }

    /// The length of IP and transport header together, in bytes; 120 at most.
    pub fn headers_len(self) -> usize {
        usize::from(self.ip_header_len) + usize::from(self.transport_header_len)
    }

    /// Bytes behind the transport header.
    pub fn payload_len(self) -> usize {
        self.total_len() - self.headers_len()
    }

    /// Which transport header follows the IPv4 header.
    pub fn transport(self) -> Transport {
        self.transport
    }

    /// The offload metadata.
    pub fn offload(self) -> Offload {
        self.offload
    }

    /// The kind of the superpacket and its payload bytes per segment (at least one); `None` for an ordinary packet,
    /// or if the metadata does not fit the transport.
    pub fn gso(self) -> Option<(GsoKind, usize)> {
        let gso = self.offload.gso?;
        let fits = match gso.kind {
            GsoKind::Tcp4 | GsoKind::Tcp4Ecn => matches!(self.transport, Transport::Tcp { .. }),
            GsoKind::Udp4 => self.transport == Transport::Udp,
        };
        fits.then(|| (gso.kind, usize::from(gso.segment_size).max(1)))
    }

    /// How many packets it stands for: one, if it is no superpacket.
    pub fn segment_count(self) -> usize {
        self.gso().map_or(1, |(_, size)| self.payload_len().div_ceil(size).max(1))
    }

    /// The length of the longest packet that it stands for, IP header included: what has to fit an MTU.
    pub fn segment_len(self) -> usize {
        let payload_len = self.payload_len();
        self.headers_len() + self.gso().map_or(payload_len, |(_, size)| size.min(payload_len))
    }
}
