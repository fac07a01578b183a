//! What we have sealed, known by its name on the wire, should it come back to be sealed once more.
//!
//! Theory of operation. A data message names its session by the index that its receiver has given out, so what we seal
//! is known by the indices that our peers have given us, on whichever shard they live: two peers may well each get what
//! was for the other. An index is remembered for as long as a session lives ([`REJECT_AFTER_TIME`]), at least. There
//! are two generations of them, the older one of which goes when the younger has its age or its bound, which is seen to
//! when an index is added: nothing has to be done when a session ends, or by a timer.

use std::time::Duration;

use foldhash::fast::RandomState;
use hashbrown::HashSet;

use super::timers::REJECT_AFTER_TIME;
use crate::clock::Timestamp;

/// Indices of one generation. A thousand peers have 1,500 sessions in its time; one peer that does nothing but begin
/// new ones, 9,000.
pub const OWN_SESSIONS: usize = 65_536;
const LIFETIME: Duration = REJECT_AFTER_TIME;

/// The remote indices of the sessions of late.
#[derive(Default)]
pub struct OwnDatagrams {
    recent: HashSet<u32, RandomState>,
    older: HashSet<u32, RandomState>,
    /// When the younger generation began.
    since: Timestamp,
}

impl OwnDatagrams {
    /// Notes the index that a peer gave out for a session.
    pub fn add(&mut self, remote_index: u32, now: Timestamp) {
        if now.since(self.since) >= LIFETIME || self.recent.len() >= OWN_SESSIONS {
            std::mem::swap(&mut self.older, &mut self.recent);
            self.recent.clear();
            self.since = now;
        }
        self.recent.insert(remote_index);
    }

    /// Whether a data message to this index is one of ours.
    pub fn contains(&self, remote_index: u32) -> bool {
        self.recent.contains(&remote_index) || self.older.contains(&remote_index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp::from_secs(1_000);

    #[test]
    fn an_index_is_remembered_for_as_long_as_a_session_lives_and_not_for_ever() {
        let mut own = OwnDatagrams::default();
        own.add(1, NOW);
        own.add(2, NOW + Duration::from_secs(179));
        own.add(3, NOW + Duration::from_secs(180));
        own.add(4, NOW + Duration::from_secs(359));
        assert!((1..=4).all(|index| own.contains(index)) && !own.contains(5));
        own.add(5, NOW + Duration::from_secs(360));
        assert!(!own.contains(1) && !own.contains(2) && (3..=5).all(|index| own.contains(index)));
    }

    #[test]
    fn no_more_are_remembered_than_fit() {
        let mut own = OwnDatagrams::default();
        (0..10 * OWN_SESSIONS as u32).for_each(|index| own.add(index, NOW));
        assert!(own.recent.len() + own.older.len() <= 2 * OWN_SESSIONS);
        assert!((9 * OWN_SESSIONS as u32..10 * OWN_SESSIONS as u32).all(|index| own.contains(index)));
    }
}
