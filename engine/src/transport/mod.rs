//! How sealed datagrams travel between client and gateway.
//!
//! A [`Transport`] moves *trains*: datagrams of equal size on one [`Path`], one behind another in one buffer (only
//! the last may be shorter). [`udp`] is the transport of WireGuard; another one, as a TCP packet service for
//! networks that block UDP, need only implement the trait.

use std::io;
use std::os::fd::AsFd;

use crate::arena::{Arena, Slot, Span};
use crate::intake::Arrival;
use crate::path::Path;
use crate::wire::Ecn;

pub mod udp;

/// What became of the datagrams of one call.
pub use crate::sys::SendOutcome;

/// The most datagrams of a train (`UDP_MAX_SEGMENTS` of linux/udp.h before 6.9; it is 128 since).
pub const MAX_TRAIN_SEGMENTS: usize = 64;
/// The most bytes of a train: 65,535 less an IPv4 header of 20 bytes (RFC 791) and a UDP header of 8 (RFC 768).
pub const MAX_TRAIN_BYTES: usize = 65_507;

/// A received train.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReceivedTrain {
    /// Its datagrams.
    pub span: Span,
    /// Bytes of each datagram but the last, which may be shorter. At least 1, unless the train is one empty datagram.
    pub segment_size: usize,
    /// Where it comes from, and to which of our addresses it was sent, as far as the transport can tell.
    pub from: Path,
    /// What the network wrote onto all of its datagrams; not ECN-capable where the transport cannot tell.
    pub ecn: Ecn,
}

impl ReceivedTrain {
    /// The datagrams, one by one.
    pub fn datagrams(self) -> impl Iterator<Item = Span> {
        let (len, size) = (self.span.len as usize, self.segment_size.max(1));
        (0..len.div_ceil(size)).map(move |i| self.span.skip(i * size).take(size))
    }
}

impl Arrival for ReceivedTrain {
    fn span(&self) -> Span {
        self.span
    }

    fn moved_to(self, span: Span) -> Self {
        Self { span, ..self }
    }

    fn packets(&self) -> u64 {
        self.segments() as u64
    }

    fn segments(&self) -> usize {
        (self.span.len as usize).div_ceil(self.segment_size.max(1))
    }
}

/// A train to be sent: at most [`MAX_TRAIN_SEGMENTS`] datagrams and [`MAX_TRAIN_BYTES`] bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SendTrain<'a> {
    /// Where to, and from which of our addresses.
    pub to: Path,
    /// Its datagrams.
    pub bytes: &'a [u8],
    /// Bytes of each datagram but the last, which may be shorter. A size of 0, or beyond the bytes, makes it one
    /// datagram.
    pub segment_size: usize,
}

impl SendTrain<'_> {
    /// How many datagrams it has.
    pub fn datagrams(&self) -> usize {
        if self.segment_size == 0 { 1 } else { self.bytes.len().div_ceil(self.segment_size).max(1) }
    }
}

/// A way for sealed datagrams to travel.
pub trait Transport: AsFd {
    /// Receives what is there, at most one train into each of the arena's `slots`, without waiting.
    ///
    /// Appends to `trains` and returns how many; 0 if there is nothing.
    ///
    /// # Errors
    /// What the kernel says.
    fn receive(
        &mut self,
        arena: &mut Arena,
        slots: &[Slot],
        trains: &mut Vec<ReceivedTrain>,
    ) -> io::Result<usize>;

    /// Sends trains in their order, without waiting: what the kernel has no room for is dropped and counted.
    fn send(&mut self, trains: &[SendTrain<'_>]) -> SendOutcome;

    /// Whether trains are handed to the kernel whole. Turns false where the kernel refuses them, and stays so.
    fn gso(&self) -> bool;

    /// Whether the kernel hands over trains whole.
    fn gro(&self) -> bool;

    /// Datagrams that the kernel had no room for since the beginning, modulo 2^32; 0 where nobody counts.
    fn overruns(&self) -> u32;

    /// Whether what waits fills more than half of the kernel's buffer; false where nobody can tell.
    fn is_half_full(&self) -> bool;
}
