//! One packet or many through the header view, the splitter and the coalescer.
//!
//! A view that was made is consistent, rewriting keeps right what was right, the pieces of a superpacket are packets
//! with right checksums, and what the coalescer gathers, split again, is what was pushed: every byte of it, in the
//! order of each flow.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use tidegate_engine::arena::{Arena, Span};
use tidegate_engine::drop_reason::DropReason;
use tidegate_engine::wire::{
    ChecksumState, CoalesceOptions, Coalescer, Ipv4Packet, Offload, Segments, SegmentsInPlace, Transport,
    VirtioNetHeader,
};

use super::packets::{TCP, UDP, mend};
use super::script::Script;

/// Follows the script.
pub fn run(input: &[u8]) {
    let mut script = Script::new(input);
    match script.byte() % 2 {
        0 => one_packet(script),
        _ => many_packets(script),
    }
}

// ---- One packet, with whatever offload metadata.

/// What a tunnel carried in one packet.
fn check_segments(segments: Option<Vec<Vec<u8>>>) {
    for mut segment in segments.into_iter().flatten() {
        let len = segment.len();
        let total_len = Ipv4Packet::parse(&mut segment, 0, Offload::NONE).map(|packet| packet.total_len());
        assert_eq!(total_len, Ok(len));
    }
}

fn one_packet(mut script: Script<'_>) {
    let is_mended = script.byte() % 4 != 0;
    let virtio = match script.byte() % 2 {
        0 => VirtioNetHeader::default(),
        _ => VirtioNetHeader::from_bytes(std::array::from_fn(|_| script.byte())),
    };
    let (in_tail, address, port) = (usize::from(script.word()), script.word(), script.word());
    let mut bytes = script.bytes(usize::MAX);
    if is_mended {
        mend(&mut bytes);
    }
    let Some(offload) = virtio.offload_of(&mut bytes) else {
        return check_segments(virtio.split_encapsulated(&bytes));
    };
    let in_head = bytes.len().saturating_sub(in_tail);
    let (head, tail) = bytes.split_at_mut(in_head);
    let Ok(mut packet) = Ipv4Packet::parse(head, tail.len(), offload) else { return };
    check_view(&packet);
    // The checksum can be looked at where the payload is at hand.
    let right = tail.is_empty() && packet.transport_checksum_ok();
    let address = Ipv4Addr::from(0xc633_0000 | u32::from(address));
    packet.rewrite_source(address, port);
    packet.rewrite_destination(address, port);
    assert_eq!((packet.source(), packet.destination()), (address, address));
    assert!(packet.ports().is_none_or(|ports| ports == (port, port)));
    packet.rewrite_source_address(Ipv4Addr::BROADCAST);
    packet.rewrite_destination_address(Ipv4Addr::UNSPECIFIED);
    packet.set_identification(port);
    let ttl = packet.ttl();
    assert_eq!(packet.decrement_ttl().is_ok(), ttl > 1);
    if tail.is_empty() && offload.checksum == ChecksumState::Complete {
        assert_eq!(packet.transport_checksum_ok(), right, "rewriting keeps right what was right");
    }
    let shape = packet.shape();
    let header = VirtioNetHeader::for_packet(&packet, 14);
    assert_eq!(VirtioNetHeader::from_bytes(header.to_bytes()), header);

    let mut segments = Segments::new(&*head, shape, [&*tail]);
    let (count, max) = (segments.segment_count(), segments.max_segment_len());
    let mut out = vec![0; max];
    let (mut written, mut payload) = (0, 0);
    let mut one_piece = [&*head, &*tail].concat();
    let mut in_place = SegmentsInPlace::new(&mut one_piece, shape);
    while let Some(len) = segments.next_into(&mut out) {
        assert_eq!(in_place.next_segment(), Some(&out[..len]), "in one piece or in two, it is the same");
        assert!(len <= max);
        written += 1;
        payload += len - shape.headers_len();
        let segment = Ipv4Packet::parse(&mut out[..len], 0, Offload::NONE).expect("well-formed");
        assert!(shape.gso().is_none() || segment.transport_checksum_ok(), "a segment's checksum");
    }
    assert_eq!(in_place.next_segment(), None);
    assert_eq!((written, payload), (count, shape.payload_len()), "every byte, in as many segments as said");

    drop(segments);
    let mut whole = [&*head, &*tail].concat();
    let before = whole.clone();
    if let Ok(mut packet) = Ipv4Packet::parse(&mut whole, 0, offload) {
        packet.complete_checksum();
        let has_ports = packet.ports().is_some();
        assert!(!has_ports || offload.checksum == ChecksumState::Complete || packet.transport_checksum_ok());
        assert!(has_ports || packet.head() == &before[..packet.total_len()], "ICMP's is never partial");
    }
}

fn check_view(packet: &Ipv4Packet<'_>) {
    let headers = packet.header_len() + packet.transport_header_len();
    assert!(headers <= packet.head().len(), "all headers are in the head");
    assert_eq!(headers + packet.transport_payload_len(), packet.total_len());
    assert_eq!(
        packet.ports().is_some(),
        matches!(packet.transport(), Transport::Tcp { .. } | Transport::Udp)
    );
    assert_eq!(packet.tcp().is_some(), matches!(packet.transport(), Transport::Tcp { .. }));
    assert_eq!(packet.icmp_identifier().is_some(), packet.icmp_type_code().is_some());
    assert!(!packet.is_fragment() || packet.transport() == Transport::Other);
}

// ---- Many packets, gathered and split again.

/// Whose packet, and of which flow: addresses, protocol, ports.
type Flow = (u8, [u8; 8], u8, Option<(u16, u16)>);

fn many_packets(mut script: Script<'_>) {
    let flags = script.byte();
    let options = CoalesceOptions { enabled: flags & 1 == 0, udp: flags & 2 != 0 };
    let mut coalescer = Coalescer::new(options);
    let mut arena = Arena::new(1);
    let (mut used, mut items) = (0, 0);
    let mut pushed: BTreeMap<Flow, Vec<Vec<u8>>> = BTreeMap::new();
    let mut last: Vec<u8> = Vec::new();
    while !script.is_over() {
        let (op, tag) = (script.byte(), script.byte() % 2);
        let mut bytes = if op & 1 == 0 { script.some_bytes(128) } else { successor(&last, &mut script) };
        if op & 2 == 0 {
            mend(&mut bytes);
        }
        let span = Span::new(0, used..used + bytes.len());
        let Some(room) = arena.buffer_mut(0).get_mut(span.range()) else { break };
        room.copy_from_slice(&bytes);
        used += bytes.len();
        items += 1;
        last.clone_from(&bytes);
        match coalescer.push(&mut arena, span, tag) {
            Ok(()) => {
                let packet = Ipv4Packet::parse(&mut bytes, 0, Offload::NONE).expect("it was taken");
                pushed.entry(flow_of(&packet, tag)).or_default().push(normal(&packet));
            }
            Err(DropReason::QueueFull) => assert!(coalescer.is_full()),
            Err(_) => {}
        }
        assert!(coalescer.len() <= items);
    }
    let mut split: BTreeMap<Flow, Vec<Vec<u8>>> = BTreeMap::new();
    coalescer.drain(&mut arena, |arena, gathered| {
        let packet = Ipv4Packet::parse(arena.get_mut(gathered.head), gathered.tail_len, gathered.offload);
        let shape = packet.expect("what was gathered is well-formed").shape();
        let tails = gathered.tails.iter().map(|&tail| arena.get(tail));
        let mut segments = Segments::new(arena.get(gathered.head), shape, tails);
        assert_eq!(segments.segment_count(), 1 + gathered.tails.len());
        let mut out = vec![0; segments.max_segment_len()];
        while let Some(len) = segments.next_into(&mut out) {
            let packet = Ipv4Packet::parse(&mut out[..len], 0, Offload::NONE).expect("well-formed");
            split.entry(flow_of(&packet, gathered.tag)).or_default().push(normal(&packet));
        }
    });
    assert!(coalescer.is_empty());
    assert_eq!(pushed, split);
}

/// The packet that continues `last`, but for the payload's length and what the script does to it.
fn successor(last: &[u8], script: &mut Script<'_>) -> Vec<u8> {
    let mut bytes = last.to_vec();
    let (change, at) = (script.byte(), usize::from(script.byte()));
    if bytes.len() < 20 {
        return bytes;
    }
    let header_len = usize::from(bytes[0] & 15) * 4;
    let identification = u16::from_be_bytes([bytes[4], bytes[5]]).wrapping_add(1);
    bytes[4..6].copy_from_slice(&identification.to_be_bytes());
    if bytes[9] == TCP && bytes.len() >= header_len + 20 {
        let tcp = &mut bytes[header_len..];
        let payload = tcp.len().saturating_sub(usize::from(tcp[12] >> 4) * 4) as u32;
        let sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]).wrapping_add(payload);
        tcp[4..8].copy_from_slice(&sequence.to_be_bytes());
    }
    match change % 4 {
        // One byte is another.
        0 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= change | 1;
            }
        }
        // Some bytes fewer.
        1 => bytes.truncate(bytes.len().saturating_sub(at % 8)),
        _ => {}
    }
    if bytes.get(9) == Some(&UDP) && bytes.len() >= header_len + 8 {
        let length = (bytes.len() - header_len) as u16;
        bytes[header_len + 4..header_len + 6].copy_from_slice(&length.to_be_bytes());
    }
    bytes
}

fn flow_of(packet: &Ipv4Packet<'_>, tag: u8) -> Flow {
    let mut addresses = [0; 8];
    addresses.copy_from_slice(&packet.head()[12..20]);
    (tag, addresses, packet.protocol(), packet.ports())
}

/// The bytes, without what may change on the way: the identification of atomic datagrams (RFC 6864 §4), and how a
/// checksum is written down whose sum is zero.
fn normal(packet: &Ipv4Packet<'_>) -> Vec<u8> {
    let mut bytes = packet.head().to_vec();
    bytes[10..12].fill(0);
    if packet.is_atomic() {
        bytes[4..6].fill(0);
    }
    let at = packet.header_len() + if packet.protocol() == TCP { 16 } else { 6 };
    let has_checksum = match packet.transport() {
        Transport::Tcp { .. } => true,
        Transport::Udp => bytes[at..at + 2] != [0, 0],
        Transport::Icmp | Transport::Other => false,
    };
    if has_checksum && packet.transport_checksum_ok() {
        bytes[at..at + 2].fill(0xff);
    }
    bytes
}
