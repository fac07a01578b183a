//! What the control plane asks of a shard: peers, publications, settings, and a snapshot of the counters.
//!
//! Everything here happens between two turns of the loop: peers come, change and go, and nobody else notices.

use std::net::Ipv4Addr;

use super::dns_rate::{DNS_BURST, DNS_RATE};
use super::{Gateway, LocalPeer, router};
use crate::clock::Timestamp;
use crate::drop_reason::DropReason;
use crate::external::next_hop::ExternalLink;
use crate::messages::{Command, PeerSnapshot, ShardStatus};
use crate::nat::{Endpoint, NatConfig, Proto, PublishError};
use crate::outbox::Outbox;
use crate::rate_limit::TokenBucket;
use crate::tunnel::{PeerConfig, PeerHome, PeerId};

/// A published port, as every shard knows it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Publication {
    /// The client that it leads to.
    pub(super) client: Ipv4Addr,
    /// Where that client lives.
    pub(super) shard: u8,
    /// Whether the port was this shard's to lend before.
    pub(super) was_ours: bool,
}

impl Gateway {
    /// Carries out a command.
    pub(super) fn apply_command(&mut self, now: Timestamp, command: Command, outbox: &mut Outbox) {
        match command {
            Command::SetPeer { config, address, shard, call } if shard == self.shard => {
                let peer = self.set_peer(config, address, now);
                if call && self.tunnel.peer(peer).is_some_and(|stats| stats.endpoint.is_some()) {
                    self.tunnel.start_handshake(peer, now, &mut outbox.datagrams);
                }
            }
            Command::SetPeer { config, address, shard, .. } => {
                self.tunnel.set_peer_elsewhere(config.public_key, shard);
                self.homes.insert(address, PeerHome::OnShard(shard));
            }
            Command::RemovePeer { public_key, address } => {
                self.remove_peer(&public_key, address, now, outbox);
            }
            Command::SetExternal { link, host_addresses, .. } => self.set_external(link, host_addresses, now),
            Command::SetNat { config, port_range } => self.set_nat(config, port_range, now),
            Command::SetAccess(access) => self.access = access,
            Command::PassProtocols(clients) => self.nat.pass_protocols(clients),
            Command::Ports(batch) => self.add_ports(&batch, now),
            Command::Publish { protocol, external, internal, shard, reply } => {
                let published = self.publish(protocol, external, internal, shard, now);
                // Whoever asked may have given up.
                reply.try_send(published).ok();
            }
            Command::Unpublish { protocol, external, returns_port } => {
                let published = self.published.remove(&(protocol, external));
                self.nat.unpublish(protocol, external, now);
                if returns_port && published.is_some_and(|publication| publication.was_ours) {
                    self.nat.return_port(protocol, external);
                }
            }
            Command::Mappings { query, limit, reply } => {
                reply.try_send(self.nat.find_mappings(query, now).take(limit).collect()).ok();
            }
            // The loop's own, or a client's.
            Command::Status(_)
            | Command::Stop
            | Command::ExternalSockets(_)
            | Command::SetFilter(_)
            | Command::Reserver(_)
            | Command::SetEndpoint(_)
            | Command::StartHandshake => {}
        }
    }

    /// Adds a peer of this shard, or changes its preshared key. (A changed address is a removal and an addition: the
    /// mappings of the former address must not speak for the new one.)
    fn set_peer(&mut self, mut config: PeerConfig, address: Ipv4Addr, now: Timestamp) -> PeerId {
        // It was remembered, perhaps from before the subnet became larger.
        config.endpoint = config.endpoint.filter(|&endpoint| self.check_outer_source(endpoint).is_ok());
        let peer = self.tunnel.set_peer(&config, now);
        let queries = TokenBucket::new(DNS_RATE, DNS_BURST);
        self.local_peers.insert(peer, LocalPeer { address, queries });
        self.homes.insert(address, PeerHome::Here(peer));
        peer
    }

    fn remove_peer(&mut self, public_key: &[u8; 32], address: Ipv4Addr, now: Timestamp, outbox: &mut Outbox) {
        if let Some(peer) = self.tunnel.remove_peer(public_key) {
            self.local_peers.remove(&peer);
            // Its number is free: what this turn has for it must not be sealed for the next who gets that.
            let drops = &mut self.drops;
            outbox.peers.retain(|frame| {
                let stays = frame.peer != peer;
                if !stays {
                    drops.count_segments(DropReason::NoSuchPeer, frame.shape);
                }
                stays
            });
        }
        self.nat.remove_client(address, now);
        self.published.retain(|_, publication| publication.client != address);
        self.homes.remove(&address);
    }

    /// Notes a published port. Every shard knows all of them; the NAT of the client's shard translates.
    fn publish(
        &mut self,
        protocol: Proto,
        external: Endpoint,
        internal: Endpoint,
        shard: u8,
        now: Timestamp,
    ) -> Result<(), PublishError> {
        let client = internal.address;
        if self.published.get(&(protocol, external)).is_some_and(|held| held.client != client) {
            return Err(PublishError::PortInUse);
        }
        let was_ours = self.nat.owns_port(protocol, external.address, external.port);
        if shard == self.shard {
            self.nat.publish(protocol, external, internal, now)?;
        } else {
            self.nat.cede_port(protocol, external)?;
        }
        if was_ours {
            self.supply.cede(protocol, external);
        }
        self.published.insert((protocol, external), Publication { client, shard, was_ours });
        Ok(())
    }

    fn set_external(&mut self, link: ExternalLink, host_addresses: Vec<Ipv4Addr>, now: Timestamp) {
        for held in self.neighbors.reset(link.clone()) {
            self.drops.count_segments(DropReason::NextHopUnresolved, held.shape);
        }
        self.nat.set_external(&link.addresses, now);
        self.published.retain(|(_, external), _| link.addresses.contains(&external.address));
        self.supply.set_addresses(&link.addresses);
        self.router = router(self.subnet, self.gateway_address, &link, host_addresses);
        self.external = link;
        self.update_expectations();
    }

    /// The NAT's settings changed.
    fn set_nat(&mut self, config: NatConfig, port_range: (u16, u16), now: Timestamp) {
        self.supply.set_range(port_range, config.kept_ports);
        self.nat.set_config(config, now);
        self.nat.set_port_range(port_range.0..=port_range.1);
        self.update_expectations();
    }

    pub(super) fn snapshot(&self, now: Timestamp) -> ShardStatus {
        let counts = self.nat.counts();
        let mut drops = self.drops.clone();
        drops.merge(self.tunnel.drops());
        let peers = self.tunnel.peers().map(|stats| {
            let address = self.local_peers.get(&stats.id).map(|peer| peer.address);
            let mappings = address.map_or(0, |address| self.nat.mappings_of(address));
            PeerSnapshot::new(&stats, address, mappings, now)
        });
        ShardStatus {
            peers: peers.collect(),
            mappings: [counts.tcp_mappings, counts.udp_mappings, counts.icmp_mappings],
            sessions: counts.sessions,
            resting_ports: counts.resting_ports,
            clients: counts.clients,
            drops,
            traffic: self.traffic,
            offloads: Vec::new(),
        }
    }
}
