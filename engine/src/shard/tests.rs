use std::net::SocketAddrV4;

use super::*;
use crate::access_policy::AccessPolicy;
use crate::arena::Span;
use crate::client::{Client, ClientConfig};
use crate::drop_reason::DropReason;
use crate::external::next_hop::ExternalLink;
use crate::external::reservation::PortOwnership;
use crate::fair_queue::Owner;
use crate::gateway::{Gateway, GatewayConfig};
use crate::handoffs::HANDOFF_QUEUE;
use crate::messages::MappingLog;
use crate::nat::NatConfig;
use crate::path::Path;
use crate::transport::MAX_TRAIN_SEGMENTS;
use crate::tunnel::{
    Cipher, HANDSHAKE_WORK, Outgoing, PeerConfig, Received, Tunnel, TunnelConfig, public_key,
};
use crate::wire::test_packets::{ALICE, SERVER, Template, payload};
use crate::wire::{CoalesceOptions, Ecn, Gso, GsoKind, Ipv4Packet, Offload, VirtioNetHeader};

const NOW: Timestamp = Timestamp::from_secs(10);
const BOB: Ipv4Addr = Ipv4Addr::new(10, 66, 77, 3);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 66, 77, 1);
const ALICE_KEY: [u8; 32] = [1; 32];
const GATEWAY_KEY: [u8; 32] = [2; 32];
const BOB_KEY: [u8; 32] = [3; 32];
const ALICE_ENDPOINT: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 1), 1);
/// Bytes of a packet that is sealed in a message of 64.
const SMALL_PACKET: usize = 32;

fn tunnel(private_key: [u8; 32], shards: u8) -> TunnelConfig {
    TunnelConfig { private_key, shard: 0, shards, mtu: 1_420, unix_time_at_origin: Duration::ZERO }
}

fn peer(private_key: [u8; 32], endpoint: Option<SocketAddrV4>) -> PeerConfig {
    PeerConfig {
        public_key: public_key(&private_key),
        preshared_key: None,
        endpoint,
        persistent_keepalive: None,
        cipher: Cipher::default(),
    }
}

/// A core that takes packets, and does nothing with them.
fn idle_core() -> Client {
    let events = Events::new(EventFd::new().unwrap());
    let coalesce = CoalesceOptions::default();
    let (tunnel, gateway) = (tunnel(ALICE_KEY, 1), peer(GATEWAY_KEY, None));
    Client::new(ClientConfig { tunnel, gateway, allowed_ips: Vec::new(), coalesce, events }, NOW)
}

/// Shard 0 of two, on which Alice lives; Bob lives on the other.
fn gateway() -> Gateway {
    let events = Events::new(EventFd::new().unwrap());
    let mut gateway = Gateway::new(GatewayConfig {
        shard: 0,
        shards: 2,
        tunnel: tunnel(GATEWAY_KEY, 2),
        subnet: "10.66.77.0/24".parse().unwrap(),
        gateway_address: GATEWAY,
        external: ExternalLink {
            interface: "eth0".into(),
            index: 2,
            mac: [2; 6],
            mtu: 1_500,
            addresses: vec![Ipv4Addr::new(203, 0, 113, 10)],
            on_link: Vec::new(),
            router: None,
        },
        host_addresses: Vec::new(),
        access: AccessPolicy::default(),
        nat: NatConfig::default(),
        port_range: (40_000, 49_999),
        port_budget: 0,
        ownership: PortOwnership::new(),
        mapping_log: MappingLog::new(events.clone()),
        events,
        coalesce: CoalesceOptions::default(),
        seed: [1; 32],
    });
    for (key, address, shard) in [(ALICE_KEY, ALICE, 0), (BOB_KEY, BOB, 1)] {
        let config = peer(key, None);
        let command = Command::SetPeer { config, address, shard, call: false };
        gateway.carry_out(NOW, command, &mut Outbox::default());
    }
    gateway
}

/// Puts what was sent back to back into the arena, and lets the core receive it.
fn receive(core: &mut impl Core, arena: &mut Arena, train: &[u8], segment_size: usize, outbox: &mut Outbox) {
    let train = train_in(arena, crate::arena::Slot { buffer: 0, start: 0 }, train, segment_size);
    core.receive_datagrams(NOW, arena, train, outbox);
}

/// Alice, and the initiation with which she begins.
fn alice() -> (Tunnel, PeerId, Vec<u8>) {
    let mut alice = Tunnel::new(tunnel(ALICE_KEY, 1));
    let to = alice.set_peer(&peer(GATEWAY_KEY, Some(SocketAddrV4::new(GATEWAY, 51_820))), NOW);
    let mut out = Outgoing::default();
    alice.enqueue(to, &Template::default().udp(b"waits"), NOW, &mut out).unwrap();
    let (_, initiation) = out.datagrams.pop().unwrap();
    (alice, to, initiation)
}

/// A train of Alice's: small packets to Bob, each from another port, so that nothing is gathered.
fn small_train(alice: &mut Tunnel, gateway: PeerId, ports: Range<u16>) -> Vec<u8> {
    let mut train = Vec::new();
    for port in ports {
        let ports = (port, 9);
        let packet = Template { destination: BOB, ports, ..Template::default() }.udp(&payload(4));
        assert_eq!(packet.len(), SMALL_PACKET);
        let mut out = Outgoing::default();
        alice.enqueue(gateway, &packet, NOW, &mut out).unwrap();
        train.extend(out.datagrams.pop().unwrap().1);
    }
    train
}

fn train_in(arena: &mut Arena, slot: crate::arena::Slot, bytes: &[u8], segment_size: usize) -> ReceivedTrain {
    let span = Span::new(slot.buffer, slot.start..slot.start + bytes.len());
    arena.get_mut(span).copy_from_slice(bytes);
    ReceivedTrain { span, segment_size, from: Path::from(ALICE_ENDPOINT), ecn: Ecn::NotEct }
}

#[test]
fn a_turn_of_small_datagrams_leaves_room_in_the_queue_before_another_shard() {
    // What the kernel merges, and what it passes on whole from a sender on this machine.
    for (is_contended, datagrams) in [(false, 64), (false, 127), (true, 64), (true, 127), (true, 128)] {
        let case = format!("trains of {datagrams}, contended: {is_contended}");
        let (mut core, mut arena, mut outbox) = (gateway(), Arena::new(TRANSPORT_BUFFERS), Outbox::default());
        let (mut alice, to, initiation) = alice();
        receive(&mut core, &mut arena, &initiation, initiation.len(), &mut outbox);
        let (_, mut response) = outbox.datagrams.datagrams.pop().unwrap();
        let received = alice.receive(NOW, ALICE_ENDPOINT.into(), &mut response, &mut Outgoing::default());
        assert!(matches!(received, Received::Handshake { .. }), "{received:?}");

        let mut trains = Intake::new(TRANSPORT_RANGE);
        let (mut waiting, mut port) = (0, 1_024);
        while let Some((slots, arrived)) = trains.room(NOW) {
            for slot in slots {
                let ports = port..port + datagrams;
                port = ports.end;
                let bytes = small_train(&mut alice, to, ports);
                arrived.push(train_in(&mut arena, *slot, &bytes, bytes.len() / usize::from(datagrams)));
            }
            let others = Owner::Client(PeerId(9));
            let is_first = waiting == 0;
            waiting += arrived.len();
            let first = arrived[0].span;
            let owner = |_: &Arena, train: &ReceivedTrain| {
                if is_contended && is_first && train.span == first { others } else { Owner::Client(to) }
            };
            trains.accept(NOW, &mut arena, || false, owner);
        }
        serve_trains(NOW, &mut trains, &mut core, &mut arena, &mut outbox);
        let handoffs = outbox.handoffs.len();
        assert!(outbox.handoffs.iter().all(|(shard, _)| *shard == 1));
        assert!(handoffs >= usize::from(datagrams), "what comes is served: {:?}", core.drops());
        assert!(handoffs <= HANDOFF_QUEUE * 3 / 4, "{handoffs}: {case}, {waiting} waited");
    }
}

#[test]
fn a_train_of_small_datagrams_pays_for_each_of_them() {
    const SMALL: usize = MAX_TRAIN_SEGMENTS * 64;
    let mut arena = Arena::new(TRANSPORT_BUFFERS);
    let mut trains = Intake::new(TRANSPORT_RANGE);
    let (bulk, small) = (Owner::Client(PeerId(1)), Owner::Client(PeerId(2)));
    for _ in 0..2 {
        let Some((slots, arrived)) = trains.room(NOW) else { break };
        for (n, slot) in slots.iter().enumerate() {
            let (len, size) = if n % 2 == 0 { (4 * SMALL, 4 * SMALL) } else { (SMALL, 64) };
            arrived.push(train_in(&mut arena, *slot, &vec![4; len], size));
        }
        let owner = |_: &Arena, train: &ReceivedTrain| if train.segment_size == 64 { small } else { bulk };
        trains.accept(NOW, &mut arena, || false, owner);
    }
    let served: Vec<_> = std::iter::from_fn(|| trains.next(NOW)).map(|train| train.segment_size).collect();
    let small = served.iter().filter(|&&size| size == 64).count();
    assert_eq!((small, served.len() - small), (4, 8), "{served:?}: a quantum is 64 x 256 bytes four times");
}

#[test]
fn one_train_holds_a_shard_up_for_two_handshakes_at_most() {
    let (mut core, mut arena, mut outbox) = (gateway(), Arena::new(1), Outbox::default());
    let (_, _, initiation) = alice();
    let train = initiation.repeat(MAX_TRAIN_SEGMENTS);
    receive(&mut core, &mut arena, &train, initiation.len(), &mut outbox);
    assert_eq!(outbox.datagrams.datagrams.len(), 1, "the first one is answered");
    assert_eq!(core.drops().get(DropReason::HandshakeRateLimited), MAX_TRAIN_SEGMENTS as u64 - 2);
    assert_eq!(core.tunnel().take_work(), 2 * HANDSHAKE_WORK);
    // What one train had too many is nothing against the next one.
    let (_, _, initiation) = alice();
    receive(&mut core, &mut arena, &initiation, initiation.len(), &mut outbox);
    assert_eq!(core.tunnel().take_work(), HANDSHAKE_WORK);
}

#[test]
fn what_a_removed_peer_had_waiting_is_counted_as_its_segments() {
    let (mut core, mut arena, mut outbox) = (gateway(), Arena::new(1), Outbox::default());
    let packet = Template { source: GATEWAY, destination: ALICE, ..Template::default() }.tcp(&payload(3_000));
    let span = Span::new(0, 0..packet.len());
    arena.get_mut(span).copy_from_slice(&packet);
    let offload = Offload { gso: Some(Gso { kind: GsoKind::Tcp4, segment_size: 1_000 }), ..Offload::NONE };
    core.receive_host(NOW, &mut arena, span, offload, &mut outbox);
    assert_eq!(outbox.peers.len(), 1, "{:?}", core.drops());
    let remove = Command::RemovePeer { public_key: public_key(&ALICE_KEY), address: ALICE };
    core.carry_out(NOW, remove, &mut outbox);
    assert_eq!((outbox.peers.len(), core.drops().get(DropReason::NoSuchPeer)), (0, 3));
}

/// How many of the segments of `packet`, of which as many have arrived as are read, one turn serves.
fn segments_of_a_turn(packet: &[u8], header: VirtioNetHeader) -> usize {
    let mut arena = Arena::new(EXTERNAL_BUFFERS);
    let mut frames = Intake::new(0..EXTERNAL_BUFFERS);
    while let Some((slots, arrived)) = frames.room(NOW) {
        for slot in slots {
            let span = Span::new(slot.buffer, slot.start..slot.start + packet.len());
            arena.get_mut(span).copy_from_slice(packet);
            arrived.push(Frame { span, header, source_mac: [0; 6] });
        }
        frames.accept(NOW, &mut arena, || false, |_, _| Owner::Client(ALICE));
    }
    let segments = Ipv4Packet::parse(&mut packet.to_vec(), 0, header.offload().unwrap()).unwrap().shape();
    std::iter::from_fn(|| frames.next(NOW)).count() * segments.segment_count()
}

#[test]
fn what_one_turn_serves_from_outside_is_bounded_however_small_the_segments_are() {
    let packet = Template { source: SERVER, destination: ALICE, ..Template::default() }.tcp(&payload(8_000));
    let header = |segment_size| {
        let offload = Offload { gso: Some(Gso { kind: GsoKind::Tcp4, segment_size }), ..Offload::NONE };
        VirtioNetHeader::for_packet(&Ipv4Packet::parse(&mut packet.clone(), 0, offload).unwrap(), 0)
    };
    assert_eq!(segments_of_a_turn(&packet, header(1_000)), 32 * 8, "as many superpackets as a turn serves");
    for size in [8, 20, 100] {
        let served = segments_of_a_turn(&packet, header(size));
        let one = packet.len() / usize::from(size);
        assert!((1..HANDOFF_QUEUE * 3 / 4 + one).contains(&served), "{served} of {size} bytes");
    }
}

/// TCP in GRE, in `segments` segments of ten bytes each, as the kernel merges them; and what it says of it.
fn merged_in_gre(segments: usize) -> (Vec<u8>, VirtioNetHeader) {
    const NEEDS_CSUM: u8 = 1;
    const TCPV4: u8 = 1;
    const GRE: u8 = 47;
    let inner = Template::default().tcp(&payload(10 * segments));
    let packet = Template::default().ip(GRE, &[&[0, 0, 8, 0][..], &inner].concat());
    let words = [packet.len() as u16, 10, 20 + 4 + 20, 16].map(u16::to_ne_bytes).concat();
    let bytes = [&[NEEDS_CSUM, TCPV4][..], &words].concat();
    (packet, VirtioNetHeader::from_bytes(bytes.try_into().unwrap()))
}

#[test]
fn what_one_turn_splits_leaves_room_in_the_queue_before_another_shard() {
    for segments in [10, 64, VirtioNetHeader::MAX_SPLIT_SEGMENTS] {
        let (packet, header) = merged_in_gre(segments);
        assert_eq!(header.split_encapsulated(&packet).map(|split| split.len()), Some(segments));
        let mut arena = Arena::new(EXTERNAL_BUFFERS);
        let mut frames = Intake::new(0..EXTERNAL_BUFFERS);
        let mut waiting = 0;
        while let Some((slots, arrived)) = frames.room(NOW) {
            for slot in slots {
                let span = Span::new(slot.buffer, slot.start..slot.start + packet.len());
                arena.get_mut(span).copy_from_slice(&packet);
                arrived.push(Frame { span, header, source_mac: [0; 6] });
            }
            waiting += arrived.len();
            let owner = |_: &Arena, _: &Frame| Owner::Client(Ipv4Addr::new(10, 66, 77, 2));
            frames.accept(NOW, &mut arena, || false, owner);
        }
        let mut core = idle_core();
        serve_frames(NOW, &mut frames, &mut core, &mut arena, &mut Outbox::default());
        frames.end_turn();
        let mut left = 0;
        while frames.is_waiting() {
            left += std::iter::from_fn(|| frames.next(NOW)).count();
            frames.end_turn();
        }
        let split = (waiting - left) * segments;
        assert!(split >= segments, "what comes is served");
        assert!(split <= HANDOFF_QUEUE * 3 / 4, "{split} in one turn, {segments} of a frame");
    }
}
