//! The link between clients and gateway, and what may happen on it.

use tidegate_engine::wire::Ecn;

use super::world::Train;

/// Chances are in percent per datagram. The same seed does the same.
#[derive(Clone)]
pub struct Link {
    pub loss: u64,
    pub duplication: u64,
    pub corruption: u64,
    /// Whether the datagrams of a train arrive in another order.
    pub shuffles: bool,
    /// What its routers write into the outer headers.
    pub ecn: Ecn,
    random: u64,
    /// What it did: lost, repeated, damaged.
    pub done: [u64; 3],
}

impl Link {
    /// Trains arrive as they were sent.
    pub fn perfect() -> Self {
        let (random, done) = (0, [0; 3]);
        Self { loss: 0, duplication: 0, corruption: 0, shuffles: false, ecn: Ecn::NotEct, random, done }
    }

    /// A perfect link for now, whose chances a test then sets.
    pub fn seeded(seed: u64) -> Self {
        Self { random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, ..Self::perfect() }
    }

    pub fn pass(&mut self, train: Train) -> Vec<Train> {
        let train = Train { ecn: self.ecn, ..train };
        if self.loss + self.duplication + self.corruption == 0 && !self.shuffles {
            return vec![train];
        }
        let mut datagrams: Vec<Vec<u8>> = Vec::new();
        for datagram in train.bytes.chunks(train.segment_size) {
            if self.chance(self.loss) {
                self.done[0] += 1;
                continue;
            }
            let mut datagram = datagram.to_vec();
            if self.chance(self.duplication) {
                self.done[1] += 1;
                datagrams.push(datagram.clone());
            } else if self.chance(self.corruption) {
                self.done[2] += 1;
                let at = self.draw() as usize % datagram.len();
                datagram[at] ^= 1 << (self.draw() % 8);
            }
            datagrams.push(datagram);
        }
        if self.shuffles {
            for i in (1..datagrams.len()).rev() {
                let other = self.draw() as usize % (i + 1);
                datagrams.swap(i, other);
            }
        }
        let single = |bytes: Vec<u8>| Train { segment_size: bytes.len(), bytes, ..train };
        datagrams.into_iter().map(single).collect()
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.draw() % 100 < percent
    }

    /// xorshift64 (Marsaglia 2003).
    fn draw(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }
}
