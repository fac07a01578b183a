//! The anti-replay window of one session (RFC 6479: a bitmap that is used as a ring, so that nothing is shifted).
//!
//! The packet's way asks twice: [`ReplayWindow::is_fresh`] before decryption, which costs an attacker's old messages
//! nothing but a lookup, and [`ReplayWindow::accept`] after it, because only an authentic counter may move the window.

/// Words of the ring. One of them is always being refilled, so that the window is a word shorter than the ring.
const WORDS: usize = 128;
/// How far behind the newest message an older one may arrive, in messages: several whole GSO trains and both cores'
/// worth of reordering (the same as in Linux: `COUNTER_WINDOW_SIZE`).
pub const WINDOW: u64 = (WORDS as u64 - 1) * 64;

/// Which counters were received.
pub struct ReplayWindow {
    /// One more than the greatest counter received; 0 at first.
    next: u64,
    ring: [u64; WORDS],
}

impl ReplayWindow {
    /// A window that has received nothing.
    pub const fn new() -> Self {
        Self { next: 0, ring: [0; WORDS] }
    }

    /// Whether `counter` is neither received before nor too old to tell.
    pub fn is_fresh(&self, counter: u64) -> bool {
        if counter >= self.next {
            return true;
        }
        let (word, bit) = place(counter);
        self.next - counter <= WINDOW && self.ring[word] & bit == 0
    }

    /// Marks the authentic `counter` as received; false if it is not fresh.
    pub fn accept(&mut self, counter: u64) -> bool {
        if !self.is_fresh(counter) {
            return false;
        }
        if counter >= self.next {
            self.advance(counter);
        }
        let (word, bit) = place(counter);
        self.ring[word] |= bit;
        true
    }

    /// Empties the words between the newest counter's and `counter`'s.
    fn advance(&mut self, counter: u64) {
        // The word of counter 0 is empty from the start; otherwise `next - 1` is the newest counter.
        let newest_word = self.next.saturating_sub(1) / 64;
        let words = (counter / 64 - newest_word).min(WORDS as u64);
        for step in 1..=words {
            self.ring[((newest_word + step) % WORDS as u64) as usize] = 0;
        }
        self.next = counter.saturating_add(1);
    }
}

fn place(counter: u64) -> (usize, u64) {
    ((counter / 64 % WORDS as u64) as usize, 1 << (counter % 64))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn each_counter_is_accepted_once() {
        let mut window = ReplayWindow::new();
        for counter in [0, 1, 5, 3, 64, 63, 200, 4] {
            assert!(window.accept(counter), "{counter}");
            assert!(!window.is_fresh(counter), "{counter}");
            assert!(!window.accept(counter), "{counter}");
        }
    }

    #[test]
    fn a_counter_behind_the_window_is_refused() {
        let mut window = ReplayWindow::new();
        assert!(window.accept(WINDOW + 10));
        assert!(window.is_fresh(11));
        assert!(!window.is_fresh(10));
    }

    #[test]
    fn a_leap_forgets_nothing_that_matters() {
        let mut window = ReplayWindow::new();
        assert!(window.accept(3));
        assert!(window.accept(1 << 40));
        assert!(!window.is_fresh(3));
        assert!(window.accept((1 << 40) - WINDOW + 1));
        assert!(window.accept(u64::MAX - 1));
        assert!(!window.accept(u64::MAX - 1));
    }

    proptest! {
        /// The window agrees with a set of all counters ever seen.
        #[test]
        fn the_window_agrees_with_its_model(steps in prop::collection::vec((0u64..WINDOW * 2, any::<bool>()), 1..300)) {
            let mut window = ReplayWindow::new();
            let (mut seen, mut greatest) = (HashSet::new(), 0u64);
            for (step, forward) in steps {
                let counter = if forward { greatest + step } else { greatest.saturating_sub(step) };
                let expected = !seen.contains(&counter) && (seen.is_empty() || counter + WINDOW > greatest);
                prop_assert_eq!(window.is_fresh(counter), expected, "counter {}", counter);
                prop_assert_eq!(window.accept(counter), expected);
                if expected {
                    seen.insert(counter);
                    greatest = greatest.max(counter);
                }
            }
        }
    }
}
