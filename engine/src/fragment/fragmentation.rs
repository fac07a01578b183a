//! A datagram that is too big for the way out becomes fragments (RFC 791 §3.2, "An Example Fragmentation Procedure").
//!
//! Whether it may be fragmented at all (DF) is the caller's decision, and so is an identification that is unique
//! (RFC 6864 §4.2). The fragments come out in order. A fragment can be fragmented further.

use crate::drop_reason::DropReason;
use crate::wire::checksum;
use crate::wire::ipv4::{MAX_PACKET_LEN, MIN_HEADER_LEN, put_u16, u16_at};

/// Flags and offset share a word (RFC 791 §3.1).
const MORE_FRAGMENTS: u16 = 0x2000;
const OFFSET_MASK: u16 = 0x1fff;
/// Offsets count in units of 8 bytes (RFC 791 §3.1).
const UNIT: usize = 8;
/// The largest IPv4 header.
const MAX_HEADER_LEN: usize = 60;
/// The bit of an option's type that says: copy it into every fragment (RFC 791 §3.1).
const OPTION_COPIED: u8 = 0x80;
const OPTION_END: u8 = 0;
const OPTION_NOP: u8 = 1;

/// The fragments of one packet, in order.
#[derive(Debug)]
pub struct Fragments<'a> {
    first_header: &'a [u8],
    /// What the later fragments begin with: the options that are to be copied, no others.
    later_header: [u8; MAX_HEADER_LEN],
    later_header_len: usize,
    payload: &'a [u8],
    mtu: usize,
    /// Payload bytes that have been written.
    written: usize,
    done: bool,
}

impl<'a> Fragments<'a> {
    /// Cuts `packet`, whose checksums are complete, into fragments of at most `mtu` bytes, headers included.
    ///
    /// # Errors
    /// [`DropReason::Truncated`] or [`DropReason::BadIpHeader`] for bytes that are no IPv4 packet;
    /// [`DropReason::BadFragment`] if it is a fragment that reaches beyond 65,535 bytes; [`DropReason::TooBig`] if
    /// not even 8 bytes of payload fit.
    pub fn new(packet: &'a [u8], mtu: usize) -> Result<Self, DropReason> {
        if packet.len() < MIN_HEADER_LEN {
            return Err(DropReason::Truncated);
        }
        let header_len = usize::from(packet[0] & 0x0f) * 4;
        let total_len = usize::from(u16_at(packet, 2));
        if packet[0] >> 4 != 4 || header_len < MIN_HEADER_LEN || total_len < header_len {
            return Err(DropReason::BadIpHeader);
        }
        let packet = packet.get(..total_len).ok_or(DropReason::Truncated)?;
        let (first_header, payload) = packet.split_at(header_len);
        if usize::from(u16_at(packet, 6) & OFFSET_MASK) * UNIT + payload.len() > MAX_PACKET_LEN {
            return Err(DropReason::BadFragment);
        }
        if total_len > mtu && mtu < header_len + UNIT {
            return Err(DropReason::TooBig);
        }
        let (later_header, later_header_len) = later_header(first_header);
        Ok(Self { first_header, later_header, later_header_len, payload, mtu, written: 0, done: false })
    }

    /// Writes the next fragment to the front of `out`, which holds `mtu` bytes, and returns its length; `None` when
    /// there are no more (or `out` is too small). A packet that fits comes out as it is.
    pub fn next_into(&mut self, out: &mut [u8]) -> Option<usize> {
        if self.done {
            return None;
        }
        let header = match self.written {
            0 => self.first_header,
            _ => &self.later_header[..self.later_header_len],
        };
        let rest = &self.payload[self.written..];
        let room = self.mtu.saturating_sub(header.len());
        let is_last = rest.len() <= room;
        let piece = if is_last { rest } else { &rest[..room / UNIT * UNIT] };
        let len = header.len() + piece.len();
        let (out_header, out_payload) = out.get_mut(..len)?.split_at_mut(header.len());
        out_header.copy_from_slice(header);
        out_payload.copy_from_slice(piece);

        let flags_and_offset = u16_at(self.first_header, 6) + (self.written / UNIT) as u16;
        put_u16(out_header, 2, len as u16);
        put_u16(out_header, 6, if is_last { flags_and_offset } else { flags_and_offset | MORE_FRAGMENTS });
        put_u16(out_header, 10, 0);
        let sum = checksum::checksum(out_header);
        put_u16(out_header, 10, sum);
        self.written += piece.len();
        self.done = is_last;
        Some(len)
    }
}

/// The header of all fragments but the first.
fn later_header(first: &[u8]) -> ([u8; MAX_HEADER_LEN], usize) {
    let mut header = [OPTION_END; MAX_HEADER_LEN];
    let (fixed, mut options) = first.split_at(MIN_HEADER_LEN);
    header[..MIN_HEADER_LEN].copy_from_slice(fixed);
    let mut len = MIN_HEADER_LEN;
    // The walk ends at the end of the list, and where the options stop making sense.
    while let [option_type, rest @ ..] = options {
        let option_len = match (*option_type, rest.first()) {
            (OPTION_END, _) => break,
            (OPTION_NOP, _) => 1,
            (_, Some(&option_len)) if option_len >= 2 => usize::from(option_len),
            _ => break,
        };
        let Some((option, behind)) = options.split_at_checked(option_len) else { break };
        if option_type & OPTION_COPIED != 0 {
            header[len..len + option_len].copy_from_slice(option);
            len += option_len;
        }
        options = behind;
    }
    let len = len.next_multiple_of(4);
    header[0] = 0x40 | (len / 4) as u8;
    (header, len)
}
