//! What the NAT costs per packet: `cargo bench -p tidegate-engine --bench nat`.
//!
//! The established cases walk through all sessions in a shuffled order, so that with 100,000 of them the table's cache
//! misses are part of the figure.

#![allow(missing_docs, reason = "criterion's macro makes an undocumented function")]

use std::hint::black_box;
use std::net::Ipv4Addr;
use std::time::Duration;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use tidegate_engine::clock::{Timestamp, monotonic_now};
use tidegate_engine::nat::{Endpoint, Nat, NatConfig, Proto, ShardSlice};
use tidegate_engine::wire::{Ipv4Packet, Offload, checksum};

const SERVER: Endpoint = Endpoint::new(Ipv4Addr::new(198, 51, 100, 9), 443);

const NOW: Timestamp = Timestamp::from_secs(1);

fn external(index: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(u32::from(Ipv4Addr::new(203, 0, 113, 1)) + index)
}

/// A NAT with ports for `sessions` of them.
fn nat(sessions: u32) -> Nat {
    let config = NatConfig {
        max_new_mappings_per_second: 1_000_000_000,
        max_mappings_per_client: 1_000_000,
        max_mappings: 1_000_000,
        ..NatConfig::default()
    };
    let addresses: Vec<Ipv4Addr> = (0..sessions.div_ceil(30_000)).map(external).collect();
    let mut nat = Nat::new(config, &addresses, ShardSlice::WHOLE, [9; 32]);
    let ports: Vec<u16> = (1024..=65_535).collect();
    for address in addresses {
        nat.add_ports(Proto::Udp, address, &ports);
        nat.add_ports(Proto::Tcp, address, &ports);
    }
    nat
}

/// Clients with 100 sessions each.
fn client(session: u32) -> Endpoint {
    let address = Ipv4Addr::from_bits(u32::from(Ipv4Addr::new(10, 66, 0, 2)) + session / 100);
    Endpoint::new(address, 10_000 + (session % 100) as u16)
}

/// A packet of 28 (UDP) or 40 (TCP) bytes, at the beginning of the array.
fn packet(protocol: Proto, source: Endpoint, destination: Endpoint, tcp_flags: u8) -> [u8; 40] {
    let mut transport = vec![0; if protocol == Proto::Tcp { 20 } else { 8 }];
    transport[0..2].copy_from_slice(&source.port.to_be_bytes());
    transport[2..4].copy_from_slice(&destination.port.to_be_bytes());
    if protocol == Proto::Tcp {
        let (sequence, acknowledgment): (u32, u32) =
            if destination == SERVER { (100, 900) } else { (900, 101) };
        transport[4..8].copy_from_slice(&sequence.to_be_bytes());
        transport[8..12].copy_from_slice(&acknowledgment.to_be_bytes());
        transport[12] = 0x50;
        transport[13] = tcp_flags;
        transport[14] = 0xff;
    } else {
        transport[4..6].copy_from_slice(&8u16.to_be_bytes());
        transport[6] = 1;
    }
    let mut bytes = vec![0x45, 0, 0, 20 + transport.len() as u8, 0, 1, 0x40, 0, 64, protocol as u8, 0, 0];
    bytes.extend(source.address.octets());
    bytes.extend(destination.address.octets());
    let sum = checksum::checksum(&bytes);
    bytes[10..12].copy_from_slice(&sum.to_be_bytes());
    bytes.extend(transport);
    bytes.resize(40, 0); // behind the total length: cut off by the parser
    bytes.try_into().unwrap_or([0; 40])
}

/// Parses and translates. Parsing is measured too: it is part of the price.
fn outbound(nat: &mut Nat, bytes: &mut [u8; 40]) {
    let result = Ipv4Packet::parse(bytes, 0, Offload::NONE)
        .and_then(|mut packet| nat.translate_outbound(&mut packet, NOW).map(drop));
    assert!(result.is_ok());
}

fn inbound(nat: &mut Nat, bytes: &mut [u8; 40]) {
    let result = Ipv4Packet::parse(bytes, 0, Offload::NONE)
        .and_then(|mut packet| nat.translate_inbound(&mut packet, NOW));
    assert!(result.is_ok());
}

/// Packets that lie in a buffer together, as they do after a read, when the first of them is translated.
const READ: usize = 64;

/// What the gateway does with the packets of a read: first the one with all, then the other.
type Way = (fn(&Nat, &[u8]), fn(&mut Nat, &mut [u8; 40]));

/// Measures `prefetch` and `translate`, as the gateway calls them on what a read brought, on packets that `make` wrote
/// into one small buffer before: it is the table that does not fit the cache, not the packets.
fn per_packet(
    c: &mut Criterion,
    name: &str,
    order: &[u32],
    make: impl Fn(u32) -> [u8; 40],
    nat: &mut Nat,
    (prefetch, translate): Way,
) {
    let mut sessions = order.iter().copied().cycle();
    let mut buffer = [[0; 40]; READ];
    c.bench_function(name, |b| {
        b.iter_custom(|iterations| {
            let mut taken = Duration::ZERO;
            let mut left = iterations as usize;
            while left > 0 {
                let packets = &mut buffer[..left.min(READ)];
                packets.iter_mut().zip(&mut sessions).for_each(|(packet, session)| *packet = make(session));
                let start = monotonic_now();
                packets.iter().for_each(|packet| prefetch(nat, packet));
                packets.iter_mut().for_each(|packet| translate(nat, packet));
                taken += monotonic_now().since(start);
                left -= packets.len();
            }
            taken
        });
    });
}

/// All sessions in a fixed random order.
fn shuffled(sessions: u32) -> Vec<u32> {
    let mut order: Vec<u32> = (0..sessions).collect();
    let mut state = 1u64;
    for at in (1..order.len()).rev() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        order.swap(at, ((state >> 33) % (at as u64 + 1)) as usize);
    }
    order
}

fn established(c: &mut Criterion) {
    for (protocol, name) in [(Proto::Udp, "udp"), (Proto::Tcp, "tcp")] {
        for sessions in [100u32, 10_000, 100_000] {
            let mut nat = nat(sessions);
            let mut mapped = Vec::new();
            for session in 0..sessions {
                let mut syn = packet(protocol, client(session), SERVER, 0x02);
                outbound(&mut nat, &mut syn);
                let address = Ipv4Addr::new(syn[12], syn[13], syn[14], syn[15]);
                let external = Endpoint::new(address, u16::from_be_bytes([syn[20], syn[21]]));
                inbound(&mut nat, &mut packet(protocol, SERVER, external, 0x12));
                mapped.push(external);
            }
            let order = shuffled(sessions);
            let leaving = |session| packet(protocol, client(session), SERVER, 0x10);
            let arriving = |session| packet(protocol, SERVER, mapped[session as usize], 0x10);
            let out: Way = (Nat::prefetch_outbound, outbound);
            let back: Way = (Nat::prefetch_inbound, inbound);
            per_packet(c, &format!("{name} outbound, 1 of {sessions}"), &order, leaving, &mut nat, out);
            per_packet(c, &format!("{name} inbound, 1 of {sessions}"), &order, arriving, &mut nat, back);
        }
    }
    let leaving = |session| packet(Proto::Udp, client(session), SERVER, 0);
    let parse: Way =
        (|_, _| (), |_, bytes| _ = black_box(Ipv4Packet::parse(bytes, 0, Offload::NONE).is_ok()));
    per_packet(c, "parsing alone", &shuffled(100), leaving, &mut nat(0), parse);
    random_line(c);
}

/// The bound of a lookup in a table that does not fit the cache: reading one cache line of as much memory as 100,000
/// sessions take, each read depending on the one before. (What is fetched ahead, as the NAT does, can be faster.)
fn random_line(c: &mut Criterion) {
    const LINES: u32 = 100_000;
    #[repr(align(64))]
    struct Line(u32);
    let order = shuffled(LINES);
    let mut lines: Vec<Line> = (0..LINES).map(Line).collect();
    for (at, &line) in order.iter().enumerate() {
        lines[line as usize] = Line(order[(at + 1) % order.len()]);
    }
    let mut at = 0;
    c.bench_function("bound: one random cache line of 100000", |b| {
        b.iter(|| {
            at = lines[at as usize].0;
            at
        });
    });
}

fn creation(c: &mut Criterion) {
    const BATCH: u32 = 50_000;
    let packets: Vec<_> = (0..BATCH).map(|session| packet(Proto::Udp, client(session), SERVER, 0)).collect();
    let mut group = c.benchmark_group("creation");
    group.sample_size(20).throughput(criterion::Throughput::Elements(u64::from(BATCH)));
    group.bench_function("50000 new udp mappings", |b| {
        b.iter_batched_ref(
            || nat(BATCH),
            |nat| packets.iter().for_each(|bytes| outbound(nat, &mut bytes.clone())),
            BatchSize::LargeInput,
        );
    });
    group.bench_function("50000 mappings expire", |b| {
        b.iter_batched_ref(
            || {
                let mut nat = nat(BATCH);
                packets.iter().for_each(|bytes| outbound(&mut nat, &mut bytes.clone()));
                nat
            },
            |nat| {
                let end = Timestamp::from_secs(400);
                while nat.counts().sessions > 0 {
                    nat.expire(end);
                }
            },
            BatchSize::LargeInput,
        );
    });
    group.finish();
}

criterion_group!(benches, established, creation);
criterion_main!(benches);
