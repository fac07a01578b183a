//! The hot path's steps, each repeated so many times: what `scripts/hot-path` counts the instructions of.
//!
//! `hot-path STEP REPETITIONS`; without arguments it names the steps. Instructions, not seconds: they do not depend on
//! the machine's mood. What is set up before the repetitions cancels out, since the script counts two numbers of them.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::process::ExitCode;
use std::time::Duration;

use tidegate_engine::arena::{Arena, Span};
use tidegate_engine::clock::Timestamp;
use tidegate_engine::nat::{Endpoint, Nat, NatConfig, Proto, ShardSlice};
use tidegate_engine::tunnel::{
    Cipher, Outgoing, PeerConfig, PeerId, Received, Sealer, Tunnel, TunnelConfig, public_key,
};
use tidegate_engine::wire::{
    ChecksumState, CoalesceOptions, Coalescer, Gso, GsoKind, Ipv4Packet, Offload, Segments, SegmentsInPlace,
    checksum,
};

const NOW: Timestamp = Timestamp::from_secs(1);
const ALICE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 1), 51820);
const BOB: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(198, 51, 100, 1), 51820);
const MSS: u16 = 1368;
const SEGMENTS: usize = 44;
const PACKET_LEN: usize = 1420;
const DATAGRAM_LEN: usize = PACKET_LEN + Sealer::OVERHEAD;

/// A step of the packet's way: its name, and what repeats it.
type Step = (&'static str, fn(usize));

const STEPS: [Step; 7] = [
    ("nat-outbound", nat_outbound),     // an established UDP session among 10,000
    ("nat-inbound", nat_inbound),       // the same, the other way
    ("split", split),                   // a superpacket into 44 segments
    ("split-in-place", split_in_place), // the same, each where its payload lies
    ("coalesce", coalesce),             // 44 segments into a superpacket
    ("seal", seal),                     // 1,420 bytes, ChaCha20-Poly1305
    ("seal-and-open", seal_and_open),   // the same, and opened at the other end
];

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let step = arguments.next().and_then(|name| STEPS.iter().find(|(step, _)| *step == name));
    let repetitions = arguments.next().and_then(|number| number.parse().ok());
    match (step, repetitions) {
        (Some((_, run)), Some(repetitions)) => {
            run(repetitions);
            ExitCode::SUCCESS
        }
        _ => {
            STEPS.iter().for_each(|(name, _)| println!("{name}"));
            ExitCode::from(2)
        }
    }
}

fn nat_outbound(repetitions: usize) {
    let (mut nat, leaving, _) = established_nat();
    for n in 0..repetitions {
        let mut bytes = leaving[n % leaving.len()];
        let packet = Ipv4Packet::parse(&mut bytes, 0, Offload::NONE);
        assert!(packet.is_ok_and(|mut packet| nat.translate_outbound(&mut packet, NOW).is_ok()));
    }
}

fn nat_inbound(repetitions: usize) {
    let (mut nat, _, arriving) = established_nat();
    for n in 0..repetitions {
        let mut bytes = arriving[n % arriving.len()];
        let packet = Ipv4Packet::parse(&mut bytes, 0, Offload::NONE);
        assert!(packet.is_ok_and(|mut packet| nat.translate_inbound(&mut packet, NOW).is_ok()));
    }
}

fn split(repetitions: usize) {
    let (mut bytes, offload) = superpacket();
    let mut out = vec![0; 2 * bytes.len()];
    for _ in 0..repetitions {
        assert_eq!(split_into(&mut bytes, offload, &mut out).len(), SEGMENTS);
    }
}

fn split_in_place(repetitions: usize) {
    let (mut bytes, offload) = superpacket();
    let headers: [u8; 52] = std::array::from_fn(|at| bytes[at]);
    for _ in 0..repetitions {
        bytes[..52].copy_from_slice(&headers);
        let shape = Ipv4Packet::parse(&mut bytes, 0, offload).map(|packet| packet.shape());
        let count = shape.map(|shape| {
            let mut segments = SegmentsInPlace::new(&mut bytes, shape);
            std::iter::from_fn(|| segments.next_segment().map(<[u8]>::len)).count()
        });
        assert_eq!(count, Ok(SEGMENTS));
    }
}

fn coalesce(repetitions: usize) {
    let (mut bytes, offload) = superpacket();
    let mut arena = Arena::new(1);
    let spans = split_into(&mut bytes, offload, arena.buffer_mut(0));
    let first = arena.get(spans[0]).to_vec();
    let mut coalescer = Coalescer::new(CoalesceOptions::default());
    for _ in 0..repetitions {
        arena.get_mut(spans[0]).copy_from_slice(&first);
        let mut tails = 0;
        for &span in &spans {
            assert!(coalescer.push(&mut arena, span, 1u32).is_ok());
        }
        coalescer.drain(&mut arena, |_, gathered| tails += gathered.tails.len());
        assert_eq!(tails, SEGMENTS - 1);
    }
}

fn seal(repetitions: usize) {
    let (mut alice, _, peer) = connected();
    let mut buffer = [0; DATAGRAM_LEN];
    for _ in 0..repetitions {
        seal_one(&mut alice, peer, &mut buffer);
    }
}

fn seal_and_open(repetitions: usize) {
    let (mut alice, mut bob, peer) = connected();
    let mut out = Outgoing::default();
    let mut buffer = [0; DATAGRAM_LEN];
    for _ in 0..repetitions {
        seal_one(&mut alice, peer, &mut buffer);
        assert!(matches!(bob.receive(NOW, ALICE.into(), &mut buffer, &mut out), Received::Packet { .. }));
    }
}

fn seal_one(tunnel: &mut Tunnel, peer: PeerId, buffer: &mut [u8]) {
    let packet = [0x45; PACKET_LEN];
    let sealed = tunnel.sealer(peer, NOW).map(|mut sealer| sealer.seal_from(&packet, buffer));
    assert_eq!(sealed, Some(Ok(DATAGRAM_LEN)));
}

/// Two tunnels with a session, and Bob's name at Alice's.
fn connected() -> (Tunnel, Tunnel, PeerId) {
    let tunnel = |private_key| {
        Tunnel::new(TunnelConfig {
            private_key,
            shard: 0,
            shards: 1,
            mtu: PACKET_LEN,
            unix_time_at_origin: Duration::from_secs(1_700_000_000),
        })
    };
    let peer = |private_key, endpoint| PeerConfig {
        public_key: public_key(&private_key),
        preshared_key: None,
        endpoint,
        persistent_keepalive: None,
        cipher: Cipher::ChaCha20Poly1305,
    };
    let (mut alice, mut bob, mut out) = (tunnel([1; 32]), tunnel([2; 32]), Outgoing::default());
    let name = alice.set_peer(&peer([2; 32], Some(BOB)), NOW);
    bob.set_peer(&peer([1; 32], None), NOW);
    assert!(alice.enqueue(name, &[0x45], NOW, &mut out).is_ok());
    while let Some((to, mut datagram)) = out.datagrams.pop() {
        let (receiver, from) = if to.remote == BOB { (&mut bob, ALICE) } else { (&mut alice, BOB) };
        receiver.receive(NOW, from.into(), &mut datagram, &mut out);
    }
    (alice, bob, name)
}

/// A NAT with 10,000 UDP sessions, and a packet of each in either direction.
fn established_nat() -> (Nat, Vec<[u8; 28]>, Vec<[u8; 28]>) {
    let external = Ipv4Addr::new(203, 0, 113, 1);
    let server = Endpoint::new(Ipv4Addr::new(198, 51, 100, 9), 443);
    let config = NatConfig { max_new_mappings_per_second: 1_000_000, ..NatConfig::default() };
    let mut nat = Nat::new(config, &[external], ShardSlice::WHOLE, [9; 32]);
    nat.add_ports(Proto::Udp, external, &(1024..=65_535).collect::<Vec<u16>>());
    let (mut leaving, mut arriving) = (Vec::new(), Vec::new());
    for session in 0..10_000u16 {
        let client = Endpoint::new(Ipv4Addr::new(10, 66, 77, (session / 100) as u8), 10_000 + session % 100);
        let packet = datagram(client, server);
        let mut bytes = packet;
        let translated = Ipv4Packet::parse(&mut bytes, 0, Offload::NONE)
            .and_then(|mut packet| nat.translate_outbound(&mut packet, NOW));
        assert!(translated.is_ok());
        let mapped = Endpoint::new(external, u16::from_be_bytes([bytes[20], bytes[21]]));
        leaving.push(packet);
        arriving.push(datagram(server, mapped));
    }
    (nat, leaving, arriving)
}

/// An empty UDP datagram without a checksum of its own.
fn datagram(source: Endpoint, destination: Endpoint) -> [u8; 28] {
    let mut bytes = [0; 28];
    bytes[..10].copy_from_slice(&[0x45, 0, 0, 28, 0, 1, 0x40, 0, 64, 17]);
    bytes[12..16].copy_from_slice(&source.address.octets());
    bytes[16..20].copy_from_slice(&destination.address.octets());
    let sum = checksum::checksum(&bytes[..20]);
    bytes[10..12].copy_from_slice(&sum.to_be_bytes());
    bytes[20..22].copy_from_slice(&source.port.to_be_bytes());
    bytes[22..24].copy_from_slice(&destination.port.to_be_bytes());
    bytes[25] = 8;
    bytes
}

/// A TCP superpacket with timestamps.
fn superpacket() -> (Vec<u8>, Offload) {
    let len = 52 + SEGMENTS * usize::from(MSS);
    let mut packet: Vec<u8> = (0..len).map(|i| i as u8).collect();
    packet[..20]
        .copy_from_slice(&[0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 66, 77, 2, 198, 51, 100, 7]);
    packet[2..4].copy_from_slice(&(len as u16).to_be_bytes());
    let sum = checksum::checksum(&packet[..20]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet[32..34].copy_from_slice(&[0x80, 0x10]);
    packet[36..40].fill(0);
    let gso = Gso { kind: GsoKind::Tcp4, segment_size: MSS };
    (packet, Offload { gso: Some(gso), checksum: ChecksumState::Partial })
}

fn split_into(bytes: &mut [u8], offload: Offload, out: &mut [u8]) -> Vec<Span> {
    let mut spans = Vec::with_capacity(SEGMENTS);
    if let Ok(packet) = Ipv4Packet::parse(bytes, 0, offload) {
        let mut segments = Segments::whole(&packet);
        let mut at = 0;
        while let Some(len) = segments.next_into(&mut out[at..]) {
            spans.push(Span::new(0, at..at + len));
            at += len;
        }
    }
    spans
}
