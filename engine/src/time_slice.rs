//! How long a thread runs at a time.
//!
//! Theory of operation. A thread that wakes up goes before the running one at once if its slice would be over sooner
//! (EEVDF: sched(7) and the kernel's sched-eevdf.rst; Linux lets a thread choose its slice from 6.12 on). So a thread
//! that carries bulk asks for slices that are shorter than other programs', and a thread that mostly sleeps, and wakes
//! up for somebody's ping, for even shorter ones, so that it goes before a busy one of ours, too. Nobody gets more of
//! the processor for it.
//!
//! But a busy thread that is in the second half of its slice goes on, and whether the slice is over the kernel looks at
//! its ticks only, every 1 to 10 ms: as long as that, or several times as long, a ping may wait. So a busy thread
//! itself lets others go first (sched_yield(2)) where a turn ends after the slice. Nobody who wants to run means that
//! it goes on at once. What it loses otherwise, at most another slice (Linux 6.18), only threads of its own session or
//! control group gain, where the kernel shares the processor among these first.

use std::time::Duration;

use crate::clock::Timestamp;

/// The slice of a thread that mostly sleeps: the shortest that the kernel gives.
const IDLE: Duration = Duration::from_micros(100);
/// The slice of a busy one: about a turn.
const BUSY: Duration = Duration::from_micros(200);
/// Over how long it is judged which of the two a thread is.
const PERIOD: Duration = Duration::from_millis(10);

/// Knows how busy its thread is, and which slice it should ask for.
#[derive(Debug, Default)]
pub struct TimeSlice {
    /// What was asked for last.
    asked: Option<Duration>,
    period_began: Timestamp,
    /// How long the thread has waited since then.
    waited: Duration,
    /// Since when it runs.
    slice_began: Timestamp,
}

impl TimeSlice {
    /// The thread had nothing to do from `since` until now.
    pub fn waited(&mut self, since: Timestamp, now: Timestamp) {
        self.waited += now.since(since);
        self.slice_began = now;
    }

    /// Whether the thread has run for a whole slice, so that others should go first.
    pub fn is_over(&self, now: Timestamp) -> bool {
        now.since(self.slice_began) >= BUSY
    }

    /// Others have gone first, whoever wanted to, and the thread runs again.
    pub fn begin(&mut self, now: Timestamp) {
        self.slice_began = now;
    }

    /// The slice to ask for now, if it is another than the last one.
    pub fn change(&mut self, now: Timestamp) -> Option<Duration> {
        let period = now.since(self.period_began);
        if self.asked.is_some() && period < PERIOD {
            return None;
        }
        let is_busy = self.asked.is_some() && self.waited < period / 2;
        let slice = if is_busy { BUSY } else { IDLE };
        self.period_began = now;
        self.waited = Duration::ZERO;
        (self.asked.replace(slice) != Some(slice)).then_some(slice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEGAN: Timestamp = Timestamp::from_secs(10);
    const MS: Duration = Duration::from_millis(1);

    /// Turns of a millisecond, of which the thread waits for `waits`: what it asks for, and after how many
    /// milliseconds.
    fn changes(slice: &mut TimeSlice, began: Timestamp, turns: u32, waits: Duration) -> Vec<(u32, Duration)> {
        (1..=turns)
            .filter_map(|turn| {
                let now = began + turn * MS;
                slice.waited(now, now + waits);
                slice.change(now).map(|changed| (turn, changed))
            })
            .collect()
    }

    #[test]
    fn a_thread_begins_with_the_shortest_slice_and_keeps_it_while_it_mostly_waits() {
        let mut slice = TimeSlice::default();
        assert_eq!(slice.change(BEGAN), Some(IDLE));
        assert_eq!(changes(&mut slice, BEGAN, 100, MS * 6 / 10), []);
    }

    #[test]
    fn a_thread_that_is_busy_for_a_period_asks_for_a_longer_slice_and_goes_back_when_it_no_longer_is() {
        let mut slice = TimeSlice::default();
        slice.change(BEGAN);
        assert_eq!(changes(&mut slice, BEGAN, 100, MS * 4 / 10), [(10, BUSY)]);
        assert_eq!(changes(&mut slice, BEGAN + 100 * MS, 100, MS * 6 / 10), [(10, IDLE)]);
    }

    #[test]
    fn one_long_sleep_ends_a_busy_time() {
        let mut slice = TimeSlice::default();
        slice.change(BEGAN);
        changes(&mut slice, BEGAN, 10, Duration::ZERO);
        let (slept, woken) = (BEGAN + 10 * MS, BEGAN + 10 * MS + Duration::from_secs(5));
        slice.waited(slept, woken);
        assert_eq!(slice.change(woken), Some(IDLE));
    }

    #[test]
    fn a_thread_that_ran_for_a_slice_lets_others_go_first_and_one_that_has_waited_need_not() {
        let mut slice = TimeSlice::default();
        slice.begin(BEGAN);
        assert!(!slice.is_over(BEGAN + BUSY / 2));
        assert!(slice.is_over(BEGAN + BUSY));
        slice.begin(BEGAN + 7 * MS);
        assert!(!slice.is_over(BEGAN + 7 * MS), "the others took their time");
        slice.waited(BEGAN + 7 * MS, BEGAN + 8 * MS);
        assert!(!slice.is_over(BEGAN + 8 * MS + BUSY / 2));
        assert!(slice.is_over(BEGAN + 8 * MS + BUSY));
    }
}
