//! For the shell and the operator: ports, settings, published ports, lists and counts.

use std::net::Ipv4Addr;
use std::ops::RangeInclusive;

use super::Nat;
use super::clients::Client;
use super::config::{
    Endpoint, MappingQuery, MappingState, MappingView, NatConfig, NatCounts, PortClass, PortDemand,
    PortOutlook, Proto, PublishError,
};
use super::lifecycle::End;
use super::log::MappingRecord;
use super::table::{Mapping, MappingKind};
use super::tcp::TcpState;
use crate::clock::Timestamp;

impl Nat {
    /// Adds ports that have been reserved with sockets: they are the NAT's to lend from now on. Says how many were
    /// added; ports of other shards, of unknown addresses and those added before are not.
    pub fn add_ports(&mut self, protocol: Proto, address: Ipv4Addr, ports: &[u16]) -> usize {
        if protocol == Proto::Icmp {
            return 0; // identifiers are the NAT's anyway
        }
        let mut added = 0;
        for &port in ports {
            let published = self.table.find_external(protocol, Endpoint::new(address, port)).is_some();
            if self.slice.owns(port) && !published && self.pools.add(protocol, address, port) {
                added += 1;
            }
        }
        added
    }

    /// How many ports of the class are left to draw.
    pub fn free_ports(&self, protocol: Proto, address: Ipv4Addr, class: PortClass) -> usize {
        self.pools.free(protocol, address, class)
    }

    /// A pool that has become low since it was last asked for, or `None`. To be called in a loop, once per turn: it
    /// costs nothing if there is none.
    pub fn next_port_demand(&mut self) -> Option<PortDemand> {
        self.pools.next_demand()
    }

    /// Says whether ports of the protocol and address may still come. While they may, an empty pool is not an exhausted
    /// one: no port is shared, and whatever finds no port should try again in a moment. Unless they are sure to come,
    /// the last part of a pool is for clients that have less than their share, and the others share. To begin with,
    /// none are expected.
    pub fn expect_ports(&mut self, protocol: Proto, address: Ipv4Addr, outlook: PortOutlook) {
        self.pools.set_outlook(protocol, address, outlook);
    }

    /// Whether ports of the protocol may still come for this client.
    pub fn expects_ports(&self, protocol: Proto, client: Ipv4Addr) -> bool {
        let known = self.clients.get(client).map(|client| client.external);
        let external = known
            .filter(|&external| self.pools.contains(external))
            .or_else(|| self.default_external_address(client));
        external.is_none_or(|address| self.pools.more_to_come(protocol, address))
    }

    /// Lends ports of this range from now on (to begin with, 1024 to 65535), less those that the settings keep: others
    /// that are lent stay lent as long as their mappings live. ICMP identifiers and ports below 1024 have no range.
    pub fn set_port_range(&mut self, range: RangeInclusive<u16>) {
        self.pools.set_range(range, self.config.kept_ports);
    }

    /// A port that was ceded and is not published after all is the caller's again, as [`Nat::take_returned_ports`]
    /// tells.
    pub fn return_port(&mut self, protocol: Proto, external: Endpoint) {
        self.pools.return_port(protocol, external);
    }

    /// Ports that have become the caller's again since the last call, because they are outside the range and nobody
    /// uses them any more, or by [`Nat::return_port`]. It costs nothing if there are none.
    pub fn take_returned_ports(&mut self) -> Vec<(Proto, Endpoint)> {
        self.pools.take_returned()
    }

    /// Whether this port of one of our external addresses is this shard's: it was added, or a mapping has it. That
    /// is asked before it is published, for then it is taken out of what the shard may lend.
    pub fn owns_port(&self, protocol: Proto, address: Ipv4Addr, port: u16) -> bool {
        let mapped = || self.table.find_external(protocol, Endpoint::new(address, port)).is_some();
        match protocol {
            Proto::Icmp => mapped(),
            Proto::Tcp | Proto::Udp => self.pools.owns(protocol, address, port) || mapped(),
        }
    }

    /// Whether `address` is one of our external addresses.
    pub fn is_external(&self, address: Ipv4Addr) -> bool {
        self.pools.contains(address)
    }

    /// Publishes `external`, whose port the caller has reserved, for `internal`: everybody may send to it. A mapping
    /// that `internal` has already ends, for its external port would no longer be the one that answers.
    ///
    /// This is to be called on the shard where the client lives, whichever shard the port belongs to: the caller brings
    /// the port's packets there.
    ///
    /// # Errors
    /// See [`PublishError`]; nothing has changed then.
    pub fn publish(
        &mut self,
        protocol: Proto,
        external: Endpoint,
        internal: Endpoint,
        now: Timestamp,
    ) -> Result<(), PublishError> {
        if protocol == Proto::Icmp {
            return Err(PublishError::NotTcpOrUdp);
        }
        if !self.pools.contains(external.address) {
            return Err(PublishError::NotExternal);
        }
        let held = self.table.find_internal(protocol, internal);
        if held.is_some_and(|id| self.table.mappings[id as usize].kind == MappingKind::Published) {
            return Err(PublishError::EndpointPublished);
        }
        self.cede_port(protocol, external)?;
        if let Some(id) = held {
            self.close_mapping(id, End::Removed, now);
        }
        let client = match self.clients.get(internal.address) {
            Some(client) => *client,
            None => Client::new(self.default_external_address(internal.address).unwrap_or(external.address)),
        };
        self.add_mapping(client, protocol, MappingKind::Published, internal, external, now);
        Ok(())
    }

    /// Takes a port out of the pool, if it is there, because a client publishes it: here or, as every shard has ports
    /// of its own, on another shard. Until then the port could be lent as well.
    ///
    /// # Errors
    /// [`PublishError::PortInUse`] if it is lent already.
    pub fn cede_port(&mut self, protocol: Proto, external: Endpoint) -> Result<(), PublishError> {
        let lent = self.table.find_external(protocol, external).is_some()
            || self.table.is_shared(protocol, external)
            || !self.pools.cede(protocol, external.address, external.port);
        if lent { Err(PublishError::PortInUse) } else { Ok(()) }
    }

    /// Ends the publication of a port, and its connections. The port is the caller's again, to be unreserved, or added
    /// with [`Nat::add_ports`]. False if it was not published.
    pub fn unpublish(&mut self, protocol: Proto, external: Endpoint, now: Timestamp) -> bool {
        match self.table.find_external(protocol, external) {
            Some(id) if self.table.mappings[id as usize].kind == MappingKind::Published => {
                self.close_mapping(id, End::Removed, now);
                true
            }
            _ => false,
        }
    }

    /// The peer is gone: so are its mappings, and their ports rest. Returns the published ones, whose ports are the
    /// caller's again.
    pub fn remove_client(&mut self, address: Ipv4Addr, now: Timestamp) -> Vec<(Proto, Endpoint)> {
        let mut published = Vec::new();
        while let Some(client) = self.clients.get(address) {
            let id = client.any_mapping();
            let Mapping { protocol, kind, external, .. } = self.table.mappings[id as usize];
            if kind == MappingKind::Published {
                published.push((protocol, external));
            }
            self.close_mapping(id, End::Removed, now);
        }
        self.table.shrink();
        published
    }

    /// Changes the settings. Timers that become shorter count from each session's last packet; limits that become lower
    /// end nothing.
    pub fn set_config(&mut self, config: NatConfig, now: Timestamp) {
        self.config = config;
        let ids: Vec<u32> = self.table.session_links.iter().map(|(id, _)| id as u32).collect();
        for id in ids {
            self.restart_timer(id, now);
        }
    }

    /// What was noted of mappings that began or ended since the last call, in order, and how many records there was no
    /// room for; `None` if nothing happened, or no log is wanted.
    pub fn take_log(&mut self) -> Option<(Vec<MappingRecord>, u64)> {
        (!self.log.is_empty()).then(|| self.log.take())
    }

    /// Changes the external addresses: mappings on addresses that are gone end. Returns the published ones among them.
    pub fn set_external(&mut self, external: &[Ipv4Addr], now: Timestamp) -> Vec<(Proto, Endpoint)> {
        let gone: Vec<u32> = (self.table.mappings.iter())
            .filter(|(_, mapping)| !external.contains(&mapping.external.address))
            .map(|(id, _)| id as u32)
            .collect();
        let mut published = Vec::new();
        for id in gone {
            let Mapping { protocol, kind, external, .. } = self.table.mappings[id as usize];
            if kind == MappingKind::Published {
                published.push((protocol, external));
            }
            self.close_mapping(id, End::Removed, now);
        }
        self.pools.set_addresses(external, self.slice);
        published
    }

    /// How much there is.
    pub fn counts(&self) -> NatCounts {
        let [tcp_mappings, udp_mappings, icmp_mappings] = self.mapping_counts;
        NatCounts {
            tcp_mappings,
            udp_mappings,
            icmp_mappings,
            sessions: self.table.session_links.len(),
            resting_ports: self.pools.resting(),
            clients: self.clients.len(),
        }
    }

    /// How many mappings the client has.
    pub fn mappings_of(&self, client: Ipv4Addr) -> usize {
        self.clients.get(client).map_or(0, |client| client.mappings as usize)
    }

    /// All mappings, in no particular order.
    pub fn mappings(&self, now: Timestamp) -> impl Iterator<Item = MappingView> + '_ {
        self.find_mappings(MappingQuery::default(), now)
    }

    /// The mappings that `query` asks for, in no particular order. Only of these are the sessions looked at.
    pub fn find_mappings(
        &self,
        query: MappingQuery,
        now: Timestamp,
    ) -> impl Iterator<Item = MappingView> + '_ {
        (self.table.mappings.iter())
            .filter(move |(_, mapping)| query.wants(mapping.internal, mapping.external))
            .map(move |(_, mapping)| self.view(mapping, now))
    }

    fn view(&self, mapping: &Mapping, now: Timestamp) -> MappingView {
        let mut last_activity = mapping.created;
        let mut deadline = now;
        let mut state = None;
        for id in self.table.sessions_of(mapping) {
            let session = &self.table.sessions[id as usize];
            last_activity = last_activity.max(session.last_activity);
            deadline = deadline.max(session.last_activity + self.config.timeout(session));
            state = state.max(session.tcp.map(|connection| connection.state()));
        }
        let is_published = mapping.kind == MappingKind::Published;
        let state = match state {
            _ if is_published => MappingState::Published,
            None => MappingState::Active,
            Some(TcpState::Closing) => MappingState::Closing,
            Some(TcpState::Opening) => MappingState::Opening,
            Some(TcpState::Established) => MappingState::Established,
        };
        MappingView {
            protocol: mapping.protocol,
            internal: mapping.internal,
            external: mapping.external,
            age: now.since(mapping.created),
            idle: now.since(last_activity),
            expires_in: (!is_published).then(|| deadline.since(now)),
            sessions: mapping.sessions as usize,
            state,
        }
    }
}
