//! What may befall packets on their way, as decorators: each wraps a stream of packets and is one itself, so that
//! faults are stacked rather than switched on. The same seed does the same.
//!
//! [`super::link::Link`] does it to sealed datagrams, where authentication finds any damage; this is for the packets
//! themselves, before they are sealed and after they were opened, where nothing but their checksums does.

use super::packets::Ip;

/// A packet on a wire, and whether it is still what was sent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OnWire {
    pub bytes: Vec<u8>,
    pub is_sound: bool,
}

/// Chances are in percent per packet.
pub trait Faults: Iterator<Item = OnWire> + Sized {
    fn losing(self, percent: u64, seed: u64) -> impl Iterator<Item = OnWire> {
        let mut random = Random::seeded(seed);
        self.filter(move |_| !random.chance(percent))
    }

    fn repeating(self, percent: u64, seed: u64) -> impl Iterator<Item = OnWire> {
        let mut random = Random::seeded(seed);
        self.flat_map(move |packet| {
            let again = random.chance(percent).then(|| packet.clone());
            std::iter::once(packet).chain(again)
        })
    }

    /// A packet is overtaken by up to three others.
    fn overtaking(self, percent: u64, seed: u64) -> impl Iterator<Item = OnWire> {
        let mut random = Random::seeded(seed);
        let mut packets: Vec<OnWire> = self.collect();
        for at in 0..packets.len() {
            if random.chance(percent) {
                let by = 1 + random.below(3);
                let end = packets.len().min(at + 1 + by);
                packets[at..end].rotate_left(1);
            }
        }
        packets.into_iter()
    }

    /// A bit flips. The checksums of IP, TCP, UDP and ICMP find any single one.
    fn damaging(self, percent: u64, seed: u64) -> impl Iterator<Item = OnWire> {
        let mut random = Random::seeded(seed);
        self.map(move |mut packet| {
            if random.chance(percent) {
                let at = random.below(packet.bytes.len());
                packet.bytes[at] ^= 1 << random.below(8);
                packet.is_sound = false;
            }
            packet
        })
    }
}

impl<I: Iterator<Item = OnWire>> Faults for I {}

/// A wire without faults.
pub fn wire(packets: &[Ip]) -> impl Iterator<Item = OnWire> {
    packets.iter().map(|packet| OnWire { bytes: packet.bytes(), is_sound: true })
}

/// xorshift64* (Vigna 2016).
pub struct Random(u64);

impl Random {
    pub fn seeded(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % limit
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        (self.below(100) as u64) < percent
    }
}
