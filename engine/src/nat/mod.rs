//! The NAT of one shard: behaviour as RFC 4787 (UDP), RFC 5382 (TCP), RFC 5508 (ICMP), RFC 6888 and RFC 7857 ask for
//! it.
//!
//! # Theory of operation
//!
//! [`Nat::translate_outbound`] and [`Nat::translate_inbound`] (in `translate.rs`, which is the place to begin reading)
//! rewrite one whole datagram in place, or say why it must be dropped; a dropped packet is left as it was. The NAT does
//! no I/O, reads no clock and draws its randomness from a seed that it is given. It sees neither fragments (they are
//! reassembled before, and fragmented again after it) nor TTLs, and it never answers anybody: whoever calls it does.
//!
//! - `table.rs` holds mappings and sessions and finds them; `lifecycle.rs` is where they begin and end; `calls.rs` ends
//!   what somebody outside began, where there is no room.
//! - `tcp.rs` follows TCP connections; `icmp.rs` translates ICMP errors; `passthrough.rs` is for protocols without
//!   ports.
//! - `ports.rs` lends external ports; `clients.rs` bounds what one client may take; `timers.rs` says when time is up.
//! - `manage.rs` is for the shell: settings, published ports, lists and counts. `log.rs` notes which client had which
//!   port.
//!
//! What grows, its bound, and what ends it: mappings (`max_mappings`, per client `max_mappings_per_client`) and
//! sessions ([`SESSIONS_PER_MAPPING`] times as many) end in [`Nat::expire`]; resting ports are bounded by the ports
//! there are and end there too; clients exist as long as they have mappings.

mod calls;
mod clients;
mod config;
mod icmp;
mod identification;
mod lifecycle;
mod log;
mod manage;
mod passthrough;
mod ports;
mod random;
mod table;
mod tcp;
#[cfg(test)]
mod tests;
mod timers;
mod translate;

use std::net::Ipv4Addr;

pub use config::{
    Endpoint, Filtering, MappingQuery, MappingState, MappingView, NatConfig, NatCounts, Outbound,
    PRIVILEGED_PORTS, PortClass, PortDemand, PortOutlook, Proto, PublishError, ShardSlice,
};
pub use log::{MappingEvent, MappingRecord};
pub use translate::external_port;

use clients::Clients;
use identification::Identifications;
use log::MappingLogBuffer;
use passthrough::Passthrough;
use ports::Pools;
use random::Random;
use table::Table;
use timers::Wheel;

/// The memory bound on sessions: on average this many per mapping, over all mappings and over those of one client.
pub const SESSIONS_PER_MAPPING: usize = 4;

/// The NAT of one shard. See the module's text.
#[derive(Debug)]
pub struct Nat {
    config: NatConfig,
    slice: ShardSlice,
    random: Random,
    pools: Pools,
    table: Table,
    wheel: Wheel,
    clients: Clients,
    identifications: Identifications,
    /// Mappings by protocol, and published ones.
    mapping_counts: [usize; 3],
    published: usize,
    log: MappingLogBuffer,
    passed: Passthrough,
}

impl Nat {
    /// A NAT without mappings and, except for ICMP identifiers, without ports ([`Nat::add_ports`]).
    ///
    /// `external` are the addresses to translate to; `seed` must be random and secret.
    pub fn new(config: NatConfig, external: &[Ipv4Addr], slice: ShardSlice, seed: [u8; 32]) -> Self {
        let mut random = Random::new(seed);
        let mut pools = Pools::new();
        pools.set_addresses(external, slice);
        let table = Table::new(&mut random);
        Self {
            config,
            slice,
            pools,
            wheel: Wheel::new(),
            clients: Clients::new(table.hasher.clone()),
            table,
            identifications: Identifications::new(slice, &mut random),
            mapping_counts: [0; 3],
            published: 0,
            log: MappingLogBuffer::default(),
            passed: Passthrough::default(),
            random,
        }
    }
}
