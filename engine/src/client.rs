//! The client, without I/O.
//!
//! Theory of operation. Two entrances, two exits: packets of the client's TUN device are sealed for the one peer, the
//! gateway ([`Core::receive_host`]); what the gateway sends is opened, gathered into superpackets and injected into
//! the TUN device ([`Core::receive_datagrams`], [`Core::flush_peers`]). Superpackets stay whole on both ways.

use std::net::Ipv4Addr;

use crate::arena::{Arena, Span};
use crate::clock::Timestamp;
use crate::core::Core;
use crate::drop_reason::{DropCounters, DropReason};
use crate::messages::{Command, EventKind, Events, PeerSnapshot, ShardStatus};
use crate::outbox::{Bytes, DeviceFrame, Gather, Outbox, PeerFrame};
use crate::path::Path;
use crate::prefix::Prefix;
use crate::traffic::{Direction, Traffic};
use crate::transport::ReceivedTrain;
use crate::tunnel::{PeerConfig, PeerId, Received, Tunnel, TunnelConfig};
use crate::wire::{CoalesceOptions, Coalescer, Ecn, Ipv4Packet, Offload, VirtioNetHeader};

/// Initiations in a row without an answer from which on each is told: the first of them is at least 15 s old then.
const UNANSWERED: u32 = 4;

/// What a client needs to know from the start.
pub struct ClientConfig {
    /// The client's WireGuard key, and the wall clock.
    pub tunnel: TunnelConfig,
    /// The gateway.
    pub gateway: PeerConfig,
    /// Inner sources that the gateway may use: the profile's `AllowedIPs`.
    pub allowed_ips: Vec<Prefix>,
    /// Which segments become superpackets.
    pub coalesce: CoalesceOptions,
    /// Where to tell that the gateway does not answer.
    pub events: Events,
}

/// The client's packet core.
pub struct Client {
    tunnel: Tunnel,
    gateway: PeerId,
    allowed_ips: Vec<Prefix>,
    coalescer: Coalescer<()>,
    drops: DropCounters,
    traffic: Traffic,
    events: Events,
    unanswered: u32,
}

impl Client {
    /// A client without a session; the first packet starts the handshake.
    pub fn new(config: ClientConfig, now: Timestamp) -> Self {
        let mut tunnel = Tunnel::new(config.tunnel);
        let gateway = tunnel.set_peer(&config.gateway, now);
        Self {
            tunnel,
            gateway,
            allowed_ips: config.allowed_ips,
            coalescer: Coalescer::new(config.coalesce),
            drops: DropCounters::default(),
            traffic: Traffic::default(),
            events: config.events,
            unanswered: 0,
        }
    }

    fn receive_datagram(
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
            Received::Packet { plaintext, .. } => {
                ecn.carry_over(&mut bytes[plaintext.clone()])?;
                let packet = datagram.skip(plaintext.start).take(plaintext.len());
                self.coalescer.push(arena, packet, ())
            }
            Received::Keepalive { .. } | Received::Handshake { .. } => Ok(()),
            Received::OtherShard(_) => Err(DropReason::UnknownPeer),
            Received::Drop(reason) => Err(reason),
        }
    }

    fn admits(&self, source: Ipv4Addr) -> bool {
        self.allowed_ips.iter().any(|prefix| prefix.contains(source))
    }
}

impl Core for Client {
    fn receive_datagrams(
        &mut self,
        now: Timestamp,
        arena: &mut Arena,
        train: ReceivedTrain,
        outbox: &mut Outbox,
    ) {
        for datagram in train.datagrams() {
            if self.coalescer.is_full() {
                self.flush_peers(now, arena, outbox);
            }
            if let Err(reason) = self.receive_datagram(now, arena, datagram, train.from, train.ecn, outbox) {
                self.drops.count(reason);
            }
        }
    }

    fn flush_peers(&mut self, _now: Timestamp, arena: &mut Arena, outbox: &mut Outbox) {
        let mut coalescer = std::mem::take(&mut self.coalescer);
        coalescer.drain(arena, |arena, gathered| {
            let parsed = Ipv4Packet::parse(arena.get_mut(gathered.head), gathered.tail_len, gathered.offload)
                .and_then(|packet| {
                    if self.admits(packet.source()) {
                        Ok(packet.shape())
                    } else {
                        Err(DropReason::WrongInnerSource)
                    }
                });
            match parsed {
                Ok(shape) => {
                    self.traffic.count(Direction::FromPeers, shape);
                    self.traffic.count(Direction::ToHost, shape);
                    let head = gathered.head.take(shape.total_len() - gathered.tail_len);
                    let packet =
                        Gather { head: Bytes::Arena(head), tails: outbox.push_tails(gathered.tails) };
                    let header = VirtioNetHeader::for_shape(shape, 0);
                    outbox.tun.push(DeviceFrame { packet, header, shape, destination_mac: [0; 6] });
                }
                Err(reason) => self.drops.count(reason),
            }
        });
        self.coalescer = coalescer;
    }

    fn receive_host(
        &mut self,
        _now: Timestamp,
        arena: &mut Arena,
        packet: Span,
        offload: Offload,
        outbox: &mut Outbox,
    ) {
        match Ipv4Packet::parse(arena.get_mut(packet), 0, offload).map(|packet| packet.shape()) {
            Ok(shape) => {
                self.traffic.count(Direction::FromHost, shape);
                self.traffic.count(Direction::ToPeers, shape);
                let packet = Gather::whole(Bytes::Arena(packet.take(shape.total_len())));
                outbox.peers.push(PeerFrame::new(self.gateway, packet, shape));
            }
            Err(reason) => self.drops.count(reason),
        }
    }

    fn poll(&mut self, now: Timestamp, outbox: &mut Outbox) {
        self.tunnel.poll(now, &mut outbox.datagrams);
        let before = std::mem::replace(&mut self.unanswered, self.tunnel.unanswered(self.gateway));
        if self.unanswered > before && self.unanswered >= UNANSWERED {
            let detail = format!("{} handshakes in a row", self.unanswered);
            self.events.push(EventKind::HandshakeUnanswered, detail);
        }
    }

    fn next_wakeup(&self) -> Option<Timestamp> {
        self.tunnel.next_wakeup()
    }

    fn sealing(&mut self) -> (&mut Tunnel, &mut DropCounters) {
        (&mut self.tunnel, &mut self.drops)
    }

    fn drops(&mut self) -> &mut DropCounters {
        &mut self.drops
    }

    fn status(&self, now: Timestamp) -> ShardStatus {
        let mut drops = self.drops.clone();
        drops.merge(self.tunnel.drops());
        let peers = self.tunnel.peers().map(|stats| PeerSnapshot::new(&stats, None, 0, now)).collect();
        ShardStatus { peers, drops, traffic: self.traffic, ..ShardStatus::default() }
    }

    fn carry_out(&mut self, now: Timestamp, command: Command, outbox: &mut Outbox) {
        match command {
            Command::SetEndpoint(endpoint) => self.tunnel.set_endpoint(self.gateway, endpoint, now),
            Command::StartHandshake => {
                self.tunnel.start_handshake(self.gateway, now, &mut outbox.datagrams);
            }
            // A gateway's, or the loop's own.
            Command::SetPeer { .. }
            | Command::RemovePeer { .. }
            | Command::SetExternal { .. }
            | Command::ExternalSockets(_)
            | Command::SetFilter(_)
            | Command::Reserver(_)
            | Command::SetNat { .. }
            | Command::SetAccess(_)
            | Command::PassProtocols(_)
            | Command::Ports(_)
            | Command::Publish { .. }
            | Command::Unpublish { .. }
            | Command::Status(_)
            | Command::Mappings { .. }
            | Command::Stop => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddrV4;
    use std::time::Duration;

    use super::*;
    use crate::tunnel::Cipher;
    use crate::wake::EventFd;

    const OLD: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 2), 51_820);
    const NEW: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 3), 51_820);

    /// A client whose gateway says nothing.
    struct Lonely {
        client: Client,
        events: Events,
        now: Timestamp,
    }

    impl Lonely {
        fn new() -> Self {
            let events = Events::new(EventFd::new().unwrap());
            let now = Timestamp::from_secs(1_000);
            let config = ClientConfig {
                tunnel: TunnelConfig {
                    private_key: [1; 32],
                    shard: 0,
                    shards: 1,
                    mtu: 1420,
                    unix_time_at_origin: Duration::from_secs(1_700_000_000),
                },
                gateway: PeerConfig {
                    public_key: [9; 32],
                    preshared_key: None,
                    endpoint: Some(OLD),
                    persistent_keepalive: None,
                    cipher: Cipher::default(),
                },
                allowed_ips: Vec::new(),
                coalesce: CoalesceOptions::default(),
                events: events.clone(),
            };
            Self { client: Client::new(config, now), events, now }
        }

        fn order(&mut self, command: Command) -> Vec<SocketAddrV4> {
            let mut outbox = Outbox::default();
            self.client.carry_out(self.now, command, &mut outbox);
            outbox.datagrams.datagrams.into_iter().map(|(to, _)| to.remote).collect()
        }

        /// Lets time pass until the client has something to do; where it sends to then.
        fn wait(&mut self) -> Vec<SocketAddrV4> {
            self.now = self.client.next_wakeup().unwrap();
            let mut outbox = Outbox::default();
            self.client.poll(self.now, &mut outbox);
            outbox.datagrams.datagrams.into_iter().map(|(to, _)| to.remote).collect()
        }
    }

    #[test]
    fn a_gateway_that_does_not_answer_for_a_while_is_told_and_may_be_elsewhere() {
        let mut world = Lonely::new();
        let began = world.now;
        assert_eq!(world.order(Command::StartHandshake), [OLD]);
        for _ in 2..UNANSWERED {
            assert_eq!(world.wait(), [OLD]);
            assert_eq!(world.events.take(), [], "a lost datagram or two are no reason to ask anew");
        }
        assert_eq!(world.wait(), [OLD]);
        assert!(world.now.since(began) >= Duration::from_secs(15));
        let told = world.events.take();
        assert_eq!(told.len(), 1);
        assert_eq!(told[0].kind, EventKind::HandshakeUnanswered);

        world.order(Command::SetEndpoint(NEW));
        assert_eq!(world.wait(), [NEW]);
        assert_eq!(world.events.take()[0].kind, EventKind::HandshakeUnanswered, "it is told each time");
    }
}
