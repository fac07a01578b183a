use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::wire::test_packets::{
    ALICE, DF, MF, SERVER, Template, assert_valid, mend_header_checksum, payload,
};
use crate::wire::{ChecksumState, Gso, GsoKind, Offload};

const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 66, 77, 1);
const START: Timestamp = Timestamp::from_secs(100);

fn error_at(
    errors: &mut IcmpErrors,
    kind: IcmpErrorKind,
    original: &[u8],
    now: Timestamp,
) -> Option<Vec<u8>> {
    let mut original = original.to_vec();
    let packet = Ipv4Packet::parse(&mut original, 0, Offload::NONE).unwrap();
    let mut out = vec![1, 2, 3];
    let built = errors.build(kind, &packet, GATEWAY, now, &mut out);
    assert_eq!(built, !out.is_empty());
    built.then_some(out)
}

fn error(kind: IcmpErrorKind, original: &[u8]) -> Option<Vec<u8>> {
    error_at(&mut IcmpErrors::new([7; 32]), kind, original, START)
}

fn answered(original: &[u8]) -> bool {
    error(IcmpErrorKind::TimeExceeded, original).is_some()
}

#[test]
fn each_kind_has_its_type_and_code() {
    use IcmpErrorKind::*;
    let original = Template::default().udp(&payload(100));
    for (kind, expected) in [
        (NetUnreachable, [3, 0, 0, 0]),
        (HostUnreachable, [3, 1, 0, 0]),
        (PortUnreachable, [3, 3, 0, 0]),
        (FragmentationNeeded { mtu: 1420 }, [3, 4, 0x05, 0x8c]),
        (AdminProhibited, [3, 13, 0, 0]),
        (TimeExceeded, [11, 0, 0, 0]),
        (ReassemblyTimeExceeded, [11, 1, 0, 0]),
    ] {
        let packet = error(kind, &original).unwrap();
        assert_valid(&packet);
        assert_eq!([packet[20], packet[21], packet[26], packet[27]], expected, "{kind:?}");
        assert_eq!(packet[28..], original);
    }
}

#[test]
fn the_error_goes_from_the_gateway_to_the_sender_with_the_header_of_rfc_1812() {
    let mut packet = error(IcmpErrorKind::TimeExceeded, &Template::default().tcp(&[])).unwrap();
    let packet = Ipv4Packet::parse(&mut packet, 0, Offload::NONE).unwrap();
    assert_eq!((packet.source(), packet.destination()), (GATEWAY, ALICE));
    assert_eq!((packet.tos(), packet.ttl(), packet.dont_fragment()), (0xc0, 64, false));
}

#[test]
fn the_quote_fills_576_bytes_at_most() {
    let original = Template { ip_options: vec![1; 40], ..Template::default() }.udp(&payload(2000));
    let packet = error(IcmpErrorKind::TimeExceeded, &original).unwrap();
    assert_eq!(packet.len(), 576);
    assert_eq!(packet[28..], original[..548]);
}

#[test]
fn icmp_errors_are_never_answered_but_queries_are() {
    let icmp = |kind| Template::default().icmp(kind, 0, &payload(36));
    for query in [0, 8, 13, 14, 15, 16, 17, 18] {
        assert!(answered(&icmp(query)), "{query}");
    }
    for error in [3, 4, 5, 11, 12, 1, 2, 19, 42, 255] {
        assert!(!answered(&icmp(error)), "{error}");
    }
    let template = Template { fragment: MF, ..Template::default() };
    assert!(answered(&template.ip(protocol::ICMP, &[8, 0, 0, 0, 0, 0, 0, 0])));
    assert!(!answered(&template.ip(protocol::ICMP, &[3, 0, 0, 0, 0, 0, 0, 0])), "nor as a first fragment");
    assert!(!answered(&template.ip(protocol::ICMP, &[])));
}

#[test]
fn only_the_first_fragment_is_answered() {
    let fragment = |fragment| Template { fragment, ..Template::default() }.ip(protocol::UDP, &payload(64));
    assert!(answered(&fragment(MF)));
    assert!(!answered(&fragment(MF | 1)));
    assert!(!answered(&fragment(1)));
}

#[test]
fn broadcast_and_multicast_are_never_answered() {
    for octets in [[255, 255, 255, 255], [224, 0, 0, 1], [239, 1, 2, 3]] {
        assert!(!answered(&Template { destination: octets.into(), ..Template::default() }.udp(&[])));
    }
}

#[test]
fn a_source_that_is_no_single_host_is_never_answered() {
    for octets in [[0, 0, 0, 0], [127, 0, 0, 1], [224, 0, 0, 1], [240, 0, 0, 1], [255, 255, 255, 255]] {
        assert!(!answered(&Template { source: octets.into(), ..Template::default() }.udp(&[])), "{octets:?}");
    }
}

#[test]
fn a_superpacket_is_quoted_as_its_first_segment() {
    let mut original = Template::default().tcp(&payload(30_000));
    let gso = Gso { kind: GsoKind::Tcp4, segment_size: 400 };
    let offload = Offload { gso: Some(gso), checksum: ChecksumState::Partial };
    let packet = Ipv4Packet::parse(&mut original, 0, offload).unwrap();
    let mut out = Vec::new();
    let kind = IcmpErrorKind::FragmentationNeeded { mtu: 400 };
    assert!(IcmpErrors::new([7; 32]).build(kind, &packet, GATEWAY, START, &mut out));
    let mut expected = Template::default().tcp(&payload(30_000))[..440].to_vec();
    put_u16(&mut expected, 2, 440);
    mend_header_checksum(&mut expected);
    assert_eq!(out[28..], expected);
}

/// A datagram from an address that is `n` away from Alice's.
fn from_neighbor(n: u32) -> Vec<u8> {
    Template { source: (u32::from(ALICE) + n).into(), fragment: DF, ..Template::default() }.udp(&[])
}

/// How many of these packets are answered at `now`.
fn admitted(errors: &mut IcmpErrors, packets: impl Iterator<Item = u32>, now: Timestamp) -> usize {
    packets
        .filter(|&n| error_at(errors, IcmpErrorKind::TimeExceeded, &from_neighbor(n), now).is_some())
        .count()
}

#[test]
fn one_destination_gets_its_burst_and_then_its_rate() {
    let mut errors = IcmpErrors::new([7; 32]);
    let burst = DESTINATION_BURST as usize;
    assert_eq!(admitted(&mut errors, (0..500).map(|_| 0), START), burst);
    let later = START + Duration::from_secs(1);
    assert_eq!(admitted(&mut errors, (0..500).map(|_| 0), later), 10);
    // Several, since one of them may share the bucket.
    assert!(admitted(&mut errors, 1..6, later) >= 3, "and silences nobody else");
}

#[test]
fn all_destinations_together_are_limited_and_nobody_can_count_by_how_much() {
    let totals: Vec<_> = (0..20)
        .map(|seed| admitted(&mut IcmpErrors::new([seed; 32]), (0..100_000).step_by(10), START))
        .collect();
    assert!(totals.iter().all(|total| (25..150).contains(total)), "{totals:?}");
    assert!(totals.iter().any(|&total| total != totals[0]), "the common limit must not be exact: {totals:?}");
}

#[test]
fn a_packet_that_may_not_be_answered_costs_no_token() {
    let mut errors = IcmpErrors::new([7; 32]);
    let unanswerable = Template::default().icmp(3, 1, &payload(36));
    for _ in 0..1000 {
        assert!(error_at(&mut errors, IcmpErrorKind::TimeExceeded, &unanswerable, START).is_none());
    }
    assert_eq!(admitted(&mut errors, 0..1, START), 1);
}

proptest! {
    #[test]
    fn arbitrary_packets_never_panic_and_every_error_is_valid(
        mut bytes in proptest::collection::vec(any::<u8>(), 60..700), head_len in 20usize..700
    ) {
        bytes[0] = 0x45 + (bytes[0] & 7);
        let len = bytes.len() as u16;
        put_u16(&mut bytes, 2, len);
        mend_header_checksum(&mut bytes);
        let mut head = bytes[..head_len.min(bytes.len())].to_vec();
        let tail_len = bytes.len() - head.len();
        if let Ok(packet) = Ipv4Packet::parse(&mut head, tail_len, Offload::NONE) {
            let mut out = Vec::new();
            if IcmpErrors::new([1; 32]).build(IcmpErrorKind::TimeExceeded, &packet, SERVER, START, &mut out) {
                assert_valid(&out);
            }
        }
    }
}
