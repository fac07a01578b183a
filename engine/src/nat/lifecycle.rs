//! Where mappings and sessions begin and end.

use std::hash::BuildHasher;
use std::net::Ipv4Addr;
use std::time::Duration;

use super::clients::Client;
use super::config::{Endpoint, PortClass, Proto};
use super::log::MappingEvent;
use super::ports::{SET_ASIDE_PART, SMALLEST_TO_SET_ASIDE_OF};
use super::table::{Mapping, MappingKind, NIL, Session};
use super::tcp::{Connection, TcpState};
use super::{Nat, NatConfig, SESSIONS_PER_MAPPING};
use crate::clock::Timestamp;
use crate::drop_reason::DropReason;

/// Sessions that one call of [`Nat::expire`] looks at: about a millisecond's worth.
const EXPIRY_BUDGET: usize = 4096;
/// Closed mappings of a client, or sessions of a mapping, that are looked at for one to be reclaimed.
pub(super) const RECLAIM_ATTEMPTS: usize = 32;
/// A mapping with more sessions than this is not looked at.
const RECLAIM_SESSIONS: u32 = 4;

/// Why a mapping ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum End {
    /// Its timers have run out, or its connections are closed: nobody expects packets from it.
    Expired,
    /// It was taken away while it may be in use.
    Removed,
}

impl Nat {
    /// The session for the first packet from `internal` to `remote`, under the mapping of `internal`, which is made if
    /// there is none.
    ///
    /// # Errors
    /// The limit that stands in the way; nothing has changed then.
    pub(super) fn open_session(
        &mut self,
        protocol: Proto,
        internal: Endpoint,
        remote: Endpoint,
        tcp: Option<Connection>,
        now: Timestamp,
    ) -> Result<u32, DropReason> {
        let limit = self.check_session_limits(internal.address).err();
        if let Some(reason) = limit {
            if self.oldest_call(internal.address).is_none() {
                return Err(reason);
            }
        }
        let mapping = match self.table.find_internal(protocol, internal) {
            Some(id) => {
                let mapping = &self.table.mappings[id as usize];
                if self.table.find_inbound(protocol, mapping.external, remote).is_some() {
                    // Only where the port is shared: another client talks to that very destination.
                    return Err(DropReason::SharedPortTaken);
                }
                id
            }
            None => self.open_mapping(protocol, internal, remote, now)?,
        };
        let sessions = self.table.mappings[mapping as usize].sessions as usize;
        if sessions >= self.config.max_sessions_per_mapping {
            if !self.evict_call_of(mapping) {
                return Err(DropReason::SessionLimit);
            }
        } else if limit.is_some() {
            self.evict_call(internal.address, mapping, now);
        }
        let id = self.add_session(mapping, remote, tcp, now);
        self.table.admit(id);
        Ok(id)
    }

    /// The session for a SYN from outside that the mapping's filter has admitted.
    ///
    /// # Errors
    /// [`DropReason::SessionLimit`].
    pub(super) fn open_session_from_outside(
        &mut self,
        mapping_id: u32,
        remote: Endpoint,
        tcp: Connection,
        now: Timestamp,
    ) -> Result<u32, DropReason> {
        let Mapping { sessions, internal, .. } = self.table.mappings[mapping_id as usize];
        let has_room = if sessions as usize >= self.config.max_sessions_per_mapping {
            self.evict_call_of(mapping_id)
        } else {
            self.check_session_limits(internal.address).is_ok()
                || self.evict_call(internal.address, mapping_id, now)
        };
        if !has_room {
            return Err(DropReason::SessionLimit);
        }
        Ok(self.add_session(mapping_id, remote, Some(tcp), now))
    }

    /// The one place where time ends things: sessions that were idle for too long, mappings with their last session,
    /// the rest of ports. To be called at [`Nat::next_expiry`]; calling it more often costs next to nothing.
    ///
    /// One call does a bounded amount of work; if more is due, `next_expiry` says so by lying in the past.
    pub fn expire(&mut self, now: Timestamp) {
        self.pools.wake(now);
        for _ in 0..EXPIRY_BUDGET {
            let Some(id) = self.wheel.next_due(&mut self.table.session_links, now) else {
                self.table.shrink();
                return;
            };
            let session = &self.table.sessions[id as usize];
            let deadline = session.last_activity + self.config.timeout(session);
            if deadline >= now {
                self.wheel.schedule(&mut self.table.session_links, id, deadline, now);
                continue; // it was busy since it was put here
            }
            let mapping = self.table.session_links[id as usize].mapping;
            self.close_session(id);
            self.end_if_unused(mapping, now);
        }
    }

    /// When [`Nat::expire`] next has something to do, to the second; `None` if there is nothing to expire.
    pub fn next_expiry(&self) -> Option<Timestamp> {
        match (self.wheel.next_expiry(), self.pools.next_wake()) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// The state of a connection changed, and with it its timer: now is the time to look at it anew.
    pub(super) fn restart_timer(&mut self, id: u32, now: Timestamp) {
        let session = &self.table.sessions[id as usize];
        let deadline = session.last_activity + self.config.timeout(session);
        self.wheel.schedule(&mut self.table.session_links, id, deadline, now);
    }

    /// A mapping for `internal`, whose first packet goes to `remote`.
    fn open_mapping(
        &mut self,
        protocol: Proto,
        internal: Endpoint,
        remote: Endpoint,
        now: Timestamp,
    ) -> Result<u32, DropReason> {
        // Where the client, or all clients together, may have no more, its closed connections make room.
        let held = self.mappings_of(internal.address);
        if held >= self.config.max_mappings_per_client && !self.reclaim_closed(internal.address, now) {
            return Err(DropReason::ClientMappingLimit);
        }
        let all = self.table.mappings.len() - self.published;
        let most = self.slice.part_of(self.config.max_mappings);
        let full = all >= most;
        if (full || self.is_for_others(all, most, held)) && !self.reclaim_closed(internal.address, now) {
            return Err(if full { DropReason::MappingsExhausted } else { DropReason::ClientShare });
        }
        let default = || self.default_external_address(internal.address).ok_or(DropReason::PortsExhausted);
        let mut client = match self.clients.get(internal.address) {
            Some(client) => *client,
            None => Client::new(default()?),
        };
        if !client.pace.take(self.config.max_new_mappings_per_second, now) {
            return Err(DropReason::ClientMappingRate);
        }
        if !self.pools.contains(client.external) {
            client.external = default()?;
        }
        let has_its_share = self.has_its_share(&client, protocol);
        let (port, kind) = self
            .draw_port(protocol, client.external, internal, remote, has_its_share, now)
            .ok_or(if has_its_share { DropReason::ClientShare } else { DropReason::PortsExhausted })?;
        // Drawing may have reclaimed a mapping of this client's: its record is to be read again.
        let client = match self.clients.get(internal.address) {
            Some(current) => Client { pace: client.pace, external: client.external, ..*current },
            None => Client { pace: client.pace, ..Client::new(client.external) },
        };
        let external = Endpoint::new(client.external, port);
        Ok(self.add_mapping(client, protocol, kind, internal, external, now))
    }

    /// Enters a mapping everywhere; `client` becomes its client's record.
    pub(super) fn add_mapping(
        &mut self,
        client: Client,
        protocol: Proto,
        kind: MappingKind,
        internal: Endpoint,
        external: Endpoint,
        now: Timestamp,
    ) -> u32 {
        let id = self.table.insert_mapping(Mapping {
            protocol,
            kind,
            internal,
            external,
            created: now,
            sessions: 0,
            first_session: NIL,
            last_session: NIL,
            closed: false,
            previous: NIL,
            next: NIL,
        });
        self.clients.add_mapping(client, id, &mut self.table.mappings);
        self.mapping_counts[protocol.index()] += 1;
        self.published += usize::from(kind == MappingKind::Published);
        if self.config.log_mappings {
            self.log.note(MappingEvent::Created, &self.table.mappings[id as usize], now);
        }
        id
    }

    /// The external address that a client gets when it has no mapping: the same one each time, if the addresses are.
    /// All its mappings then have that one (RFC 4787 REQ-2: paired pooling).
    pub(super) fn default_external_address(&self, client: Ipv4Addr) -> Option<Ipv4Addr> {
        let count = self.pools.address_count() as u64;
        let index = self.table.hasher.hash_one(client.to_bits()).checked_rem(count)?;
        self.pools.address(index as usize)
    }

    /// Whether ports run low, and the client has more of them than there would be for each, were there one client more.
    fn has_its_share(&self, client: &Client, protocol: Proto) -> bool {
        let share = || self.pools.owned(protocol) / (self.clients.len() + 1);
        self.pools.runs_low(protocol, client.external)
            && client.by_protocol[protocol.index()] as usize > share()
    }

    /// Whether what is left of `most` is for others than a client that has `held` of the `used` ones: the last part of
    /// it is for those who have less than there would be for each, were there one client more.
    fn is_for_others(&self, used: usize, most: usize, held: usize) -> bool {
        most >= SMALLEST_TO_SET_ASIDE_OF
            && used >= most - most / SET_ASIDE_PART
            && held > most / (self.clients.len() + 1)
    }

    /// A port for a new mapping: a free one, unless the client has its share of them; else, for TCP, that of a closed
    /// connection of the same client; else, if no more ports will come, or those are for others, one that is in use,
    /// but not towards `remote` (RFC 7857 §3).
    fn draw_port(
        &mut self,
        protocol: Proto,
        address: Ipv4Addr,
        internal: Endpoint,
        remote: Endpoint,
        has_its_share: bool,
        now: Timestamp,
    ) -> Option<(u16, MappingKind)> {
        let class = protocol.class_of(internal.port);
        if has_its_share {
            self.pools.ask(protocol, address); // there may be more again, and nobody else may need any
        } else if let Some(port) = self.pools.draw(protocol, address, class, &mut self.random) {
            return Some((port, MappingKind::Drawn));
        }
        if protocol != Proto::Tcp {
            return None;
        }
        if self.reclaim_closed(internal.address, now) {
            if let Some(port) = self.pools.draw(protocol, address, class, &mut self.random) {
                return Some((port, MappingKind::Drawn));
            }
        }
        if self.pools.more_to_come(protocol, address) && !has_its_share {
            return None;
        }
        self.pools
            .candidates(protocol, address, PortClass::Unprivileged, &mut self.random)
            .find(|&port| {
                let external = Endpoint::new(address, port);
                let lent = self.table.is_shared(protocol, external)
                    || self
                        .table
                        .find_external(protocol, external)
                        .is_some_and(|id| self.table.mappings[id as usize].kind == MappingKind::Drawn);
                lent && self.table.find_inbound(protocol, external, remote).is_none()
            })
            .map(|port| (port, MappingKind::Shared))
    }

    /// Ends the one of the client's TCP mappings that was closed first, as if its last minutes were over. Looks at a
    /// few only: nearly always the first one will do.
    fn reclaim_closed(&mut self, client: Ipv4Addr, now: Timestamp) -> bool {
        let Some(client) = self.clients.get(client) else { return false };
        let mut at = client.first_closed();
        for _ in 0..RECLAIM_ATTEMPTS {
            let Some(mapping) = self.table.mappings.get(at as usize) else { return false };
            // Of use is what releases a port to the pool from which the next one is drawn.
            let useful = mapping.external.address == client.external
                && PortClass::of(mapping.external.port) == PortClass::Unprivileged
                && !self.table.is_shared(Proto::Tcp, mapping.external);
            if useful {
                self.close_mapping(at, End::Expired, now);
                return true;
            }
            at = mapping.next;
        }
        false
    }

    /// Notes whether all connections of a TCP mapping are closed, after one of them has changed.
    pub(super) fn note_closed(&mut self, id: u32) {
        let mapping = &self.table.mappings[id as usize];
        let closed = mapping.kind == MappingKind::Drawn
            && mapping.sessions <= RECLAIM_SESSIONS
            && self.table.sessions_of(mapping).all(|id| {
                let connection = &self.table.sessions[id as usize].tcp;
                connection.as_ref().is_some_and(|c| c.state() == TcpState::Closing)
            });
        self.clients.set_closed(id, closed, &mut self.table.mappings);
    }

    fn check_session_limits(&self, client: Ipv4Addr) -> Result<(), DropReason> {
        let held = self.clients.get(client).map_or(0, |client| client.sessions as usize);
        let used = self.table.session_links.len();
        let most = SESSIONS_PER_MAPPING.saturating_mul(self.slice.part_of(self.config.max_mappings));
        if held >= SESSIONS_PER_MAPPING.saturating_mul(self.config.max_mappings_per_client) || used >= most {
            return Err(DropReason::SessionLimit);
        }
        if self.is_for_others(used, most, held) { Err(DropReason::ClientShare) } else { Ok(()) }
    }

    fn add_session(
        &mut self,
        mapping: u32,
        remote: Endpoint,
        tcp: Option<Connection>,
        now: Timestamp,
    ) -> u32 {
        let id = self.table.insert_session(mapping, remote, tcp, now);
        let session = &self.table.sessions[id as usize];
        if let Some(client) = self.clients.get_mut(session.internal.address) {
            client.sessions += 1;
        }
        if session.tcp.is_some() {
            self.note_closed(mapping);
        }
        self.note_call(id);
        self.restart_timer(id, now);
        id
    }

    /// Ends a session. Its mapping stays.
    pub(super) fn close_session(&mut self, id: u32) {
        self.wheel.cancel(&mut self.table.session_links, id);
        if let Some(client) = self.clients.get_mut(self.table.sessions[id as usize].internal.address) {
            client.sessions -= 1;
            client.calls.unlink(id, &mut self.table.session_links);
        }
        self.table.remove_session(id);
    }

    /// Ends a mapping whose last session has ended, unless it is there for good.
    pub(super) fn end_if_unused(&mut self, id: u32, now: Timestamp) {
        let Mapping { sessions, kind, .. } = self.table.mappings[id as usize];
        if sessions == 0 && kind != MappingKind::Published {
            self.close_mapping(id, End::Expired, now);
        }
    }

    /// Ends a mapping and its sessions; its port rests or is free. A published port is the caller's.
    pub(super) fn close_mapping(&mut self, id: u32, end: End, now: Timestamp) {
        while self.table.mappings[id as usize].first_session != NIL {
            self.close_session(self.table.mappings[id as usize].first_session);
        }
        let (mapping, port_unused) = self.table.remove_mapping(id);
        self.clients.remove_mapping(&mapping, &mut self.table.mappings);
        self.mapping_counts[mapping.protocol.index()] -= 1;
        if self.config.log_mappings {
            self.log.note(MappingEvent::Ended, &mapping, now);
        }
        if mapping.kind == MappingKind::Published {
            self.published -= 1;
            return;
        }
        if port_unused {
            let rests = mapping.protocol == Proto::Udp || end == End::Removed;
            let Endpoint { address, port } = mapping.external;
            self.pools.release(mapping.protocol, address, port, rests.then_some(now));
        }
    }
}

impl NatConfig {
    /// How long the session may be idle.
    pub(super) fn timeout(&self, session: &Session) -> Duration {
        match (session.protocol, &session.tcp) {
            (Proto::Icmp, _) => self.icmp_timeout,
            (_, None) => self.udp_timeout,
            (_, Some(connection)) => match connection.state() {
                TcpState::Opening => self.tcp_opening_timeout,
                TcpState::Established => self.tcp_established_timeout,
                TcpState::Closing => self.tcp_closing_timeout,
            },
        }
    }
}
