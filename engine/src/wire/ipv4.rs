//! A checked, mutable view of one IPv4 packet (RFC 791) and its transport header.
//!
//! [`Ipv4Packet::parse`] is the only way in; whoever holds an [`Ipv4Packet`] holds the proof that its lengths are
//! true and that its transport header is there. No function below re-checks, and none can panic.

use std::net::Ipv4Addr;

use super::checksum::{self, Change, Sum};
use super::offload::{ChecksumState, Offload};
use crate::drop_reason::DropReason;

/// Protocol numbers (IANA "Assigned Internet Protocol Numbers").
pub mod protocol {
    /// ICMP, RFC 792.
    pub const ICMP: u8 = 1;
    /// TCP, RFC 9293.
    pub const TCP: u8 = 6;
    /// UDP, RFC 768.
    pub const UDP: u8 = 17;
    /// SCTP, RFC 9260.
    pub const SCTP: u8 = 132;
}

/// TCP flags (RFC 9293 §3.1, RFC 3168 for CWR and ECE).
pub mod tcp_flags {
    #![allow(missing_docs, reason = "the names are the standard's")]
    pub const FIN: u8 = 0x01;
    pub const SYN: u8 = 0x02;
    pub const RST: u8 = 0x04;
    pub const PSH: u8 = 0x08;
    pub const ACK: u8 = 0x10;
    pub const URG: u8 = 0x20;
    pub const ECE: u8 = 0x40;
    pub const CWR: u8 = 0x80;
}

/// The smallest IPv4 header.
pub const MIN_HEADER_LEN: usize = 20;
/// The largest IPv4 packet.
pub const MAX_PACKET_LEN: usize = 65_535;

/// The transport header that follows the IPv4 header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transport {
    /// TCP; `header_len` includes its options.
    Tcp {
        /// Bytes, 20 to 60.
        header_len: u8,
    },
    /// UDP.
    Udp,
    /// ICMP, at least 8 bytes long.
    Icmp,
    /// Another protocol, or a fragment, which has no transport header to speak of.
    Other,
}

/// A checked IPv4 packet, possibly a superpacket, possibly with its payload's rest elsewhere.
///
/// `head` begins with the IPv4 header and holds at least all headers; a *gather list* of `tail_len` more payload bytes
/// may follow it, which this view does not see.
#[derive(Debug)]
pub struct Ipv4Packet<'a> {
    head: &'a mut [u8],
    tail_len: usize,
    header_len: u8,
    transport: Transport,
    offload: Offload,
}

impl<'a> Ipv4Packet<'a> {
    /// Checks `head` (and the length of what follows it elsewhere).
    ///
    /// Bytes behind the packet's total length (Ethernet or WireGuard padding) are cut off.
    ///
    /// # Errors
    /// The reason to drop it: [`DropReason::Truncated`], `Ipv6`, `UnknownVersion`, `BadIpHeader`, `BadIpChecksum` or
    /// `BadTransportHeader`.
    pub fn parse(head: &'a mut [u8], tail_len: usize, offload: Offload) -> Result<Self, DropReason> {
        match head.first().ok_or(DropReason::Truncated)? >> 4 {
            4 => {}
            6 => return Err(DropReason::Ipv6),
            _ => return Err(DropReason::UnknownVersion),
        }
        if head.len() < MIN_HEADER_LEN {
            return Err(DropReason::Truncated);
        }
        let header_len = usize::from(head[0] & 0x0f) * 4;
        let total_len = usize::from(u16_at(head, 2));
        if header_len < MIN_HEADER_LEN || total_len < header_len {
            return Err(DropReason::BadIpHeader);
        }
        if head.len() < header_len || head.len() + tail_len < total_len {
            return Err(DropReason::Truncated);
        }
        if checksum::checksum(&head[..header_len]) != 0 {
            return Err(DropReason::BadIpChecksum);
        }
        let head = if tail_len == 0 {
            &mut head[..total_len]
        } else if head.len() + tail_len == total_len {
            head
        } else {
            return Err(DropReason::BadIpHeader);
        };
        let transport = parse_transport(head, header_len, total_len)?;
        Ok(Self { head, tail_len, header_len: header_len as u8, transport, offload })
    }

    /// The head: all headers, and the payload as far as it is not in the gather list.
    pub fn head(&self) -> &[u8] {
        self.head
    }

    /// The head, to be changed by a caller who keeps lengths and checksums true.
    pub fn head_mut(&mut self) -> &mut [u8] {
        self.head
    }

    /// Gives the head back.
    pub fn into_head(self) -> &'a mut [u8] {
        self.head
    }

    /// Payload bytes outside of the head.
    pub fn tail_len(&self) -> usize {
        self.tail_len
    }

    /// The packet's length in bytes, headers included.
    pub fn total_len(&self) -> usize {
        self.head.len() + self.tail_len
    }

    /// The IPv4 header's length in bytes, options included.
    pub fn header_len(&self) -> usize {
        usize::from(self.header_len)
    }

    /// The transport header's length in bytes (ICMP: 8; other protocols: 0).
    pub fn transport_header_len(&self) -> usize {
        match self.transport {
            Transport::Tcp { header_len } => usize::from(header_len),
            Transport::Udp | Transport::Icmp => 8,
            Transport::Other => 0,
        }
    }

    /// Bytes behind the transport header.
    pub fn transport_payload_len(&self) -> usize {
        self.total_len() - self.header_len() - self.transport_header_len()
    }

    /// Which transport header follows.
    pub fn transport(&self) -> Transport {
        self.transport
    }

    /// The offload metadata.
    pub fn offload(&self) -> Offload {
        self.offload
    }

    /// The protocol number.
    pub fn protocol(&self) -> u8 {
        self.head[9]
    }

    /// The source address.
    pub fn source(&self) -> Ipv4Addr {
        address_at(self.head, 12)
    }

    /// The destination address.
    pub fn destination(&self) -> Ipv4Addr {
        address_at(self.head, 16)
    }

    /// The time to live, in hops.
    pub fn ttl(&self) -> u8 {
        self.head[8]
    }

    /// The type-of-service byte: DSCP and ECN.
    pub fn tos(&self) -> u8 {
        self.head[1]
    }

    /// The identification field.
    pub fn identification(&self) -> u16 {
        u16_at(self.head, 4)
    }

    /// Whether routers must not fragment it.
    pub fn dont_fragment(&self) -> bool {
        self.head[6] & 0x40 != 0
    }

    /// Whether it is a fragment, first or later.
    pub fn is_fragment(&self) -> bool {
        u16_at(self.head, 6) & 0x3fff != 0
    }

    /// Whether more fragments follow it.
    pub fn more_fragments(&self) -> bool {
        self.head[6] & 0x20 != 0
    }

    /// Where in the datagram's payload this fragment begins, in bytes.
    pub fn fragment_offset(&self) -> usize {
        usize::from(u16_at(self.head, 6) & 0x1fff) * 8
    }

    /// An atomic datagram is not, and will not be, fragmented (RFC 6864 §4): its identification means nothing.
    pub fn is_atomic(&self) -> bool {
        self.dont_fragment() && !self.is_fragment()
    }

    /// Source and destination port of TCP or UDP.
    pub fn ports(&self) -> Option<(u16, u16)> {
        let at = self.header_len();
        match self.transport {
            Transport::Tcp { .. } | Transport::Udp => {
                Some((u16_at(self.head, at), u16_at(self.head, at + 2)))
            }
            Transport::Icmp | Transport::Other => None,
        }
    }

    /// The transport header, and what follows it in the head.
    pub fn transport_bytes(&self) -> &[u8] {
        &self.head[self.header_len()..]
    }

    /// Type and code of an ICMP message.
    pub fn icmp_type_code(&self) -> Option<(u8, u8)> {
        let at = self.header_len();
        (self.transport == Transport::Icmp).then(|| (self.head[at], self.head[at + 1]))
    }

    /// The identifier of an ICMP query (bytes 4 and 5 of the message); the caller knows that it is one.
    pub fn icmp_identifier(&self) -> Option<u16> {
        (self.transport == Transport::Icmp).then(|| u16_at(self.head, self.header_len() + 4))
    }

    /// The TCP header's fields.
    pub fn tcp(&self) -> Option<TcpFields> {
        let Transport::Tcp { .. } = self.transport else { return None };
        let at = self.header_len();
        Some(TcpFields {
            sequence: u32_at(self.head, at + 4),
            acknowledgment: u32_at(self.head, at + 8),
            flags: self.head[at + 13],
            window: u16_at(self.head, at + 14),
        })
    }

    /// Lowers the TTL by one.
    ///
    /// # Errors
    /// [`DropReason::TtlExceeded`] if nothing would be left of it; the packet is unchanged then.
    pub fn decrement_ttl(&mut self) -> Result<(), DropReason> {
        let ttl = self.head[8];
        if ttl <= 1 {
            return Err(DropReason::TtlExceeded);
        }
        let protocol = self.head[9];
        self.head[8] = ttl - 1;
        let change =
            Change::NONE.word(u16::from_be_bytes([ttl, protocol]), u16::from_be_bytes([ttl - 1, protocol]));
        self.patch_header_checksum(change);
        Ok(())
    }

    /// Sets the identification field.
    pub fn set_identification(&mut self, identification: u16) {
        let change = Change::NONE.word(self.identification(), identification);
        put_u16(self.head, 4, identification);
        self.patch_header_checksum(change);
    }

    /// Replaces the source address and, for TCP and UDP, the source port, or the identifier of an ICMP query.
    pub fn rewrite_source(&mut self, address: Ipv4Addr, port: u16) {
        self.rewrite(12, address, 0, port);
    }

    /// Replaces the destination address and, for TCP and UDP, the destination port, or the identifier of an ICMP query.
    pub fn rewrite_destination(&mut self, address: Ipv4Addr, port: u16) {
        self.rewrite(16, address, 2, port);
    }

    /// Replaces the source address alone (ICMP errors, protocols without ports).
    pub fn rewrite_source_address(&mut self, address: Ipv4Addr) {
        self.rewrite_address(12, address);
    }

    /// Replaces the destination address alone (ICMP errors, protocols without ports).
    pub fn rewrite_destination_address(&mut self, address: Ipv4Addr) {
        self.rewrite_address(16, address);
    }

    /// Replaces the 16-bit word at `at` bytes into the transport header, and mends the checksum, be it complete or
    /// partial (the word is not part of the pseudo-header).
    pub fn rewrite_transport_word(&mut self, at: usize, new: u16) {
        let offset = self.header_len() + at;
        if offset + 2 > self.head.len() {
            return;
        }
        let old = u16_at(self.head, offset);
        put_u16(self.head, offset, new);
        self.patch_transport_checksum(Change::NONE, Change::NONE.word(old, new));
    }

    /// Whether the transport checksum is right. Partial checksums are right by definition: nobody could have
    /// damaged them on a wire. The payload must be in the head.
    pub fn transport_checksum_ok(&self) -> bool {
        let bytes = self.transport_bytes();
        match self.transport {
            Transport::Other => true,
            Transport::Icmp => checksum::checksum(bytes) == 0,
            _ if self.offload.checksum == ChecksumState::Partial => true,
            Transport::Tcp { .. } => self.pseudo_header(bytes.len()).add_bytes(bytes).finish() == 0,
            Transport::Udp => {
                let length = usize::from(u16_at(bytes, 4)).min(bytes.len());
                u16_at(bytes, 6) == 0 || self.pseudo_header(length).add_bytes(&bytes[..length]).finish() == 0
            }
        }
    }

    /// Makes a partial transport checksum complete. The payload must be in the head, and the packet not a superpacket.
    pub fn complete_checksum(&mut self) {
        if self.offload.checksum == ChecksumState::Complete {
            return;
        }
        // ICMP has no pseudo-header, so its checksum is never partial, whatever the metadata says.
        let (Transport::Tcp { .. } | Transport::Udp, Some(at)) = (self.transport, self.checksum_offset())
        else {
            return;
        };
        let start = self.header_len();
        let end = match self.transport {
            Transport::Udp => (start + usize::from(u16_at(self.head, start + 4))).min(self.head.len()),
            _ => self.head.len(),
        };
        put_u16(self.head, at, 0);
        let sum = self.pseudo_header(end - start).add_bytes(&self.head[start..end]).finish();
        let sum = if sum == 0 && self.transport == Transport::Udp { 0xffff } else { sum };
        put_u16(self.head, at, sum);
        self.offload.checksum = ChecksumState::Complete;
    }

    /// The sum of the pseudo-header for a transport segment of `length` bytes.
    pub fn pseudo_header(&self, length: usize) -> Sum {
        checksum::pseudo_header(self.source(), self.destination(), self.protocol(), length as u16)
    }

    fn rewrite(&mut self, address_at: usize, address: Ipv4Addr, port_at: usize, port: u16) {
        let addresses = self.replace_address(address_at, address);
        let at = self.header_len();
        let ports = match self.transport {
            Transport::Tcp { .. } | Transport::Udp => at + port_at,
            Transport::Icmp => at + 4,
            Transport::Other => return,
        };
        let old = u16_at(self.head, ports);
        put_u16(self.head, ports, port);
        self.patch_transport_checksum(addresses, Change::NONE.word(old, port));
    }

    fn rewrite_address(&mut self, at: usize, address: Ipv4Addr) {
        let change = self.replace_address(at, address);
        self.patch_transport_checksum(change, Change::NONE);
    }

    fn replace_address(&mut self, at: usize, address: Ipv4Addr) -> Change {
        let change = Change::NONE.address(address_at(self.head, at), address);
        self.head[at..at + 4].copy_from_slice(&address.octets());
        self.patch_header_checksum(change);
        change
    }

    fn patch_header_checksum(&mut self, change: Change) {
        let old = u16_at(self.head, 10);
        put_u16(self.head, 10, change.apply(old));
    }

    /// `pseudo` changed the pseudo-header, `covered` the transport segment itself.
    fn patch_transport_checksum(&mut self, pseudo: Change, covered: Change) {
        let Some(at) = self.checksum_offset() else { return };
        let old = u16_at(self.head, at);
        let new = match (self.transport, self.offload.checksum) {
            // The ICMP checksum has no pseudo-header, so that a message can become all zeros (an echo reply with
            // identifier 0), whose checksum is 0xffff. No other message's is: RFC 1624 §3.
            (Transport::Icmp, _) => match covered.apply(old) {
                0 if self.is_all_zeros_but(at) => 0xffff,
                sum => sum,
            },
            (_, ChecksumState::Partial) => pseudo.apply_partial(old),
            (Transport::Udp, ChecksumState::Complete) if old == 0 => 0, // RFC 768: no checksum
            (Transport::Udp, ChecksumState::Complete) => match pseudo.and(covered).apply(old) {
                0 => 0xffff,
                sum => sum,
            },
            (_, ChecksumState::Complete) => pseudo.and(covered).apply(old),
        };
        put_u16(self.head, at, new);
    }

    /// Whether the transport segment has no bit set outside the 16 of its checksum, at `checksum`.
    fn is_all_zeros_but(&self, checksum: usize) -> bool {
        let (before, after) = (self.header_len()..checksum, checksum + 2..self.head.len());
        self.head.len() == self.total_len()
            && self.head[before].iter().chain(&self.head[after]).all(|&byte| byte == 0)
    }

    fn checksum_offset(&self) -> Option<usize> {
        let within = match self.transport {
            Transport::Tcp { .. } => 16,
            Transport::Udp => 6,
            Transport::Icmp => 2,
            Transport::Other => return None,
        };
        Some(self.header_len() + within)
    }
}

/// The TCP header's fields that a NAT looks at, in the machine's byte order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TcpFields {
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgment number.
    pub acknowledgment: u32,
    /// Flags, see [`tcp_flags`].
    pub flags: u8,
    /// Window, not scaled.
    pub window: u16,
}

fn parse_transport(head: &[u8], header_len: usize, total_len: usize) -> Result<Transport, DropReason> {
    if u16_at(head, 6) & 0x3fff != 0 {
        return Ok(Transport::Other);
    }
    let bytes = &head[header_len..];
    let payload_len = total_len - header_len;
    let need = |len: usize| if bytes.len() < len { Err(DropReason::BadTransportHeader) } else { Ok(()) };
    match head[9] {
        protocol::TCP => {
            need(20)?;
            let tcp_header_len = usize::from(bytes[12] >> 4) * 4;
            need(tcp_header_len.max(20))?;
            if tcp_header_len < 20 {
                return Err(DropReason::BadTransportHeader);
            }
            Ok(Transport::Tcp { header_len: tcp_header_len as u8 })
        }
        protocol::UDP => {
            need(8)?;
            let length = usize::from(u16_at(bytes, 4));
            if length < 8 || length > payload_len {
                return Err(DropReason::BadTransportHeader);
            }
            Ok(Transport::Udp)
        }
        protocol::ICMP => {
            need(8)?;
            Ok(Transport::Icmp)
        }
        _ => Ok(Transport::Other),
    }
}

/// The 16-bit word at `at`.
pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// The 32-bit word at `at`.
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The address at `at`.
pub(crate) fn address_at(bytes: &[u8], at: usize) -> Ipv4Addr {
    Ipv4Addr::new(bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3])
}

/// Writes a 16-bit word.
pub(crate) fn put_u16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}
