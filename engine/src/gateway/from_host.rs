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
                Verdict::Peer(address) if self.places.contains_key(&address) => {
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

    /// Routes what another shard found to belong here.
    pub(super) fn route_handoff(
        &mut self,
        now: Timestamp,
        arena: &mut Arena,
        handoff: Handoff,
        outbox: &mut Outbox,
    ) {
        match handoff {
            Handoff::Initiation { from, mut datagram } | Handoff::Misdirected { from, mut datagram } => {
                match self.tunnel.receive_forwarded(now, from, &mut datagram, &mut outbox.datagrams) {
                    Received::Packet { peer, plaintext } => {
                        let packet = datagram.get(plaintext).unwrap_or_default().to_vec();
                        self.route_misdirected(now, arena, packet, peer, outbox);
                    }
                    Received::Drop(reason) => self.refuse_datagram(now, reason, from.remote),
                    Received::Handshake { .. } | Received::Keepalive { .. } | Received::OtherShard(_) => {}
                }
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

    /// A packet for a peer is delivered here or not at all: see [`Entrance::Shard`].
    fn decide_from_shard(&self, packet: &Ipv4Packet<'_>, client: Ipv4Addr) -> Result<Decision, DropReason> {
        let destination = packet.destination();
        match self.places.get(&destination) {
            Some(Home::Here(_)) => {
                let exit = Exit::Peer { address: destination, client };
                Ok(Decision { exit, destination, shape: packet.shape() })
            }
            Some(Home::OnShard(_)) | None => Err(DropReason::NoSuchPeer),
        }
    }
}
