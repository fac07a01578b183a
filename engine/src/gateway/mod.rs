//! The gateway, without I/O: one shard's share of it.
//!
//! Theory of operation. The shell ([`crate::shard`]) receives into the [`Arena`] and calls one of the four entrances
//! below; each walks its packets to an exit of the [`Outbox`] or to a counted [`DropReason`]:
//!
//! 1. [`Gateway::receive_datagrams`]: trains of WireGuard datagrams. `Tunnel` opens each in place, the inner source is
//!    compared with the peer's address, consecutive segments of a flow are gathered into superpackets, and
//!    [`Gateway::flush_peers`] routes these: to another peer, to the host, or through the NAT to the external interface.
//! 2. [`Gateway::receive_external`]: IPv4 packets from the external interface. The NAT finds the mapping and rewrites
//!    the destination; the packet goes to the peer that owns it.
//! 3. [`Gateway::receive_host`]: packets from the host's kernel, through the gateway's TUN device.
//! 4. [`Gateway::receive_crossing`]: packets of other shards.
//!
//! Whole datagrams only: fragments are reassembled where they enter, and a datagram that is too big for the way out is
//! fragmented where it leaves (or answered with *fragmentation needed*, RFC 1191), so router and NAT never see either.
//! Superpackets stay whole from entrance to exit.

use std::net::{Ipv4Addr, SocketAddrV4};

use hashbrown::HashMap;

use crate::arena::{Arena, Span};
use crate::clock::Timestamp;
use crate::drop_reason::{DropCounters, DropReason};
use crate::external::neighbor::{NeighborCache, Resolution};
use crate::external::next_hop::{ExternalLink, NextHop};
use crate::external::reservation::PortOwnership;
use crate::fragment::fragmentation::Fragments;
use crate::fragment::reassembly::Reassembly;
use crate::icmp_error::{IcmpErrorKind, IcmpErrors};
use crate::mss;
use crate::nat::{Nat, NatConfig, Outbound, Proto, ShardSlice};
use crate::outbox::{Bytes, Crossing, DeviceFrame, Gather, Outbox, PeerFrame};
use crate::router::{PacketRouter, Verdict};
use crate::traffic::{Direction, Traffic};
use crate::tunnel::{PeerConfig, PeerId, Received, Tunnel, TunnelConfig};
use crate::wire::coalesce::{Coalescer, Gathered};
use crate::wire::{Ipv4Packet, Shape, Offload, VirtioNetHeader, protocol};

/// Bytes of an Ethernet header: `csum_start` on an AF_PACKET socket counts from the frame's first byte.
const ETHERNET_HEADER_LEN: u16 = 14;

/// What one shard of a gateway needs to know from the start.
pub struct GatewayConfig {
    /// The shard's own number, and how many there are.
    pub shard: u8,
    /// How many shards there are.
    pub shards: u8,
    /// The gateway's WireGuard key, and the wall clock.
    pub tunnel: TunnelConfig,
    /// Verdicts.
    pub router: PacketRouter,
    /// 10.66.77.1: where the gateway's own ICMP errors come from.
    pub gateway_address: Ipv4Addr,
    /// The largest inner packet, in bytes.
    pub tunnel_mtu: usize,
    /// The external interface, as the kernel sees it.
    pub external: ExternalLink,
    /// The NAT's behaviour.
    pub nat: NatConfig,
    /// Which ports the NAT owns, on every shard.
    pub ownership: PortOwnership,
    /// Whether consecutive segments become superpackets.
    pub coalesce: bool,
    /// Whether the external interface and the TUN device take UDP superpackets.
    pub coalesce_udp: bool,
    /// Randomness for ports, identifiers and hash keys.
    pub seed: [u8; 32],
}

/// Where a VPN address lives.
#[derive(Clone, Copy, Debug)]
enum Place {
    Here(PeerId),
    OnShard(u8),
}

/// One shard of the gateway.
pub struct Gateway {
    shard: u8,
    shards: u8,
    /// The WireGuard peers of this shard.
    pub tunnel: Tunnel,
    /// The NAT of this shard.
    pub nat: Nat,
    router: PacketRouter,
    gateway_address: Ipv4Addr,
    tunnel_mtu: usize,
    external: ExternalLink,
    ownership: PortOwnership,
    neighbors: NeighborCache<HeldFrame>,
    places: HashMap<Ipv4Addr, Place>,
    addresses: HashMap<PeerId, Ipv4Addr>,
    coalescer: Coalescer<PeerId>,
    from_peers: Reassembly,
    from_external: Reassembly,
    icmp_errors: IcmpErrors,
    /// Packets that were not delivered.
    pub drops: DropCounters,
    /// Packets that were.
    pub traffic: Traffic,
}

/// A packet that waits for its next hop's link address.
pub struct HeldFrame {
    packet: Vec<u8>,
    header: VirtioNetHeader,
    shape: Shape,
}

impl Gateway {
    /// A shard without peers.
    pub fn new(config: GatewayConfig) -> Self {
        Self {
            shard: config.shard,
            shards: config.shards,
            tunnel: Tunnel::new(config.tunnel),
            nat: Nat::new(
                config.nat,
                config.external.addresses.clone(),
                ShardSlice { shard: u16::from(config.shard), shards: u16::from(config.shards) },
                config.seed,
            ),
            router: config.router,
            gateway_address: config.gateway_address,
            tunnel_mtu: config.tunnel_mtu,
            neighbors: NeighborCache::new(config.external.mac),
            external: config.external,
            ownership: config.ownership,
            places: HashMap::new(),
            addresses: HashMap::new(),
            coalescer: Coalescer::new(config.coalesce, config.coalesce_udp),
            from_peers: Reassembly::default(),
            from_external: Reassembly::default(),
            icmp_errors: IcmpErrors::new(config.seed),
            drops: DropCounters::default(),
            traffic: Traffic::default(),
        }
    }

}
