//! What one shard hands to another: packets that turn out to belong there.
//!
//! Theory of operation. Between shards there are bounded queues that serve first come, first served, like a kernel's
//! socket buffer. So each turn empties its own into a [`FairQueue`] ([`Handoffs::collect`]), and takes a bounded share
//! from there ([`Handoffs::next`]): a client that floods another one on a second shard keeps nobody else's packets from
//! being handed over, and neither do fragments or ICMP errors from outside, a flood of somebody's published port, nor
//! handshakes.
//!
//! Word of a session that begins ([`BegunSessions`]) is no packet and goes beside the queues: a packet that dies for
//! want of room is sent again by somebody, the word is not.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, PoisonError};

use crate::clock::Timestamp;
use crate::drop_reason::{DropCounters, DropReason};
use crate::fair_queue::{Amount, FairQueue, Owner, QUANTUM, price};
use crate::path::Path;
use crate::tunnel::OWN_SESSIONS;
use crate::wire::{Ecn, Ipv4Packet, Offload};

/// Handoffs that may wait before a shard, and again inside it.
pub const HANDOFF_QUEUE: usize = 1_024;
/// What may wait inside it.
const BOUNDS: Amount = Amount { packets: HANDOFF_QUEUE, bytes: 8 * 1024 * 1024 };
/// What one turn serves.
const TURN: Amount = Amount { packets: 64, bytes: 8 * QUANTUM };

/// What one shard hands to another, through a bounded queue.
#[derive(Debug)]
pub enum Handoff {
    /// A handshake initiation for a peer that lives there, which has been admitted.
    Initiation {
        /// Where the datagram comes from.
        from: Path,
        /// The datagram.
        datagram: Vec<u8>,
    },
    /// A message for a session or a handshake that was begun there, and that nobody has judged yet.
    Misdirected {
        /// Where the datagram comes from.
        from: Path,
        /// What the network wrote onto it.
        ecn: Ecn,
        /// The datagram.
        datagram: Vec<u8>,
    },
    /// A routed packet for a peer that lives there.
    ToPeer {
        /// The packet, whole.
        packet: Vec<u8>,
        /// Its offload metadata.
        offload: Offload,
        /// The client that sent it; of what comes from outside or from the host, the one for whom it is.
        client: Ipv4Addr,
    },
    /// A packet from outside (or hairpinned), not yet translated, for a NAT port that belongs there.
    Inbound {
        /// The packet, whole.
        packet: Vec<u8>,
        /// Its offload metadata.
        offload: Offload,
        /// The client that sent it, or that publishes its port, as far as it is known here.
        client: Option<Ipv4Addr>,
    },
}

impl Handoff {
    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Initiation { datagram, .. } | Self::Misdirected { datagram, .. } => datagram,
            Self::ToPeer { packet, .. } | Self::Inbound { packet, .. } => packet,
        }
    }

    /// How many packets it stands for: one, if it is no superpacket, or none that makes sense.
    pub fn packets(&mut self) -> usize {
        match self {
            Self::ToPeer { packet, offload, .. } | Self::Inbound { packet, offload, .. }
                if offload.gso.is_some() =>
            {
                Ipv4Packet::parse(packet, 0, *offload).map_or(1, |packet| packet.shape().segment_count())
            }
            _ => 1,
        }
    }

    /// Whose it is. Never the source's that a packet names: from outside, that may be any, and each would get a queue.
    pub fn owner(&self) -> Owner<Ipv4Addr> {
        match self {
            Self::Initiation { .. } => Owner::Handshake,
            Self::Misdirected { .. } => Owner::Unknown,
            Self::ToPeer { client, .. } => Owner::Client(*client),
            Self::Inbound { client, .. } => client.map_or(Owner::Unknown, Owner::Client),
        }
    }
}

/// Word for one shard of the sessions that began on the others: the indices by which it knows what is sealed in them,
/// see [`Tunnel::is_own`](crate::tunnel::Tunnel::is_own). Shared by those who tell and the one who is told.
#[derive(Clone, Default)]
pub struct BegunSessions(Arc<Mutex<VecDeque<u32>>>);

impl BegunSessions {
    /// Adds the index that a peer gave out for a session. Should the shard not come to listening, the oldest give way,
    /// as where they are remembered.
    pub fn tell(&self, remote_index: u32) {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if told.len() >= OWN_SESSIONS {
            told.pop_front();
        }
        told.push_back(remote_index);
    }

    /// Takes all that was told. To be called after the shard's wake-up was cleared, as [`Handoffs::collect`].
    pub fn take(&self) -> VecDeque<u32> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The handoffs for one shard.
pub struct Handoffs {
    arriving: Receiver<Handoff>,
    queue: FairQueue<Owner<Ipv4Addr>, Handoff>,
    served: Amount,
    drops: DropCounters,
}

impl Handoffs {
    /// Those that come out of `arriving`, which has room for [`HANDOFF_QUEUE`].
    pub fn new(arriving: Receiver<Handoff>) -> Self {
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

    /// Handoffs that died while they waited.
    pub fn drops(&self) -> &DropCounters {
        &self.drops
    }

    /// Queues what has arrived. To be called after the shard's wake-up was cleared: what comes later sets it again.
    pub fn collect(&mut self, now: Timestamp) {
        for mut handoff in self.arriving.try_iter().take(HANDOFF_QUEUE) {
            let (owner, price) = (handoff.owner(), price(handoff.packets(), handoff.bytes().len()));
            self.queue.push(owner, handoff, price, now, |mut dropped| {
                self.drops.add(DropReason::QueueShare, dropped.packets() as u64);
            });
        }
    }

    /// The handoff to be served next in this turn; `None` if that was enough.
    pub fn next(&mut self, now: Timestamp) -> Option<Handoff> {
        if self.served.reaches(TURN) {
            return None;
        }
        let (handoff, price) = self.queue.pop(now, |mut dropped| {
            self.drops.add(DropReason::QueueDelay, dropped.packets() as u64);
        })?;
        self.served.packets += 1;
        self.served.bytes += price;
        Some(handoff)
    }

    /// What the handoff that was served last has cost beyond its bytes.
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
    use crate::wire::test_packets::{Template, payload};
    use crate::wire::{Gso, GsoKind, Offload};

    const NOW: Timestamp = Timestamp::from_secs(10);
    const FLOODING: Ipv4Addr = Ipv4Addr::new(10, 66, 77, 2);
    const FLOODED: Ipv4Addr = Ipv4Addr::new(10, 66, 77, 4);
    const QUIET: Ipv4Addr = Ipv4Addr::new(10, 66, 77, 3);
    const OUTSIDE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);

    fn to_peer(client: Ipv4Addr, len: usize) -> Handoff {
        Handoff::ToPeer { packet: vec![0x45; len], offload: Offload::NONE, client }
    }

    fn inbound(client: Option<Ipv4Addr>) -> Handoff {
        Handoff::Inbound { packet: vec![0x45; 84], offload: Offload::NONE, client }
    }

    fn initiation() -> Handoff {
        Handoff::Initiation { from: SocketAddrV4::new(OUTSIDE, 1).into(), datagram: vec![1; 148] }
    }

    /// Forged data, for a session of ours, in a train that the kernel steered elsewhere.
    fn misdirected() -> Handoff {
        let from = SocketAddrV4::new(OUTSIDE, 1).into();
        Handoff::Misdirected { from, ecn: Ecn::NotEct, datagram: vec![4; 32] }
    }

    /// In what place of the order each is served to which `is_it` applies.
    fn places(handoffs: &mut Handoffs, is_it: impl Fn(&Handoff) -> bool) -> Vec<usize> {
        handoffs.collect(NOW);
        let mut places = Vec::new();
        for place in 0.. {
            let Some(handoff) = handoffs.next(NOW).or_else(|| {
                handoffs.end_turn();
                handoffs.next(NOW)
            }) else {
                break;
            };
            if is_it(&handoff) {
                places.push(place);
            }
        }
        places
    }

    #[test]
    fn nobody_waits_behind_one_clients_flood_nor_behind_strangers() {
        let (sender, receiver) = mpsc::sync_channel(HANDOFF_QUEUE);
        let mut handoffs = Handoffs::new(receiver);
        for _ in 0..300 {
            sender.try_send(to_peer(FLOODING, 1_400)).unwrap();
            sender.try_send(inbound(None)).unwrap();
            sender.try_send(inbound(Some(FLOODED))).unwrap();
        }
        sender.try_send(to_peer(QUIET, 84)).unwrap();
        sender.try_send(inbound(Some(QUIET))).unwrap();
        sender.try_send(initiation()).unwrap();
        let is_quiet = |handoff: &Handoff| {
            matches!(handoff.owner(), Owner::Handshake) || handoff.owner() == Owner::Client(QUIET)
        };
        let places = places(&mut handoffs, is_quiet);
        assert_eq!(places.len(), 3, "nothing is lost");
        assert!(places.iter().all(|&place| place < 600), "{places:?}: after one quantum of each flood");
        assert!(!handoffs.is_waiting());
    }

    #[test]
    fn what_does_not_fit_or_waits_too_long_is_the_floods_and_is_counted() {
        let (sender, receiver) = mpsc::sync_channel(HANDOFF_QUEUE);
        let mut handoffs = Handoffs::new(receiver);
        let mut quiet = 0;
        for ms in 0..400 {
            let now = NOW + Duration::from_millis(ms);
            for _ in 0..20 {
                sender.try_send(to_peer(FLOODING, 60_000)).unwrap();
            }
            sender.try_send(to_peer(QUIET, 84)).unwrap();
            handoffs.collect(now);
            while let Some(handoff) = handoffs.next(now) {
                quiet += usize::from(handoff.owner() == Owner::Client(QUIET));
            }
            handoffs.end_turn();
        }
        assert_eq!(quiet, 400);
        assert!(handoffs.drops().get(DropReason::QueueShare) > 0);
        assert!(handoffs.drops().get(DropReason::QueueDelay) > 0);
    }

    /// A superpacket of `segments` segments of `size` bytes.
    fn superpacket(client: Ipv4Addr, segments: usize, size: usize) -> Handoff {
        let gso = Some(Gso { kind: GsoKind::Tcp4, segment_size: size as u16 });
        let packet = Template { destination: client, ..Template::default() }.tcp(&payload(segments * size));
        Handoff::ToPeer { packet, offload: Offload { gso, ..Offload::NONE }, client }
    }

    #[test]
    fn a_superpacket_that_dies_while_it_waits_is_counted_as_its_segments() {
        let (sender, receiver) = mpsc::sync_channel(HANDOFF_QUEUE);
        let mut handoffs = Handoffs::new(receiver);
        let (mut sent, mut served) = (0, 0);
        for ms in 0..400 {
            let now = NOW + Duration::from_millis(ms);
            for _ in 0..20 {
                sender.try_send(superpacket(FLOODING, 40, 1_400)).unwrap();
                sent += 40;
            }
            handoffs.collect(now);
            served += 40 * std::iter::from_fn(|| handoffs.next(now)).count() as u64;
            handoffs.end_turn();
        }
        let last = NOW + Duration::from_millis(400);
        while handoffs.is_waiting() {
            served += 40 * std::iter::from_fn(|| handoffs.next(last)).count() as u64;
            handoffs.end_turn();
        }
        let dropped =
            [DropReason::QueueShare, DropReason::QueueDelay].map(|reason| handoffs.drops().get(reason));
        assert!(dropped.iter().all(|&dropped| dropped > 0), "{dropped:?}");
        assert_eq!(served + dropped.iter().sum::<u64>(), sent);
    }

    #[test]
    fn a_superpacket_pays_for_each_of_its_segments_however_small() {
        let (sender, receiver) = mpsc::sync_channel(HANDOFF_QUEUE);
        let mut handoffs = Handoffs::new(receiver);
        for _ in 0..60 {
            sender.try_send(superpacket(FLOODING, 100, 16)).unwrap();
        }
        handoffs.collect(NOW);
        let served = std::iter::from_fn(|| handoffs.next(NOW)).count();
        assert_eq!(served, 8 * QUANTUM / (100 * 256) + 1);
    }

    #[test]
    fn a_turn_serves_a_bounded_share() {
        let (sender, receiver) = mpsc::sync_channel(HANDOFF_QUEUE);
        let mut handoffs = Handoffs::new(receiver);
        for _ in 0..HANDOFF_QUEUE {
            sender.try_send(to_peer(FLOODING, 84)).unwrap();
        }
        handoffs.collect(NOW);
        assert_eq!(std::iter::from_fn(|| handoffs.next(NOW)).count(), TURN.packets);
        assert!(handoffs.is_waiting());
    }

    #[test]
    fn a_turn_serves_few_handshakes() {
        let (sender, receiver) = mpsc::sync_channel(HANDOFF_QUEUE);
        let mut handoffs = Handoffs::new(receiver);
        for _ in 0..TURN.packets {
            sender.try_send(initiation()).unwrap();
        }
        handoffs.collect(NOW);
        let mut served = 0;
        while handoffs.next(NOW).is_some() {
            handoffs.charge(QUANTUM / 2);
            served += 1;
        }
        assert_eq!(served, 16);
    }

    #[test]
    fn word_of_a_session_comes_once_and_in_order_and_of_too_many_the_latest() {
        let begun = BegunSessions::default();
        let teller = begun.clone();
        [7, 8].into_iter().for_each(|index| teller.tell(index));
        assert_eq!((begun.take(), begun.take()), ([7, 8].into(), [].into()));
        (0..OWN_SESSIONS as u32 + 2).for_each(|index| teller.tell(index));
        assert!(begun.take().into_iter().eq(2..OWN_SESSIONS as u32 + 2));
    }

    #[test]
    fn forged_data_keeps_no_handshake_from_being_handed_over() {
        let (sender, receiver) = mpsc::sync_channel(HANDOFF_QUEUE);
        let mut handoffs = Handoffs::new(receiver);
        let mut handshakes = 0;
        for ms in 0..200 {
            let now = NOW + Duration::from_millis(ms);
            for _ in 0..2 * TURN.packets {
                sender.try_send(misdirected()).unwrap();
            }
            sender.try_send(initiation()).unwrap();
            handoffs.collect(now);
            let served = std::iter::from_fn(|| handoffs.next(now));
            handshakes += served.filter(|handoff| handoff.owner() == Owner::Handshake).count();
            handoffs.end_turn();
        }
        assert_eq!(handshakes, 200);
        assert!(handoffs.drops().get(DropReason::QueueDelay) > 0, "of the flood");
    }
}
