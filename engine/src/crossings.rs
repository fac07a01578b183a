//! What other shards have handed over and the core has not taken yet.
//!
//! Theory of operation. Between shards there are bounded queues that serve first come, first served, like a kernel's socket
//! buffer. So each turn empties its own into a [`FairQueue`] ([`Crossings::collect`]), and takes a bounded share from there
//! ([`Crossings::next`]): a client that floods another one on a second shard keeps nobody else's packets from crossing, and
//! neither do fragments or ICMP errors from outside, a flood of somebody's published port, nor handshakes.

use std::net::Ipv4Addr;
use std::sync::mpsc::Receiver;

use crate::clock::Timestamp;
use crate::drop_reason::{DropCounters, DropReason};
use crate::fair_queue::{Amount, FairQueue, Owner, QUANTUM};
use crate::outbox::Crossing;

/// Crossings that may wait before a shard, and again inside it.
pub const CROSSING_QUEUE: usize = 1_024;
/// What may wait inside it.
const BOUNDS: Amount = Amount { packets: CROSSING_QUEUE, bytes: 8 * 1024 * 1024 };
/// What one turn serves.
const TURN: Amount = Amount { packets: 64, bytes: 8 * QUANTUM };

/// The crossings for one shard.
pub struct Crossings {
    arriving: Receiver<Crossing>,
    queue: FairQueue<Owner<Ipv4Addr>, Crossing>,
    served: Amount,
    drops: DropCounters,
}

impl Crossings {
    /// Those that come out of `arriving`, which has room for [`CROSSING_QUEUE`].
    pub fn new(arriving: Receiver<Crossing>) -> Self {
        Self {
            arriving,
            queue: FairQueue::new(BOUNDS),
            served: Amount::default(),
            drops: DropCounters::default(),
        }
    }

    /// Whether something waits for the next turn.
    pub fn is_waiting(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Crossings that died while they waited.
    pub fn drops(&self) -> &DropCounters {
        &self.drops
    }

    /// Queues what has arrived. To be called after the shard's wake-up was cleared: what comes later sets it again.
    pub fn collect(&mut self, now: Timestamp) {
        for crossing in self.arriving.try_iter().take(CROSSING_QUEUE) {
            let (owner, bytes) = (crossing.owner(), crossing.bytes().len());
            self.queue.push(owner, crossing, bytes, now, |_| self.drops.count(DropReason::QueueShare));
        }
    }

    /// The crossing to be served next in this turn; `None` if that was enough.
    pub fn next(&mut self, now: Timestamp) -> Option<Crossing> {
        if self.served.reaches(TURN) {
            return None;
        }
        let (crossing, bytes) = self.queue.pop(now, |_| self.drops.count(DropReason::QueueDelay))?;
        self.served.packets += 1;
        self.served.bytes += bytes;
        Some(crossing)
    }

    /// What the crossing that was served last has cost beyond its bytes.
    pub fn charge(&mut self, work: usize) {
        self.served.bytes += work;
        self.queue.charge(work);
    }

    /// The turn is over.
    pub fn end_turn(&mut self) {
        self.served = Amount::default();
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddrV4;
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;
    use crate::wire::Offload;

    const NOW: Timestamp = Timestamp::from_secs(10);
    const FLOODING: Ipv4Addr = Ipv4Addr::new(10, 66, 77, 2);
    const FLOODED: Ipv4Addr = Ipv4Addr::new(10, 66, 77, 4);
    const QUIET: Ipv4Addr = Ipv4Addr::new(10, 66, 77, 3);
    const OUTSIDE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);

    fn to_peer(client: Ipv4Addr, len: usize) -> Crossing {
        Crossing::ToPeer { packet: vec![0x45; len], offload: Offload::NONE, client }
    }

    fn inbound(client: Option<Ipv4Addr>) -> Crossing {
        Crossing::Inbound { packet: vec![0x45; 84], offload: Offload::NONE, client }
    }

    fn initiation() -> Crossing {
        Crossing::Initiation { from: SocketAddrV4::new(OUTSIDE, 1).into(), datagram: vec![1; 148] }
    }

    /// Forged data, for a session of ours, in a train that the kernel steered elsewhere.
    fn strayed() -> Crossing {
        Crossing::Strayed { from: SocketAddrV4::new(OUTSIDE, 1).into(), datagram: vec![4; 32] }
    }

    /// In what place of the order each is served to which `is_it` applies.
    fn places(crossings: &mut Crossings, is_it: impl Fn(&Crossing) -> bool) -> Vec<usize> {
        crossings.collect(NOW);
        let mut places = Vec::new();
        for place in 0.. {
            let Some(crossing) = crossings.next(NOW).or_else(|| {
                crossings.end_turn();
                crossings.next(NOW)
            }) else {
                break;
            };
            if is_it(&crossing) {
                places.push(place);
            }
        }
        places
    }

    #[test]
    fn nobody_waits_behind_one_clients_flood_nor_behind_strangers() {
        let (sender, receiver) = mpsc::sync_channel(CROSSING_QUEUE);
        let mut crossings = Crossings::new(receiver);
        for _ in 0..300 {
            sender.try_send(to_peer(FLOODING, 1_400)).unwrap();
            sender.try_send(inbound(None)).unwrap();
            sender.try_send(inbound(Some(FLOODED))).unwrap();
        }
        sender.try_send(to_peer(QUIET, 84)).unwrap();
        sender.try_send(inbound(Some(QUIET))).unwrap();
        sender.try_send(initiation()).unwrap();
        let is_quiet = |crossing: &Crossing| {
            matches!(crossing.owner(), Owner::Newcomer) || crossing.owner() == Owner::Client(QUIET)
        };
        let places = places(&mut crossings, is_quiet);
        assert_eq!(places.len(), 3, "nothing is lost");
        assert!(places.iter().all(|&place| place < 600), "{places:?}: after one quantum of each flood");
        assert!(!crossings.is_waiting());
    }

    #[test]
    fn what_does_not_fit_or_waits_too_long_is_the_floods_and_is_counted() {
        let (sender, receiver) = mpsc::sync_channel(CROSSING_QUEUE);
        let mut crossings = Crossings::new(receiver);
        let mut quiet = 0;
        for ms in 0..400 {
            let now = NOW + Duration::from_millis(ms);
            for _ in 0..20 {
                sender.try_send(to_peer(FLOODING, 60_000)).unwrap();
            }
            sender.try_send(to_peer(QUIET, 84)).unwrap();
            crossings.collect(now);
            while let Some(crossing) = crossings.next(now) {
                quiet += usize::from(crossing.owner() == Owner::Client(QUIET));
            }
            crossings.end_turn();
        }
        assert_eq!(quiet, 400);
        assert!(crossings.drops().get(DropReason::QueueShare) > 0);
        assert!(crossings.drops().get(DropReason::QueueDelay) > 0);
    }

    #[test]
    fn a_turn_serves_a_bounded_share() {
        let (sender, receiver) = mpsc::sync_channel(CROSSING_QUEUE);
        let mut crossings = Crossings::new(receiver);
        for _ in 0..CROSSING_QUEUE {
            sender.try_send(to_peer(FLOODING, 84)).unwrap();
        }
        crossings.collect(NOW);
        assert_eq!(std::iter::from_fn(|| crossings.next(NOW)).count(), TURN.packets);
        assert!(crossings.is_waiting());
    }

    #[test]
    fn a_turn_serves_few_handshakes() {
        let (sender, receiver) = mpsc::sync_channel(CROSSING_QUEUE);
        let mut crossings = Crossings::new(receiver);
        for _ in 0..TURN.packets {
            sender.try_send(initiation()).unwrap();
        }
        crossings.collect(NOW);
        let mut served = 0;
        while crossings.next(NOW).is_some() {
            crossings.charge(QUANTUM / 2);
            served += 1;
        }
        assert_eq!(served, 16);
    }

    #[test]
    fn forged_data_keeps_no_handshake_from_crossing() {
        let (sender, receiver) = mpsc::sync_channel(CROSSING_QUEUE);
        let mut crossings = Crossings::new(receiver);
        let mut handshakes = 0;
        for ms in 0..200 {
            let now = NOW + Duration::from_millis(ms);
            for _ in 0..2 * TURN.packets {
                sender.try_send(strayed()).unwrap();
            }
            sender.try_send(initiation()).unwrap();
            crossings.collect(now);
            let served = std::iter::from_fn(|| crossings.next(now));
            handshakes += served.filter(|crossing| crossing.owner() == Owner::Newcomer).count();
            crossings.end_turn();
        }
        assert_eq!(handshakes, 200);
        assert!(crossings.drops().get(DropReason::QueueDelay) > 0, "of the flood");
    }
}
