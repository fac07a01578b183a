//! Entrance 1: datagrams of the transport.

use std::net::{Ipv4Addr, SocketAddrV4};

use super::Gateway;
use super::leave::{Decision, Exit, Origin};
use super::refusal::Refusal;
use crate::arena::{Arena, Span};
use crate::clock::Timestamp;
use crate::drop_reason::DropReason;
use crate::external::next_hop::NextHop;
use crate::external::reservation::PortProtocol;
use crate::handoffs::Handoff;
use crate::messages::EventKind;
use crate::nat::{Outbound, Proto};
use crate::outbox::Outbox;
use crate::path::Path;
use crate::router::Verdict;
use crate::traffic::Direction;
use crate::transport::MAX_TRAIN_SEGMENTS;
use crate::tunnel::{PeerId, Received, is_initiation};
use crate::wire::{Ecn, Ipv4Packet, Offload, protocol};
use crate::{mss, source_route};

/// Messages for sessions of other shards that one turn hands over at most: one train, should the kernel deliver a whole
/// one to the wrong shard.
const MISDIRECTED_PER_TURN: usize = MAX_TRAIN_SEGMENTS;

impl Gateway {
    /// Where no peer can be, whatever it knows. Were it taken for a peer's endpoint, what is sealed for an address of
    /// the VPN would go into our own TUN device, come back, and be sealed again, without end; and nothing can be sent
    /// to port 0.
    ///
    /// One train has one source, and a handoff was part of a train before: no other entrance needs to check.
    pub(super) fn check_outer_source(&self, from: SocketAddrV4) -> Result<(), DropReason> {
        let is_believable = !self.subnet.contains(*from.ip()) && from.port() != 0;
        is_believable.then_some(()).ok_or(DropReason::BogonSource)
    }

    /// Opens one datagram, and keeps its packet until the flush.
    pub(super) fn receive_datagram(
        &mut self,
        now: Timestamp,
        arena: &mut Arena,
        datagram: Span,
        from: Path,
        ecn: Ecn,
        outbox: &mut Outbox,
    ) -> Result<(), DropReason> {
        let bytes = arena.get_mut(datagram);
        match self.tunnel.receive(now, from, bytes, &mut outbox.datagrams) {
            Received::Packet { peer, plaintext } => {
                self.check_inner_source(peer, &bytes[plaintext.clone()])?;
                ecn.carry_over(&mut bytes[plaintext.clone()])?;
                self.nat.prefetch_outbound(&bytes[plaintext.clone()]);
                let packet = datagram.skip(plaintext.start).take(plaintext.len());
                self.coalescer.push(arena, packet, peer)
            }
            Received::Keepalive { .. } | Received::Handshake { .. } => Ok(()),
            Received::OtherShard(shard) => {
                let handoff = Self::handoff_of(bytes, from, ecn, &mut outbox.misdirected)?;
                outbox.handoffs.push((shard, handoff));
                Ok(())
            }
            Received::Drop(reason) => Err(reason),
        }
    }

    /// Counts a datagram that dies, and tells of it where it is a handshake's.
    pub(super) fn refuse_datagram(&mut self, now: Timestamp, reason: DropReason, from: SocketAddrV4) {
        self.drops.count(reason);
        if let Some(detail) = self.refused_handshakes.note(now, reason, from) {
            self.events.push(EventKind::HandshakeRefused, detail);
        }
    }

    /// What takes a datagram to another shard.
    ///
    /// The kernel steers a whole train by its first datagram. All of a real peer's are for one shard, except for an
    /// initiation (to shard 0) and the shorter data message right behind it, of a session that is being renewed: that
    /// one must not be lost. A forger's train may be as mixed as it likes. So a misdirected message is handed over, but
    /// queued with the unknown senders', and not so many in a turn that they fill the queue between the shards. It is
    /// judged there, a handshake response too.
    fn handoff_of(
        bytes: &[u8],
        from: Path,
        ecn: Ecn,
        misdirected: &mut usize,
    ) -> Result<Handoff, DropReason> {
        if is_initiation(bytes) {
            return Ok(Handoff::Initiation { from, datagram: bytes.to_vec() });
        }
        *misdirected += 1;
        if *misdirected > MISDIRECTED_PER_TURN {
            return Err(DropReason::QueueFull);
        }
        Ok(Handoff::Misdirected { from, ecn, datagram: bytes.to_vec() })
    }

    /// Routes a packet that did not come through the coalescer, which verifies the others' transport checksums.
    pub(super) fn route_unverified(
        &mut self,
        now: Timestamp,
        arena: &mut Arena,
        mut packet: Vec<u8>,
        peer: PeerId,
        outbox: &mut Outbox,
    ) {
        match Ipv4Packet::parse(&mut packet, 0, Offload::NONE).map(|view| view.transport_checksum_ok()) {
            Ok(true) => {
                self.route_from_peer(now, arena, Origin::Owned(packet), Offload::NONE, peer, outbox);
            }
            Ok(false) => self.drops.count(DropReason::BadTransportChecksum),
            Err(reason) => self.drops.count(reason),
        }
    }

    /// Cryptokey routing: a peer speaks for its own address only.
    pub(super) fn check_inner_source(&self, peer: PeerId, packet: &[u8]) -> Result<(), DropReason> {
        match packet.first().ok_or(DropReason::Truncated)? >> 4 {
            4 => {}
            6 => return Err(DropReason::Ipv6),
            _ => return Err(DropReason::UnknownVersion),
        }
        let octets: [u8; 4] =
            packet.get(12..16).and_then(|source| source.try_into().ok()).ok_or(DropReason::Truncated)?;
        if self.local_peers.get(&peer).is_some_and(|peer| peer.address == Ipv4Addr::from(octets)) {
            Ok(())
        } else {
            Err(DropReason::WrongInnerSource)
        }
    }

    /// Routes what the peers sent since the last flush.
    pub(super) fn route_from_peers(&mut self, now: Timestamp, arena: &mut Arena, outbox: &mut Outbox) {
        let mut coalescer = std::mem::take(&mut self.coalescer);
        coalescer.drain(arena, |arena, gathered| {
            let origin = Origin::Arena { head: gathered.head, tails: gathered.tails };
            self.route_from_peer(now, arena, origin, gathered.offload, gathered.tag, outbox);
        });
        self.coalescer = coalescer;
    }

    fn route_from_peer(
        &mut self,
        now: Timestamp,
        arena: &mut Arena,
        mut origin: Origin<'_>,
        offload: Offload,
        peer: PeerId,
        outbox: &mut Outbox,
    ) {
        let tail_len = origin.tail_len();
        let mut shape = None;
        let decision = Ipv4Packet::parse(origin.head_mut(arena), tail_len, offload)
            .map_err(Refusal::from)
            .and_then(|mut packet| {
                shape = Some(packet.shape());
                self.decide_from_peer(now, &mut packet, peer)
            });
        match decision {
            Ok(Decision { exit: Exit::Reassembled(datagram), .. }) => {
                self.route_unverified(now, arena, datagram, peer, outbox);
            }
            Ok(decision) => {
                // Fragments are counted when they have become a datagram.
                if !matches!(decision.exit, Exit::Held) {
                    self.traffic.count(Direction::FromPeers, decision.shape);
                }
                self.leave(now, arena, origin, decision, outbox);
            }
            Err(refusal) => {
                self.drops.count_segments(refusal.reason, shape);
                if let Some(answer) = refusal.answer {
                    self.answer_peer(peer, answer, outbox);
                }
            }
        }
    }

    fn decide_from_peer(
        &mut self,
        now: Timestamp,
        packet: &mut Ipv4Packet<'_>,
        peer: PeerId,
    ) -> Result<Decision, Refusal> {
        source_route::refuse(packet)?;
        let (client, destination) = (packet.source(), packet.destination());
        if packet.is_fragment() {
            let exit = match self.fragments_from_peers.push(packet, now)? {
                Some(datagram) => Exit::Reassembled(datagram),
                None => Exit::Held,
            };
            return Ok(Decision { exit, destination, shape: packet.shape() });
        }
        let exit = match self.router.route(destination) {
            // Whether the other one is there or not: who may not reach it has no need to know.
            Verdict::Peer(_) if !self.access.between_clients => {
                return Err(self.refuse(now, packet, DropReason::Denied, 0));
            }
            Verdict::Peer(address) if self.homes.contains_key(&address) => {
                self.forward_checks(now, packet, self.tunnel_mtu)?;
                Exit::Peer { address, client }
            }
            Verdict::Peer(_) => return Err(self.refuse(now, packet, DropReason::NoSuchPeer, 0)),
            Verdict::Host if self.nat_owns_destination(packet) => {
                self.forward_checks(now, packet, self.tunnel_mtu)?;
                self.translate_outbound(now, packet)?;
                self.hairpin(packet, client)
            }
            Verdict::Host => {
                self.check_dns_rate(now, packet, peer)?;
                Exit::Host
            }
            Verdict::External => {
                if let Some(reason) = self.unreachable(packet) {
                    return Err(self.refuse(now, packet, reason, 0));
                }
                self.forward_checks(now, packet, self.external.mtu)?;
                match self.translate_outbound(now, packet)? {
                    Outbound::External => Exit::External { client },
                    Outbound::Hairpin => self.hairpin(packet, client),
                }
            }
            Verdict::Drop(reason) => return Err(reason.into()),
        };
        Ok(Decision { exit, destination: packet.destination(), shape: packet.shape() })
    }

    /// The way of a client's packet, translated, to a port of ours.
    fn hairpin(&self, packet: &Ipv4Packet<'_>, client: Ipv4Addr) -> Exit {
        Exit::Inbound { shard: self.owner_of_inbound(packet).0, client: Some(client) }
    }

    /// What a router does to every packet that it forwards: the TTL, the path's MTU, and the MSS of TCP.
    fn forward_checks(
        &mut self,
        now: Timestamp,
        packet: &mut Ipv4Packet<'_>,
        mtu: usize,
    ) -> Result<(), Refusal> {
        if packet.shape().segment_len() > mtu && packet.dont_fragment() {
            return Err(self.refuse(now, packet, DropReason::TooBig, mtu));
        }
        if let Err(reason) = packet.decrement_ttl() {
            return Err(self.refuse(now, packet, reason, 0));
        }
        mss::clamp(packet, self.tunnel_mtu.min(self.external.mtu));
        Ok(())
    }

    fn translate_outbound(
        &mut self,
        now: Timestamp,
        packet: &mut Ipv4Packet<'_>,
    ) -> Result<Outbound, Refusal> {
        match self.nat.translate_outbound(packet, now) {
            Ok(outbound) => Ok(outbound),
            // More ports are on their way. An error would end the client's attempt; in silence, it tries again.
            Err(DropReason::PortsExhausted) if self.ports_are_under_way(packet) => {
                Err(DropReason::PortsExhausted.into())
            }
            Err(reason) => Err(self.refuse(now, packet, reason, 0)),
        }
    }

    fn ports_are_under_way(&self, packet: &Ipv4Packet<'_>) -> bool {
        let protocol = match packet.protocol() {
            protocol::TCP => Proto::Tcp,
            protocol::UDP => Proto::Udp,
            _ => return false,
        };
        self.nat.expects_ports(protocol, packet.source())
    }

    /// Why a packet's destination outside cannot be reached, or may not be, if so: to be known before a port is lent
    /// for it.
    fn unreachable(&self, packet: &Ipv4Packet<'_>) -> Option<DropReason> {
        let destination = packet.destination();
        if self.nat.is_external(destination) {
            return None; // hairpinned
        }
        // Whoever is in a denied network may visit a client's port that is open to everybody, and is answered.
        if self.access.denies(destination) && !self.nat.answers_visitor(packet) {
            return Some(DropReason::Denied);
        }
        match self.external.next_hop(destination) {
            Ok(NextHop(neighbor)) if self.neighbors.has_failed(neighbor) => {
                Some(DropReason::NextHopUnresolved)
            }
            Ok(_) => None,
            Err(reason) => Some(reason),
        }
    }

    /// Whether a packet to one of our external addresses is for a port of the NAT's (RFC 4787 REQ-9: hairpinning),
    /// rather than for the host. An ICMP error is for the port from which the packet came that it quotes (RFC 5508
    /// REQ-7).
    fn nat_owns_destination(&self, packet: &Ipv4Packet<'_>) -> bool {
        let (protocol, port) = match crate::nat::external_port(packet) {
            Some((Proto::Tcp, port)) => (PortProtocol::Tcp, port),
            Some((Proto::Udp, port)) => (PortProtocol::Udp, port),
            Some((Proto::Icmp, _)) | None => return false,
        };
        self.ownership.is_reserved(protocol, packet.destination(), port)
    }
}
