//! The maximum segment size of TCP connections, clamped to the path (RFC 6691, RFC 9293 §3.7.1).
//!
//! A SYN says how large the segments may be that its receiver sends. Lowered to what the tunnel and the external
//! interface carry, both ends send segments that fit, and neither has to find the path's MTU by loss.

use crate::wire::ipv4::{Ipv4Packet, Transport, tcp_flags};

/// What the MSS leaves to the headers: IPv4 and TCP without options (RFC 6691 §2: options are the sender's care).
const HEADERS_LEN: usize = 40;
/// End of option list, no-operation, maximum segment size (RFC 9293 §3.1).
const OPTION_END: u8 = 0;
const OPTION_NOP: u8 = 1;
const OPTION_MSS: u8 = 2;
/// Kind, length and the 16-bit value.
const OPTION_MSS_LEN: usize = 4;
/// The TCP header without options.
const FIXED_HEADER_LEN: usize = 20;

/// Lowers the MSS option of a SYN or SYN/ACK to what an `mtu` in bytes carries. Never raises it, never adds it.
///
/// Options that cannot be read are left alone: their receiver will not believe them either.
pub fn clamp(packet: &mut Ipv4Packet<'_>, mtu: usize) {
    let Transport::Tcp { header_len } = packet.transport() else { return };
    if packet.tcp().is_none_or(|tcp| tcp.flags & tcp_flags::SYN == 0) || mtu <= HEADERS_LEN {
        return;
    }
    let limit = u16::try_from(mtu - HEADERS_LEN).unwrap_or(u16::MAX);
    let mut at = FIXED_HEADER_LEN;
    while let Some(option) = packet.transport_bytes().get(at..usize::from(header_len)) {
        match *option {
            [] | [OPTION_END, ..] => return,
            [OPTION_NOP, ..] => at += 1,
            [OPTION_MSS, 4, high, low, ..] => {
                if u16::from_be_bytes([high, low]) > limit {
                    write_value(packet, at + 2, limit);
                }
                at += OPTION_MSS_LEN;
            }
            [_, len, ..] if len >= 2 => at += usize::from(len),
            _ => return,
        }
    }
}

/// Replaces the 16-bit value at `at` bytes into the TCP header, which need not be aligned to the checksum's words.
fn write_value(packet: &mut Ipv4Packet<'_>, at: usize, value: u16) {
    if at % 2 == 0 {
        return packet.rewrite_transport_word(at, value);
    }
    let [high, low] = value.to_be_bytes();
    // The header's length is a multiple of four, so an odd value has a neighbour on both sides.
    if let Some(&[before, _, _, after]) = packet.transport_bytes().get(at - 1..at + 3) {
        packet.rewrite_transport_word(at - 1, u16::from_be_bytes([before, high]));
        packet.rewrite_transport_word(at + 1, u16::from_be_bytes([low, after]));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::test_packets::{ALICE, SERVER, Template, assert_valid, payload};
    use crate::wire::{ChecksumState, Offload, checksum};

    fn clamped(template: &Template, mtu: usize) -> Vec<u8> {
        let mut packet = template.tcp(&[]);
        clamp(&mut Ipv4Packet::parse(&mut packet, 0, Offload::NONE).unwrap(), mtu);
        packet
    }

    fn syn(options: &[u8]) -> Template {
        Template { flags: tcp_flags::SYN, tcp_options: options.to_vec(), ..Template::default() }
    }

    const MSS_1460: [u8; 4] = [2, 4, 0x05, 0xb4];
    const MSS_1380: [u8; 4] = [2, 4, 0x05, 0x64];

    #[test]
    fn the_mss_of_syn_and_syn_ack_is_lowered_to_the_mtu() {
        for flags in [tcp_flags::SYN, tcp_flags::SYN | tcp_flags::ACK, tcp_flags::SYN | tcp_flags::ECE] {
            let template = Template { flags, ..syn(&MSS_1460) };
            let expected = Template { tcp_options: MSS_1380.to_vec(), ..template.clone() };
            assert_eq!(clamped(&template, 1420), expected.tcp(&[]));
        }
    }

    #[test]
    fn an_mss_at_an_odd_offset_is_lowered_too() {
        let packet = clamped(&syn(&[1, 2, 4, 0x05, 0xb4, 3, 3, 7]), 1420);
        assert_eq!(packet, syn(&[1, 2, 4, 0x05, 0x64, 3, 3, 7]).tcp(&[]));
    }

    #[test]
    fn an_mss_behind_other_options_is_found() {
        let packet = clamped(&syn(&[8, 10, 1, 2, 3, 4, 5, 6, 7, 8, 4, 2, 2, 4, 0x05, 0xb4]), 1420);
        assert_eq!(packet[52..56], MSS_1380);
        assert_valid(&packet);
    }

    #[test]
    fn a_lower_mss_is_never_raised() {
        let template = syn(&MSS_1380);
        assert_eq!(clamped(&template, 1500), template.tcp(&[]));
        assert_eq!(clamped(&template, 1420), template.tcp(&[]));
        assert_eq!(clamped(&syn(&[1, 1, 1, 1]), 1420), syn(&[1, 1, 1, 1]).tcp(&[]), "and none is added");
    }

    #[test]
    fn only_syn_carries_an_mss() {
        let template = Template { flags: tcp_flags::ACK, ..syn(&MSS_1460) };
        assert_eq!(clamped(&template, 1420), template.tcp(&[]));
        let mut datagram = Template::default().udp(&payload(40));
        let before = datagram.clone();
        clamp(&mut Ipv4Packet::parse(&mut datagram, 0, Offload::NONE).unwrap(), 100);
        assert_eq!(datagram, before);
    }

    #[test]
    fn malformed_options_are_left_alone() {
        for options in [
            [3, 0, 2, 4, 0x05, 0xb4, 0, 0], // length 0 would loop
            [3, 1, 2, 4, 0x05, 0xb4, 0, 0],
            [2, 3, 0x05, 0xb4, 0, 0, 0, 0], // an MSS of another length
            [1, 1, 1, 1, 1, 1, 2, 4],       // cut off
            [1, 1, 1, 1, 1, 1, 1, 2],
            [3, 200, 2, 4, 0x05, 0xb4, 0, 0],
            [0, 2, 4, 0x05, 0xb4, 0, 0, 0], // behind the end of the list
        ] {
            assert_eq!(clamped(&syn(&options), 1420), syn(&options).tcp(&[]), "{options:?}");
        }
    }

    #[test]
    fn a_partial_checksum_stays_a_partial_checksum() {
        let mut packet = syn(&MSS_1460).tcp(&[]);
        let partial = checksum::pseudo_header(ALICE, SERVER, 6, 24).partial();
        packet[36..38].copy_from_slice(&partial.to_be_bytes());
        let offload = Offload { gso: None, checksum: ChecksumState::Partial };
        let mut view = Ipv4Packet::parse(&mut packet, 0, offload).unwrap();
        clamp(&mut view, 1420);
        view.complete_checksum();
        assert_eq!(packet, syn(&MSS_1380).tcp(&[]));
    }

    proptest! {
        #[test]
        fn arbitrary_options_never_panic_and_keep_the_checksum_right(
            options in proptest::collection::vec(prop_oneof![0u8..6, any::<u8>()], 40), mtu in 0usize..70_000
        ) {
            assert_valid(&clamped(&syn(&options), mtu));
        }
    }
}
