//! Entrances 3 and 4: the host's kernel, and the other shards.

use super::*;

impl Gateway {
    /// Takes one packet that the host's kernel routed into the VPN subnet.
    pub fn receive_host(
        &mut self,
        now: Timestamp,
        arena: &mut Arena,
        packet: Span,
        offload: Offload,
        outbox: &mut Outbox,
    ) {
        let decision = Ipv4Packet::parse(arena.get_mut(packet), 0, offload).and_then(|packet| {
            match self.router.route(packet.destination()) {
                Verdict::Peer(address) if self.places.contains_key(&address) => Ok(Decision {
                    exit: Exit::Peer(address),
                    destination: address,
                    shape: packet.shape(),
                }),
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

    /// Takes what another shard found to belong here.
    pub fn receive_crossing(
        &mut self,
        now: Timestamp,
        arena: &mut Arena,
        crossing: Crossing,
        outbox: &mut Outbox,
    ) {
        match crossing {
            Crossing::Initiation { from, mut datagram } => {
                if let Received::Drop(reason) =
                    self.tunnel.receive(now, from, &mut datagram, &mut outbox.datagrams)
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
