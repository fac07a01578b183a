//! The gateway's administration: who lives where, which ports are whose, what the counters say.
//!
//! Everything here happens between two turns of the loop: peers come, change and go, and nobody else notices.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::*;
use crate::external::reservation::{Batch, PortProtocol, first_ports};
use crate::messages::PeerSnapshot;
use crate::nat::{PortClass, PortDemand, PortOutlook, PublishError};

/// TCP ports of the first batch at most: a burst of that many connections finds its ports made, instead of having them made
/// in its midst. And of any batch: reserving one takes some 6 us of the reserver's time.
const LARGEST_BATCH: usize = 2_048;
/// UDP ports of the first batch at most (a resolver's or QUIC client's flows are few beside the TCP connections of a page);
/// and as many TCP ports, however small the range is.
const FIRST_BATCH: usize = 256;
/// Ports below 1024 that all shards together begin with, at most: few clients use such source ports (NTP, IKE), and the host's
/// own programs have use for them.
const PRIVILEGED_BATCH: usize = 16;
/// A shard begins with that many at least.
const SMALLEST_PRIVILEGED_BATCH: usize = 2;
/// This part of what there is for others is for them.
const PRIVILEGED_PART: usize = 4;
/// How long the reserver is left in peace after it had fewer ports than were wanted.
const SHORTAGE_LASTS: Duration = Duration::from_secs(10);

/// A published port, as every shard knows it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Publication {
    /// The client that it leads to.
    pub(super) client: Ipv4Addr,
    /// Where that client lives.
    pub(super) shard: u8,
    /// Whether the port was this shard's to lend before.
    was_ours: bool,
}

/// How the pools of external ports are refilled: what was asked for and has not come yet, and how much to ask for.
pub(super) struct PortSupply {
    range: (u16, u16),
    /// How many ports all shards together may reserve.
    budget: usize,
    asked: Vec<(Proto, Ipv4Addr, PortClass)>,
    /// Pools for which there were fewer ports than were asked for the last time. They stay in `asked` until then; `None`:
    /// that is over, and whoever finds too few ports asks again.
    short: Vec<((Proto, Ipv4Addr, PortClass), Option<Timestamp>)>,
    granted: HashMap<(Proto, Ipv4Addr), usize>,
    /// Whether the first ports of every pool were asked for: before the first packet, which should not have to wait.
    begun: bool,
}

impl PortSupply {
    pub(super) fn new(range: (u16, u16), budget: usize) -> Self {
        Self {
            range,
            budget,
            asked: Vec::new(),
            short: Vec::new(),
            granted: HashMap::default(),
            begun: false,
        }
    }

    /// When [`Self::expire`] has something to do: as long as a shortage lasts, clients are told that there are no ports.
    pub(super) fn next_expiry(&self) -> Option<Timestamp> {
        self.short.iter().filter_map(|&(_, until)| until).min()
    }

    /// Ends the shortages that have lasted long enough: the next packet that finds too few ports asks. That there are
    /// more only the answer can tell.
    pub(super) fn expire(&mut self, now: Timestamp) {
        for (pool, until) in &mut self.short {
            if until.is_some_and(|until| now >= until) {
                *until = None;
                self.asked.retain(|waiting| waiting != pool);
            }
        }
    }

    /// Whether there are more ports of the protocol and address. Unless there are none, a pool that is empty has asked for some (or
    /// does so at the end of this turn), and they may come any moment.
    fn outlook(&self, protocol: Proto, address: Ipv4Addr) -> PortOutlook {
        let pool = (protocol, address, PortClass::Unprivileged);
        let shortage = self.short.iter().find(|(short, _)| *short == pool);
        shortage
            .map(|(_, until)| if until.is_some() { PortOutlook::None } else { PortOutlook::Unsure })
            .unwrap_or(PortOutlook::More)
    }

    /// Forgets the addresses that are gone; those that are new are to be supplied.
    fn set_addresses(&mut self, addresses: &[Ipv4Addr]) {
        self.asked.retain(|(_, address, _)| addresses.contains(address));
        self.short.retain(|((_, address, _), _)| addresses.contains(address));
        self.granted.retain(|(_, address), _| addresses.contains(address));
        self.begun = false;
    }

    /// Ports are drawn from another range from now on: where there were none left, there may be some.
    fn set_range(&mut self, range: (u16, u16)) {
        if range != std::mem::replace(&mut self.range, range) {
            for (pool, _) in self.short.drain(..) {
                self.asked.retain(|&asked| asked != pool);
            }
        }
    }

    fn ports(&self, class: PortClass) -> RangeInclusive<u16> {
        match class {
            PortClass::Privileged => 512..=1023,
            PortClass::Unprivileged => self.range.0..=self.range.1,
        }
    }

    /// How many ports to ask for: as many as there are, so that growth keeps pace with the need.
    /// `pools`: how many addresses of how many shards share what there is.
    fn batch(&self, protocol: Proto, address: Ipv4Addr, class: PortClass, pools: usize) -> usize {
        match (class, protocol) {
            (PortClass::Privileged, _) => {
                let most = (PRIVILEGED_BATCH / pools.max(1)).max(SMALLEST_PRIVILEGED_BATCH);
                first_ports(self.budget / PRIVILEGED_PART, pools, most)
            }
            (PortClass::Unprivileged, Proto::Tcp) => {
                // Of a small range, most are left to the host's own programs until somebody needs them.
                let of_range = first_ports(self.ports(class).count(), pools, LARGEST_BATCH);
                let most = of_range.max(FIRST_BATCH);
                self.grown(protocol, address, first_ports(self.budget, pools, most))
            }
            (PortClass::Unprivileged, _) => {
                self.grown(protocol, address, first_ports(self.budget, pools, FIRST_BATCH))
            }
        }
    }

    fn grown(&self, protocol: Proto, address: Ipv4Addr, first: usize) -> usize {
        self.granted.get(&(protocol, address)).map_or(first, |&granted| granted.clamp(first, LARGEST_BATCH))
    }
}

/// ICMP identifiers are not reserved.
const fn reserved_as(protocol: Proto) -> Option<PortProtocol> {
    match protocol {
        Proto::Tcp => Some(PortProtocol::Tcp),
        Proto::Udp => Some(PortProtocol::Udp),
        Proto::Icmp => None,
    }
}

const fn nat_protocol(protocol: PortProtocol) -> Proto {
    match protocol {
        PortProtocol::Tcp => Proto::Tcp,
        PortProtocol::Udp => Proto::Udp,
    }
}

impl Gateway {
    /// Carries out a command.
    pub(super) fn obey(&mut self, now: Timestamp, command: Command, outbox: &mut Outbox) {
        match command {
            Command::SetPeer { config, address, shard } if shard == self.shard => {
                self.set_peer(&config, address, now);
            }
            Command::SetPeer { config, address, shard } => {
                self.tunnel.set_peer_elsewhere(config.public_key, shard);
                self.places.insert(address, Place::OnShard(shard));
            }
            Command::RemovePeer { public_key, address } => {
                self.remove_peer(&public_key, address, now, outbox);
            }
            Command::SetExternal { link, host_addresses, .. } => self.set_external(link, host_addresses, now),
            Command::SetNat { config, port_range } => self.set_nat(config, port_range, now),
            Command::PassProtocols(clients) => self.nat.pass_protocols(clients),
            Command::Ports(batch) => self.add_ports(&batch, now),
            Command::Publish { protocol, external, internal, shard, reply } => {
                let published = self.publish(protocol, external, internal, shard, now);
                // Whoever asked may have given up.
                reply.try_send(published).ok();
            }
            Command::Unpublish { protocol, external, gives_back } => {
                let published = self.published.remove(&(protocol, external));
                self.nat.unpublish(protocol, external, now);
                if gives_back && published.is_some_and(|publication| publication.was_ours) {
                    self.nat.return_port(protocol, external);
                }
            }
            Command::Mappings { address, limit, reply } => {
                let mappings = self
                    .nat
                    .mappings(now)
                    .filter(|mapping| address.is_none_or(|address| mapping.internal.address == address))
                    .take(limit)
                    .collect();
                reply.try_send(mappings).ok();
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
    fn set_peer(&mut self, config: &PeerConfig, address: Ipv4Addr, now: Timestamp) {
        let peer = self.tunnel.set_peer(config, now);
        self.addresses.insert(peer, address);
        self.places.insert(address, Place::Here(peer));
    }

    fn remove_peer(&mut self, public_key: &[u8; 32], address: Ipv4Addr, now: Timestamp, outbox: &mut Outbox) {
        if let Some(peer) = self.tunnel.remove_peer(public_key) {
            self.addresses.remove(&peer);
            // Its number is free: what this turn has for it must not be sealed for the next who gets that.
            let before = outbox.peers.len();
            outbox.peers.retain(|frame| frame.peer != peer);
            self.drops.add(DropReason::NoSuchPeer, (before - outbox.peers.len()) as u64);
        }
        self.nat.remove_client(address, now);
        self.published.retain(|_, publication| publication.client != address);
        self.places.remove(&address);
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
        self.published.insert((protocol, external), Publication { client, shard, was_ours });
        Ok(())
    }

    fn set_external(&mut self, link: ExternalLink, host_addresses: Vec<Ipv4Addr>, now: Timestamp) {
        let held = self.neighbors.reset(link.clone());
        self.drops.add(DropReason::NextHopUnresolved, held.len() as u64);
        self.nat.set_external(&link.addresses, now);
        self.published.retain(|(_, external), _| link.addresses.contains(&external.address));
        self.supply.set_addresses(&link.addresses);
        self.router = router(self.subnet, self.gateway_address, &link, host_addresses);
        self.external = link;
        self.update_expectations();
    }

    /// Tells the NAT what there is to hope for.
    pub(super) fn update_expectations(&mut self) {
        for &address in &self.external.addresses {
            for protocol in [Proto::Tcp, Proto::Udp] {
                self.nat.expect_ports(protocol, address, self.supply.outlook(protocol, address));
            }
        }
    }

    fn add_ports(&mut self, batch: &Batch, now: Timestamp) {
        let protocol = nat_protocol(batch.request.protocol);
        let address = batch.request.address;
        if !self.nat.is_external(address) {
            return; // it went while its ports were being reserved
        }
        let class = PortClass::of(*batch.request.ports.end());
        let pool = (protocol, address, class);
        self.supply.short.retain(|&(short, _)| short != pool);
        if batch.shortage.is_some() {
            self.supply.short.push((pool, Some(now + SHORTAGE_LASTS)));
        } else {
            self.supply.asked.retain(|&asked| asked != pool);
        }
        // One may have been published while the batch was on its way.
        let published = |port| self.published.contains_key(&(protocol, Endpoint::new(address, port)));
        let ports: Vec<u16> = batch.ports.iter().copied().filter(|&port| !published(port)).collect();
        let added = self.nat.add_ports(protocol, address, &ports);
        if class == PortClass::Unprivileged {
            *self.supply.granted.entry((protocol, address)).or_default() += added;
        }
        self.update_expectations();
    }

    /// What the reserver should be asked for: the first ports of every pool, and more for those that run low. And what it
    /// gets back.
    pub(super) fn port_requests(&mut self) -> Vec<ReserveRequest> {
        let mut requests = self.port_returns();
        if !self.supply.begun {
            self.supply.begun = true;
            for address in self.external.addresses.clone() {
                if self.supply.granted.keys().any(|&(_, supplied)| supplied == address) {
                    continue; // known from before
                }
                for protocol in [Proto::Tcp, Proto::Udp] {
                    for class in [PortClass::Unprivileged, PortClass::Privileged] {
                        requests.extend(self.port_request(protocol, address, class, false));
                    }
                }
            }
        }
        while let Some(demand) = self.nat.next_port_demand() {
            let PortDemand { protocol, address, class, in_advance, .. } = demand;
            requests.extend(self.port_request(protocol, address, class, in_advance));
        }
        requests
    }

    /// The request for one pool, unless ports for it are on their way already. ICMP identifiers are not reserved.
    fn port_request(
        &mut self,
        protocol: Proto,
        address: Ipv4Addr,
        class: PortClass,
        in_advance: bool,
    ) -> Option<ReserveRequest> {
        let reserved = reserved_as(protocol)?;
        if self.supply.asked.contains(&(protocol, address, class)) {
            return None;
        }
        self.supply.asked.push((protocol, address, class));
        let pools = usize::from(self.shards) * self.external.addresses.len();
        Some(ReserveRequest {
            protocol: reserved,
            address,
            shard: self.shard,
            shards: self.shards,
            ports: self.supply.ports(class),
            count: self.supply.batch(protocol, address, class, pools),
            in_advance,
            returned: Vec::new(),
        })
    }

    /// Gives the reserver what the NAT may lend no longer.
    fn port_returns(&mut self) -> Vec<ReserveRequest> {
        let mut requests: Vec<ReserveRequest> = Vec::new();
        for (protocol, Endpoint { address, port }) in self.nat.take_returned_ports() {
            let Some(protocol) = reserved_as(protocol) else { continue }; // identifiers have no range
            let external = Endpoint::new(address, port);
            if let Some(publication) = self.published.get_mut(&(nat_protocol(protocol), external)) {
                publication.was_ours = true; // published while it was on its way: to be returned if that comes to nothing
                continue;
            }
            let same = |request: &ReserveRequest| (request.protocol, request.address) == (protocol, address);
            let at = requests.iter().position(same).unwrap_or(requests.len());
            if at == requests.len() {
                requests.push(ReserveRequest {
                    protocol,
                    address,
                    shard: self.shard,
                    shards: self.shards,
                    ports: self.supply.ports(PortClass::Unprivileged),
                    count: 0,
                    in_advance: false,
                    returned: Vec::new(),
                });
            }
            requests[at].returned.push(port);
        }
        for ReserveRequest { protocol, address, returned, .. } in &requests {
            if let Some(granted) = self.supply.granted.get_mut(&(nat_protocol(*protocol), *address)) {
                *granted = granted.saturating_sub(returned.len());
            }
        }
        requests
    }

    /// The NAT's settings changed.
    fn set_nat(&mut self, config: NatConfig, port_range: (u16, u16), now: Timestamp) {
        self.nat.set_config(config, now);
        self.nat.set_port_range(port_range.0..=port_range.1);
        self.supply.set_range(port_range);
        self.update_expectations();
    }

    pub(super) fn describe(&self, now: Timestamp) -> ShardStatus {
        let counts = self.nat.counts();
        let mut drops = self.drops.clone();
        drops.merge(self.tunnel.drops());
        let peers = self.tunnel.peers().map(|stats| {
            let address = self.addresses.get(&stats.id).copied();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shortage_asks_to_be_ended() {
        let mut supply = PortSupply::new((1_024, 65_535), 100);
        assert_eq!(supply.next_expiry(), None);
        let until = Timestamp::from_secs(10);
        let pool = (Proto::Tcp, Ipv4Addr::LOCALHOST, PortClass::Unprivileged);
        supply.asked.push(pool);
        supply.short.push((pool, Some(until)));
        let outlook = |supply: &PortSupply, protocol| supply.outlook(protocol, Ipv4Addr::LOCALHOST);
        assert_eq!((supply.next_expiry(), outlook(&supply, Proto::Tcp)), (Some(until), PortOutlook::None));
        supply.expire(until);
        assert!(supply.next_expiry().is_none() && supply.asked.is_empty());
        assert_eq!(outlook(&supply, Proto::Tcp), PortOutlook::Unsure, "until there is an answer");
        assert_eq!(outlook(&supply, Proto::Udp), PortOutlook::More);
        let another = Ipv4Addr::new(203, 0, 113, 2);
        assert_eq!(supply.outlook(Proto::Tcp, another), PortOutlook::More, "of another address");
    }

    #[test]
    fn all_shards_together_take_few_of_the_hosts_privileged_ports() {
        let supply = PortSupply::new((1024, u16::MAX), 60_000);
        let batch =
            |pools| supply.batch(Proto::Udp, Ipv4Addr::new(203, 0, 113, 1), PortClass::Privileged, pools);
        assert_eq!([0, 1, 4, 16].map(batch), [16, 16, 4, 2]);
    }
}
