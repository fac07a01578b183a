//! What the NAT is told, and the words in which it answers.

use std::net::Ipv4Addr;
use std::ops::RangeInclusive;
use std::time::Duration;

use crate::wire::protocol;

/// Which packets from outside a mapping admits (RFC 4787 §5).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Filtering {
    /// From anyone.
    EndpointIndependent,
    /// From an address that the inner endpoint has sent to (RFC 4787 REQ-8).
    #[default]
    AddressDependent,
    /// From an address and port that the inner endpoint has sent to.
    AddressAndPortDependent,
}

/// Behaviour of the NAT. The defaults are those of `docs/nat.md`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NatConfig {
    /// Which packets from outside a mapping admits.
    pub filtering: Filtering,
    /// Idle time of a UDP session.
    pub udp_timeout: Duration,
    /// Idle time of a TCP connection that is neither opening nor closing.
    pub tcp_established_timeout: Duration,
    /// Idle time of a TCP connection whose handshake is not complete.
    pub tcp_opening_timeout: Duration,
    /// Idle time of a TCP connection that both ends have closed, or one has reset.
    pub tcp_closing_timeout: Duration,
    /// Idle time of an ICMP query session.
    pub icmp_timeout: Duration,
    /// Mappings of the whole gateway; a shard takes its part.
    pub max_mappings: usize,
    /// Mappings of one client.
    pub max_mappings_per_client: usize,
    /// New mappings per second and client, with a burst of as many.
    pub max_new_mappings_per_second: u32,
    /// Remote endpoints that one mapping talks to.
    pub max_sessions_per_mapping: usize,
    /// Ports that are never lent, first and last, though they are in the range: the host's programs draw theirs from
    /// them.
    pub kept_ports: Option<(u16, u16)>,
    /// Whether to note which mappings begin and end, for [`Nat::take_log`](super::Nat::take_log).
    pub log_mappings: bool,
}

impl Default for NatConfig {
    fn default() -> Self {
        Self {
            filtering: Filtering::AddressDependent,
            udp_timeout: Duration::from_secs(300), // RFC 4787 REQ-5: recommended 5 min, at least 2
            tcp_established_timeout: Duration::from_secs(7440), // RFC 5382 REQ-5: at least 2 h 4 min
            tcp_opening_timeout: Duration::from_secs(240), // RFC 5382 REQ-5: at least 4 min
            tcp_closing_timeout: Duration::from_secs(240), // RFC 5382 REQ-5, RFC 7857 §2.1: at least 4 min
            icmp_timeout: Duration::from_secs(60), // RFC 5508 REQ-2: at least 60 s
            max_mappings: 200_000,
            max_mappings_per_client: 16_384,
            max_new_mappings_per_second: 2_000,
            max_sessions_per_mapping: 4_096,
            kept_ports: None,
            log_mappings: false,
        }
    }
}

/// The protocols that the NAT translates. Each has ports (or identifiers), mappings and filters of its own.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum Proto {
    /// TCP, by port.
    Tcp = protocol::TCP,
    /// UDP, by port.
    Udp = protocol::UDP,
    /// ICMP queries, by identifier.
    Icmp = protocol::ICMP,
}

impl Proto {
    /// Every protocol.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Icmp];

    /// The protocol of an IPv4 header's protocol field.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            protocol::TCP => Some(Self::Tcp),
            protocol::UDP => Some(Self::Udp),
            protocol::ICMP => Some(Self::Icmp),
            _ => None,
        }
    }

    /// The name shown to people: "tcp", "udp", "icmp".
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Icmp => "icmp",
        }
    }

    /// The class of a port of this protocol. Identifiers have none: all of them are alike.
    pub(super) const fn class_of(self, port: u16) -> PortClass {
        match self {
            Self::Icmp => PortClass::Unprivileged,
            Self::Tcp | Self::Udp => PortClass::of(port),
        }
    }

    pub(super) const fn index(self) -> usize {
        match self {
            Self::Tcp => 0,
            Self::Udp => 1,
            Self::Icmp => 2,
        }
    }
}

/// Which part of the external ports is this shard's: those with `port % shards == shard`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ShardSlice {
    /// This shard's number, below `shards`.
    pub shard: u16,
    /// The number of shards, at least 1.
    pub shards: u16,
}

impl ShardSlice {
    /// The slice of a gateway with a single shard: everything.
    pub const WHOLE: Self = Self { shard: 0, shards: 1 };

    /// Whether the external port (or ICMP identifier) is this shard's.
    pub const fn owns(self, port: u16) -> bool {
        port % self.count() == self.shard
    }

    /// The number of shards, at least 1.
    pub(super) const fn count(self) -> u16 {
        if self.shards == 0 { 1 } else { self.shards }
    }

    /// This shard's part of a number that is meant for the whole gateway.
    pub(super) fn part_of(self, total: usize) -> usize {
        total.div_ceil(usize::from(self.count()))
    }
}

/// An address and a port, or an ICMP identifier in the port's place.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Endpoint {
    /// The address.
    pub address: Ipv4Addr,
    /// The port in the machine's byte order. Identifier for ICMP; 0 for the remote end of an ICMP query.
    pub port: u16,
}

impl Endpoint {
    /// The endpoint `address:port`.
    pub const fn new(address: Ipv4Addr, port: u16) -> Self {
        Self { address, port }
    }
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.address, self.port)
    }
}

/// Where a packet goes after [`Nat::translate_outbound`](super::Nat::translate_outbound).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outbound {
    /// To the external interface.
    External,
    /// Back inside (RFC 4787 REQ-9): the destination is one of our external addresses, so the caller hands the packet
    /// to [`Nat::translate_inbound`](super::Nat::translate_inbound) of the shard that owns the destination port.
    Hairpin,
}

/// The two classes of ports that a NAT does not mix (RFC 4787 REQ-3 a).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PortClass {
    /// 0 to 1023.
    Privileged,
    /// 1024 to 65535, and every ICMP identifier.
    Unprivileged,
}

impl PortClass {
    /// The class of `port`.
    pub const fn of(port: u16) -> Self {
        if port < 1024 { Self::Privileged } else { Self::Unprivileged }
    }
}

/// The privileged ports that may be reserved and lent, where clients use such source ports: the upper half, from which
/// a client program draws one if it wants one (`rresvport(3)`). Services of the host's own listen in the lower half.
///
/// Ports are asked for in this range, and the filter of the external interface lets it through. These two must agree:
/// what comes for a port that the filter does not know dies there, and no counter tells.
pub const PRIVILEGED_PORTS: RangeInclusive<u16> = 512..=1023;

/// A pool runs low: the shell should reserve more ports and add them with [`Nat::add_ports`](super::Nat::add_ports).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PortDemand {
    /// TCP or UDP.
    pub protocol: Proto,
    /// The external address.
    pub address: Ipv4Addr,
    /// Which ports.
    pub class: PortClass,
    /// Whether these will do for now, and all clients get theirs: that there are no more is no news yet.
    pub in_advance: bool,
}

/// Whether more ports of a protocol and address can be had.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Debug)]
pub enum PortOutlook {
    /// They can: a pool that is empty has some under way.
    More,
    /// There were too few the last time, which is a while ago: they may be, but nobody should count on them.
    Unsure,
    /// They cannot: a pool that is empty is exhausted.
    #[default]
    None,
}

/// Why a port could not be published.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PublishError {
    /// ICMP has no ports.
    NotTcpOrUdp,
    /// The address is not one of the external addresses.
    NotExternal,
    /// The port is published already, or a live mapping holds it.
    PortInUse,
    /// The inner endpoint is published already, on another port.
    EndpointPublished,
}

impl std::fmt::Display for PublishError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::NotTcpOrUdp => "only TCP and UDP ports can be published",
            Self::NotExternal => "the address is not an external address of this gateway",
            Self::PortInUse => "the external port is in use",
            Self::EndpointPublished => "the inner endpoint is published on another port",
        })
    }
}

impl std::error::Error for PublishError {}

/// The state of a mapping, as shown to people.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MappingState {
    /// TCP: no handshake is complete.
    Opening,
    /// TCP: at least one connection stands.
    Established,
    /// TCP: every connection is closed or reset.
    Closing,
    /// UDP and ICMP.
    Active,
    /// A published port.
    Published,
}

impl MappingState {
    /// The name in `tidegate nat list`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Opening => "opening",
            Self::Established => "established",
            Self::Closing => "closing",
            Self::Active => "active",
            Self::Published => "published",
        }
    }
}

/// Which mappings are to be listed: those to which all of this applies that is given. By default, all.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MappingQuery {
    /// They are this client's.
    pub client: Option<Ipv4Addr>,
    /// They have this external address.
    pub external_address: Option<Ipv4Addr>,
    /// They have this external port, or ICMP identifier.
    pub external_port: Option<u16>,
}

impl MappingQuery {
    /// Whether a mapping of these two endpoints is wanted.
    pub(super) fn wants(&self, internal: Endpoint, external: Endpoint) -> bool {
        self.client.is_none_or(|client| client == internal.address)
            && self.external_address.is_none_or(|address| address == external.address)
            && self.external_port.is_none_or(|port| port == external.port)
    }
}

/// One mapping, as shown to people. It names no destinations (RFC 6888 REQ-12).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MappingView {
    /// The protocol.
    pub protocol: Proto,
    /// The client's endpoint.
    pub internal: Endpoint,
    /// The endpoint that stands for it outside.
    pub external: Endpoint,
    /// Time since its first packet.
    pub age: Duration,
    /// Time since its last packet.
    pub idle: Duration,
    /// Time until it expires if nothing more comes; `None`: never (a published port).
    pub expires_in: Option<Duration>,
    /// Remote endpoints that it talks to.
    pub sessions: usize,
    /// Its state.
    pub state: MappingState,
}

/// How much the NAT holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct NatCounts {
    /// TCP mappings, published ones included.
    pub tcp_mappings: usize,
    /// UDP mappings, published ones included.
    pub udp_mappings: usize,
    /// ICMP mappings.
    pub icmp_mappings: usize,
    /// Sessions of all mappings.
    pub sessions: usize,
    /// Ports that rest before they are used again.
    pub resting_ports: usize,
    /// Clients with mappings.
    pub clients: usize,
}
