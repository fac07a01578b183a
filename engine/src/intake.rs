//! What one device has brought and the core has not taken yet: its buffers, and fair queues of what lies in them.
//!
//! Theory of operation. A kernel's socket buffer serves first come, first served, and does not let anybody look into
//! it. So in each turn the shard first empties it into a [`FairQueue`] ([`Intake::room`], [`Intake::accept`]), and then
//! takes from there what the turn may serve ([`Intake::next`]). Packets that were taken are rewritten in place and sent
//! at the turn's end; then their buffers are free again ([`Intake::end_turn`]).
//!
//! A turn reads about twice what it serves: so a backlog moves out of the kernel's buffer, and a flood beyond what the
//! gateway can carry dies in the kernel, at less cost. Looking ahead has its price, since what waits here leaves the
//! processor's cache. So as long as one client is alone, and nobody can be in another's way, a turn reads no more than
//! it serves, unless its backlog stands in the kernel.

use std::hash::Hash;
use std::ops::Range;
use std::time::Duration;

use crate::arena::{Arena, Slot, Span};
use crate::clock::Timestamp;
use crate::drop_reason::{DropCounters, DropReason};
use crate::fair_queue::codel::INTERVAL;
use crate::fair_queue::{Amount, FairQueue, Owner, QUANTUM, price};
use crate::handoffs::HANDOFF_QUEUE;
use crate::pool::Pool;

/// At most this much is served in a turn while one client is alone. The longer a turn is, the less it costs per byte.
const TURN_UNCONTENDED: Amount = Amount { packets: 32, bytes: 8 * QUANTUM };
/// Nothing more is read in such a turn while this much waits: after the first read, if that brought superpackets.
const READ_LIMIT_UNCONTENDED: Amount = Amount { packets: 32, bytes: 2 * QUANTUM };
/// At most this much is served in a turn while packets of several clients come: nobody can overtake what it has begun.
const TURN_CONTENDED: Amount = Amount { packets: 32, bytes: 3 * QUANTUM };
/// Of the datagrams of trains, and the segments of superpackets, at most so many are served in a turn: all of them may
/// have to be handed to one other shard. With the last train, which has 128 at most (`UDP_MAX_SEGMENTS` of linux/udp.h
/// since 6.9), they fill three quarters of the queue before it, and leave the rest to handshakes and other clients.
const TURN_SEGMENTS: usize = HANDOFF_QUEUE * 3 / 4 - 128;
/// At most this much is read in a turn.
const READ_LIMIT: Amount = Amount { packets: 64, bytes: 16 * QUANTUM };
/// How long turns are held to be contended after packets of several clients have come, or a backlog stood in the
/// kernel.
const CONTENTION_MEMORY: Duration = Duration::from_secs(10);
/// The same after packets of unknown senders: a flood of them contends, a handshake or a scan now and then hardly does.
const CONTENTION_MEMORY_UNKNOWN: Duration = Duration::from_millis(100);
/// Packets of the first read of a turn.
const FIRST_READ: usize = 8;
/// Packets of each further read.
const NEXT_READ: usize = 24;

/// Packets of at most this many bytes are copied where several clients' packets come: they may wait for a while.
const SMALL: usize = 4 * 1024;

/// What may wait for one device: as much as in the kernel's buffer before it.
const BOUNDS: Amount = Amount { packets: 8_192, bytes: 8 * 1024 * 1024 };

/// A received packet or train.
pub trait Arrival: Copy {
    /// Where it lies.
    fn span(&self) -> Span;
    /// The same, that lies elsewhere now.
    fn moved_to(self, span: Span) -> Self;
    /// How many packets it is, for the drop counters: a superpacket of the external interface is one, as in all that is
    /// dropped before the router.
    fn packets(&self) -> u64;
    /// How many packets are opened for it, or sealed, at most, one by one: that is what it is charged for.
    fn segments(&self) -> usize;
}

/// What one device has brought.
pub struct Intake<K, T> {
    pool: Pool,
    queue: FairQueue<Owner<K>, T>,
    /// Whose packet came last, of those known, and until when it counts that others' came, too.
    last: Option<K>,
    contended_until: Timestamp,
    /// Since when the kernel has had more each time than was read.
    backlog_since: Option<Timestamp>,
    slots: Vec<Slot>,
    arrived: Vec<T>,
    read: Amount,
    served: Amount,
    served_segments: usize,
    taken: Vec<Span>,
    drops: DropCounters,
}

impl<K: Copy + Eq + Hash, T: Arrival> Intake<K, T> {
    /// Nothing, and `buffers` of the arena to receive into.
    pub fn new(buffers: Range<usize>) -> Self {
        Self {
            pool: Pool::new(buffers),
            queue: FairQueue::new(BOUNDS),
            last: None,
            contended_until: Timestamp::ORIGIN,
            backlog_since: None,
            slots: Vec::with_capacity(NEXT_READ),
            arrived: Vec::with_capacity(NEXT_READ),
            read: Amount::default(),
            served: Amount::default(),
            served_segments: 0,
            taken: Vec::with_capacity(TURN_UNCONTENDED.packets),
            drops: DropCounters::default(),
        }
    }

    /// Whether something waits for the next turn.
    pub fn is_waiting(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Packets that died while they waited.
    pub fn drops(&self) -> &DropCounters {
        &self.drops
    }

    /// Where to receive next, and the list to append to; `None` if that was enough for this turn, or all buffers are
    /// full.
    pub fn room(&mut self, now: Timestamp) -> Option<(&[Slot], &mut Vec<T>)> {
        let stocked = !self.is_contended(now) && self.queue.waiting().reaches(READ_LIMIT_UNCONTENDED);
        if stocked || self.read.reaches(READ_LIMIT) {
            return None;
        }
        let limit = if self.read.packets == 0 { FIRST_READ } else { NEXT_READ };
        self.pool.lend(limit, &mut self.slots);
        self.arrived.clear();
        (!self.slots.is_empty()).then_some((&self.slots, &mut self.arrived))
    }

    /// Queues what the last read has brought into `arena`, each packet under the owner that `owner` finds. Returns
    /// whether there may be more.
    ///
    /// `half_full`, whether the kernel's buffer is so even now, is asked once an interval while there has always been
    /// more: if it is, a queue stands there.
    pub fn accept(
        &mut self,
        now: Timestamp,
        arena: &mut Arena,
        half_full: impl FnOnce() -> bool,
        owner: impl Fn(&Arena, &T) -> Owner<K>,
    ) -> bool {
        let Self { pool, queue, last, contended_until, backlog_since, arrived, read, slots, drops, .. } =
            self;
        let more = arrived.len() == slots.len();
        *backlog_since = more.then(|| backlog_since.unwrap_or(now));
        if backlog_since.is_some_and(|since| now.since(since) >= INTERVAL) {
            *backlog_since = Some(now);
            if half_full() {
                *contended_until = now + CONTENTION_MEMORY;
            }
        }
        for &packet in &*arrived {
            pool.keep(packet.span());
        }
        for packet in arrived.drain(..) {
            let bytes = packet.span().len as usize;
            read.packets += 1;
            read.bytes += bytes;
            if bytes == 0 {
                // A UDP datagram may be empty; there is nothing in it to wait for.
                drops.count(DropReason::NotWireGuard);
                pool.release(packet.span());
                continue;
            }
            let owner = owner(arena, &packet);
            let client = owner.client();
            if last.is_some() && client != *last {
                let counts_for = if client.is_some() { CONTENTION_MEMORY } else { CONTENTION_MEMORY_UNKNOWN };
                *contended_until = (*contended_until).max(now + counts_for);
            }
            *last = client.or(*last);
            let packet = if now < *contended_until { packed(packet, pool, arena) } else { packet };
            queue.push(owner, packet, price(packet.segments(), bytes), now, |packet| {
                drops.add(DropReason::QueueShare, packet.packets());
                pool.release(packet.span());
            });
        }
        more
    }

    /// The packet to be served next in this turn; `None` if that was enough.
    pub fn next(&mut self, now: Timestamp) -> Option<T> {
        let limit = if self.is_contended(now) { TURN_CONTENDED } else { TURN_UNCONTENDED };
        if self.served.reaches(limit) || self.served_segments >= TURN_SEGMENTS {
            return None;
        }
        let (packet, price) = self.queue.pop(now, |packet| {
            self.drops.add(DropReason::QueueDelay, packet.packets());
            self.pool.release(packet.span());
        })?;
        self.served.packets += 1;
        self.served.bytes += price;
        self.served_segments += packet.segments();
        self.taken.push(packet.span());
        Some(packet)
    }

    /// What the packet that was served last has cost beyond its bytes.
    pub fn charge(&mut self, work: usize) {
        self.served.bytes += work;
        self.queue.charge(work);
    }

    /// Whether packets of several clients have come lately, or those of one stood in the kernel.
    fn is_contended(&self, now: Timestamp) -> bool {
        now < self.contended_until
    }

    /// What was taken in this turn has been sent.
    pub fn end_turn(&mut self) {
        for packet in self.taken.drain(..) {
            self.pool.release(packet);
        }
        self.read = Amount::default();
        self.served = Amount::default();
        self.served_segments = 0;
    }
}

/// Moves a small packet from where large ones could be received to others of its size.
fn packed<T: Arrival>(packet: T, pool: &mut Pool, arena: &mut Arena) -> T {
    let span = packet.span();
    let len = span.len as usize;
    if len > SMALL {
        return packet;
    }
    let Some(slot) = pool.pack(len) else { return packet };
    let place = Span::new(slot.buffer, slot.start..slot.start + len);
    arena.copy(span, place);
    pool.keep(place);
    pool.take_back(span);
    packet.moved_to(place)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    struct Packet {
        client: char,
        span: Span,
    }

    impl Arrival for Packet {
        fn span(&self) -> Span {
            self.span
        }

        fn moved_to(self, span: Span) -> Self {
            Self { span, ..self }
        }

        fn packets(&self) -> u64 {
            10
        }

        fn segments(&self) -> usize {
            1
        }
    }

    /// An intake, and the arena into which is received.
    struct Device {
        intake: Intake<char, Packet>,
        arena: Arena,
    }

    impl Device {
        fn new(buffers: usize) -> Self {
            Self { intake: Intake::new(0..buffers), arena: Arena::new(buffers) }
        }
    }

    const SUPERPACKET: usize = 65_000;
    const NOW: Timestamp = Timestamp::from_secs(10);

    /// The kernel's buffer: what a device would hand over, in the order of its arrival.
    type Kernel = Vec<(char, usize)>;

    /// As many superpackets as fill half of it.
    const HALF: usize = 40;

    fn read(Device { intake, arena }: &mut Device, kernel: &mut Kernel, now: Timestamp) {
        while let Some((slots, arrived)) = intake.room(now) {
            let count = kernel.len().min(slots.len());
            arrived.extend(slots.iter().zip(kernel.drain(..count)).map(|(slot, (client, len))| Packet {
                client,
                span: Span::new(slot.buffer, slot.start + 24..slot.start + 24 + len), // behind its headers
            }));
            let owner = |_: &Arena, packet: &Packet| match packet.client {
                '?' => Owner::Unknown,
                '!' => Owner::Handshake,
                client => Owner::Client(client),
            };
            if !intake.accept(now, arena, || kernel.len() > HALF, owner) {
                return;
            }
        }
    }

    fn turn(device: &mut Device, kernel: &mut Kernel, now: Timestamp) -> String {
        read(device, kernel, now);
        let intake = &mut device.intake;
        let mut order = String::new();
        while let Some(packet) = intake.next(now) {
            order.push(packet.client);
        }
        intake.end_turn();
        order
    }

    #[test]
    fn a_client_alone_gets_long_turns_and_its_backlog_stays_in_the_kernel() {
        let mut device = Device::new(96);
        let mut kernel = vec![('a', SUPERPACKET); 20];
        assert_eq!(turn(&mut device, &mut kernel, NOW), "aaaaaaaa");
        assert_eq!((kernel.len(), device.intake.is_waiting()), (12, false));
        let mut kernel = vec![('a', 100); 1_000];
        assert_eq!(turn(&mut device, &mut kernel, NOW).len(), TURN_UNCONTENDED.packets);
        assert_eq!((kernel.len(), device.intake.is_waiting()), (1_000 - TURN_UNCONTENDED.packets, false));
    }

    #[test]
    fn a_ping_behind_a_backlog_in_the_kernel_is_served_in_the_turn_that_finds_it() {
        let mut device = Device::new(96);
        turn(&mut device, &mut vec![('a', 84), ('b', 84)], NOW);
        let mut kernel = vec![('a', SUPERPACKET); 20];
        kernel.push(('b', 84));
        let order = turn(&mut device, &mut kernel, NOW);
        assert_eq!(order.find('b'), Some(2), "{order}: a quantum for each");
        assert!(kernel.is_empty() && device.intake.is_waiting(), "what waits is where one can choose");
    }

    #[test]
    fn contention_is_remembered_for_some_seconds_and_an_unknown_senders_packet_for_a_moment() {
        let mut device = Device::new(96);
        turn(&mut device, &mut vec![('?', 148)], NOW);
        turn(&mut device, &mut vec![('a', 84)], NOW);
        assert!(!device.intake.is_contended(NOW), "a client and its own handshake");
        turn(&mut device, &mut vec![('?', 148)], NOW);
        turn(&mut device, &mut vec![('a', 84)], NOW);
        assert!(device.intake.is_contended(NOW), "a flood of strangers would come on");
        assert!(!device.intake.is_contended(NOW + CONTENTION_MEMORY_UNKNOWN));
        turn(&mut device, &mut vec![('b', 84), ('?', 148)], NOW);
        assert!(device.intake.is_contended(NOW + CONTENTION_MEMORY - Duration::from_millis(1)));
        assert!(!device.intake.is_contended(NOW + CONTENTION_MEMORY));
    }

    #[test]
    fn a_backlog_of_one_client_that_stands_in_the_kernel_is_taken_out_and_watched() {
        let mut device = Device::new(96);
        let mut kernel = Kernel::new();
        let mut dropped_after = None;
        for ms in 0..1_000 {
            let now = NOW + Duration::from_millis(ms);
            kernel.extend([('a', SUPERPACKET); 9]); // one more than a turn serves
            turn(&mut device, &mut kernel, now);
            if device.intake.drops().get(DropReason::QueueDelay) > 0 {
                dropped_after.get_or_insert(ms);
            }
        }
        let after = dropped_after.unwrap();
        assert!((200..500).contains(&after), "one interval in the kernel, one in the queue, not {after} ms");
    }

    #[test]
    fn a_backlog_that_is_short_or_gone_soon_stays_in_the_kernel() {
        let mut device = Device::new(96);
        let mut kernel = vec![('a', SUPERPACKET); HALF - 8];
        for ms in 0..1_000 {
            let now = NOW + Duration::from_millis(ms);
            kernel.extend([('a', SUPERPACKET); 8]);
            turn(&mut device, &mut kernel, now);
            assert!(!device.intake.is_contended(now), "short, after {ms} ms");
        }
        let mut device = Device::new(96);
        for ms in 0..1_000 {
            let now = NOW + Duration::from_millis(ms);
            let waiting = if ms % 90 == 0 { 3 } else { 2 * HALF };
            turn(&mut device, &mut vec![('a', SUPERPACKET); waiting], now);
            assert!(!device.intake.is_contended(now), "gone soon, after {ms} ms");
        }
    }

    #[test]
    fn a_turn_reads_little_more_than_it_serves() {
        let mut device = Device::new(96);
        turn(&mut device, &mut vec![('a', 84), ('b', 84)], NOW);
        let mut kernel = vec![('a', 100); 1_000];
        assert_eq!(turn(&mut device, &mut kernel, NOW).len(), TURN_CONTENDED.packets);
        assert!(1_000 - kernel.len() < 3 * TURN_CONTENDED.packets, "a flood stays in the kernel");
    }

    #[test]
    fn what_waits_too_long_is_counted_and_so_is_what_does_not_fit() {
        let mut device = Device::new(96);
        let mut now = NOW;
        for _ in 0..400 {
            // Twice as much arrives as is served, and somebody else is there.
            let mut kernel = vec![('a', SUPERPACKET); 6];
            kernel.push(('b', 84));
            turn(&mut device, &mut kernel, now);
            now = now + Duration::from_millis(1);
        }
        assert!(device.intake.drops().get(DropReason::QueueDelay) > 0, "{:?}", device.intake.drops());
        assert!(device.intake.drops().get(DropReason::QueueShare) > 0, "{:?}", device.intake.drops());
        assert_eq!(
            device.intake.drops().get(DropReason::QueueShare) % 10,
            0,
            "a train counts as its datagrams"
        );
    }

    #[test]
    fn a_handshake_waits_for_nobodys_forged_data() {
        let mut device = Device::new(96);
        let mut kernel = vec![('?', 1_400); 60];
        kernel.insert(55, ('!', 148));
        kernel.insert(30, ('a', 84));
        let order = turn(&mut device, &mut kernel, NOW) + &turn(&mut device, &mut kernel, NOW);
        assert!(order.find('!').unwrap() > order.find('?').unwrap(), "it came last: {order}");
        assert!(order.trim_end_matches('?').len() < 55, "it did not wait for all that came before: {order}");
    }

    #[test]
    fn a_turn_of_handshakes_is_as_long_as_one_of_superpackets() {
        let mut device = Device::new(96);
        read(&mut device, &mut vec![('!', 148); 32], NOW);
        let mut served = 0;
        while device.intake.next(NOW).is_some() {
            device.intake.charge(QUANTUM / 2);
            served += 1;
        }
        assert_eq!(served, 16);
        device.intake.end_turn();
        assert!(device.intake.is_waiting());
    }

    #[test]
    fn empty_datagrams_are_counted_and_never_wait() {
        let mut device = Device::new(96);
        let mut kernel = vec![('?', 0); 1_000];
        kernel.push(('a', 84));
        let mut turns = 0;
        while turn(&mut device, &mut kernel, NOW).is_empty() {
            turns += 1;
            assert!(!device.intake.is_waiting(), "a turn reads a bounded share, and drops it");
        }
        assert!(turns >= 1_000 / (READ_LIMIT.packets + NEXT_READ), "{turns}");
        assert_eq!(device.intake.drops().get(DropReason::NotWireGuard), 1_000);
        assert_eq!(device.intake.pool.kept(), 0);
    }

    #[test]
    fn every_buffer_comes_back() {
        let mut device = Device::new(8);
        let mut now = NOW;
        for n in (0..=255u8).cycle().take(1_000) {
            let kernel = &mut vec![(char::from(b'a' + n % 7), if n % 3 == 0 { SUPERPACKET } else { 500 }); 5];
            turn(&mut device, kernel, now);
            now = now + Duration::from_millis(u64::from(n % 4));
        }
        while device.intake.is_waiting() {
            turn(&mut device, &mut Kernel::new(), now);
        }
        assert_eq!(device.intake.pool.kept(), 0);
    }

    #[test]
    fn one_clients_small_packets_between_anothers_superpackets_keep_nobody_out() {
        for (superpackets, small) in [(4, 4), (4, 16), (8, 1), (8, 4)] {
            let mut device = Device::new(96);
            turn(&mut device, &mut vec![('a', 84), ('b', 84)], NOW);
            let mut kernel = Kernel::new();
            let (mut came, mut longest) = (None, 0);
            for n in 0..2_000 {
                let now = NOW + Duration::from_micros(150) * n;
                for _ in 0..superpackets {
                    kernel.push(('a', SUPERPACKET));
                    kernel.extend(vec![('b', 100); small]);
                }
                if n % 50 == 0 && came.is_none() {
                    kernel.push(('c', 84));
                    came = Some(n);
                }
                // The kernel's buffer is bounded, too: a small packet costs it some 768 bytes.
                let mut bytes = 0;
                kernel.retain(|&(_, len)| {
                    bytes += len.max(768);
                    bytes < 8 << 20
                });
                if turn(&mut device, &mut kernel, now).contains('c') {
                    longest = longest.max(came.take().map_or(0, |came| n - came));
                }
            }
            assert!(longest <= 10, "{superpackets} × (1 + {small}): it waited for {longest} turns");
        }
    }
}
