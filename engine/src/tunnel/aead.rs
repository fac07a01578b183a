//! Which library seals and opens the data messages of a session.
//!
//! `aws-lc-rs` can do it on every processor. Where this one has AVX-512, and Intel's Multi-Buffer library was there at
//! the build, that needs a sixth to two fifths less time (`docs/performance.md`). Both compute the same functions of the
//! same keys and nonces, so the other end cannot tell which it was.

use aws_lc_rs::aead::{AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use tidegate_ipsec_mb as ipsec_mb;

use super::cipher::Cipher;
use super::messages::TAG_LEN;

/// Four zero bytes and a counter, which is never used twice with one key.
pub(super) type NonceBytes = [u8; ipsec_mb::NONCE_LEN];

/// What a library does not seal or open: a message that is not what was sealed; in sealing, nothing that comes up here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Refused;

/// A key made ready for its library, so that a packet costs a nonce and one pass over its bytes. Either overwrites the
/// key's memory when it is dropped (`aws-lc-rs` in its `OPENSSL_free`).
pub(super) enum Key {
    /// `aws-lc-rs`.
    Everywhere(Box<LessSafeKey>),
    /// Intel's.
    Avx512(ipsec_mb::Key),
}

/// The name of the library that new keys are for.
pub fn library() -> &'static str {
    if ipsec_mb::is_available() { "intel-ipsec-mb" } else { "aws-lc-rs" }
}

impl Key {
    /// `key` for the AEAD of `cipher`, with the faster of the libraries.
    ///
    /// # Errors
    /// [`Refused`] by a library that takes no key of 32 bytes, which there is not.
    pub(super) fn new(cipher: Cipher, key: &[u8; 32]) -> Result<Self, Refused> {
        let algorithm = match cipher {
            Cipher::ChaCha20Poly1305 => ipsec_mb::Algorithm::ChaCha20Poly1305,
            Cipher::Aes256Gcm => ipsec_mb::Algorithm::Aes256Gcm,
        };
        ipsec_mb::Key::new(algorithm, key)
            .map_or_else(|| Self::everywhere(cipher, key), |key| Ok(Self::Avx512(key)))
    }

    fn everywhere(cipher: Cipher, key: &[u8; 32]) -> Result<Self, Refused> {
        let algorithm = match cipher {
            Cipher::ChaCha20Poly1305 => &CHACHA20_POLY1305,
            Cipher::Aes256Gcm => &AES_256_GCM,
        };
        let key = UnboundKey::new(algorithm, key).map_err(|_| Refused)?;
        Ok(Self::Everywhere(Box::new(LessSafeKey::new(key))))
    }

    /// Seals `buffer`, which is the plaintext and room for the tag, in place.
    pub(super) fn seal_in_place(&self, nonce: &NonceBytes, buffer: &mut [u8]) -> Result<(), Refused> {
        match self {
            Self::Everywhere(key) => {
                let (text, tag_room) = buffer.split_last_chunk_mut::<TAG_LEN>().ok_or(Refused)?;
                let tag =
                    key.seal_in_place_separate_tag(once(nonce), Aad::empty(), text).map_err(|_| Refused)?;
                tag_room.copy_from_slice(tag.as_ref());
                Ok(())
            }
            Self::Avx512(key) => key.seal_in_place(nonce, buffer).map_err(|_| Refused),
        }
    }

    /// Seals `plaintext` into `sealed`, which is a tag longer.
    pub(super) fn seal(
        &self,
        nonce: &NonceBytes,
        plaintext: &[u8],
        sealed: &mut [u8],
    ) -> Result<(), Refused> {
        match self {
            Self::Everywhere(key) => {
                let (text, tag_room) = sealed.split_last_chunk_mut::<TAG_LEN>().ok_or(Refused)?;
                key.seal_out_of_place_scatter(once(nonce), Aad::empty(), plaintext, text, &[], tag_room)
                    .map_err(|_| Refused)
            }
            Self::Avx512(key) => key.seal(nonce, plaintext, sealed).map_err(|_| Refused),
        }
    }

    /// Opens `sealed`, ciphertext and tag, in place; the plaintext begins where it does. Returns its length.
    pub(super) fn open_in_place(&self, nonce: &NonceBytes, sealed: &mut [u8]) -> Result<usize, Refused> {
        match self {
            Self::Everywhere(key) => key
                .open_in_place(once(nonce), Aad::empty(), sealed)
                .map(|text| text.len())
                .map_err(|_| Refused),
            Self::Avx512(key) => key.open_in_place(nonce, sealed).map_err(|_| Refused),
        }
    }
}

/// The counters of a session see to it that a nonce seals once.
fn once(nonce: &NonceBytes) -> Nonce {
    Nonce::assume_unique_for_key(*nonce)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_for_the_faster_library_wherever_it_is_there() {
        for cipher in Cipher::ALL {
            let faster = matches!(Key::new(cipher, &[7; 32]).unwrap(), Key::Avx512(_));
            assert_eq!(faster, library() == "intel-ipsec-mb", "{cipher:?}");
        }
    }

    #[test]
    fn what_one_library_seals_the_other_opens_at_every_length() {
        for cipher in Cipher::ALL {
            // Where there is but one library, it is held against itself.
            let faster = Key::new(cipher, &[7; 32]).unwrap();
            let everywhere = Key::everywhere(cipher, &[7; 32]).unwrap();
            for len in (0..=1600).chain([4000, 9000, 65_000]) {
                let nonce = cipher.nonce(len as u64 * 0x0123_4567);
                let text: Vec<u8> = (0..len).map(|i| (i * 7) as u8).collect();
                // One byte further: datagrams do not lie where vectors would like them.
                let mut sealed = [vec![0; 1 + len + TAG_LEN], vec![0; 1 + len + TAG_LEN]];
                faster.seal(&nonce, &text, &mut sealed[0][1..]).unwrap();
                everywhere.seal(&nonce, &text, &mut sealed[1][1..]).unwrap();
                assert_eq!(sealed[0], sealed[1], "{cipher:?}, {len} bytes");
                assert_eq!(faster.open_in_place(&nonce, &mut sealed[1][1..]), Ok(len));
                assert_eq!(everywhere.open_in_place(&nonce, &mut sealed[0][1..]), Ok(len));
                assert_eq!(sealed[0][1..=len], text);
                assert_eq!(sealed[1][1..=len], text);
                let mut in_place = sealed;
                faster.seal_in_place(&nonce, &mut in_place[0][1..]).unwrap();
                everywhere.seal_in_place(&nonce, &mut in_place[1][1..]).unwrap();
                assert_eq!(in_place[0], in_place[1], "{cipher:?}, {len} bytes in place");
            }
        }
    }

    #[test]
    fn a_changed_bit_and_another_nonce_are_refused_by_either_library_and_leave_no_plaintext() {
        for cipher in Cipher::ALL {
            let text = [0x55; 100];
            let nonce = cipher.nonce(1);
            for key in [Key::new(cipher, &[7; 32]).unwrap(), Key::everywhere(cipher, &[7; 32]).unwrap()] {
                let mut sealed = [0; 100 + TAG_LEN];
                key.seal(&nonce, &text, &mut sealed).unwrap();
                for bit in 0..sealed.len() * 8 {
                    let mut changed = sealed;
                    changed[bit / 8] ^= 1 << (bit % 8);
                    assert_eq!(
                        key.open_in_place(&nonce, &mut changed),
                        Err(Refused),
                        "{cipher:?}, bit {bit}"
                    );
                    assert!(!changed.windows(8).any(|part| part == &text[..8]), "{cipher:?}, bit {bit}");
                }
                assert_eq!(key.open_in_place(&cipher.nonce(2), &mut sealed.clone()), Err(Refused));
                assert_eq!(key.open_in_place(&nonce, &mut sealed), Ok(100));
            }
        }
    }

    #[test]
    fn what_is_too_short_is_refused_by_either_library() {
        for cipher in Cipher::ALL {
            let nonce = cipher.nonce(0);
            for key in [Key::new(cipher, &[7; 32]).unwrap(), Key::everywhere(cipher, &[7; 32]).unwrap()] {
                assert_eq!(key.seal_in_place(&nonce, &mut [0; TAG_LEN - 1]), Err(Refused));
                assert_eq!(key.seal(&nonce, &[0; 5], &mut [0; TAG_LEN + 4]), Err(Refused));
                assert_eq!(key.open_in_place(&nonce, &mut [0; TAG_LEN - 1]), Err(Refused));
            }
        }
    }
}
