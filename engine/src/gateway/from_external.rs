//! Entrance 2: IPv4 packets from the external interface.

use std::net::Ipv4Addr;

use super::Gateway;
use super::leave::{Decision, Exit, Origin};
use super::refusal::Refusal;
use crate::arena::Arena;
use crate::clock::Timestamp;
use crate::drop_reason::DropReason;
use crate::icmp_error::MAX_QUOTE_LEN;
use crate::nat::Endpoint;
use crate::outbox::Outbox;
use crate::router::is_bogon;
use crate::traffic::Direction;
use crate::wire::{Ipv4Packet, Offload};
use crate::{mss, source_route};

/// How a packet came to be judged as one from outside.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Entrance {
    /// From the external interface.
    Interface,
    /// From inside, to one of our external addresses (RFC 4787 REQ-9).
    Hairpin,
    /// From another shard, which took it to be this one's. It is not sent on once more: while two shards disagree (one
    /// has carried out a command, the other has not), it would go to and fro for ever.
    Shard,
}

impl Gateway {
    /// Routes one packet from outside, or one that was hairpinned.
    pub(super) fn route_from_external(
        &mut self,
        now: Timestamp,
        arena: &mut Arena,
        mut origin: Origin<'_>,
        offload: Offload,
        entrance: Entrance,
        outbox: &mut Outbox,
    ) {
        let mut shape = None;
        let decision = Ipv4Packet::parse(origin.head_mut(arena), 0, offload).map_err(Refusal::from).and_then(
            |mut packet| {
                shape = Some(packet.shape());
                self.decide_from_external(now, &mut packet, entrance)
            },
        );
        match decision {
            Ok(Decision { exit: Exit::Reassembled(datagram), .. }) => {
                let origin = Origin::Owned(datagram);
                self.route_from_external(now, arena, origin, Offload::NONE, entrance, outbox);
            }
            Ok(decision) => {
                if !matches!(decision.exit, Exit::Inbound { .. } | Exit::Held) {
                    self.traffic.count(Direction::FromExternal, decision.shape);
                }
                self.leave(now, arena, origin, decision, outbox);
            }
            Err(refusal) => {
                self.drops.count_segments(refusal.reason, shape);
                if let Some(answer) = refusal.answer {
                    self.answer_external(now, arena, answer, outbox);
                }
            }
        }
    }

    fn decide_from_external(
        &mut self,
        now: Timestamp,
        packet: &mut Ipv4Packet<'_>,
        entrance: Entrance,
    ) -> Result<Decision, Refusal> {
        let destination = packet.destination();
        let source = packet.source();
        let is_ours = entrance == Entrance::Interface && self.nat.is_external(source);
        if self.router.is_inner(source) || is_bogon(source) || is_ours {
            return Err(DropReason::BogonSource.into());
        }
        source_route::refuse(packet)?;
        if packet.is_fragment() {
            let exit = match self.fragments_from_outside.push(packet, now)? {
                Some(datagram) => Exit::Reassembled(datagram),
                None => Exit::Held,
            };
            return Ok(Decision { exit, destination, shape: packet.shape() });
        }
        let (shard, client) = self.owner_of_inbound(packet);
        if shard != self.shard {
            if entrance == Entrance::Shard {
                return Err(DropReason::NoMapping.into());
            }
            let exit = Exit::Inbound { shard, client };
            return Ok(Decision { exit, destination, shape: packet.shape() });
        }
        // Should the packet be too big or too old, its sender is told about the packet that it knows, not about the
        // translated one; and only if there is a mapping, so that a scanner learns nothing.
        let expired = packet.ttl() <= 1;
        let too_big = packet.shape().segment_len() > self.tunnel_mtu && packet.dont_fragment();
        let before =
            (expired || too_big).then(|| packet.head()[..packet.head().len().min(MAX_QUOTE_LEN)].to_vec());
        self.nat.translate_inbound(packet, now)?;
        if let Some(before) = before {
            let reason = if expired { DropReason::TtlExceeded } else { DropReason::TooBig };
            return Err(self.refuse_from_outside(now, before, packet.shape(), reason));
        }
        packet.decrement_ttl()?;
        mss::clamp(packet, self.tunnel_mtu.min(self.external.mtu));
        let inner = packet.destination();
        if !self.homes.contains_key(&inner) {
            return Err(DropReason::NoSuchPeer.into());
        }
        // Not the sender's, who may be a stranger: a protocol that is passed comes from whomever it likes.
        let exit = Exit::Peer { address: inner, client: inner };
        Ok(Decision { exit, destination: inner, shape: packet.shape() })
    }

    /// Which shard's NAT a packet from outside belongs to, by the port of ours that it names, or that its quotation
    /// names; and which client's it is, if that port is published.
    pub(super) fn owner_of_inbound(&self, packet: &Ipv4Packet<'_>) -> (u8, Option<Ipv4Addr>) {
        // Nobody's: it is dropped, with a reason, wherever it is.
        let Some((protocol, port)) = crate::nat::external_port(packet) else { return (self.shard, None) };
        match self.published.get(&(protocol, Endpoint::new(packet.destination(), port))) {
            Some(publication) => (publication.shard, Some(publication.client)),
            None => ((port % u16::from(self.shards.max(1))) as u8, None),
        }
    }
}
