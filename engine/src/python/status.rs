//! What the engine tells Python: counters, mappings, events.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::Duration;

use pyo3::prelude::*;

use crate::clock::Timestamp;
use crate::drop_reason::DropReason;
use crate::messages::ShardStatus;
use crate::nat::{Endpoint, MappingRecord as Record, MappingView};
use crate::traffic::Direction;

#[pyclass(frozen, get_all, module = "tidegate._engine")]
#[derive(Clone)]
pub(super) struct PeerStatus {
    public_key: Cow<'static, [u8]>,
    address: Option<String>,
    endpoint: Option<(String, u16)>,
    last_handshake: Option<f64>,
    received_bytes: u64,
    sent_bytes: u64,
    received_packets: u64,
    sent_packets: u64,
    mappings: usize,
}

#[pyclass(frozen, get_all, module = "tidegate._engine")]
pub(super) struct Mapping {
    protocol: &'static str,
    internal: (String, u16),
    external: (String, u16),
    age: f64,
    idle: f64,
    expires_in: Option<f64>,
    sessions: usize,
    state: &'static str,
}

impl From<MappingView> for Mapping {
    fn from(view: MappingView) -> Self {
        let text = |endpoint: Endpoint| (endpoint.address.to_string(), endpoint.port);
        Self {
            protocol: view.protocol.name(),
            internal: text(view.internal),
            external: text(view.external),
            age: view.age.as_secs_f64(),
            idle: view.idle.as_secs_f64(),
            expires_in: view.expires_in.map(|left| left.as_secs_f64()),
            sessions: view.sessions,
            state: view.state.name(),
        }
    }
}

#[pyclass(frozen, get_all, module = "tidegate._engine")]
pub(super) struct MappingRecord {
    event: &'static str,
    protocol: &'static str,
    internal: (String, u16),
    external: (String, u16),
    time: f64,
    age: f64,
}

impl MappingRecord {
    /// `origin` is the wall clock's time at [`Timestamp::ORIGIN`].
    pub(super) fn new(record: &Record, origin: Duration) -> Self {
        let text = |endpoint: Endpoint| (endpoint.address.to_string(), endpoint.port);
        Self {
            event: record.event.name(),
            protocol: record.protocol.name(),
            internal: text(record.internal),
            external: text(record.external),
            time: (origin + record.at.since(Timestamp::ORIGIN)).as_secs_f64(),
            age: record.at.since(record.created).as_secs_f64(),
        }
    }
}

#[pyclass(frozen, get_all, module = "tidegate._engine")]
pub(super) struct Status {
    peers: Vec<PeerStatus>,
    mappings: BTreeMap<&'static str, usize>,
    reserved_ports: BTreeMap<&'static str, usize>,
    sessions: usize,
    resting_ports: usize,
    clients: usize,
    drops: BTreeMap<&'static str, u64>,
    explanations: BTreeMap<&'static str, &'static str>,
    packets: BTreeMap<&'static str, u64>,
    bytes: BTreeMap<&'static str, u64>,
    offloads: BTreeMap<&'static str, bool>,
    shards: usize,
}

impl Status {
    pub(super) fn new(shards: &[ShardStatus], reserved: [usize; 2]) -> Self {
        let mut merged = ShardStatus::default();
        let mut offloads = BTreeMap::new();
        let mut peers = Vec::new();
        for shard in shards {
            merged.drops.merge(&shard.drops);
            merged.traffic.merge(&shard.traffic);
            for (sum, count) in merged.mappings.iter_mut().zip(shard.mappings) {
                *sum += count;
            }
            for &(name, on) in &shard.offloads {
                // An offload counts as in use only where every shard uses it.
                offloads.entry(name).and_modify(|all| *all &= on).or_insert(on);
            }
            peers.extend(shard.peers.iter().map(|peer| PeerStatus {
                public_key: Cow::Owned(peer.public_key.to_vec()),
                address: peer.address.map(|address| address.to_string()),
                endpoint: peer.endpoint.map(|endpoint| (endpoint.ip().to_string(), endpoint.port())),
                last_handshake: peer.last_handshake.map(|ago| ago.as_secs_f64()),
                received_bytes: peer.received_bytes,
                sent_bytes: peer.sent_bytes,
                received_packets: peer.received_packets,
                sent_packets: peer.sent_packets,
                mappings: peer.mappings,
            }));
        }
        let [tcp, udp, icmp] = merged.mappings;
        Self {
            peers,
            mappings: BTreeMap::from([("tcp", tcp), ("udp", udp), ("icmp", icmp)]),
            reserved_ports: BTreeMap::from([("tcp", reserved[0]), ("udp", reserved[1])]),
            sessions: shards.iter().map(|shard| shard.sessions).sum(),
            resting_ports: shards.iter().map(|shard| shard.resting_ports).sum(),
            clients: shards.iter().map(|shard| shard.clients).sum(),
            drops: merged.drops.nonzero().map(|(reason, count)| (reason.name(), count)).collect(),
            explanations: DropReason::ALL.iter().map(|r| (r.name(), r.explanation())).collect(),
            packets: Direction::ALL.iter().map(|&d| (d.name(), merged.traffic.packets(d))).collect(),
            bytes: Direction::ALL.iter().map(|&d| (d.name(), merged.traffic.bytes(d))).collect(),
            offloads,
            shards: shards.len(),
        }
    }
}

#[pyclass(frozen, get_all, module = "tidegate._engine")]
pub(super) struct Event {
    kind: &'static str,
    detail: String,
}

pub(super) fn events(events: Vec<crate::messages::Event>) -> Vec<Event> {
    events.into_iter().map(|event| Event { kind: event.kind.name(), detail: event.detail }).collect()
}
