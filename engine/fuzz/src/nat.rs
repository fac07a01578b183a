//! Hostile clients, hostile strangers and time against the NAT: `scripts/fuzz nat`.
//!
//! The input is a script. Packets in it are the fuzzer's own bytes, with lengths and checksums made right so that they
//! get beyond the first check; sources are clients' on the inside, as the tunnel guarantees. Nothing may panic, a
//! packet that comes out must be well-formed with a right checksum, one that is dropped must be unchanged, the limits
//! must hold, and in the end time must take everything away.

use std::net::Ipv4Addr;
use std::time::Duration;

use tidegate_engine::clock::Timestamp;
use tidegate_engine::nat::{
    self, Endpoint, Filtering, Nat, NatConfig, NatCounts, Outbound, Proto, ShardSlice,
};
use tidegate_engine::wire::{Ipv4Packet, Offload};

use super::packets::{answer, icmp_error, ipv4};
use super::script::Script;

const EXTERNAL: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
/// One of many shards has few ICMP identifiers, and is therefore made in no time.
const SLICE: ShardSlice = ShardSlice { shard: 0, shards: 64 };

/// A port that is the shard's.
fn port(byte: u8) -> u16 {
    40_000 + 64 * u16::from(byte % 8)
}

fn client(byte: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 66, 77, 2 + byte % 4)
}

fn remote(byte: u8) -> Ipv4Addr {
    if byte % 5 == 4 { EXTERNAL } else { Ipv4Addr::new(198, 51, 100, byte % 5) }
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

/// Follows the script.
pub fn run(input: &[u8]) {
    let mut script = Script::new(input);
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
    while !script.is_over() {
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
            5 => {
                let changes = script.some_bytes(32);
                if let Some(mut bytes) = answer(&left, EXTERNAL, &changes) {
                    translate(&mut nat, &mut bytes, now, false);
                }
            }
            6 => {
                let (kind, code) = (script.pick([3, 11, 12, 5]), script.byte());
                let quoted = 28 + usize::from(script.byte() % 64);
                let from = remote(script.byte());
                let mut bytes = icmp_error(kind, code, from, EXTERNAL, &left, quoted);
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
}
