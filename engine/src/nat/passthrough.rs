//! Protocols without ports: all of one is one client's (GRE, ESP, SCTP, IPv6 in IPv4, and so on).
//!
//! Nothing in such a packet says whose answer it is, so the operator says it: only the address is translated, and
//! nothing is remembered. What arrives at any external address goes to the client, whoever sent it, as with a
//! published port; of other clients it is dropped.

use std::net::Ipv4Addr;

use super::Nat;
use crate::drop_reason::DropReason;
use crate::wire::Ipv4Packet;

/// Whose each protocol is. Bounded by the number of protocols, which the settings keep to a few.
#[derive(Debug, Default)]
pub(super) struct Passthrough(Vec<(u8, Ipv4Addr)>);

impl Passthrough {
    pub(super) fn client(&self, protocol: u8) -> Result<Ipv4Addr, DropReason> {
        let found = self.0.iter().find(|&&(passed, _)| passed == protocol);
        found.map(|&(_, client)| client).ok_or(DropReason::UnsupportedProtocol)
    }
}

impl Nat {
    /// Says whose the protocols other than TCP, UDP and ICMP are, by number; those that are not named are nobody's.
    pub fn pass_protocols(&mut self, clients: Vec<(u8, Ipv4Addr)>) {
        self.passed = Passthrough(clients);
    }

    pub(super) fn pass_outbound(&self, packet: &mut Ipv4Packet<'_>) -> Result<(), DropReason> {
        let client = packet.source();
        if self.passed.client(packet.protocol())? != client {
            return Err(DropReason::UnsupportedProtocol);
        }
        // The address that its mappings have, too (RFC 4787 REQ-2); if that is gone, the one that they will have.
        let held = self.clients.get(client).map(|client| client.external);
        let external =
            held.filter(|&held| self.pools.contains(held)).or_else(|| self.default_external_address(client));
        packet.rewrite_source_address(external.ok_or(DropReason::PortsExhausted)?);
        Ok(())
    }

    pub(super) fn pass_inbound(&self, packet: &mut Ipv4Packet<'_>) -> Result<(), DropReason> {
        let client = self.passed.client(packet.protocol())?;
        if !self.pools.contains(packet.destination()) {
            return Err(DropReason::NoMapping);
        }
        packet.rewrite_destination_address(client);
        Ok(())
    }
}
