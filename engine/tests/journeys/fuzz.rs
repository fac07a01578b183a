//! Random walks: anything at every entrance, between honest traffic and the passing of time. Nothing panics, nothing
//! goes round in circles, nobody gets what is not theirs, and when all is quiet nothing is left.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use tidegate_engine::access_policy::AccessPolicy;
use tidegate_engine::drop_reason::DropReason;
use tidegate_engine::handoffs::Handoff;
use tidegate_engine::messages::Command;
use tidegate_engine::nat::{NatConfig, Proto};
use tidegate_engine::wire::{ChecksumState, Ecn, Gso, GsoKind, Offload};

use super::link::Link;
use super::packets::*;
use super::world::*;

const WALKS: u32 = 200;
/// So few that they are reached.
const MAX_MAPPINGS: usize = 16;
const MAX_MAPPINGS_PER_CLIENT: usize = 10;
const PORTS: (u16, u16) = (40_000, 40_015);
/// What no walk here comes to: it takes floods, or two clients on the last port, or a router that sends back, or a
/// kernel, or the loop around the core.
const OUT_OF_REACH: [DropReason; 16] = [
    DropReason::CookieRequired,
    DropReason::HandshakeRateLimited,
    DropReason::NoRandomness,
    DropReason::OwnDatagram,
    DropReason::NoRoute,
    DropReason::ClientDnsRate,
    DropReason::SharedPortTaken,
    DropReason::ClientMappingRate,
    DropReason::ClientShare,
    DropReason::FragmentLimit,
    DropReason::QueueFull,
    DropReason::QueueDelay,
    DropReason::QueueShare,
    DropReason::SendFailed,
    DropReason::ReceiveFailed,
    DropReason::ReceiveOverrun,
];

#[derive(Clone, Copy, Debug)]
enum Step {
    /// A datagram at the gateway's socket, and at a client's.
    Strike,
    StrikeClient,
    /// A datagram that was sent before, as it was or damaged.
    Replay,
    /// An arbitrary packet under a client's session.
    Sealed,
    /// An arbitrary packet from a client's kernel, the host's, the network card.
    Send,
    FromHost,
    Arrive,
    Arp,
    Cross,
    Honest,
    Command,
    Pass,
}

fn steps() -> impl Strategy<Value = Vec<(Step, u64)>> {
    use Step::{
        Arp, Arrive, Command, Cross, FromHost, Honest, Pass, Replay, Sealed, Send, Strike, StrikeClient,
    };
    let kinds = [Strike, StrikeClient, Replay, Sealed, Sealed, Sealed, Sealed, Send, Send, FromHost]
        .into_iter()
        .chain([Arrive, Arrive, Arrive, Arrive, Arp, Cross, Honest, Honest, Command, Pass]);
    let kind = prop::sample::select(kinds.collect::<Vec<_>>());
    prop::collection::vec((kind, 1u64..), 1..150)
}

#[test]
fn anything_at_every_entrance_neither_panics_nor_harms_nor_stays() {
    let config = Config { cases: WALKS, failure_persistence: None, ..Config::default() };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let strategy = (1u8..3, steps());
    let reached = RefCell::new(BTreeSet::new());
    let result = TestRunner::new_with_rng(config, rng).run(&strategy, |(shards, steps)| {
        reached.borrow_mut().extend(walk(shards, &steps));
        Ok(())
    });
    result.unwrap();
    let all = DropReason::ALL.iter().filter(|reason| !OUT_OF_REACH.contains(reason));
    let missed: Vec<_> = all.filter(|reason| !reached.borrow().contains(reason.name())).collect();
    assert!(missed.is_empty(), "walks that never come to {missed:?} prove little");
}

/// Takes a walk, and returns the reasons for which packets died on it.
fn walk(shards: u8, steps: &[(Step, u64)]) -> Vec<&'static str> {
    let nat = NatConfig {
        max_mappings: MAX_MAPPINGS,
        max_mappings_per_client: MAX_MAPPINGS_PER_CLIENT,
        max_sessions_per_mapping: 3,
        ..NatConfig::default()
    };
    let port_range = PORTS;
    let mut world =
        World::of(Plan { shards, nat, port_range, link: Link::seeded(7), ..Plan::default() }).connected();
    world.is_strict = false;
    let mut recorded = world.record(|world| world.ping(0, SERVER));
    let mut published = 0;
    for &(step, seed) in steps {
        let mut dice = Dice(seed);
        take_step(&mut world, step, &mut dice, &mut recorded, &mut published);
        world.settle();
        let mappings = world.mappings();
        assert!(mappings <= MAX_MAPPINGS + usize::from(shards) + published, "{mappings} mappings");
        (0..3).for_each(|client| drop(world.take(client)));
        world.take_outside();
        world.host.clear();
    }
    world.pass(Duration::from_secs(3 * 3600));
    assert_eq!(world.next_wakeup(), None, "nothing is left to wait for");
    assert!(world.mappings() <= published, "{} mappings are left", world.mappings());
    let reached = world.drops().into_keys().collect();
    // And it works as on the first day.
    world.all_datagrams_to = None;
    world.arp_is_silent = false;
    world.is_strict = true;
    world.set_router(ROUTER);
    world.tell_all(|| Command::SetAccess(AccessPolicy::default()));
    world.set_peer(1, world.home_of(1) as u8);
    world.take(1);
    world.ping(1, SERVER);
    world.pass(Duration::from_secs(20));
    world.ping(1, SERVER);
    assert!(world.take(1).iter().any(|packet| packet.source == SERVER), "it still works");
    reached
}

fn take_step(
    world: &mut World,
    step: Step,
    dice: &mut Dice,
    recorded: &mut Vec<Train>,
    published: &mut usize,
) {
    let client = dice.below(3);
    match step {
        Step::Strike => {
            let datagram = dice.datagram();
            let size = 1 + dice.below(datagram.len().max(1));
            world.strike(endpoint([192, 0, 2, 66].into(), 1), datagram, size);
        }
        Step::StrikeClient => world.strike_client(client, dice.datagram()),
        Step::Replay => {
            let train = dice.choose(recorded).clone();
            let mut datagram = train.bytes;
            datagram.truncate(1 + dice.below(datagram.len()));
            if dice.below(2) == 0 {
                let at = dice.below(datagram.len());
                datagram[at] ^= 1 << dice.below(8);
            }
            let size = if dice.below(2) == 0 { train.segment_size } else { 1 + dice.below(datagram.len()) };
            world.strike(train.from, datagram, size);
        }
        Step::Sealed => {
            world.ping(client, GATEWAY); // so that there is a session, unless the peer was removed
            let packet = dice.packet(client_address(client));
            world.link.ecn = *dice.choose(&[Ecn::NotEct, Ecn::Ect0, Ecn::Ect1, Ecn::Ce]);
            world.seal_if_possible(client, &packet);
            world.link.ecn = Ecn::NotEct;
        }
        Step::Send => {
            let (packet, virtio) = (dice.packet(client_address(client)), dice.virtio());
            world.send_bytes(client, &packet, virtio);
        }
        Step::FromHost => {
            let (packet, virtio) = (dice.packet(GATEWAY), dice.virtio());
            world.send_from_host_bytes(&packet, virtio);
        }
        Step::Arrive => {
            let source = dice.address();
            let (packet, virtio) = (dice.packet(source), dice.virtio());
            world.arrive_bytes(packet, virtio);
        }
        Step::Arp => {
            let mut frame = arp_reply(*dice.choose(&[ROUTER, NEIGHBOUR, EXTERNAL])).to_vec();
            if dice.below(2) == 0 {
                let at = dice.below(frame.len());
                frame[at] ^= dice.byte();
            }
            // Link addresses stay true: the world checks to whom packets go.
            frame[22..28].copy_from_slice(&arp_reply(ROUTER)[22..28]);
            frame[28..32].copy_from_slice(&ROUTER.octets());
            frame.truncate(1 + dice.below(60));
            world.arp(dice.below(world.shards.len()), frame);
        }
        Step::Cross => {
            let shard = dice.below(world.shards.len());
            let handoff = match dice.below(3) {
                0 => Handoff::Initiation {
                    from: endpoint([192, 0, 2, 66].into(), 1).into(),
                    datagram: dice.datagram(),
                },
                1 => Handoff::ToPeer {
                    packet: dice.packet(SERVER),
                    offload: dice.offload(),
                    client: client_address(0),
                },
                _ => Handoff::Inbound { packet: dice.packet(SERVER), offload: dice.offload(), client: None },
            };
            world.cross(shard, handoff);
        }
        Step::Honest => {
            let trains = world.record(|world| {
                for _ in 0..1 + dice.below(12) {
                    let from = endpoint(client_address(client), 5_000 + dice.below(12) as u16);
                    let to = endpoint(SERVER, ECHO_PORT + dice.below(20) as u16);
                    world.send(client, &Ip::udp(from, to, &payload(900)));
                }
            });
            if !trains.is_empty() {
                *recorded = trains;
            }
        }
        Step::Command => command(world, dice, client, published),
        Step::Pass => {
            world.arp_is_silent = dice.below(4) == 0; // from now on
            let seconds = *dice.choose(&[0, 1, 5, 15, 16, 60, 121, 200, 301, 8_000]);
            world.pass(Duration::from_secs(seconds) + Duration::from_millis(dice.below(1_000) as u64));
        }
    }
}

fn command(world: &mut World, dice: &mut Dice, client: usize, published: &mut usize) {
    match dice.below(8) {
        0 => world.remove_peer(client),
        1..4 => world.set_peer(client, world.home_of(client) as u8),
        4 => {
            let (protocol, port) = (*dice.choose(&[Proto::Tcp, Proto::Udp]), 40_000 + dice.below(40) as u16);
            *published += 1;
            world.publish(protocol, port, endpoint(client_address(client), 80 + dice.below(4) as u16)).ok();
        }
        5 => world.set_router([203, 0, 113, 1 + dice.below(2) as u8].into()),
        6 if dice.below(2) == 0 => world.link.shuffles = !world.link.shuffles,
        6 => {
            let between_clients = dice.below(2) == 0;
            let denied = dice.choose(&["10.0.0.0/8", "203.0.113.0/24", "198.51.100.7/32"]).parse().unwrap();
            world.tell_all(|| Command::SetAccess(AccessPolicy::new(between_clients, vec![denied])));
        }
        _ => world.all_datagrams_to = *dice.choose(&[None, None, Some(0)]),
    }
}

/// All that a step decides, drawn from its seed (xorshift64, Marsaglia 2003): so a walk shrinks to the steps that
/// matter.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.roll() >> 33) as usize % limit
    }

    fn byte(&mut self) -> u8 {
        (self.roll() >> 40) as u8
    }

    fn choose<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.byte()).collect()
    }

    /// Mostly of the right type and length.
    fn datagram(&mut self) -> Vec<u8> {
        let len = *self.choose(&[0, 1, 3, 32, 60, 64, 92, 148, 200, 1_400]);
        let mut datagram = self.bytes(len);
        if let Some(header) = datagram.first_chunk_mut::<4>() {
            *header = [*self.choose(&[1, 2, 3, 4, 5]), 0, 0, 0];
        }
        if len > 8 {
            datagram[4] = *self.choose(&[0, 1, 2, 255]);
        }
        datagram
    }

    fn address(&mut self) -> Ipv4Addr {
        let known = [SERVER, ROUTER, NEIGHBOUR, EXTERNAL, GATEWAY, client_address(0), client_address(1)];
        let odd = [client_address(200), Ipv4Addr::BROADCAST, Ipv4Addr::UNSPECIFIED, [224, 0, 0, 1].into()];
        let random = Ipv4Addr::from((self.roll() >> 32) as u32);
        *self.choose(&[&known[..], &known, &odd, &[random]].concat())
    }

    /// Much like a packet: each of its fields is right more often than not.
    fn packet(&mut self, source: Ipv4Addr) -> Vec<u8> {
        let destination =
            if self.below(3) == 0 { self.address() } else { *self.choose(&[SERVER, EXTERNAL, GATEWAY]) };
        let protocol = *self.choose(&[TCP, TCP, UDP, UDP, ICMP, ICMP, 47]);
        let len = *self.choose(&[0, 7, 8, 20, 28, 60, 300, 1_379, 1_400, 1_480, 9_000, 60_000]);
        let mut body = self.bytes(len);
        self.dress(&mut body, protocol);
        let mut ip = Ip::new(source, destination, protocol, body);
        ip.fragment = *self.choose(&[0, 0, 0, DF, DF, MF, MF | 1, 1, 175, 0x1fff, DF | MF, 0x8000]);
        ip.identification = self.below(3) as u16;
        ip.ttl = *self.choose(&[64, 64, 64, 2, 1, 0]);
        // None, a source route that is cut off, or nothing but no-operations.
        ip.options = self.choose(&[&[][..], &[], &[], &[], &[1, 1, 1, 131], &[1; 40]]).to_vec();
        if ip.body.len() >= 20 && self.below(2) == 0 {
            ip = ip.summed();
        }
        let mut bytes = ip.bytes();
        match self.below(12) {
            0 => {
                let at = self.below(20);
                bytes[at] ^= 1 << self.below(8);
            }
            1 => bytes.truncate(self.below(bytes.len())),
            2 => bytes.extend([0; 30]),
            _ => {}
        }
        bytes
    }

    /// Makes a transport header of the body's first bytes.
    fn dress(&mut self, body: &mut [u8], protocol: u8) {
        if body.len() < 20 {
            return;
        }
        let ports = [ECHO_PORT, 9, 5_000, 5_001, 53, 40_000, 40_001, 40_002 + self.below(40) as u16];
        match protocol {
            TCP | UDP => {
                let (from, to) = (*self.choose(&ports), *self.choose(&ports));
                put(body, 0, from);
                put(body, 2, to);
                let len = body.len() as u16;
                if protocol == UDP && self.below(8) != 0 {
                    put(body, 4, len);
                }
                if protocol == TCP {
                    body[12] = *self.choose(&[0x50, 0x50, 0x50, 0x80, 0xf0, 0x40]);
                    body[13] =
                        *self.choose(&[SYN, SYN | ACK, ACK, ACK, ACK | PSH, FIN | ACK, RST, CWR | ACK, 0xff]);
                }
            }
            _ => {
                body[0] = *self.choose(&[8, 8, 0, 3, 11, 12, 13, 5, 200]);
                if body.len() >= 60 {
                    let quoted = Ip::udp(endpoint(EXTERNAL, ports[7]), endpoint(SERVER, ECHO_PORT), &[0; 12]);
                    body[8..48].copy_from_slice(&quoted.bytes());
                }
            }
        }
    }

    /// Half of them are those of an ordinary packet.
    fn virtio(&mut self) -> [u8; 10] {
        let mut header = [0; 10];
        if self.below(2) == 0 {
            header[0] = *self.choose(&[0, 1, 1, 2, 255]);
            header[1] = *self.choose(&[0, 1, 1, 0x81, 5, 5, 3, 4]);
            let size = *self.choose(&[0u16, 1, 8, 536, 1_360, 1_460, 65_535]);
            header[4..6].copy_from_slice(&size.to_ne_bytes());
        }
        header
    }

    fn offload(&mut self) -> Offload {
        let kind = *self.choose(&[GsoKind::Tcp4, GsoKind::Tcp4Ecn, GsoKind::Udp4]);
        let gso = Gso { kind, segment_size: *self.choose(&[0, 1, 536, 1_360, 65_535]) };
        let checksum = *self.choose(&[ChecksumState::Complete, ChecksumState::Partial]);
        Offload { gso: (self.below(2) == 0).then_some(gso), checksum }
    }
}
