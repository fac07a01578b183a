//! Checked views of the four WireGuard messages (whitepaper §5.4).
//!
//! A datagram becomes a [`Message`] once, by [`Message::parse`]; whoever holds a view holds the proof that its length
//! and type are right, so its fields are read without any further check. Integers are little-endian on the wire.

use std::ops::Range;

use crate::drop_reason::DropReason;

/// Bytes of a handshake initiation (§5.4.2).
pub const INITIATION_LEN: usize = 148;
/// Bytes of a handshake response (§5.4.3).
pub const RESPONSE_LEN: usize = 92;
/// Bytes of a cookie reply (§5.4.7).
pub const COOKIE_REPLY_LEN: usize = 64;
/// Bytes before the ciphertext of a data message (§5.4.6): type, receiver index, counter.
pub const DATA_HEADER_LEN: usize = 16;
/// Bytes of the authentication tag behind it.
pub const TAG_LEN: usize = 16;
/// Bytes of each of the two MACs that end a handshake message (§5.4.4).
pub const MAC_LEN: usize = 16;
/// Bytes of a TAI64N timestamp.
pub const TIMESTAMP_LEN: usize = 12;

// The type field: one byte and three reserved zero bytes, read as one little-endian integer.
const TYPE_INITIATION: u32 = 1;
const TYPE_RESPONSE: u32 = 2;
const TYPE_COOKIE_REPLY: u32 = 3;
const TYPE_DATA: u32 = 4;

/// Where the Noise message lies within an initiation: ephemeral (32), static (32 + 16), timestamp (12 + 16).
pub const INITIATION_NOISE: Range<usize> = 8..116;
/// Where the Noise message lies within a response: ephemeral (32), nothing (16).
pub const RESPONSE_NOISE: Range<usize> = 12..60;

/// A WireGuard message of the right length and type.
#[derive(Clone, Copy, Debug)]
pub enum Message<'a> {
    /// Type 1.
    Initiation(Initiation<'a>),
    /// Type 2.
    Response(Response<'a>),
    /// Type 3.
    CookieReply(CookieReply<'a>),
    /// Type 4.
    Data(DataHeader),
}

impl<'a> Message<'a> {
    /// Checks type, reserved bytes and length.
    ///
    /// # Errors
    /// [`DropReason::NotWireGuard`] for everything else.
    pub fn parse(datagram: &'a [u8]) -> Result<Self, DropReason> {
        let header = datagram.first_chunk::<4>().ok_or(DropReason::NotWireGuard)?;
        match (u32::from_le_bytes(*header), datagram.len()) {
            (TYPE_DATA, DATA_MIN_LEN..) => Ok(Self::Data(DataHeader {
                receiver: u32_at(datagram, 4),
                counter: u64::from_le_bytes(field(datagram, 8)),
            })),
            (TYPE_INITIATION, INITIATION_LEN) => Ok(Self::Initiation(Initiation(datagram))),
            (TYPE_RESPONSE, RESPONSE_LEN) => Ok(Self::Response(Response(datagram))),
            (TYPE_COOKIE_REPLY, COOKIE_REPLY_LEN) => Ok(Self::CookieReply(CookieReply(datagram))),
            _ => Err(DropReason::NotWireGuard),
        }
    }
}

const DATA_MIN_LEN: usize = DATA_HEADER_LEN + TAG_LEN;

/// The header of a data message; its ciphertext is opened in place by the caller, who owns the datagram.
#[derive(Clone, Copy, Debug)]
pub struct DataHeader {
    /// The receiver's index of the session.
    pub receiver: u32,
    /// The sender's message counter, which is also the nonce.
    pub counter: u64,
}

impl DataHeader {
    /// Writes the header in front of `message`.
    pub fn write(self, message: &mut [u8; DATA_HEADER_LEN]) {
        message[0..4].copy_from_slice(&TYPE_DATA.to_le_bytes());
        message[4..8].copy_from_slice(&self.receiver.to_le_bytes());
        message[8..16].copy_from_slice(&self.counter.to_le_bytes());
    }
}

/// A handshake message that ends with two MACs.
pub trait Handshake {
    /// The whole message.
    fn bytes(&self) -> &[u8];

    /// The sender's index.
    fn sender(&self) -> u32 {
        u32_at(self.bytes(), 4)
    }

    /// What mac1 covers.
    fn before_mac1(&self) -> &[u8] {
        &self.bytes()[..self.bytes().len() - 2 * MAC_LEN]
    }

    /// The MAC under a key that anybody who knows the receiver's public key can derive.
    fn mac1(&self) -> [u8; MAC_LEN] {
        field(self.bytes(), self.bytes().len() - 2 * MAC_LEN)
    }

    /// What mac2 covers.
    fn before_mac2(&self) -> &[u8] {
        &self.bytes()[..self.bytes().len() - MAC_LEN]
    }

    /// The MAC under the cookie; zero if the sender has none.
    fn mac2(&self) -> [u8; MAC_LEN] {
        field(self.bytes(), self.bytes().len() - MAC_LEN)
    }
}

/// A handshake initiation.
#[derive(Clone, Copy, Debug)]
pub struct Initiation<'a>(&'a [u8]);

impl Handshake for Initiation<'_> {
    fn bytes(&self) -> &[u8] {
        self.0
    }
}

impl Initiation<'_> {
    /// The first message of the Noise handshake.
    pub fn noise(&self) -> &[u8] {
        &self.0[INITIATION_NOISE]
    }

    /// An initiation without its Noise message and MACs.
    pub fn template(sender: u32) -> [u8; INITIATION_LEN] {
        let mut message = [0; INITIATION_LEN];
        message[0..4].copy_from_slice(&TYPE_INITIATION.to_le_bytes());
        message[4..8].copy_from_slice(&sender.to_le_bytes());
        message
    }
}

/// A handshake response.
#[derive(Clone, Copy, Debug)]
pub struct Response<'a>(&'a [u8]);

impl Handshake for Response<'_> {
    fn bytes(&self) -> &[u8] {
        self.0
    }
}

impl Response<'_> {
    /// The initiator's index, from its initiation.
    pub fn receiver(&self) -> u32 {
        u32_at(self.0, 8)
    }

    /// The second message of the Noise handshake.
    pub fn noise(&self) -> &[u8] {
        &self.0[RESPONSE_NOISE]
    }

    /// A response without its Noise message and MACs.
    pub fn template(sender: u32, receiver: u32) -> [u8; RESPONSE_LEN] {
        let mut message = [0; RESPONSE_LEN];
        message[0..4].copy_from_slice(&TYPE_RESPONSE.to_le_bytes());
        message[4..8].copy_from_slice(&sender.to_le_bytes());
        message[8..12].copy_from_slice(&receiver.to_le_bytes());
        message
    }
}

/// A cookie reply.
#[derive(Clone, Copy, Debug)]
pub struct CookieReply<'a>(&'a [u8]);

impl CookieReply<'_> {
    /// The sender index of the handshake message that it answers.
    pub fn receiver(&self) -> u32 {
        u32_at(self.0, 4)
    }

    /// The nonce of XChaCha20-Poly1305.
    pub fn nonce(&self) -> [u8; 24] {
        field(self.0, 8)
    }

    /// The sealed cookie and its tag.
    pub fn sealed_cookie(&self) -> [u8; MAC_LEN + TAG_LEN] {
        field(self.0, 32)
    }

    /// A whole cookie reply.
    pub fn build(
        receiver: u32,
        nonce: &[u8; 24],
        sealed: &[u8; MAC_LEN + TAG_LEN],
    ) -> [u8; COOKIE_REPLY_LEN] {
        let mut message = [0; COOKIE_REPLY_LEN];
        message[0..4].copy_from_slice(&TYPE_COOKIE_REPLY.to_le_bytes());
        message[4..8].copy_from_slice(&receiver.to_le_bytes());
        message[8..32].copy_from_slice(nonce);
        message[32..].copy_from_slice(sealed);
        message
    }
}

/// The `N` bytes at `offset`, of a message whose length is already known to cover them.
fn field<const N: usize>(message: &[u8], offset: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&message[offset..offset + N]);
    bytes
}

fn u32_at(message: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(field(message, offset))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_known_by_its_type_and_its_exact_length() {
        let initiation = Initiation::template(7);
        assert!(matches!(Message::parse(&initiation), Ok(Message::Initiation(m)) if m.sender() == 7));
        assert!(Message::parse(&initiation[..INITIATION_LEN - 1]).is_err());
        let response = Response::template(8, 9);
        assert!(matches!(Message::parse(&response), Ok(Message::Response(m)) if m.receiver() == 9));
        let mut data = [0; DATA_MIN_LEN];
        DataHeader { receiver: 0x0102_0304, counter: 5 }.write(data.first_chunk_mut().unwrap());
        assert_eq!(data[4..8], [4, 3, 2, 1]);
        assert!(
            matches!(Message::parse(&data), Ok(Message::Data(h)) if h.counter == 5 && h.receiver == 0x0102_0304)
        );
        assert!(Message::parse(&data[..DATA_MIN_LEN - 1]).is_err());
    }

    #[test]
    fn reserved_bytes_must_be_zero() {
        let mut message = Initiation::template(7);
        message[2] = 1;
        assert!(matches!(Message::parse(&message), Err(DropReason::NotWireGuard)));
    }
}
