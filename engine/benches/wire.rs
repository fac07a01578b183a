//! What the packet's way costs per byte: the checksum, splitting a superpacket, coalescing its segments; each beside
//! its physical bound in the same group: copying the same bytes, and one system call, which is what they save.
//!
//! `cargo bench -p tidegate-engine --bench wire`

#![allow(missing_docs, reason = "criterion's macros")]
#![allow(clippy::unwrap_used, reason = "a benchmark is a test")]

use std::hint::black_box;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use tidegate_engine::arena::{Arena, Span};
use tidegate_engine::wire::{
    ChecksumState, CoalesceOptions, Coalescer, Gso, GsoKind, Ipv4Packet, Offload, Segments, SegmentsInPlace,
    checksum,
};

const MSS: u16 = 1368;
const HEADERS_LEN: usize = 52;
const SEGMENTS: usize = 44;

/// A TCP superpacket of [`SEGMENTS`] segments with timestamps.
fn superpacket() -> (Vec<u8>, Offload) {
    let len = HEADERS_LEN + SEGMENTS * usize::from(MSS);
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

/// The bound of what touches every byte once: a copy of `len` bytes, from and to memory that is in the cache, as a
/// packet is that has just been received.
fn copy(group: &mut BenchmarkGroup<'_, WallTime>, len: usize) {
    let from = vec![0x45u8; len];
    let mut to = vec![0u8; len];
    group.throughput(Throughput::Bytes(len as u64));
    group.bench_function(BenchmarkId::new("bound: copy", len), |b| {
        b.iter(|| black_box(&mut to[..]).copy_from_slice(black_box(&from)));
    });
}

/// The bound of what saves calls: one that does nothing.
fn system_call(c: &mut Criterion) {
    let mut group = c.benchmark_group("system call");
    group.bench_function("bound: getppid", |b| {
        // SAFETY: it takes no arguments and cannot fail.
        b.iter(|| black_box(unsafe { libc::getppid() }));
    });
}

fn sums(c: &mut Criterion) {
    let mut group = c.benchmark_group("checksum");
    for len in [20usize, 64, 1420, 65_000] {
        let bytes: Vec<u8> = (0..len).map(|i| i as u8).collect();
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_with_input(BenchmarkId::from_parameter(len), &bytes, |b, bytes| {
            b.iter(|| checksum::checksum(black_box(bytes)));
        });
        copy(&mut group, len);
    }
}

fn split(c: &mut Criterion) {
    let (mut bytes, offload) = superpacket();
    let packet = Ipv4Packet::parse(&mut bytes, 0, offload).unwrap();
    let mut out = vec![0; 65_536 * 2];
    let mut group = c.benchmark_group("split");
    group.throughput(Throughput::Bytes(packet.total_len() as u64));
    group.bench_function("44 segments", |b| {
        b.iter(|| {
            let mut segments = Segments::whole(black_box(&packet));
            let mut at = 0;
            while let Some(len) = segments.next_into(&mut out[at..]) {
                at += len;
            }
            at
        });
    });
    let (shape, headers) = (packet.shape(), packet.head()[..packet.shape().headers_len()].to_vec());
    copy(&mut group, shape.total_len());
    group.bench_function("44 segments, in place", |b| {
        b.iter(|| {
            bytes[..headers.len()].copy_from_slice(&headers);
            let mut segments = SegmentsInPlace::new(black_box(&mut bytes), shape);
            let mut len = 0;
            while let Some(segment) = segments.next_segment() {
                len += segment.len();
            }
            len
        });
    });
}

fn coalesce(c: &mut Criterion) {
    let (mut bytes, offload) = superpacket();
    let packet = Ipv4Packet::parse(&mut bytes, 0, offload).unwrap();
    let mut arena = Arena::new(1);
    let mut spans = Vec::new();
    let mut segments = Segments::whole(&packet);
    let mut at = 0;
    while let Some(len) = segments.next_into(&mut arena.buffer_mut(0)[at..]) {
        spans.push(Span::new(0, at..at + len));
        at += len;
    }
    assert_eq!(spans.len(), SEGMENTS);
    let first = arena.get(spans[0]).to_vec();
    let mut coalescer = Coalescer::new(CoalesceOptions::default());
    let mut group = c.benchmark_group("coalesce");
    group.throughput(Throughput::Bytes(at as u64));
    group.bench_function("44 segments", |b| {
        b.iter(|| {
            arena.get_mut(spans[0]).copy_from_slice(&first);
            for &span in &spans {
                coalescer.push(&mut arena, span, 1u32).unwrap();
            }
            let mut tails = 0;
            coalescer.drain(&mut arena, |_, gathered| tails += gathered.tails.len());
            assert_eq!(tails, SEGMENTS - 1);
        });
    });
    copy(&mut group, at);
}

criterion_group!(benches, system_call, sums, split, coalesce);
criterion_main!(benches);
