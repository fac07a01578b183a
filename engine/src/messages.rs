//! The border's vocabulary: commands go down to the shards, statuses and events come up.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::access_policy::AccessPolicy;
use crate::clock::Timestamp;
use crate::drop_reason::DropCounters;
use crate::external::ExternalGateway;
use crate::external::next_hop::ExternalLink;
use crate::external::packet_socket::FilterRules;
use crate::external::reservation::{Batch, ReserverHandle};
use crate::nat::{Endpoint, MappingQuery, MappingRecord, MappingView, NatConfig, Proto, PublishError};
use crate::traffic::Traffic;
use crate::tunnel::{PeerConfig, PeerStats};
use crate::wake::EventFd;

/// What a shard is told to do. Every command is carried out between two turns, at once.
pub enum Command {
    /// A peer came, or changed its key; `shard` is where it lives.
    SetPeer {
        /// Its keys.
        config: PeerConfig,
        /// Its address in the VPN subnet.
        address: Ipv4Addr,
        /// Where it lives.
        shard: u8,
        /// Whether to call it at once, as far as it is known where it is.
        call: bool,
    },
    /// A peer went.
    RemovePeer {
        /// Its public key.
        public_key: [u8; 32],
        /// Its address in the VPN subnet.
        address: Ipv4Addr,
    },
    /// The kernel's view of the external interface changed.
    SetExternal {
        /// The interface.
        link: ExternalLink,
        /// The host's own addresses.
        host_addresses: Vec<Ipv4Addr>,
        /// What the external interface's sockets are to let through.
        filter: FilterRules,
    },
    /// The external interface is another one, or was away: these are its new sockets, which want
    /// [`Command::SetExternal`] to be opened.
    ExternalSockets(Box<ExternalGateway>),
    /// Other ports are published: other packets are to be let through.
    SetFilter(FilterRules),
    /// Whom to ask for external ports.
    Reserver(ReserverHandle),
    /// The NAT's settings changed.
    SetNat {
        /// Its behaviour.
        config: NatConfig,
        /// The external ports that it may lend, first and last.
        port_range: (u16, u16),
    },
    /// What clients may reach changed, also in sessions that there are.
    SetAccess(AccessPolicy),
    /// Which client each protocol without ports belongs to, by number; others are nobody's.
    PassProtocols(Vec<(u8, Ipv4Addr)>),
    /// The reserver got ports for this shard.
    Ports(Batch),
    /// An external port is forwarded to a client from now on.
    Publish {
        /// TCP or UDP.
        protocol: Proto,
        /// The external address and port.
        external: Endpoint,
        /// The client's address and port.
        internal: Endpoint,
        /// Where the client lives.
        shard: u8,
        /// Where the answer is wanted.
        reply: SyncSender<Result<(), PublishError>>,
    },
    /// It no longer is.
    Unpublish {
        /// TCP or UDP.
        protocol: Proto,
        /// The external address and port.
        external: Endpoint,
        /// Whether the shard returns the port, if its NAT had it before. Otherwise the engine unreserves it.
        returns_port: bool,
    },
    /// A client reaches out for its gateway without waiting for a packet.
    StartHandshake,
    /// The gateway's address changed (clients only).
    SetEndpoint(SocketAddrV4),
    /// A snapshot of the counters is wanted.
    Status(SyncSender<ShardStatus>),
    /// Mappings are wanted, at most `limit`.
    Mappings {
        /// Which.
        query: MappingQuery,
        /// How many.
        limit: usize,
        /// Where they are wanted.
        reply: SyncSender<Vec<MappingView>>,
    },
    /// End.
    Stop,
}

/// One peer, as its shard sees it.
#[derive(Clone, Debug)]
pub struct PeerSnapshot {
    /// Its public key.
    pub public_key: [u8; 32],
    /// Its address in the VPN subnet; `None` for the gateway as a client sees it.
    pub address: Option<Ipv4Addr>,
    /// Where its datagrams come from.
    pub endpoint: Option<SocketAddrV4>,
    /// How long ago the last handshake was.
    pub last_handshake: Option<Duration>,
    /// Inner bytes received from it.
    pub received_bytes: u64,
    /// Inner bytes sent to it.
    pub sent_bytes: u64,
    /// Packets received from it.
    pub received_packets: u64,
    /// Packets sent to it.
    pub sent_packets: u64,
    /// Its NAT mappings.
    pub mappings: usize,
}

impl PeerSnapshot {
    /// What `stats` says at `now` of the peer that holds `address` and so many mappings.
    pub fn new(stats: &PeerStats, address: Option<Ipv4Addr>, mappings: usize, now: Timestamp) -> Self {
        Self {
            public_key: stats.public_key,
            address,
            endpoint: stats.endpoint,
            last_handshake: stats.last_handshake.map(|at| now.since(at)),
            received_bytes: stats.traffic.received_bytes,
            sent_bytes: stats.traffic.sent_bytes,
            received_packets: stats.traffic.received_packets,
            sent_packets: stats.traffic.sent_packets,
            mappings,
        }
    }
}

/// One shard's counters.
#[derive(Clone, Default, Debug)]
pub struct ShardStatus {
    /// The peers that live there.
    pub peers: Vec<PeerSnapshot>,
    /// Mappings by protocol: TCP, UDP, ICMP.
    pub mappings: [usize; 3],
    /// Sessions: the remote endpoints that mappings talk to.
    pub sessions: usize,
    /// External ports that rest before they are used again.
    pub resting_ports: usize,
    /// Clients with mappings.
    pub clients: usize,
    /// Undelivered packets.
    pub drops: DropCounters,
    /// Delivered packets.
    pub traffic: Traffic,
    /// Which offloads are in use.
    pub offloads: Vec<(&'static str, bool)>,
}

/// Something that Python should know.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Event {
    /// What happened.
    pub kind: EventKind,
    /// A sentence about it.
    pub detail: String,
}

/// What happened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EventKind {
    /// A shard ended without having been told to, or cannot do its part: the gateway must not go on partially.
    ShardFailed,
    /// The kernel refused an offload that it had promised; it is off from now on.
    OffloadDisabled,
    /// No external port could be reserved.
    PortsExhausted,
    /// The external interface went away.
    ExternalDown,
    /// A published port is not available on a new external address.
    PublicationFailed,
    /// A client's gateway has not answered for a while: it may be elsewhere now.
    HandshakeUnanswered,
    /// Handshakes were completed; the status tells with which peers.
    HandshakeCompleted,
    /// A gateway has refused handshakes.
    HandshakeRefused,
}

impl EventKind {
    /// Its stable name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ShardFailed => "shard_failed",
            Self::OffloadDisabled => "offload_disabled",
            Self::PortsExhausted => "ports_exhausted",
            Self::ExternalDown => "external_down",
            Self::PublicationFailed => "publication_failed",
            Self::HandshakeUnanswered => "handshake_unanswered",
            Self::HandshakeCompleted => "handshake_completed",
            Self::HandshakeRefused => "handshake_refused",
        }
    }
}

/// Records of mappings on their way up. The shards put them in, never waiting; Python takes them out. What does not fit
/// is counted.
#[derive(Clone)]
pub struct MappingLog(Arc<MappingLogQueue>);

struct MappingLogQueue {
    records: Mutex<VecDeque<MappingRecord>>,
    missing: AtomicU64,
    events: Events,
}

/// Some seconds' worth of a busy gateway.
const MAX_RECORDS: usize = 16_384;

impl MappingLog {
    /// An empty log, which wakes whoever waits for `events`.
    pub fn new(events: Events) -> Self {
        Self(Arc::new(MappingLogQueue { records: Mutex::default(), missing: AtomicU64::new(0), events }))
    }

    /// Adds what a shard noted in a turn, and what it had no room for.
    pub fn add(&self, mut records: Vec<MappingRecord>, missing: u64) {
        let mut queue = self.0.records.lock().unwrap_or_else(PoisonError::into_inner);
        let was_empty = queue.is_empty();
        let room = MAX_RECORDS - queue.len();
        let excess = records.len().saturating_sub(room);
        records.truncate(room);
        queue.extend(records);
        self.0.missing.fetch_add(missing + excess as u64, Ordering::Relaxed);
        drop(queue);
        if was_empty {
            // It cannot fail except by an overflowing counter, and then the descriptor is readable anyway.
            drop(self.0.events.wake().notify());
        }
    }

    /// Takes the oldest records, `limit` at most, and the number of those that are missing. As long as some are left,
    /// the events' descriptor stays readable.
    pub fn take(&self, limit: usize) -> (Vec<MappingRecord>, u64) {
        let mut queue = self.0.records.lock().unwrap_or_else(PoisonError::into_inner);
        let count = limit.min(queue.len());
        let taken = queue.drain(..count).collect();
        if queue.is_empty() {
            queue.shrink_to(MAX_RECORDS / 16);
        } else {
            drop(self.0.events.wake().notify());
        }
        (taken, self.0.missing.swap(0, Ordering::Relaxed))
    }
}

/// Events on their way up: a bounded queue and a descriptor that is readable while it holds something.
///
/// When nobody listens, the newest events are dropped: the first ones tell the cause. A shard's failure is told all the
/// same: it takes the last place, unless another one has it, for one is enough to end the gateway.
#[derive(Clone)]
pub struct Events(Arc<EventQueue>);

struct EventQueue {
    queue: Mutex<VecDeque<Event>>,
    wake: EventFd,
}

const MAX_EVENTS: usize = 256;

impl Events {
    /// An empty queue that wakes `wake`.
    pub fn new(wake: EventFd) -> Self {
        Self(Arc::new(EventQueue { queue: Mutex::new(VecDeque::new()), wake }))
    }

    /// Adds an event; one that equals the last is not repeated.
    pub fn push(&self, kind: EventKind, detail: impl Into<String>) {
        let event = Event { kind, detail: detail.into() };
        let mut queue = self.0.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let ends_it = |event: &Event| event.kind == EventKind::ShardFailed;
        if queue.len() == MAX_EVENTS && ends_it(&event) && !queue.back().is_some_and(ends_it) {
            queue.pop_back();
        }
        if queue.len() < MAX_EVENTS && queue.back() != Some(&event) {
            queue.push_back(event);
            // It cannot fail except by an overflowing counter, and then the descriptor is readable anyway.
            drop(self.0.wake.notify());
        }
    }

    /// Takes all events.
    pub fn take(&self) -> Vec<Event> {
        let mut queue = self.0.queue.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.0.wake.clear());
        queue.drain(..).collect()
    }

    /// The descriptor to wait on.
    pub fn wake(&self) -> &EventFd {
        &self.0.wake
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shard_that_failed_is_told_however_many_events_nobody_has_read() {
        let events = Events::new(EventFd::new().unwrap());
        for n in 0..2 * MAX_EVENTS {
            events.push(EventKind::PortsExhausted, n.to_string());
        }
        for shard in ["shard-1", "shard-0"] {
            events.push(EventKind::ShardFailed, shard);
        }
        events.push(EventKind::PortsExhausted, "and another");
        let told = events.take();
        assert_eq!(told.len(), MAX_EVENTS);
        assert_eq!(told[MAX_EVENTS - 2].detail, (MAX_EVENTS - 2).to_string(), "the first ones, otherwise");
        let last = Event { kind: EventKind::ShardFailed, detail: "shard-1".into() };
        assert_eq!(told.last(), Some(&last), "the first of them, too: it ends the gateway");
    }
}
