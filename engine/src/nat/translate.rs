//! The walk of a packet through the NAT.
//!
//! Every check comes before the first rewritten byte: a packet that is dropped is left as it came, so that an ICMP
//! error about it can quote it.

use std::net::Ipv4Addr;

use super::Nat;
use super::config::{Endpoint, Filtering, Outbound, Proto};
use super::icmp::{self, Message};
use super::table::MappingKind;
use super::tcp::{Connection, Segment, SegmentVerdict};
use crate::clock::Timestamp;
use crate::drop_reason::DropReason;
use crate::wire::{Ipv4Packet, Transport};

impl Nat {
    /// Translates a packet from a client: its source becomes the external endpoint of the client's mapping, which is
    /// made if there is none. The caller has checked that the source is the client's own, and, where the destination is
    /// one of our external addresses that the host has too, that the port is reserved for the NAT, on whichever shard
    /// ([`PortOwnership::is_reserved`](crate::external::reservation::PortOwnership::is_reserved)).
    ///
    /// # Errors
    /// The reason to drop it; the packet is unchanged. Where something is exhausted, the caller tells the client
    /// (RFC 6888 REQ-11; ICMP 3/13, RFC 5508 REQ-8).
    pub fn translate_outbound(
        &mut self,
        packet: &mut Ipv4Packet<'_>,
        now: Timestamp,
    ) -> Result<Outbound, DropReason> {
        if packet.is_fragment() {
            return Err(DropReason::BadFragment);
        }
        match classify(packet)? {
            Subject::Flow { protocol, source, destination, message: None | Some(Message::Request) } => {
                self.translate_flow_outbound(packet, protocol, source, destination, now)?;
            }
            Subject::Error => self.translate_error_outbound(packet)?,
            Subject::Other => self.pass_outbound(packet)?,
            // The reply to a query that we let nobody send.
            Subject::Flow { .. } => return Err(DropReason::UnsupportedIcmp),
        }
        self.identifications.renew(packet, &self.table.hasher);
        if self.pools.contains(packet.destination()) { Ok(Outbound::Hairpin) } else { Ok(Outbound::External) }
    }

    /// Translates a packet from outside, or from inside by way of an external address: its destination becomes the
    /// inner endpoint of the mapping, if there is one and its filter admits the sender.
    ///
    /// # Errors
    /// The reason to drop it, in silence; the packet is unchanged.
    pub fn translate_inbound(
        &mut self,
        packet: &mut Ipv4Packet<'_>,
        now: Timestamp,
    ) -> Result<(), DropReason> {
        if packet.is_fragment() {
            return Err(DropReason::BadFragment);
        }
        match classify(packet)? {
            Subject::Flow { protocol, source, destination, message: None | Some(Message::Reply) } => {
                self.translate_flow_inbound(packet, protocol, source, destination, now)?;
            }
            Subject::Error => self.translate_error_inbound(packet)?,
            Subject::Other => self.pass_inbound(packet)?,
            Subject::Flow { .. } => return Err(DropReason::UnsupportedIcmp), // a query to the host, not to us
        }
        Ok(())
    }

    /// Begins to fetch from memory what [`Self::translate_outbound`] will need for this packet: to be called when it
    /// has been received and waits for others. With many sessions, that is most of what a translation costs.
    pub fn prefetch_outbound(&self, packet: &[u8]) {
        if self.table.outgrows_the_cache() {
            if let Some((protocol, internal, remote)) = ends(packet) {
                self.table.prefetch_outbound(protocol, internal, remote);
            }
        }
    }

    /// The same for [`Self::translate_inbound`].
    pub fn prefetch_inbound(&self, packet: &[u8]) {
        if self.table.outgrows_the_cache() {
            if let Some((protocol, remote, external)) = ends(packet) {
                self.table.prefetch_inbound(protocol, external, remote);
            }
        }
    }

    /// Which client a packet from outside is for that nobody has checked yet, as far as its protocol, its ports or its
    /// identifier tell. `elsewhere` is asked whose an external port is for which there is no mapping here.
    pub fn recipient(
        &self,
        packet: &[u8],
        elsewhere: impl FnOnce(Proto, Endpoint) -> Option<Ipv4Addr>,
    ) -> Option<Ipv4Addr> {
        const FRAGMENT_BITS: u16 = 0x3fff; // RFC 791 §3.1: More Fragments, and the offset
        let fragment = u16::from_be_bytes([*packet.get(6)?, *packet.get(7)?]) & FRAGMENT_BITS;
        if fragment != 0 {
            return None; // the pieces of a datagram stay together
        }
        let Some((protocol, remote, external)) = ends(packet).or_else(|| icmp_reply_ends(packet)) else {
            return self.passed.client(*packet.get(9)?).ok();
        };
        let table = &self.table;
        if let Some(id) = table.find_inbound(protocol, external, remote) {
            return Some(table.sessions[id as usize].internal.address);
        }
        match table.find_external(protocol, external) {
            Some(mapping) => Some(table.mappings[mapping as usize].internal.address),
            None => elsewhere(protocol, external),
        }
    }

    /// Whether a packet from a client belongs to a TCP connection that somebody outside has begun, and nobody can take
    /// it for the begin of another. UDP has no connections, so none of it does. Changes nothing.
    pub fn answers_visitor(&self, packet: &Ipv4Packet<'_>) -> bool {
        let (Some(fields), Some((from, to))) = (packet.tcp(), packet.ports()) else { return false };
        let internal = Endpoint::new(packet.source(), from);
        let remote = Endpoint::new(packet.destination(), to);
        let session = self.table.find_outbound(Proto::Tcp, internal, remote);
        let connection = session.and_then(|id| self.table.sessions[id as usize].tcp);
        connection.is_some_and(|connection| connection.is_visit()) && !Segment::of(packet, fields).may_open()
    }

    /// Whether the datagram from outside that begins with this first fragment would have been let in. Changes nothing.
    pub fn awaits_fragment(&self, first: &Ipv4Packet<'_>) -> bool {
        let ports = match (Proto::from_number(first.protocol()), first.transport_bytes()) {
            (Some(protocol @ (Proto::Tcp | Proto::Udp)), &[a, b, c, d, ..])
                if first.fragment_offset() == 0 =>
            {
                Some((protocol, u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])))
            }
            _ => None, // ICMP queries of that size are not missed
        };
        ports.is_some_and(|(protocol, from, to)| {
            let remote = Endpoint::new(first.source(), from);
            let external = Endpoint::new(first.destination(), to);
            self.table.find_inbound(protocol, external, remote).is_some()
                || self
                    .table
                    .find_external(protocol, external)
                    .is_some_and(|mapping| self.filter_admits(mapping, remote))
        })
    }

    fn translate_flow_outbound(
        &mut self,
        packet: &mut Ipv4Packet<'_>,
        protocol: Proto,
        internal: Endpoint,
        remote: Endpoint,
        now: Timestamp,
    ) -> Result<(), DropReason> {
        let segment = packet.tcp().map(|fields| Segment::of(packet, fields));
        let id = match self.table.find_outbound(protocol, internal, remote) {
            Some(id) => {
                self.follow(id, segment.as_ref(), Connection::outbound, now)?;
                // RFC 7857 §7.1: an RST refuses, and invites nobody.
                if !segment.is_some_and(|segment| segment.resets()) {
                    self.table.admit(id);
                }
                id
            }
            None => {
                let connection = match &segment {
                    Some(segment) if !segment.opens() => return Err(DropReason::TcpOutOfState),
                    Some(syn) => Some(Connection::opened_by_client(syn)),
                    None => None,
                };
                self.open_session(protocol, internal, remote, connection, now)?
            }
        };
        let external = self.table.sessions[id as usize].external;
        packet.rewrite_source(external.address, external.port);
        Ok(())
    }

    fn translate_flow_inbound(
        &mut self,
        packet: &mut Ipv4Packet<'_>,
        protocol: Proto,
        remote: Endpoint,
        external: Endpoint,
        now: Timestamp,
    ) -> Result<(), DropReason> {
        let segment = packet.tcp().map(|fields| Segment::of(packet, fields));
        let internal = match self.table.find_inbound(protocol, external, remote) {
            Some(id) => {
                self.follow(id, segment.as_ref(), Connection::inbound, now)?;
                self.table.sessions[id as usize].internal
            }
            None => self.admit_stranger(protocol, remote, external, segment.as_ref(), now)?,
        };
        packet.rewrite_destination(internal.address, internal.port);
        Ok(())
    }

    /// A packet from outside that belongs to no session: the filter decides (RFC 4787 §5). It refreshes nothing.
    fn admit_stranger(
        &mut self,
        protocol: Proto,
        remote: Endpoint,
        external: Endpoint,
        segment: Option<&Segment>,
        now: Timestamp,
    ) -> Result<Endpoint, DropReason> {
        let id = self.table.find_external(protocol, external).ok_or(DropReason::NoMapping)?;
        if !self.filter_admits(id, remote) {
            return Err(DropReason::Filtered);
        }
        if let Some(segment) = segment {
            if !segment.opens() {
                return Err(DropReason::TcpOutOfState);
            }
            self.open_session_from_outside(id, remote, Connection::opened_by_remote(segment), now)?;
        }
        Ok(self.table.mappings[id as usize].internal)
    }

    /// Whether the mapping's filter admits packets of a remote endpoint with which it has no session.
    pub(super) fn filter_admits(&self, mapping: u32, remote: Endpoint) -> bool {
        self.table.mappings[mapping as usize].kind == MappingKind::Published
            || match self.config.filtering {
                Filtering::EndpointIndependent => true,
                Filtering::AddressDependent => self.table.admits(mapping, remote.address),
                Filtering::AddressAndPortDependent => false,
            }
    }

    /// A packet of an existing session: TCP moves on, and the session's idle time begins anew.
    fn follow(
        &mut self,
        id: u32,
        segment: Option<&Segment>,
        direction: fn(&mut Connection, &Segment) -> SegmentVerdict,
        now: Timestamp,
    ) -> Result<(), DropReason> {
        let session = &mut self.table.sessions[id as usize];
        let (Some(segment), Some(connection)) = (segment, &mut session.tcp) else {
            session.last_activity = now;
            return Ok(());
        };
        let before = (connection.state(), connection.is_only_a_call());
        let verdict = direction(connection, segment);
        let changed = (connection.state(), connection.is_only_a_call()) != before;
        match verdict {
            SegmentVerdict::Refresh => session.last_activity = now,
            SegmentVerdict::Pass => {}
            SegmentVerdict::Call => self.renew_call(id),
            SegmentVerdict::Refuse => return Err(DropReason::TcpOutOfState),
        }
        if changed {
            self.note_closed(self.table.session_links[id as usize].mapping);
            self.note_call(id);
            self.restart_timer(id, now);
        }
        Ok(())
    }
}

/// Protocol, source and destination of a packet that nobody has checked yet. `None` where they are not in the usual
/// place: then nothing is known, and nothing lost.
fn ends(packet: &[u8]) -> Option<(Proto, Endpoint, Endpoint)> {
    const WITHOUT_OPTIONS: u8 = 0x45;
    let h: &[u8; 24] = packet.first_chunk()?;
    let protocol = Proto::from_number(h[9]).filter(|&protocol| protocol != Proto::Icmp)?;
    let source = Endpoint::new(Ipv4Addr::new(h[12], h[13], h[14], h[15]), u16::from_be_bytes([h[20], h[21]]));
    let destination =
        Endpoint::new(Ipv4Addr::new(h[16], h[17], h[18], h[19]), u16::from_be_bytes([h[22], h[23]]));
    (h[0] == WITHOUT_OPTIONS).then_some((protocol, source, destination))
}

/// The same for the answer to an ICMP query.
fn icmp_reply_ends(packet: &[u8]) -> Option<(Proto, Endpoint, Endpoint)> {
    const WITHOUT_OPTIONS: u8 = 0x45;
    let h: &[u8; 26] = packet.first_chunk()?;
    let is_reply = h[0] == WITHOUT_OPTIONS
        && Proto::from_number(h[9]) == Some(Proto::Icmp)
        && icmp::message(h[20]) == Some(Message::Reply);
    let source = Endpoint::new(Ipv4Addr::new(h[12], h[13], h[14], h[15]), 0);
    let identifier = u16::from_be_bytes([h[24], h[25]]);
    let destination = Endpoint::new(Ipv4Addr::new(h[16], h[17], h[18], h[19]), identifier);
    is_reply.then_some((Proto::Icmp, source, destination))
}

/// What a packet is about.
enum Subject {
    /// Itself: TCP, UDP or an ICMP query.
    Flow { protocol: Proto, source: Endpoint, destination: Endpoint, message: Option<Message> },
    /// Another packet.
    Error,
    /// A protocol without ports.
    Other,
}

fn classify(packet: &Ipv4Packet<'_>) -> Result<Subject, DropReason> {
    let (source, destination) = (packet.source(), packet.destination());
    match packet.transport() {
        Transport::Tcp { .. } | Transport::Udp => {
            let (from, to) = packet.ports().ok_or(DropReason::BadTransportHeader)?;
            let protocol = if packet.transport() == Transport::Udp { Proto::Udp } else { Proto::Tcp };
            let (source, destination) = (Endpoint::new(source, from), Endpoint::new(destination, to));
            Ok(Subject::Flow { protocol, source, destination, message: None })
        }
        Transport::Icmp => {
            let (kind, _) = packet.icmp_type_code().ok_or(DropReason::BadTransportHeader)?;
            let identifier = packet.icmp_identifier().ok_or(DropReason::BadTransportHeader)?;
            let message = icmp::message(kind).ok_or(DropReason::UnsupportedIcmp)?;
            // The identifier stands on the side of whoever asks.
            let (from, to) = match message {
                Message::Error => return Ok(Subject::Error),
                Message::Request => (identifier, 0),
                Message::Reply => (0, identifier),
            };
            let (source, destination) = (Endpoint::new(source, from), Endpoint::new(destination, to));
            Ok(Subject::Flow { protocol: Proto::Icmp, source, destination, message: Some(message) })
        }
        Transport::Other => Ok(Subject::Other),
    }
}

/// The external port (or ICMP identifier) that a packet from outside, or to be hairpinned, is for: the one whose shard
/// must translate it. For ICMP errors it is that of the packet which they quote. `None` if there is none to be found.
pub fn external_port(packet: &Ipv4Packet<'_>) -> Option<(Proto, u16)> {
    match classify(packet).ok()? {
        Subject::Flow { protocol, destination, message: None | Some(Message::Reply), .. } => {
            Some((protocol, destination.port))
        }
        Subject::Flow { .. } | Subject::Other => None,
        Subject::Error => icmp::quoted_source(packet),
    }
}
