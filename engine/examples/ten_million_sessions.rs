//! What ten million sessions leave behind: `cargo run --release -p tidegate-engine --example ten_million_sessions`.
//!
//! Fifty thousand UDP mappings at a time are made and expire, two hundred times, with the memory that the process holds
//! after each hundredth part. Fails where the last ones left more than the first, or where one took longer than it may.

#![allow(clippy::unwrap_used, reason = "a measurement that cannot go on ends")]

use std::net::Ipv4Addr;
use std::process::ExitCode;
use std::time::Duration;

use tidegate_engine::clock::{Timestamp, monotonic_now};
use tidegate_engine::nat::{Nat, NatConfig, Proto, ShardSlice};
use tidegate_engine::wire::{Ipv4Packet, Offload, checksum};

const SESSIONS: u32 = 10_000_000;
const AT_A_TIME: u32 = 50_000;
/// What the last rounds may hold beyond the first: nothing, but for what the allocator rounds up to.
const SLACK: u64 = 256 << 10;
/// For a new mapping, its packet included, on average.
const DEAREST: Duration = Duration::from_micros(2);

fn main() -> ExitCode {
    let addresses = [Ipv4Addr::new(203, 0, 113, 1), Ipv4Addr::new(203, 0, 113, 2)];
    let config = NatConfig { max_new_mappings_per_second: 1_000_000_000, ..NatConfig::default() };
    let mut nat = Nat::new(config, &addresses, ShardSlice::WHOLE, [9; 32]);
    let ports: Vec<u16> = (1024..=u16::MAX).collect();
    for address in addresses {
        nat.add_ports(Proto::Udp, address, &ports);
    }
    let packets: Vec<[u8; 28]> = (0..AT_A_TIME).map(first_packet).collect();
    let mut copies = packets.clone();

    let (mut now, mut creating, mut first, mut last) = (Timestamp::from_secs(1), Duration::ZERO, 0, 0);
    let rounds = SESSIONS / AT_A_TIME;
    for round in 1..=rounds {
        copies.copy_from_slice(&packets);
        let start = monotonic_now();
        for bytes in &mut copies {
            let mut packet = Ipv4Packet::parse(bytes, 0, Offload::NONE).unwrap();
            nat.translate_outbound(&mut packet, now).unwrap();
        }
        creating += monotonic_now().since(start);
        assert_eq!(nat.counts().udp_mappings, AT_A_TIME as usize);

        while let Some(due) = nat.next_expiry() {
            now = now.max(due);
            nat.expire(now);
        }
        assert_eq!(nat.counts(), Default::default(), "mappings have expired, ports have rested");
        last = resident_bytes();
        if round == 1 {
            first = last;
        }
        if round == 1 || round % (rounds / 10) == 0 {
            println!("{:>10} sessions: {:>6} KiB resident", round * AT_A_TIME, last >> 10);
        }
    }
    let each = creating / SESSIONS;
    println!("a new mapping took {} ns, its packet's parsing included", each.as_nanos());
    if last <= first + SLACK && each < DEAREST {
        return ExitCode::SUCCESS;
    }
    eprintln!(
        "expected at most {SLACK} bytes more than after the first round, and less than {DEAREST:?} each"
    );
    ExitCode::FAILURE
}

/// A datagram without payload and checksum from one of 500 clients' 100 ports.
fn first_packet(session: u32) -> [u8; 28] {
    let client = Ipv4Addr::from_bits(u32::from(Ipv4Addr::new(10, 66, 0, 2)) + session / 100);
    let mut bytes = [0; 28];
    bytes[..10].copy_from_slice(&[0x45, 0, 0, 28, 0, 1, 0x40, 0, 64, Proto::Udp as u8]);
    bytes[12..16].copy_from_slice(&client.octets());
    bytes[16..20].copy_from_slice(&[198, 51, 100, 9]);
    bytes[20..22].copy_from_slice(&(10_000 + (session % 100) as u16).to_be_bytes());
    bytes[22..26].copy_from_slice(&[0, 53, 0, 8]);
    let sum = checksum::checksum(&bytes[..20]);
    bytes[10..12].copy_from_slice(&sum.to_be_bytes());
    bytes
}

/// What is in use: what the C library keeps in case it is wanted again is given back before.
fn resident_bytes() -> u64 {
    // SAFETY: it takes a number, and may be called at any time.
    _ = unsafe { libc::malloc_trim(0) };
    // proc_pid_statm(5): the second field is what is resident, in pages of 4 KiB.
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
}
