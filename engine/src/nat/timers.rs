//! When sessions end: a lazy timer wheel.
//!
//! # Theory of operation
//!
//! Every session sits in one slot of a wheel whose slots are one second wide. A packet only writes the time of its
//! session's last activity; it never touches the wheel. When a slot's second has come, [`Wheel::next_due`] hands out
//! the slot's sessions, and the caller either lets each die or puts it back at its true deadline. A session that is
//! busy all day therefore costs one look every [`SLOTS`] seconds, and an idle gateway, whose wheel is empty, nothing.
//!
//! Deadlines further away than the wheel is round are put in its last slot and looked at again there. Where a
//! deadline comes *nearer* (a TCP connection closes), the caller moves the session with [`Wheel::schedule`].
//!
//! The lists are threaded through the sessions' links: nothing allocates.

use slab::Slab;

use super::table::{NIL, SessionLinks};
use crate::clock::Timestamp;

/// The wheel's circumference in seconds.
const SLOTS: u64 = 512;
const WORDS: usize = SLOTS as usize / 64;

/// A session's place in the wheel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timer {
    previous: u32,
    next: u32,
    slot: u16,
}

impl Timer {
    /// Not in the wheel.
    pub(super) const NONE: Self = Self { previous: NIL, next: NIL, slot: u16::MAX };
}

/// The wheel. See the module's text.
#[derive(Debug)]
pub(super) struct Wheel {
    heads: Box<[u32; SLOTS as usize]>,
    /// One bit per slot that holds sessions.
    occupied: [u64; WORDS],
    /// Every second up to this one has been dealt with.
    current: u64,
    len: usize,
}

impl Wheel {
    pub(super) fn new() -> Self {
        Self { heads: Box::new([NIL; SLOTS as usize]), occupied: [0; WORDS], current: 0, len: 0 }
    }

    /// Puts the session in the slot of `deadline`, taking it out of the slot where it was.
    pub(super) fn schedule(
        &mut self,
        sessions: &mut Slab<SessionLinks>,
        id: u32,
        deadline: Timestamp,
        now: Timestamp,
    ) {
        self.cancel(sessions, id);
        if self.len == 0 {
            self.current = self.current.max(now.as_secs());
        }
        let due = deadline.as_secs() + 1; // the first second that begins after it
        let tick = due.clamp(self.current + 1, self.current + SLOTS - 1);
        let slot = (tick % SLOTS) as usize;
        let next = std::mem::replace(&mut self.heads[slot], id);
        if next != NIL {
            sessions[next as usize].timer.previous = id;
        }
        sessions[id as usize].timer = Timer { previous: NIL, next, slot: slot as u16 };
        self.occupied[slot / 64] |= 1 << (slot % 64);
        self.len += 1;
    }

    /// Takes the session out of the wheel, if it is in there.
    pub(super) fn cancel(&mut self, sessions: &mut Slab<SessionLinks>, id: u32) {
        let Timer { previous, next, slot } = std::mem::replace(&mut sessions[id as usize].timer, Timer::NONE);
        if slot == Timer::NONE.slot {
            return;
        }
        let slot = usize::from(slot);
        if next != NIL {
            sessions[next as usize].timer.previous = previous;
        }
        if previous == NIL {
            self.heads[slot] = next;
        } else {
            sessions[previous as usize].timer.next = next;
        }
        if self.heads[slot] == NIL {
            self.occupied[slot / 64] &= !(1 << (slot % 64));
        }
        self.len -= 1;
    }

    /// Takes out and returns a session whose slot has come, or `None` when all have been dealt with up to `now`.
    pub(super) fn next_due(&mut self, sessions: &mut Slab<SessionLinks>, now: Timestamp) -> Option<u32> {
        let Some(tick) = self.first_occupied().filter(|&tick| tick <= now.as_secs()) else {
            self.current = self.current.max(now.as_secs());
            return None;
        };
        // Not `tick` itself, for its slot may hold more. What is put back now has a deadline of `now` or later, so it
        // is due after `tick`, and at most at `current + SLOTS - 1`: never in this slot again, so that the caller's
        // loop ends.
        self.current = tick - 1;
        let id = self.heads[(tick % SLOTS) as usize];
        self.cancel(sessions, id);
        Some(id)
    }

    /// When [`Self::next_due`] next has something to say.
    pub(super) fn next_expiry(&self) -> Option<Timestamp> {
        self.first_occupied().map(Timestamp::from_secs)
    }

    /// The first second after `current` whose slot holds sessions.
    fn first_occupied(&self) -> Option<u64> {
        if self.len == 0 {
            return None;
        }
        let from = self.current + 1;
        let start = (from % SLOTS) as usize;
        for step in 0..=WORDS {
            let index = (start / 64 + step) % WORDS;
            let mut word = self.occupied[index];
            if step == 0 {
                word &= u64::MAX << (start % 64);
            } else if step == WORDS {
                word &= !(u64::MAX << (start % 64));
            }
            if word != 0 {
                let slot = index as u64 * 64 + u64::from(word.trailing_zeros());
                return Some(from + (slot + SLOTS - start as u64) % SLOTS);
            }
        }
        None
    }
}
