//! What dies, under which name, and that nobody hears of it.

use std::time::Duration;

use blake2::digest::consts::U16;
use blake2::digest::{FixedOutput, KeyInit, Mac};
use blake2::{Blake2s256, Blake2sMac, Digest};
use tidegate_engine::core::Core;
use tidegate_engine::drop_reason::DropReason;
use tidegate_engine::fair_queue::Owner;
use tidegate_engine::messages::PeerSnapshot;
use tidegate_engine::wire::CoalesceOptions;

use super::flow::{Flow, HTTPS};
use super::kernel;
use super::packets::*;
use super::world::*;

fn to_server(client: usize) -> Ip {
    Ip::udp(endpoint(client_address(client), 5_000), endpoint(SERVER, 9), b"data")
}

/// A client's core checks what it is given: this gives it to the link as a malicious client would, sealed but
/// unchecked.
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

/// A router that obeys it would take it from a destination that is permitted to one that is not (RFC 7126 §4.3, §4.4).
#[test]
fn what_names_its_own_route_goes_nowhere_and_other_options_do_no_harm() {
    const NOP: u8 = 1;
    let routed = |option: u8, packet: &Ip| {
        let options = [&[NOP, option, 7, 4][..], &NEIGHBOUR.octets()].concat();
        packet.clone().with(|ip| ip.options = options)
    };
    let mut world = World::new().connected();
    world.publish(tidegate_engine::nat::Proto::Udp, 45_000, endpoint(client_address(0), 53)).unwrap();
    let from_outside = Ip::udp(endpoint(SERVER, 9), endpoint(EXTERNAL, 45_000), &payload(1_200));
    for option in [131, 137] {
        for to in [SERVER, client_address(1), GATEWAY, EXTERNAL] {
            let packet = Ip::udp(endpoint(client_address(0), 5_000), endpoint(to, 9), &payload(1_200));
            world
                .dies(DropReason::SourceRoute, |world| from_peer(world, 0, &routed(option, &packet).bytes()));
            for piece in packet.fragments(576) {
                world.dies(DropReason::SourceRoute, |world| {
                    from_peer(world, 0, &routed(option, &piece).bytes());
                });
            }
        }
        world.dies(DropReason::SourceRoute, |world| world.arrive(&routed(option, &from_outside)));
        for piece in from_outside.fragments(576) {
            world.dies(DropReason::SourceRoute, |world| world.arrive(&routed(option, &piece)));
        }
    }
    for record_route in [vec![7, 7, 4, 0, 0, 0, 0, 0], vec![NOP; 40]] {
        let packet = to_server(0).with(|ip| ip.options = record_route.clone());
        world.send(0, &packet);
        assert_eq!(world.take_one_outside().options, record_route);
        world.arrive(&from_outside.clone().with(|ip| ip.options = record_route.clone()));
        assert_eq!(world.take_one(0).options, record_route);
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

/// A handshake response of garbage, for the handshake with this index.
fn forged_response(index: [u8; 4]) -> Vec<u8> {
    [&[2, 0, 0, 0, 9, 9, 9, 9][..], &index, &[0x55; 48], &[0; 32]].concat()
}

/// With the first MAC, for which one has to know the gateway's public key and nothing else (whitepaper §5.4.4).
fn with_mac1(mut message: Vec<u8>) -> Vec<u8> {
    let key = Blake2s256::new().chain_update(b"mac1----").chain_update(gateway_public_key()).finalize();
    let at = message.len() - 32;
    let mac = <Blake2sMac<U16> as KeyInit>::new_from_slice(&key).unwrap().chain_update(&message[..at]);
    message[at..at + 16].copy_from_slice(&mac.finalize_fixed());
    message
}

#[test]
fn responses_forged_in_trains_for_another_shard_are_judged_and_few_are_read() {
    let mut world = World::with_shards(2).connected();
    let client = 1;
    world.pass(Duration::from_secs(200));
    // The client knows the index of a handshake of the gateway's, and does not answer.
    world.move_client(client, endpoint([192, 0, 2, 66].into(), 1));
    world.send_from_host(&Ip::udp(endpoint(GATEWAY, 9), endpoint(client_address(client), 9), b"wake up"));
    let initiation = world.lost.pop().unwrap();
    assert_eq!((initiation[0], initiation.len()), (1, 148));
    let index: [u8; 4] = initiation[4..8].try_into().unwrap();
    assert_eq!(usize::from(index[0]), world.home_of(client));

    let for_the_other_shard = [&[4, 0, 0, 0, 0, 1, 2, 3][..], &[0; 84]].concat();
    let forged = forged_response(index);
    for (response, reasons) in [
        (forged.clone(), &["bad_mac"][..]),
        (with_mac1(forged), &["bad_handshake", "bad_mac", "cookie_required"]),
    ] {
        for node in &mut world.shards {
            node.core.tunnel().take_work();
        }
        let train = [for_the_other_shard.clone(), response.repeat(63)].concat();
        for _ in 0..50 {
            world.strike(endpoint([192, 0, 2, 66].into(), 1), train.clone(), 92);
            world.pass(Duration::from_millis(20));
        }
        let mut drops = world.drops();
        assert!(drops.remove("unknown_session") >= Some(50), "the first of each train");
        assert_eq!(drops.keys().copied().collect::<Vec<_>>(), reasons);
        assert!(drops.get("bad_handshake").is_none_or(|&read| read <= 200), "{drops:?}");
        let work: Vec<_> = world.shards.iter_mut().map(|node| node.core.tunnel().take_work()).collect();
        assert!(work.iter().all(|&bytes| bytes <= 200 * 16 * 1024), "{work:?}");
    }
}

#[test]
fn what_was_sealed_and_comes_back_is_not_sealed_again() {
    // A client alone, and two who get what was for the other, on one shard and on two.
    for (shards, messages) in [
        (1, &[(1, 1)][..]),
        (2, &[(1, 1)]),
        (1, &[(0, 1), (1, 0)]),
        (2, &[(0, 2), (2, 0)]),
        (2, &[(0, 1), (1, 0)]),
    ] {
        let mut world = World::with_shards(shards).connected();
        world.loops_back = true;
        let looped: Vec<_> = messages
            .iter()
            .map(|&(whose, through)| {
                let ping = Ip::echo(8, client_address(whose), GATEWAY, 1, 1, b"where am I?");
                let message = world.sealed_by(whose, &ping);
                Ip::udp(endpoint(client_address(through), 5_000), LOOPBACK, &message)
            })
            .collect();
        messages.iter().for_each(|&(_, through)| world.send(through, &to_server(through))); // there are ports
        for (packet, &(_, through)) in looped.iter().zip(messages) {
            world.send_bytes(through, &packet.bytes(), [0; 10]);
        }
        world.settle();
        let routers = |peer: &PeerSnapshot| peer.endpoint.is_some_and(|endpoint| *endpoint.ip() == ROUTER);
        let moved: usize = (0..world.shards.len())
            .map(|n| world.status(n).peers.iter().filter(|p| routers(p)).count())
            .sum();
        assert_eq!(moved, messages.len(), "the router is believed to be where they are");
        assert_eq!(world.sent_back, messages.len(), "the answer to each, once");
        assert_eq!(world.drops(), [("own_datagram", messages.len() as u64)].into());
        // The gateway calls them, and that comes back as well.
        world.pass(Duration::from_secs(600));
        assert!(world.sent_back < 40 * messages.len(), "{}", world.sent_back);
        assert_eq!(world.next_wakeup(), None, "nothing goes on for ever");
        for &(whose, _) in messages {
            world.take(whose);
            world.ping(whose, SERVER);
            world.pass(Duration::from_secs(6));
            assert_eq!(world.take_one(whose).source, SERVER, "who is heard of again is where it was");
        }
    }
}

#[test]
fn a_call_of_the_gateways_that_comes_back_to_it_is_not_taken_for_a_packet_that_wants_another_call() {
    for shards in [1, 2] {
        let mut world = World::with_shards(shards).connected();
        world.loops_back = true;
        let client = 1;
        let message =
            world.sealed_by(client, &Ip::echo(8, client_address(client), GATEWAY, 1, 1, b"where am I?"));
        world.send(client, &Ip::udp(endpoint(client_address(client), 5_000), LOOPBACK, &message));
        world.link.loss = 100; // it says no more
        // The session is over, and the mapping is not.
        world.pass(Duration::from_secs(200));
        let before = world.sent_back;
        world.send_from_host(&Ip::udp(endpoint(GATEWAY, 9), endpoint(client_address(client), 9), b"wake up"));
        world.pass(Duration::from_secs(600));
        let calls = world.sent_back - before;
        assert!((16..=18).contains(&calls), "{calls} in 90 s, and then no more");
        assert_eq!(world.next_wakeup(), None);
    }
}

#[test]
fn wireguard_inside_the_tunnel_passes_and_what_is_our_own_dies_alone() {
    let mut world = World::with_shards(2).connected();
    let (client, stranger) = (1, endpoint(SERVER, 51_820));
    let data = |index: [u8; 4]| [&[4, 0, 0, 0][..], &index, &[0x77; 88]].concat();
    world.send(client, &Ip::udp(endpoint(client_address(client), 5_000), stranger, &data([1, 2, 3, 4])));
    let inside = world.take_one_outside().from();
    // What was sealed for another client, and is lost: it lives on the other shard.
    world.move_client(0, endpoint([192, 0, 2, 66].into(), 1));
    world.send_from_host(&Ip::udp(endpoint(GATEWAY, 9), endpoint(client_address(0), 9), &[0x55; 30]));
    let own = world.lost.pop().unwrap();
    let other = data([5, 6, 7, 8])[..own.len()].to_vec();
    assert_eq!((own[0], own.len()), (4, other.len()));
    let large = |message: &[u8]| [message, &[0; 1_472 - 96]].concat();

    for (train, received) in [
        (vec![&other], 1),
        (vec![&own], 0),
        (vec![&other, &other, &other], 3),
        (vec![&own, &own, &own], 0),
        (vec![&own, &other, &other], 2),
        (vec![&other, &other, &own], 2),
    ] {
        for grown in [false, true] {
            // Also where each is cut for the tunnel.
            let datagrams: Vec<_> =
                train.iter().map(|&message| if grown { large(message) } else { message.clone() }).collect();
            let died = (train.len() - received) as u64;
            let before = world.drops().get("own_datagram").copied().unwrap_or_default();
            let packet = Ip::udp(stranger, inside, &datagrams.concat());
            if train.len() == 1 {
                world.arrive(&packet);
            } else {
                world.arrive_superpacket(&packet, datagrams[0].len());
            }
            let arrived = world.take(client);
            assert_eq!(arrived.len(), received * if grown { 2 } else { 1 }, "{received} of {}", train.len());
            assert_eq!(world.drops().get("own_datagram").copied().unwrap_or_default() - before, died);
        }
    }
    // From the host as well, and from another client.
    let to_client = |source| Ip::udp(endpoint(source, 9), endpoint(client_address(client), 9), &own);
    world.dies(DropReason::OwnDatagram, |world| world.send_from_host(&to_client(GATEWAY)));
    world.dies(DropReason::OwnDatagram, |world| world.send(2, &to_client(client_address(2))));
}

#[test]
fn what_another_shard_has_sealed_is_our_own_too_though_no_packet_has_crossed() {
    let mut world = World::with_shards(2).connected();
    let (client, other, stranger) = (1, 0, endpoint(SERVER, 51_820));
    world.send(client, &Ip::udp(endpoint(client_address(client), 5_000), stranger, b"from inside"));
    let inside = world.take_one_outside().from();
    // The other client, of the other shard, renews its session.
    world.pass(Duration::from_secs(121));
    world.handoffs_are_full = true;
    world.ping(other, GATEWAY);
    world.pass(Duration::from_secs(1));
    world.handoffs_are_full = false;
    assert!(world.drops().is_empty(), "no packet had to cross: {:?}", world.drops());
    world.move_client(other, endpoint([192, 0, 2, 66].into(), 1));
    world.send_from_host(&Ip::udp(endpoint(GATEWAY, 9), endpoint(client_address(other), 9), &[0x55; 30]));
    let own = world.lost.pop().unwrap();
    world.dies(DropReason::OwnDatagram, |world| world.arrive(&Ip::udp(stranger, inside, &own)));
}

#[test]
fn a_client_asks_the_gateways_dns_at_a_rate_of_its_own() {
    const BURST: usize = 128;
    const RATE: usize = 500;
    let dns = endpoint(GATEWAY, 53);
    let from = |client: usize| endpoint(client_address(client), 5_353);
    let tcp = |flags: u8| Ip::tcp(from(0), dns, &Tcp { flags, ..Tcp::default() }, &[]);
    for shards in [1, 2] {
        let mut world = World::with_shards(shards).connected();
        let ask = |world: &mut World, client: usize, times: usize| -> usize {
            (0..times).for_each(|_| world.send(client, &Ip::udp(from(client), dns, b"a query")));
            std::mem::take(&mut world.host).len()
        };
        assert_eq!(ask(&mut world, 0, BURST + 1_000), BURST);
        assert_eq!(world.drops(), [("client_dns_rate", 1_000)].into());
        world.dies(DropReason::ClientDnsRate, |world| world.send(0, &tcp(SYN)));
        world.dies(DropReason::ClientDnsRate, |world| {
            let fragments = Ip::udp(from(0), dns, &payload(4_000)).fragments(TUNNEL_MTU);
            fragments.iter().for_each(|fragment| world.send(0, fragment));
        });

        // What is no query, what goes elsewhere, and what others ask passes.
        world.send(0, &tcp(ACK));
        world.send(0, &Ip::udp(from(0), endpoint(GATEWAY, 54), b"another service"));
        world.send(0, &Ip::udp(from(0), endpoint(EXTERNAL, 53), b"another address"));
        world.ping(0, GATEWAY);
        assert_eq!(std::mem::take(&mut world.host).len(), 4);
        world.send(0, &Ip::udp(from(0), endpoint(SERVER, 53), b"another resolver"));
        world.take_one_outside();
        for other in [1, 2] {
            assert_eq!(ask(&mut world, other, BURST), BURST);
        }

        // It gets more as time passes, over TCP too, but never saves up more than a burst.
        world.pass(Duration::from_millis(100));
        world.send(0, &tcp(SYN));
        assert_eq!(ask(&mut world, 0, 1_000), RATE / 10);
        world.pass(Duration::from_secs(60));
        assert_eq!(ask(&mut world, 0, 1_000), BURST);
    }
}

#[test]
fn every_query_of_a_superpacket_counts() {
    let coalesce = CoalesceOptions { udp: true, ..CoalesceOptions::default() };
    let mut world = World::of(Plan { coalesce, ..Plan::default() }).connected();
    let train = Ip::udp(endpoint(client_address(0), 5_353), endpoint(GATEWAY, 53), &[0; 32 * 20]);
    (0..10).for_each(|_| world.send_superpacket(0, &train, 20));
    assert_eq!(world.host.len(), 128);
    assert_eq!(world.drops(), [("client_dns_rate", 10 * 32 - 128)].into());
}

#[test]
fn a_superpacket_of_queries_that_begins_within_the_burst_passes_whole_and_the_rest_is_owed() {
    let coalesce = CoalesceOptions { udp: true, ..CoalesceOptions::default() };
    let mut world = World::of(Plan { coalesce, ..Plan::default() }).connected();
    let train = Ip::udp(endpoint(client_address(0), 5_353), endpoint(GATEWAY, 53), &[0; 50 * 20]);
    (0..10).for_each(|_| world.send_superpacket(0, &train, 20));
    assert_eq!(std::mem::take(&mut world.host).len(), 150, "128 and the rest of the third superpacket");
    assert_eq!(world.drops(), [("client_dns_rate", 10 * 50 - 150)].into());
    // 22 are owed: after 50 ms, 3 of the next 25 are there.
    world.pass(Duration::from_millis(50));
    let query = Ip::udp(endpoint(client_address(0), 5_353), endpoint(GATEWAY, 53), b"a query");
    (0..25).for_each(|_| world.send(0, &query));
    assert_eq!(world.host.len(), 3);
}

#[test]
fn a_refused_superpacket_counts_as_the_packets_that_it_stands_for_wherever_it_comes_from() {
    let coalesce = CoalesceOptions { udp: true, ..CoalesceOptions::default() };
    for shards in [1, 2] {
        let mut world = World::of(Plan { shards, coalesce, ..Plan::default() }).connected();
        let tcp = Tcp { flags: ACK, ..Tcp::default() };
        let stranger = endpoint(SERVER, 443);
        // From outside, for a port that nobody has.
        let inbound = Ip::tcp(stranger, endpoint(EXTERNAL, 9), &tcp, &payload(3_000));
        world.dies_times(DropReason::NoMapping, 3, |world| world.arrive_superpacket(&inbound, 1_000));
        // From the host, to an address that is no peer's.
        let from_host = Ip::tcp(endpoint(GATEWAY, 9), endpoint(client_address(77), 9), &tcp, &payload(3_000));
        let header = kernel::superpacket_header(&from_host, 1_000, 0);
        world.dies_times(DropReason::NoSuchPeer, 3, |world| {
            world.send_from_host_bytes(&from_host.clone().partial().bytes(), header);
            world.settle();
        });
        // To a neighbour that does not answer.
        world.arp_is_silent = true;
        let out = Ip::udp(endpoint(client_address(0), 9), endpoint(NEIGHBOUR, 9), &payload(3_000));
        world.send_superpacket(0, &out, 1_000);
        let mut expected = world.drops();
        *expected.entry("next_hop_unresolved").or_default() += 3;
        world.pass(Duration::from_secs(60));
        assert_eq!(world.drops(), expected);
        assert_eq!(world.take_one(0).icmp(), (3, 1), "of the three, its client is told once");
        // The same, and the link has another router meanwhile.
        world.send_superpacket(0, &out, 1_000);
        world.dies_times(DropReason::NextHopUnresolved, 3, |world| world.set_router(ROUTER));
    }
}
