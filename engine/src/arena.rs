//! The buffers of a shard.
//!
//! A shard receives into an [`Arena`], opens and rewrites in place, gathers superpackets from [`Span`]s of it, sends,
//! and starts over: nothing on a packet's way allocates or copies payload. Which buffers still hold packets that wait
//! is known to [`crate::pool`]. A span is a name, not a borrow, so that many may be held while the bytes behind one of
//! them change.

use std::ops::Range;

/// Bytes of the largest UDP train or superpacket, link and virtio-net headers included.
pub const LARGEST_PACKET: usize = 65_536 + 512;

/// Bytes of one buffer: the largest packet, and as much again for the small ones that came before it in one turn. What
/// is never written to costs no memory.
pub const BUFFER_SIZE: usize = 2 * LARGEST_PACKET;

/// A piece of one of the arena's buffers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Span {
    /// Which buffer.
    pub buffer: u32,
    /// The first byte.
    pub start: u32,
    /// How many bytes.
    pub len: u32,
}

impl Span {
    /// The span of `range` within `buffer`.
    pub fn new(buffer: usize, range: Range<usize>) -> Self {
        Self { buffer: buffer as u32, start: range.start as u32, len: range.len() as u32 }
    }

    /// The bytes that it covers, as a range within its buffer.
    pub fn range(self) -> Range<usize> {
        self.start as usize..(self.start + self.len) as usize
    }

    /// The part of it from `offset` on (empty if there is none).
    pub fn skip(self, offset: usize) -> Self {
        let offset = (offset as u32).min(self.len);
        Self { buffer: self.buffer, start: self.start + offset, len: self.len - offset }
    }

    /// Its first `len` bytes (all if there are fewer).
    pub fn take(self, len: usize) -> Self {
        Self { len: (len as u32).min(self.len), ..self }
    }
}

/// A place to receive into: what of a buffer lies behind `start`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Slot {
    /// Which buffer.
    pub buffer: usize,
    /// The first byte.
    pub start: usize,
}

impl Slot {
    /// The whole of a buffer.
    pub const fn whole(buffer: usize) -> Self {
        Self { buffer, start: 0 }
    }
}

/// A fixed number of equal buffers.
pub struct Arena {
    buffers: Vec<Box<[u8]>>,
}

impl Arena {
    /// `count` zeroed buffers of [`BUFFER_SIZE`].
    pub fn new(count: usize) -> Self {
        Self { buffers: (0..count).map(|_| vec![0; BUFFER_SIZE].into_boxed_slice()).collect() }
    }

    /// How many buffers there are.
    pub fn len(&self) -> usize {
        self.buffers.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.buffers.is_empty()
    }

    /// A whole buffer.
    pub fn buffer_mut(&mut self, buffer: usize) -> &mut [u8] {
        &mut self.buffers[buffer]
    }

    /// The room of a slot.
    pub fn slot_mut(&mut self, slot: Slot) -> &mut [u8] {
        self.buffers[slot.buffer].get_mut(slot.start..).unwrap_or_default()
    }

    /// The bytes of a span.
    pub fn get(&self, span: Span) -> &[u8] {
        &self.buffers[span.buffer as usize][span.range()]
    }

    /// Copies the bytes of a span to another one of the same length.
    pub fn copy(&mut self, from: Span, to: Span) {
        let (source, target) = (from.buffer as usize, to.buffer as usize);
        if source == target {
            return self.buffers[source].copy_within(from.range(), to.range().start);
        }
        let mut buffer = std::mem::take(&mut self.buffers[target]);
        buffer[to.range()].copy_from_slice(&self.buffers[source][from.range()]);
        self.buffers[target] = buffer;
    }

    /// The bytes of a span, to be changed.
    pub fn get_mut(&mut self, span: Span) -> &mut [u8] {
        &mut self.buffers[span.buffer as usize][span.range()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_copied_within_a_buffer_and_to_another() {
        let mut arena = Arena::new(2);
        let (from, near, far) = (Span::new(0, 5..8), Span::new(0, 100..103), Span::new(1, 0..3));
        arena.get_mut(from).copy_from_slice(b"abc");
        arena.copy(from, near);
        arena.copy(near, far);
        assert_eq!((arena.get(near), arena.get(far)), (&b"abc"[..], &b"abc"[..]));
    }
}
