//! Every way for a packet to die, named and counted.
//!
//! A packet that is not delivered is counted under exactly one [`DropReason`]; `tidegate status` prints the names.

use crate::wire::Shape;

macro_rules! drop_reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal,)+) => {
        /// Why a packet (or datagram) was not delivered.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[repr(u8)]
        pub enum DropReason {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl DropReason {
            /// Every reason, in the order of their numbers.
            pub const ALL: &'static [DropReason] = &[$(DropReason::$variant,)+];

            /// The stable name under which the reason is counted and shown.
            pub const fn name(self) -> &'static str {
                match self { $(DropReason::$variant => $name,)+ }
            }

            /// What it means, in a sentence for people.
            pub fn explanation(self) -> &'static str {
                match self { $(DropReason::$variant => concat!($($doc),+).trim_start(),)+ }
            }
        }
    };
}

drop_reasons! {
    // Malformed packets.
    /// Shorter than its headers, or than it claims to be.
    Truncated = "truncated",
    /// An IPv4 header whose lengths contradict each other.
    BadIpHeader = "bad_ip_header",
    /// The IPv4 header checksum is wrong.
    BadIpChecksum = "bad_ip_checksum",
    /// The TCP, UDP or ICMP checksum is wrong.
    BadTransportChecksum = "bad_transport_checksum",
    /// A TCP, UDP or ICMP header that is too short or lies about its length.
    BadTransportHeader = "bad_transport_header",
    /// An IPv6 packet: Tidegate carries IPv4 only for now.
    Ipv6 = "ipv6",
    /// Neither IPv4 nor IPv6.
    UnknownVersion = "unknown_version",

    // The tunnel.
    /// A datagram that is no WireGuard message.
    NotWireGuard = "not_wireguard",
    /// A handshake message whose first MAC is wrong: it was not meant for this gateway.
    BadMac = "bad_mac",
    /// A handshake message without a valid cookie while the gateway is under load.
    CookieRequired = "cookie_required",
    /// A handshake from a key that is not a peer's.
    UnknownPeer = "unknown_peer",
    /// A handshake that does not decrypt, is replayed, or answers nothing.
    BadHandshake = "bad_handshake",
    /// More handshakes than the gateway is willing to answer.
    HandshakeRateLimited = "handshake_rate_limited",
    /// A data message for a session that does not exist (any more).
    UnknownSession = "unknown_session",
    /// A data message that does not authenticate.
    BadAuthentication = "bad_authentication",
    /// A data message that was received before, or is too old to tell.
    Replayed = "replayed",
    /// No session with the peer yet, and too many packets wait for one.
    NoSession = "no_session",
    /// The peer has never been heard of, so there is no address to send to.
    NoEndpoint = "no_endpoint",
    /// No handshake was answered for so long that the packets waiting for a session were given up.
    HandshakeTimeout = "handshake_timeout",
    /// The kernel gave no random bytes, so that no handshake could be made.
    NoRandomness = "no_randomness",
    /// The inner source is not the address assigned to the peer.
    WrongInnerSource = "wrong_inner_source",
    /// A datagram of the tunnel's own that came back to be sealed once more: a loop somewhere outside.
    OwnDatagram = "own_datagram",
    /// Marked by a router on the way (ECN), in place of being dropped, but the sender inside the tunnel understands
    /// losses only.
    CongestionMarked = "congestion_marked",

    // The router.
    /// From a client to another one, or to a network outside, that the settings deny to it.
    Denied = "denied",
    /// An address inside the VPN subnet that no peer holds.
    NoSuchPeer = "no_such_peer",
    /// Broadcast, multicast, loopback, link-local or another address that must not be forwarded.
    BogonDestination = "bogon_destination",
    /// A source (an address, or a datagram's port 0) that must not appear on this interface.
    BogonSource = "bogon_source",
    /// A packet that names the routers by which it wants to travel (IPv4's source routes).
    SourceRoute = "source_route",
    /// The TTL reached zero.
    TtlExceeded = "ttl_exceeded",
    /// Too big for the next hop, and DF is set.
    TooBig = "too_big",
    /// The next hop's link address is not known (yet).
    NextHopUnresolved = "next_hop_unresolved",
    /// There is no route to the destination.
    NoRoute = "no_route",
    /// The client asks the gateway's DNS faster than it may.
    ClientDnsRate = "client_dns_rate",

    // The NAT.
    /// A packet from outside without a mapping.
    NoMapping = "no_mapping",
    /// A packet from outside that the mapping's filter does not admit.
    Filtered = "filtered",
    /// No external port is free.
    PortsExhausted = "ports_exhausted",
    /// Another client talks to the same destination from the external port that both share.
    SharedPortTaken = "shared_port_taken",
    /// The table of mappings is full.
    MappingsExhausted = "mappings_exhausted",
    /// The client has as many mappings as it may have.
    ClientMappingLimit = "client_mapping_limit",
    /// External ports, mappings or sessions run low, and the client has more than its share of them.
    ClientShare = "client_share",
    /// The client opens mappings faster than it may.
    ClientMappingRate = "client_mapping_rate",
    /// The mapping has as many destinations as it may have.
    SessionLimit = "session_limit",
    /// A protocol that the NAT does not translate.
    UnsupportedProtocol = "unsupported_protocol",
    /// An ICMP message that the NAT does not pass.
    UnsupportedIcmp = "unsupported_icmp",
    /// An ICMP error that fits no live flow.
    IcmpErrorUnmatched = "icmp_error_unmatched",
    /// A TCP segment that does not fit the connection (a forged RST, data without a SYN).
    TcpOutOfState = "tcp_out_of_state",

    // Fragments.
    /// Fragments that overlap or exceed 65,535 bytes.
    BadFragment = "bad_fragment",
    /// Too many incomplete datagrams are being held.
    FragmentLimit = "fragment_limit",
    /// The missing fragments did not arrive in time.
    FragmentTimeout = "fragment_timeout",

    // Queues and devices.
    /// A bounded queue was full.
    QueueFull = "queue_full",
    /// It had waited too long in a queue that did not get shorter (CoDel).
    QueueDelay = "queue_delay",
    /// More packets waited than may, and this one's client had the most of them.
    QueueShare = "queue_share",
    /// The kernel refused the packet.
    SendFailed = "send_failed",
    /// The kernel reported an error while receiving.
    ReceiveFailed = "receive_failed",
    /// A superpacket of a kind that was never asked for.
    UnknownOffload = "unknown_offload",
    /// An ARP reply that nobody had asked for, or that makes no sense.
    UnsolicitedArp = "unsolicited_arp",
    /// The kernel's buffer towards Tidegate was full (as it reports itself).
    ReceiveOverrun = "receive_overrun",
}

/// The number of drops by reason.
#[derive(Clone, Debug)]
pub struct DropCounters([u64; DropReason::ALL.len()]);

impl Default for DropCounters {
    fn default() -> Self {
        Self([0; DropReason::ALL.len()])
    }
}

impl DropCounters {
    /// Counts one packet.
    pub fn count(&mut self, reason: DropReason) {
        self.add(reason, 1);
    }

    /// Counts several packets.
    pub fn add(&mut self, reason: DropReason, packets: u64) {
        self.0[reason as usize] = self.0[reason as usize].wrapping_add(packets);
    }

    /// Counts the packets that one stands for, which may be a superpacket; `None` is one whose shape is not known.
    pub fn count_segments(&mut self, reason: DropReason, shape: impl Into<Option<Shape>>) {
        self.add(reason, shape.into().map_or(1, Shape::segment_count) as u64);
    }

    /// Adds another set of counters, as of another shard.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.0.iter_mut().zip(other.0) {
            *mine = mine.wrapping_add(theirs);
        }
    }

    /// The packets counted under `reason`.
    pub fn get(&self, reason: DropReason) -> u64 {
        self.0[reason as usize]
    }

    /// The reasons that occurred, with their counts.
    pub fn nonzero(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        DropReason::ALL.iter().map(|&reason| (reason, self.get(reason))).filter(|&(_, count)| count > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_name_of_its_own_and_a_sentence() {
        let mut names: Vec<_> = DropReason::ALL.iter().map(|reason| reason.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), DropReason::ALL.len());
        for reason in DropReason::ALL {
            let sentence = reason.explanation();
            assert!(sentence.starts_with(char::is_uppercase) && sentence.ends_with('.'), "{sentence:?}");
        }
        assert_eq!(DropReason::NoMapping.explanation(), "A packet from outside without a mapping.");
    }
}
