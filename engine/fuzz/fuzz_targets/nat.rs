//! Hostile clients, hostile strangers and time against the NAT: `cargo +nightly fuzz run nat`.
//!
//! The input is a script. Packets in it are the fuzzer's own bytes, with lengths and checksums made right so that they
//! get beyond the first check; sources are clients' on the inside, as the tunnel guarantees. Nothing may panic, a packet
//! that comes out must be well-formed with a right checksum, one that is dropped must be unchanged, the limits must
//! hold, and in the end time must take everything away.

#![no_main]

use std::net::Ipv4Addr;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use tidegate_engine::clock::Timestamp;
use tidegate_engine::nat::{
    self, Endpoint, Filtering, Nat, NatConfig, NatCounts, Outbound, Proto, ShardSlice,
};
use tidegate_engine::wire::{Ipv4Packet, Offload, checksum};

const EXTERNAL: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
/// One of many shards has few ICMP identifiers, and is therefore made in no time.
const SLICE: ShardSlice = ShardSlice { shard: 0, shards: 64 };

/// A port that is the shard's.
fn port(byte: u8) -> u16 {
    40_000 + 64 * u16::from(byte % 8)
}

/// Bytes of the input, one after another; zeros after the last.
struct Script<'a>(&'a [u8]);

impl Script<'_> {
    fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken.to_vec()
    }
}

fn client(byte: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 66, 77, 2 + byte % 4)
}

fn remote(byte: u8) -> Ipv4Addr {
    if byte % 5 == 4 { EXTERNAL } else { Ipv4Addr::new(198, 51, 100, byte % 5) }
}

fn ipv4(protocol: u8, source: Ipv4Addr, destination: Ipv4Addr, mut transport: Vec<u8>) -> Vec<u8> {
    let at = match protocol {
        1 => 2,
        6 => 16,
        _ => 6,
    };
    if protocol == 17 && transport.len() >= 8 {
        let length = transport.len() as u16;
        transport[4..6].copy_from_slice(&length.to_be_bytes());
    }
    if protocol == 6 && transport.len() >= 20 {
        transport[12] = transport[12].clamp(0x50, 0x5f);
    }
    if let Some(field) = transport.get_mut(at..at + 2) {
        field.fill(0);
        let pseudo = match protocol {
            1 => checksum::Sum::ZERO,
            _ => checksum::pseudo_header(source, destination, protocol, transport.len() as u16),
        };
        let sum = pseudo.add_bytes(&transport).finish();
        transport[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    }
    let mut bytes = vec![0x45, 0, 0, 0, 0, 1, 0, 0, 64, protocol, 0, 0];
    let total = 20 + transport.len() as u16;
    bytes[2..4].copy_from_slice(&total.to_be_bytes());
    bytes.extend(source.octets());
    bytes.extend(destination.octets());
    let sum = checksum::checksum(&bytes);
    bytes[10..12].copy_from_slice(&sum.to_be_bytes());
    bytes.extend(transport);
    bytes
}

fn translate(nat: &mut Nat, bytes: &mut Vec<u8>, now: Timestamp, out: bool) -> bool {
    let before = bytes.clone();
    let Ok(mut packet) = Ipv4Packet::parse(bytes, 0, Offload::NONE) else { return false };
    let right = packet.transport_checksum_ok();
    _ = nat::external_port(&packet);
    let passed = if out {
        let way = nat.translate_outbound(&mut packet, now);
        assert!(way.is_err() || nat.is_external(packet.source()));
        assert!(way != Ok(Outbound::Hairpin) || nat.is_external(packet.destination()));
        way.is_ok()
    } else {
        let way = nat.translate_inbound(&mut packet, now);
        assert!(way.is_err() || packet.destination().octets()[..3] == [10, 66, 77]);
        way.is_ok()
    };
    if passed {
        assert_eq!(packet.transport_checksum_ok(), right);
        Ipv4Packet::parse(bytes, 0, Offload::NONE).expect("well-formed");
    } else {
        assert_eq!(*bytes, before, "a dropped packet is unchanged");
    }
    passed
}

fuzz_target!(|input: &[u8]| {
    let mut script = Script(input);
    let filterings =
        [Filtering::AddressDependent, Filtering::EndpointIndependent, Filtering::AddressAndPortDependent];
    let config = |byte: u8| NatConfig {
        filtering: filterings[usize::from(byte % 3)],
        max_mappings: 24 * usize::from(SLICE.shards),
        max_mappings_per_client: 10,
        max_sessions_per_mapping: 5,
        ..NatConfig::default()
    };
    let mut nat = Nat::new(config(script.byte()), &[EXTERNAL], SLICE, [1; 32]);
    for protocol in [Proto::Tcp, Proto::Udp] {
        assert_eq!(nat.add_ports(protocol, EXTERNAL, &[576, port(0), port(1), port(2), port(3), port(4)]), 6);
    }
    let mut now = Timestamp::from_secs(1_000);
    // The last packet that left, to be quoted, answered and hairpinned.
    let mut left = Vec::new();
    while !script.0.is_empty() {
        let op = script.byte();
        let protocol = [1, 6, 17, 6, 17, 47][usize::from(script.byte() % 6)];
        match op % 10 {
            0..=2 => {
                let (source, destination) = (client(script.byte()), remote(script.byte()));
                let len = usize::from(script.byte() % 64);
                let mut bytes = ipv4(protocol, source, destination, script.bytes(len));
                if translate(&mut nat, &mut bytes, now, true) {
                    left = bytes;
                }
            }
            3 | 4 => {
                let source = remote(script.byte());
                let len = usize::from(script.byte() % 64);
                let mut bytes = ipv4(protocol, source, EXTERNAL, script.bytes(len));
                translate(&mut nat, &mut bytes, now, false);
            }
            5 if left.len() >= 28 => {
                // An answer: ends swapped, the rest as the script says.
                let len = usize::from(script.byte() % 32);
                let mut transport = left[20..].to_vec();
                transport.truncate(60);
                if left[9] == 1 {
                    transport[0] = 0;
                } else {
                    let (from, to) = transport.split_at_mut(2);
                    from.swap_with_slice(&mut to[..2]);
                }
                for (at, byte) in transport.iter_mut().skip(4).zip(script.bytes(len)) {
                    *at = byte;
                }
                let source = Ipv4Addr::new(left[16], left[17], left[18], left[19]);
                let mut bytes = ipv4(left[9], source, EXTERNAL, transport);
                translate(&mut nat, &mut bytes, now, false);
            }
            6 => {
                let mut icmp =
                    vec![[3, 11, 12, 5][usize::from(script.byte() % 4)], script.byte(), 0, 0, 0, 0, 5, 0];
                icmp.extend_from_slice(&left[..left.len().min(28 + usize::from(script.byte() % 64))]);
                let mut bytes = ipv4(1, remote(script.byte()), EXTERNAL, icmp);
                translate(&mut nat, &mut bytes, now, false);
            }
            7 => {
                let end = now + Duration::from_secs(u64::from(script.byte()) * 8);
                while let Some(due) = nat.next_expiry().filter(|&due| due <= end) {
                    nat.expire(due.max(now));
                    now = now.max(due);
                }
                now = end;
            }
            8 => {
                let address = client(script.byte());
                nat.remove_client(address, now);
                assert_eq!(nat.mappings_of(address), 0);
            }
            _ => match script.byte() % 4 {
                0 => nat.set_config(config(script.byte()), now),
                1 => {
                    let inner = Endpoint::new(client(script.byte()), 80);
                    let outer = Endpoint::new(EXTERNAL, port(script.byte()));
                    _ = nat.publish(Proto::Tcp, outer, inner, now);
                }
                2 => {
                    let outer = Endpoint::new(EXTERNAL, port(script.byte()));
                    nat.unpublish(Proto::Tcp, outer, now);
                }
                _ => {
                    nat.add_ports(Proto::Tcp, EXTERNAL, &[port(script.byte())]);
                }
            },
        }
        let counts = nat.counts();
        assert!(counts.tcp_mappings + counts.udp_mappings + counts.icmp_mappings <= 24 + 8, "{counts:?}");
        assert!(counts.sessions <= 24 * 4, "{counts:?}");
        assert_eq!(
            nat.mappings(now).map(|mapping| mapping.sessions).sum::<usize>(),
            counts.sessions,
            "the lists and the counts agree"
        );
    }
    for byte in 0..4 {
        nat.remove_client(client(byte), now);
    }
    let end = now + Duration::from_secs(121);
    nat.expire(end);
    assert_eq!(nat.counts(), NatCounts::default());
    assert_eq!(nat.next_expiry(), None);
});
