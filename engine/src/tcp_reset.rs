//! The RST that tells a client that its connection is no more (RFC 9293 §3.10.7.1).
//!
//! Theory of operation. After a restart of the gateway, the clients' segments belong to connections that the NAT does
//! not know. Were they only dropped, the applications behind them would wait until their own patience ends, which is
//! minutes. A RST, as their far end would send it if it knew the connection no longer, lets them connect anew at once.
//!
//! Only a client's own segment is answered, whose source the tunnel has authenticated, and only to that client: so
//! nobody outside can have a RST sent. It is answered at the rate of ICMP errors, and a RST never.

use crate::wire::ipv4::{Ipv4Packet, MIN_HEADER_LEN, TcpFields, protocol, put_u16, tcp_flags};
use crate::wire::{checksum, checksum::Sum};

const TCP_HEADER_LEN: usize = 20;
const TTL: u8 = 64; // RFC 1700
const DONT_FRAGMENT: u16 = 0x4000; // RFC 791 §3.1

/// Makes `out` the answer to a segment that belongs to no connection. False, with `out` empty, if it is none, or a RST.
pub fn build(segment: &Ipv4Packet<'_>, out: &mut Vec<u8>) -> bool {
    out.clear();
    let (Some(fields), Some((from, to))) = (segment.tcp(), segment.ports()) else { return false };
    if fields.flags & tcp_flags::RST != 0 {
        return false;
    }
    let (sequence, acknowledgment, flags) = answer(&fields, segment.transport_payload_len());

    out.resize(MIN_HEADER_LEN + TCP_HEADER_LEN, 0);
    let total_len = out.len() as u16;
    let (ip, tcp) = out.split_at_mut(MIN_HEADER_LEN);
    ip[0] = 0x45;
    put_u16(ip, 2, total_len);
    put_u16(ip, 6, DONT_FRAGMENT);
    ip[8] = TTL;
    ip[9] = protocol::TCP;
    ip[12..16].copy_from_slice(&segment.destination().octets());
    ip[16..20].copy_from_slice(&segment.source().octets());
    let sum = checksum::checksum(ip);
    put_u16(ip, 10, sum);

    put_u16(tcp, 0, to);
    put_u16(tcp, 2, from);
    tcp[4..8].copy_from_slice(&sequence.to_be_bytes());
    tcp[8..12].copy_from_slice(&acknowledgment.to_be_bytes());
    tcp[12] = (TCP_HEADER_LEN as u8 / 4) << 4;
    tcp[13] = flags;
    let pseudo = Sum::ZERO.add_bytes(&ip[12..20]).add_bytes(&[0, protocol::TCP, 0, TCP_HEADER_LEN as u8]);
    let sum = pseudo.add_bytes(tcp).finish();
    put_u16(tcp, 16, sum);
    true
}

/// Sequence and acknowledgment number, and flags: such that the sender believes it (RFC 9293 §3.10.7.1).
fn answer(segment: &TcpFields, payload_len: usize) -> (u32, u32, u8) {
    if segment.flags & tcp_flags::ACK != 0 {
        return (segment.acknowledgment, 0, tcp_flags::RST);
    }
    let counted = |flag| u32::from(segment.flags & flag != 0);
    let len = payload_len as u32 + counted(tcp_flags::SYN) + counted(tcp_flags::FIN);
    (0, segment.sequence.wrapping_add(len), tcp_flags::RST | tcp_flags::ACK)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Offload;

    /// 10.66.77.2:5000 to 198.51.100.9:443, sequence 1,000, acknowledgment 2,000, three bytes of data.
    fn segment(flags: u8) -> Vec<u8> {
        let mut bytes = vec![0x45, 0, 0, 43, 0, 0, 0x40, 0, 64, protocol::TCP, 0, 0, 10, 66, 77, 2];
        bytes.extend([198, 51, 100, 9, 5000u16.to_be_bytes()[0], 5000u16.to_be_bytes()[1], 1, 187]);
        bytes.extend(1_000u32.to_be_bytes());
        bytes.extend(2_000u32.to_be_bytes());
        bytes.extend([0x50, flags, 4, 0, 0, 0, 0, 0, b'a', b'b', b'c']);
        let sum = checksum::checksum(&bytes[..20]);
        put_u16(&mut bytes, 10, sum);
        bytes
    }

    fn answered(flags: u8) -> Option<(u32, u32, u8)> {
        let mut bytes = segment(flags);
        let mut out = vec![1, 2, 3];
        let packet = Ipv4Packet::parse(&mut bytes, 0, Offload::NONE).unwrap();
        if !build(&packet, &mut out) {
            assert!(out.is_empty());
            return None;
        }
        let answer = Ipv4Packet::parse(&mut out, 0, Offload::NONE).unwrap();
        assert!(answer.transport_checksum_ok(), "and the IP checksum is right, or it would not parse");
        assert_eq!((answer.source(), answer.destination()), (packet.destination(), packet.source()));
        assert_eq!(answer.ports(), Some((443, 5000)));
        let fields = answer.tcp().unwrap();
        Some((fields.sequence, fields.acknowledgment, fields.flags))
    }

    #[test]
    fn a_segment_that_acknowledges_is_answered_where_its_sender_waits() {
        for flags in [tcp_flags::ACK, tcp_flags::ACK | tcp_flags::PSH, tcp_flags::ACK | tcp_flags::FIN] {
            assert_eq!(answered(flags), Some((2_000, 0, tcp_flags::RST)));
        }
    }

    #[test]
    fn a_segment_that_does_not_acknowledge_is_acknowledged_whole() {
        let reset = tcp_flags::RST | tcp_flags::ACK;
        assert_eq!(answered(0), Some((0, 1_003, reset)));
        assert_eq!(answered(tcp_flags::FIN), Some((0, 1_004, reset)));
    }

    #[test]
    fn a_reset_is_never_answered() {
        assert_eq!(answered(tcp_flags::RST), None);
        assert_eq!(answered(tcp_flags::RST | tcp_flags::ACK), None);
    }
}
