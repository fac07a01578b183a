//! A world in memory: clients, a link, a gateway of one or two shards, its host, and the internet. Its clock stands
//! still until a test turns it.
//!
//! ```text
//!   client 0  10.66.77.2  --.
//!   client 1  10.66.77.3  --+-- link (loses, repeats, swaps, damages) -- gateway  shard 0, shard 1
//!   client 2  10.66.77.4  --'                                            10.66.77.1 (its host answers echoes)
//!                                                                           |  203.0.113.10, MTU 1500
//!                                                                           +-- neighbour  203.0.113.77
//!                                                                           +-- router     203.0.113.1
//!                                                                                 |
//!                                                                               server     198.51.100.7
//! ```
//!
//! Between the cores the world does what [`tidegate_engine::shard`] does, and what the kernels on either side do (see
//! `kernel.rs`): every packet that leaves a core is verified to the last checksum before anybody looks at it.

#[path = "world/answers.rs"]
mod answers;
#[path = "world/entrances.rs"]
mod entrances;
#[path = "world/node.rs"]
mod node;
#[path = "world/surroundings.rs"]
mod surroundings;

use std::collections::{BTreeMap, VecDeque};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use tidegate_engine::access_policy::AccessPolicy;
use tidegate_engine::client::{Client, ClientConfig};
use tidegate_engine::clock::Timestamp;
use tidegate_engine::core::Core;
use tidegate_engine::drop_reason::{DropCounters, DropReason};
use tidegate_engine::external::MacAddress;
use tidegate_engine::external::next_hop::ExternalLink;
use tidegate_engine::external::reservation::{Batch, PortOwnership, PortProtocol, Shortage};
use tidegate_engine::fair_queue::Owner;
use tidegate_engine::gateway::{Gateway, GatewayConfig};
use tidegate_engine::handoffs::Handoff;
use tidegate_engine::messages::{Command, Events, MappingLog, ShardStatus};
use tidegate_engine::nat::{Endpoint, NatConfig, Proto, PublishError};
use tidegate_engine::tunnel::{Cipher, PeerConfig, Sealer, Tunnel, TunnelConfig, public_key};
use tidegate_engine::wake::EventFd;
use tidegate_engine::wire::{CoalesceOptions, Ecn, Offload, VirtioNetHeader};

pub use node::Train;
pub use surroundings::{arp_reply, echo_reply};

use node::{DevicePacket, Node, TRAINS_PER_TURN, receive_trains};
use surroundings::fanout;

use super::kernel;
use super::link::Link;
use super::packets::{ICMP, Ip};

pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 66, 77, 1);
pub const EXTERNAL: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
pub const NEIGHBOUR: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 77);
pub const ROUTER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
pub const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
pub const GATEWAY_ENDPOINT: SocketAddrV4 = SocketAddrV4::new(EXTERNAL, 51_820);
pub const TUNNEL_MTU: usize = 1420;
pub const EXTERNAL_MTU: usize = 1500;
/// The router's outer address, where it forwards to the gateway what is for this port.
pub const LOOPBACK: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 1), 51_820);
/// The server's UDP port that echoes.
pub const ECHO_PORT: u16 = 7;

const OUR_MAC: MacAddress = [2, 0, 0, 0, 0, 10];
const GATEWAY_KEY: [u8; 32] = [0x77; 32];
/// Of an Ethernet header.
const LINK_HEADER: usize = 14;
/// More events than any journey has: a packet goes round in circles.
const STORM: usize = 20_000;

pub fn client_address(client: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 66, 77, 2 + client as u8)
}

pub fn gateway_public_key() -> [u8; 32] {
    public_key(&GATEWAY_KEY)
}

fn client_endpoint(client: usize) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 101 + client as u8), 40_000 + client as u16)
}

fn client_key(client: usize) -> [u8; 32] {
    [client as u8 + 1; 32]
}

enum Event {
    ToShard(usize, Train),
    ToClient(usize, Train),
    FromOutside(usize, DevicePacket),
    Handoff(usize, Handoff),
    Arp(usize, Vec<u8>),
}

/// How the world is made.
#[derive(Clone)]
pub struct Plan {
    pub clients: usize,
    pub shards: u8,
    pub external_mtu: usize,
    pub port_range: (u16, u16),
    pub nat: NatConfig,
    pub coalesce: CoalesceOptions,
    /// The clients' profile.
    pub allowed_ips: &'static str,
    pub link: Link,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            clients: 3,
            shards: 1,
            external_mtu: EXTERNAL_MTU,
            port_range: (40_000, 49_999),
            nat: NatConfig::default(),
            coalesce: CoalesceOptions::default(),
            allowed_ips: "0.0.0.0/0",
            link: Link::perfect(),
        }
    }
}

pub struct World {
    pub now: Timestamp,
    pub clients: Vec<Node<Client>>,
    pub shards: Vec<Node<Gateway>>,
    pub link: Link,
    pub ownership: PortOwnership,
    pub mapping_log: MappingLog,
    /// What the gateway tells Python.
    pub told: Events,
    /// What arrived at each client's applications, as its kernel would see it.
    pub delivered: Vec<Vec<Ip>>,
    /// What arrived at the internet, and at the gateway's host.
    pub outside: Vec<Ip>,
    pub host: Vec<Ip>,
    /// The same for what crossed to the kernels whole, before it was split: how many packets.
    pub device_packets: usize,
    /// Whether the router forwards what comes from inside to [`LOOPBACK`] to the gateway, as from itself, and back (NAT
    /// loopback).
    pub loops_back: bool,
    /// Who has sent there, by the port from which the router forwards it, and how much it has sent back to them.
    looped: Vec<SocketAddrV4>,
    pub sent_back: usize,
    /// What the gateway sent to where nobody is.
    pub lost: Vec<Vec<u8>>,
    /// Datagrams between clients and gateway, both ways.
    pub datagrams: usize,
    /// ARP requests that nobody answers, and those seen.
    pub arp_is_silent: bool,
    pub arp_requests: Vec<Ipv4Addr>,
    pub reserve_requests: usize,
    /// The queues between the shards are full.
    pub handoffs_are_full: bool,
    /// Whose packets have crossed shards.
    pub crossed: Vec<Owner<Ipv4Addr>>,
    /// To which shard initiations go, as the kernel's hash would have it.
    pub initiations_to: usize,
    /// The kernel steers data messages to the right shard; otherwise all go to this one.
    pub all_datagrams_to: Option<usize>,
    /// Whether the server answers echo requests and UDP to [`ECHO_PORT`], and the router expired packets.
    pub internet_answers: bool,
    pub mtu: usize,
    /// Whether what leaves must be right to the last checksum: not so where a test sends what is not.
    pub is_strict: bool,
    router: Ipv4Addr,
    host_addresses: Vec<Ipv4Addr>,
    port_range: (u16, u16),
    /// What of it the reserver keeps for the host's programs, first and last.
    pub kept_ports: Option<(u16, u16)>,
    /// Where the clients are.
    pub endpoints: Vec<SocketAddrV4>,
    recorded: Option<Vec<Train>>,
    events: VecDeque<Event>,
}

impl World {
    pub fn new() -> Self {
        Self::of(Plan::default())
    }

    pub fn with_shards(shards: u8) -> Self {
        Self::of(Plan { shards, ..Plan::default() })
    }

    pub fn of(plan: Plan) -> Self {
        let now = Timestamp::from_secs(1_000);
        let ownership = PortOwnership::new();
        let told = Events::new(EventFd::new().unwrap());
        let mapping_log = MappingLog::new(told.clone());
        let shards = (0..plan.shards).map(|shard| {
            Node::new(Gateway::new(GatewayConfig {
                shard,
                shards: plan.shards,
                tunnel: tunnel(GATEWAY_KEY, shard, plan.shards),
                subnet: "10.66.77.0/24".parse().unwrap(),
                gateway_address: GATEWAY,
                external: external_link(plan.external_mtu, Some(ROUTER)),
                host_addresses: vec![EXTERNAL],
                access: AccessPolicy::default(),
                nat: plan.nat.clone(),
                port_range: plan.port_range,
                port_budget: 0, // small first batches
                ownership: ownership.clone(),
                mapping_log: mapping_log.clone(),
                events: told.clone(),
                coalesce: plan.coalesce,
                seed: [shard + 1; 32],
            }))
        });
        let clients = (0..plan.clients).map(|client| {
            let config = ClientConfig {
                tunnel: tunnel(client_key(client), 0, 1),
                gateway: peer(public_key(&GATEWAY_KEY), Some(GATEWAY_ENDPOINT)),
                allowed_ips: vec![plan.allowed_ips.parse().unwrap()],
                coalesce: plan.coalesce,
                events: Events::new(EventFd::new().unwrap()),
            };
            Node::new(Client::new(config, now))
        });
        let mut world = Self {
            now,
            shards: shards.collect(),
            clients: clients.collect(),
            link: plan.link,
            ownership,
            mapping_log,
            told,
            delivered: vec![Vec::new(); plan.clients],
            outside: Vec::new(),
            host: Vec::new(),
            device_packets: 0,
            loops_back: false,
            looped: Vec::new(),
            sent_back: 0,
            lost: Vec::new(),
            datagrams: 0,
            arp_is_silent: false,
            arp_requests: Vec::new(),
            reserve_requests: 0,
            handoffs_are_full: false,
            crossed: Vec::new(),
            initiations_to: 0,
            all_datagrams_to: None,
            internet_answers: true,
            mtu: plan.external_mtu,
            is_strict: true,
            router: ROUTER,
            host_addresses: vec![EXTERNAL],
            port_range: plan.port_range,
            kept_ports: None,
            endpoints: (0..plan.clients).map(client_endpoint).collect(),
            recorded: None,
            events: VecDeque::new(),
        };
        for client in 0..plan.clients {
            let shard = world.home_of(client) as u8;
            world.set_peer(client, shard);
        }
        (0..world.shards.len()).for_each(|shard| world.reserve(shard));
        world
    }

    /// The shard where a client lives: they take turns.
    pub fn home_of(&self, client: usize) -> usize {
        client % self.shards.len()
    }

    pub fn set_peer(&mut self, client: usize, shard: u8) {
        let config = peer(public_key(&client_key(client)), None);
        self.tell_peer(client, shard, &config, false);
    }

    /// As after a restart: the client was heard of at `endpoint`, and is called there.
    pub fn call_peer(&mut self, client: usize, endpoint: SocketAddrV4) {
        let config = peer(public_key(&client_key(client)), Some(endpoint));
        self.tell_peer(client, self.home_of(client) as u8, &config, true);
        self.settle();
    }

    fn tell_peer(&mut self, client: usize, shard: u8, config: &PeerConfig, call: bool) {
        let address = client_address(client);
        self.tell_all(|| Command::SetPeer { config: config.clone(), address, shard, call });
    }

    pub fn remove_peer(&mut self, client: usize) {
        let public_key = public_key(&client_key(client));
        self.tell_all(|| Command::RemovePeer { public_key, address: client_address(client) });
    }

    /// The default router is another one from now on.
    pub fn set_router(&mut self, router: Ipv4Addr) {
        self.router = router;
        self.set_external(&external_link(self.mtu, Some(router)));
    }

    pub fn remove_router(&mut self) {
        self.set_external(&external_link(self.mtu, None));
    }

    /// The gateway's host has these addresses from now on.
    pub fn set_host_addresses(&mut self, addresses: &[Ipv4Addr]) {
        self.host_addresses = addresses.to_vec();
        self.set_external(&external_link(self.mtu, Some(self.router)));
    }

    fn set_external(&mut self, link: &ExternalLink) {
        let filter = tidegate_engine::external::packet_socket::FilterRules {
            addresses: vec![EXTERNAL],
            ports: 0..=u16::MAX,
            other_protocols: vec![],
            except_udp: None,
        };
        let host_addresses = self.host_addresses.clone();
        self.tell_all(|| Command::SetExternal {
            link: link.clone(),
            host_addresses: host_addresses.clone(),
            filter: filter.clone(),
        });
    }

    /// Publishes `port` for a client, as the engine does.
    pub fn publish(
        &mut self,
        protocol: Proto,
        port: u16,
        internal: SocketAddrV4,
    ) -> Result<(), PublishError> {
        let client = usize::from(internal.ip().octets()[3]) - 2;
        let (external, shard) = (Endpoint::new(EXTERNAL, port), self.home_of(client) as u8);
        let internal = Endpoint::new(*internal.ip(), internal.port());
        self.own(protocol, port);
        let (reply, answers) = std::sync::mpsc::sync_channel(8);
        self.tell_all(|| Command::Publish { protocol, external, internal, shard, reply: reply.clone() });
        answers.try_iter().find(Result::is_err).unwrap_or(Ok(()))
    }

    fn own(&self, protocol: Proto, port: u16) {
        let protocol = if protocol == Proto::Tcp { PortProtocol::Tcp } else { PortProtocol::Udp };
        assert!(self.ownership.set(protocol, SocketAddrV4::new(EXTERNAL, port), true));
    }

    pub fn tell_all(&mut self, command: impl Fn() -> Command) {
        let now = self.now;
        for shard in 0..self.shards.len() {
            let node = &mut self.shards[shard];
            node.core.carry_out(now, command(), &mut node.outbox);
            self.finish_shard(shard);
        }
        self.settle();
    }

    /// Tells one shard alone, as long as the others have not come to it yet.
    pub fn tell(&mut self, shard: usize, command: Command) {
        let (now, node) = (self.now, &mut self.shards[shard]);
        node.core.carry_out(now, command, &mut node.outbox);
        self.finish_shard(shard);
        self.settle();
    }

    // ---- Time.

    /// Time passes, and what is due happens when it is due.
    pub fn pass(&mut self, duration: Duration) {
        let end = self.now + duration;
        self.settle();
        for _ in 0..STORM {
            let due = self.next_wakeup().filter(|&due| due <= end);
            let Some(due) = due else {
                self.now = end;
                return;
            };
            self.now = self.now.max(due);
            for shard in 0..self.shards.len() {
                self.finish_shard(shard);
            }
            for client in 0..self.clients.len() {
                self.finish_client(client);
            }
            self.settle();
        }
        panic!("a timer fires again and again");
    }

    pub fn next_wakeup(&self) -> Option<Timestamp> {
        let shards = self.shards.iter().filter_map(|node| node.core.next_wakeup());
        shards.chain(self.clients.iter().filter_map(|node| node.core.next_wakeup())).min()
    }

    /// Everything under way arrives.
    pub fn settle(&mut self) {
        for _ in 0..STORM {
            let Some(event) = self.events.pop_front() else { return };
            match event {
                Event::ToShard(shard, train) => {
                    let trains =
                        self.more_trains(train, |event| matches!(event, Event::ToShard(s, _) if *s == shard));
                    let local = Some(*GATEWAY_ENDPOINT.ip());
                    receive_trains(&mut self.shards[shard], self.now, &trains, local);
                    self.finish_shard(shard);
                }
                Event::ToClient(client, train) => {
                    let trains = self
                        .more_trains(train, |event| matches!(event, Event::ToClient(c, _) if *c == client));
                    receive_trains(&mut self.clients[client], self.now, &trains, None);
                    self.finish_client(client);
                }
                Event::FromOutside(shard, packet) => self.receive_external(shard, &packet),
                Event::Handoff(shard, handoff) => {
                    let node = &mut self.shards[shard];
                    node.core.receive_handoff(self.now, &mut node.arena, handoff, &mut node.outbox);
                    self.finish_shard(shard);
                }
                Event::Arp(shard, frame) => {
                    let node = &mut self.shards[shard];
                    node.core.receive_arp(self.now, &frame, &mut node.outbox);
                    self.finish_shard(shard);
                }
            }
        }
        panic!("a packet goes round in circles");
    }

    /// As many trains as one turn takes.
    fn more_trains(&mut self, first: Train, same: impl Fn(&Event) -> bool) -> Vec<Train> {
        let mut trains = vec![first];
        while trains.len() < TRAINS_PER_TURN && self.events.front().is_some_and(&same) {
            if let Some(Event::ToShard(_, train) | Event::ToClient(_, train)) = self.events.pop_front() {
                trains.push(train);
            }
        }
        trains
    }

    fn receive_external(&mut self, shard: usize, packet: &DevicePacket) {
        let node = &mut self.shards[shard];
        let span = node.store(0, &packet.bytes);
        let header = VirtioNetHeader::from_bytes(packet.virtio);
        let Node { core, arena, outbox, .. } = node;
        if let Some(offload) = header.offload_of(arena.get_mut(span)) {
            core.receive_external(self.now, arena, span, offload, outbox);
        } else if let Some(segments) = header.split_encapsulated(arena.get(span)) {
            core.receive_external_segments(self.now, arena, segments, outbox);
        } else {
            core.drops().count(DropReason::UnknownOffload);
        }
        self.finish_shard(shard);
    }

    // ---- What goes out.

    fn finish_shard(&mut self, shard: usize) {
        self.tell_what_began(shard);
        let output = self.shards[shard].finish(self.now);
        self.reserve(shard);
        for frame in output.arp {
            self.hear_arp(shard, &frame);
        }
        for packet in output.external {
            self.reach_internet(&packet);
        }
        for packet in output.tun {
            for bytes in self.transmit(&packet, 0) {
                let ip = Ip::parse(&bytes);
                if ip.protocol == ICMP && ip.icmp() == (8, 0) && self.internet_answers {
                    let reply = echo_reply(&ip);
                    self.host.push(ip);
                    self.send_from_host_bytes(&reply.bytes(), [0; 10]);
                } else {
                    self.host.push(ip);
                }
            }
        }
        for (to, segment_size, bytes) in output.trains {
            if matches!(bytes[0], 2 | 3) {
                // A handshake response or a cookie, perhaps of a shard that another one has sent the initiation to.
                assert_eq!(
                    to.local,
                    Some(*GATEWAY_ENDPOINT.ip()),
                    "answered from the address that was called"
                );
            }
            if self.loop_back(to.remote, &bytes, segment_size) {
                continue;
            }
            let client = self.endpoints.iter().position(|&endpoint| endpoint == to.remote);
            let Some(client) = client else {
                self.lost.push(bytes);
                continue;
            };
            let train = Train { from: GATEWAY_ENDPOINT, segment_size, bytes, ecn: Ecn::NotEct };
            self.datagrams += train.bytes.len().div_ceil(segment_size);
            for train in self.link.pass(train) {
                self.events.push_back(Event::ToClient(client, train));
            }
        }
        for (to, handoff) in output.handoffs {
            assert_ne!(usize::from(to), shard, "a handoff to oneself");
            if self.handoffs_are_full {
                self.shards[shard].core.drops().count(DropReason::QueueFull);
                continue;
            }
            self.crossed.push(handoff.owner());
            self.events.push_back(Event::Handoff(usize::from(to), handoff));
        }
    }

    /// Word of sessions goes beside the handoffs, and before what is sealed in them.
    fn tell_what_began(&mut self, shard: usize) {
        let begun: Vec<u32> = self.shards[shard].core.tunnel().take_begun().collect();
        for (_, other) in self.shards.iter_mut().enumerate().filter(|(other, _)| *other != shard) {
            begun.iter().for_each(|&index| other.core.tunnel().set_begun_elsewhere(index, self.now));
        }
    }

    fn finish_client(&mut self, client: usize) {
        let output = self.clients[client].finish(self.now);
        assert!(output.external.is_empty() && output.arp.is_empty() && output.handoffs.is_empty());
        for packet in output.tun {
            for bytes in self.transmit(&packet, 0) {
                let ip = Ip::parse(&bytes);
                assert_eq!(ip.destination, client_address(client), "a client gets its own packets only");
                self.delivered[client].push(ip);
            }
        }
        for (to, segment_size, bytes) in output.trains {
            assert_eq!(to, GATEWAY_ENDPOINT.into(), "a client leaves its address to the route");
            let train = Train { from: self.endpoints[client], segment_size, bytes, ecn: Ecn::NotEct };
            if let Some(recorded) = &mut self.recorded {
                recorded.push(train.clone());
            }
            self.datagrams += train.bytes.len().div_ceil(segment_size);
            for train in self.link.pass(train) {
                let shard = self.steer(&train.bytes);
                self.events.push_back(Event::ToShard(shard, train));
            }
        }
    }

    /// The packets that a device puts on its wire.
    fn transmit(&mut self, packet: &DevicePacket, link_header: usize) -> Vec<Vec<u8>> {
        self.device_packets += 1;
        if !self.is_strict {
            return vec![packet.bytes.clone()];
        }
        let packets = kernel::transmit(packet.virtio, &packet.bytes, link_header);
        packets.iter().for_each(|bytes| drop(Ip::verify(bytes)));
        packets
    }

    /// The reserver, which has every port of the range.
    fn reserve(&mut self, shard: usize) {
        for request in self.shards[shard].core.end_turn() {
            self.reserve_requests += 1;
            let (protocol, address) = (request.protocol, request.address);
            for &port in &request.returned {
                assert!(self.ownership.set(protocol, SocketAddrV4::new(address, port), false));
            }
            if request.count == 0 {
                continue;
            }
            let range = if *request.ports.start() < 1024 {
                512..=1023
            } else {
                self.port_range.0..=self.port_range.1
            };
            assert_eq!(request.ports, range);
            let ports: Vec<u16> = range
                .filter(|port| port % u16::from(request.shards) == u16::from(request.shard))
                .filter(|&port| !self.ownership.is_reserved(protocol, address, port))
                .filter(|port| self.kept_ports.is_none_or(|(first, last)| !(first..=last).contains(port)))
                .take(request.count)
                .collect();
            for &port in &ports {
                assert!(self.ownership.set(protocol, SocketAddrV4::new(address, port), true));
            }
            let (now, node) = (self.now, &mut self.shards[shard]);
            let shortage = (ports.len() < request.count).then_some(Shortage::NoFreePort);
            let batch = Batch { request, ports, shortage };
            node.core.carry_out(now, Command::Ports(batch), &mut node.outbox);
        }
    }
}

fn tunnel(private_key: [u8; 32], shard: u8, shards: u8) -> TunnelConfig {
    TunnelConfig {
        private_key,
        shard,
        shards,
        mtu: TUNNEL_MTU,
        unix_time_at_origin: Duration::from_secs(1_700_000_000),
    }
}

fn peer(public_key: [u8; 32], endpoint: Option<SocketAddrV4>) -> PeerConfig {
    PeerConfig {
        public_key,
        preshared_key: None,
        endpoint,
        persistent_keepalive: None,
        cipher: Cipher::default(),
    }
}

fn external_link(mtu: usize, router: Option<Ipv4Addr>) -> ExternalLink {
    ExternalLink {
        interface: "eth0".into(),
        index: 2,
        mac: OUR_MAC,
        mtu,
        addresses: vec![EXTERNAL],
        on_link: vec!["203.0.113.0/24".parse().unwrap()],
        router,
    }
}
