//! Entrances 3 and 4: the host's kernel, and the other shards.

use super::*;

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
        let decision = Ipv4Packet::parse(arena.get_mut(packet), 0, offload).and_then(|packet| {
            match self.router.route(packet.destination()) {
                Verdict::Peer(address) if self.places.contains_key(&address) => {
                    Ok(Decision { exit: Exit::Peer(address), destination: address, shape: packet.shape() })
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
            Err(reason) => self.drops.count(reason),
        }
    }

    /// Routes what another shard found to belong here.
    pub(super) fn route_crossing(
        &mut self,
        now: Timestamp,
        arena: &mut Arena,
        crossing: Crossing,
        outbox: &mut Outbox,
    ) {
        match crossing {
            Crossing::Initiation { from, mut datagram } => {
                if let Received::Drop(reason) =
                    self.tunnel.receive_forwarded(now, from, &mut datagram, &mut outbox.datagrams)
                {
                    self.drops.count(reason);
                }
            }
            Crossing::ToPeer { mut packet, offload } => match Ipv4Packet::parse(&mut packet, 0, offload) {
                Ok(view) => {
                    let decision = Decision {
                        exit: Exit::Peer(view.destination()),
                        destination: view.destination(),
                        shape: view.shape(),
                    };
                    self.leave(now, arena, Origin::Owned(packet), decision, outbox);
                }
                Err(reason) => self.drops.count(reason),
            },
            Crossing::Inbound { packet, offload } => {
                self.route_from_external(now, arena, Origin::Owned(packet), offload, outbox);
            }
        }
    }
}
