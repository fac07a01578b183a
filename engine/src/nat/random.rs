//! Numbers that nobody outside can guess, from a seed that the caller passes in.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// A cryptographic generator: external ports are a secret of sorts (RFC 6056), and so are the hashes' keys.
#[derive(Debug)]
pub(super) struct Random(ChaCha8Rng);

impl Random {
    pub(super) fn new(seed: [u8; 32]) -> Self {
        Self(ChaCha8Rng::from_seed(seed))
    }

    /// A number below `bound`, which is at most 2^32; `None` if there is none.
    pub(super) fn below(&mut self, bound: usize) -> Option<usize> {
        // Multiply and shift; the bias is below bound / 2^64.
        (bound > 0).then(|| ((u128::from(self.0.next_u64()) * bound as u128) >> 64) as usize)
    }

    /// 64 random bits.
    pub(super) fn bits(&mut self) -> u64 {
        self.0.next_u64()
    }
}
