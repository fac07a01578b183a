//! Calls: sessions that visitors can bring about for next to nothing. They make room where there is none, as in the
//! *early drop* of Linux' conntrack, which calls such sessions *not assured*.
//!
//! # Theory of operation
//!
//! A SYN costs its sender nothing, and its source may be forged. So a connection that began with one from outside is a
//! call until it stands, and again from the client's FIN on: a visitor that has vanished never sends its own, and what
//! the client has long given up would be established for hours (RFC 5382 REQ-5). It is none where the client has begun
//! it as well.
//!
//! A datagram is as cheap, and a server answers whoever seems to ask. So each session of a published UDP port is a
//! call. Nothing is lost with it: the mapping knows both ends and admits everybody, and the next answer opens another.
//! It is not so with a drawn port, whose sessions are its filter.
//!
//! Calls are the first to go where no more sessions may be, as in a full accept queue: where a *mapping* has no room,
//! its oldest call ([`Nat::evict_call_of`]); where its *client* has none, or the *shard*, the client's oldest call, at
//! whichever of its ports ([`Nat::evict_call`]). It makes room for a visitor, also of another port, and for what the
//! client opens itself: a flood of one port neither closes the others nor keeps the client in.
//!
//! The calls of a client are a list, threaded through their links in the order in which they became calls; and where a
//! session becomes one, it becomes the newest of its mapping as well. A session enters and leaves it when it becomes a
//! call or is one no longer ([`Nat::note_call`]), also while the state of its connection stays the same: the client's
//! own SYN makes it the client's, and a SYN-ACK of another number takes that back. A visitor that calls again from the
//! same port is the newest again ([`Nat::renew_call`]).

use std::net::Ipv4Addr;

use slab::Slab;

use super::Nat;
use super::lifecycle::RECLAIM_ATTEMPTS;
use super::table::{MappingKind, NIL, SessionLinks};
use crate::clock::Timestamp;

/// In no list. There are never that many sessions.
const UNLISTED: u32 = NIL - 1;

/// A session's neighbours among the calls of its client.
#[derive(Clone, Copy, Debug)]
pub(super) struct CallLinks {
    previous: u32,
    next: u32,
}

impl CallLinks {
    /// Not in the list.
    pub(super) const NONE: Self = Self { previous: UNLISTED, next: UNLISTED };

    fn is_listed(self) -> bool {
        self.previous != UNLISTED
    }
}

/// The ends of the list of a client's calls: the oldest one, and the newest.
#[derive(Clone, Copy, Debug)]
pub(super) struct CallList {
    first: u32,
    last: u32,
}

impl CallList {
    pub(super) const EMPTY: Self = Self { first: NIL, last: NIL };

    fn push(&mut self, id: u32, sessions: &mut Slab<SessionLinks>) {
        let previous = std::mem::replace(&mut self.last, id);
        if previous == NIL {
            self.first = id;
        } else {
            sessions[previous as usize].call.next = id;
        }
        sessions[id as usize].call = CallLinks { previous, next: NIL };
    }

    /// Takes a session out, if it is in the list.
    pub(super) fn unlink(&mut self, id: u32, sessions: &mut Slab<SessionLinks>) {
        let links = std::mem::replace(&mut sessions[id as usize].call, CallLinks::NONE);
        if !links.is_listed() {
            return;
        }
        if links.previous == NIL {
            self.first = links.next;
        } else {
            sessions[links.previous as usize].call.next = links.next;
        }
        if links.next == NIL {
            self.last = links.previous;
        } else {
            sessions[links.next as usize].call.previous = links.previous;
        }
    }
}

impl Nat {
    /// Notes whether a session is a call, after it has begun or its connection has changed.
    pub(super) fn note_call(&mut self, id: u32) {
        let is_call = self.is_call(id);
        let sessions = &mut self.table.session_links;
        if is_call == sessions[id as usize].call.is_listed() {
            return;
        }
        let Some(client) = self.clients.get_mut(self.table.sessions[id as usize].internal.address) else {
            return;
        };
        if is_call {
            client.calls.push(id, sessions);
            self.table.move_to_end(id); // what the client closes first may still have much to deliver
        } else {
            client.calls.unlink(id, sessions);
        }
    }

    /// A call begins anew: it is the newest.
    pub(super) fn renew_call(&mut self, id: u32) {
        if let Some(client) = self.clients.get_mut(self.table.sessions[id as usize].internal.address) {
            client.calls.unlink(id, &mut self.table.session_links);
        }
        self.note_call(id);
    }

    /// The oldest call of a client, if it has any.
    pub(super) fn oldest_call(&self, client: Ipv4Addr) -> Option<u32> {
        let id = self.clients.get(client)?.calls.first;
        debug_assert!(id == NIL || self.is_call(id));
        (id != NIL).then_some(id)
    }

    /// Makes room for a session of `mapping`, whose client or whose shard has all that it may have, by ending the
    /// client's oldest call. False if it has none.
    pub(super) fn evict_call(&mut self, client: Ipv4Addr, mapping: u32, now: Timestamp) -> bool {
        let Some(id) = self.oldest_call(client) else { return false };
        let called = self.table.session_links[id as usize].mapping;
        self.close_session(id);
        if called != mapping {
            self.end_if_unused(called, now);
        }
        true
    }

    /// Makes room in a mapping that has all the sessions that it may have, by ending its oldest call. Looks at a few of
    /// the oldest sessions; those that are alive go to the end of the list, so that the next call looks at others.
    pub(super) fn evict_call_of(&mut self, mapping: u32) -> bool {
        for _ in 0..RECLAIM_ATTEMPTS {
            let id = self.table.mappings[mapping as usize].first_session;
            if id == NIL {
                return false;
            }
            if self.is_call(id) {
                self.close_session(id);
                return true;
            }
            if self.table.sessions[id as usize].tcp.is_none() {
                return false; // nor is any other: without connections they are all alike
            }
            self.table.move_to_end(id);
        }
        false
    }

    fn is_call(&self, id: u32) -> bool {
        match &self.table.sessions[id as usize].tcp {
            Some(connection) => connection.is_only_a_call(),
            None => {
                let mapping = self.table.session_links[id as usize].mapping;
                self.table.mappings[mapping as usize].kind == MappingKind::Published
            }
        }
    }
}
