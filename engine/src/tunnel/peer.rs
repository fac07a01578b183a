//! One peer: its keys, its sessions, what waits for it, and its timers.

use std::collections::VecDeque;
use std::net::SocketAddrV4;
use std::time::Duration;

use zeroize::Zeroizing;

use super::PeerId;
use super::cipher::Cipher;
use super::cookie::{CookieJar, MacKeys};
use super::handshake::SentInitiation;
use super::index::IndexTable;
use super::messages::TIMESTAMP_LEN;
use super::session::Session;
use super::timers::Timers;
use crate::clock::Timestamp;
use crate::path::Path;
use crate::rate_limit::TokenBucket;

/// How often a peer may be somewhere new, at once and then per second. The kernel keeps some packets for each neighbour
/// whose link address it asks for, and charges them to the socket that all peers of the shard share: who was somewhere
/// else with each message would fill it.
pub const MOVES_AT_ONCE: u32 = 3;
const MOVES_PER_SECOND: u32 = 1;

/// What a caller configures of a peer.
#[derive(Clone)]
pub struct PeerConfig {
    /// X25519 public key.
    pub public_key: [u8; 32],
    /// A second secret, mixed into the handshake (whitepaper §5.2).
    pub preshared_key: Option<Zeroizing<[u8; 32]>>,
    /// Where to find the peer, until it is heard of elsewhere. `None` leaves what is known.
    pub endpoint: Option<SocketAddrV4>,
    /// Send something at least this often (§6.5), so that a NAT on the way keeps its mapping. A peer with an interval
    /// and an endpoint is called at once.
    pub persistent_keepalive: Option<Duration>,
    /// The AEAD of its data messages; both ends must agree.
    pub cipher: Cipher,
}

/// What there is to tell about a peer.
#[derive(Clone, Copy, Debug)]
pub struct PeerStats {
    /// The peer.
    pub id: PeerId,
    /// Its public key.
    pub public_key: [u8; 32],
    /// Where it was heard of last.
    pub endpoint: Option<SocketAddrV4>,
    /// When a handshake was completed last.
    pub last_handshake: Option<Timestamp>,
    /// What was received and sent.
    pub traffic: PeerTraffic,
}

/// Data messages by direction, keepalives left out. Bytes are those of the inner packets (received: with padding).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PeerTraffic {
    /// Inner bytes received from the peer.
    pub received_bytes: u64,
    /// Inner bytes sent to the peer.
    pub sent_bytes: u64,
    /// Inner packets received from the peer.
    pub received_packets: u64,
    /// Inner packets sent to the peer.
    pub sent_packets: u64,
}

/// A handshake that we began.
pub struct Pending {
    /// Our index.
    pub local_index: u32,
    /// The Noise state that waits for the response.
    pub initiation: SentInitiation,
}

/// A peer.
pub struct Peer {
    pub id: PeerId,
    pub public_key: [u8; 32],
    /// Zero if there is none (whitepaper §5.4.2).
    pub preshared_key: Zeroizing<[u8; 32]>,
    pub cipher: Cipher,
    pub persistent_keepalive: Option<Duration>,
    pub endpoint: Option<Path>,
    whereabouts: Whereabouts,
    pub mac_keys: MacKeys,
    pub cookie_jar: CookieJar,
    pub sessions: Sessions,
    pub pending: Option<Pending>,
    /// Packets that wait for a session; bounded by `QUEUE_LIMIT`, dropped when the handshake is given up.
    pub queue: VecDeque<Vec<u8>>,
    /// The greatest timestamp of the peer's initiations: an initiation that is not greater is a replay (§5.1).
    pub greatest_timestamp: Option<[u8; TIMESTAMP_LEN]>,
    /// Of our last initiation: the peer takes none that is not later, whatever the clock says.
    pub last_timestamp_sent: Option<[u8; TIMESTAMP_LEN]>,
    pub last_initiation_received: Option<Timestamp>,
    pub last_handshake: Option<Timestamp>,
    /// Initiations that we sent since the last handshake.
    pub unanswered: u32,
    pub timers: Timers,
    pub traffic: PeerTraffic,
}

impl Peer {
    /// A peer that has never been heard of.
    pub fn new(id: PeerId, config: &PeerConfig) -> Self {
        Self {
            id,
            public_key: config.public_key,
            preshared_key: config.preshared_key.clone().unwrap_or_default(),
            cipher: config.cipher,
            persistent_keepalive: None,
            endpoint: None,
            whereabouts: Whereabouts::default(),
            mac_keys: MacKeys::new(&config.public_key),
            cookie_jar: CookieJar::default(),
            sessions: Sessions::default(),
            pending: None,
            queue: VecDeque::new(),
            greatest_timestamp: None,
            last_timestamp_sent: None,
            last_initiation_received: None,
            last_handshake: None,
            unanswered: 0,
            timers: Timers::default(),
            traffic: PeerTraffic::default(),
        }
    }

    /// Erases sessions and handshake.
    pub fn forget_keys(&mut self, indices: &mut IndexTable) {
        self.sessions.clear(indices);
        self.forget_pending(indices);
    }

    /// Erases the handshake that we began, if there is one.
    pub fn forget_pending(&mut self, indices: &mut IndexTable) {
        if let Some(pending) = self.pending.take() {
            indices.release(pending.local_index);
        }
        self.timers.forget_handshake();
    }

    /// An authentic message came from `from`: the peer is there now (§2.1), unless it was somewhere new too often
    /// lately.
    pub fn follow(&mut self, from: Path, by: Evidence, now: Timestamp) {
        if self.whereabouts.believes(self.endpoint.map(|path| path.remote), from.remote, by, now) {
            self.endpoint = Some(from);
        }
    }

    /// Leaves it to the route from which address to send, until the peer is heard of again.
    pub fn forget_local(&mut self) {
        self.endpoint = self.endpoint.map(|path| path.remote.into());
    }

    /// What there is to tell.
    pub fn stats(&self) -> PeerStats {
        PeerStats {
            id: self.id,
            public_key: self.public_key,
            endpoint: self.endpoint.map(|path| path.remote),
            last_handshake: self.last_handshake,
            traffic: self.traffic,
        }
    }
}

/// By what kind of message a peer is heard of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Evidence {
    /// A handshake. They are rare, and whoever begins anew has to be answered: what data messages have used up does not
    /// count.
    Handshake,
    /// A data message.
    Data,
}

/// Where a peer was before, and how often it may be somewhere else.
struct Whereabouts {
    before: Option<SocketAddrV4>,
    by_handshake: TokenBucket,
    by_data: TokenBucket,
}

impl Default for Whereabouts {
    fn default() -> Self {
        let bucket = TokenBucket::new(MOVES_PER_SECOND, MOVES_AT_ONCE);
        Self { before: None, by_handshake: bucket, by_data: bucket }
    }
}

impl Whereabouts {
    /// Whether a peer that was last heard of at `old` is believed to be at `new`. It may go back to where it was before
    /// as often as it likes: that is nowhere new, and whoever moved it by a copy of its message holds it there no
    /// longer than its next one.
    fn believes(
        &mut self,
        old: Option<SocketAddrV4>,
        new: SocketAddrV4,
        by: Evidence,
        now: Timestamp,
    ) -> bool {
        let Some(old) = old.filter(|&old| old != new) else { return true };
        let moves = match by {
            Evidence::Handshake => &mut self.by_handshake,
            Evidence::Data => &mut self.by_data,
        };
        let is_believed = self.before == Some(new) || moves.take(now);
        if is_believed {
            self.before = Some(old);
        }
        is_believed
    }
}

/// The sessions with one peer (whitepaper §6.3): a new one takes over without losing what is still on its way under
/// the old one. A session that leaves takes its index along.
#[derive(Default)]
pub struct Sessions {
    /// What we seal with.
    current: Option<Box<Session>>,
    /// What the peer may still seal with.
    previous: Option<Box<Session>>,
    /// As the responder: what we may seal with once the initiator has shown, by a data message, that it has it too.
    next: Option<Box<Session>>,
}

impl Sessions {
    /// The session that we seal with, while it may be used.
    pub fn sealing(&mut self, now: Timestamp) -> Option<&mut Session> {
        self.current.as_deref_mut().filter(|session| session.can_seal(now))
    }

    /// The session named `index`, and whether it still waits for its first data message.
    pub fn find(&mut self, index: u32) -> Option<(&mut Session, bool)> {
        let Self { current, previous, next } = self;
        let slots = [(current, false), (previous, false), (next, true)];
        slots.into_iter().find_map(|(slot, is_next)| {
            let session = slot.as_deref_mut().filter(|session| session.local_index == index)?;
            Some((session, is_next))
        })
    }

    /// Our handshake was answered: the new session is good for sealing at once.
    pub fn begin_as_initiator(&mut self, session: Box<Session>, indices: &mut IndexTable) {
        // If both sides began at the same time, the peer may be sealing with the other handshake's session already.
        let old = self.next.take().or_else(|| self.current.take());
        replace(&mut self.previous, old, indices);
        replace(&mut self.current, Some(session), indices);
    }

    /// We answered a handshake: the new session waits for its first data message.
    pub fn begin_as_responder(&mut self, session: Box<Session>, indices: &mut IndexTable) {
        replace(&mut self.next, Some(session), indices);
        replace(&mut self.previous, None, indices);
    }

    /// The first data message has arrived under the next session.
    pub fn confirm_next(&mut self, indices: &mut IndexTable) {
        if let Some(next) = self.next.take() {
            let old = self.current.replace(next);
            replace(&mut self.previous, old, indices);
        }
    }

    /// Erases sessions that may no longer be used.
    pub fn expire(&mut self, now: Timestamp, indices: &mut IndexTable) {
        for slot in [&mut self.current, &mut self.previous, &mut self.next] {
            if slot.as_ref().is_some_and(|session| !session.is_alive(now)) {
                replace(slot, None, indices);
            }
        }
    }

    /// Erases all of them.
    pub fn clear(&mut self, indices: &mut IndexTable) {
        for slot in [&mut self.current, &mut self.previous, &mut self.next] {
            replace(slot, None, indices);
        }
    }

    /// When the oldest was established.
    pub fn oldest(&self) -> Option<Timestamp> {
        [&self.current, &self.previous, &self.next]
            .into_iter()
            .flatten()
            .map(|session| session.established)
            .min()
    }
}

/// Puts `session` into `slot`, and takes the index of the one that was there out of use.
fn replace(slot: &mut Option<Box<Session>>, session: Option<Box<Session>>, indices: &mut IndexTable) {
    if let Some(old) = std::mem::replace(slot, session) {
        indices.release(old.local_index);
    }
}
