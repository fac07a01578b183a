//! Entrance 4: packets of other shards.

use std::net::Ipv4Addr;

use super::Gateway;
use super::from_external::Entrance;
use super::leave::{Decision, Exit, Origin};
use crate::arena::Arena;
use crate::clock::Timestamp;
use crate::drop_reason::DropReason;
use crate::handoffs::Handoff;
use crate::outbox::Outbox;
use crate::path::Path;
use crate::tunnel::{PeerHome, PeerId, Received};
use crate::wire::{Ecn, Ipv4Packet};

impl Gateway {
    /// Routes what another shard found to belong here.
    pub(super) fn route_handoff(
        &mut self,
        now: Timestamp,
        arena: &mut Arena,
        handoff: Handoff,
        outbox: &mut Outbox,
    ) {
        match handoff {
            Handoff::Initiation { from, datagram } => {
                self.receive_forwarded(now, arena, from, Ecn::NotEct, datagram, outbox);
            }
            Handoff::Misdirected { from, ecn, datagram } => {
                self.receive_forwarded(now, arena, from, ecn, datagram, outbox);
            }
            Handoff::ToPeer { mut packet, offload, client } => {
                let mut shape = None;
                let decision = Ipv4Packet::parse(&mut packet, 0, offload).and_then(|packet| {
                    shape = Some(packet.shape());
                    self.decide_from_shard(&packet, client)
                });
                match decision {
                    Ok(decision) => self.leave(now, arena, Origin::Owned(packet), decision, outbox),
                    Err(reason) => self.drops.count_segments(reason, shape),
                }
            }
            Handoff::Inbound { packet, offload, .. } => {
                let origin = Origin::Owned(packet);
                self.route_from_external(now, arena, origin, offload, Entrance::Shard, outbox);
            }
        }
    }

    fn receive_forwarded(
        &mut self,
        now: Timestamp,
        arena: &mut Arena,
        from: Path,
        ecn: Ecn,
        mut datagram: Vec<u8>,
        outbox: &mut Outbox,
    ) {
        match self.tunnel.receive_forwarded(now, from, &mut datagram, &mut outbox.datagrams) {
            Received::Packet { peer, plaintext } => {
                let packet = datagram.get(plaintext).unwrap_or_default().to_vec();
                self.route_misdirected(now, arena, packet, ecn, peer, outbox);
            }
            Received::Drop(reason) => self.refuse_datagram(now, reason, from.remote),
            Received::Handshake { .. } | Received::Keepalive { .. } | Received::OtherShard(_) => {}
        }
    }

    /// Routes a packet that another shard received for a peer of ours, at once and on its own.
    fn route_misdirected(
        &mut self,
        now: Timestamp,
        arena: &mut Arena,
        mut packet: Vec<u8>,
        ecn: Ecn,
        peer: PeerId,
        outbox: &mut Outbox,
    ) {
        match self.check_inner_source(peer, &packet).and_then(|()| ecn.carry_over(&mut packet)) {
            Ok(()) => self.route_unverified(now, arena, packet, peer, outbox),
            Err(reason) => self.drops.count(reason),
        }
    }

    /// A packet for a peer is delivered here or not at all: see [`Entrance::Shard`].
    fn decide_from_shard(&self, packet: &Ipv4Packet<'_>, client: Ipv4Addr) -> Result<Decision, DropReason> {
        let destination = packet.destination();
        match self.homes.get(&destination) {
            Some(PeerHome::Here(_)) => {
                let exit = Exit::Peer { address: destination, client };
                Ok(Decision { exit, destination, shape: packet.shape() })
            }
            Some(PeerHome::OnShard(_)) | None => Err(DropReason::NoSuchPeer),
        }
    }
}
