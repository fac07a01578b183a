//! Word of handshakes that were refused: whoever reads the log sees why a client cannot connect.

use std::net::SocketAddrV4;
use std::time::Duration;

use crate::clock::Timestamp;
use crate::drop_reason::DropReason;

/// The least time between two texts about one reason: whoever is refused tries again every five seconds, and whoever
/// wants to fill the log much faster.
const INTERVAL: Duration = Duration::from_secs(60);

/// Why a handshake is refused.
const REASONS: [DropReason; 5] = [
    DropReason::BadMac,
    DropReason::CookieRequired,
    DropReason::UnknownPeer,
    DropReason::BadHandshake,
    DropReason::HandshakeRateLimited,
];

/// What was told of each reason.
#[derive(Default)]
pub(super) struct RefusedHandshakes([Told; REASONS.len()]);

#[derive(Default)]
struct Told {
    last: Option<Timestamp>,
    /// Refusals since then.
    untold: u64,
}

impl RefusedHandshakes {
    /// Notes that a datagram from `from` died. Gives what there is to tell of it, if it was a handshake's and it is
    /// time.
    pub(super) fn note(&mut self, now: Timestamp, reason: DropReason, from: SocketAddrV4) -> Option<String> {
        let told = &mut self.0[REASONS.iter().position(|&known| known == reason)?];
        if told.last.is_some_and(|last| now.since(last) < INTERVAL) {
            told.untold += 1;
            return None;
        }
        told.last = Some(now);
        let untold = std::mem::take(&mut told.untold);
        let others =
            if untold == 0 { String::new() } else { format!(" {untold} others since the last line.") };
        Some(format!("{} from {from}: {}{others}", reason.name(), reason.explanation()))
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const HERE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(203, 0, 113, 5), 4_000);

    #[test]
    fn of_each_reason_a_refusal_is_told_once_a_minute_with_how_many_there_were() {
        let (mut refused, start) = (RefusedHandshakes::default(), Timestamp::from_secs(1_000));
        let told = refused.note(start, DropReason::UnknownPeer, HERE);
        assert_eq!(
            told.as_deref(),
            Some("unknown_peer from 203.0.113.5:4000: A handshake from a key that is not a peer's.")
        );
        for second in 0..60 {
            assert_eq!(
                refused.note(start + Duration::from_secs(second), DropReason::UnknownPeer, HERE),
                None
            );
        }
        assert!(refused.note(start, DropReason::BadMac, HERE).unwrap().starts_with("bad_mac from"));
        let told = refused.note(start + INTERVAL, DropReason::UnknownPeer, HERE).unwrap();
        assert!(told.ends_with("peer's. 60 others since the last line."), "{told}");
        assert_eq!(refused.note(start, DropReason::BadAuthentication, HERE), None, "a data message's");
    }
}
