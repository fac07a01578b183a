//! Which library seals and opens the data messages of a session.
//!
//! `aws-lc-rs` can do it on every processor. Two libraries need a sixth to two fifths less time where the processor is
//! right for them (`docs/performance.md`): Intel's Multi-Buffer library with AVX-512, if it was there at the build,
//! and, for AES-256-GCM alone, `ring` with VAES but no AVX-512. Short messages of ChaCha20-Poly1305 are left to
//! `aws-lc-rs` where Intel's seals the others: for them it is as fast, and has less code to fetch when a ping comes
//! after a rest. All compute the same functions of the same keys and nonces, so the other end cannot tell which it was.

use std::hint::black_box;

use aws_lc_rs::aead::{AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use tidegate_ipsec_mb as ipsec_mb;

use super::cipher::Cipher;
use super::messages::TAG_LEN;

/// Four zero bytes and a counter, which is never used twice with one key.
pub(super) type NonceBytes = [u8; ipsec_mb::NONCE_LEN];

/// What a library does not seal or open: a message that is not what was sealed; in sealing, nothing that comes up here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Refused;

/// A key made ready for its library, so that a packet costs a nonce and one pass over its bytes. Each overwrites the
/// key's memory when it is dropped (`aws-lc-rs` in its `OPENSSL_free`).
pub(super) enum Key {
    /// `aws-lc-rs`.
    Everywhere(Box<LessSafeKey>),
    /// Intel's.
    Avx512 {
        /// For messages longer than [`SHORT`], or for all.
        long: ipsec_mb::Key,
        /// For the others.
        short: Option<Box<LessSafeKey>>,
    },
    /// `ring`'s, for AES-256-GCM.
    Vaes(RingKey),
}

/// The longest text that `aws-lc-rs` seals and opens in the same time as Intel's library (ChaCha20-Poly1305, Zen 4).
const SHORT: usize = 256;

/// The key that a message is for.
enum Chosen<'a> {
    AwsLcRs(&'a LessSafeKey),
    Intel(&'a ipsec_mb::Key),
    Ring(&'a RingKey),
}

/// Which library keys are for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Library {
    /// `aws-lc-rs`.
    AwsLcRs,
    /// Intel's Multi-Buffer library.
    IntelIpsecMb,
    /// `ring` for AES-256-GCM; for ChaCha20-Poly1305, of which it has the same code, `aws-lc-rs`.
    Ring,
}

/// With how many threads Intel's library before its version 1.4 is used. There each message writes a variable that all
/// threads share (`imb_errno`; intel-ipsec-mb issue 112): of two threads at once that seal ChaCha20-Poly1305, 1,408
/// bytes each, it takes 2 to 3 % of the time. With many, the cache line of it goes around more slowly than they seal.
const THREADS_BEFORE_1_4: u8 = 4;

impl Library {
    /// The fastest one, where `threads` seal and open at the same time.
    pub fn fastest(threads: u8) -> Self {
        let shares_nothing = ipsec_mb::shares_nothing() || threads <= THREADS_BEFORE_1_4;
        if shares_nothing && ipsec_mb::is_available() {
            Self::IntelIpsecMb
        } else if has_vaes_without_avx512() {
            Self::Ring
        } else {
            Self::AwsLcRs
        }
    }

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::AwsLcRs => "aws-lc-rs",
            Self::IntelIpsecMb => "intel-ipsec-mb",
            Self::Ring => "ring",
        }
    }
}

/// Whether the processor encrypts two blocks with one AES instruction (Zen 3, Alder Lake), which `ring` uses and
/// `aws-lc-rs` does not; with AVX-512, four, which is the other way round.
fn has_vaes_without_avx512() -> bool {
    #[cfg(target_arch = "x86_64")]
    let has = std::arch::is_x86_feature_detected!("vaes")
        && std::arch::is_x86_feature_detected!("vpclmulqdq")
        && std::arch::is_x86_feature_detected!("avx2")
        && !std::arch::is_x86_feature_detected!("avx512f");
    #[cfg(not(target_arch = "x86_64"))]
    let has = false;
    has
}

/// A key of `ring` for AES-256-GCM.
pub(super) struct RingKey(Box<ring::aead::LessSafeKey>);

impl RingKey {
    fn new(key: &[u8; 32]) -> Result<Self, Refused> {
        Ok(Self(Box::new(Self::ready(key)?)))
    }

    fn ready(key: &[u8; 32]) -> Result<ring::aead::LessSafeKey, Refused> {
        let key = ring::aead::UnboundKey::new(&ring::aead::AES_256_GCM, key).map_err(|_| Refused)?;
        Ok(ring::aead::LessSafeKey::new(key))
    }

    /// Seals `buffer`, which is the plaintext and room for the tag, in place.
    fn seal_in_place(&self, nonce: &NonceBytes, buffer: &mut [u8]) -> Result<(), Refused> {
        let nonce = ring::aead::Nonce::assume_unique_for_key(*nonce);
        let (text, tag_room) = buffer.split_last_chunk_mut::<TAG_LEN>().ok_or(Refused)?;
        let tag =
            self.0.seal_in_place_separate_tag(nonce, ring::aead::Aad::empty(), text).map_err(|_| Refused)?;
        tag_room.copy_from_slice(tag.as_ref());
        Ok(())
    }

    /// Opens `sealed` in place; returns the plaintext's length.
    fn open_in_place(&self, nonce: &NonceBytes, sealed: &mut [u8]) -> Result<usize, Refused> {
        let nonce = ring::aead::Nonce::assume_unique_for_key(*nonce);
        let text = self.0.open_in_place(nonce, ring::aead::Aad::empty(), sealed).map_err(|_| Refused)?;
        Ok(text.len())
    }
}

impl Drop for RingKey {
    /// `ring` leaves keys in memory: another key takes the place of this one. (What its constructor left on the stack
    /// is out of reach.)
    fn drop(&mut self) {
        if let Ok(zeros) = Self::ready(&[0; 32]) {
            *self.0 = zeros;
            black_box(&mut self.0); // or the compiler might leave out a write that nobody reads
        }
    }
}

impl Key {
    /// `key` for the AEAD of `cipher`, with `library`, or with `aws-lc-rs` where that has no memory left for this
    /// thread.
    ///
    /// # Errors
    /// [`Refused`] by a library that takes no key of 32 bytes, which there is not.
    pub(super) fn new(library: Library, cipher: Cipher, key: &[u8; 32]) -> Result<Self, Refused> {
        let algorithm = match cipher {
            Cipher::ChaCha20Poly1305 => ipsec_mb::Algorithm::ChaCha20Poly1305,
            Cipher::Aes256Gcm => ipsec_mb::Algorithm::Aes256Gcm,
        };
        let intel = match (library, cipher) {
            (Library::IntelIpsecMb, _) => ipsec_mb::Key::new(algorithm, key),
            (Library::Ring, Cipher::Aes256Gcm) => return RingKey::new(key).map(Self::Vaes),
            (Library::Ring, Cipher::ChaCha20Poly1305) | (Library::AwsLcRs, _) => None,
        };
        let Some(long) = intel else { return Ok(Self::Everywhere(Self::aws_lc_rs(cipher, key)?)) };
        let short = match cipher {
            Cipher::ChaCha20Poly1305 => Some(Self::aws_lc_rs(cipher, key)?),
            Cipher::Aes256Gcm => None, // of which short messages, too, take Intel's library half the time
        };
        Ok(Self::Avx512 { long, short })
    }

    fn aws_lc_rs(cipher: Cipher, key: &[u8; 32]) -> Result<Box<LessSafeKey>, Refused> {
        let algorithm = match cipher {
            Cipher::ChaCha20Poly1305 => &CHACHA20_POLY1305,
            Cipher::Aes256Gcm => &AES_256_GCM,
        };
        let key = UnboundKey::new(algorithm, key).map_err(|_| Refused)?;
        Ok(Box::new(LessSafeKey::new(key)))
    }

    /// The key for a text of `len` bytes.
    fn choose(&self, len: usize) -> Chosen<'_> {
        match self {
            Self::Everywhere(key) => Chosen::AwsLcRs(key),
            Self::Avx512 { short: Some(key), .. } if len <= SHORT => Chosen::AwsLcRs(key),
            Self::Avx512 { long, .. } => Chosen::Intel(long),
            Self::Vaes(key) => Chosen::Ring(key),
        }
    }

    /// Seals `buffer`, which is the plaintext and room for the tag, in place.
    pub(super) fn seal_in_place(&self, nonce: &NonceBytes, buffer: &mut [u8]) -> Result<(), Refused> {
        match self.choose(buffer.len().saturating_sub(TAG_LEN)) {
            Chosen::AwsLcRs(key) => {
                let (text, tag_room) = buffer.split_last_chunk_mut::<TAG_LEN>().ok_or(Refused)?;
                let tag =
                    key.seal_in_place_separate_tag(once(nonce), Aad::empty(), text).map_err(|_| Refused)?;
                tag_room.copy_from_slice(tag.as_ref());
                Ok(())
            }
            Chosen::Intel(key) => key.seal_in_place(nonce, buffer).map_err(|_| Refused),
            Chosen::Ring(key) => key.seal_in_place(nonce, buffer),
        }
    }

    /// Seals `plaintext` into `sealed`, which is a tag longer.
    pub(super) fn seal(
        &self,
        nonce: &NonceBytes,
        plaintext: &[u8],
        sealed: &mut [u8],
    ) -> Result<(), Refused> {
        match self.choose(plaintext.len()) {
            Chosen::AwsLcRs(key) => {
                let (text, tag_room) = sealed.split_last_chunk_mut::<TAG_LEN>().ok_or(Refused)?;
                key.seal_out_of_place_scatter(once(nonce), Aad::empty(), plaintext, text, &[], tag_room)
                    .map_err(|_| Refused)
            }
            Chosen::Intel(key) => key.seal(nonce, plaintext, sealed).map_err(|_| Refused),
            Chosen::Ring(key) => {
                // `ring` seals in place only. The copy costs a tenth of what it saves.
                let (text, _) = sealed.split_last_chunk_mut::<TAG_LEN>().ok_or(Refused)?;
                if text.len() != plaintext.len() {
                    return Err(Refused);
                }
                text.copy_from_slice(plaintext);
                key.seal_in_place(nonce, sealed)
            }
        }
    }

    /// Opens `sealed`, ciphertext and tag, in place; the plaintext begins where it does. Returns its length.
    pub(super) fn open_in_place(&self, nonce: &NonceBytes, sealed: &mut [u8]) -> Result<usize, Refused> {
        match self.choose(sealed.len().saturating_sub(TAG_LEN)) {
            Chosen::AwsLcRs(key) => key
                .open_in_place(once(nonce), Aad::empty(), sealed)
                .map(|text| text.len())
                .map_err(|_| Refused),
            Chosen::Intel(key) => key.open_in_place(nonce, sealed).map_err(|_| Refused),
            Chosen::Ring(key) => key.open_in_place(nonce, sealed),
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

    /// A key for the library that is the faster one here. Where there is but one, it is held against itself.
    fn faster(cipher: Cipher) -> Key {
        Key::new(Library::fastest(1), cipher, &[7; 32]).unwrap()
    }

    fn everywhere(cipher: Cipher) -> Key {
        Key::new(Library::AwsLcRs, cipher, &[7; 32]).unwrap()
    }

    #[test]
    fn keys_are_for_the_library_that_was_asked_for() {
        for cipher in Cipher::ALL {
            let key = faster(cipher);
            match (Library::fastest(1), cipher) {
                (Library::IntelIpsecMb, _) => assert!(matches!(key, Key::Avx512 { .. }), "{cipher:?}"),
                (Library::Ring, Cipher::Aes256Gcm) => assert!(matches!(key, Key::Vaes(_))),
                _ => assert!(matches!(key, Key::Everywhere(_)), "{cipher:?}"),
            }
            assert!(matches!(everywhere(cipher), Key::Everywhere(_)), "{cipher:?}");
        }
    }

    #[test]
    fn many_threads_do_not_use_a_library_that_lets_them_write_to_one_place() {
        let many = THREADS_BEFORE_1_4 + 1;
        assert_eq!(Library::fastest(THREADS_BEFORE_1_4), Library::fastest(1));
        let expected = match Library::fastest(1) {
            Library::IntelIpsecMb if !ipsec_mb::shares_nothing() => Library::AwsLcRs,
            fastest => fastest,
        };
        assert_eq!(Library::fastest(many), expected);
    }

    #[test]
    fn what_one_library_seals_the_other_opens_at_every_length() {
        for cipher in Cipher::ALL {
            let (faster, everywhere) = (faster(cipher), everywhere(cipher));
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
            for key in [faster(cipher), everywhere(cipher)] {
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
            for key in [faster(cipher), everywhere(cipher)] {
                assert_eq!(key.seal_in_place(&nonce, &mut [0; TAG_LEN - 1]), Err(Refused));
                assert_eq!(key.seal(&nonce, &[0; 5], &mut [0; TAG_LEN + 4]), Err(Refused));
                assert_eq!(key.open_in_place(&nonce, &mut [0; TAG_LEN - 1]), Err(Refused));
            }
        }
    }
}
