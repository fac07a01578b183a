//! What a packet costs in the tunnel, beside its physical bound, the AEAD alone, in the same group.
//!
//! `cargo bench -p tidegate-engine --bench tunnel`
#![allow(missing_docs, reason = "criterion_group! makes a public function")]

use std::hint::black_box;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use aws_lc_rs::aead::{AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use criterion::measurement::WallTime;
use criterion::{
    BatchSize, BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main,
};
use tidegate_engine::clock::Timestamp;
use tidegate_engine::tunnel::{
    Cipher, Outgoing, PeerConfig, PeerId, Received, Sealer, Tunnel, TunnelConfig, public_key,
};
use tidegate_ipsec_mb::{Algorithm, Key, TAG_LEN};

const ALICE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 1), 51820);
const BOB: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(198, 51, 100, 1), 51820);
const NOW: Timestamp = Timestamp::from_secs(1);
const SIZES: [usize; 2] = [64, 1420];
const CIPHERS: [Cipher; 2] = [Cipher::ChaCha20Poly1305, Cipher::Aes256Gcm];

/// Two tunnels with a session, and Bob's name at Alice's.
fn connected(cipher: Cipher) -> (Tunnel, Tunnel, PeerId) {
    let tunnel = |private_key| {
        Tunnel::new(TunnelConfig {
            private_key,
            shard: 0,
            shards: 1,
            mtu: 1420,
            unix_time_at_origin: Duration::from_secs(1_700_000_000),
        })
    };
    let peer = |private_key, endpoint| PeerConfig {
        public_key: public_key(&private_key),
        preshared_key: None,
        endpoint,
        persistent_keepalive: None,
        cipher,
    };
    let (mut alice, mut bob, mut out) = (tunnel([1; 32]), tunnel([2; 32]), Outgoing::default());
    let bob_at_alice = alice.set_peer(&peer([2; 32], Some(BOB)), NOW);
    bob.set_peer(&peer([1; 32], None), NOW);
    alice.enqueue(bob_at_alice, &[0x45], NOW, &mut out).expect("Bob's address is known");
    while let Some((to, mut datagram)) = out.datagrams.pop() {
        let (receiver, from) = if to.remote == BOB { (&mut bob, ALICE) } else { (&mut alice, BOB) };
        receiver.receive(NOW, from.into(), &mut datagram, &mut out);
    }
    (alice, bob, bob_at_alice)
}

fn tunnel(criterion: &mut Criterion) {
    for cipher in CIPHERS {
        let mut group = criterion.benchmark_group(format!("tunnel/{cipher:?}"));
        let (mut alice, mut bob, peer) = connected(cipher);
        let mut out = Outgoing::default();
        for size in SIZES {
            group.throughput(Throughput::Bytes(size as u64));
            let mut buffer = vec![0x45; size + Sealer::OVERHEAD];
            group.bench_function(BenchmarkId::new("seal", size), |bencher| {
                bencher.iter(|| {
                    let mut sealer = alice.sealer(peer, NOW).expect("a session");
                    black_box(sealer.seal(&mut buffer, size))
                });
            });
            group.bench_function(BenchmarkId::new("open", size), |bencher| {
                let sealed = || {
                    let mut sealer = alice.sealer(peer, NOW).expect("a session");
                    let mut datagram = vec![0x45; sealer.datagram_len(size)];
                    sealer.seal(&mut datagram, size).expect("room for a packet");
                    datagram
                };
                let open = |datagram: &mut Vec<u8>| {
                    let received = bob.receive(NOW, ALICE.into(), datagram, &mut out);
                    assert!(matches!(received, Received::Packet { .. }));
                };
                bencher.iter_batched_ref(sealed, open, BatchSize::SmallInput);
            });
            fast_aead_alone(&mut group, cipher, size);
            aead_alone(&mut group, cipher, size);
        }
        group.finish();
    }
}

/// The bound of sealing and opening: the AEAD of the faster library, where this machine has it, without a tunnel around
/// it.
fn fast_aead_alone(group: &mut BenchmarkGroup<'_, WallTime>, cipher: Cipher, size: usize) {
    let algorithm = match cipher {
        Cipher::ChaCha20Poly1305 => Algorithm::ChaCha20Poly1305,
        Cipher::Aes256Gcm => Algorithm::Aes256Gcm,
    };
    let Some(key) = Key::new(algorithm, &[7; 32]) else { return };
    let mut sealed = vec![0x45; size + TAG_LEN];
    group.bench_function(BenchmarkId::new("bound: ipsec-mb seals", size), |bencher| {
        bencher.iter(|| black_box(key.seal_in_place(&[0; 12], &mut sealed).is_ok()));
    });
    key.seal_in_place(&[0; 12], &mut sealed).expect("room for a tag");
    group.bench_function(BenchmarkId::new("bound: ipsec-mb opens", size), |bencher| {
        let open = |datagram: &mut Vec<u8>| assert!(key.open_in_place(&[0; 12], datagram).is_ok());
        bencher.iter_batched_ref(|| sealed.clone(), open, BatchSize::SmallInput);
    });
}

/// The same of the library that every machine has.
fn aead_alone(group: &mut BenchmarkGroup<'_, WallTime>, cipher: Cipher, size: usize) {
    let algorithm = match cipher {
        Cipher::ChaCha20Poly1305 => &CHACHA20_POLY1305,
        Cipher::Aes256Gcm => &AES_256_GCM,
    };
    let key = LessSafeKey::new(UnboundKey::new(algorithm, &[7; 32]).expect("a key of 32 bytes"));
    let nonce = || Nonce::assume_unique_for_key([0; 12]);
    let mut buffer = vec![0x45; size];
    group.bench_function(BenchmarkId::new("bound: aws-lc-rs seals", size), |bencher| {
        bencher
            .iter(|| black_box(key.seal_in_place_separate_tag(nonce(), Aad::empty(), &mut buffer).is_ok()));
    });
    let mut sealed = vec![0x45; size];
    key.seal_in_place_append_tag(nonce(), Aad::empty(), &mut sealed).expect("a short plaintext");
    group.bench_function(BenchmarkId::new("bound: aws-lc-rs opens", size), |bencher| {
        let open = |datagram: &mut Vec<u8>| {
            assert!(key.open_in_place(nonce(), Aad::empty(), datagram).is_ok());
        };
        bencher.iter_batched_ref(|| sealed.clone(), open, BatchSize::SmallInput);
    });
}

criterion_group!(benches, tunnel);
criterion_main!(benches);
