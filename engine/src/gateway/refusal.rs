//! Packets that are not delivered, and what their senders are told.

use super::Gateway;
use crate::clock::Timestamp;
use crate::drop_reason::DropReason;
use crate::icmp_error::IcmpErrorKind;
use crate::tcp_reset;
use crate::wire::{Ipv4Packet, Shape};

/// A packet that is not delivered, and the ICMP error or the RST that tells its sender so, if one is due.
pub(super) struct Refusal {
    pub(super) reason: DropReason,
    pub(super) answer: Option<Vec<u8>>,
}

impl From<DropReason> for Refusal {
    fn from(reason: DropReason) -> Self {
        Self { reason, answer: None }
    }
}

impl Gateway {
    /// A refusal of a packet of a peer, with the ICMP error that tells the peer why, where one is due; or the RST.
    pub(super) fn refuse(
        &mut self,
        now: Timestamp,
        packet: &Ipv4Packet<'_>,
        reason: DropReason,
        mtu: usize,
    ) -> Refusal {
        let mut answer = Vec::new();
        let kind = match reason {
            // A connection that we know nothing of, as after a restart: its client should make another one at once.
            DropReason::TcpOutOfState => {
                let due =
                    tcp_reset::build(packet, &mut answer) && self.icmp_errors.admits(packet.source(), now);
                return Refusal { reason, answer: due.then_some(answer) };
            }
            DropReason::TtlExceeded => IcmpErrorKind::TimeExceeded,
            DropReason::TooBig => IcmpErrorKind::FragmentationNeeded { mtu: mtu as u16 },
            DropReason::NoSuchPeer | DropReason::NextHopUnresolved => IcmpErrorKind::HostUnreachable,
            DropReason::NoRoute => IcmpErrorKind::NetUnreachable,
            // RFC 6888 REQ-11, RFC 5508 REQ-8: the client learns at once that the gateway refuses, rather than by a
            // timeout.
            DropReason::PortsExhausted
            | DropReason::SharedPortTaken
            | DropReason::MappingsExhausted
            | DropReason::ClientMappingLimit
            | DropReason::ClientShare
            | DropReason::ClientMappingRate
            | DropReason::SessionLimit
            | DropReason::UnsupportedProtocol => IcmpErrorKind::AdminProhibited,
            // RFC 1812 §5.3.9: filtered packets are answered with this code.
            DropReason::Denied => IcmpErrorKind::AdminProhibited,
            _ => return reason.into(),
        };
        let built = self.icmp_errors.build(kind, packet, self.gateway_address, now, &mut answer);
        Refusal { reason, answer: built.then_some(answer) }
    }

    /// A refusal of a packet from outside, with the ICMP error that tells its sender why, where one is due. It comes
    /// from the external address that the sender knows, and quotes `head`: how the packet of this shape began before it
    /// was translated.
    pub(super) fn refuse_from_outside(
        &mut self,
        now: Timestamp,
        mut head: Vec<u8>,
        shape: Shape,
        reason: DropReason,
    ) -> Refusal {
        let kind = match reason {
            DropReason::TtlExceeded => IcmpErrorKind::TimeExceeded,
            DropReason::TooBig => IcmpErrorKind::FragmentationNeeded { mtu: self.tunnel_mtu as u16 },
            _ => return reason.into(),
        };
        let rest = shape.total_len() - head.len();
        let mut answer = Vec::new();
        let built = Ipv4Packet::parse(&mut head, rest, shape.offload()).is_ok_and(|original| {
            self.outside_errors.build(kind, &original, original.destination(), now, &mut answer)
        });
        Refusal { reason, answer: built.then_some(answer) }
    }
}
