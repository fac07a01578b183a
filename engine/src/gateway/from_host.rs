//! Entrance 3: packets from the host's kernel.

use super::Gateway;
use super::leave::{Decision, Exit, Origin};
use crate::arena::{Arena, Span};
use crate::clock::Timestamp;
use crate::drop_reason::DropReason;
use crate::outbox::Outbox;
use crate::router::Verdict;
use crate::traffic::Direction;
use crate::wire::{Ipv4Packet, Offload};

impl Gateway {
    /// Routes one packet that the host's kernel sent into the VPN subnet.
    pub(super) fn route_from_host(
        &mut self,
        now: Timestamp,
        arena: &mut Arena,
        packet: Span,
        offload: Offload,
        outbox: &mut Outbox,
    ) {
        let mut shape = None;
        let decision = Ipv4Packet::parse(arena.get_mut(packet), 0, offload).and_then(|packet| {
            shape = Some(packet.shape());
            // With `ip_forward`, the kernel also brings what its neighbours send to clients, past the NAT.
            if !self.router.is_the_hosts(packet.source()) {
                return Err(DropReason::BogonSource);
            }
            match self.router.route(packet.destination()) {
                // The kernel heeds the MTU of the TUN device. Should it not, there is nobody to tell.
                Verdict::Peer(_)
                    if packet.dont_fragment() && packet.shape().segment_len() > self.tunnel_mtu =>
                {
                    Err(DropReason::TooBig)
                }
                Verdict::Peer(address) if self.homes.contains_key(&address) => {
                    let exit = Exit::Peer { address, client: address };
                    Ok(Decision { exit, destination: address, shape: packet.shape() })
                }
                Verdict::Peer(_) => Err(DropReason::NoSuchPeer),
                Verdict::Host | Verdict::External => Err(DropReason::BogonDestination),
                Verdict::Drop(reason) => Err(reason),
            }
        });
        match decision {
            Ok(decision) => {
                self.traffic.count(Direction::FromHost, decision.shape);
                self.leave(now, arena, Origin::Arena { head: packet, tails: &[] }, decision, outbox);
            }
            Err(reason) => self.drops.count_segments(reason, shape),
        }
    }
}
