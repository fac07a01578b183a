//! One shard of a gateway, through the [`Core`] trait: hostile datagrams, frames, ARP frames, packets of its host and
//! of other shards, hostile clients with real sessions, commands, and time.
//!
//! What leaves is well-formed and bears our own address; a client gets its own packets only; mappings stay below their
//! limits; nothing goes round in circles. When all is quiet, nobody but WireGuard has a timer, and soon nobody.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use tidegate_engine::access_policy::AccessPolicy;
use tidegate_engine::arena::{Arena, Span};
use tidegate_engine::clock::Timestamp;
use tidegate_engine::core::Core;
use tidegate_engine::external::packet_socket::FilterRules;
use tidegate_engine::external::reservation::{Batch, PortOwnership, Shortage};
use tidegate_engine::gateway::{Gateway, GatewayConfig};
use tidegate_engine::handoffs::Handoff;
use tidegate_engine::messages::{Command, Events, MappingLog};
use tidegate_engine::nat::{Endpoint, MappingQuery, Proto};
use tidegate_engine::outbox::{DeviceFrame, Outbox, TrainBuffer, send_to_peers};
use tidegate_engine::transport::ReceivedTrain;
use tidegate_engine::tunnel::{Outgoing, PeerId, Received, Sealer, Tunnel};
use tidegate_engine::wake::EventFd;
use tidegate_engine::wire::{CoalesceOptions, Ecn, Ipv4Packet, Offload};

use super::packets::{address_at, answer, icmp_error, mend};
use super::script::Script;

mod scene;

use self::scene::*;

/// The longest timeout is that of established TCP connections.
const LONG: Duration = Duration::from_secs(3 * 3600);
/// More wake-ups and datagrams than a script can bring about honestly.
const STORM: usize = 20_000;

struct Client {
    tunnel: Tunnel,
    gateway: PeerId,
}

struct World {
    now: Timestamp,
    gateway: Gateway,
    arena: Arena,
    outbox: Outbox,
    sealed: TrainBuffer,
    ownership: PortOwnership,
    clients: Vec<Client>,
    /// Whether neighbours answer.
    arp_answers: bool,
    /// The last packet that left, to be answered and quoted.
    left: Vec<u8>,
    /// The last datagram of a client's, and the last ARP request.
    datagram: Vec<u8>,
    arp_request: Vec<u8>,
    /// On their way to a client.
    to_clients: Vec<(usize, Vec<u8>)>,
    /// Bytes of the arena that this turn has received into.
    used: usize,
    wakeups: usize,
    datagrams: usize,
}

/// Follows the script.
pub fn run(input: &[u8]) {
    let mut script = Script::new(input);
    let mut world = World::new(&mut script);
    while !script.is_over() {
        world.step(&mut script);
        world.check_bounds();
    }
    world.end();
}

impl World {
    fn new(script: &mut Script<'_>) -> Self {
        let now = Timestamp::from_secs(1_000);
        let flags = script.byte();
        let ownership = PortOwnership::new();
        let events = Events::new(EventFd::new().expect("a descriptor"));
        let gateway = Gateway::new(GatewayConfig {
            shard: 0,
            shards: SHARDS,
            tunnel: tunnel_config(KEY, SHARDS),
            subnet: prefix(GATEWAY),
            gateway_address: GATEWAY,
            external: external_link(if flags & 1 == 0 { 1500 } else { 600 }, Some(ROUTER)),
            host_addresses: vec![EXTERNAL],
            access: AccessPolicy::default(),
            nat: nat_config(flags),
            port_range: (40_000, 44_095),
            port_budget: 0, // small first batches
            ownership: ownership.clone(),
            mapping_log: MappingLog::new(events.clone()),
            events,
            coalesce: CoalesceOptions { udp: flags & 2 != 0, enabled: true },
            seed: [1; 32],
        });
        let clients = (0..CLIENTS).map(|client| {
            let mut tunnel = Tunnel::new(tunnel_config(client_key(client), 1));
            let gateway = tunnel.set_peer(&peer_config(*PUBLIC_KEY, Some(ENDPOINT)), now);
            Client { tunnel, gateway }
        });
        let mut world = Self {
            now,
            gateway,
            arena: Arena::new(1),
            outbox: Outbox::default(),
            sealed: TrainBuffer::default(),
            ownership,
            clients: clients.collect(),
            arp_answers: flags & 8 == 0,
            left: Vec::new(),
            datagram: Vec::new(),
            arp_request: Vec::new(),
            to_clients: Vec::new(),
            used: 0,
            wakeups: 0,
            datagrams: 0,
        };
        (0..CLIENTS).for_each(|client| world.set_peer(client, 0));
        world.finish();
        world
    }

    fn step(&mut self, script: &mut Script<'_>) {
        match script.byte() % 16 {
            0..=3 => self.client_sends(script),
            4 | 5 => {
                let mut bytes = script.some_bytes(128);
                if bytes.len() >= 20 && script.byte() % 8 != 0 {
                    bytes[12..16].copy_from_slice(&remote(script.byte()).octets());
                    bytes[16..20].copy_from_slice(&EXTERNAL.octets());
                    mend(&mut bytes);
                }
                self.arrive(bytes, virtio(script));
            }
            6 => {
                let changes = script.some_bytes(32);
                if let Some(bytes) = answer(&self.left, EXTERNAL, &changes) {
                    self.arrive(bytes, virtio(script));
                }
            }
            7 => {
                let (kind, code) = (script.pick([3, 11, 12, 5]), script.byte());
                let quoted = 28 + usize::from(script.byte() % 64);
                let bytes = icmp_error(kind, code, remote(script.byte()), EXTERNAL, &self.left, quoted);
                self.arrive(bytes, Offload::NONE);
            }
            8 => {
                let mut bytes = script.some_bytes(255);
                if let (Some(first), true) = (bytes.first_chunk_mut::<4>(), script.byte() % 2 == 0) {
                    *first = [first[0] % 5, 0, 0, 0];
                }
                self.receive(&bytes, usize::from(script.byte()), STRANGER);
                self.finish();
            }
            9 => {
                let mut bytes = self.datagram.clone();
                let (at, change) = (usize::from(script.byte()), script.byte());
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= change;
                }
                self.receive(&bytes, bytes.len(), STRANGER);
                self.finish();
            }
            10 => self.arp(script),
            11 => {
                let to = client_address(usize::from(script.byte()) % 3);
                let bytes = packet(script, GATEWAY, to);
                let offload = virtio(script);
                let span = self.store(&bytes);
                self.gateway.receive_host(self.now, &mut self.arena, span, offload, &mut self.outbox);
                self.finish();
            }
            12 => {
                let from = remote(script.byte());
                let bytes = packet(script, from, EXTERNAL);
                let handoff = match script.byte() % 4 {
                    0 => Handoff::Initiation { from: STRANGER.into(), datagram: bytes },
                    3 => {
                        let ecn = Ecn::of_tos(bytes.get(1).copied().unwrap_or_default());
                        Handoff::Misdirected { from: STRANGER.into(), ecn, datagram: bytes }
                    }
                    1 => {
                        Handoff::ToPeer { packet: bytes, offload: virtio(script), client: client_address(0) }
                    }
                    _ => Handoff::Inbound { packet: bytes, offload: virtio(script), client: None },
                };
                self.gateway.receive_handoff(self.now, &mut self.arena, handoff, &mut self.outbox);
                self.finish();
            }
            13 => self.command(script),
            14 => self.arp_answers = script.byte() % 2 == 0,
            _ => {
                let unit = script.pick([10, 1_000, 60_000]);
                let duration = Duration::from_millis(u64::from(script.byte()) * unit);
                match script.byte() % 4 {
                    // The loop was busy: nobody polled meanwhile.
                    0 => self.now = self.now + duration,
                    _ => self.pass(duration),
                }
            }
        }
    }

    // ---- What comes in.

    /// A train of packets under a client's session: one, and what would follow it.
    fn client_sends(&mut self, script: &mut Script<'_>) {
        let client = usize::from(script.byte()) % CLIENTS;
        let destination = match script.byte() % 10 {
            0 => GATEWAY,
            1 => client_address(1 - client),
            2 => EXTERNAL,
            3 => Ipv4Addr::new(203, 0, 113, script.byte()),
            4 => Ipv4Addr::new(script.byte(), script.byte(), script.byte(), script.byte()),
            _ => Ipv4Addr::new(198, 51, 100, script.byte() % 4),
        };
        let mut bytes = packet(script, client_address(client), destination);
        let (times, now) = (script.byte() % 4, self.now);
        for _ in 0..=times {
            let Client { tunnel, gateway } = &mut self.clients[client];
            let mut out = Outgoing::default();
            if let Some(mut sealer) = tunnel.sealer(*gateway, now) {
                let mut buffer = vec![0; sealer.datagram_len(bytes.len())];
                buffer[Sealer::HEADER_LEN..][..bytes.len()].copy_from_slice(&bytes);
                let sealed = sealer.seal(&mut buffer, bytes.len());
                assert_eq!(sealed, Ok(buffer.len()));
                self.datagram = buffer;
                self.receive_datagram_of(client);
            } else {
                // Without a session the packet waits, and the handshake takes place.
                tunnel.enqueue(*gateway, &bytes, now, &mut out).ok();
                self.post(client, out);
            }
            follow(&mut bytes);
        }
        self.finish();
    }

    fn receive_datagram_of(&mut self, client: usize) {
        let datagram = self.datagram.clone();
        self.receive_more(&datagram, datagram.len(), client_endpoint(client));
    }

    fn post(&mut self, client: usize, out: Outgoing) {
        for (to, bytes) in out.datagrams {
            assert_eq!(to.remote, ENDPOINT);
            self.receive(&bytes, bytes.len(), client_endpoint(client));
            self.datagram = bytes;
            self.turn();
        }
    }

    /// The first train of a turn.
    fn receive(&mut self, train: &[u8], segment_size: usize, from: SocketAddrV4) {
        self.finish();
        self.receive_more(train, segment_size, from);
    }

    /// A further train of the same turn, as long as there is room.
    fn receive_more(&mut self, train: &[u8], segment_size: usize, from: SocketAddrV4) {
        let span = self.store(train);
        let (now, outbox) = (self.now, &mut self.outbox);
        // Now and then a router on the way has marked them.
        let mark = if self.datagrams % 8 == 7 { self.datagrams / 8 } else { 0 };
        let train = ReceivedTrain { span, segment_size, from: from.into(), ecn: Ecn::of_tos(mark as u8) };
        self.gateway.receive_datagrams(now, &mut self.arena, train, outbox);
        self.datagrams += 1;
        assert!(self.datagrams < STORM, "datagrams without end");
    }

    fn arrive(&mut self, bytes: Vec<u8>, offload: Offload) {
        let span = self.store(&bytes);
        self.gateway.receive_external(self.now, &mut self.arena, span, offload, &mut self.outbox);
        self.finish();
    }

    fn arp(&mut self, script: &mut Script<'_>) {
        let mut frame = match script.byte() % 3 {
            0 => script.some_bytes(64),
            _ => arp_reply(&self.arp_request, script.byte()),
        };
        let (at, change) = (usize::from(script.byte()), script.byte());
        if let Some(byte) = frame.get_mut(at) {
            *byte ^= change;
        }
        self.gateway.receive_arp(self.now, &frame, &mut self.outbox);
        self.finish();
    }

    fn command(&mut self, script: &mut Script<'_>) {
        let client = usize::from(script.byte()) % CLIENTS;
        let protocol = script.pick(Proto::ALL);
        let external = Endpoint::new(EXTERNAL, 40_000 + u16::from(SHARDS) * (u16::from(script.byte()) % 8));
        match script.byte() % 8 {
            0 => self.set_peer(client, 0),
            1 => {
                self.remove_peer(client);
                self.set_peer(client, script.byte() % SHARDS);
            }
            2 => self.remove_peer(client),
            3 => {
                let mtu = script.pick([1500, 600, 68, 9000]);
                let router = script.pick([Some(ROUTER), None, Some(Ipv4Addr::new(203, 0, 113, 2))]);
                self.obey(Command::SetExternal {
                    link: external_link(mtu, router),
                    host_addresses: vec![EXTERNAL],
                    filter: FilterRules {
                        addresses: vec![EXTERNAL],
                        ports: 0..=u16::MAX,
                        other_protocols: vec![],
                        except_udp: None,
                    },
                });
            }
            4 => {
                let config = nat_config(script.byte());
                let port_range = script.pick([(40_000, 44_095), (41_000, 41_200)]);
                self.obey(Command::SetNat { config, port_range });
            }
            5 => {
                let (reply, _answers) = sync_channel(1);
                let internal = Endpoint::new(client_address(client), script.word());
                let shard = script.pick([0, 1]);
                self.obey(Command::Publish { protocol, external, internal, shard, reply });
            }
            6 => {
                let returns_port = script.byte() % 2 == 0;
                self.obey(Command::Unpublish { protocol, external, returns_port });
            }
            _ => {
                let (reply, answers) = sync_channel(1);
                self.obey(Command::Mappings { query: MappingQuery::default(), limit: 10, reply });
                assert!(answers.try_recv().is_ok_and(|mappings| mappings.len() <= 10));
            }
        }
        self.finish();
    }

    fn set_peer(&mut self, client: usize, shard: u8) {
        let config = peer_config(PUBLIC_KEYS[client], None);
        self.obey(Command::SetPeer { config, address: client_address(client), shard, call: false });
    }

    fn remove_peer(&mut self, client: usize) {
        let public_key = PUBLIC_KEYS[client];
        self.obey(Command::RemovePeer { public_key, address: client_address(client) });
    }

    fn obey(&mut self, command: Command) {
        self.gateway.carry_out(self.now, command, &mut self.outbox);
    }

    /// Behind what this turn has received already.
    fn store(&mut self, bytes: &[u8]) -> Span {
        let span = Span::new(0, self.used..self.used + bytes.len());
        self.arena.buffer_mut(0)[span.range()].copy_from_slice(bytes);
        self.used = span.range().end;
        span
    }

    // ---- What goes out.

    /// The end of a turn, and whatever follows from it.
    fn finish(&mut self) {
        self.turn();
        while let Some((client, mut datagram)) = self.to_clients.pop() {
            let Client { tunnel, gateway } = &mut self.clients[client];
            let mut out = Outgoing::default();
            match tunnel.receive(self.now, ENDPOINT.into(), &mut datagram, &mut out) {
                Received::Packet { peer, plaintext } => {
                    assert_eq!(peer, *gateway);
                    let packet = Ipv4Packet::parse(&mut datagram[plaintext], 0, Offload::NONE);
                    let packet = packet.expect("well-formed");
                    assert_eq!(packet.destination(), client_address(client), "its own packets only");
                    assert!(packet.total_len() <= TUNNEL_MTU);
                }
                Received::OtherShard(shard) => panic!("a client has no shard {shard}"),
                Received::Keepalive { .. } | Received::Handshake { .. } | Received::Drop(_) => {}
            }
            self.post(client, out);
        }
    }

    /// The end of a turn, as in [`tidegate_engine::shard`].
    fn turn(&mut self) {
        self.gateway.flush_peers(self.now, &mut self.arena, &mut self.outbox);
        if self.gateway.next_wakeup().is_some_and(|due| due <= self.now) {
            self.gateway.poll(self.now, &mut self.outbox);
        }
        self.reserve();
        let frames: Vec<Vec<u8>> = self.outbox.external.iter().map(|frame| self.check_frame(frame)).collect();
        for (frame, bytes) in self.outbox.external.iter().zip(frames) {
            assert_eq!(address_at(&bytes, 12), EXTERNAL, "only our own address leaves");
            assert!(frame.shape.segment_len() <= 9000);
            self.left = bytes;
        }
        for frame in &self.outbox.tun {
            let bytes = self.check_frame(frame);
            let to = address_at(&bytes, 16);
            assert!([GATEWAY, EXTERNAL].contains(&to), "{to} is not the host's");
        }
        for (shard, _) in &self.outbox.handoffs {
            assert!((1..SHARDS).contains(shard), "a handoff to shard {shard}");
        }
        let requests: Vec<_> = self.outbox.arp.drain(..).collect();
        let Self { gateway, outbox, arena, sealed, now, to_clients, .. } = self;
        send_to_peers(outbox, gateway, arena, sealed, *now, |trains, _| {
            for train in trains {
                // A train of one empty datagram has no chunks; the tunnel makes none.
                let datagrams = train.bytes.chunks(train.segment_size);
                to_clients.extend(datagrams.filter_map(|bytes| to_client(train.to.remote, bytes.to_vec())));
            }
        });
        self.outbox.clear();
        self.used = 0;
        for request in requests {
            assert_eq!(request[6..12], MAC);
            assert_eq!(request[28..32], EXTERNAL.octets());
            self.arp_request = request.to_vec();
            if self.arp_answers {
                let reply = arp_reply(&request, 0);
                self.gateway.receive_arp(self.now, &reply, &mut self.outbox);
                self.turn();
            }
        }
    }

    fn check_frame(&self, frame: &DeviceFrame) -> Vec<u8> {
        let mut bytes = self.outbox.to_vec(&frame.packet, &self.arena);
        let offload = frame.header.offload().expect("a header that we know");
        let packet = Ipv4Packet::parse(&mut bytes, 0, offload).expect("well-formed");
        assert_eq!(packet.total_len(), frame.shape.total_len());
        bytes
    }

    /// The reserver, which has every port of the range.
    fn reserve(&mut self) {
        for request in self.gateway.end_turn() {
            let (protocol, address) = (request.protocol, request.address);
            for &port in &request.returned {
                assert!(self.ownership.set(protocol, SocketAddrV4::new(address, port), false));
            }
            if request.count == 0 {
                continue;
            }
            let ports: Vec<u16> = request
                .ports
                .clone()
                .filter(|port| port % u16::from(SHARDS) == 0)
                .filter(|&port| !self.ownership.is_reserved(protocol, address, port))
                .take(request.count)
                .collect();
            for &port in &ports {
                assert!(self.ownership.set(protocol, SocketAddrV4::new(address, port), true));
            }
            let shortage = (ports.len() < request.count).then_some(Shortage::NoFreePort);
            self.obey(Command::Ports(Batch { request, ports, shortage }));
        }
    }

    // ---- Time, and what must hold.

    fn pass(&mut self, duration: Duration) {
        let end = self.now + duration;
        loop {
            let clients = self.clients.iter().filter_map(|client| client.tunnel.next_wakeup());
            let due = self.gateway.next_wakeup().into_iter().chain(clients).min();
            let Some(due) = due.filter(|&due| due <= end) else { break };
            self.now = self.now.max(due);
            self.wakeups += 1;
            assert!(self.wakeups < STORM, "a timer fires again and again");
            for client in 0..CLIENTS {
                let mut out = Outgoing::default();
                self.clients[client].tunnel.poll(self.now, &mut out);
                self.post(client, out);
            }
            self.finish();
        }
        self.now = self.now.max(end);
    }

    fn check_bounds(&self) {
        let status = self.gateway.status(self.now);
        let mappings: usize = status.mappings.iter().sum();
        // Eight published ports of TCP and as many of UDP come on top.
        assert!(mappings <= MAX_MAPPINGS + 16, "{mappings} mappings");
        assert!(status.sessions <= 4 * MAX_MAPPINGS, "{} sessions", status.sessions);
        assert!(status.peers.len() <= CLIENTS);
    }

    /// Silence: time takes everything away.
    fn end(&mut self) {
        self.arp_answers = false;
        self.pass(LONG);
        let mut timers = vec![self.gateway.sealing().0.next_wakeup()];
        timers.extend(self.clients.iter().map(|client| client.tunnel.next_wakeup()));
        assert_eq!(self.gateway.next_wakeup(), timers[0], "a timer that is not WireGuard's");
        assert_eq!(timers, [None; 1 + CLIENTS], "WireGuard falls silent, too");
        for client in 0..CLIENTS {
            self.remove_peer(client);
        }
        self.finish();
        self.pass(LONG);
        let status = self.gateway.status(self.now);
        assert_eq!((status.mappings, status.sessions, status.peers.len()), ([0; 3], 0, 0));
        assert_eq!(self.gateway.next_wakeup(), None);
    }
}
