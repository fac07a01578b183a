//! The calls into `shim.c`, and what they rest on.

use std::ffi::c_int;
use std::ptr::NonNull;

use zeroize::Zeroize;

use crate::{KEY_LEN, Key, NONCE_LEN, TAG_LEN};

/// As `shim.c` has it.
const SCHEDULE_LEN: usize = 1024;

/// `IMB_MGR`: only the library looks inside.
#[repr(C)]
struct RawManager {
    _inside: [u8; 0],
}

unsafe extern "C" {
    fn tidegate_mb_new() -> *mut RawManager;
    safe fn tidegate_mb_shares_nothing() -> c_int;
    fn tidegate_mb_free(manager: *mut RawManager);
    fn tidegate_mb_schedule(manager: *mut RawManager, key: *const u8, schedule: *mut u8);
    fn tidegate_mb_aes_gcm(
        manager: *mut RawManager,
        schedule: *const u8,
        seals: c_int,
        nonce: *const u8,
        from: *const u8,
        to: *mut u8,
        len: usize,
        tag: *mut u8,
    ) -> c_int;
    fn tidegate_mb_chacha_poly(
        manager: *mut RawManager,
        key: *const u8,
        seals: c_int,
        nonce: *const u8,
        from: *const u8,
        to: *mut u8,
        len: usize,
        tag: *mut u8,
    ) -> c_int;
}

/// A key schedule of AES-256-GCM.
#[repr(C, align(64))]
pub struct Schedule([u8; SCHEDULE_LEN]);

impl Drop for Schedule {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// Whether a call seals or opens.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Seal,
    Open,
}

/// The library's state: 200 KB, one for each thread that uses it, made at the first use and freed with the thread.
pub struct Manager(NonNull<RawManager>);

thread_local! {
    static MANAGER: Option<Manager> = Manager::new();
}

/// What `f` makes of this thread's manager; nothing where there is none.
pub fn with<T>(f: impl FnOnce(&Manager) -> T) -> Option<T> {
    MANAGER.try_with(|manager| manager.as_ref().map(f)).ok().flatten()
}

/// Whether threads do not write to the same memory for each message.
pub fn shares_nothing() -> bool {
    tidegate_mb_shares_nothing() != 0
}

impl Manager {
    fn new() -> Option<Self> {
        if !is_worth_it() {
            return None;
        }
        // SAFETY: it takes nothing, and gives a pointer that is ours, or null.
        NonNull::new(unsafe { tidegate_mb_new() }).map(Self)
    }

    /// The key schedule of `key`. Nothing if the library refuses.
    pub fn schedule(&self, key: &[u8; KEY_LEN]) -> Option<Box<Schedule>> {
        let mut schedule = Box::new(Schedule([0; SCHEDULE_LEN]));
        // SAFETY: the manager lives, `key` is as long as shim.c says, and `schedule` as long and aligned.
        unsafe { tidegate_mb_schedule(self.0.as_ptr(), key.as_ptr(), schedule.0.as_mut_ptr()) };
        let is_written = schedule.0.iter().any(|&byte| byte != 0); // round keys are never all zero, whatever the key is
        is_written.then_some(schedule)
    }

    /// Seals `plaintext` into `ciphertext`; the tag. Nothing if the lengths differ, or the library refuses.
    pub fn seal(
        &self,
        key: &Key,
        nonce: &[u8; NONCE_LEN],
        plaintext: &[u8],
        ciphertext: &mut [u8],
    ) -> Option<[u8; TAG_LEN]> {
        if plaintext.len() != ciphertext.len() {
            return None;
        }
        // SAFETY: both are slices of this length.
        unsafe {
            self.apply(key, nonce, plaintext.as_ptr(), ciphertext.as_mut_ptr(), plaintext.len(), Way::Seal)
        }
    }

    /// Seals or opens `text` in place; the tag that belongs to the ciphertext. Nothing if the library refuses.
    pub fn apply_in_place(
        &self,
        key: &Key,
        nonce: &[u8; NONCE_LEN],
        text: &mut [u8],
        way: Way,
    ) -> Option<[u8; TAG_LEN]> {
        let (at, len) = (text.as_mut_ptr(), text.len());
        // SAFETY: one slice, which the library may read and write in the same place.
        unsafe { self.apply(key, nonce, at, at, len, way) }
    }

    /// # Safety
    /// `from` can be read and `to` written for `len` bytes, and they are the same or do not overlap.
    unsafe fn apply(
        &self,
        key: &Key,
        nonce: &[u8; NONCE_LEN],
        from: *const u8,
        to: *mut u8,
        len: usize,
        way: Way,
    ) -> Option<[u8; TAG_LEN]> {
        let (manager, nonce, seals) = (self.0.as_ptr(), nonce.as_ptr(), c_int::from(way == Way::Seal));
        let mut tag = [0; TAG_LEN];
        let done = match key {
            // SAFETY: the caller's word for `from` and `to`; the others are as long as shim.c says. The manager is
            // this thread's, and no call into the library leads back here.
            Key::ChaCha20Poly1305(key) => unsafe {
                tidegate_mb_chacha_poly(manager, key.as_ptr(), seals, nonce, from, to, len, tag.as_mut_ptr())
            },
            Key::Aes256Gcm(schedule) => {
                let schedule = schedule.0.as_ptr();
                // SAFETY: as above; the schedule was written by `Self::schedule`, and is aligned.
                unsafe {
                    tidegate_mb_aes_gcm(manager, schedule, seals, nonce, from, to, len, tag.as_mut_ptr())
                }
            }
        };
        (done != 0).then_some(tag)
    }
}

/// Whether the processor has what makes the library faster than others: without these it is slower. The library is
/// asked again, in `shim.c`, and wants more; but version 1.3 never reads XCR0, so it takes for given what the kernel,
/// or a hypervisor, has not enabled. This does (`avx512ifma` is told only with the state of its registers), and may not
/// go.
fn is_worth_it() -> bool {
    std::arch::is_x86_feature_detected!("avx512ifma")
        && std::arch::is_x86_feature_detected!("vaes")
        && std::arch::is_x86_feature_detected!("vpclmulqdq")
}

impl Drop for Manager {
    fn drop(&mut self) {
        // SAFETY: it is ours, and nothing uses it any more.
        unsafe { tidegate_mb_free(self.0.as_ptr()) };
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::fs;
    use std::ptr;

    use super::*;
    use crate::{Algorithm, is_available};

    #[test]
    fn the_library_is_used_exactly_where_the_kernel_names_all_that_it_needs() {
        // What IMB_CPUFLAGS_AVX512_T2 stands for, which shim.c demands. The kernel leaves out what it has not enabled.
        const NEEDED: &str = "sse4_2 cmov aes pclmulqdq avx avx2 bmi2 avx512f avx512dq avx512cd avx512bw avx512vl \
                              avx512ifma vaes vpclmulqdq gfni sha_ni";
        let told = fs::read_to_string("/proc/cpuinfo").unwrap();
        let flags = told.lines().find_map(|line| line.strip_prefix("flags")).unwrap();
        let flags: HashSet<_> = flags.split_whitespace().collect();
        let missing: Vec<_> = NEEDED.split_whitespace().filter(|flag| !flags.contains(flag)).collect();
        assert_eq!(is_available(), missing.is_empty(), "the processor lacks {missing:?}");
    }

    #[test]
    fn a_call_that_the_library_refuses_gives_no_tag() {
        for algorithm in [Algorithm::ChaCha20Poly1305, Algorithm::Aes256Gcm] {
            let Some(key) = Key::new(algorithm, &[7; KEY_LEN]) else { return };
            for way in [Way::Seal, Way::Open] {
                let mut room = [1; 64];
                let tag = with(|manager| {
                    let (to, len) = (room.as_mut_ptr(), room.len());
                    // SAFETY: the library looks for null before it reads anything (IMB_FEATURE_SAFE_PARAM).
                    unsafe { manager.apply(&key, &[0; NONCE_LEN], ptr::null(), to, len, way) }
                });
                assert_eq!(tag, Some(None), "{algorithm:?}");
                assert_eq!(room, [1; 64], "{algorithm:?}");
            }
        }
    }
}
