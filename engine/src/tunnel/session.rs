//! One session: the transport keys that a handshake left behind, its counters, and the AEAD (whitepaper §5.4.6).
//!
//! The keys stand ready as ring's key schedules, so that a packet costs a nonce and one pass over its bytes.

use std::hint::black_box;
use std::time::Duration;

use ring::aead::{AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf;
use zeroize::Zeroizing;

use super::messages::{DATA_HEADER_LEN, DataHeader, TAG_LEN};
use super::replay::ReplayWindow;
use super::timers::{REJECT_AFTER_MESSAGES, REJECT_AFTER_TIME};
use crate::clock::Timestamp;
use crate::drop_reason::DropReason;

/// Which AEAD protects the data messages of a peer. Configured on both ends, never negotiated: an attacker cannot
/// talk two peers into another one, and peers that disagree simply do not understand each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Cipher {
    /// WireGuard's own (RFC 8439).
    #[default]
    ChaCha20Poly1305,
    /// AES-256-GCM (NIST SP 800-38D), between Tidegate peers only: faster where the processor has VAES.
    Aes256Gcm,
}

/// Salt of the HKDF that turns a handshake's keys into AES keys, so that no key serves two ciphers.
const AES_KEY_LABEL: &[u8] = b"tidegate aes-256-gcm v1";

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
    sealing: LessSafeKey,
    opening: LessSafeKey,
    replay: ReplayWindow,
}

impl Session {
    /// The session between `local_index` and `remote_index`.
    ///
    /// # Errors
    /// [`DropReason::BadHandshake`] if ring refuses the keys, which it does not for keys of the right length.
    pub fn new(
        keys: &TransportKeys,
        cipher: Cipher,
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
            sealing: schedule(cipher, &keys.sealing)?,
            opening: schedule(cipher, &keys.opening)?,
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
        self.is_alive(now) && self.counter < REJECT_AFTER_MESSAGES
    }

    /// How many messages it has sealed.
    pub fn sealed(&self) -> u64 {
        self.counter
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
        let datagram_len = DATA_HEADER_LEN + padded_len + TAG_LEN;
        let datagram = buffer.get_mut(..datagram_len).ok_or(DropReason::TooBig)?;
        if self.counter >= REJECT_AFTER_MESSAGES {
            return Err(DropReason::NoSession);
        }
        let (header, body) = datagram.split_first_chunk_mut().ok_or(DropReason::TooBig)?;
        let (plaintext, tag_room) = body.split_at_mut(padded_len);
        plaintext[plaintext_len..].fill(0);
        let nonce = self.nonce(self.counter);
        DataHeader { receiver: self.remote_index, counter: self.counter }.write(header);
        self.counter += 1;
        // ring refuses only plaintexts of 64 GiB and more.
        let tag = self
            .sealing
            .seal_in_place_separate_tag(nonce, Aad::empty(), plaintext)
            .map_err(|_| DropReason::TooBig)?;
        tag_room.copy_from_slice(tag.as_ref());
        Ok(datagram_len)
    }

    /// Opens in place `body`, the ciphertext and tag that followed a data header with `counter`.
    ///
    /// Returns the length of the plaintext, padding included, which begins where `body` does.
    ///
    /// # Errors
    /// [`DropReason::UnknownSession`] if the session is over, [`DropReason::Replayed`],
    /// [`DropReason::BadAuthentication`].
    pub fn open(&mut self, counter: u64, body: &mut [u8], now: Timestamp) -> Result<usize, DropReason> {
        if !self.is_alive(now) || counter >= REJECT_AFTER_MESSAGES {
            return Err(DropReason::UnknownSession);
        }
        if !self.replay.is_fresh(counter) {
            return Err(DropReason::Replayed);
        }
        let plaintext_len = self
            .opening
            .open_in_place(self.nonce(counter), Aad::empty(), body)
            .map_err(|_| DropReason::BadAuthentication)?
            .len();
        if self.replay.accept(counter) { Ok(plaintext_len) } else { Err(DropReason::Replayed) }
    }

    /// Four zero bytes and the counter: little-endian for ChaCha20-Poly1305 (whitepaper §5.4.6), big-endian for
    /// AES-GCM (as Noise revision 34 §12.4 has it).
    fn nonce(&self, counter: u64) -> Nonce {
        let mut nonce = [0; NONCE_LEN];
        nonce[4..].copy_from_slice(&match self.cipher {
            Cipher::ChaCha20Poly1305 => counter.to_le_bytes(),
            Cipher::Aes256Gcm => counter.to_be_bytes(),
        });
        Nonce::assume_unique_for_key(nonce)
    }
}

impl Drop for Session {
    /// Overwrites the key schedules: ring does not do so itself. The black box keeps the compiler from seeing that
    /// nobody reads what is written here.
    fn drop(&mut self) {
        if let (Ok(sealing), Ok(opening)) = (schedule(self.cipher, &[0; 32]), schedule(self.cipher, &[0; 32]))
        {
            self.sealing = sealing;
            self.opening = opening;
        }
        black_box((&self.sealing, &self.opening));
    }
}

/// The key schedule of `cipher` for the raw transport key `key`.
fn schedule(cipher: Cipher, key: &[u8; 32]) -> Result<LessSafeKey, DropReason> {
    let unbound = match cipher {
        Cipher::ChaCha20Poly1305 => UnboundKey::new(&CHACHA20_POLY1305, key),
        Cipher::Aes256Gcm => {
            let algorithm: &'static Algorithm = &AES_256_GCM;
            let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, AES_KEY_LABEL).extract(key);
            prk.expand(&[b"transport key"], algorithm).map(UnboundKey::from)
        }
    };
    unbound.map(LessSafeKey::new).map_err(|_| DropReason::BadHandshake)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(cipher: Cipher) -> (Box<Session>, Box<Session>) {
        let [a, b] = [[1; 32], [2; 32]].map(Zeroizing::new);
        let here = TransportKeys { sealing: a.clone(), opening: b.clone() };
        let there = TransportKeys { sealing: b, opening: a };
        let now = Timestamp::ORIGIN;
        (
            Session::new(&here, cipher, (1, 2), true, now).unwrap(),
            Session::new(&there, cipher, (2, 1), false, now).unwrap(),
        )
    }

    #[test]
    fn both_ciphers_there_and_back() {
        for cipher in [Cipher::ChaCha20Poly1305, Cipher::Aes256Gcm] {
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
        assert_eq!(alice.sealed(), 0);
    }

    #[test]
    fn no_message_is_sealed_or_opened_beyond_reject_after_messages() {
        let (mut alice, mut bob) = pair(Cipher::ChaCha20Poly1305);
        alice.counter = REJECT_AFTER_MESSAGES - 1;
        let mut buffer = [0; 64];
        assert_eq!(alice.seal(&mut buffer, 32, 0), Ok(64));
        assert_eq!(alice.seal(&mut buffer, 32, 0), Err(DropReason::NoSession));
        assert!(!alice.can_seal(Timestamp::ORIGIN));
        let opened = bob.open(REJECT_AFTER_MESSAGES, &mut buffer[16..], Timestamp::ORIGIN);
        assert_eq!(opened, Err(DropReason::UnknownSession));
    }
}
