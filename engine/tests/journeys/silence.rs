//! What dies, under which name, and that nobody hears of it.

use std::time::Duration;

use tidegate_engine::drop_reason::DropReason;
use tidegate_engine::fair_queue::Owner;
use tidegate_engine::wire::CoalesceOptions;

use super::flow::{Flow, HTTPS};
use super::packets::*;
use super::world::*;

fn to_server(client: usize) -> Ip {
    Ip::udp(endpoint(client_address(client), 5_000), endpoint(SERVER, 9), b"data")
}

/// A client's core checks what it is given: this gives it to the link as a malicious client would, sealed but unchecked.
fn from_peer(world: &mut World, client: usize, bytes: &[u8]) {
    world.seal_unchecked(client, bytes);
    world.settle();
}

#[test]
fn a_peer_speaks_for_its_own_address_only() {
    let mut world = World::new().connected();
    for source in [client_address(1), GATEWAY, EXTERNAL, SERVER, [0, 0, 0, 0].into(), [255; 4].into()] {
        let forged = to_server(0).with(|ip| ip.source = source).summed();
        world.dies(DropReason::WrongInnerSource, |world| world.send(0, &forged));
    }
    for fragment in to_server(1).with(|ip| ip.body.resize(4_000, 0)).fragments(TUNNEL_MTU) {
        world.dies(DropReason::WrongInnerSource, |world| world.send(0, &fragment));
    }
}

#[test]
fn what_is_no_sound_ipv4_packet_dies_under_its_own_name() {
    let mut world = World::new().connected();
    let sound = to_server(0);
    let changed = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = sound.bytes();
        change(&mut bytes);
        bytes
    };
    let summed = |change: &dyn Fn(&mut Vec<u8>)| {
        changed(&|bytes| {
            change(bytes);
            put(bytes, 10, 0);
            let sum = !sum(&bytes[..20]);
            put(bytes, 10, sum);
        })
    };
    let cases: [(DropReason, Vec<u8>); 9] = [
        (DropReason::Ipv6, changed(&|bytes| bytes[0] = 0x60)),
        (DropReason::UnknownVersion, changed(&|bytes| bytes[0] = 0x55)),
        (DropReason::Truncated, summed(&|bytes| put(bytes, 2, 2_000))),
        (DropReason::BadIpHeader, summed(&|bytes| put(bytes, 2, 19))),
        (DropReason::BadIpHeader, changed(&|bytes| bytes[0] = 0x44)),
        (DropReason::BadIpChecksum, changed(&|bytes| bytes[10] ^= 1)),
        (DropReason::BadTransportHeader, changed(&|bytes| put(bytes, 24, 7))),
        (DropReason::BadTransportHeader, changed(&|bytes| put(bytes, 24, 1_000))),
        (DropReason::BadTransportHeader, summed(&|bytes| bytes[9] = TCP)),
    ];
    for (reason, bytes) in cases {
        world.dies(reason, |world| from_peer(world, 0, &bytes));
    }
    // The same from outside, where the version alone is decided by the EtherType.
    world.send(0, &sound);
    let mut bytes = Ip::udp(endpoint(SERVER, 9), world.take_one_outside().from(), b"answer").bytes();
    bytes[10] ^= 1;
    world.dies(DropReason::BadIpChecksum, |world| world.arrive_bytes(bytes.clone(), [0; 10]));
    world.dies(DropReason::Truncated, |world| world.arrive_bytes(bytes[..12].to_vec(), [0; 10]));
    world.dies(DropReason::Truncated, |world| world.arrive_bytes(bytes[..33].to_vec(), [0; 10]));
}

#[test]
fn a_wrong_transport_checksum_of_a_peer_is_dropped_whether_segments_are_merged_or_not() {
    for enabled in [false, true] {
        let coalesce = CoalesceOptions { enabled, ..CoalesceOptions::default() };
        let mut world = World::of(Plan { coalesce, ..Plan::default() }).connected();
        let flow = Flow::open(&mut world, 0, 50_000, HTTPS);
        let datagram = Ip::udp(endpoint(client_address(0), 5_000), endpoint(SERVER, 9), &payload(1_000));
        let ping = Ip::echo(8, client_address(0), SERVER, 1, 1, &payload(1_000));
        let packets = [flow.segment_up(ACK, &payload(1_000)), flow.segment_up(RST, &[]), datagram, ping];
        for mut damaged in packets {
            *damaged.body.last_mut().unwrap() ^= 1;
            world.dies(DropReason::BadTransportChecksum, |world| from_peer(world, 0, &damaged.bytes()));
            // In pieces it is found as soon as it is whole again.
            let pieces = damaged.with(|ip| ip.fragment = 0).fragments(576);
            if pieces.len() > 1 {
                world.dies(DropReason::BadTransportChecksum, |world| {
                    pieces.iter().for_each(|piece| from_peer(world, 0, &piece.bytes()));
                });
            }
        }
    }
}

#[test]
fn bogons_are_neither_sent_to_nor_believed() {
    let mut world = World::new().connected();
    for destination in ["127.0.0.1", "169.254.1.1", "224.0.0.1", "255.255.255.255", "0.0.0.0", "240.0.0.1"]
        .into_iter()
        .chain(["10.66.77.0", "10.66.77.255", "203.0.113.255", "203.0.113.0"])
    {
        let packet = to_server(0).with(|ip| ip.destination = destination.parse().unwrap()).summed();
        world.dies(DropReason::BogonDestination, |world| world.send(0, &packet));
    }
    world.publish(tidegate_engine::nat::Proto::Udp, 45_000, endpoint(client_address(0), 53)).unwrap();
    for source in ["127.0.0.1", "224.0.0.1", "255.255.255.255", "0.0.0.0", "240.0.0.1", "169.254.1.1"]
        .into_iter()
        .chain(["10.66.77.3", "10.66.77.1", "203.0.113.10"])
    {
        let packet =
            Ip::udp(endpoint(source.parse().unwrap(), 1), endpoint(EXTERNAL, 45_000), b"from nowhere");
        world.dies(DropReason::BogonSource, |world| world.arrive(&packet));
        let first = packet.with(|ip| ip.fragment = MF);
        world.dies(DropReason::BogonSource, |world| world.arrive(&first.with(|ip| ip.body.truncate(16))));
    }
}

/// A kernel with `ip_forward` takes what its neighbours send to the clients to the gateway's TUN device.
#[test]
fn what_the_hosts_kernel_forwards_does_not_reach_a_client_past_the_nat() {
    const OTHER: [u8; 4] = [172, 17, 0, 1];
    let forwarded = [SERVER, NEIGHBOUR, ROUTER, client_address(2), OTHER.into(), [127, 0, 0, 1].into()];
    for shards in [1, 2] {
        let mut world = World::with_shards(shards).connected();
        for client in 0..2 {
            let to = endpoint(client_address(client), 5_353);
            let answer = |from| Ip::udp(endpoint(from, 53), to, &payload(2_000));
            for source in forwarded {
                world.dies(DropReason::BogonSource, |world| world.send_from_host(&answer(source)));
                for fragment in answer(source).fragments(TUNNEL_MTU) {
                    world.dies(DropReason::BogonSource, |world| world.send_from_host(&fragment));
                }
                let reset = Tcp { flags: RST, ..Tcp::default() };
                let reset = Ip::tcp(endpoint(source, 443), to, &reset, &[]);
                world.dies(DropReason::BogonSource, |world| world.send_from_host(&reset));
            }
            // Its own services answer from whichever of its addresses was called.
            world.set_host_addresses(&[EXTERNAL, OTHER.into()]);
            for own in [GATEWAY, EXTERNAL, OTHER.into()] {
                let answer = Ip::udp(endpoint(own, 53), to, b"answer");
                world.send_from_host(&answer);
                assert_eq!(world.take_one(client).from(), endpoint(own, 53));
            }
            world.set_host_addresses(&[EXTERNAL]);
        }
    }
}

#[test]
fn what_nobody_asked_for_gets_silence() {
    for shards in [1, 2] {
        let mut world = World::with_shards(shards).connected();
        let flow = Flow::open(&mut world, 0, 50_000, HTTPS);
        let free = endpoint(EXTERNAL, if flow.external.port() == 40_000 { 40_002 } else { 40_000 });
        for flags in [SYN, SYN | ACK, ACK, FIN | ACK, RST] {
            let header = Tcp { sequence: 5, acknowledgment: 6, flags, window: 7, ..Tcp::default() };
            world.dies(DropReason::NoMapping, |world| world.arrive(&Ip::tcp(HTTPS, free, &header, &[])));
            let stranger = Ip::tcp(endpoint(NEIGHBOUR, 443), flow.external, &header, &[]);
            world.dies(DropReason::Filtered, |world| world.arrive(&stranger));
        }
        world.dies(DropReason::NoMapping, |world| world.arrive(&Ip::udp(HTTPS, free, b"scan")));
        let reply = Ip::echo(0, SERVER, EXTERNAL, 0x4242, 1, b"unasked");
        world.dies(DropReason::NoMapping, |world| world.arrive(&reply));
        let request = Ip::echo(8, SERVER, EXTERNAL, 0x4242, 1, b"for the host");
        world.dies(DropReason::UnsupportedIcmp, |world| world.arrive(&request));
        let gre = Ip::new(SERVER, EXTERNAL, 47, vec![0; 20]);
        world.dies(DropReason::UnsupportedProtocol, |world| world.arrive(&gre));
        let rst = flow.segment_down(RST, &[]).with(|ip| ip.body[4] ^= 0x40).summed();
        world.dies(DropReason::TcpOutOfState, |world| world.arrive(&rst));
    }
}

#[test]
fn an_attacker_at_the_transport_gets_silence() {
    let mut world = World::with_shards(2).connected();
    let attacker = endpoint([192, 0, 2, 66].into(), 1);
    let initiation = [&[1, 0, 0, 0][..], &[7; 144]].concat();
    let cases: [(DropReason, Vec<u8>); 6] = [
        (DropReason::NotWireGuard, b"GET / HTTP/1.1".to_vec()),
        (DropReason::NotWireGuard, vec![1, 0, 0, 0]),
        (DropReason::NotWireGuard, [&[4, 1, 0, 0][..], &[0; 60]].concat()),
        (DropReason::BadMac, initiation),
        (DropReason::UnknownSession, [&[4, 0, 0, 0, 0, 1, 2, 3][..], &[0; 60]].concat()),
        (DropReason::UnknownSession, [&[4, 0, 0, 0, 99, 1, 2, 3][..], &[0; 60]].concat()),
    ];
    for (reason, datagram) in cases {
        let before = world.datagrams;
        let len = datagram.len();
        world.dies(reason, |world| world.strike(attacker, datagram, len));
        assert_eq!(world.datagrams, before, "no answer");
    }
    // A train of them, cut as the attacker likes.
    world.dies_times(DropReason::NotWireGuard, 100, |world| world.strike(attacker, vec![9; 1_000], 10));
    world.ping(0, GATEWAY);
    assert_eq!(world.take(0).len(), 1);
}

#[test]
fn a_peer_is_never_inside_the_vpn_nor_where_nobody_can_be_answered() {
    let outside = endpoint([192, 0, 2, 102].into(), 40_001);
    let nowhere = [
        endpoint(client_address(0), 9_999),
        endpoint(client_address(1), 9_999),
        endpoint(GATEWAY, 51_820),
        endpoint(*outside.ip(), 0),
    ];
    for shards in [1, 2] {
        let mut world = World::with_shards(shards).connected();
        let home = world.home_of(1);
        let ping = Ip::echo(8, client_address(1), GATEWAY, 1, 1, b"fresh");
        for from in nowhere {
            world.move_client(1, from);
            let train = [ping.clone(), ping.clone()];
            world.dies_times(DropReason::BogonSource, 2, |world| world.seal_train(1, &train));
            assert!(world.status(home).peers.iter().all(|peer| peer.endpoint != Some(from)), "{from}");
        }
        // Neither is it believed of a handshake, which the first shard would hand to the peer's.
        world.pass(Duration::from_secs(200));
        for from in nowhere {
            world.move_client(1, from);
            world.ping(1, GATEWAY);
            world.pass(Duration::from_secs(6));
            assert!(world.take(1).is_empty(), "{from}");
        }
        assert_eq!(world.drops().into_keys().collect::<Vec<_>>(), ["bogon_source"]);
        world.move_client(1, outside);
        world.pass(Duration::from_secs(6));
        assert_eq!(world.take(1).len(), nowhere.len(), "what waited is answered");
    }
}

#[test]
fn a_replayed_datagram_dies_and_a_recorded_session_does_not_move_the_peer() {
    let mut world = World::new().connected();
    let recorded = world.record(|world| world.send(0, &to_server(0)));
    world.take_outside();
    let attacker = endpoint([192, 0, 2, 66].into(), 1);
    let (datagram, len) = (recorded[0].bytes.clone(), recorded[0].bytes.len());
    world.dies(DropReason::Replayed, |world| world.strike(attacker, datagram.clone(), len));
    world.ping(0, GATEWAY);
    assert_eq!(world.take(0).len(), 1, "answers still go to the client");
}

#[test]
fn a_client_believes_only_its_gateway() {
    let mut world = World::new().connected();
    world.dies(DropReason::NotWireGuard, |world| world.strike_client(0, b"hello".to_vec()));
    world.dies(DropReason::UnknownSession, |world| {
        world.strike_client(0, [&[4, 0, 0, 0, 0, 1, 2, 3][..], &[0; 60]].concat());
    });
}

#[test]
fn a_client_takes_only_what_its_profile_allows() {
    let mut world = World::of(Plan { clients: 1, allowed_ips: "10.66.77.0/24", ..Plan::default() });
    world.ping(0, GATEWAY);
    assert_eq!(world.take_one(0).source, GATEWAY);
    world.ping(0, SERVER);
    assert!(world.take(0).is_empty());
    assert_eq!(world.drops(), [("wrong_inner_source", 1)].into());
}

#[test]
fn data_messages_that_the_kernel_brought_to_the_wrong_shard_are_delivered_all_the_same() {
    for wrong in [0, 1] {
        let mut world = World::with_shards(2).connected();
        world.all_datagrams_to = Some(wrong);
        world.crossed.clear();
        for client in 0..3 {
            world.ping(client, SERVER);
            assert_eq!(world.take_one(client).source, SERVER);
            let forged = to_server(client).with(|ip| ip.source = SERVER).summed();
            world.dies(DropReason::WrongInnerSource, |world| world.send(client, &forged));
        }
        let misdirected = std::mem::take(&mut world.crossed);
        assert!(
            misdirected.contains(&Owner::Unknown) && !misdirected.contains(&Owner::Handshake),
            "{misdirected:?}"
        );
        // Renewed handshakes stray, too.
        world.pass(Duration::from_secs(200));
        for client in 0..3 {
            world.ping(client, SERVER);
            assert_eq!(world.take_one(client).source, SERVER);
        }
    }
}

#[test]
fn a_train_of_forged_data_for_several_shards_hands_over_little() {
    let mut world = World::with_shards(2).connected();
    world.crossed.clear();
    let forged = |shard| [&[4, 0, 0, 0, shard, 1, 2, 3][..], &[0; 24]].concat();
    for trains in 1..=2 {
        let train = [forged(0), forged(1).repeat(100)].concat();
        world.strike(endpoint([192, 0, 2, 66].into(), 1), train, 32);
        world.settle();
        assert_eq!(world.crossed, vec![Owner::Unknown; trains * 64]);
    }
    assert_eq!(world.drops(), [("unknown_session", 2 * 65), ("queue_full", 2 * 36)].into());
}
