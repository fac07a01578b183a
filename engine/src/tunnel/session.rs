//! One session: the transport keys that a handshake left behind, its counters, and the AEAD (whitepaper §5.4.6).

use std::time::Duration;

use zeroize::Zeroizing;

use super::aead::{Key, Library, NonceBytes};
use super::cipher::Cipher;
use super::messages::{DATA_HEADER_LEN, DataHeader, TAG_LEN};
use super::replay::ReplayWindow;
use super::timers::REJECT_AFTER_TIME;
use crate::clock::Timestamp;
use crate::drop_reason::DropReason;

/// The two transport keys of a finished handshake.
pub struct TransportKeys {
    /// Seals what we send.
    pub sealing: Zeroizing<[u8; 32]>,
    /// Opens what we receive.
    pub opening: Zeroizing<[u8; 32]>,
}

/// A session with one peer.
pub struct Session {
    /// Our index, which the peer writes into its messages.
    pub local_index: u32,
    /// Whether the handshake was ours; the initiator is the one to renew it.
    pub is_initiator: bool,
    /// When its keys were derived.
    pub established: Timestamp,
    remote_index: u32,
    /// The counter of the next message that we seal.
    counter: u64,
    cipher: Cipher,
    sealing: Key,
    opening: Key,
    replay: ReplayWindow,
}

impl Session {
    /// The session between `local_index` and `remote_index`.
    ///
    /// # Errors
    /// [`DropReason::BadHandshake`] if the AEAD library refuses the keys, which it does not for keys of the right
    /// length.
    pub fn new(
        keys: &TransportKeys,
        (cipher, library): (Cipher, Library),
        (local_index, remote_index): (u32, u32),
        is_initiator: bool,
        now: Timestamp,
    ) -> Result<Box<Self>, DropReason> {
        Ok(Box::new(Self {
            local_index,
            is_initiator,
            established: now,
            remote_index,
            counter: 0,
            cipher,
            sealing: cipher.schedule(library, &keys.sealing)?,
            opening: cipher.schedule(library, &keys.opening)?,
            replay: ReplayWindow::new(),
        }))
    }

    /// How long ago its keys were derived.
    pub fn age(&self, now: Timestamp) -> Duration {
        now.since(self.established)
    }

    /// Whether it may still be used (§6.1: no key is used for longer than [`REJECT_AFTER_TIME`], in neither direction).
    pub fn is_alive(&self, now: Timestamp) -> bool {
        self.age(now) < REJECT_AFTER_TIME
    }

    /// Whether it may seal messages.
    pub fn can_seal(&self, now: Timestamp) -> bool {
        self.is_alive(now) && self.counter < self.cipher.reject_after_messages()
    }

    /// Whether it has sealed so many messages that it should be renewed (§6.2).
    pub fn is_worn(&self) -> bool {
        self.counter > self.cipher.rekey_after_messages()
    }

    /// Seals in place: `buffer` is a header's room, `plaintext_len` bytes, and room for `padding` and the tag.
    ///
    /// Returns the length of the datagram, which begins where `buffer` does.
    ///
    /// # Errors
    /// [`DropReason::TooBig`] if `buffer` is too short, [`DropReason::NoSession`] if the session has sealed all the
    /// messages that it may.
    pub fn seal(
        &mut self,
        buffer: &mut [u8],
        plaintext_len: usize,
        padding: usize,
    ) -> Result<usize, DropReason> {
        let padded_len = plaintext_len + padding;
        let (datagram, nonce) = self.begin(buffer, padded_len)?;
        let len = datagram.len();
        let body = &mut datagram[DATA_HEADER_LEN..];
        body[plaintext_len..padded_len].fill(0);
        // The libraries refuse only plaintexts of 64 GiB and more, and what they have no memory for.
        self.sealing.seal_in_place(&nonce, body).map_err(|_| DropReason::TooBig)?;
        Ok(len)
    }

    /// Seals `plaintext`, padding included, into `buffer`: one pass over the bytes, where copying and sealing in place
    /// are two.
    ///
    /// Returns the length of the datagram, which begins where `buffer` does.
    ///
    /// # Errors
    /// As [`Self::seal`].
    pub fn seal_from(&mut self, plaintext: &[u8], buffer: &mut [u8]) -> Result<usize, DropReason> {
        let (datagram, nonce) = self.begin(buffer, plaintext.len())?;
        let len = datagram.len();
        let body = &mut datagram[DATA_HEADER_LEN..];
        self.sealing.seal(&nonce, plaintext, body).map_err(|_| DropReason::TooBig)?;
        Ok(len)
    }

    /// The next datagram, for `plaintext_len` bytes, at the front of `buffer`, with its header; and its nonce.
    fn begin<'b>(
        &mut self,
        buffer: &'b mut [u8],
        plaintext_len: usize,
    ) -> Result<(&'b mut [u8], NonceBytes), DropReason> {
        let datagram_len = DATA_HEADER_LEN + plaintext_len + TAG_LEN;
        let datagram = buffer.get_mut(..datagram_len).ok_or(DropReason::TooBig)?;
        if self.counter >= self.cipher.reject_after_messages() {
            return Err(DropReason::NoSession);
        }
        let header = datagram.first_chunk_mut().ok_or(DropReason::TooBig)?;
        DataHeader { receiver: self.remote_index, counter: self.counter }.write(header);
        let nonce = self.cipher.nonce(self.counter);
        self.counter += 1;
        Ok((datagram, nonce))
    }

    /// Opens in place `body`, the ciphertext and tag that followed a data header with `counter`.
    ///
    /// Returns the length of the plaintext, padding included, which begins where `body` does.
    ///
    /// # Errors
    /// [`DropReason::UnknownSession`] if the session is over, [`DropReason::Replayed`],
    /// [`DropReason::BadAuthentication`].
    pub fn open(&mut self, counter: u64, body: &mut [u8], now: Timestamp) -> Result<usize, DropReason> {
        if !self.is_alive(now) || counter >= self.cipher.reject_after_messages() {
            return Err(DropReason::UnknownSession);
        }
        if !self.replay.is_fresh(counter) {
            return Err(DropReason::Replayed);
        }
        let plaintext_len = self
            .opening
            .open_in_place(&self.cipher.nonce(counter), body)
            .map_err(|_| DropReason::BadAuthentication)?;
        if self.replay.accept(counter) { Ok(plaintext_len) } else { Err(DropReason::Replayed) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(cipher: Cipher) -> (Box<Session>, Box<Session>) {
        let [a, b] = [[1; 32], [2; 32]].map(Zeroizing::new);
        let here = TransportKeys { sealing: a.clone(), opening: b.clone() };
        let there = TransportKeys { sealing: b, opening: a };
        let (now, aead) = (Timestamp::ORIGIN, (cipher, Library::fastest(1)));
        (
            Session::new(&here, aead, (1, 2), true, now).unwrap(),
            Session::new(&there, aead, (2, 1), false, now).unwrap(),
        )
    }

    #[test]
    fn both_ciphers_there_and_back() {
        for cipher in Cipher::ALL {
            let (mut alice, mut bob) = pair(cipher);
            for counter in 0..3 {
                let mut buffer = [0xaa; 16 + 20 + 12 + 16];
                buffer[16..36].copy_from_slice(b"twenty bytes of text");
                let len = alice.seal(&mut buffer, 20, 12).unwrap();
                assert_eq!(len, 64);
                assert_eq!(bob.open(counter, &mut buffer[16..len], Timestamp::ORIGIN), Ok(32));
                assert_eq!(&buffer[16..48], b"twenty bytes of text\0\0\0\0\0\0\0\0\0\0\0\0");
            }
        }
    }

    #[test]
    fn sealing_in_place_and_out_of_it_is_the_same() {
        for cipher in Cipher::ALL {
            for len in [0, 1, 20, 1420] {
                let text: Vec<u8> = (0..len).map(|i| i as u8).collect();
                let mut in_place = vec![0xaa; 16 + len + 16];
                in_place[16..16 + len].copy_from_slice(&text);
                let mut out_of_place = vec![0xaa; 16 + len + 16 + 5];
                let (mut alice, mut twin) = (pair(cipher).0, pair(cipher).0);
                for _ in 0..2 {
                    in_place[16..16 + len].copy_from_slice(&text);
                    assert_eq!(alice.seal(&mut in_place, len, 0), Ok(len + 32));
                    assert_eq!(twin.seal_from(&text, &mut out_of_place), Ok(len + 32));
                    assert_eq!(out_of_place[..len + 32], in_place);
                }
                assert_eq!(out_of_place[len + 32..], [0xaa; 5], "nothing is written behind the datagram");
                assert_eq!(twin.seal_from(&text, &mut [0; 31]), Err(DropReason::TooBig));
                assert_eq!(twin.counter, 2);
            }
        }
    }

    #[test]
    fn the_ciphers_do_not_understand_each_other() {
        let (mut alice, _) = pair(Cipher::Aes256Gcm);
        let (_, mut bob) = pair(Cipher::ChaCha20Poly1305);
        let mut buffer = [0; 64];
        let len = alice.seal(&mut buffer, 20, 12).unwrap();
        assert_eq!(bob.open(0, &mut buffer[16..len], Timestamp::ORIGIN), Err(DropReason::BadAuthentication));
    }

    #[test]
    fn a_buffer_without_room_for_the_tag_is_refused_and_costs_no_counter() {
        let (mut alice, _) = pair(Cipher::ChaCha20Poly1305);
        assert_eq!(alice.seal(&mut [0; 16 + 20 + 15], 20, 0), Err(DropReason::TooBig));
        assert_eq!(alice.counter, 0);
    }

    #[test]
    fn no_message_is_sealed_or_opened_beyond_the_ciphers_limit() {
        for (cipher, limit) in
            [(Cipher::ChaCha20Poly1305, u64::MAX - (1 << 13)), (Cipher::Aes256Gcm, 1 << 29)]
        {
            let (mut alice, mut bob) = pair(cipher);
            alice.counter = limit - 1;
            let mut buffer = [0; 64];
            assert_eq!(alice.seal(&mut buffer, 32, 0), Ok(64));
            assert_eq!(alice.seal(&mut buffer, 32, 0), Err(DropReason::NoSession));
            assert_eq!(alice.seal_from(&[0; 32], &mut [0; 64]), Err(DropReason::NoSession));
            assert!(!alice.can_seal(Timestamp::ORIGIN));
            let opened = bob.open(limit, &mut buffer[16..], Timestamp::ORIGIN);
            assert_eq!(opened, Err(DropReason::UnknownSession));
        }
    }

    #[test]
    fn a_session_is_worn_well_before_its_limit() {
        for (cipher, worn) in [(Cipher::ChaCha20Poly1305, 1 << 60), (Cipher::Aes256Gcm, 1 << 28)] {
            let (mut alice, _) = pair(cipher);
            alice.counter = worn;
            assert!(!alice.is_worn());
            alice.counter += 1;
            assert!(alice.is_worn() && alice.can_seal(Timestamp::ORIGIN));
        }
    }
}
