//! Streams of TCP whose segments are lost, repeated, overtaken and damaged on their way to us, or differ in what must
//! not be merged. Merging and splitting is invisible: what comes out is what went in, segment by segment and in order,
//! without what was damaged.

use std::net::SocketAddrV4;

use proptest::prelude::*;
use tidegate_engine::drop_reason::DropReason;
use tidegate_engine::wire::CoalesceOptions;

use super::faults::{Faults, OnWire, Random, wire};
use super::flow::{Flow, HTTPS, SACK, TIMESTAMPS};
use super::link::Link;
use super::packets::*;
use super::world::*;

const URG: u8 = 0x20;
const MSS: usize = 1_360;
const STREAM: usize = 150_000;
/// Rounds after which a sender that repeats what is missing must be done.
const ROUNDS: usize = 60;
/// Packets that are under way together, so that a turn finds neighbours to merge.
const BURST: usize = 16;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    Up,
    Down,
}

fn streaming(coalesce: bool, link: Link) -> (World, Flow) {
    let coalesce = CoalesceOptions { enabled: coalesce, ..CoalesceOptions::default() };
    let mut world = World::of(Plan { coalesce, link, ..Plan::default() }).connected();
    let flow = Flow::open(&mut world, 0, 50_000, HTTPS);
    (world, flow)
}

/// One turn of packets from a client's kernel, or from the internet, and what arrives at the other end.
fn pass(world: &mut World, way: Way, packets: &[OnWire]) -> Vec<Ip> {
    for burst in packets.chunks(BURST) {
        for packet in burst {
            match way {
                Way::Up => world.send_bytes(0, &packet.bytes, [0; 10]),
                Way::Down => world.arrive_bytes(packet.bytes.clone(), [0; 10]),
            }
        }
        world.settle();
    }
    match way {
        Way::Up => world.take_outside(),
        Way::Down => world.take(0),
    }
}

/// A packet as the other end sees it: translated, one hop on, and without the identification, which means nothing with
/// DF (RFC 6864 §4).
fn as_it_arrives(sent: &OnWire, from: SocketAddrV4, to: SocketAddrV4) -> Ip {
    let mut packet = Ip::verify(&sent.bytes);
    (packet.source, packet.destination, packet.ttl) = (*from.ip(), *to.ip(), packet.ttl - 1);
    put(&mut packet.body, 0, from.port());
    put(&mut packet.body, 2, to.port());
    packet.identification = 0;
    packet.summed()
}

fn ends(way: Way, flow: &Flow) -> (SocketAddrV4, SocketAddrV4) {
    match way {
        Way::Up => (flow.external, flow.remote),
        Way::Down => (flow.remote, flow.local),
    }
}

fn assert_arrived(arrived: Vec<Ip>, sent: &[OnWire], (from, to): (SocketAddrV4, SocketAddrV4)) {
    let sound = sent.iter().filter(|packet| packet.is_sound);
    let expected: Vec<Ip> = sound.map(|packet| as_it_arrives(packet, from, to)).collect();
    let arrived: Vec<Ip> = arrived.into_iter().map(|ip| ip.with(|ip| ip.identification = 0)).collect();
    for (n, (arrived, expected)) in arrived.iter().zip(&expected).enumerate() {
        assert_eq!(arrived, expected, "packet {n}");
    }
    assert_eq!(arrived.len(), expected.len());
}

/// Segments of `data` as a capricious sender makes them.
fn capricious(way: Way, flow: &Flow, data: &[u8], seed: u64) -> Vec<Ip> {
    let mut random = Random::seeded(seed);
    let (mut flow, mut rest) = (flow.clone(), data);
    let mut segments = Vec::new();
    let mut size = MSS;
    while !rest.is_empty() {
        if random.chance(10) {
            size = [MSS, 536, 1 + random.below(MSS)][random.below(3)];
        }
        if random.chance(10) {
            flow.options = match random.below(4) {
                0 => Vec::new(),
                1 => SACK.to_vec(),
                _ => TIMESTAMPS.iter().copied().chain([1, 1, 1, 0]).collect(),
            };
        }
        if let (true, Some(clock)) = (random.chance(10), flow.options.get_mut(7)) {
            *clock = clock.wrapping_add(1); // the sender's clock ticks, within a train or not
        }
        if random.chance(5) {
            flow.tos = [0, 0b01, 0b10, 0b11][random.below(4)]; // RFC 3168 §5: CE is 0b11
        }
        let oddity = if random.chance(15) {
            [PSH, URG, ECE, CWR, ECE | CWR, FIN | PSH, PSH | URG][random.below(7)]
        } else {
            0
        };
        let (chunk, remaining) = rest.split_at(rest.len().min(size));
        let mut segment = match way {
            Way::Up => flow.segment_up(ACK | oddity, chunk),
            Way::Down => flow.segment_down(ACK | oddity, chunk),
        };
        if oddity & URG != 0 || random.chance(3) {
            put(&mut segment.body, 18, 1); // the urgent pointer, which means nothing without URG
        }
        if random.chance(5) {
            put(&mut segment.body, 14, random.below(65_536) as u16); // another window
        }
        segments.push(segment.summed());
        match way {
            Way::Up => flow.up += chunk.len() as u32,
            Way::Down => flow.down += chunk.len() as u32,
        }
        rest = remaining;
    }
    segments
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn segments_come_out_as_they_went_in_whatever_happened_to_them_before(
        seed in 1u64..,
        up: bool,
        coalesce: bool,
    ) {
        let way = if up { Way::Up } else { Way::Down };
        let (mut world, flow) = streaming(coalesce, Link::perfect());
        let segments = capricious(way, &flow, &payload(STREAM), seed);
        let sent: Vec<OnWire> = wire(&segments)
            .losing(5, seed ^ 1)
            .repeating(5, seed ^ 2)
            .overtaking(5, seed ^ 3)
            .damaging(5, seed ^ 4)
            .collect();
        let before = world.device_packets;
        let arrived = pass(&mut world, way, &sent);
        let crossed = world.device_packets - before;
        prop_assert!(!coalesce || crossed < arrived.len(), "{crossed} for {} segments", arrived.len());
        assert_arrived(arrived, &sent, ends(way, &flow));

        let drops = world.drops();
        let damaged = sent.iter().filter(|packet| !packet.is_sound).count() as u64;
        prop_assert_eq!(drops.values().sum::<u64>(), damaged, "each counted once: {:?}", drops);
    }

    #[test]
    fn a_stream_that_is_repeated_until_it_is_complete_has_never_a_wrong_byte(seed in 1u64.., coalesce: bool) {
        let (mut world, flow) = streaming(coalesce, Link::seeded(seed));
        let link = &mut world.link;
        (link.loss, link.duplication, link.corruption, link.shuffles) = (5, 3, 3, true);
        let data = payload(STREAM);
        for way in [Way::Up, Way::Down] {
            let segments = capricious(way, &flow, &data, seed);
            let mut receiver = Receiver::new(if way == Way::Up { flow.up } else { flow.down }, data.len());
            for round in 0..ROUNDS as u64 {
                let missing: Vec<Ip> =
                    segments.iter().filter(|segment| !receiver.has(segment)).cloned().collect();
                if missing.is_empty() {
                    break;
                }
                let salt = seed ^ (round << 8);
                let sent: Vec<OnWire> = wire(&missing)
                    .losing(10, salt ^ 1)
                    .repeating(5, salt ^ 2)
                    .overtaking(20, salt ^ 3)
                    .damaging(10, salt ^ 4)
                    .collect();
                pass(&mut world, way, &sent).iter().for_each(|segment| receiver.take(segment));
            }
            prop_assert!(receiver.bytes() == Some(&data[..]), "every byte, and the right one ({way:?})");
        }
    }
}

/// The receiving end of a TCP: puts segments where their sequence numbers say, and believes the first that comes.
struct Receiver {
    start: u32,
    bytes: Vec<u8>,
    has: Vec<bool>,
}

impl Receiver {
    fn new(start: u32, len: usize) -> Self {
        Self { start, bytes: vec![0; len], has: vec![false; len] }
    }

    fn place(&self, segment: &Ip) -> std::ops::Range<usize> {
        let at = segment.tcp_header().sequence.wrapping_sub(self.start) as usize;
        at..at + segment.data().len()
    }

    fn take(&mut self, segment: &Ip) {
        for (at, &byte) in self.place(segment).zip(segment.data()) {
            if !std::mem::replace(&mut self.has[at], true) {
                self.bytes[at] = byte;
            }
        }
    }

    fn has(&self, segment: &Ip) -> bool {
        self.has[self.place(segment)].iter().all(|&has| has)
    }

    /// Everything, if nothing is missing.
    fn bytes(&self) -> Option<&[u8]> {
        self.has.iter().all(|&has| has).then_some(&self.bytes)
    }
}

#[test]
fn a_damaged_segment_in_the_midst_of_a_train_is_dropped_and_its_neighbours_are_merged() {
    for way in [Way::Up, Way::Down] {
        for at in 0..10 {
            let (mut world, mut flow) = streaming(true, Link::perfect());
            let segments: Vec<Ip> = (0..10)
                .map(|_| match way {
                    Way::Up => {
                        flow.up += MSS as u32;
                        flow.segment_up(ACK, &payload(MSS))
                    }
                    Way::Down => {
                        flow.down += MSS as u32;
                        flow.segment_down(ACK, &payload(MSS))
                    }
                })
                .collect();
            let mut sent: Vec<OnWire> = wire(&segments).collect();
            let last = sent[at].bytes.len() - 1;
            sent[at].bytes[last] ^= 0x40;
            sent[at].is_sound = false;
            let before = world.device_packets;
            let arrived = pass(&mut world, way, &sent);
            assert_arrived(arrived, &sent, ends(way, &flow));
            assert_eq!(world.drops(), [(DropReason::BadTransportChecksum.name(), 1)].into(), "{way:?}");
            assert!(world.device_packets - before <= 4, "{way:?}: merged before and behind it");
        }
    }
}

#[test]
fn damage_that_came_from_outside_is_passed_on_as_damage_and_never_mended() {
    let (mut world, flow) = streaming(false, Link::perfect());
    for mut damaged in [flow.segment_down(ACK, &payload(1_000)), flow.segment_down(ACK | PSH, b"short")] {
        *damaged.body.last_mut().unwrap() ^= 1;
        // The NAT changes the checksum by what it changes itself (RFC 1624): it stays wrong, and the client finds it.
        world.dies(DropReason::BadTransportChecksum, |world| world.arrive(&damaged));
    }
}
