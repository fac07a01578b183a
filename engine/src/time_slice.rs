//! How long the scheduler should let a thread run at a time.
//!
//! Theory of operation. A thread that wakes up goes before the running one at once if it asked for a shorter slice than
//! that one did; between equal ones it waits until the running slice is over, and the kernel looks whether it is at its
//! ticks only, every 1 to 10 ms (EEVDF: sched(7) and the kernel's sched-eevdf.rst, from Linux 6.12 on). So a thread that
//! carries bulk asks for slices that are shorter than other programs', and a thread that mostly sleeps, and wakes up for
//! somebody's ping, for even shorter ones, so that it need not wait for a busy one of ours either. Nobody gets more of the
//! processor for it.

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
}

impl TimeSlice {
    /// The thread had nothing to do for `time`.
    pub fn waited(&mut self, time: Duration) {
        self.waited += time;
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

    /// Turns of a millisecond, of which the thread waits for `waits`: what it asks for, and after how many milliseconds.
    fn changes(slice: &mut TimeSlice, began: Timestamp, turns: u32, waits: Duration) -> Vec<(u32, Duration)> {
        (1..=turns)
            .filter_map(|turn| {
                slice.waited(waits);
                slice.change(began + turn * MS).map(|changed| (turn, changed))
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
        slice.waited(Duration::from_secs(5));
        assert_eq!(slice.change(BEGAN + 10 * MS + Duration::from_secs(5)), Some(IDLE));
    }
}
