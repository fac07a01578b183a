//! Fragments whose datagrams were never completed, and who is told so (RFC 792, RFC 1122 §3.3.2).

use std::net::Ipv4Addr;

use super::Gateway;
use crate::arena::Arena;
use crate::clock::Timestamp;
use crate::drop_reason::DropReason;
use crate::icmp_error::{IcmpErrorKind, IcmpErrors};
use crate::outbox::Outbox;
use crate::tunnel::PeerHome;
use crate::wire::{Ipv4Packet, Offload};

impl Gateway {
    /// Gives up the datagrams whose fragments took too long, and tells their senders (*reassembly time exceeded*) where
    /// their first fragment came: peers always, strangers only if the datagram was for a mapping that admits them, so
    /// that nobody learns by asking which ports are mapped. (The mapping must be this shard's; on another shard's
    /// behalf there is silence.)
    pub(super) fn expire_fragments(&mut self, now: Timestamp, outbox: &mut Outbox) {
        let (mut to_peers, mut to_strangers) = (Vec::new(), Vec::new());
        let answer = |errors: &mut IcmpErrors, first: &Ipv4Packet<'_>, source: Ipv4Addr| {
            let mut answer = Vec::new();
            let kind = IcmpErrorKind::ReassemblyTimeExceeded;
            errors.build(kind, first, source, now, &mut answer).then_some(answer)
        };

        let (errors, gateway) = (&mut self.icmp_errors, self.gateway_address);
        let expired = self.fragments_from_peers.expire_with(now, |first| {
            if let Ok(first) = Ipv4Packet::parse(first, 0, Offload::NONE) {
                to_peers.extend(answer(errors, &first, gateway).map(|answer| (first.source(), answer)));
            }
        });
        self.drops.add(DropReason::FragmentTimeout, expired);
        let (errors, nat) = (&mut self.outside_errors, &self.nat);
        let expired = self.fragments_from_outside.expire_with(now, |first| {
            if let Ok(first) = Ipv4Packet::parse(first, 0, Offload::NONE) {
                if nat.awaits_fragment(&first) {
                    to_strangers.extend(answer(errors, &first, first.destination()));
                }
            }
        });
        self.drops.add(DropReason::FragmentTimeout, expired);
        for reassembly in [&mut self.fragments_from_peers, &mut self.fragments_from_outside] {
            self.drops.merge(&reassembly.take_discarded());
        }

        for (address, answer) in to_peers {
            // The peer may have gone since.
            if let Some(&PeerHome::Here(peer)) = self.homes.get(&address) {
                self.answer_peer(peer, answer, outbox);
            }
        }
        for answer in to_strangers {
            // It owns its bytes: no arena is looked at.
            self.answer_external(now, &mut Arena::new(0), answer, outbox);
        }
    }
}
