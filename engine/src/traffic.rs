//! Counters of delivered packets.

use crate::wire::Shape;

/// Between whom a packet travels, seen from the engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Direction {
    /// Received from a peer and routed.
    FromPeers,
    /// Sealed for a peer.
    ToPeers,
    /// Received on the external interface and translated.
    FromExternal,
    /// Translated and sent on the external interface.
    ToExternal,
    /// Received from the TUN device.
    FromHost,
    /// Injected into the TUN device.
    ToHost,
}

impl Direction {
    /// Every direction, in the order of their numbers.
    pub const ALL: [Self; 6] =
        [Self::FromPeers, Self::ToPeers, Self::FromExternal, Self::ToExternal, Self::FromHost, Self::ToHost];

    /// The name under which it is shown.
    pub const fn name(self) -> &'static str {
        match self {
            Self::FromPeers => "from_peers",
            Self::ToPeers => "to_peers",
            Self::FromExternal => "from_external",
            Self::ToExternal => "to_external",
            Self::FromHost => "from_host",
            Self::ToHost => "to_host",
        }
    }
}

/// Packets and bytes by direction. A superpacket counts as the packets that it stands for, its bytes once.
#[derive(Clone, Copy, Default, Debug)]
pub struct Traffic {
    packets: [u64; Direction::ALL.len()],
    bytes: [u64; Direction::ALL.len()],
}

impl Traffic {
    /// Counts one packet or superpacket.
    pub fn count(&mut self, direction: Direction, shape: Shape) {
        self.packets[direction as usize] += shape.segment_count() as u64;
        self.bytes[direction as usize] += shape.total_len() as u64;
    }

    /// Adds another shard's counters.
    pub fn merge(&mut self, other: &Self) {
        for direction in Direction::ALL {
            self.packets[direction as usize] += other.packets[direction as usize];
            self.bytes[direction as usize] += other.bytes[direction as usize];
        }
    }

    /// Packets in `direction`.
    pub fn packets(&self, direction: Direction) -> u64 {
        self.packets[direction as usize]
    }

    /// Bytes in `direction`, IP headers included.
    pub fn bytes(&self, direction: Direction) -> u64 {
        self.bytes[direction as usize]
    }
}
