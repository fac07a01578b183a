//! The exits: to a peer, to the host, to the external interface, to another shard.

use std::net::Ipv4Addr;

use super::from_external::Entrance;
use super::{Gateway, HeldFrame};
use crate::arena::{Arena, Span};
use crate::clock::Timestamp;
use crate::drop_reason::DropReason;
use crate::external::LINK_HEADER_LEN;
use crate::external::neighbor::{Asker, Resolution};
use crate::external::next_hop::NextHop;
use crate::fragment::fragmentation::Fragments;
use crate::handoffs::Handoff;
use crate::icmp_error::IcmpErrorKind;
use crate::outbox::{Bytes, DeviceFrame, Gather, Outbox, PeerFrame};
use crate::traffic::Direction;
use crate::tunnel::{PeerHome, PeerId};
use crate::wire::{Ipv4Packet, Offload, Shape, Transport, VirtioNetHeader};

/// The packet being routed: its head is borrowed by an [`Ipv4Packet`]; this is where it lies, and its gather list.
pub(super) enum Origin<'t> {
    Arena { head: Span, tails: &'t [Span] },
    Owned(Vec<u8>),
}

impl Origin<'_> {
    pub(super) fn tail_len(&self) -> usize {
        match self {
            Self::Arena { tails, .. } => tails.iter().map(|tail| tail.len as usize).sum(),
            Self::Owned(_) => 0,
        }
    }

    pub(super) fn head_mut<'a>(&'a mut self, arena: &'a mut Arena) -> &'a mut [u8] {
        match self {
            Self::Arena { head, .. } => arena.get_mut(*head),
            Self::Owned(bytes) => bytes,
        }
    }

    fn into_gather(self, shape: Shape, outbox: &mut Outbox) -> Gather {
        match self {
            // Padding behind the packet is cut off here, as `Ipv4Packet::parse` cut it off its view.
            Self::Arena { head, tails } => {
                Gather { head: Bytes::Arena(head.take(shape.head_len())), tails: outbox.push_tails(tails) }
            }
            Self::Owned(mut bytes) => {
                bytes.truncate(shape.head_len());
                Gather::whole(Bytes::Owned(bytes))
            }
        }
    }
}

/// Where a packet leaves, its headers rewritten accordingly.
pub(super) enum Exit {
    /// A VPN address; and whose packet it is on the way to another shard.
    Peer {
        address: Ipv4Addr,
        client: Ipv4Addr,
    },
    Host,
    /// The internet; and whose packet it is.
    External {
        client: Ipv4Addr,
    },
    /// One of our external addresses, on a port that the NAT of that shard owns, as if from outside; and whose packet
    /// it is there.
    Inbound {
        shard: u8,
        client: Option<Ipv4Addr>,
    },
    /// A fragment completed this datagram, which now has to be routed itself.
    Reassembled(Vec<u8>),
    /// A fragment that waits for the others.
    Held,
}

pub(super) struct Decision {
    pub(super) exit: Exit,
    /// Where the packet goes, after translation.
    pub(super) destination: Ipv4Addr,
    pub(super) shape: Shape,
}

/// A packet that leaves to the internet, and on whose behalf its next hop is asked for.
struct Leaving {
    packet: Gather,
    shape: Shape,
    asker: Asker,
}

impl Gateway {
    pub(super) fn leave(
        &mut self,
        now: Timestamp,
        arena: &mut Arena,
        origin: Origin<'_>,
        decision: Decision,
        outbox: &mut Outbox,
    ) {
        let Decision { exit, destination, shape } = decision;
        let packet = origin.into_gather(shape, outbox);
        match exit {
            Exit::Peer { address, client } => {
                self.leave_to_peer(arena, packet, shape, address, client, outbox);
            }
            Exit::Host => {
                self.traffic.count(Direction::ToHost, shape);
                let header = VirtioNetHeader::for_shape(shape, 0);
                outbox.tun.push(DeviceFrame { packet, header, shape, destination_mac: [0; 6] });
            }
            Exit::External { client } => {
                let leaving = Leaving { packet, shape, asker: Some(client) };
                self.leave_to_external(now, arena, leaving, destination, outbox);
            }
            Exit::Inbound { shard, .. } if shard == self.shard => {
                let origin = Origin::Owned(outbox.to_vec(&packet, arena));
                self.route_from_external(now, arena, origin, shape.offload(), Entrance::Hairpin, outbox);
            }
            Exit::Inbound { shard, client } => {
                let bytes = outbox.to_vec(&packet, arena);
                let handoff = Handoff::Inbound { packet: bytes, offload: shape.offload(), client };
                outbox.handoffs.push((shard, handoff));
            }
            Exit::Reassembled(_) | Exit::Held => {}
        }
    }

    fn leave_to_peer(
        &mut self,
        arena: &Arena,
        packet: Gather,
        shape: Shape,
        address: Ipv4Addr,
        client: Ipv4Addr,
        outbox: &mut Outbox,
    ) {
        match self.homes.get(&address) {
            Some(&PeerHome::Here(peer)) if self.holds_own_datagram(arena, outbox, &packet, shape) => {
                // In a train of others', should it be one, it dies alone: whoever forges it must not take these with
                // it.
                for (packet, shape) in self.fragment(arena, outbox, &packet, shape, shape.segment_len()) {
                    if self.holds_own_datagram(arena, outbox, &packet, shape) {
                        self.drops.count(DropReason::OwnDatagram);
                    } else {
                        self.commit_to_peer(arena, packet, shape, peer, outbox);
                    }
                }
            }
            Some(&PeerHome::Here(peer)) => self.commit_to_peer(arena, packet, shape, peer, outbox),
            Some(&PeerHome::OnShard(shard)) => {
                let bytes = outbox.to_vec(&packet, arena);
                let handoff = Handoff::ToPeer { packet: bytes, offload: shape.offload(), client };
                outbox.handoffs.push((shard, handoff));
            }
            None => self.drops.count_segments(DropReason::NoSuchPeer, shape),
        }
    }

    /// Whether a datagram is in it that we have sealed ourselves ([`Tunnel::is_own`]). A router that forwards the
    /// gateway's port and sends back (NAT loopback) what is for its own outer address makes a client's endpoint of
    /// itself when that client sends one of its messages there, through the tunnel.
    fn holds_own_datagram(&self, arena: &Arena, outbox: &Outbox, packet: &Gather, shape: Shape) -> bool {
        if shape.transport() != Transport::Udp {
            return false;
        }
        let size = shape.gso().map_or(usize::MAX, |(_, size)| size);
        let head = packet.head.get(arena).get(shape.headers_len()..shape.head_len()).unwrap_or_default();
        // Of a gather list, each slice is a datagram of its own.
        let tails = packet.tails_of(&outbox.tails).iter().map(|&tail| arena.get(tail));
        let mut datagrams = std::iter::once(head).chain(tails).flat_map(|slice| slice.chunks(size));
        datagrams.any(|datagram| self.tunnel.is_own(datagram))
    }

    fn commit_to_peer(
        &mut self,
        arena: &Arena,
        packet: Gather,
        shape: Shape,
        peer: PeerId,
        outbox: &mut Outbox,
    ) {
        self.traffic.count(Direction::ToPeers, shape);
        if shape.segment_len() <= self.tunnel_mtu {
            outbox.peers.push(PeerFrame::new(peer, packet, shape));
            return;
        }
        for (packet, shape) in self.fragment(arena, outbox, &packet, shape, self.tunnel_mtu) {
            outbox.peers.push(PeerFrame::new(peer, packet, shape));
        }
    }

    fn leave_to_external(
        &mut self,
        now: Timestamp,
        arena: &Arena,
        leaving: Leaving,
        destination: Ipv4Addr,
        outbox: &mut Outbox,
    ) {
        let next_hop = match self.external.next_hop(destination) {
            Ok(NextHop(neighbor)) => neighbor,
            Err(reason) => return self.drops.count_segments(reason, leaving.shape),
        };
        self.traffic.count(Direction::ToExternal, leaving.shape);
        if leaving.shape.segment_len() <= self.external.mtu {
            return self.send_outbound(now, arena, leaving, next_hop, outbox);
        }
        let Leaving { packet, shape, asker } = leaving;
        for (packet, shape) in self.fragment(arena, outbox, &packet, shape, self.external.mtu) {
            self.send_outbound(now, arena, Leaving { packet, shape, asker }, next_hop, outbox);
        }
    }

    /// Addresses the packet to its next hop, or holds it until the hop's link address is known.
    fn send_outbound(
        &mut self,
        now: Timestamp,
        arena: &Arena,
        leaving: Leaving,
        next_hop: Ipv4Addr,
        outbox: &mut Outbox,
    ) {
        let Leaving { packet, shape, asker } = leaving;
        let header = VirtioNetHeader::for_shape(shape, LINK_HEADER_LEN);
        match self.neighbors.resolve(next_hop, asker, now) {
            Resolution::Known(destination_mac) => {
                outbox.external.push(DeviceFrame { packet, header, shape, destination_mac });
            }
            Resolution::Pending => {
                let packet = outbox.to_vec(&packet, arena);
                let bytes = packet.len();
                let held = HeldFrame { asker, packet, header, shape };
                if self.neighbors.hold(next_hop, asker, held, bytes).is_err() {
                    self.drops.count_segments(DropReason::NextHopUnresolved, shape);
                }
            }
            Resolution::Failed => {
                self.drops.count_segments(DropReason::NextHopUnresolved, shape);
            }
        }
    }

    /// Sends a packet that waited for its next hop's link address.
    pub(super) fn send_held(
        &mut self,
        now: Timestamp,
        neighbor: Ipv4Addr,
        held: HeldFrame,
        outbox: &mut Outbox,
    ) {
        let HeldFrame { packet, header, shape, .. } = held;
        match self.neighbors.resolve(neighbor, None, now) {
            Resolution::Known(destination_mac) => {
                let packet = Gather::whole(Bytes::Owned(packet));
                outbox.external.push(DeviceFrame { packet, header, shape, destination_mac });
            }
            Resolution::Pending | Resolution::Failed => {
                self.drops.count_segments(DropReason::NextHopUnresolved, shape);
            }
        }
    }

    /// Gives up a packet whose next hop does not answer, and tells the client that sent it (RFC 1812 §5.2.7.1): about
    /// the packet as it was before the NAT, which translates the error as it does one from outside.
    pub(super) fn give_up(&mut self, now: Timestamp, held: HeldFrame, outbox: &mut Outbox) {
        let HeldFrame { asker, mut packet, shape, .. } = held;
        self.drops.count_segments(DropReason::NextHopUnresolved, shape);
        let Some(client) = asker else { return };
        let Some(&PeerHome::Here(peer)) = self.homes.get(&client) else { return };
        let mut answer = Vec::new();
        let is_due = Ipv4Packet::parse(&mut packet, 0, shape.offload()).is_ok_and(|packet| {
            let kind = IcmpErrorKind::HostUnreachable;
            self.icmp_errors.build_for(client, kind, &packet, self.gateway_address, now, &mut answer)
        });
        if !is_due {
            return;
        }
        let translated = Ipv4Packet::parse(&mut answer, 0, Offload::NONE)
            .and_then(|mut error| self.nat.translate_inbound(&mut error, now));
        // Otherwise the session has ended meanwhile, or the protocol is not translated.
        if translated.is_ok() {
            self.answer_peer(peer, answer, outbox);
        }
    }

    /// Cuts a packet that may be fragmented, and is too big for `mtu`, into fragments, in order.
    fn fragment(
        &mut self,
        arena: &Arena,
        outbox: &Outbox,
        packet: &Gather,
        shape: Shape,
        mtu: usize,
    ) -> Vec<(Gather, Shape)> {
        let mut pieces = Vec::new();
        let mut segment = vec![0; shape.segment_len()];
        let mut fragment = vec![0; mtu];
        let mut segments = packet.segments(shape, &outbox.tails, arena);
        while let Some(len) = segments.next_into(&mut segment) {
            match Fragments::new(&segment[..len], mtu) {
                Ok(mut fragments) => {
                    while let Some(len) = fragments.next_into(&mut fragment) {
                        let mut bytes = fragment[..len].to_vec();
                        match Ipv4Packet::parse(&mut bytes, 0, Offload::NONE).map(|packet| packet.shape()) {
                            Ok(shape) => pieces.push((Gather::whole(Bytes::Owned(bytes)), shape)),
                            Err(reason) => self.drops.count(reason),
                        }
                    }
                }
                Err(reason) => self.drops.count(reason),
            }
        }
        pieces
    }

    pub(super) fn answer_peer(&mut self, peer: PeerId, mut answer: Vec<u8>, outbox: &mut Outbox) {
        match Ipv4Packet::parse(&mut answer, 0, Offload::NONE).map(|packet| packet.shape()) {
            Ok(shape) => {
                self.traffic.count(Direction::ToPeers, shape);
                let packet = Gather::whole(Bytes::Owned(answer));
                outbox.peers.push(PeerFrame::new(peer, packet, shape));
            }
            Err(reason) => self.drops.count(reason),
        }
    }

    pub(super) fn answer_external(
        &mut self,
        now: Timestamp,
        arena: &mut Arena,
        mut answer: Vec<u8>,
        outbox: &mut Outbox,
    ) {
        match Ipv4Packet::parse(&mut answer, 0, Offload::NONE).map(|view| (view.shape(), view.destination()))
        {
            // The packet had been hairpinned, and so is the answer.
            Ok((shape, destination)) if self.nat.is_external(destination) => {
                let origin = Origin::Owned(answer);
                self.route_from_external(now, arena, origin, shape.offload(), Entrance::Hairpin, outbox);
            }
            Ok((shape, destination)) => {
                let packet = Gather::whole(Bytes::Owned(answer));
                let leaving = Leaving { packet, shape, asker: None };
                self.leave_to_external(now, arena, leaving, destination, outbox);
            }
            Err(reason) => self.drops.count(reason),
        }
    }
}
