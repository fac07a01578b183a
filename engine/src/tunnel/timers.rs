//! Time: WireGuard's constants and timers (whitepaper §6), and [`Tunnel::poll`], the one place where anything expires.
//!
//! # Theory of operation
//! A packet only writes the deadlines that it changes into its peer's [`Timers`]. The [`Schedule`] holds at most one
//! wake-up per peer, never later than the peer's earliest deadline, but possibly too early: when it comes and nothing
//! is due, `poll` merely moves it on. So a peer in full flow, whose deadlines move with each packet, touches the
//! schedule about once in ten seconds; and a peer without deadlines is not in it at all.
//!
//! What expires, and when:
//! - a session after [`REJECT_AFTER_TIME`], when it may no longer be used (the paper erases keys only after thrice
//!   that time, for want of a timer per session);
//! - a handshake that nobody answers after [`REKEY_ATTEMPT_TIME`], and with it the packets that waited;
//! - a peer's cookie, and our cookie secret and table of sources, after [`super::cookie::COOKIE_LIFETIME`].

use std::collections::BTreeSet;
use std::time::Duration;

use super::peer::Peer;
use super::send::{INITIATION_BURST, INITIATION_RATE, RETRY_BURST, RETRY_RATE};
use super::{Outgoing, PeerId, Tunnel};
use crate::clock::Timestamp;
use crate::drop_reason::DropReason;
use crate::rate_limit::TokenBucket;

/// Messages after which a session is renewed (whitepaper §6.1); see [`super::cipher`] for AES-256-GCM.
pub const REKEY_AFTER_MESSAGES: u64 = 1 << 60;
/// Messages after which a session is over (§6.1: 2^64 - 2^13 - 1).
pub const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);
/// Age at which the initiator renews a session (§6.1).
pub const REKEY_AFTER_TIME: Duration = Duration::from_secs(120);
/// Age at which a session is over (§6.1).
pub const REJECT_AFTER_TIME: Duration = Duration::from_secs(180);
/// How long a handshake is tried (§6.1).
pub const REKEY_ATTEMPT_TIME: Duration = Duration::from_secs(90);
/// The least time between two initiations to a peer, and the time between retries (§6.1).
pub const REKEY_TIMEOUT: Duration = Duration::from_secs(5);
/// Who was sent data, and sent nothing back for so long, sends a keepalive (§6.1).
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// The age at which an initiator that only receives renews a session (§6.2).
pub const REKEY_AFTER_TIME_RECEIVING: Duration = Duration::from_secs(180 - 10 - 5);
/// Who sent data and heard nothing for so long begins a new handshake (§6.5).
pub const NO_REPLY_TIMEOUT: Duration = Duration::from_secs(10 + 5);
/// The greatest random delay of a retry, so that two peers do not keep calling each other at the same time (§6.1).
pub const MAX_JITTER: Duration = Duration::from_nanos(333_333_333);
/// The least time between two initiations of one peer that are answered: 50 a second (as in Linux).
pub const MIN_INITIATION_INTERVAL: Duration = Duration::from_millis(20);

/// The pace of the handshakes that we begin with all peers.
pub struct Pace {
    first: TokenBucket,
    retries: TokenBucket,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            first: TokenBucket::new(INITIATION_RATE, INITIATION_BURST),
            retries: TokenBucket::new(RETRY_RATE, RETRY_BURST),
        }
    }
}

impl Pace {
    /// Takes the next place, and tells when it comes. A call that was in vain before comes behind all the others, which
    /// never wait for such.
    fn reserve(&mut self, in_vain_before: bool, now: Timestamp) -> Timestamp {
        if in_vain_before { self.retries.reserve(self.first.next(now)) } else { self.first.reserve(now) }
    }
}

/// The deadlines of one peer.
#[derive(Default)]
pub struct Timers {
    /// Its entry in the schedule.
    wakeup: Option<Timestamp>,
    /// Begin a handshake, or begin it anew for want of an answer.
    handshake: Option<Timestamp>,
    /// That is the peer's place among the handshakes of all peers, see [`Self::has_to_wait`].
    has_place: bool,
    /// When to stop trying.
    attempt_until: Timestamp,
    /// When the last initiation was sent.
    last_initiation: Option<Timestamp>,
    /// Begin a handshake, because the peer has not answered our data.
    no_reply: Option<Timestamp>,
    /// Send a keepalive, because we have not answered the peer's data.
    keepalive: Option<Timestamp>,
    /// More data came while that keepalive was due already.
    another_keepalive: bool,
    /// Send a keepalive, because nothing went to and fro.
    pub persistent: Option<Timestamp>,
    /// The random delay of the running attempt's retries.
    jitter: Duration,
    /// A packet has set a deadline where there was none. Only that brings the earliest one forward: deadlines that
    /// packets move, they move back.
    is_new: bool,
}

impl Timers {
    /// Somebody wants a session: begins a handshake as soon as permitted, or keeps the running one going.
    pub fn want_handshake(&mut self, now: Timestamp) {
        self.attempt_until = now + REKEY_ATTEMPT_TIME;
        let earliest = self.last_initiation.map_or(now, |last| now.max(last + REKEY_TIMEOUT));
        self.is_new |= self.handshake.is_none();
        self.handshake.get_or_insert(earliest);
    }

    /// Whether the handshake may be begun right now.
    pub fn handshake_due(&self, now: Timestamp) -> bool {
        self.handshake.is_some_and(|due| due <= now)
    }

    /// An initiation went out (or could not): try again later.
    pub fn initiated(&mut self, now: Timestamp, jitter: Duration) {
        self.jitter = jitter;
        self.last_initiation = Some(now);
        self.handshake = Some(now + REKEY_TIMEOUT + jitter);
        self.has_place = false;
    }

    /// There is no handshake to begin any more.
    pub fn forget_handshake(&mut self) {
        self.handshake = None;
        self.has_place = false;
    }

    /// Whether a handshake that is due has to wait: until its place among those of all peers, which is taken here.
    pub fn has_to_wait(&mut self, pace: &mut Pace, in_vain_before: bool, now: Timestamp) -> bool {
        if !self.has_place {
            self.handshake = Some(pace.reserve(in_vain_before, now));
            self.has_place = true;
        }
        !self.handshake_due(now)
    }

    /// A data message with a packet goes out.
    pub fn sent_data(&mut self, now: Timestamp) {
        self.is_new |= self.no_reply.is_none();
        self.no_reply.get_or_insert(now + NO_REPLY_TIMEOUT + self.jitter);
    }

    /// A message goes out that the peer will authenticate.
    pub fn sent(&mut self, now: Timestamp, persistent: Option<Duration>) {
        self.keepalive = None;
        self.another_keepalive = false;
        self.move_persistent(now, persistent);
    }

    /// A data message with a packet has come in.
    pub fn received_data(&mut self, now: Timestamp) {
        self.another_keepalive = self.keepalive.is_some();
        self.is_new |= self.keepalive.is_none();
        self.keepalive.get_or_insert(now + KEEPALIVE_TIMEOUT);
    }

    /// An authentic message has come in.
    pub fn received(&mut self, now: Timestamp, persistent: Option<Duration>) {
        self.no_reply = None;
        self.move_persistent(now, persistent);
    }

    fn move_persistent(&mut self, now: Timestamp, interval: Option<Duration>) {
        self.is_new |= self.persistent.is_none() && interval.is_some();
        self.persistent = interval.map(|interval| now + interval);
    }

    /// The earliest of the deadlines above.
    fn earliest(&self) -> Option<Timestamp> {
        [self.handshake, self.no_reply, self.keepalive, self.persistent].into_iter().flatten().min()
    }
}

/// When [`Tunnel::poll`] must look at which peer.
#[derive(Default)]
pub struct Schedule(BTreeSet<(Timestamp, PeerId)>);

impl Schedule {
    /// The next wake-up.
    fn first(&self) -> Option<Timestamp> {
        self.0.first().map(|&(at, _)| at)
    }

    /// Brings the peer's wake-up forward if a packet has set an earlier deadline. For the packet's way: usually there
    /// is nothing to do.
    pub fn bring_forward(&mut self, peer: &mut Peer) {
        let Timers { wakeup, is_new, .. } = &mut peer.timers;
        let (wakeup, is_new) = (*wakeup, std::mem::take(is_new));
        let is_late = |earliest: Timestamp| wakeup.is_none_or(|wakeup| earliest < wakeup);
        if !is_new {
            debug_assert!(!peer.timers.earliest().is_some_and(is_late), "a deadline came forward unseen");
            return;
        }
        if let Some(earliest) = peer.timers.earliest().filter(|&earliest| is_late(earliest)) {
            self.set(peer, Some(earliest));
        }
    }

    /// Sets the peer's wake-up to the earliest of all its deadlines, those of sessions and cookie included.
    pub fn update(&mut self, peer: &mut Peer) {
        let session = peer.sessions.oldest().map(|established| established + REJECT_AFTER_TIME);
        let deadlines = [peer.timers.earliest(), session, peer.cookie_jar.expiry()];
        self.set(peer, deadlines.into_iter().flatten().min());
    }

    /// Removes the peer.
    pub fn remove(&mut self, peer: &mut Peer) {
        self.set(peer, None);
    }

    fn set(&mut self, peer: &mut Peer, wakeup: Option<Timestamp>) {
        if let Some(old) = peer.timers.wakeup {
            self.0.remove(&(old, peer.id));
        }
        if let Some(new) = wakeup {
            self.0.insert((new, peer.id));
        }
        peer.timers.wakeup = wakeup;
    }

    /// Takes out a peer whose wake-up has come.
    fn pop_due(&mut self, now: Timestamp) -> Option<PeerId> {
        if self.first()? <= now { self.0.pop_first().map(|(_, peer)| peer) } else { None }
    }
}

impl Tunnel {
    /// Does whatever is due: handshakes and their retries, keepalives, the end of sessions, handshakes and cookies.
    pub fn poll(&mut self, now: Timestamp, out: &mut Outgoing) {
        self.admission.expire(now);
        let mut due = std::mem::take(&mut self.due);
        while let Some(id) = self.schedule.pop_due(now) {
            due.push(id);
        }
        for id in due.drain(..) {
            self.poll_peer(id, now, out);
        }
        self.due = due; // Keeps its allocation.
    }

    /// When [`Self::poll`] should be called next; `None` while nothing is pending. May be too early, never too late.
    pub fn next_wakeup(&self) -> Option<Timestamp> {
        self.schedule.first().into_iter().chain(self.admission.expiry()).min()
    }

    fn poll_peer(&mut self, id: PeerId, now: Timestamp, out: &mut Outgoing) {
        let Some(peer) = self.peers.get_mut(id) else { return };
        peer.timers.wakeup = None; // The schedule has let go of it.
        peer.sessions.expire(now, &mut self.indices);
        peer.cookie_jar.expire(now);

        let timers = &mut peer.timers;
        let is_due = |deadline: Option<Timestamp>| deadline.is_some_and(|at| at <= now);
        if is_due(timers.no_reply) {
            timers.no_reply = None;
            timers.want_handshake(now);
        }
        if is_due(timers.keepalive) {
            timers.keepalive = timers.another_keepalive.then(|| now + KEEPALIVE_TIMEOUT);
            timers.another_keepalive = false;
            let again = timers.keepalive;
            // Without a session there is nobody left to be answered.
            peer.send_keepalive(now, out);
            peer.timers.keepalive = again;
        }
        if is_due(peer.timers.persistent) {
            peer.timers.persistent = None;
            if peer.endpoint.is_some() && !peer.send_keepalive(now, out) {
                peer.timers.want_handshake(now);
                peer.timers.persistent = peer.persistent_keepalive.map(|interval| now + interval);
            }
        }
        if is_due(peer.timers.handshake) {
            if peer.timers.attempt_until <= now {
                peer.forget_pending(&mut self.indices);
                self.drops.add(DropReason::HandshakeTimeout, peer.queue.len() as u64);
                peer.queue.clear();
            } else {
                self.begin_handshake(id, now, out);
            }
        }
        if let Some(peer) = self.peers.get_mut(id) {
            self.schedule.update(peer);
        }
    }
}
