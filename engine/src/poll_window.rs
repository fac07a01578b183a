//! How long a thread looks for more work before it sleeps.
//!
//! Theory of operation. To sleep and to be woken costs two switches of context, and where the whole core fell asleep
//! meanwhile, an interrupt from another core; on a virtual machine that is tens of microseconds, longer than it takes
//! the next train of a bulk flow to come. So a thread that has just had work looks a few times more first, and lets
//! whoever else wants the core go before it at each time.
//!
//! How long it looks adapts as the kernel's own polling does where it would halt (`haltpoll`, guest-halt-polling.rst):
//! twice as long after a sleep that was shorter than the longest look, half as long after a longer one, down to not at
//! all. A packet now and then is not waited for, and an idle gateway costs nothing.

use std::time::Duration;

/// The longest look.
const LONGEST: Duration = Duration::from_micros(50);
/// The shortest one that is worth a system call or two.
const SHORTEST: Duration = Duration::from_micros(10);

/// The time for which to look before sleeping.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PollWindow(Duration);

impl PollWindow {
    /// How long to look now; zero: sleep at once.
    pub fn length(self) -> Duration {
        self.0
    }

    /// A look found nothing, or there was none, and the thread slept for `slept` until there was work.
    pub fn slept(&mut self, slept: Duration) {
        self.0 = if slept <= LONGEST {
            (self.0 * 2).clamp(SHORTEST, LONGEST)
        } else if self.0 > SHORTEST {
            self.0 / 2
        } else {
            Duration::ZERO
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_micros(30);
    const LONG: Duration = Duration::from_millis(1);

    #[test]
    fn short_sleeps_make_it_look_longer_and_longer_up_to_a_bound() {
        let mut window = PollWindow::default();
        let mut before = window.length();
        for _ in 0..10 {
            window.slept(SHORT);
            assert!(window.length() > before || window.length() == LONGEST);
            before = window.length();
        }
        assert_eq!(before, LONGEST);
    }

    #[test]
    fn long_sleeps_make_it_stop_looking() {
        let mut window = PollWindow::default();
        for _ in 0..10 {
            window.slept(SHORT);
        }
        let looks = std::iter::from_fn(|| {
            window.slept(LONG);
            (window.length() > Duration::ZERO).then_some(())
        });
        assert!(looks.take(10).count() < 10);
        assert_eq!(window, PollWindow::default());
    }

    #[test]
    fn whoever_was_idle_sleeps_at_once() {
        let mut window = PollWindow::default();
        window.slept(LONG);
        assert_eq!(window.length(), Duration::ZERO);
    }
}
