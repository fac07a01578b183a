//! Which buffers of the arena one device may receive into, and which still hold packets that wait.
//!
//! Theory of operation. A device receives into *slots*: the rest of a buffer, behind what came into it before. A buffer
//! with room for another packet of the largest size is *ready*; one that has none rests until all of its packets have
//! gone, and begins anew. So many small packets share a buffer without being copied, and the buffer that was used last
//! is used next, while it is still in the processor's cache.
//!
//! A small packet that waits long would keep a buffer from receiving that could take two large ones. Where that
//! threatens, small packets are copied out of the slots into a buffer that nothing is received into ([`Pool::pack`]).

use crate::arena::{BUFFER_SIZE, LARGEST_PACKET, Slot, Span};

/// Where the next packet of a buffer may begin: on a cache line of its own.
const ALIGNMENT: usize = 64;

/// What is known of one buffer.
#[derive(Clone, Copy, Default, Debug)]
struct Use {
    /// Packets that lie in it.
    packets: u32,
    /// Bytes up to the end of the last one.
    end: usize,
    /// Whether it is in the list of those with room.
    ready: bool,
}

impl Use {
    fn has_room(&self) -> bool {
        self.end + LARGEST_PACKET <= BUFFER_SIZE
    }
}

/// The buffers of one device: a range of the arena's.
#[derive(Debug)]
pub struct Pool {
    first: usize,
    uses: Vec<Use>,
    /// Those with room, by their place in `uses`; the last one is lent first.
    ready: Vec<usize>,
    /// The one into which small packets are copied. It is not ready, whatever lies in it.
    packing: Option<usize>,
}

impl Pool {
    /// All of the arena's `buffers`, empty.
    pub fn new(buffers: std::ops::Range<usize>) -> Self {
        Self {
            first: buffers.start,
            ready: (0..buffers.len()).rev().collect(),
            uses: vec![Use { ready: true, ..Use::default() }; buffers.len()],
            packing: None,
        }
    }

    /// Fills `slots` with places to receive into, `limit` at most, each in another buffer. They stay lent until the
    /// next call; what was received is named by [`Self::keep`].
    pub fn lend(&mut self, limit: usize, slots: &mut Vec<Slot>) {
        slots.clear();
        let mut at = self.ready.len();
        while at > 0 && slots.len() < limit {
            at -= 1;
            let place = self.ready[at];
            let buffer = &mut self.uses[place];
            if buffer.has_room() {
                slots.push(Slot { buffer: self.first + place, start: buffer.end });
            } else {
                // Rare: once for every 66,000 bytes. The order of the others is worth the move.
                buffer.ready = false;
                self.ready.remove(at);
            }
        }
    }

    /// Where a packet of `len` bytes may be copied to, close behind others; `None` if no buffer is empty. It is to be
    /// named by [`Self::keep`] then. All that came into slots is to be kept before: until then, what it lies in seems
    /// empty.
    pub fn pack(&mut self, len: usize) -> Option<Slot> {
        let with_room = self.packing.filter(|&place| self.uses[place].end + len <= BUFFER_SIZE);
        let place = match with_room {
            Some(place) => place,
            None => {
                let at = self.ready.iter().rposition(|&place| self.uses[place].packets == 0)?;
                let place = self.ready.remove(at);
                self.uses[place].ready = false;
                self.packing = Some(place); // the one before is full, and rests
                place
            }
        };
        Some(Slot { buffer: self.first + place, start: self.uses[place].end })
    }

    /// A packet has been received into a slot that was lent: it stays until [`Self::release`].
    pub fn keep(&mut self, packet: Span) {
        let buffer = &mut self.uses[packet.buffer as usize - self.first];
        buffer.packets += 1;
        buffer.end = packet.range().end.next_multiple_of(ALIGNMENT);
    }

    /// A packet that was kept has been copied elsewhere, before anything else was received into its buffer: what it
    /// took of that can be had again.
    pub fn take_back(&mut self, packet: Span) {
        let buffer = &mut self.uses[packet.buffer as usize - self.first];
        // Slots begin at such places, and the packet less than that behind its slot's begin, after its link header.
        buffer.end = buffer.end.min(packet.start as usize / ALIGNMENT * ALIGNMENT);
        self.release(packet);
    }

    /// A packet that was kept is gone.
    pub fn release(&mut self, packet: Span) {
        let place = packet.buffer as usize - self.first;
        let buffer = &mut self.uses[place];
        buffer.packets -= 1;
        if buffer.packets == 0 {
            buffer.end = 0;
            if !buffer.ready && self.packing != Some(place) {
                buffer.ready = true;
                self.ready.push(place);
            }
        }
    }

    /// How many packets lie in the buffers.
    #[cfg(test)]
    pub fn kept(&self) -> usize {
        self.uses.iter().map(|buffer| buffer.packets as usize).sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lend(pool: &mut Pool, limit: usize) -> Vec<Slot> {
        let mut slots = Vec::new();
        pool.lend(limit, &mut slots);
        slots
    }

    /// A packet of `len` bytes in `slot`, behind some headers.
    fn packet(slot: Slot, len: usize) -> Span {
        Span::new(slot.buffer, slot.start + 24..slot.start + 24 + len)
    }

    #[test]
    fn the_buffer_that_was_used_last_is_used_next() {
        let mut pool = Pool::new(3..10);
        for _ in 0..100 {
            let slot = lend(&mut pool, 1)[0];
            assert_eq!(slot, Slot::whole(3));
            pool.keep(packet(slot, 1_400));
            pool.release(packet(slot, 1_400));
        }
    }

    #[test]
    fn small_packets_share_a_buffer_and_large_ones_fill_it() {
        let mut pool = Pool::new(0..1);
        let mut small = 0;
        while let [slot] = lend(&mut pool, 8)[..] {
            pool.keep(packet(slot, 100));
            small += 1;
        }
        assert!(small > 500, "only {small} packets of 100 bytes");

        let mut pool = Pool::new(0..1);
        let slot = lend(&mut pool, 8)[0];
        pool.keep(packet(slot, 65_535));
        let slot = lend(&mut pool, 8)[0];
        pool.keep(packet(slot, 65_535));
        assert_eq!(lend(&mut pool, 8), []);
    }

    #[test]
    fn small_packets_are_packed_where_nothing_is_received_and_their_buffers_come_back() {
        let mut pool = Pool::new(0..3);
        let mut packed = Vec::new();
        for _ in 0..150 {
            let slot = pool.pack(1_400).unwrap();
            let packet = Span::new(slot.buffer, slot.start..slot.start + 1_400);
            pool.keep(packet);
            packed.push(packet);
        }
        let used: std::collections::HashSet<_> = packed.iter().map(|packet| packet.buffer).collect();
        assert_eq!(used.len(), 2, "90 fit into one");
        assert_eq!(lend(&mut pool, 8).len(), 1, "nothing is received into those");
        packed.drain(..).for_each(|packet| pool.release(packet));
        assert_eq!(lend(&mut pool, 8).len(), 2, "the full one is ready again, the other one goes on");
        for _ in 0..4 {
            let slot = lend(&mut pool, 1)[0];
            pool.keep(packet(slot, 65_535));
        }
        assert!(pool.pack(1_400).is_some());
        assert_eq!(pool.pack(BUFFER_SIZE + 1), None, "no buffer is empty");
    }

    #[test]
    fn what_a_packet_took_that_is_packed_can_be_had_again() {
        let mut pool = Pool::new(0..1);
        let large = packet(lend(&mut pool, 1)[0], 65_535);
        pool.keep(large);
        for _ in 0..100 {
            let slot = lend(&mut pool, 1)[0];
            let small = packet(slot, 100);
            pool.keep(small);
            pool.take_back(small);
            assert_eq!(lend(&mut pool, 1), [slot]);
        }
    }

    #[test]
    fn a_buffer_begins_anew_when_all_of_its_packets_have_gone() {
        let mut pool = Pool::new(0..1);
        let first = packet(lend(&mut pool, 1)[0], 60_000);
        pool.keep(first);
        let second = packet(lend(&mut pool, 1)[0], 60_000);
        pool.keep(second);
        assert_eq!(lend(&mut pool, 1), []);
        pool.release(first);
        assert_eq!(lend(&mut pool, 1), [], "the second one is still there");
        pool.release(second);
        assert_eq!(lend(&mut pool, 1), [Slot::whole(0)]);
    }

    /// How many slots are lent, how long the packet is that comes into each, whether such packets are packed, and which
    /// of those that wait goes then.
    fn step() -> impl Strategy<Value = (usize, usize, bool, prop::sample::Index)> {
        (
            1..9usize,
            prop_oneof![Just(65_535usize), 1..3_000usize],
            any::<bool>(),
            any::<prop::sample::Index>(),
        )
    }

    fn are_apart(packet: Span, waiting: &[Span]) -> bool {
        waiting.iter().all(|other| {
            other.buffer != packet.buffer
                || other.range().end <= packet.range().start
                || packet.range().end <= other.range().start
        })
    }

    proptest! {
        #[test]
        fn no_two_packets_that_wait_overlap_and_every_buffer_comes_back(
            steps in prop::collection::vec(step(), 1..200)
        ) {
            let mut pool = Pool::new(2..6);
            let mut waiting: Vec<Span> = Vec::new();
            for (limit, len, is_packed, which) in steps {
                let before = waiting.len();
                for slot in lend(&mut pool, limit) {
                    prop_assert!((2..6).contains(&slot.buffer) && slot.start + LARGEST_PACKET <= BUFFER_SIZE);
                    let received = packet(slot, len);
                    prop_assert!(are_apart(received, &waiting), "{:?} over {:?}", received, waiting);
                    pool.keep(received);
                    waiting.push(received);
                }
                let to_pack = if is_packed { before..waiting.len() } else { 0..0 };
                for at in to_pack {
                    let Some(slot) = pool.pack(len) else { break };
                    prop_assert!(slot.start + len <= BUFFER_SIZE);
                    let packed = Span::new(slot.buffer, slot.start..slot.start + len);
                    prop_assert!(are_apart(packed, &waiting), "{:?} over {:?}", packed, waiting);
                    pool.keep(packed);
                    pool.take_back(std::mem::replace(&mut waiting[at], packed));
                }
                if !waiting.is_empty() {
                    pool.release(waiting.swap_remove(which.index(waiting.len())));
                }
            }
            for packet in waiting {
                pool.release(packet);
            }
            prop_assert_eq!(pool.kept(), 0);
            let mut slots = lend(&mut pool, 100);
            slots.sort_by_key(|slot| slot.buffer);
            let packing = pool.packing.map(|place| pool.first + place);
            let others = (2..6).filter(|&buffer| Some(buffer) != packing);
            prop_assert_eq!(slots, others.map(Slot::whole).collect::<Vec<_>>());
        }
    }
}
