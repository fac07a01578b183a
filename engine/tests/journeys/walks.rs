//! From a client to the gateway, to the internet, to another client, and back.

use std::collections::BTreeMap;

use tidegate_engine::drop_reason::DropReason;
use tidegate_engine::fair_queue::Owner;
use tidegate_engine::messages::Command;
use tidegate_engine::wire::CoalesceOptions;

use super::flow::{Flow, HTTPS, SACK, TIMESTAMPS, stream};
use super::link::Link;
use super::packets::*;
use super::world::*;

#[test]
fn the_first_packet_makes_a_handshake_and_is_answered_by_the_gateway() {
    let mut world = World::new();
    world.ping(0, GATEWAY);
    let reply = world.take_one(0);
    assert_eq!((reply.source, reply.destination, reply.icmp()), (GATEWAY, client_address(0), (0, 0)));
    assert_eq!(reply.data(), b"are you there?");
    assert_eq!(world.host.len(), 1);
    assert!(world.outside.is_empty() && world.mappings() == 0 && world.drops().is_empty());
}

#[test]
fn a_ping_to_the_internet_is_answered() {
    let mut world = World::new();
    world.ping(0, SERVER);
    let request = world.take_one_outside();
    assert_eq!((request.source, request.destination, request.ttl), (EXTERNAL, SERVER, 63));
    let reply = world.take_one(0);
    assert_eq!((reply.source, reply.destination, reply.identifier()), (SERVER, client_address(0), 0x7a7a));
    assert_eq!((reply.ttl, reply.data()), (63, &b"are you there?"[..]));
    assert!(world.drops().is_empty());
}

#[test]
fn a_tcp_stream_arrives_byte_for_byte_both_ways_and_travels_in_superpackets() {
    let data = payload(200_001);
    for shards in [1, 2] {
        let mut world = World::with_shards(shards).connected();
        for (port, (mss, options)) in [
            (536, &[][..]),
            (1360, &[]),
            (536, &TIMESTAMPS),
            (1360, &TIMESTAMPS),
            (1380, &SACK),
            (1380, &[TIMESTAMPS, SACK].concat()),
        ]
        .into_iter()
        .enumerate()
        {
            for client in [0, 1] {
                let mut flow = Flow::open(&mut world, client, 50_000 + port as u16, HTTPS);
                (flow.options, flow.tos) = (options.to_vec(), 0b10); // ECT(0), RFC 3168 §5
                let (up, down) = (flow.up, flow.down);

                let before = world.device_packets;
                let sent = flow.send_up(&mut world, &data, mss);
                let crossed = world.device_packets - before;
                let segments = world.take_outside();
                assert_eq!(stream(&segments, up), data, "up, MSS {mss}, {options:?}");
                assert!(crossed <= 2 * sent, "{crossed} packets for {sent} superpackets up");
                assert_segments(&segments, &flow, mss, (flow.external, HTTPS));

                let before = world.device_packets;
                let sent = flow.send_down(&mut world, &data, mss);
                let crossed = world.device_packets - before;
                let segments = world.take(client);
                assert_eq!(stream(&segments, down), data, "down, MSS {mss}, {options:?}");
                assert!(crossed <= 3 * sent, "{crossed} packets for {sent} superpackets down");
                assert_segments(&segments, &flow, mss, (HTTPS, flow.local));
            }
        }
        assert!(world.drops().is_empty(), "{:?}", world.drops());
    }
}

fn assert_segments(
    segments: &[Ip],
    flow: &Flow,
    mss: usize,
    (from, to): (std::net::SocketAddrV4, std::net::SocketAddrV4),
) {
    for segment in segments {
        let header = segment.tcp_header();
        assert_eq!((segment.from(), segment.to()), (from, to));
        assert_eq!((segment.tos, segment.ttl, segment.fragment), (0b10, 63, DF));
        assert_eq!((&header.options, header.window), (&flow.options, 0xfff0));
        assert!(segment.data().len() + header.options.len() <= mss);
    }
    let pushed = segments.iter().filter(|segment| segment.tcp_header().flags & PSH != 0).count();
    assert_eq!(
        pushed,
        200_001_usize.div_ceil(65_000 / (mss - flow.options.len()) * (mss - flow.options.len()))
    );
}

#[test]
fn congestion_is_told_once_and_echoed_in_every_segment() {
    let mut world = World::new().connected();
    let mut flow = Flow::open(&mut world, 0, 50_000, HTTPS);
    let data = payload(20 * 1360);
    world.send_superpacket(0, &flow.segment_up(ACK | CWR | ECE | FIN | PSH, &data), 1360);
    let flags: Vec<u8> = world.take_outside().iter().map(|segment| segment.tcp_header().flags).collect();
    assert_eq!(flags[0], ACK | CWR | ECE, "RFC 3168 §6.1.2: CWR once");
    assert!(flags[1..19].iter().all(|&flags| flags == ACK | ECE), "{flags:?}");
    assert_eq!((flags.len(), flags[19]), (20, ACK | ECE | FIN | PSH));

    flow.tos = 0b11; // congestion experienced
    world.arrive(&flow.segment_down(ACK, b"marked"));
    assert_eq!(world.take_one(0).tos, 0b11);
}

#[test]
fn udp_is_echoed_with_every_payload_length_and_dscp() {
    let mut world = World::new().connected();
    for len in (0..200).chain([1371, 1372, 1391, 1392]) {
        let data = payload(len);
        let packet = Ip::udp(endpoint(client_address(0), 5_000), endpoint(SERVER, ECHO_PORT), &data);
        world.send(0, &packet.with(|ip| ip.tos = 0xb8)); // expedited forwarding, RFC 3246
        let outside = world.take_one_outside();
        assert_eq!((outside.source, outside.tos, outside.data()), (EXTERNAL, 0xb8, &data[..]));
        let echoed = world.take_one(0);
        assert_eq!((echoed.to(), echoed.data()), (endpoint(client_address(0), 5_000), &data[..]));
    }
    assert!(world.drops().is_empty());
}

#[test]
fn a_udp_datagram_without_a_checksum_stays_without() {
    let mut world = World::new().connected();
    let mut packet = Ip::udp(endpoint(client_address(0), 5_000), endpoint(SERVER, 9), b"no checksum");
    put(&mut packet.body, 6, 0);
    world.send(0, &packet);
    let outside = world.take_one_outside();
    assert_eq!(half(&outside.body, 6), 0);
    let mut answer = Ip::udp(outside.to(), outside.from(), b"none either");
    put(&mut answer.body, 6, 0);
    world.arrive(&answer);
    assert_eq!(half(&world.take_one(0).body, 6), 0);
}

#[test]
fn udp_superpackets_are_split_into_datagrams_and_merged_where_the_receiver_wants_it() {
    for udp in [false, true] {
        let coalesce = CoalesceOptions { udp, ..CoalesceOptions::default() };
        let mut world = World::of(Plan { coalesce, ..Plan::default() }).connected();
        let data = payload(20 * 1200 + 77);
        let to = endpoint(SERVER, 4433);
        let before = world.device_packets;
        world.send_superpacket(0, &Ip::udp(endpoint(client_address(0), 5_000), to, &data), 1200);
        assert_eq!(world.device_packets - before, if udp { 1 } else { 21 });
        let datagrams = world.take_outside();
        assert_eq!(datagrams.iter().flat_map(|datagram| datagram.data()).copied().collect::<Vec<_>>(), data);
        assert_eq!(datagrams.len(), 21);

        world.arrive_superpacket(&Ip::udp(to, datagrams[0].from(), &data), 1200);
        let datagrams = world.take(0);
        assert_eq!(datagrams.iter().flat_map(|datagram| datagram.data()).copied().collect::<Vec<_>>(), data);
    }
}

#[test]
fn a_link_that_loses_repeats_swaps_and_damages_never_delivers_a_wrong_byte() {
    let data = payload(300_000);
    for seed in 1..=4 {
        let mut world = World::of(Plan { link: Link::seeded(seed), ..Plan::default() }).connected();
        let mut flow = Flow::open(&mut world, 0, 50_000, HTTPS);
        let (up, down) = (flow.up, flow.down);
        let link = &mut world.link;
        (link.loss, link.duplication, link.corruption, link.shuffles) = (10, 5, 5, true);
        let (mut above, mut below) = (BTreeMap::new(), BTreeMap::new());
        for _ in 0..12 {
            // What was lost is sent again, and all the rest as well: a poor TCP, but the bytes are right.
            (flow.up, flow.down) = (up, down);
            flow.send_up(&mut world, &data, 1360);
            collect(&mut above, &world.take_outside(), up, &data);
            flow.send_down(&mut world, &data, 1360);
            collect(&mut below, &world.take(0), down, &data);
        }
        assert_eq!((above.len(), below.len()), (data.len().div_ceil(1360), data.len().div_ceil(1360)));
        let [lost, repeated, damaged] = world.link.done;
        assert!(lost > 100 && repeated > 100 && damaged > 100);
        let drops = world.drops();
        assert!(drops["replayed"] > 100 && drops["bad_authentication"] > 100, "{drops:?}");
        let unheard = [
            "replayed",
            "bad_authentication",
            "unknown_session",
            "not_wireguard",
            "bad_handshake",
            "bad_mac",
        ];
        assert!(drops.keys().all(|reason| unheard.contains(reason)), "{drops:?}");
        assert_eq!(drops.values().sum::<u64>(), repeated + damaged, "each counted once: {drops:?}");
    }
}

/// Files segments under their sequence numbers, comparing each with what was sent.
fn collect(into: &mut BTreeMap<u32, usize>, segments: &[Ip], start: u32, data: &[u8]) {
    for segment in segments {
        let at = segment.tcp_header().sequence.wrapping_sub(start) as usize;
        assert_eq!(segment.data(), &data[at..at + segment.data().len()]);
        into.insert(at as u32, segment.data().len());
    }
}

#[test]
fn clients_reach_each_other_on_one_shard_and_across_two() {
    for (shards, from, to) in [(1, 0, 1), (2, 0, 2), (2, 0, 1), (2, 1, 0)] {
        let mut world = World::with_shards(shards).connected();
        let (here, there) = (endpoint(client_address(from), 6_000), endpoint(client_address(to), 22));
        world.send(from, &Ip::udp(here, there, b"hello"));
        let hello = world.take_one(to);
        assert_eq!((hello.from(), hello.to(), hello.data(), hello.ttl), (here, there, &b"hello"[..], 63));

        let data = payload(60_000);
        let header = Tcp { sequence: 7, acknowledgment: 8, flags: ACK, window: 9, ..Tcp::default() };
        let before = world.device_packets;
        world.send_superpacket(from, &Ip::tcp(here, there, &header, &data), 1360);
        assert_eq!(world.device_packets - before, 1, "whole from end to end");
        assert_eq!(stream(&world.take(to), 7), data);
        assert!(world.outside.is_empty() && world.drops().is_empty(), "{:?}", world.drops());
        assert!(world.host.is_empty());
    }
}

#[test]
fn the_mss_of_connections_is_clamped_to_the_path_both_ways() {
    let mut world = World::new().connected();
    let mss = |mss: u16| [&[2, 4][..], &mss.to_be_bytes()].concat();
    let mut flow = Flow::open(&mut world, 0, 50_000, HTTPS);
    flow.options = mss(1460);
    let again = Flow { local: endpoint(*flow.local.ip(), 50_001), up: 5_000, ..flow.clone() };
    world.send(0, &again.segment_up(SYN, &[]));
    let syn = world.take_one_outside();
    assert_eq!(syn.tcp_header().options, mss(1380));
    let again = Flow { external: syn.from(), up: 5_001, ..again };
    world.arrive(&again.segment_down(SYN | ACK, &[]));
    assert_eq!(world.take_one(0).tcp_header().options, mss(1380));
}

#[test]
fn packets_of_any_lengths_share_the_trains_of_one_turn() {
    let mut world = World::new().connected();
    for lengths in [[100, 50, 100, 200], [50, 100, 100, 50], [7, 7, 7, 7], [0, 1_392, 0, 1_392]] {
        let packets: Vec<Ip> = (lengths.iter())
            .map(|&len| Ip::udp(endpoint(GATEWAY, 53), endpoint(client_address(0), 5_353), &payload(len)))
            .collect();
        world.in_one_turn(0, |world| {
            packets.iter().enumerate().for_each(|(buffer, packet)| world.hand_from_host(buffer, packet));
        });
        assert_eq!(world.take(0), packets, "a train ends where a datagram is shorter or longer");
    }
}

#[test]
fn the_small_packets_of_one_turn_leave_as_one_train() {
    let mut world = World::new().connected();
    for (buffer, len) in [12, 24, 100, 12].into_iter().enumerate() {
        let packet = Ip::udp(endpoint(GATEWAY, 53), endpoint(client_address(0), 5_353), &payload(len));
        world.hand_from_host(buffer, &packet);
    }
    let trains = world.shards[0].finish(world.now).trains;
    let [(_, segment_size, bytes)] = &trains[..] else { panic!("{} trains", trains.len()) };
    // Packet and padding, header and tag: the longest is of 128 bytes, and the last one may stay shorter.
    assert_eq!((*segment_size, bytes.len()), (128 + 32, 3 * (128 + 32) + 48 + 32));
}

#[test]
fn the_host_has_its_packets_cut_only_where_it_allows() {
    let mut world = World::new().connected();
    let packet = Ip::udp(endpoint(GATEWAY, 53), endpoint(client_address(0), 5_353), &payload(2_000));
    world.send_from_host(&packet);
    assert_eq!(reassemble(&world.take(0)).data(), packet.data());
    let forbidden = packet.dont_fragment();
    world.dies(DropReason::TooBig, |world| world.send_from_host(&forbidden));
}

#[test]
fn the_gateways_host_reaches_clients_on_every_shard() {
    let mut world = World::with_shards(2).connected();
    for client in 0..3 {
        world.send_from_host(&Ip::udp(
            endpoint(GATEWAY, 53),
            endpoint(client_address(client), 5_353),
            b"answer",
        ));
        let answer = world.take_one(client);
        assert_eq!((answer.from(), answer.data()), (endpoint(GATEWAY, 53), &b"answer"[..]));
    }
    assert!(world.drops().is_empty());
}

#[test]
fn a_protocol_without_ports_is_one_clients_both_ways_and_nobody_elses() {
    const GRE: u8 = 47;
    for shards in [1, 2] {
        let mut world = World::with_shards(shards).connected();
        let (owner, other) = (1, 0);
        world.tell_all(|| Command::PassProtocols(vec![(GRE, client_address(owner))]));
        let tunnelled: Vec<u8> = (0..100).collect();

        world.send(owner, &Ip::new(client_address(owner), SERVER, GRE, tunnelled.clone()));
        let sent = world.take_one_outside();
        assert_eq!((sent.source, sent.destination, sent.protocol), (EXTERNAL, SERVER, GRE));
        assert_eq!(sent.body, tunnelled);

        for stranger in [SERVER, NEIGHBOUR] {
            world.arrive(&Ip::new(stranger, EXTERNAL, GRE, tunnelled.clone()));
            let received = world.take_one(owner);
            assert_eq!((received.source, received.destination), (stranger, client_address(owner)));
            assert_eq!(received.body, tunnelled);
        }
        assert!(world.drops().is_empty());
        assert_eq!(world.mappings(), 3, "the pings': nothing is remembered of it");

        let packet = Ip::new(client_address(other), SERVER, GRE, tunnelled.clone());
        world.send(other, &packet);
        assert_eq!(world.drops()["unsupported_protocol"], 1);
        assert_eq!(world.take_one(other).icmp(), (3, 13), "who may not is told");
        assert!(world.take_outside().is_empty());
        let esp = Ip::new(SERVER, EXTERNAL, 50, tunnelled);
        world.dies(DropReason::UnsupportedProtocol, |world| world.arrive(&esp));
        world.tell_all(|| Command::PassProtocols(Vec::new()));
        let gre = Ip::new(SERVER, EXTERNAL, GRE, vec![1; 20]);
        world.dies(DropReason::UnsupportedProtocol, |world| world.arrive(&gre));
    }
}

#[test]
fn what_was_merged_inside_a_tunnel_that_passes_arrives_as_it_was_sent() {
    const GRE: u8 = 47;
    let mut world = World::with_shards(2).connected();
    let owner = 1;
    world.tell_all(|| Command::PassProtocols(vec![(GRE, client_address(owner))]));
    // TCP between networks of which the gateway knows nothing.
    let (from, to) = (endpoint([172, 16, 0, 1].into(), 443), endpoint([172, 16, 1, 1].into(), 50_000));
    let data = payload(3_000);
    let segment = |n: usize, data: &[u8], flags| {
        let header = Tcp { sequence: 7_000 + 1_000 * n as u32, flags, ..Tcp::default() };
        Ip::tcp(from, to, &header, data).with(|ip| ip.identification = 100 + n as u16)
    };
    let gre = |inner: &Ip| {
        let body = [&[0, 0, 8, 0][..], &inner.bytes()].concat();
        Ip::new(SERVER, EXTERNAL, GRE, body).with(|ip| ip.identification = 20).dont_fragment()
    };
    let superpacket = gre(&segment(0, &data, ACK | PSH).partial());
    let virtio = |superpacket: &Ip, gso_size: u16| {
        let words = [superpacket.len() as u16, gso_size, 20 + 4 + 20, 16].map(u16::to_ne_bytes).concat();
        [&[1, 1][..], &words].concat().try_into().unwrap() // F_NEEDS_CSUM, GSO_TCPV4
    };
    world.arrive_bytes(superpacket.bytes(), virtio(&superpacket, 1_000));
    world.settle();
    assert!(world.drops().is_empty(), "{:?}", world.drops());

    let received = world.take(owner);
    let flags = [ACK, ACK, ACK | PSH];
    assert_eq!(received.len(), flags.len());
    for (n, (received, flags)) in received.iter().zip(flags).enumerate() {
        assert_eq!((received.source, received.destination), (SERVER, client_address(owner)));
        assert_eq!(received.identification, 20 + n as u16);
        let inner = segment(n, &data[1_000 * n..][..1_000], flags);
        assert_eq!(received.body, gre(&inner).body, "segment {n}");
        Ip::verify(&received.body[4..]);
    }
    // Nobody else's, and not what is no whole superpacket.
    let mut short = superpacket.bytes();
    short.truncate(2_000);
    world.dies(DropReason::UnknownOffload, |world| world.arrive_bytes(short, virtio(&superpacket, 1_000)));
    world.dies(DropReason::UnknownOffload, |world| {
        world.arrive_bytes(superpacket.bytes(), virtio(&superpacket, 0));
    });
    world.tell_all(|| Command::PassProtocols(Vec::new()));
    world.dies_times(DropReason::UnsupportedProtocol, 3, |world| {
        world.arrive_bytes(superpacket.bytes(), virtio(&superpacket, 1_000));
    });
}

#[test]
fn what_crosses_from_outside_or_from_the_host_is_the_clients_for_whom_it_is() {
    const GRE: u8 = 47;
    let mut world = World::of(Plan { clients: 4, shards: 2, ..Plan::default() }).connected();
    // Clients 1 and 3 live on shard 1, and all of this comes to shard 0.
    world.tell_all(|| Command::PassProtocols(vec![(GRE, client_address(1))]));
    world.crossed.clear();
    for forged in [SERVER, NEIGHBOUR] {
        world.arrive(&Ip::new(forged, EXTERNAL, GRE, vec![1; 20]));
    }
    assert_eq!(world.crossed, [Owner::Client(client_address(1)); 2], "whoever claims to have sent it");
    world.crossed.clear();
    for client in [1, 3] {
        let to = endpoint(client_address(client), 5_353);
        world.send_from_host(&Ip::udp(endpoint(GATEWAY, 53), to, b"answer"));
    }
    assert_eq!(world.crossed, [1, 3].map(|client| Owner::Client(client_address(client))));
    world.crossed.clear();
    for client in [1, 3] {
        let to = endpoint(client_address(client), 22);
        world.send(0, &Ip::udp(endpoint(client_address(0), 6_000), to, b"hello"));
    }
    assert_eq!(world.crossed, [Owner::Client(client_address(0)); 2], "between peers it is the sender's");
    assert_eq!([world.take(1).len(), world.take(3).len()], [4, 2]);
}

#[test]
fn answers_to_queries_come_to_the_shard_of_their_client() {
    let mut world = World::with_shards(2).connected();
    world.internet_answers = false;
    for client in [0, 1] {
        for (query, answer) in [(8, 0), (13, 14)] {
            world.send(client, &Ip::echo(query, client_address(client), SERVER, 99, 1, &[0; 12]));
            let asked = world.take_one_outside();
            world.crossed.clear();
            world.arrive(&Ip::echo(answer, SERVER, EXTERNAL, asked.identifier(), 1, &[0; 12]));
            let answered = world.take_one(client);
            assert_eq!((answered.icmp(), answered.identifier()), ((answer, 0), 99));
            assert_eq!(world.crossed, [], "type {answer}");
        }
    }
}

#[test]
fn a_turn_may_bring_more_packets_than_can_be_gathered_at_once() {
    let mut world = World::new().connected();
    let packets = |from: std::net::SocketAddrV4, to: std::net::Ipv4Addr| -> Vec<Ip> {
        (0..600).map(|n| Ip::udp(from, endpoint(to, 10_000 + n), &n.to_be_bytes())).collect()
    };
    let numbers = |packets: &[Ip]| -> Vec<u16> {
        packets.iter().map(|packet| u16::from_be_bytes(packet.data().try_into().unwrap())).collect()
    };
    world.seal_train(0, &packets(endpoint(client_address(0), 5_000), SERVER));
    assert_eq!(numbers(&world.take_outside()), (0..600).collect::<Vec<_>>());
    world.seal_train_for_client(0, &packets(endpoint(SERVER, ECHO_PORT), client_address(0)));
    assert_eq!(numbers(&world.take(0)), (0..600).collect::<Vec<_>>());
    assert!(world.drops().is_empty(), "{:?}", world.drops());
}
