use proptest::prelude::*;

use super::*;
use crate::wire::ipv4::protocol;
use crate::wire::offload::{Gso, Offload};
use crate::wire::test_packets::*;

fn gso(kind: GsoKind, segment_size: u16) -> Offload {
    Offload { gso: Some(Gso { kind, segment_size }), checksum: ChecksumState::Partial }
}

const PARTIAL: Offload = Offload { gso: None, checksum: ChecksumState::Partial };

/// Splits `bytes`, of which only the first `head_len` are in the head and the rest in slices of `slice_len`. In one
/// piece, they are split in place as well, into the same segments.
fn split(bytes: &[u8], head_len: usize, slice_len: usize, offload: Offload) -> Vec<Vec<u8>> {
    let (head, tail) = bytes.split_at(head_len);
    let mut head = head.to_vec();
    let packet = Ipv4Packet::parse(&mut head, tail.len(), offload).unwrap();
    let mut segments = Segments::new(packet.head(), packet.shape(), tail.chunks(slice_len.max(1)));
    let (count, longest) = (segments.segment_count(), segments.max_segment_len());
    let mut out = vec![0; longest];
    let mut all = Vec::new();
    while let Some(len) = segments.next_into(&mut out) {
        all.push(out[..len].to_vec());
    }
    assert_eq!(all.len(), count);
    assert_eq!(all.iter().map(Vec::len).max(), Some(longest));
    assert_eq!(split_in_place(bytes, offload), all);
    all
}

fn split_in_place(bytes: &[u8], offload: Offload) -> Vec<Vec<u8>> {
    let mut whole = bytes.to_vec();
    let shape = Ipv4Packet::parse(&mut whole, 0, offload).unwrap().shape();
    let mut segments = SegmentsInPlace::new(&mut whole, shape);
    let mut all = Vec::new();
    while let Some(segment) = segments.next_segment() {
        all.push(segment.to_vec());
    }
    all
}

fn split_whole(bytes: &[u8], offload: Offload) -> Vec<Vec<u8>> {
    split(bytes, bytes.len(), 1, offload)
}

#[test]
fn each_tcp_segment_is_what_the_sender_would_have_sent() {
    let all = tcp_flags::ACK | tcp_flags::PSH | tcp_flags::FIN | tcp_flags::CWR;
    let template = Template {
        flags: all,
        identification: 0xffff,
        sequence: u32::MAX - 100,
        tcp_options: vec![1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8],
        ..Template::default()
    };
    let data = payload(2500);
    let segments = split_whole(&template.tcp(&data), gso(GsoKind::Tcp4Ecn, 1000));
    let expected = [
        (0xffff, tcp_flags::ACK | tcp_flags::CWR, 0..1000),
        (0x0000, tcp_flags::ACK, 1000..2000),
        (0x0001, tcp_flags::ACK | tcp_flags::PSH | tcp_flags::FIN, 2000..2500),
    ]
    .map(|(identification, flags, range)| {
        let sequence = template.sequence.wrapping_add(range.start as u32);
        Template { identification, flags, sequence, ..template.clone() }.tcp(&data[range])
    });
    assert_eq!(segments, expected);
}

#[test]
fn each_udp_segment_is_a_datagram_of_its_own() {
    let template = Template { ip_options: vec![7, 3, 4, 0], ..Template::default() };
    let data = payload(1050);
    let segments = split_whole(&template.udp(&data), gso(GsoKind::Udp4, 500));
    let expected: Vec<_> = [0..500, 500..1000, 1000..1050]
        .into_iter()
        .zip(template.identification..)
        .map(|(range, identification)| Template { identification, ..template.clone() }.udp(&data[range]))
        .collect();
    assert_eq!(segments, expected);
}

#[test]
fn a_packet_that_is_no_superpacket_is_copied_as_it_is() {
    for packet in [
        Template::default().tcp(&payload(301)),
        Template::default().udp(&payload(0)),
        Template::default().icmp(8, 0, &payload(40)),
        Template { fragment: MF | 5, ..Template::default() }.ip(protocol::UDP, &payload(64)),
        Template::default().ip(47, &[]),
    ] {
        assert_eq!(split_whole(&packet, Offload::NONE), std::slice::from_ref(&packet));
    }
}

#[test]
fn a_partial_checksum_is_completed() {
    for mut packet in [Template::default().tcp(&payload(301)), Template::default().udp(&payload(77))] {
        let complete = packet.clone();
        let at = if packet[9] == protocol::TCP { 36 } else { 26 };
        let length = (packet.len() - 20) as u16;
        let partial = checksum::pseudo_header(ALICE, SERVER, packet[9], length).partial();
        put_u16(&mut packet, at, partial);
        assert_eq!(split_whole(&packet, PARTIAL), [complete]);
    }
}

#[test]
fn a_udp_checksum_never_becomes_zero() {
    // The payload is chosen so that the sum is 0xffff, whose complement is zero.
    let mut packet = Template::default().udp(&[0, 0]);
    let checksum = u16_at(&packet, 26);
    put_u16(&mut packet, 28, checksum);
    for offload in [PARTIAL, gso(GsoKind::Udp4, 100)] {
        assert_eq!(u16_at(&split_whole(&packet, offload)[0], 26), 0xffff);
    }
}

#[test]
fn metadata_that_does_not_fit_the_transport_splits_nothing() {
    for (packet, kind) in [
        (Template::default().tcp(&payload(300)), GsoKind::Udp4),
        (Template::default().udp(&payload(300)), GsoKind::Tcp4),
        (Template::default().icmp(8, 0, &payload(300)), GsoKind::Tcp4),
    ] {
        assert_eq!(split_whole(&packet, gso(kind, 100)).len(), 1);
    }
}

#[test]
fn too_small_a_buffer_loses_nothing() {
    let packet = &mut Template::default().tcp(&payload(300));
    let packet = Ipv4Packet::parse(packet, 0, gso(GsoKind::Tcp4, 100)).unwrap();
    let mut segments = Segments::whole(&packet);
    assert_eq!(segments.next_into(&mut [0; 139]), None);
    assert_eq!(segments.next_into(&mut [0; 140]), Some(140));
}

#[test]
fn bytes_that_are_missing_end_the_segments() {
    let packet = &mut Template::default().tcp(&payload(300));
    let head_len = 50;
    let packet = Ipv4Packet::parse(packet, 0, gso(GsoKind::Tcp4, 100)).unwrap();
    let shape = packet.shape();
    let mut out = [0; 200];
    for len in 0..head_len {
        let mut segments = Segments::new(&packet.head()[..len], shape, std::iter::empty());
        assert_eq!(segments.next_into(&mut out), None);
    }
    let mut segments = Segments::new(&packet.head()[..150], shape, std::iter::empty());
    assert_eq!(segments.next_into(&mut out), Some(140));
    assert_eq!(segments.next_into(&mut out), None);
    assert_eq!(segments.next_into(&mut out), None);

    for len in 0..200 {
        let mut bytes = packet.head()[..len].to_vec();
        let mut segments = SegmentsInPlace::new(&mut bytes, shape);
        assert_eq!(segments.next_segment().map(<[u8]>::len), (len >= 140).then_some(140), "{len}");
        assert_eq!(segments.next_segment(), None);
    }
}

proptest! {
    #[test]
    fn the_segments_carry_the_superpacket_wherever_its_payload_lies(
        len in 0usize..9000, segment_size in 1u16..3000, head_payload in 0usize..2000, slice_len in 1usize..3000,
        udp in any::<bool>(), options in 0usize..10, ip_options in 0usize..10, flags in any::<u8>(),
        sequence in any::<u32>(), identification in any::<u16>()
    ) {
        let template = Template {
            flags, sequence, identification,
            tcp_options: vec![1; 4 * options],
            ip_options: vec![1; 4 * ip_options],
            ..Template::default()
        };
        let data = payload(len);
        let (packet, kind, headers) = if udp {
            (template.udp(&data), GsoKind::Udp4, 28 + 4 * ip_options)
        } else {
            (template.tcp(&data), GsoKind::Tcp4, 40 + 4 * options + 4 * ip_options)
        };
        let head_len = headers + head_payload.min(len);
        let segments = split(&packet, head_len, slice_len, gso(kind, segment_size));
        prop_assert_eq!(segments.len(), len.div_ceil(usize::from(segment_size)).max(1));
        let mut rebuilt = Vec::new();
        for (index, segment) in segments.iter().enumerate() {
            assert_valid(segment);
            prop_assert_eq!(u16_at(segment, 4), identification.wrapping_add(index as u16));
            if !udp {
                let at = headers - 20 - 4 * options;
                prop_assert_eq!(u32_at(segment, at + 4), sequence.wrapping_add(rebuilt.len() as u32));
            }
            rebuilt.extend_from_slice(&segment[headers..]);
        }
        prop_assert_eq!(rebuilt, data);
    }

    #[test]
    fn arbitrary_bytes_never_panic(
        mut bytes in proptest::collection::vec(any::<u8>(), 20..400), segment_size in any::<u16>(),
        kind in 0usize..3, cut in 0usize..400
    ) {
        bytes[0] = 0x45 + (bytes[0] & 1);
        bytes[6] &= 0x40;
        bytes[7] = 0;
        bytes[9] = if bytes[9] & 1 == 0 { protocol::TCP } else { protocol::UDP };
        let len = bytes.len() as u16;
        put_u16(&mut bytes, 2, len);
        if bytes.len() >= 24 {
            mend_header_checksum(&mut bytes);
        }
        let kind = [GsoKind::Tcp4, GsoKind::Tcp4Ecn, GsoKind::Udp4][kind];
        if let Ok(packet) = Ipv4Packet::parse(&mut bytes, 0, gso(kind, segment_size)) {
            let head = &packet.head()[..cut.min(packet.head().len())];
            let mut out = vec![0; 65_536];
            let mut segments = Segments::new(head, packet.shape(), std::iter::empty());
            while segments.next_into(&mut out).is_some() {}
            let (mut head, shape) = (head.to_vec(), packet.shape());
            let mut segments = SegmentsInPlace::new(&mut head, shape);
            while segments.next_segment().is_some() {}
        }
    }
}
