//! The requirements of `docs/nat.md`, one file per standard, one test per requirement.

mod attacks;
mod calls;
mod others;
mod packets;
mod rfc4787_udp;
mod rfc5382_tcp;
mod rfc5508_icmp;
mod rfc6888_exhaustion;

use std::net::Ipv4Addr;
use std::time::Duration;

use super::*;
use crate::clock::Timestamp;
use crate::drop_reason::DropReason;
use crate::wire::{Ipv4Packet, Offload};
use packets::*;

const EXTERNAL: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
const SECOND_EXTERNAL: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);

/// A NAT and a clock that the test turns.
struct World {
    nat: Nat,
    now: Timestamp,
}

impl World {
    /// One external address, plenty of ports, default settings.
    fn new() -> Self {
        Self::with(NatConfig::default())
    }

    fn with(config: NatConfig) -> Self {
        Self::with_ports(config, 10_000..12_000)
    }

    fn with_ports(config: NatConfig, ports: std::ops::Range<u16>) -> Self {
        let mut nat = Nat::new(config, &[EXTERNAL], ShardSlice::WHOLE, [7; 32]);
        let ports: Vec<u16> = ports.collect();
        nat.add_ports(Proto::Tcp, EXTERNAL, &ports);
        nat.add_ports(Proto::Udp, EXTERNAL, &ports);
        Self { nat, now: Timestamp::from_secs(1_000) }
    }

    /// Time passes, and what is due happens.
    fn pass(&mut self, seconds: u64) {
        let end = self.now + Duration::from_secs(seconds);
        while let Some(due) = self.nat.next_expiry().filter(|&due| due <= end) {
            self.now = self.now.max(due);
            self.nat.expire(self.now);
        }
        self.now = end;
        self.nat.expire(end);
    }

    /// A client's packet, as it leaves outside.
    fn send(&mut self, mut bytes: Vec<u8>) -> Result<Vec<u8>, DropReason> {
        self.nat.prefetch_outbound(&bytes);
        self.translate(&mut bytes, |nat, packet, now| {
            let way = nat.translate_outbound(packet, now)?;
            assert_eq!(way == Outbound::Hairpin, nat.is_external(packet.destination()));
            Ok(())
        })?;
        Ok(bytes)
    }

    /// A packet from outside, as the client gets it.
    fn receive(&mut self, mut bytes: Vec<u8>) -> Result<Vec<u8>, DropReason> {
        self.nat.prefetch_inbound(&bytes);
        self.translate(&mut bytes, |nat, packet, now| {
            nat.translate_inbound(packet, now)?;
            assert!(!nat.is_external(packet.destination()), "it is for a client now");
            Ok(())
        })?;
        Ok(bytes)
    }

    fn translate(
        &mut self,
        bytes: &mut [u8],
        by: impl FnOnce(&mut Nat, &mut Ipv4Packet<'_>, Timestamp) -> Result<(), DropReason>,
    ) -> Result<(), DropReason> {
        let before = bytes.to_vec();
        let mut packet = Ipv4Packet::parse(bytes, 0, Offload::NONE).expect("a test's packet is well-formed");
        let result = by(&mut self.nat, &mut packet, self.now);
        match result {
            Ok(()) => {
                assert!(packet.transport_checksum_ok(), "the transport checksum is right after translation");
                let after = packet.into_head().to_vec();
                let mut copy = after.clone();
                Ipv4Packet::parse(&mut copy, 0, Offload::NONE).expect("it is well-formed after translation");
                assert_eq!(after[1], before[1], "DSCP and ECN are kept");
                assert_eq!(after[8], before[8], "the TTL is others' business");
            }
            Err(_) => assert_eq!(packet.into_head(), before, "a dropped packet is left as it was"),
        }
        result
    }

    fn mapping(&self, internal: Endpoint) -> Option<MappingView> {
        self.nat.mappings(self.now).find(|mapping| mapping.internal == internal)
    }
}
