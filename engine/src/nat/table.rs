//! Mappings and sessions, and the indexes that find them.
//!
//! # Theory of operation
//!
//! A *mapping* ties an inner endpoint to an external one, whatever the destination (RFC 4787 REQ-1). A *session* is
//! one remote endpoint that a mapping talks to. Packets of an existing session find it with one look-up, by inner and
//! remote endpoint on the way out and by external and remote endpoint on the way in, and the session holds all that
//! their translation needs; the mapping is not touched. Only the first packet of a session looks for the mapping.
//!
//! A mapping lives as long as it has sessions (a published one until it is unpublished), so only sessions have timers.
//!
//! Both kinds live in slabs and are referred to by number; what the packets of a session need is one cache line, and
//! what else there is to a session lies elsewhere under the same number. The indexes hold the numbers alone and are
//! keyed with a secret, so that nobody can choose endpoints that collide. Lists are threaded through the records: the
//! sessions of a mapping, the mappings of a client and its calls (`calls.rs`), each from the oldest to the newest.

use std::hash::BuildHasher;
use std::net::Ipv4Addr;

use foldhash::SharedSeed;
use foldhash::quality::SeedableRandomState;
use hashbrown::hash_map::Entry;
use hashbrown::{HashMap, HashTable};
use slab::Slab;

use super::calls::CallLinks;
use super::config::{Endpoint, Proto};
use super::random::Random;
use super::tcp::Connection;
use super::timers::Timer;
use crate::clock::Timestamp;

/// No record.
pub(super) const NIL: u32 = u32::MAX;
/// Memory below this many records is kept for the next ones.
const KEPT_CAPACITY: usize = 1024;
/// With fewer sessions than this, all are in the second-level cache (256 KiB of them), and fetching ahead is a waste.
/// Tests go that way always.
const PREFETCH_FROM: usize = if cfg!(test) { 1 } else { 4096 };

/// How a mapping came by its external port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum MappingKind {
    /// Drawn from the pool; it is the mapping's own.
    Drawn,
    /// Another mapping's too, to which strangers' packets go; this one only gets what its sessions name.
    Shared,
    /// Given by the operator, for good.
    Published,
}

/// One mapping.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mapping {
    pub protocol: Proto,
    pub kind: MappingKind,
    pub internal: Endpoint,
    pub external: Endpoint,
    pub created: Timestamp,
    /// How many sessions it has, and the ends of their list.
    pub sessions: u32,
    pub first_session: u32,
    pub last_session: u32,
    /// All its connections are closed: it is in the other one of its client's two lists.
    pub closed: bool,
    /// Its neighbours in that list.
    pub previous: u32,
    pub next: u32,
}

/// One remote endpoint that a mapping talks to: what its packets need, and nothing else.
///
/// With many sessions, fetching them from memory is most of what a translation costs: so each is one cache line, and
/// [`Table::prefetch_outbound`] and its like begin early.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug)]
pub(super) struct Session {
    pub last_activity: Timestamp,
    pub tcp: Option<Connection>,
    pub internal: Endpoint,
    pub external: Endpoint,
    pub remote: Endpoint,
    pub protocol: Proto,
    /// The client has sent to the remote endpoint, which therefore may send to it (RFC 4787 §5).
    pub admitted: bool,
}

const _: () = assert!(size_of::<Session>() == 64);

impl Mapping {
    fn internal_hash(&self, hasher: &SeedableRandomState) -> u64 {
        hash_one_end(hasher, self.protocol, self.internal)
    }

    fn external_hash(&self, hasher: &SeedableRandomState) -> u64 {
        hash_one_end(hasher, self.protocol, self.external)
    }
}

impl Session {
    fn outbound_hash(&self, hasher: &SeedableRandomState) -> u64 {
        hash_both_ends(hasher, self.protocol, self.internal, self.remote)
    }

    fn inbound_hash(&self, hasher: &SeedableRandomState) -> u64 {
        hash_both_ends(hasher, self.protocol, self.external, self.remote)
    }
}

/// In which lists a session is: what only its beginning, its end and its timer need.
#[derive(Clone, Copy, Debug)]
pub(super) struct SessionLinks {
    pub mapping: u32,
    /// Its neighbours among the sessions of its mapping.
    pub previous: u32,
    pub next: u32,
    /// And among the calls of its client.
    pub call: CallLinks,
    pub timer: Timer,
}

/// All mappings and sessions of a shard.
#[derive(Debug)]
pub(super) struct Table {
    pub hasher: SeedableRandomState,
    pub mappings: Slab<Mapping>,
    /// How the sessions are linked; a session's place in here is its number.
    pub session_links: Slab<SessionLinks>,
    /// The sessions, under their numbers; what lies under others is left from sessions that have ended.
    pub sessions: Vec<Session>,
    /// Mappings by protocol and inner endpoint.
    by_internal: HashTable<u32>,
    /// Mappings by protocol and external endpoint, except those that only share it.
    by_external: HashTable<u32>,
    /// Sessions by protocol, inner and remote endpoint.
    outbound: HashTable<u32>,
    /// Sessions by protocol, external and remote endpoint.
    inbound: HashTable<u32>,
    /// How many sessions of a mapping admit packets from an address.
    admissions: HashMap<(u32, Ipv4Addr), u32, SeedableRandomState>,
    /// How many mappings use a shared port; ports that are not shared have no entry.
    sharers: HashMap<(Proto, Endpoint), u32, SeedableRandomState>,
}

/// What a packet names: one end.
fn hash_one_end(hasher: &SeedableRandomState, protocol: Proto, end: Endpoint) -> u64 {
    hasher.hash_one((u64::from(end.address.to_bits()) << 32) | (u64::from(end.port) << 8) | protocol as u64)
}

/// What a packet names: both ends.
fn hash_both_ends(hasher: &SeedableRandomState, protocol: Proto, near: Endpoint, far: Endpoint) -> u64 {
    let addresses = (u64::from(near.address.to_bits()) << 32) | u64::from(far.address.to_bits());
    let ports = (u64::from(near.port) << 24) | (u64::from(far.port) << 8) | protocol as u64;
    hasher.hash_one((addresses, ports))
}

/// Takes a record out of an index.
fn remove_from(index: &mut HashTable<u32>, hash: u64, id: u32) {
    if let Ok(entry) = index.find_entry(hash, |&other| other == id) {
        entry.remove();
    }
}

/// Gives an index's memory back after a peak.
fn shrink_index(index: &mut HashTable<u32>, hash_of: impl Fn(&u32) -> u64) {
    if is_mostly_empty(index.len(), index.capacity()) {
        index.shrink_to(KEPT_CAPACITY, hash_of);
    }
}

fn is_mostly_empty(len: usize, capacity: usize) -> bool {
    capacity > KEPT_CAPACITY && len < capacity / 8
}

impl Table {
    pub(super) fn new(random: &mut Random) -> Self {
        let hasher = SeedableRandomState::with_seed(random.bits(), SharedSeed::global_random());
        Self {
            mappings: Slab::new(),
            session_links: Slab::new(),
            sessions: Vec::new(),
            by_internal: HashTable::new(),
            by_external: HashTable::new(),
            outbound: HashTable::new(),
            inbound: HashTable::new(),
            admissions: HashMap::with_hasher(hasher.clone()),
            sharers: HashMap::with_hasher(hasher.clone()),
            hasher,
        }
    }

    /// The session of a packet from inside.
    pub(super) fn find_outbound(&self, protocol: Proto, internal: Endpoint, remote: Endpoint) -> Option<u32> {
        let hash = hash_both_ends(&self.hasher, protocol, internal, remote);
        self.outbound
            .find(hash, |&id| {
                let s = &self.sessions[id as usize];
                s.internal == internal && s.remote == remote && s.protocol == protocol
            })
            .copied()
    }

    /// The session of a packet from outside.
    pub(super) fn find_inbound(&self, protocol: Proto, external: Endpoint, remote: Endpoint) -> Option<u32> {
        let hash = hash_both_ends(&self.hasher, protocol, external, remote);
        self.inbound
            .find(hash, |&id| {
                let s = &self.sessions[id as usize];
                s.external == external && s.remote == remote && s.protocol == protocol
            })
            .copied()
    }

    /// Whether there are so many sessions that fetching one ahead pays.
    pub(super) fn outgrows_the_cache(&self) -> bool {
        self.sessions.len() >= PREFETCH_FROM
    }

    /// Begins to fetch the session that [`Self::find_outbound`] will look for.
    pub(super) fn prefetch_outbound(&self, protocol: Proto, internal: Endpoint, remote: Endpoint) {
        self.prefetch(&self.outbound, protocol, internal, remote);
    }

    /// Begins to fetch the session that [`Self::find_inbound`] will look for.
    pub(super) fn prefetch_inbound(&self, protocol: Proto, external: Endpoint, remote: Endpoint) {
        self.prefetch(&self.inbound, protocol, external, remote);
    }

    fn prefetch(&self, index: &HashTable<u32>, protocol: Proto, near: Endpoint, far: Endpoint) {
        // The first one whose hash looks alike: nearly always the right one, and if not, nothing is lost.
        let hash = hash_both_ends(&self.hasher, protocol, near, far);
        if let Some(session) = index.find(hash, |_| true).and_then(|&id| self.sessions.get(id as usize)) {
            branches::prefetch_write_data::<_, 0>(&raw const *session);
        }
    }

    /// The mapping of an inner endpoint.
    pub(super) fn find_internal(&self, protocol: Proto, internal: Endpoint) -> Option<u32> {
        let hash = hash_one_end(&self.hasher, protocol, internal);
        self.by_internal
            .find(hash, |&id| {
                let m = &self.mappings[id as usize];
                m.internal == internal && m.protocol == protocol
            })
            .copied()
    }

    /// The mapping that owns an external endpoint.
    pub(super) fn find_external(&self, protocol: Proto, external: Endpoint) -> Option<u32> {
        let hash = hash_one_end(&self.hasher, protocol, external);
        self.by_external
            .find(hash, |&id| {
                let m = &self.mappings[id as usize];
                m.external == external && m.protocol == protocol
            })
            .copied()
    }

    /// Whether the mapping's client has sent to some port of `address`, and the session still lives.
    pub(super) fn admits(&self, mapping: u32, address: Ipv4Addr) -> bool {
        self.admissions.contains_key(&(mapping, address))
    }

    /// Whether several mappings use the external endpoint.
    pub(super) fn is_shared(&self, protocol: Proto, external: Endpoint) -> bool {
        self.sharers.contains_key(&(protocol, external))
    }

    /// Adds a mapping without sessions. No mapping of the same inner endpoint may exist, nor, unless it is
    /// [`MappingKind::Shared`], one of the same external endpoint.
    pub(super) fn insert_mapping(&mut self, mapping: Mapping) -> u32 {
        let id = self.mappings.insert(mapping) as u32;
        let Self { hasher, mappings, .. } = self;
        let hash_of = |&id: &u32| mappings[id as usize].internal_hash(hasher);
        self.by_internal.insert_unique(hash_of(&id), id, hash_of);
        if mapping.kind == MappingKind::Shared {
            // The first sharer counts the owner too.
            *self.sharers.entry((mapping.protocol, mapping.external)).or_insert(1) += 1;
        } else {
            let hash_of = |&id: &u32| mappings[id as usize].external_hash(hasher);
            self.by_external.insert_unique(hash_of(&id), id, hash_of);
        }
        id
    }

    /// Removes a mapping that has no sessions. Says whether its external port is nobody's any more.
    pub(super) fn remove_mapping(&mut self, id: u32) -> (Mapping, bool) {
        let mapping = self.mappings.remove(id as usize);
        remove_from(&mut self.by_internal, mapping.internal_hash(&self.hasher), id);
        if mapping.kind != MappingKind::Shared {
            remove_from(&mut self.by_external, mapping.external_hash(&self.hasher), id);
        }
        let unused = match self.sharers.entry((mapping.protocol, mapping.external)) {
            Entry::Vacant(_) => true,
            Entry::Occupied(mut sharers) => {
                *sharers.get_mut() -= 1;
                let unused = *sharers.get() == 0;
                if unused {
                    sharers.remove();
                }
                unused
            }
        };
        (mapping, unused)
    }

    /// Adds a session to its mapping, as the newest. None of the same endpoints may exist. It is not admitted yet
    /// ([`Self::admit`]) and not in the timer wheel.
    pub(super) fn insert_session(
        &mut self,
        mapping_id: u32,
        remote: Endpoint,
        tcp: Option<Connection>,
        now: Timestamp,
    ) -> u32 {
        let mapping = &mut self.mappings[mapping_id as usize];
        let Mapping { protocol, internal, external, last_session: previous, .. } = *mapping;
        let (call, timer) = (CallLinks::NONE, Timer::NONE);
        let links = SessionLinks { mapping: mapping_id, previous, next: NIL, call, timer };
        let id = self.session_links.insert(links) as u32;
        let session =
            Session { last_activity: now, tcp, internal, external, remote, protocol, admitted: false };
        match self.sessions.get_mut(id as usize) {
            Some(left) => *left = session,
            // The slab numbers what is new with its length, so this is the next one.
            None => self.sessions.push(session),
        }
        mapping.sessions += 1;
        mapping.last_session = id;
        if previous == NIL {
            mapping.first_session = id;
        } else {
            self.session_links[previous as usize].next = id;
        }
        let Self { hasher, sessions, .. } = self;
        let outbound_hash = |&id: &u32| sessions[id as usize].outbound_hash(hasher);
        let inbound_hash = |&id: &u32| sessions[id as usize].inbound_hash(hasher);
        self.outbound.insert_unique(outbound_hash(&id), id, outbound_hash);
        self.inbound.insert_unique(inbound_hash(&id), id, inbound_hash);
        id
    }

    /// The client has sent to the session's remote endpoint: its address is admitted from now on.
    pub(super) fn admit(&mut self, id: u32) {
        let session = &mut self.sessions[id as usize];
        if !session.admitted {
            session.admitted = true;
            let mapping = self.session_links[id as usize].mapping;
            *self.admissions.entry((mapping, session.remote.address)).or_insert(0) += 1;
        }
    }

    /// Removes a session that is not in the timer wheel any more, nor among the calls of its client. Its mapping stays,
    /// even if it has no other.
    pub(super) fn remove_session(&mut self, id: u32) {
        let session = self.sessions[id as usize];
        let place = self.session_links.remove(id as usize);
        remove_from(&mut self.outbound, session.outbound_hash(&self.hasher), id);
        remove_from(&mut self.inbound, session.inbound_hash(&self.hasher), id);
        if session.admitted {
            let admission = (place.mapping, session.remote.address);
            if let Entry::Occupied(mut count) = self.admissions.entry(admission) {
                *count.get_mut() -= 1;
                if *count.get() == 0 {
                    count.remove();
                }
            }
        }
        self.unlink(&place);
        self.mappings[place.mapping as usize].sessions -= 1;
    }

    /// Makes the session the newest of its mapping.
    pub(super) fn move_to_end(&mut self, id: u32) {
        let place = self.session_links[id as usize];
        self.unlink(&place);
        let mapping = &mut self.mappings[place.mapping as usize];
        let previous = std::mem::replace(&mut mapping.last_session, id);
        if previous == NIL {
            mapping.first_session = id;
        } else {
            self.session_links[previous as usize].next = id;
        }
        let place = &mut self.session_links[id as usize];
        (place.previous, place.next) = (previous, NIL);
    }

    /// The numbers of the mapping's sessions, the oldest first.
    pub(super) fn sessions_of(&self, mapping: &Mapping) -> impl Iterator<Item = u32> + '_ {
        let first = (mapping.first_session != NIL).then_some(mapping.first_session);
        std::iter::successors(first, |&id| {
            let next = self.session_links[id as usize].next;
            (next != NIL).then_some(next)
        })
    }

    /// Gives memory back after a peak.
    pub(super) fn shrink(&mut self) {
        if self.session_links.is_empty() && self.session_links.capacity() > KEPT_CAPACITY {
            self.session_links = Slab::new();
            self.sessions = Vec::new();
        }
        if self.mappings.is_empty() && self.mappings.capacity() > KEPT_CAPACITY {
            self.mappings = Slab::new();
        }
        let Self { hasher, mappings, sessions, .. } = self;
        shrink_index(&mut self.outbound, |&id| sessions[id as usize].outbound_hash(hasher));
        shrink_index(&mut self.inbound, |&id| sessions[id as usize].inbound_hash(hasher));
        shrink_index(&mut self.by_internal, |&id| mappings[id as usize].internal_hash(hasher));
        shrink_index(&mut self.by_external, |&id| mappings[id as usize].external_hash(hasher));
        if is_mostly_empty(self.admissions.len(), self.admissions.capacity()) {
            self.admissions.shrink_to(KEPT_CAPACITY);
        }
        if is_mostly_empty(self.sharers.len(), self.sharers.capacity()) {
            self.sharers.shrink_to(KEPT_CAPACITY);
        }
    }

    /// Records that there is room for: what the memory depends on.
    #[cfg(test)]
    pub(super) fn capacity(&self) -> usize {
        self.mappings.capacity()
            + self.sessions.capacity()
            + self.session_links.capacity()
            + self.by_internal.capacity()
            + self.by_external.capacity()
            + self.outbound.capacity()
            + self.inbound.capacity()
            + self.admissions.capacity()
            + self.sharers.capacity()
    }

    fn unlink(&mut self, place: &SessionLinks) {
        let mapping = &mut self.mappings[place.mapping as usize];
        if place.previous == NIL {
            mapping.first_session = place.next;
        } else {
            self.session_links[place.previous as usize].next = place.next;
        }
        if place.next == NIL {
            mapping.last_session = place.previous;
        } else {
            self.session_links[place.next as usize].previous = place.previous;
        }
    }
}
