//! How fast a peer may ask the gateway's DNS proxy.

use super::Gateway;
use crate::clock::Timestamp;
use crate::drop_reason::DropReason;
use crate::tunnel::PeerId;
use crate::wire::Ipv4Packet;
use crate::wire::ipv4::tcp_flags;

/// Where the gateway's DNS proxy listens (RFC 1035 §4.2).
const DNS_PORT: u16 = 53;
/// Queries over UDP and connections over TCP, together, that a peer may send the DNS proxy: per second, and at once,
/// which is as many as it may have in flight (`MAX_IN_FLIGHT` and `SHARES` in src/tidegate/dns). A superpacket that
/// begins within the burst passes whole, and what is beyond is owed.
pub(super) const DNS_RATE: u32 = 500;
pub(super) const DNS_BURST: u32 = 128;

impl Gateway {
    /// Whether a packet for the host asks the DNS proxy no faster than its peer may. The kernel has one queue of
    /// datagrams, and one of connections, for what all clients ask: what overflows it might be anybody's.
    pub(super) fn check_dns_rate(
        &mut self,
        now: Timestamp,
        packet: &Ipv4Packet<'_>,
        peer: PeerId,
    ) -> Result<(), DropReason> {
        let is_for_dns = packet.destination() == self.gateway_address
            && packet.ports().is_some_and(|(_, port)| port == DNS_PORT);
        let begins = |flags: u8| flags & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::SYN;
        if !is_for_dns || packet.tcp().is_some_and(|tcp| !begins(tcp.flags)) {
            return Ok(());
        }
        let queries = packet.shape().segment_count() as u32;
        let peer = self.local_peers.get_mut(&peer);
        let is_admitted = peer.is_some_and(|peer| peer.queries.take_cost(now, queries));
        is_admitted.then_some(()).ok_or(DropReason::ClientDnsRate)
    }
}
