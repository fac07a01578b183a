//! The gateway, without I/O: one shard's share of it.
//!
//! Theory of operation. The shell ([`crate::shard`]) receives into the [`Arena`] and calls one of the four entrances
//! below; each walks its packets to an exit of the [`Outbox`] or to a counted [`DropReason`]:
//!
//! 1. [`Gateway::receive_datagrams`]: trains of WireGuard datagrams. `Tunnel` opens each in place, the inner source is
//!    compared with the peer's address, consecutive segments of a flow are gathered into superpackets, and
//!    [`Gateway::flush_peers`] routes these: to another peer, to the host, or through the NAT to the external
//!    interface.
//! 2. [`Gateway::receive_external`]: IPv4 packets from the external interface. The NAT finds the mapping and rewrites
//!    the destination; the packet goes to the peer that owns it.
//! 3. [`Gateway::receive_host`]: packets from the host's kernel, through the gateway's TUN device; of the host's own
//!    only.
//! 4. [`Gateway::receive_handoff`]: packets of other shards.
//!
//! Whole datagrams only: fragments are reassembled where they enter, and a datagram that is too big for the way out is
//! fragmented where it leaves (or answered with *fragmentation needed*, RFC 1191), so router and NAT never see either.
//! Superpackets stay whole from entrance to exit.

mod commands;
mod dns_rate;
mod from_external;
mod from_host;
mod from_peers;
mod from_shards;
mod leave;
mod port_supply;
mod reassembly_timeout;
mod refusal;
mod refused_handshakes;

use std::net::{Ipv4Addr, SocketAddrV4};

use hashbrown::HashMap as KeyedMap;

use crate::access_policy::AccessPolicy;
use crate::arena::{Arena, Span};
use crate::clock::Timestamp;
use crate::core::Core;
use crate::drop_reason::{DropCounters, DropReason};
use crate::external::neighbor::{Asker, Ignored, NeighborCache};
use crate::external::next_hop::ExternalLink;
use crate::external::reservation::{PortOwnership, ReserveRequest};
use crate::fair_queue::Owner;
use crate::fragment::reassembly::Reassembly;
use crate::handoffs::Handoff;
use crate::icmp_error::IcmpErrors;
use crate::messages::{Command, EventKind, Events, MappingLog, ShardStatus};
use crate::nat::{Endpoint, Nat, NatConfig, Proto, ShardSlice};
use crate::outbox::Outbox;
use crate::prefix::Prefix;
use crate::rate_limit::TokenBucket;
use crate::router::PacketRouter;
use crate::traffic::Traffic;
use crate::transport::ReceivedTrain;
use crate::tunnel::{HANDSHAKE_WORK, PeerHome, PeerId, Tunnel, TunnelConfig, is_handshake};
use crate::wire::{CoalesceOptions, Coalescer, Offload, Shape, VirtioNetHeader};

use commands::Publication;
use from_external::Entrance;
use leave::Origin;
use port_supply::PortSupply;
use refused_handshakes::RefusedHandshakes;

/// A map with a keyed hash: clients choose some of the keys.
type HashMap<K, V> = KeyedMap<K, V, foldhash::quality::RandomState>;

/// What reading the handshake messages of one train may cost: of a peer's there is one in it, for a train comes from
/// one endpoint. Nobody is served before a train's end, and whoever knows the gateway's public key can send trains of
/// nothing else.
const TRAIN_WORK: usize = 2 * HANDSHAKE_WORK;

/// What one shard of a gateway needs to know from the start.
pub struct GatewayConfig {
    /// The shard's own number.
    pub shard: u8,
    /// How many shards there are.
    pub shards: u8,
    /// The gateway's WireGuard key, the tunnel's MTU, and the wall clock.
    pub tunnel: TunnelConfig,
    /// 10.66.77.0/24.
    pub subnet: Prefix,
    /// 10.66.77.1: where the gateway's own ICMP errors come from.
    pub gateway_address: Ipv4Addr,
    /// The external interface, as the kernel sees it.
    pub external: ExternalLink,
    /// The host's own addresses: what clients send there is delivered to the host, and it sends from there alone.
    pub host_addresses: Vec<Ipv4Addr>,
    /// What clients may reach.
    pub access: AccessPolicy,
    /// The NAT's behaviour.
    pub nat: NatConfig,
    /// The external ports that the NAT may use, first and last.
    pub port_range: (u16, u16),
    /// How many ports all shards together may reserve, of [`budget`](crate::external::reservation::budget).
    pub port_budget: usize,
    /// Which ports the NAT owns, on every shard.
    pub ownership: PortOwnership,
    /// Where records of mappings go, if they are wanted.
    pub mapping_log: MappingLog,
    /// Where to tell that handshakes were completed or refused.
    pub events: Events,
    /// Which segments become superpackets.
    pub coalesce: CoalesceOptions,
    /// Randomness for ports, identifiers and hash keys.
    pub seed: [u8; 32],
}

/// A peer that lives on this shard.
#[derive(Clone, Copy, Debug)]
struct LocalPeer {
    address: Ipv4Addr,
    /// What it asks of the gateway's DNS.
    queries: TokenBucket,
}

/// One shard of the gateway.
pub struct Gateway {
    shard: u8,
    shards: u8,
    tunnel: Tunnel,
    nat: Nat,
    router: PacketRouter,
    access: AccessPolicy,
    subnet: Prefix,
    gateway_address: Ipv4Addr,
    tunnel_mtu: usize,
    external: ExternalLink,
    ownership: PortOwnership,
    supply: PortSupply,
    mapping_log: MappingLog,
    events: Events,
    refused_handshakes: RefusedHandshakes,
    /// Published ports, on every shard.
    published: HashMap<(Proto, Endpoint), Publication>,
    neighbors: NeighborCache<HeldFrame>,
    /// Where the peer of each VPN address lives.
    homes: HashMap<Ipv4Addr, PeerHome>,
    local_peers: HashMap<PeerId, LocalPeer>,
    coalescer: Coalescer<PeerId>,
    fragments_from_peers: Reassembly,
    fragments_from_outside: Reassembly,
    icmp_errors: IcmpErrors,
    /// Those to the outside: what they may cost is of their own, for whoever forges sources provokes as many as it
    /// likes.
    outside_errors: IcmpErrors,
    drops: DropCounters,
    traffic: Traffic,
}

/// A packet that waits for its next hop's link address.
struct HeldFrame {
    asker: Asker,
    packet: Vec<u8>,
    header: VirtioNetHeader,
    shape: Shape,
}

impl Gateway {
    /// A shard without peers.
    pub fn new(config: GatewayConfig) -> Self {
        let slice = ShardSlice { shard: u16::from(config.shard), shards: u16::from(config.shards) };
        let external = config.external;
        let mut gateway = Self {
            shard: config.shard,
            shards: config.shards,
            tunnel_mtu: config.tunnel.mtu,
            tunnel: Tunnel::new(config.tunnel),
            supply: PortSupply::new(config.port_range, config.nat.kept_ports, config.port_budget),
            nat: Nat::new(config.nat, &external.addresses, slice, config.seed),
            router: router(config.subnet, config.gateway_address, &external, config.host_addresses),
            access: config.access,
            subnet: config.subnet,
            gateway_address: config.gateway_address,
            neighbors: NeighborCache::new(external.clone()),
            external,
            ownership: config.ownership,
            mapping_log: config.mapping_log,
            events: config.events,
            refused_handshakes: RefusedHandshakes::default(),
            published: HashMap::default(),
            homes: HashMap::default(),
            local_peers: HashMap::default(),
            coalescer: Coalescer::new(config.coalesce),
            fragments_from_peers: Reassembly::default(),
            fragments_from_outside: Reassembly::default(),
            icmp_errors: IcmpErrors::new(config.seed),
            outside_errors: IcmpErrors::new(other(config.seed)),
            drops: DropCounters::default(),
            traffic: Traffic::default(),
        };
        gateway.nat.set_port_range(config.port_range.0..=config.port_range.1);
        gateway.update_expectations();
        gateway
    }
}

fn router(
    subnet: Prefix,
    gateway: Ipv4Addr,
    external: &ExternalLink,
    host_addresses: Vec<Ipv4Addr>,
) -> PacketRouter {
    PacketRouter::new(subnet, gateway, host_addresses).with_on_link(external.on_link.iter().copied())
}

/// Another secret than the seed, for what must not share its numbers.
fn other(mut seed: [u8; 32]) -> [u8; 32] {
    seed.rotate_left(8);
    seed
}

impl Core for Gateway {
    fn receive_datagrams(
        &mut self,
        now: Timestamp,
        arena: &mut Arena,
        train: ReceivedTrain,
        outbox: &mut Outbox,
    ) {
        if let Err(reason) = self.check_outer_source(train.from.remote) {
            return self.drops.add(reason, train.datagrams().count() as u64);
        }
        let work_before = self.tunnel.work();
        for datagram in train.datagrams() {
            if self.coalescer.is_full() {
                self.route_from_peers(now, arena, outbox);
            }
            let is_spent = self.tunnel.work() - work_before >= TRAIN_WORK;
            if is_spent && is_handshake(arena.get(datagram)) {
                self.refuse_datagram(now, DropReason::HandshakeRateLimited, train.from.remote);
                continue;
            }
            if let Err(reason) = self.receive_datagram(now, arena, datagram, train.from, train.ecn, outbox) {
                self.refuse_datagram(now, reason, train.from.remote);
            }
        }
    }

    fn sender(&self, train: &[u8], from: SocketAddrV4) -> Owner<PeerId> {
        self.tunnel.sender(train, from)
    }

    fn flush_peers(&mut self, now: Timestamp, arena: &mut Arena, outbox: &mut Outbox) {
        self.route_from_peers(now, arena, outbox);
    }

    fn receive_host(
        &mut self,
        now: Timestamp,
        arena: &mut Arena,
        packet: Span,
        offload: Offload,
        outbox: &mut Outbox,
    ) {
        self.route_from_host(now, arena, packet, offload, outbox);
    }

    fn prefetch_external(&self, arena: &Arena, packet: Span) {
        self.nat.prefetch_inbound(arena.get(packet));
    }

    fn recipient(&self, packet: &[u8]) -> Owner<Ipv4Addr> {
        // Where a port that is published for a client of another shard would be this one's, its packets come here
        // first.
        let publisher = |protocol, external| Some(self.published.get(&(protocol, external))?.client);
        self.nat.recipient(packet, publisher).map_or(Owner::Unknown, Owner::Client)
    }

    fn receive_external(
        &mut self,
        now: Timestamp,
        arena: &mut Arena,
        packet: Span,
        offload: Offload,
        outbox: &mut Outbox,
    ) {
        let origin = Origin::Arena { head: packet, tails: &[] };
        self.route_from_external(now, arena, origin, offload, Entrance::Interface, outbox);
    }

    fn receive_external_segments(
        &mut self,
        now: Timestamp,
        arena: &mut Arena,
        segments: Vec<Vec<u8>>,
        outbox: &mut Outbox,
    ) {
        for segment in segments {
            let origin = Origin::Owned(segment);
            self.route_from_external(now, arena, origin, Offload::NONE, Entrance::Interface, outbox);
        }
    }

    fn receive_arp(&mut self, now: Timestamp, frame: &[u8], outbox: &mut Outbox) {
        // An unsolicited or malformed reply teaches nothing: that is what keeps the cache from being poisoned.
        let neighbor = match self.neighbors.receive(frame, now) {
            Ok(neighbor) => neighbor,
            Err(Ignored::NoReply) => return, // for the host's kernel, which has it too
            Err(_) => return self.drops.count(DropReason::UnsolicitedArp),
        };
        for held in self.neighbors.drain(neighbor) {
            self.send_held(now, neighbor, held, outbox);
        }
    }

    fn receive_handoff(&mut self, now: Timestamp, arena: &mut Arena, handoff: Handoff, outbox: &mut Outbox) {
        self.route_handoff(now, arena, handoff, outbox);
    }

    fn poll(&mut self, now: Timestamp, outbox: &mut Outbox) {
        self.tunnel.poll(now, &mut outbox.datagrams);
        self.nat.expire(now);
        self.supply.expire(now);
        self.update_expectations();
        self.expire_fragments(now, outbox);
        let mut undeliverable = Vec::new();
        self.neighbors.poll(now, |request| outbox.arp.push(request), |held| undeliverable.push(held));
        for held in undeliverable {
            self.give_up(now, held, outbox);
        }
    }

    fn next_wakeup(&self) -> Option<Timestamp> {
        [
            self.tunnel.next_wakeup(),
            self.nat.next_expiry(),
            self.supply.next_expiry(),
            self.fragments_from_peers.next_expiry(),
            self.fragments_from_outside.next_expiry(),
            self.neighbors.next_wakeup(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    fn sealing(&mut self) -> (&mut Tunnel, &mut DropCounters) {
        (&mut self.tunnel, &mut self.drops)
    }

    fn drops(&mut self) -> &mut DropCounters {
        &mut self.drops
    }

    fn status(&self, now: Timestamp) -> ShardStatus {
        self.snapshot(now)
    }

    fn carry_out(&mut self, now: Timestamp, command: Command, outbox: &mut Outbox) {
        self.apply_command(now, command, outbox);
    }

    /// The end of a turn.
    fn end_turn(&mut self) -> Vec<ReserveRequest> {
        if let Some((records, missing)) = self.nat.take_log() {
            self.mapping_log.add(records, missing);
        }
        if self.tunnel.take_completed() {
            self.events.push(EventKind::HandshakeCompleted, "");
        }
        self.port_requests()
    }
}
