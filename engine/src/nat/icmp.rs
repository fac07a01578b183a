//! ICMP errors (RFC 5508 §4): they are about another packet, which they quote, and are translated by way of it.
//!
//! # Theory of operation
//!
//! An error from outside quotes a packet as it left us, from an external endpoint to a remote one; an error by a client
//! quotes a packet as the client received it, from a remote endpoint to the inner one. Either must belong to a session.
//! The quoted packet's near end is then translated back, as is the error's own address, and nothing else changes: type
//! and code, the rest of the quotation, and the session, which an error neither refreshes nor ends.
//!
//! Errors are easily forged, so they are believed only if what they quote was really sent: the session must be live
//! and, for TCP, the quoted sequence number in flight (RFC 5927 §4.1).

use super::Nat;
use super::config::{Endpoint, Proto};
use crate::drop_reason::DropReason;
use crate::wire::Ipv4Packet;
use crate::wire::checksum::{self, Change};
use crate::wire::ipv4::{MIN_HEADER_LEN, address_at, put_u16, u16_at, u32_at};

/// Where the quoted packet begins in an ICMP error (RFC 792).
const QUOTED: usize = 8;

/// The ICMP messages that pass.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Message {
    /// A query's question.
    Request,
    /// A query's answer.
    Reply,
    /// An error about another packet.
    Error,
}

/// What a message of this type is; `None` for those that do not pass: source quench (RFC 6633), redirect, router
/// discovery, and whatever is unknown.
pub(super) fn message(kind: u8) -> Option<Message> {
    match kind {
        8 | 13 => Some(Message::Request),    // echo, timestamp (RFC 792)
        0 | 14 => Some(Message::Reply),      // echo reply, timestamp reply (RFC 792)
        3 | 11 | 12 => Some(Message::Error), // unreachable, time exceeded, parameter problem (RFC 792)
        _ => None,
    }
}

impl Nat {
    /// An ICMP error about a packet that a client has sent.
    pub(super) fn translate_error_inbound(&mut self, packet: &mut Ipv4Packet<'_>) -> Result<(), DropReason> {
        check_checksum(packet)?;
        let quoted = Quoted::parse(packet.transport_bytes())?;
        if quoted.source.address != packet.destination() || quoted.message == Some(Message::Reply) {
            return Err(DropReason::IcmpErrorUnmatched);
        }
        let id = self
            .table
            .find_inbound(quoted.protocol, quoted.source, quoted.destination)
            .ok_or(DropReason::IcmpErrorUnmatched)?;
        let session = &self.table.sessions[id as usize];
        if let Some(connection) = &session.tcp {
            if !connection.is_in_flight(quoted.sequence) {
                return Err(DropReason::IcmpErrorUnmatched);
            }
        }
        quoted.rewrite(packet, QuotedEnd::Source, session.internal);
        packet.rewrite_destination_address(session.internal.address);
        Ok(())
    }

    /// An ICMP error by a client about a packet that it has received.
    pub(super) fn translate_error_outbound(&mut self, packet: &mut Ipv4Packet<'_>) -> Result<(), DropReason> {
        check_checksum(packet)?;
        let quoted = Quoted::parse(packet.transport_bytes())?;
        if quoted.destination.address != packet.source()
            || quoted.source.address != packet.destination()
            || quoted.message == Some(Message::Request)
        {
            return Err(DropReason::IcmpErrorUnmatched);
        }
        let session = self.table.find_outbound(quoted.protocol, quoted.destination, quoted.source);
        let external = match session {
            Some(id) => self.table.sessions[id as usize].external,
            // A packet that the filter admitted without a session.
            None => self
                .table
                .find_internal(quoted.protocol, quoted.destination)
                .filter(|&id| quoted.protocol == Proto::Udp && self.filter_admits(id, quoted.source))
                .map(|id| self.table.mappings[id as usize].external)
                .ok_or(DropReason::IcmpErrorUnmatched)?,
        };
        quoted.rewrite(packet, QuotedEnd::Destination, external);
        packet.rewrite_source_address(external.address);
        Ok(())
    }
}

/// The protocol and source port (or identifier) of the packet that the ICMP error `packet` quotes.
pub(super) fn quoted_source(packet: &Ipv4Packet<'_>) -> Option<(Proto, u16)> {
    Quoted::parse(packet.transport_bytes()).ok().map(|quoted| (quoted.protocol, quoted.source.port))
}

/// RFC 5508 REQ-3: an error whose checksum is wrong is dropped.
fn check_checksum(packet: &Ipv4Packet<'_>) -> Result<(), DropReason> {
    if packet.tail_len() == 0 && packet.transport_checksum_ok() {
        Ok(())
    } else {
        Err(DropReason::BadTransportChecksum)
    }
}

/// Which end of the quoted packet is ours.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum QuotedEnd {
    Source,
    Destination,
}

/// The packet that an ICMP error quotes: its headers, of which at least 8 transport bytes are there.
#[derive(Clone, Copy, Debug)]
struct Quoted {
    protocol: Proto,
    source: Endpoint,
    destination: Endpoint,
    /// TCP only.
    sequence: u32,
    /// ICMP only.
    message: Option<Message>,
    /// Where its transport header begins, in bytes from the ICMP message's first.
    transport_at: usize,
}

impl Quoted {
    /// Reads the quotation in an ICMP error, beginning with the error's own header. IP options are skipped (RFC 5508
    /// REQ-3 b), the transport checksum is not looked at (REQ-3 c).
    fn parse(icmp: &[u8]) -> Result<Self, DropReason> {
        let ip = icmp.get(QUOTED..).unwrap_or(&[]);
        if ip.len() < MIN_HEADER_LEN {
            return Err(DropReason::Truncated);
        }
        let header_len = usize::from(ip[0] & 0x0f) * 4;
        if ip[0] >> 4 != 4 || header_len < MIN_HEADER_LEN {
            return Err(DropReason::BadIpHeader);
        }
        let transport = ip.get(header_len..).unwrap_or(&[]);
        if transport.len() < 8 {
            return Err(DropReason::Truncated); // RFC 792 promises 8 bytes
        }
        if checksum::checksum(&ip[..header_len]) != 0 {
            return Err(DropReason::BadIpChecksum);
        }
        if u16_at(ip, 6) & 0x1fff != 0 {
            return Err(DropReason::IcmpErrorUnmatched); // a later fragment has no ports
        }
        let (source, destination) = (address_at(ip, 12), address_at(ip, 16));
        let protocol = Proto::from_number(ip[9]).ok_or(DropReason::IcmpErrorUnmatched)?;
        let (source_port, destination_port, message) = match (protocol, message(transport[0])) {
            (Proto::Tcp | Proto::Udp, _) => (u16_at(transport, 0), u16_at(transport, 2), None),
            (Proto::Icmp, Some(Message::Request)) => (u16_at(transport, 4), 0, Some(Message::Request)),
            (Proto::Icmp, Some(Message::Reply)) => (0, u16_at(transport, 4), Some(Message::Reply)),
            (Proto::Icmp, _) => return Err(DropReason::IcmpErrorUnmatched), // no error about an error
        };
        Ok(Self {
            protocol,
            source: Endpoint::new(source, source_port),
            destination: Endpoint::new(destination, destination_port),
            sequence: u32_at(transport, 4),
            message,
            transport_at: QUOTED + header_len,
        })
    }

    /// Replaces our end of the quoted packet in the error `packet`, mending the quoted checksums and the error's own.
    fn rewrite(&self, packet: &mut Ipv4Packet<'_>, end: QuotedEnd, new: Endpoint) {
        let start = packet.header_len();
        let icmp = &mut packet.head_mut()[start..];
        let (old, address_at, port_at) = match end {
            QuotedEnd::Source => (self.source, QUOTED + 12, 0),
            QuotedEnd::Destination => (self.destination, QUOTED + 16, 2),
        };
        let port_at = self.transport_at + if self.protocol == Proto::Icmp { 4 } else { port_at };

        let address = Change::NONE.address(old.address, new.address);
        icmp[address_at..address_at + 4].copy_from_slice(&new.address.octets());
        let header_checksum = u16_at(icmp, QUOTED + 10);
        put_u16(icmp, QUOTED + 10, address.apply(header_checksum));

        put_u16(icmp, port_at, new.port);
        let port = Change::NONE.word(old.port, new.port);
        let (checksum_at, change) = match self.protocol {
            Proto::Tcp => (self.transport_at + 16, address.and(port)),
            Proto::Udp => (self.transport_at + 6, address.and(port)),
            Proto::Icmp => (self.transport_at + 2, port),
        };
        // A quotation of 8 bytes ends before TCP's checksum; a UDP checksum of 0 is none (RFC 768).
        if icmp.len() >= checksum_at + 2 {
            let old = u16_at(icmp, checksum_at);
            if self.protocol != Proto::Udp || old != 0 {
                let new = change.apply(old);
                put_u16(
                    icmp,
                    checksum_at,
                    if self.protocol == Proto::Udp && new == 0 { 0xffff } else { new },
                );
            }
        }

        put_u16(icmp, 2, 0);
        let sum = checksum::checksum(icmp);
        put_u16(icmp, 2, sum);
    }
}
