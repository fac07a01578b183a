//! When a queue stands: Controlled Delay (CoDel, RFC 8289).
//!
//! Theory of operation. A queue that soaks up a burst is good; one that never gets shorter only makes everybody wait.
//! So not its length counts but how long its head has waited: if that was more than [`TARGET`] for a whole
//! [`INTERVAL`], the head is dropped, and further heads at times that lie ever closer together, until the wait is below
//! the target again. A sender with congestion control slows down by the first drops; whoever does not is dropped ever
//! more often.

use std::time::Duration;

use crate::clock::Timestamp;

/// How long packets may wait all the time (RFC 8289 §3.2, TARGET).
pub const TARGET: Duration = Duration::from_millis(5);
/// How long they may wait for longer than that: about a round trip (RFC 8289 §3.2, INTERVAL).
pub const INTERVAL: Duration = Duration::from_millis(100);
/// Within so many intervals after the last drop, dropping goes on where it was (RFC 8289 §5.4).
const MEMORY: u32 = 16;

/// What is remembered of one queue.
#[derive(Clone, Copy, Default, Debug)]
pub struct CoDel {
    /// When the wait will have been above the target for an interval; `None` while it is below.
    above_until: Option<Timestamp>,
    /// Since when heads are dropped: how many so far, and when the next one is.
    dropping: bool,
    drops: u32,
    drops_before: u32,
    next_drop: Timestamp,
}

impl CoDel {
    /// Whether the queue's head, which has waited for `waited`, is to be dropped; if so, ask again about the next one.
    /// `is_short`: so little waits behind it that the queue is no burden to anybody.
    pub fn drops(&mut self, waited: Duration, is_short: bool, now: Timestamp) -> bool {
        let stands = self.stands(waited, is_short, now);
        if !stands {
            self.dropping = false;
            return false;
        }
        if self.dropping {
            if now < self.next_drop {
                return false;
            }
            self.drops += 1;
            self.next_drop = self.next_drop + self.pause();
            return true;
        }
        self.dropping = true;
        let recent = now.since(self.next_drop) < INTERVAL * MEMORY;
        let more = self.drops - self.drops_before;
        self.drops = if recent && more > 1 { more } else { 1 };
        self.drops_before = self.drops;
        self.next_drop = now + self.pause();
        true
    }

    /// Whether the wait has been above the target for an interval.
    fn stands(&mut self, waited: Duration, is_short: bool, now: Timestamp) -> bool {
        if waited < TARGET || is_short {
            self.above_until = None;
            return false;
        }
        now >= *self.above_until.get_or_insert(now + INTERVAL)
    }

    /// The control law: the time between drops falls with the square root of their number.
    fn pause(&self) -> Duration {
        INTERVAL.div_f64(f64::from(self.drops).sqrt())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const LONG: Duration = Duration::from_millis(6);

    /// Asks once a millisecond, with heads that have waited for `waited`; when they are dropped, in milliseconds.
    fn drops(codel: &mut CoDel, from: u32, until: u32, waited: Duration) -> Vec<u32> {
        let at = |ms: u32| Timestamp::from_secs(10) + MS * ms;
        (from..until).filter(|&ms| codel.drops(waited, false, at(ms))).collect()
    }

    #[test]
    fn a_burst_that_is_gone_within_an_interval_loses_nothing() {
        let mut codel = CoDel::default();
        for burst in 0..10 {
            assert_eq!(drops(&mut codel, burst * 200, burst * 200 + 100, LONG), []);
            assert_eq!(drops(&mut codel, burst * 200 + 100, burst * 200 + 101, TARGET - MS), []);
        }
    }

    #[test]
    fn a_wait_that_never_gets_shorter_is_answered_by_drops_that_come_ever_faster() {
        let dropped = drops(&mut CoDel::default(), 0, 500, LONG);
        // The first after an interval; then 100, 100/sqrt(2), 100/sqrt(3), ... ms apart, rounded up to our asking.
        assert_eq!(dropped[..5], [100, 200, 271, 329, 379]);
    }

    #[test]
    fn drops_end_when_the_wait_is_below_the_target() {
        let mut codel = CoDel::default();
        assert_eq!(drops(&mut codel, 0, 201, LONG), [100, 200]);
        assert_eq!(drops(&mut codel, 201, 202, TARGET - MS), []);
        assert_eq!(drops(&mut codel, 202, 302, LONG), [], "a new interval begins");
    }

    #[test]
    fn a_queue_that_stands_again_soon_is_dropped_at_the_rate_that_helped_before() {
        let mut codel = CoDel::default();
        let before = drops(&mut codel, 0, 1_000, LONG).len();
        drops(&mut codel, 1_000, 1_001, MS);
        let again = drops(&mut codel, 1_001, 1_301, LONG);
        assert_eq!(again[0], 1_101);
        let pause = again[1] - again[0];
        assert!(before > 12 && pause < 35, "{before} drops, then one after {pause} ms");
        let mut late = codel;
        drops(&mut late, 1_301, 1_302, MS);
        let later = drops(&mut late, 4_000, 4_300, LONG);
        assert_eq!(later[..2], [4_100, 4_200], "what was long ago is forgotten");
    }

    #[test]
    fn a_short_queue_keeps_its_head_however_long_that_waited() {
        let mut codel = CoDel::default();
        let now = Timestamp::from_secs(10);
        assert!((0..1_000).all(|ms| !codel.drops(LONG * 100, true, now + MS * ms)));
    }
}
