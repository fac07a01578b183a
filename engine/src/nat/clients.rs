//! What each client holds, and how fast it may ask for more (RFC 6888 REQ-4 and REQ-5).

use std::net::Ipv4Addr;
use std::time::Duration;

use foldhash::quality::SeedableRandomState;
use hashbrown::HashMap;

use super::table::{Mapping, NIL};
use crate::clock::Timestamp;
use slab::Slab;

/// A client with at least one mapping.
#[derive(Clone, Copy, Debug)]
pub(super) struct Client {
    /// Its mappings, and the ends of their list.
    pub mappings: u32,
    pub first_mapping: u32,
    pub last_mapping: u32,
    /// The sessions of all its mappings.
    pub sessions: u32,
    /// The one external address of all its mappings (RFC 4787 REQ-2: paired pooling).
    pub external: Ipv4Addr,
    pub pace: Pace,
}

impl Client {
    /// A client without mappings.
    pub(super) fn new(external: Ipv4Addr) -> Self {
        Self {
            mappings: 0,
            first_mapping: NIL,
            last_mapping: NIL,
            sessions: 0,
            external,
            pace: Pace::default(),
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
        let previous = std::mem::replace(&mut client.last_mapping, id);
        if previous == NIL {
            client.first_mapping = id;
        } else {
            mappings[previous as usize].next = id;
        }
        client.mappings += 1;
        let mapping = &mut mappings[id as usize];
        (mapping.previous, mapping.next) = (previous, NIL);
        self.0.insert(mapping.internal.address, client);
    }

    /// Forgets a mapping that has been removed from `mappings`, and the client with its last one.
    pub(super) fn remove_mapping(&mut self, mapping: &Mapping, mappings: &mut Slab<Mapping>) {
        let Some(client) = self.0.get_mut(&mapping.internal.address) else { return };
        if mapping.previous == NIL {
            client.first_mapping = mapping.next;
        } else {
            mappings[mapping.previous as usize].next = mapping.next;
        }
        if mapping.next == NIL {
            client.last_mapping = mapping.previous;
        } else {
            mappings[mapping.next as usize].previous = mapping.previous;
        }
        client.mappings -= 1;
        if client.mappings == 0 {
            self.0.remove(&mapping.internal.address);
        }
    }
}
