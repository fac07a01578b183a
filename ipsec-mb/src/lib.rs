//! AES-256-GCM and ChaCha20-Poly1305 of Intel's Multi-Buffer Crypto library (`intel-ipsec-mb`), behind a safe
//! interface.
//!
//! Where the processor has AVX-512 with IFMA and VAES, that library needs a sixth to two fifths less time for a
//! datagram than the engine's other library (`docs/performance.md`); elsewhere it is slower, and [`Key::new`] gives
//! nothing. So it does where the library was not there when this crate was built (`build.rs`).
//!
//! This crate is the one place besides the engine's system calls that needs `unsafe`: it calls a library in C.

#[cfg(ipsec_mb)]
mod library;
#[cfg(not(ipsec_mb))]
#[path = "absent.rs"]
mod library;

use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

/// Bytes of a key, of either algorithm.
pub const KEY_LEN: usize = 32;
/// Bytes of a nonce, of either algorithm.
pub const NONCE_LEN: usize = 12;
/// Bytes of a tag, of either algorithm.
pub const TAG_LEN: usize = 16;

/// What a key is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Algorithm {
    /// RFC 8439.
    ChaCha20Poly1305,
    /// NIST SP 800-38D.
    Aes256Gcm,
}

/// A key that is ready for use, and wiped when it is dropped.
pub enum Key {
    /// The library's job takes the raw key.
    ChaCha20Poly1305(Box<Zeroizing<[u8; KEY_LEN]>>),
    /// Round keys, and the powers of the hash key.
    Aes256Gcm(Box<library::Schedule>),
}

/// What has not been sealed with this key and nonce, or has been changed since; or the room is too short.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Refused;

/// Whether threads that seal and open at the same time do not write to the same memory: so from version 1.4 on. Before,
/// each message sets the library's global `imb_errno`.
pub fn shares_nothing() -> bool {
    library::shares_nothing()
}

/// Whether keys can be had: the library was there at the build, and is worth it on this processor.
pub fn is_available() -> bool {
    library::with(|_| ()).is_some()
}

impl Key {
    /// A key for `algorithm`; nothing where the library is not there, or not worth it on this processor.
    pub fn new(algorithm: Algorithm, key: &[u8; KEY_LEN]) -> Option<Self> {
        let made = library::with(|manager| match algorithm {
            Algorithm::ChaCha20Poly1305 => {
                let mut own = Box::new(Zeroizing::new([0; KEY_LEN])); // filled where it stays: moves leave copies
                own.copy_from_slice(key);
                Some(Self::ChaCha20Poly1305(own))
            }
            Algorithm::Aes256Gcm => manager.schedule(key).map(Self::Aes256Gcm),
        });
        made.flatten()
    }

    /// Seals `plaintext` into `sealed`, which is as long and a tag longer: ciphertext, then tag. No associated data.
    ///
    /// # Errors
    /// [`Refused`] if `sealed` has another length, or this thread has no memory left for the library, or it refuses.
    pub fn seal(&self, nonce: &[u8; NONCE_LEN], plaintext: &[u8], sealed: &mut [u8]) -> Result<(), Refused> {
        let (ciphertext, tag) = sealed.split_last_chunk_mut().ok_or(Refused)?;
        *tag = library::with(|manager| manager.seal(self, nonce, plaintext, ciphertext))
            .flatten()
            .ok_or(Refused)?;
        Ok(())
    }

    /// [`Self::seal`] in place: `buffer` is the plaintext and room for the tag.
    ///
    /// # Errors
    /// As [`Self::seal`].
    pub fn seal_in_place(&self, nonce: &[u8; NONCE_LEN], buffer: &mut [u8]) -> Result<(), Refused> {
        let (text, tag) = buffer.split_last_chunk_mut().ok_or(Refused)?;
        *tag = library::with(|manager| manager.apply_in_place(self, nonce, text, library::Way::Seal))
            .flatten()
            .ok_or(Refused)?;
        Ok(())
    }

    /// Opens `sealed`, ciphertext and tag, in place; the plaintext begins where it does. Returns its length.
    ///
    /// # Errors
    /// [`Refused`] if it was not sealed so; then nothing of what it would be is left in `sealed`.
    pub fn open_in_place(&self, nonce: &[u8; NONCE_LEN], sealed: &mut [u8]) -> Result<usize, Refused> {
        let (text, tag) = sealed.split_last_chunk_mut::<TAG_LEN>().ok_or(Refused)?;
        let expected = library::with(|manager| manager.apply_in_place(self, nonce, text, library::Way::Open))
            .flatten()
            .ok_or(Refused)?;
        if bool::from(expected.ct_eq(tag)) {
            Ok(text.len())
        } else {
            text.fill(0); // the library deciphers before the tag is known to be right
            Err(Refused)
        }
    }
}
