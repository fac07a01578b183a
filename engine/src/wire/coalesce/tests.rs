use proptest::prelude::*;

use super::*;
use crate::wire::Segments;
use crate::wire::test_packets::*;

const OPTIONS: CoalesceOptions = CoalesceOptions { enabled: true, udp: true };
const TIMESTAMPS: [u8; 12] = [1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2];

/// A coalescer with its arena, into which each packet is laid behind the last.
struct Bench {
    arena: Arena,
    used: usize,
    coalescer: Coalescer<u32>,
}

/// A drained item.
#[derive(Debug)]
struct Out {
    /// The superpacket in one piece.
    bytes: Vec<u8>,
    /// What it splits into.
    segments: Vec<Vec<u8>>,
    tails: usize,
    offload: Offload,
    tag: u32,
}

impl Bench {
    fn new(options: CoalesceOptions) -> Self {
        Self { arena: Arena::new(4), used: 0, coalescer: Coalescer::new(options) }
    }

    fn push(&mut self, packet: &[u8], tag: u32) -> Result<(), DropReason> {
        let size = crate::arena::BUFFER_SIZE;
        if self.used % size + packet.len() > size {
            self.used = self.used.next_multiple_of(size);
        }
        let (buffer, start) = (self.used / size, self.used % size);
        self.used += packet.len();
        let span = Span::new(buffer, start..start + packet.len());
        self.arena.get_mut(span).copy_from_slice(packet);
        self.coalescer.push(&mut self.arena, span, tag)
    }

    fn drain(&mut self) -> Vec<Out> {
        let mut all = Vec::new();
        self.coalescer.drain(&mut self.arena, |arena, gathered| {
            let head = arena.get_mut(gathered.head);
            let shape = Ipv4Packet::parse(head, gathered.tail_len, gathered.offload).unwrap().shape();
            let head = arena.get(gathered.head);
            let tails = || gathered.tails.iter().map(|&span| arena.get(span));
            let bytes = [head].into_iter().chain(tails()).collect::<Vec<_>>().concat();
            let mut cutter = Segments::new(head, shape, tails());
            let mut out = vec![0; cutter.max_segment_len()];
            let mut segments = Vec::new();
            while let Some(len) = cutter.next_into(&mut out) {
                segments.push(out[..len].to_vec());
            }
            let Gathered { tails, offload, tag, .. } = gathered;
            all.push(Out { bytes, segments, tails: tails.len(), offload, tag });
        });
        all
    }
}

/// Pushes all, and gives back what comes out.
fn coalesce(packets: &[Vec<u8>]) -> Vec<Out> {
    let mut bench = Bench::new(OPTIONS);
    for packet in packets {
        bench.push(packet, 1).unwrap();
    }
    bench.drain()
}

/// How many segments each item has.
fn sizes(out: &[Out]) -> Vec<usize> {
    out.iter().map(|item| item.tails + 1).collect()
}

/// Two consecutive segments of 100 bytes; `change` may spoil the second before its checksum is made.
fn pair(change: impl Fn(&mut Template)) -> [Vec<u8>; 2] {
    let first = Template { tcp_options: TIMESTAMPS.to_vec(), ..Template::default() };
    let mut second = following(&first, 100);
    change(&mut second);
    [first.tcp(&payload(100)), second.tcp(&payload(100))]
}

/// The template of the segment that follows one with `len` payload bytes.
fn following(template: &Template, len: usize) -> Template {
    Template {
        sequence: template.sequence.wrapping_add(len as u32),
        identification: template.identification.wrapping_add(1),
        ..template.clone()
    }
}

/// A train of segments with these payload lengths.
fn train(template: &Template, lens: &[usize]) -> Vec<Vec<u8>> {
    let mut template = template.clone();
    lens.iter()
        .map(|&len| {
            let packet = template.tcp(&payload(len));
            template = following(&template, len);
            packet
        })
        .collect()
}

#[test]
fn consecutive_segments_become_one_superpacket() {
    let packets = train(&Template::default(), &[100, 100, 100, 40]);
    let out = coalesce(&packets);
    assert_eq!(sizes(&out), [4]);
    assert_eq!(out[0].bytes.len(), 40 + 340);
    assert_eq!(
        out[0].offload,
        Offload {
            gso: Some(Gso { kind: GsoKind::Tcp4, segment_size: 100 }),
            checksum: ChecksumState::Partial
        }
    );
    assert_eq!(out[0].segments, packets);
    let partial = checksum::pseudo_header(ALICE, SERVER, protocol::TCP, 360).partial();
    assert_eq!(out[0].bytes[36..38], partial.to_be_bytes());
}

#[test]
fn a_datagram_train_becomes_one_superpacket_where_uso_is_enabled() {
    let mut template = Template::default();
    let mut packets = Vec::new();
    for len in [200, 200, 50] {
        packets.push(template.udp(&payload(len)));
        template.identification += 1;
    }
    let out = coalesce(&packets);
    assert_eq!(sizes(&out), [3]);
    assert_eq!(out[0].offload.gso, Some(Gso { kind: GsoKind::Udp4, segment_size: 200 }));
    assert_eq!(out[0].segments, packets);

    let mut bench = Bench::new(CoalesceOptions { udp: false, ..OPTIONS });
    for packet in &packets {
        bench.push(packet, 1).unwrap();
    }
    assert_eq!(sizes(&bench.drain()), [1, 1, 1]);
}

#[test]
fn a_lone_packet_keeps_its_bytes_and_its_complete_checksum() {
    let packet = Template::default().tcp(&payload(100));
    let out = coalesce(std::slice::from_ref(&packet));
    assert_eq!(out[0].bytes, packet);
    assert_eq!(out[0].offload, Offload::NONE);
}

#[test]
fn nothing_merges_where_it_is_switched_off() {
    let mut bench = Bench::new(CoalesceOptions { enabled: false, ..OPTIONS });
    for packet in pair(|_| {}) {
        bench.push(&packet, 1).unwrap();
    }
    assert_eq!(sizes(&bench.drain()), [1, 1]);
}

#[test]
fn segments_that_differ_in_a_header_field_do_not_merge() {
    assert_eq!(sizes(&coalesce(&pair(|_| {}))), [2], "the pair merges as it is");
    type Change = fn(&mut Template);
    let changes: [(&str, Change); 14] = [
        ("source", |t| t.source = SERVER),
        ("destination", |t| t.destination = ALICE),
        ("source port", |t| t.ports.0 ^= 1),
        ("destination port", |t| t.ports.1 ^= 1),
        ("sequence gap", |t| t.sequence += 1),
        ("retransmission", |t| t.sequence -= 100),
        ("acknowledgment", |t| t.acknowledgment += 1),
        ("window", |t| t.window += 1),
        ("timestamps", |t| t.tcp_options[7] += 1),
        ("fewer options", |t| t.tcp_options.truncate(8)),
        ("ECN", |t| t.tos = 3),
        ("TTL", |t| t.ttl -= 1),
        ("DF", |t| t.fragment = 0),
        ("reserved IP flag", |t| t.fragment |= 0x8000),
    ];
    for (what, change) in changes {
        assert_eq!(sizes(&coalesce(&pair(change))), [1, 1], "{what}");
    }
}

#[test]
fn segments_of_different_tags_do_not_merge() {
    let mut bench = Bench::new(OPTIONS);
    let [first, second] = pair(|_| {});
    bench.push(&first, 1).unwrap();
    bench.push(&second, 2).unwrap();
    let out = bench.drain();
    assert_eq!(sizes(&out), [1, 1]);
    assert_eq!([out[0].tag, out[1].tag], [1, 2]);
}

#[test]
fn without_df_the_identification_must_be_the_next_one() {
    let template = Template { fragment: 0, identification: 0xffff, ..Template::default() };
    assert_eq!(sizes(&coalesce(&train(&template, &[100, 100]))), [2], "and wraps");
    let mut gap = following(&template, 100);
    gap.identification += 1;
    let packets = [template.tcp(&payload(100)), gap.tcp(&payload(100))];
    assert_eq!(sizes(&coalesce(&packets)), [1, 1]);
    assert_eq!(sizes(&coalesce(&pair(|t| t.identification = 7))), [2], "with DF it means nothing");
}

#[test]
fn segments_with_other_flags_than_ack_psh_and_fin_travel_alone() {
    use tcp_flags::*;
    for flags in [SYN, RST, URG, ECE, CWR] {
        assert_eq!(sizes(&coalesce(&pair(|t| t.flags |= flags))), [1, 1], "second with {flags:#x}");
        let first = Template { flags: ACK | flags, ..Template::default() };
        let second = Template { flags: ACK, ..following(&first, 100) };
        let packets = [first.tcp(&payload(100)), second.tcp(&payload(100))];
        assert_eq!(sizes(&coalesce(&packets)), [1, 1], "first with {flags:#x}");
    }
    let without_ack = Template { flags: 0, ..Template::default() };
    assert_eq!(sizes(&coalesce(&train(&without_ack, &[100, 100]))), [1, 1]);
}

#[test]
fn reserved_tcp_bits_and_an_urgent_pointer_travel_alone() {
    for (at, value) in [(32, 0x51u8), (38, 1)] {
        let mut packets = train(&Template::default(), &[100, 100]);
        for packet in &mut packets {
            packet[at] = value;
            let mut sum = checksum::pseudo_header(ALICE, SERVER, protocol::TCP, 120);
            put_u16(packet, 36, 0);
            sum = sum.add_bytes(&packet[20..]);
            put_u16(packet, 36, sum.finish());
            assert_valid(packet);
        }
        assert_eq!(sizes(&coalesce(&packets)), [1, 1]);
    }
}

#[test]
fn psh_and_fin_end_a_superpacket() {
    use tcp_flags::*;
    for ending in [PSH, FIN, PSH | FIN] {
        let mut packets = train(&Template::default(), &[100, 100, 100]);
        let template = Template { sequence: 1100, identification: 0x1235, ..Template::default() };
        packets[1] = Template { flags: ACK | ending, ..template }.tcp(&payload(100));
        let out = coalesce(&packets);
        assert_eq!(sizes(&out), [2, 1]);
        assert_eq!(out[0].bytes[33], ACK | ending);
        assert_eq!(out[0].segments, packets[..2]);
    }
    let first = Template { flags: ACK | PSH, ..Template::default() };
    let second = Template { flags: ACK, ..following(&first, 100) };
    assert_eq!(sizes(&coalesce(&[first.tcp(&payload(100)), second.tcp(&payload(100))])), [1, 1]);
}

#[test]
fn only_the_last_segment_may_be_shorter_and_none_longer() {
    assert_eq!(sizes(&coalesce(&train(&Template::default(), &[100, 99, 99]))), [2, 1]);
    assert_eq!(sizes(&coalesce(&train(&Template::default(), &[100, 101, 101]))), [1, 2]);
}

#[test]
fn a_superpacket_never_exceeds_65535_bytes_or_64_segments() {
    let lens = vec![1380; 50];
    let packets = train(&Template::default(), &lens);
    let out = coalesce(&packets);
    assert_eq!(sizes(&out), [47, 3]);
    assert_eq!(out.iter().flat_map(|item| item.segments.clone()).collect::<Vec<_>>(), packets);
    assert_eq!(sizes(&coalesce(&train(&Template::default(), &[10; 70]))), [64, 6]);
}

#[test]
fn a_pure_ack_travels_alone_and_keeps_its_place_in_the_flow() {
    let template = Template::default();
    let after = following(&template, 100);
    let ack = Template { identification: 1, ..after.clone() };
    let out = coalesce(&[template.tcp(&payload(100)), ack.tcp(&[]), after.tcp(&payload(100))]);
    assert_eq!(sizes(&out), [1, 1, 1]);
    assert_eq!(out[1].bytes.len(), 40);
}

#[test]
fn ip_options_and_fragments_travel_alone() {
    let with_options = Template { ip_options: vec![1, 1, 1, 0], ..Template::default() };
    assert_eq!(sizes(&coalesce(&train(&with_options, &[100, 100]))), [1, 1]);
    let [first, second] = pair(|_| {});
    let fragment = Template { fragment: MF, ..Template::default() }.ip(protocol::TCP, &payload(80));
    assert_eq!(sizes(&coalesce(&[fragment.clone(), fragment.clone()])), [1, 1]);
    assert_eq!(sizes(&coalesce(&[first, fragment, second])), [1, 1, 1], "and keep their place");
}

#[test]
fn datagrams_without_checksum_or_payload_or_with_a_trailer_travel_alone() {
    let template = Template::default();
    let mut unsummed = template.udp(&payload(100));
    put_u16(&mut unsummed, 26, 0);
    assert_eq!(sizes(&coalesce(&[unsummed.clone(), unsummed])), [1, 1]);
    assert_eq!(sizes(&coalesce(&[template.udp(&[]), template.udp(&[])])), [1, 1]);
    let trailing = template.ip(protocol::UDP, &[&template.udp(&payload(100))[20..], &[0, 0]].concat());
    assert_valid(&trailing);
    assert_eq!(sizes(&coalesce(&[trailing.clone(), trailing])), [1, 1]);
}

#[test]
fn a_wrong_transport_checksum_never_disappears_in_a_superpacket() {
    let mut bench = Bench::new(OPTIONS);
    let [first, mut second] = pair(|_| {});
    *second.last_mut().unwrap() ^= 1;
    bench.push(&first, 1).unwrap();
    assert_eq!(bench.push(&second, 1), Err(DropReason::BadTransportChecksum));
    let mut datagram = Template::default().udp(&payload(10));
    datagram[30] ^= 1;
    assert_eq!(bench.push(&datagram, 1), Err(DropReason::BadTransportChecksum));
    assert_eq!(sizes(&bench.drain()), [1]);
}

#[test]
fn packets_that_cannot_merge_are_verified_all_the_same() {
    let mut ack = Template::default().tcp(&[]);
    let mut segment = Template::default().tcp(b"data");
    for options in [OPTIONS, CoalesceOptions { enabled: false, udp: false }] {
        for packet in [&mut ack, &mut segment] {
            let mut bench = Bench::new(options);
            assert_eq!(bench.push(packet, 1), Ok(()));
            packet[36] ^= 1;
            assert_eq!(bench.push(packet, 1), Err(DropReason::BadTransportChecksum));
            packet[36] ^= 1;
        }
    }
}

#[test]
fn malformed_packets_are_refused_with_their_reason() {
    let mut bench = Bench::new(OPTIONS);
    assert_eq!(bench.push(&[], 1), Err(DropReason::Truncated));
    assert_eq!(bench.push(&[0x60; 40], 1), Err(DropReason::Ipv6));
    assert!(bench.coalescer.is_empty());
}

#[test]
fn padding_behind_the_packet_is_cut_off() {
    let [mut first, mut second] = pair(|_| {});
    let expected = [first.clone(), second.clone()];
    first.extend_from_slice(&[0; 12]);
    second.extend_from_slice(&[0; 12]);
    let out = coalesce(&[first, second]);
    assert_eq!(out[0].segments, expected);
}

#[test]
fn flows_interleave_and_come_out_in_the_order_of_their_first_packets() {
    let flows = [40_001, 40_002]
        .map(|port| train(&Template { ports: (port, 443), ..Template::default() }, &[100, 100, 100]));
    let packets: Vec<_> = (0..3).flat_map(|i| [flows[0][i].clone(), flows[1][i].clone()]).collect();
    let out = coalesce(&packets);
    assert_eq!(sizes(&out), [3, 3]);
    assert_eq!([&out[0].segments, &out[1].segments], [&flows[0], &flows[1]]);
}

#[test]
fn the_flow_that_was_idle_longest_makes_room() {
    let last = MAX_OPEN_FLOWS as u16;
    let flow = |port| train(&Template { ports: (port, 443), ..Template::default() }, &[100, 100, 100]);
    let mut packets: Vec<_> = (0..last).map(|port| flow(port)[0].clone()).collect();
    packets.push(flow(0)[1].clone()); // is not the one that was idle longest any more
    packets.push(flow(last)[0].clone());
    packets.push(flow(0)[2].clone());
    packets.push(flow(last)[1].clone());
    packets.push(flow(1)[1].clone()); // was closed
    let mut expected = vec![1; MAX_OPEN_FLOWS + 2];
    (expected[0], expected[MAX_OPEN_FLOWS]) = (3, 2);
    assert_eq!(sizes(&coalesce(&packets)), expected);
}

#[test]
fn nothing_continues_what_was_drained() {
    let mut bench = Bench::new(OPTIONS);
    for _ in 0..3 {
        for packets in train(&Template::default(), &[100; 6]).chunks(2) {
            bench.push(&packets[0], 1).unwrap();
            bench.push(&packets[1], 1).unwrap();
            assert_eq!(sizes(&bench.drain()), [2]);
            assert!(bench.coalescer.tails.is_empty() && bench.coalescer.open.is_empty());
        }
    }
}

#[test]
fn a_full_coalescer_says_so_and_is_empty_after_a_drain() {
    let mut bench = Bench::new(OPTIONS);
    let ack = Template::default().tcp(&[]);
    for _ in 0..MAX_ITEMS {
        bench.push(&ack, 1).unwrap();
    }
    assert!(bench.coalescer.is_full());
    assert_eq!(bench.push(&ack, 1), Err(DropReason::QueueFull));
    assert_eq!(bench.drain().len(), MAX_ITEMS);
    assert!(bench.coalescer.is_empty());
    let [first, second] = pair(|_| {});
    bench.used = 0;
    bench.push(&first, 1).unwrap();
    bench.push(&second, 1).unwrap();
    assert_eq!(sizes(&bench.drain()), [2]);
}

#[test]
fn a_superpacket_passes_through_with_its_metadata() {
    let mut bench = Bench::new(OPTIONS);
    let mut bytes = Template::default().tcp(&payload(300));
    let span = Span::new(0, 0..bytes.len());
    bench.arena.get_mut(span).copy_from_slice(&bytes);
    let offload = Offload {
        gso: Some(Gso { kind: GsoKind::Tcp4, segment_size: 100 }),
        checksum: ChecksumState::Partial,
    };
    let packet = Ipv4Packet::parse(&mut bytes, 0, offload).unwrap();
    bench.coalescer.push_packet(&packet, span, 1).unwrap();
    let out = bench.drain();
    assert_eq!((out[0].offload, out[0].segments.len()), (offload, 3));
}

#[test]
fn what_has_no_complete_checksum_is_never_merged() {
    let mut bench = Bench::new(OPTIONS);
    for mut bytes in train(&Template::default(), &[100, 100]) {
        let span = Span::new(0, bench.used..bench.used + bytes.len());
        bench.used += bytes.len();
        bench.arena.get_mut(span).copy_from_slice(&bytes);
        let offload = Offload { gso: None, checksum: ChecksumState::Partial };
        let packet = Ipv4Packet::parse(&mut bytes, 0, offload).unwrap();
        bench.coalescer.push_packet(&packet, span, 1).unwrap();
    }
    assert_eq!(sizes(&bench.drain()), [1, 1]);
}

/// Something that a flow may send, by a number that stands for how it differs from the ordinary.
fn unusual(template: &mut Template, what: u8) {
    match what {
        0 => template.flags |= tcp_flags::PSH,
        1 => template.flags |= tcp_flags::FIN,
        2 => template.flags |= tcp_flags::CWR,
        3 => template.window ^= 1,
        4 => template.tcp_options = TIMESTAMPS.to_vec(),
        5 => template.sequence = template.sequence.wrapping_sub(50),
        6 => template.identification ^= 2,
        7 => template.ip_options = vec![1; 4],
        8 => template.fragment = 0,
        9 => template.tos ^= 1,
        _ => {}
    }
}

proptest! {
    #[test]
    fn splitting_again_gives_back_the_segments_of_every_flow_in_order(
        packets in proptest::collection::vec((0u16..3, any::<bool>(), prop_oneof![Just(0usize), Just(100), Just(536), 1usize..600], 0u8..60, 0u32..2), 1..120)
    ) {
        let mut bench = Bench::new(OPTIONS);
        let mut templates = [0u16, 1, 2].map(|port| Template { ports: (port, 9), ..Template::default() });
        let mut sent = Vec::new();
        for (flow, udp, len, what, tag) in packets {
            let mut template = templates[usize::from(flow)].clone();
            unusual(&mut template, what);
            let packet = if udp { template.udp(&payload(len)) } else { template.tcp(&payload(len)) };
            templates[usize::from(flow)] = following(&templates[usize::from(flow)], len);
            bench.push(&packet, tag).unwrap();
            sent.push((udp, flow, tag, packet));
        }
        let out = bench.drain();
        for udp in [false, true] {
            for flow in 0u16..3 {
                for tag in 0..2 {
                    let number = if udp { protocol::UDP } else { protocol::TCP };
                    let expected: Vec<_> =
                        sent.iter().filter(|s| (s.0, s.1, s.2) == (udp, flow, tag)).map(|s| atomic(&s.3)).collect();
                    let got: Vec<_> = out
                        .iter()
                        .filter(|item| item.tag == tag)
                        .flat_map(|item| &item.segments)
                        .filter(|s| {
                            let at = usize::from(s[0] & 15) * 4;
                            s[9] == number && s[at..at + 2] == flow.to_be_bytes()
                        })
                        .map(|segment| atomic(segment))
                        .collect();
                    prop_assert_eq!(got, expected);
                }
            }
        }
    }

    #[test]
    fn coalescing_the_segments_gives_back_the_superpacket(
        len in 1usize..60_000, segment_size in 1000u16..1460, udp in any::<bool>(), psh in any::<bool>(),
        options in 0usize..10, identification in any::<u16>(), fragment in prop_oneof![Just(0), Just(DF)]
    ) {
        let template = Template {
            identification, fragment,
            flags: tcp_flags::ACK | if psh { tcp_flags::PSH } else { 0 },
            tcp_options: vec![1; 4 * options],
            ..Template::default()
        };
        let (mut bytes, kind) = if udp {
            (template.udp(&payload(len)), GsoKind::Udp4)
        } else {
            (template.tcp(&payload(len)), GsoKind::Tcp4)
        };
        let partial = Template::default();
        let at = if udp { 26 } else { 36 };
        let length = (bytes.len() - 20) as u16;
        let sum = checksum::pseudo_header(partial.source, partial.destination, bytes[9], length).partial();
        if len > usize::from(segment_size) {
            put_u16(&mut bytes, at, sum);
        }
        let before = bytes.clone();
        let offload = Offload { gso: Some(Gso { kind, segment_size }), checksum: ChecksumState::Partial };
        let packet = Ipv4Packet::parse(&mut bytes, 0, offload).unwrap();
        let mut segments = Segments::whole(&packet);
        let mut bench = Bench::new(OPTIONS);
        let mut out = vec![0; segments.max_segment_len()];
        while let Some(len) = segments.next_into(&mut out) {
            bench.push(&out[..len], 7).unwrap();
        }
        let out = bench.drain();
        prop_assert_eq!(out.len(), 1);
        prop_assert_eq!(&out[0].bytes, &before);
        if len > usize::from(segment_size) {
            prop_assert_eq!(out[0].offload, offload);
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(packets in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..200), 0..20)) {
        let mut bench = Bench::new(OPTIONS);
        for mut packet in packets {
            if packet.len() >= 60 {
                packet[0] = 0x45 | (packet[0] & 2);
                packet[6..8].fill(0);
                packet[9] = if packet[9] & 1 == 0 { protocol::TCP } else { protocol::UDP };
                packet[2] = 0;
                packet[3] = packet[3].min(packet.len() as u8);
                packet[32] = 0x50 | packet[32] & 0x70;
                packet[33] = 0x10;
                mend_header_checksum(&mut packet);
            }
            bench.push(&packet, 1).ok(); // taken or refused with a reason: here only a panic counts
        }
        bench.drain();
    }
}

/// The packet without its identification if that means nothing, since it is renumbered then (RFC 6864 §4).
fn atomic(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    if packet[6] & DONT_FRAGMENT != 0 {
        put_u16(&mut packet, 4, 0);
        mend_header_checksum(&mut packet);
    }
    packet
}
