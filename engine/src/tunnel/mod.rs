//! The tunnel: WireGuard peers and sessions, without I/O.
//!
//! # Theory of operation
//! Datagrams and `now` come in as arguments; plaintext stays where the datagram was, and what must be sent besides
//! (handshakes, cookies, keepalives, packets that waited) goes out through [`Outgoing`].
//!
//! *In* ([`receive`]): a data message names its session by the *receiver index* that we once gave out ([`index`]).
//! [`Tunnel::receive`] looks up the index, asks the replay window ([`replay`]), opens the message in place
//! ([`session`]), and only then believes it: marks its counter, takes the path that it came by as the peer's new
//! endpoint, and moves timers. A handshake message first passes the gate of [`cookie`], then goes to [`handshake`].
//!
//! *Out* ([`send`]): the caller asks for a [`Sealer`] once per train of packets and seals each in place. Without a
//! session there is no sealer; then the caller hands its packet to [`Tunnel::enqueue`], where it waits for a handshake.
//!
//! *Time* ([`timers`]): [`Tunnel::poll`] does what is due, and [`Tunnel::next_wakeup`] says when that will be.
//!
//! A session passes through three slots (`next`, `current`, `previous`, see [`peer`]), so that a renewal, every two
//! minutes, loses nothing that is on its way.
//!
//! A tunnel is one shard's: a peer's sessions live on one shard, whose number is in every index that it gives out.
//! Only an initiation does not tell whose it is until it is decrypted; the shard that gets it by chance then answers
//! [`Received::OtherShard`].

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use foldhash::fast::RandomState;
use hashbrown::HashMap;

use crate::clock::Timestamp;
use crate::drop_reason::{DropCounters, DropReason};
use crate::path::Path;

mod aead;
mod cipher;
mod cookie;
mod handshake;
mod index;
mod messages;
mod own_datagrams;
mod peer;
mod receive;
mod replay;
mod send;
mod session;
mod timers;

#[cfg(test)]
mod tests;

pub use aead::Library;
pub use cipher::Cipher;
pub use handshake::public_key;
pub use own_datagrams::OWN_SESSIONS;
pub use peer::{PeerConfig, PeerStats, PeerTraffic};
pub use receive::{HANDSHAKE_WORK, Received, is_handshake, is_initiation};
pub use send::{QUEUE_LIMIT, Sealer};

use cookie::Admission;
use handshake::Identity;
use index::IndexTable;
use own_datagrams::OwnDatagrams;
use peer::Peer;
use timers::{Pace, Schedule};
use zeroize::Zeroize;

/// A peer of this tunnel: a small number, good as an index into an array. It is given to another peer after this one
/// was removed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PeerId(pub u32);

/// What a tunnel is made from.
pub struct TunnelConfig {
    /// X25519 private key.
    pub private_key: [u8; 32],
    /// The number of the shard that the tunnel belongs to.
    pub shard: u8,
    /// How many shards there are.
    pub shards: u8,
    /// The largest inner packet, in bytes: padding does not go beyond.
    pub mtu: usize,
    /// The wall clock (since 1970) at [`Timestamp::ORIGIN`], see [`Tunnel::set_wall_clock`].
    pub unix_time_at_origin: Duration,
}

/// What a tunnel wants to be sent.
#[derive(Default, Debug)]
pub struct Outgoing {
    /// Datagrams and where to send them, in order.
    pub datagrams: Vec<(Path, Vec<u8>)>,
}

impl Outgoing {
    fn push(&mut self, to: Path, datagram: Vec<u8>) {
        self.datagrams.push((to, datagram));
    }
}

/// Which shard a peer lives on: it alone has the peer's sessions.
#[derive(Clone, Copy, Debug)]
pub enum PeerHome {
    /// This one.
    Here(PeerId),
    /// Another one, whose number this is.
    OnShard(u8),
}

/// All WireGuard peers of one shard.
pub struct Tunnel {
    identity: Identity,
    shard: u8,
    shards: u8,
    /// For the keys of new sessions.
    library: Library,
    mtu: usize,
    unix_time_at_origin: Duration,
    peers: Peers,
    homes: HashMap<[u8; 32], PeerHome, RandomState>,
    indices: IndexTable,
    own_datagrams: OwnDatagrams,
    /// Indices of peers' that the other shards are to be told of, see [`Self::take_begun`].
    begun: Vec<u32>,
    admission: Admission,
    /// Whether a handshake was completed, see [`Self::take_completed`].
    completed: bool,
    /// Of the handshakes that we begin.
    pace: Pace,
    schedule: Schedule,
    /// What was read of handshakes, see [`Self::take_work`].
    work: usize,
    /// Scratch of `poll`.
    due: Vec<PeerId>,
    drops: DropCounters,
}

impl Tunnel {
    /// A tunnel without peers.
    pub fn new(mut config: TunnelConfig) -> Self {
        let identity = Identity::new(config.private_key);
        config.private_key.zeroize();
        Self {
            admission: Admission::new(identity.public_key()),
            identity,
            shard: config.shard,
            shards: config.shards,
            library: Library::fastest(config.shards),
            mtu: config.mtu,
            unix_time_at_origin: config.unix_time_at_origin,
            peers: Peers::default(),
            homes: HashMap::default(),
            indices: IndexTable::new(config.shard),
            own_datagrams: OwnDatagrams::default(),
            begun: Vec::new(),
            completed: false,
            pace: Pace::default(),
            schedule: Schedule::default(),
            work: 0,
            due: Vec::new(),
            drops: DropCounters::default(),
        }
    }

    /// Adds a peer, or changes it. Its sessions go on, unless its preshared key or cipher is another.
    pub fn set_peer(&mut self, config: &PeerConfig, now: Timestamp) -> PeerId {
        let id = match self.homes.get(&config.public_key) {
            Some(PeerHome::Here(id)) => *id,
            _ => {
                let id = self.peers.add(|id| Peer::new(id, config));
                self.homes.insert(config.public_key, PeerHome::Here(id));
                id
            }
        };
        let Some(peer) = self.peers.get_mut(id) else { return id };
        let preshared_key = config.preshared_key.clone().unwrap_or_default();
        if peer.preshared_key != preshared_key || peer.cipher != config.cipher {
            peer.forget_keys(&mut self.indices);
            peer.preshared_key = preshared_key;
            peer.cipher = config.cipher;
            if !peer.queue.is_empty() {
                // Their handshake went with the keys: another one takes them along, or lets them go in the end.
                peer.timers.want_handshake(now);
            }
        }
        peer.endpoint = config.endpoint.map(Path::from).or(peer.endpoint);
        if peer.persistent_keepalive != config.persistent_keepalive {
            peer.persistent_keepalive = config.persistent_keepalive;
            peer.timers.persistent = config.persistent_keepalive.map(|_| now);
        }
        self.schedule.update(peer);
        id
    }

    /// Notes that a peer lives on another shard, to which its initiations are to be sent on.
    pub fn set_peer_elsewhere(&mut self, public_key: [u8; 32], shard: u8) {
        self.remove_peer(&public_key);
        self.homes.insert(public_key, PeerHome::OnShard(shard));
    }

    /// Removes a peer and all that is known of it; its id, if it lived here. Its keys are erased, and packets that
    /// waited for it are dropped as [`DropReason::NoSuchPeer`].
    pub fn remove_peer(&mut self, public_key: &[u8; 32]) -> Option<PeerId> {
        let Some(PeerHome::Here(id)) = self.homes.remove(public_key) else { return None };
        let mut peer = self.peers.remove(id)?;
        peer.forget_keys(&mut self.indices);
        self.schedule.remove(&mut peer);
        self.drops.add(DropReason::NoSuchPeer, peer.queue.len() as u64);
        Some(id)
    }

    /// What the wall clock (since 1970) showed at [`Timestamp::ORIGIN`], as far as it is known now: people and NTP set
    /// it. Initiations bear its time, and a peer takes none that is older than one before (§5.4.2): who was started
    /// before the clock was right would call without an answer until the end of time.
    pub fn set_wall_clock(&mut self, unix_time_at_origin: Duration) {
        self.unix_time_at_origin = unix_time_at_origin;
    }

    /// Tells where a peer is, until it is heard of elsewhere.
    pub fn set_endpoint(&mut self, peer: PeerId, endpoint: SocketAddrV4, now: Timestamp) {
        let Some(peer) = self.peers.get_mut(peer) else { return };
        peer.endpoint = Some(endpoint.into());
        if peer.persistent_keepalive.is_some() {
            peer.timers.persistent = Some(now);
        }
        self.schedule.update(peer);
    }

    /// Nothing can be sent from `address` any more: for the peers that were answered from there the route decides,
    /// until they are heard of again.
    pub fn forget_local(&mut self, address: Ipv4Addr) {
        for peer in self.peers.iter_mut() {
            if peer.endpoint.is_some_and(|path| path.local == Some(address)) {
                peer.forget_local();
            }
        }
    }

    /// What there is to tell about a peer.
    pub fn peer(&self, peer: PeerId) -> Option<PeerStats> {
        self.peers.get(peer).map(Peer::stats)
    }

    /// How many initiations in a row the peer has not answered; each comes
    /// [`REKEY_TIMEOUT`](timers::REKEY_TIMEOUT) after the one before, or later.
    pub fn unanswered(&self, peer: PeerId) -> u32 {
        self.peers.get(peer).map_or(0, |peer| peer.unanswered)
    }

    /// What there is to tell about the peer with a public key, if it lives here.
    pub fn peer_by_key(&self, public_key: &[u8; 32]) -> Option<PeerStats> {
        match self.homes.get(public_key)? {
            PeerHome::Here(id) => self.peer(*id),
            PeerHome::OnShard(_) => None,
        }
    }

    /// What there is to tell about all peers that live here.
    pub fn peers(&self) -> impl Iterator<Item = PeerStats> + '_ {
        self.peers.iter().map(Peer::stats)
    }

    /// What the tunnel dropped by itself, out of its queues; the caller counts what it was told of.
    pub fn drops(&self) -> &DropCounters {
        &self.drops
    }
}

/// The peers, by id. Boxed, so that the slots of removed peers are small.
#[derive(Default)]
struct Peers {
    slots: Vec<Option<Box<Peer>>>,
    free: Vec<PeerId>,
}

impl Peers {
    fn get(&self, id: PeerId) -> Option<&Peer> {
        self.slots.get(id.0 as usize)?.as_deref()
    }

    fn get_mut(&mut self, id: PeerId) -> Option<&mut Peer> {
        self.slots.get_mut(id.0 as usize)?.as_deref_mut()
    }

    fn add(&mut self, peer: impl FnOnce(PeerId) -> Peer) -> PeerId {
        let id = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            PeerId(self.slots.len() as u32 - 1)
        });
        self.slots[id.0 as usize] = Some(Box::new(peer(id)));
        id
    }

    fn remove(&mut self, id: PeerId) -> Option<Box<Peer>> {
        let peer = self.slots.get_mut(id.0 as usize)?.take()?;
        self.free.push(id);
        Some(peer)
    }

    fn iter(&self) -> impl Iterator<Item = &Peer> {
        self.slots.iter().flatten().map(|peer| &**peer)
    }

    fn iter_mut(&mut self) -> impl Iterator<Item = &mut Peer> {
        self.slots.iter_mut().flatten().map(|peer| &mut **peer)
    }
}
