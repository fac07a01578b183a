//! What each client holds, and how fast it may ask for more (RFC 6888 REQ-4, and REQ-5 for its sessions).

use std::net::Ipv4Addr;
use std::time::Duration;

use foldhash::quality::SeedableRandomState;
use hashbrown::HashMap;

use super::calls::CallList;
use super::table::{Mapping, NIL};
use crate::clock::Timestamp;
use slab::Slab;

/// A client with at least one mapping.
#[derive(Clone, Copy, Debug)]
pub(super) struct Client {
    /// How many mappings it has, and how many of each protocol.
    pub mappings: u32,
    pub by_protocol: [u32; 3],
    /// Those of them that are in use.
    pub live: MappingList,
    /// Those whose TCP connections are all closed: they make room when room is needed. The first closed first.
    pub closed: MappingList,
    /// The sessions of all its mappings.
    pub sessions: u32,
    /// Those of them that make room when room is needed.
    pub calls: CallList,
    /// The one external address of all its mappings (RFC 4787 REQ-2: paired pooling).
    pub external: Ipv4Addr,
    pub pace: Pace,
}

impl Client {
    /// A client without mappings.
    pub(super) fn new(external: Ipv4Addr) -> Self {
        Self {
            mappings: 0,
            by_protocol: [0; 3],
            live: MappingList::EMPTY,
            closed: MappingList::EMPTY,
            sessions: 0,
            calls: CallList::EMPTY,
            external,
            pace: Pace::default(),
        }
    }

    /// One of its mappings.
    pub(super) fn any_mapping(&self) -> u32 {
        if self.live.first == NIL { self.closed.first } else { self.live.first }
    }

    /// The one of its closed mappings that was closed first; the next is its `next`.
    pub(super) fn first_closed(&self) -> u32 {
        self.closed.first
    }

    fn list_of(&mut self, mapping: &Mapping) -> &mut MappingList {
        if mapping.closed { &mut self.closed } else { &mut self.live }
    }
}

/// The ends of a list of a client's mappings, which is threaded through their records.
#[derive(Clone, Copy, Debug)]
pub(super) struct MappingList {
    first: u32,
    last: u32,
}

impl MappingList {
    const EMPTY: Self = Self { first: NIL, last: NIL };

    fn push(&mut self, id: u32, mappings: &mut Slab<Mapping>) {
        let previous = std::mem::replace(&mut self.last, id);
        if previous == NIL {
            self.first = id;
        } else {
            mappings[previous as usize].next = id;
        }
        let mapping = &mut mappings[id as usize];
        (mapping.previous, mapping.next) = (previous, NIL);
    }

    /// Takes a mapping out, whose own links are of no more use.
    fn unlink(&mut self, mapping: &Mapping, mappings: &mut Slab<Mapping>) {
        if mapping.previous == NIL {
            self.first = mapping.next;
        } else {
            mappings[mapping.previous as usize].next = mapping.next;
        }
        if mapping.next == NIL {
            self.last = mapping.previous;
        } else {
            mappings[mapping.next as usize].previous = mapping.previous;
        }
    }
}

/// A token bucket that holds one second's worth of tokens, kept as the time at which it will be full again (GCRA).
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pace {
    full_at: Timestamp,
}

impl Pace {
    /// Takes a token out of a bucket that `rate` tokens a second flow into, if there is one.
    pub(super) fn take(&mut self, rate: u32, now: Timestamp) -> bool {
        const DEPTH: Duration = Duration::from_secs(1);
        if rate == 0 {
            return false;
        }
        let full_at = self.full_at.max(now) + DEPTH / rate;
        let allowed = full_at <= now + DEPTH;
        if allowed {
            self.full_at = full_at;
        }
        allowed
    }
}

/// The clients with mappings, by address. Bounded by the number of mappings.
#[derive(Debug)]
pub(super) struct Clients(HashMap<Ipv4Addr, Client, SeedableRandomState>);

impl Clients {
    pub(super) fn new(hasher: SeedableRandomState) -> Self {
        Self(HashMap::with_hasher(hasher))
    }

    pub(super) fn get(&self, address: Ipv4Addr) -> Option<&Client> {
        self.0.get(&address)
    }

    pub(super) fn get_mut(&mut self, address: Ipv4Addr) -> Option<&mut Client> {
        self.0.get_mut(&address)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Enters a mapping as the newest of its client; `client` is what the client's record shall be.
    pub(super) fn add_mapping(&mut self, mut client: Client, id: u32, mappings: &mut Slab<Mapping>) {
        let Mapping { protocol, internal, .. } = mappings[id as usize];
        client.mappings += 1;
        client.by_protocol[protocol.index()] += 1;
        client.live.push(id, mappings);
        self.0.insert(internal.address, client);
    }

    /// Notes that all connections of a mapping are closed, or that one of them no longer is.
    pub(super) fn set_closed(&mut self, id: u32, closed: bool, mappings: &mut Slab<Mapping>) {
        let mapping = mappings[id as usize];
        let Some(client) = self.0.get_mut(&mapping.internal.address) else { return };
        if mapping.closed != closed {
            client.list_of(&mapping).unlink(&mapping, mappings);
            mappings[id as usize].closed = closed;
            client.list_of(&Mapping { closed, ..mapping }).push(id, mappings);
        }
    }

    /// Forgets a mapping that has been removed from `mappings`, and the client with its last one.
    pub(super) fn remove_mapping(&mut self, mapping: &Mapping, mappings: &mut Slab<Mapping>) {
        let Some(client) = self.0.get_mut(&mapping.internal.address) else { return };
        client.list_of(mapping).unlink(mapping, mappings);
        client.mappings -= 1;
        client.by_protocol[mapping.protocol.index()] -= 1;
        if client.mappings == 0 {
            self.0.remove(&mapping.internal.address);
        }
    }
}
