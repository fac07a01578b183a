//! Which AEAD protects the data messages of a peer: its keys, its nonces, its limits.
//!
//! `docs/protocol.md` is the specification of [`Cipher::Aes256Gcm`], with the argument for its safety and with test
//! vectors, which `tests/vectors.rs` holds against this file.

use aws_lc_rs::hkdf;
use zeroize::Zeroizing;

use super::aead::{Key, Library, NonceBytes};
use super::timers::{REJECT_AFTER_MESSAGES, REKEY_AFTER_MESSAGES};
use crate::drop_reason::DropReason;

/// Which AEAD protects the data messages of a peer. Configured on both ends, never negotiated: an attacker cannot
/// talk two peers into another one, and peers that disagree simply do not understand each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Cipher {
    /// WireGuard's own (RFC 8439).
    #[default]
    ChaCha20Poly1305,
    /// AES-256-GCM (NIST SP 800-38D), between Tidegate peers only: faster where the processor has AES instructions.
    Aes256Gcm,
}

/// Salt of the HKDF that turns a handshake's keys into AES keys, so that no key serves two ciphers.
pub(super) const AES_KEY_SALT: &[u8] = b"tidegate aes-256-gcm v1";
/// The HKDF's `info`.
pub(super) const AES_KEY_INFO: &[u8] = b"transport key";

/// Messages after which an AES-256-GCM session is renewed: RFC 9001 §6.6 and its appendix B.1.1 grant 2^28 packets of
/// up to 2^11 bytes to one AES-GCM key.
const AES_REKEY_AFTER_MESSAGES: u64 = 1 << 28;
/// Messages after which an AES-256-GCM session is over: room for a handshake at full speed.
const AES_REJECT_AFTER_MESSAGES: u64 = 1 << 29;

impl Cipher {
    /// Every cipher.
    pub const ALL: [Self; 2] = [Self::ChaCha20Poly1305, Self::Aes256Gcm];

    /// Its name in settings, profiles and lists.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ChaCha20Poly1305 => "chacha20-poly1305",
            Self::Aes256Gcm => "aes-256-gcm",
        }
    }

    /// The cipher of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|cipher| cipher.name() == name)
    }

    /// Whether this processor can run it at its proper speed. The AEAD library has AES in software as well, which is
    /// slower than ChaCha20-Poly1305: whoever asks for AES-256-GCM there asks for the opposite of what it is for.
    pub fn is_available(self) -> bool {
        match self {
            Self::ChaCha20Poly1305 => true,
            Self::Aes256Gcm => aes_available(),
        }
    }

    /// Messages sealed under one key after which the session is renewed.
    pub(super) const fn rekey_after_messages(self) -> u64 {
        match self {
            Self::ChaCha20Poly1305 => REKEY_AFTER_MESSAGES,
            Self::Aes256Gcm => AES_REKEY_AFTER_MESSAGES,
        }
    }

    /// Messages under one key after which it is neither sealed nor opened with any more.
    pub(super) const fn reject_after_messages(self) -> u64 {
        match self {
            Self::ChaCha20Poly1305 => REJECT_AFTER_MESSAGES,
            Self::Aes256Gcm => AES_REJECT_AFTER_MESSAGES,
        }
    }

    /// The raw transport key `key` that the handshake left behind, made ready for `library` to seal and open with.
    ///
    /// # Errors
    /// [`DropReason::BadHandshake`] if the AEAD library refuses the key, which it does not for one of the right length.
    pub(super) fn schedule(self, library: Library, key: &[u8; 32]) -> Result<Key, DropReason> {
        match self {
            Self::ChaCha20Poly1305 => Key::new(library, self, key).map_err(|_| DropReason::BadHandshake),
            Self::Aes256Gcm => {
                let mut derived = Zeroizing::new([0; 32]);
                hkdf::Salt::new(hkdf::HKDF_SHA256, AES_KEY_SALT)
                    .extract(key)
                    .expand(&[AES_KEY_INFO], AesKeyLength)
                    .and_then(|key| key.fill(&mut *derived))
                    .map_err(|_| DropReason::BadHandshake)?;
                Key::new(library, self, &derived).map_err(|_| DropReason::BadHandshake)
            }
        }
    }

    /// Four zero bytes and the counter: little-endian for ChaCha20-Poly1305 (whitepaper §5.4.6), big-endian for
    /// AES-GCM (as Noise revision 34 §12.4 has it).
    pub(super) fn nonce(self, counter: u64) -> NonceBytes {
        let mut nonce = NonceBytes::default();
        nonce[4..].copy_from_slice(&match self {
            Self::ChaCha20Poly1305 => counter.to_le_bytes(),
            Self::Aes256Gcm => counter.to_be_bytes(),
        });
        nonce
    }
}

/// How much the HKDF is to give.
pub(super) struct AesKeyLength;

impl hkdf::KeyType for AesKeyLength {
    fn len(&self) -> usize {
        32
    }
}

/// Whether this processor has the instructions that make AES-GCM fast: AES rounds and carry-less multiplication.
fn aes_available() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        std::arch::is_x86_feature_detected!("aes") && std::arch::is_x86_feature_detected!("pclmulqdq")
    }
    #[cfg(target_arch = "aarch64")]
    {
        std::arch::is_aarch64_feature_detected!("aes") // with PMULL, in Rust's book
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cipher_is_found_by_its_name_and_by_no_other() {
        for cipher in Cipher::ALL {
            assert_eq!(Cipher::from_name(cipher.name()), Some(cipher));
        }
        for name in ["", "AES-256-GCM", "aes-128-gcm", "chacha20"] {
            assert_eq!(Cipher::from_name(name), None);
        }
    }

    #[test]
    fn wireguards_cipher_runs_everywhere() {
        assert!(Cipher::ChaCha20Poly1305.is_available());
    }
}
