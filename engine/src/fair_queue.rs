//! Packets that wait for the core, those of each client in a queue of their own (FQ-CoDel, RFC 8290).
//!
//! Theory of operation. What has arrived is sorted by whose it is. The queues take turns by deficit round robin: each
//! is served a [`QUANTUM`] of bytes, then the next. A queue that was empty is served before those that were not, so
//! that whoever sends a packet now and then (a ping, a keystroke, an ACK) waits for nobody's bulk. Each queue is
//! watched by [`codel`]: where its head always waits too long, heads are dropped. When all queues together outgrow
//! their bounds, the heads of the longest one are dropped, so that nobody's flood costs somebody else's packets. A
//! packet has its price however short it is ([`price`]): what counts only bytes would serve a flood of empty datagrams
//! for nothing. What turns out to have cost more than its bytes is charged for when it was served
//! ([`FairQueue::charge`]); that is about turns, and changes nothing in the bounds.
//!
//! It holds descriptions of packets, not their bytes, and reads no clock.

pub mod codel;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::hash::Hash;

use foldhash::fast::RandomState;
use hashbrown::HashMap;
use slab::Slab;

use self::codel::CoDel;
use crate::clock::Timestamp;

/// Bytes that a queue is served before the others have their turn: one superpacket.
pub const QUANTUM: usize = 65_535;

/// What a packet counts for at least, in bytes: about what the kernel's buffers, which are bounded likewise, charge for
/// a small one.
const LEAST_COST: usize = 256;

/// What `packets` packets count for that come in one, a train or a superpacket, and have `bytes` bytes together.
pub fn price(packets: usize, bytes: usize) -> usize {
    bytes.max(packets.saturating_mul(LEAST_COST))
}

/// Whose packet it seems to be, before anything is verified: the usual key of these queues.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Owner<K> {
    /// A client's.
    Client(K),
    /// A handshake: from somebody who wants to be a client, or to go on being one. Its turns are its own, however much
    /// other unknown senders send.
    Handshake,
    /// From or for nobody that we know.
    Unknown,
}

impl<K> Owner<K> {
    /// The client, if it is one's.
    pub fn client(self) -> Option<K> {
        match self {
            Self::Client(client) => Some(client),
            Self::Handshake | Self::Unknown => None,
        }
    }
}

/// So many packets, and so many bytes.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Amount {
    /// Packets (trains, superpackets).
    pub packets: usize,
    /// Their bytes.
    pub bytes: usize,
}

impl Amount {
    /// Whether it is `limit` or more of packets or of bytes.
    pub fn reaches(self, limit: Self) -> bool {
        self.packets >= limit.packets || self.bytes >= limit.bytes
    }
}

/// A packet that waits.
#[derive(Debug)]
struct Waiting<T> {
    packet: T,
    bytes: usize,
    arrived: Timestamp,
}

impl<T> Waiting<T> {
    /// What it counts for in queues, turns and bounds.
    fn cost(&self) -> usize {
        price(1, self.bytes)
    }
}

/// What waits for one client.
#[derive(Debug)]
struct Queue<K, T> {
    key: K,
    packets: VecDeque<Waiting<T>>,
    /// What its packets count for.
    cost: usize,
    /// What it may still be served in this round.
    deficit: isize,
    codel: CoDel,
}

/// Fair queues of packets `T`, one for each key `K`: as many as there are keys, at most, which are therefore nothing
/// that strangers may choose. A queue that is found empty at its turn ends, and all end when nothing waits any more.
#[derive(Debug)]
pub struct FairQueue<K, T> {
    bounds: Amount,
    queues: Slab<Queue<K, T>>,
    by_key: HashMap<K, usize, RandomState>,
    /// The queues that were empty when their first packet came, in its order.
    new: VecDeque<usize>,
    /// The others, in the order of their turns.
    old: VecDeque<usize>,
    /// From which queue the last packet came.
    served_last: Option<usize>,
    packets: usize,
    cost: usize,
    /// The memory of queues that ended.
    spare: Vec<VecDeque<Waiting<T>>>,
}

/// Queues whose memory is kept for the next ones.
const SPARE_QUEUES: usize = 16;

impl<K: Copy + Eq + Hash, T> FairQueue<K, T> {
    /// No queues, in which together no more than `bounds` may wait.
    pub fn new(bounds: Amount) -> Self {
        Self {
            bounds,
            queues: Slab::new(),
            by_key: HashMap::default(),
            new: VecDeque::new(),
            old: VecDeque::new(),
            served_last: None,
            packets: 0,
            cost: 0,
            spare: Vec::new(),
        }
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.packets == 0
    }

    /// How much waits; short packets count for more bytes than they have.
    pub fn waiting(&self) -> Amount {
        Amount { packets: self.packets, bytes: self.cost }
    }

    /// A packet of `bytes` bytes arrived for `key`, or what counts for as many ([`price`]). What has to go for it is
    /// handed to `overflow`.
    pub fn push(&mut self, key: K, packet: T, bytes: usize, now: Timestamp, mut overflow: impl FnMut(T)) {
        let id = *self.by_key.entry(key).or_insert_with(|| {
            let packets = self.spare.pop().unwrap_or_default();
            let deficit = QUANTUM as isize;
            let id = self.queues.insert(Queue { key, packets, cost: 0, deficit, codel: CoDel::default() });
            self.new.push_back(id);
            id
        });
        let queue = &mut self.queues[id];
        let waiting = Waiting { packet, bytes, arrived: now };
        let cost = waiting.cost();
        queue.packets.push_back(waiting);
        queue.cost += cost;
        self.packets += 1;
        self.cost += cost;
        while self.packets > self.bounds.packets || self.cost > self.bounds.bytes {
            self.shorten_longest(&mut overflow);
        }
    }

    /// The packet to be served next, and its bytes as they were pushed. What has waited too long is handed to
    /// `dropped`.
    pub fn pop(&mut self, now: Timestamp, mut dropped: impl FnMut(T)) -> Option<(T, usize)> {
        loop {
            let is_new = !self.new.is_empty();
            let list = if is_new { &mut self.new } else { &mut self.old };
            let id = *list.front()?;
            let queue = &mut self.queues[id];
            if queue.deficit <= 0 {
                queue.deficit += QUANTUM as isize;
                list.pop_front();
                self.old.push_back(id);
                continue;
            }
            while let Some(waiting) = queue.packets.pop_front() {
                let cost = waiting.cost();
                let Waiting { packet, bytes, arrived } = waiting;
                queue.cost -= cost;
                self.packets -= 1;
                self.cost -= cost;
                if queue.codel.drops(now.since(arrived), queue.cost <= QUANTUM, now) {
                    dropped(packet);
                    continue;
                }
                queue.deficit -= cost as isize;
                self.served_last = Some(id);
                if self.packets == 0 {
                    self.forget_all();
                }
                return Some((packet, bytes));
            }
            // A queue that comes back at once must not overtake the others again (RFC 8290 §4.2).
            list.pop_front();
            if is_new && !self.old.is_empty() {
                self.old.push_back(id);
            } else {
                self.forget(id);
            }
        }
    }

    /// Takes heads of the longest queue: one superpacket, or so many small ones that the search for it pays. Every
    /// packet counts for something, so where packets wait, the longest queue has one.
    fn shorten_longest(&mut self, overflow: &mut impl FnMut(T)) {
        let longest = self.queues.iter_mut().map(|(_, queue)| queue).max_by_key(|queue| queue.cost);
        let Some(longest) = longest else { return };
        let goal = longest.cost - longest.cost.min(QUANTUM) / 2;
        while let Some(waiting) = longest.packets.pop_front() {
            let cost = waiting.cost();
            longest.cost -= cost;
            self.packets -= 1;
            self.cost -= cost;
            overflow(waiting.packet);
            if longest.cost <= goal {
                return;
            }
        }
    }

    /// What the packet that was served last has cost beyond its bytes, which nobody knew before: its queue pays, if it
    /// is still there.
    pub fn charge(&mut self, work: usize) {
        if let Some(queue) = self.served_last.and_then(|id| self.queues.get_mut(id)) {
            queue.deficit -= work as isize;
        }
    }

    fn forget(&mut self, id: usize) {
        let queue = self.queues.remove(id);
        self.served_last.take_if(|last| *last == id);
        self.by_key.remove(&queue.key);
        if self.spare.len() < SPARE_QUEUES {
            self.spare.push(queue.packets);
        }
    }

    /// Nothing waits, so nobody owes anybody a turn.
    fn forget_all(&mut self) {
        while let Some(id) = self.new.pop_front().or_else(|| self.old.pop_front()) {
            self.forget(id);
        }
    }
}
