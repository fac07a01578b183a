//! Token buckets.

use std::time::Duration;

use crate::clock::Timestamp;

/// Admits `rate` events per second on average, and `burst` at once.
///
/// It is kept as the time at which the bucket would be full again (GCRA, ITU-T I.371 annex A), so nothing has to be
/// refilled and an idle bucket costs nothing.
#[derive(Clone, Copy, Debug)]
pub struct TokenBucket {
    /// What one token costs, in nanoseconds; zero if nothing is ever admitted.
    interval: u64,
    /// How far the time of fullness may lie ahead before the bucket is empty, in nanoseconds.
    depth: u64,
    full_at: Timestamp,
}

impl TokenBucket {
    /// A full bucket of `burst` tokens (at least one), into which `rate` tokens drip per second. Zero admits nothing.
    pub const fn new(rate: u32, burst: u32) -> Self {
        let interval = if rate == 0 { 0 } else { 1_000_000_000u64.div_ceil(rate as u64) };
        let burst = if burst == 0 { 1 } else { burst };
        Self { interval, depth: interval * burst as u64, full_at: Timestamp::ORIGIN }
    }

    /// Takes one token, if there is one.
    pub fn take(&mut self, now: Timestamp) -> bool {
        self.take_cost(now, 1)
    }

    /// Takes `cost` tokens if there is at least one; what is missing stays owed.
    pub fn take_cost(&mut self, now: Timestamp, cost: u32) -> bool {
        let has_one =
            self.interval > 0 && self.full_at + Duration::from_nanos(self.interval) <= self.empty_at(now);
        if has_one {
            self.full_at = self.full_at.max(now) + Duration::from_nanos(self.interval * u64::from(cost));
        }
        has_one
    }

    /// Takes one token, in advance where there is none, and tells when it is there. Not for a rate of zero, which has
    /// none.
    pub fn reserve(&mut self, now: Timestamp) -> Timestamp {
        let at = self.next(now);
        self.full_at = self.full_at.max(now) + Duration::from_nanos(self.interval);
        at
    }

    /// When the next token is there that nobody has taken.
    pub fn next(&self, now: Timestamp) -> Timestamp {
        let full_at = self.full_at.max(now) + Duration::from_nanos(self.interval);
        now.max(full_at - Duration::from_nanos(self.depth))
    }

    /// Whether it holds all its tokens, and so remembers nothing.
    pub fn is_full(&self, now: Timestamp) -> bool {
        self.full_at <= now
    }

    /// The time of fullness that a bucket without a token would have.
    fn empty_at(&self, now: Timestamp) -> Timestamp {
        now + Duration::from_nanos(self.depth)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Timestamp = Timestamp::from_secs(1000);

    fn admitted(bucket: &mut TokenBucket, now: Timestamp, attempts: usize) -> usize {
        (0..attempts).filter(|_| bucket.take(now)).count()
    }

    #[test]
    fn a_full_bucket_admits_its_burst_and_then_its_rate() {
        let mut bucket = TokenBucket::new(10, 5);
        assert_eq!(admitted(&mut bucket, START, 100), 5);
        assert_eq!(admitted(&mut bucket, START + Duration::from_millis(99), 100), 0);
        assert_eq!(admitted(&mut bucket, START + Duration::from_millis(100), 100), 1);
        assert_eq!(admitted(&mut bucket, START + Duration::from_millis(400), 100), 3);
    }

    #[test]
    fn idle_time_never_saves_more_than_the_burst() {
        let mut bucket = TokenBucket::new(10, 5);
        assert_eq!(admitted(&mut bucket, START, 100), 5);
        assert!(!bucket.is_full(START + Duration::from_millis(499)));
        assert!(bucket.is_full(START + Duration::from_millis(500)));
        assert_eq!(admitted(&mut bucket, START + Duration::from_secs(3600), 100), 5);
    }

    #[test]
    fn a_rate_of_zero_admits_nothing() {
        assert!(!TokenBucket::new(0, 100).take(START));
    }

    #[test]
    fn a_bucket_is_full_at_the_origin_of_time() {
        assert_eq!(admitted(&mut TokenBucket::new(1, 3), Timestamp::ORIGIN, 10), 3);
    }

    #[test]
    fn a_token_in_advance_is_there_when_its_turn_comes() {
        let mut bucket = TokenBucket::new(10, 2);
        let after = [0, 0, 100, 200].map(Duration::from_millis);
        assert_eq!([(); 4].map(|()| bucket.reserve(START)), after.map(|after| START + after));
        assert_eq!(bucket.next(START), START + Duration::from_millis(300));
        assert!(!bucket.take(START + Duration::from_millis(299)), "those in advance are owed");
        assert!(bucket.take(START + Duration::from_millis(300)));
    }

    #[test]
    fn a_cost_of_several_tokens_is_owed() {
        let mut bucket = TokenBucket::new(10, 1);
        assert!(bucket.take_cost(START, 3));
        assert!(!bucket.take(START + Duration::from_millis(299)));
        assert!(bucket.take(START + Duration::from_millis(300)));
    }
}
