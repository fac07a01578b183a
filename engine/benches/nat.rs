//! What the NAT costs per packet: `cargo bench -p tidegate-engine --bench nat`.
//!
//! The established cases walk through all sessions in a shuffled order, so that with 100,000 of them the table's cache
//! misses are part of the figure. The packets themselves lie in a row, as they do after a read.

#![allow(missing_docs, reason = "criterion's macro makes an undocumented function")]

use std::hint::black_box;
use std::net::Ipv4Addr;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use tidegate_engine::clock::Timestamp;
use tidegate_engine::nat::{Endpoint, Nat, NatConfig, Proto, ShardSlice};
use tidegate_engine::wire::{Ipv4Packet, Offload, checksum};

const SERVER: Endpoint = Endpoint::new(Ipv4Addr::new(198, 51, 100, 9), 443);

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
fn outbound(nat: &mut Nat, bytes: &[u8; 40], now: Timestamp) -> [u8; 40] {
    let mut copy = *bytes;
    if let Ok(mut packet) = Ipv4Packet::parse(&mut copy, 0, Offload::NONE) {
        let result = nat.translate_outbound(&mut packet, now);
        assert!(result.is_ok());
    }
    copy
}

fn inbound(nat: &mut Nat, bytes: &[u8; 40], now: Timestamp) -> [u8; 40] {
    let mut copy = *bytes;
    if let Ok(mut packet) = Ipv4Packet::parse(&mut copy, 0, Offload::NONE) {
        let result = nat.translate_inbound(&mut packet, now);
        assert!(result.is_ok());
    }
    copy
}

/// A fixed shuffle (Fisher and Yates, with a linear congruential generator).
fn shuffle<T>(items: &mut [T]) {
    let mut state = 1u64;
    for at in (1..items.len()).rev() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        items.swap(at, ((state >> 33) % (at as u64 + 1)) as usize);
    }
}

fn established(c: &mut Criterion) {
    let now = Timestamp::from_secs(1);
    for (protocol, name) in [(Proto::Udp, "udp"), (Proto::Tcp, "tcp")] {
        for sessions in [100u32, 100_000] {
            let mut nat = nat(sessions);
            let mut leaving = Vec::new();
            let mut arriving = Vec::new();
            for session in 0..sessions {
                let sent = outbound(&mut nat, &packet(protocol, client(session), SERVER, 0x02), now);
                let source = Ipv4Addr::new(sent[12], sent[13], sent[14], sent[15]);
                let mapped = Endpoint::new(source, u16::from_be_bytes([sent[20], sent[21]]));
                inbound(&mut nat, &packet(protocol, SERVER, mapped, 0x12), now);
                leaving.push(packet(protocol, client(session), SERVER, 0x10));
                arriving.push(packet(protocol, SERVER, mapped, 0x10));
            }
            shuffle(&mut leaving);
            shuffle(&mut arriving);
            let mut packets = leaving.iter().cycle();
            c.bench_function(&format!("{name} outbound, 1 of {sessions}"), |b| {
                b.iter(|| packets.next().map(|bytes| outbound(&mut nat, bytes, now)));
            });
            let mut packets = arriving.iter().cycle();
            c.bench_function(&format!("{name} inbound, 1 of {sessions}"), |b| {
                b.iter(|| packets.next().map(|bytes| inbound(&mut nat, bytes, now)));
            });
        }
    }
    let packets: Vec<_> =
        (0..100_000).map(|session| packet(Proto::Udp, client(session), SERVER, 0)).collect();
    let mut packets = packets.iter().cycle();
    c.bench_function("parsing alone", |b| {
        b.iter(|| {
            packets.next().map(|bytes| {
                let mut copy = *bytes;
                black_box(Ipv4Packet::parse(&mut copy, 0, Offload::NONE).is_ok())
            })
        });
    });
}

fn creation(c: &mut Criterion) {
    const BATCH: u32 = 50_000;
    let now = Timestamp::from_secs(1);
    let packets: Vec<_> = (0..BATCH).map(|session| packet(Proto::Udp, client(session), SERVER, 0)).collect();
    let mut group = c.benchmark_group("creation");
    group.sample_size(20).throughput(criterion::Throughput::Elements(u64::from(BATCH)));
    group.bench_function("50000 new udp mappings", |b| {
        b.iter_batched_ref(
            || nat(BATCH),
            |nat| packets.iter().for_each(|bytes| _ = black_box(outbound(nat, bytes, now))),
            BatchSize::LargeInput,
        );
    });
    group.bench_function("50000 mappings expire", |b| {
        b.iter_batched_ref(
            || {
                let mut nat = nat(BATCH);
                packets.iter().for_each(|bytes| _ = black_box(outbound(&mut nat, bytes, now)));
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
