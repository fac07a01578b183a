//! How much of the neighbour cache each client takes.
//!
//! Nobody may take more than is still free (the *dynamic threshold* of Choudhury and Hahne, IEEE/ACM Transactions on
//! Networking 6(2), 1998): alone it gets half, two get a third each, and there is always something left for the next
//! one. A neighbour is charged to whoever asked for it first, though all may use it.

use std::collections::HashMap;
use std::net::Ipv4Addr;

use super::MAX_HELD;
use crate::fair_queue::Amount;

/// On whose behalf a neighbour is asked for: the client's whose packet goes there. `None`: our own, who answer somebody
/// outside.
pub type Asker = Option<Ipv4Addr>;

/// What all of them take.
#[derive(Debug, Default)]
pub(super) struct Shares {
    by_asker: HashMap<Asker, Share>,
    held: Amount,
}

/// What one of them takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Share {
    /// Neighbours that were asked for, known or not.
    asked: usize,
    /// Packets that wait.
    held: Amount,
}

impl Shares {
    /// Whether one more neighbour may be asked for, where so many places are `free`.
    pub(super) fn may_ask(&self, asker: Asker, free: usize) -> bool {
        self.of(asker).asked < free
    }

    /// Whether one more packet may wait.
    pub(super) fn may_hold(&self, asker: Asker) -> bool {
        let free = Amount {
            packets: MAX_HELD.packets.saturating_sub(self.held.packets),
            bytes: MAX_HELD.bytes.saturating_sub(self.held.bytes),
        };
        !self.of(asker).held.reaches(free)
    }

    /// A neighbour is asked for.
    pub(super) fn ask(&mut self, asker: Asker) {
        self.change(asker, |share| share.asked += 1);
    }

    /// The neighbour is forgotten.
    pub(super) fn give_up(&mut self, asker: Asker) {
        self.change(asker, |share| share.asked -= 1);
    }

    /// A packet waits.
    pub(super) fn hold(&mut self, asker: Asker, bytes: usize) {
        self.held.packets += 1;
        self.held.bytes += bytes;
        self.change(asker, |share| {
            share.held.packets += 1;
            share.held.bytes += bytes;
        });
    }

    /// The packet waits no more.
    pub(super) fn release(&mut self, asker: Asker, bytes: usize) {
        self.held.packets -= 1;
        self.held.bytes -= bytes;
        self.change(asker, |share| {
            share.held.packets -= 1;
            share.held.bytes -= bytes;
        });
    }

    /// What waits for all of them.
    #[cfg(test)]
    pub(super) fn held(&self) -> Amount {
        self.held
    }

    fn of(&self, asker: Asker) -> Share {
        self.by_asker.get(&asker).copied().unwrap_or_default()
    }

    /// Who takes nothing any more is forgotten: there are never more of them than neighbours and packets.
    fn change(&mut self, asker: Asker, change: impl FnOnce(&mut Share)) {
        let share = self.by_asker.entry(asker).or_default();
        change(share);
        if *share == Share::default() {
            self.by_asker.remove(&asker);
        }
    }
}
