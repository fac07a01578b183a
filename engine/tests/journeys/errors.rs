//! ICMP errors: the gateway's own, and those of others that pass through it (RFC 5508, RFC 1191).

use std::net::Ipv4Addr;
use std::time::Duration;

use tidegate_engine::drop_reason::DropReason;
use tidegate_engine::nat::{NatConfig, Proto};
use tidegate_engine::wire::CoalesceOptions;

use super::flow::{Flow, HTTPS};
use super::packets::*;
use super::world::*;

fn here(client: usize) -> std::net::SocketAddrV4 {
    endpoint(client_address(client), 5_000)
}

#[test]
fn traceroute_shows_the_gateway_and_then_the_router() {
    for shards in [1, 2] {
        let mut world = World::with_shards(shards).connected();
        for client in 0..3 {
            let probe = |ttl: u8| {
                let to = endpoint(SERVER, 33_434 + u16::from(ttl));
                Ip::udp(here(client), to, b"traceroute").with(|ip| ip.ttl = ttl)
            };
            world.send(client, &probe(1));
            let first = world.take_one(client);
            assert_eq!((first.source, first.icmp()), (GATEWAY, (11, 0)));
            assert_eq!(first.quoted(), Ip { body: first.quoted().body, ..probe(1) });
            assert_eq!((first.quoted().from(), first.quoted().to()), (here(client), probe(1).to()));
            assert!(world.take_outside().is_empty());

            world.send(client, &probe(2));
            let second = world.take_one(client);
            assert_eq!((second.source, second.icmp()), (ROUTER, (11, 0)));
            assert_eq!((second.quoted().from(), second.quoted().to()), (here(client), probe(2).to()));
            assert_eq!(world.take_one_outside().ttl, 1);
        }
    }
}

#[test]
fn what_is_too_big_for_the_external_link_is_answered_with_its_mtu() {
    let mut world = World::of(Plan { external_mtu: 1300, ..Plan::default() }).connected();
    let packet = Ip::udp(here(0), endpoint(SERVER, 9), &payload(1300)).dont_fragment();
    world.send(0, &packet);
    let error = world.take_one(0);
    assert_eq!((error.source, error.icmp(), error.mtu()), (GATEWAY, (3, 4), 1300));
    assert_eq!((error.quoted().from(), error.quoted().to()), (here(0), packet.to()));
    assert!(error.len() <= 576 && world.outside.is_empty());

    // A superpacket whose segments are too big is one mistake, not thirty: its first segment is quoted.
    let mut flow = Flow::open(&mut world, 0, 50_000, HTTPS);
    flow.send_up(&mut world, &payload(40_000), 1360);
    let error = world.take_one(0);
    assert_eq!((error.source, error.icmp(), error.mtu()), (GATEWAY, (3, 4), 1300));
    assert_eq!(half(&error.body[8..], 2), 1400, "the length of one segment");
    assert_eq!(word(&error.quoted().body, 4), 1_001, "the first sequence number");
}

#[test]
fn what_is_too_big_for_the_tunnel_is_answered_with_its_mtu_and_the_headers_its_sender_knows() {
    for shards in [1, 2] {
        let mut world = World::with_shards(shards).connected();
        for client in [0, 1] {
            let mut flow = Flow::open(&mut world, client, 50_000, HTTPS);
            flow.send_down(&mut world, &payload(14_600), 1460);
            assert!(world.take(client).is_empty());
            let error = world.take_one_outside();
            assert_eq!((error.source, error.destination), (EXTERNAL, SERVER));
            assert_eq!((error.icmp(), error.mtu()), ((3, 4), 1420));
            assert_eq!((error.quoted().from(), error.quoted().to()), (HTTPS, flow.external));
            assert_eq!(half(&error.body[8..], 2), 1500, "the length of one segment");
            assert_eq!(error.len(), 576, "as much is quoted as an error may hold, as towards clients");
        }
    }
}

#[test]
fn a_packet_from_outside_at_the_end_of_its_life_is_answered_only_if_it_is_for_a_mapping() {
    let mut world = World::new().connected();
    world.send(0, &Ip::udp(here(0), endpoint(SERVER, 9), b"mapped"));
    let external = world.take_one_outside().from();
    let last = |to| Ip::udp(endpoint(SERVER, 9), to, b"last breath").with(|ip| ip.ttl = 1);
    world.arrive(&last(external));
    let error = world.take_one_outside();
    assert_eq!((error.source, error.destination, error.icmp()), (EXTERNAL, SERVER, (11, 0)));
    assert_eq!((error.quoted().from(), error.quoted().to()), (endpoint(SERVER, 9), external));
    let other = endpoint(EXTERNAL, if external.port() == 40_000 { 40_001 } else { 40_000 });
    world.dies(DropReason::NoMapping, |world| world.arrive(&last(other)));
}

#[test]
fn errors_of_the_internet_reach_the_right_client_with_the_headers_it_knows() {
    for shards in [1, 2] {
        let mut world = World::with_shards(shards).connected();
        for client in 0..3 {
            let to = endpoint(SERVER, 33_000);
            world.send(client, &Ip::udp(here(client), to, b"is this port open?"));
            let outside = world.take_one_outside();
            for quote in [28, 46] {
                world.arrive(&Ip::icmp_error(SERVER, &outside, 3, 3, 0, quote));
                let error = world.take_one(client);
                assert_eq!((error.source, error.icmp()), (SERVER, (3, 3)));
                assert_eq!((error.quoted().from(), error.quoted().to()), (here(client), to));
            }

            let mut flow = Flow::open(&mut world, client, 50_000, HTTPS);
            flow.send_up(&mut world, &payload(4_000), 1360);
            let segments = world.take_outside();
            world.arrive(&Ip::icmp_error(ROUTER, &segments[1], 3, 4, 1280, 40));
            let error = world.take_one(client);
            assert_eq!((error.source, error.icmp(), error.mtu()), (ROUTER, (3, 4), 1280));
            assert_eq!((error.quoted().from(), error.quoted().to()), (flow.local, HTTPS));

            world.send(client, &Ip::echo(8, client_address(client), SERVER, 99, 5, b"ping"));
            let request = world.take_one_outside();
            world.take(client);
            world.arrive(&Ip::icmp_error(ROUTER, &request, 3, 1, 0, 28));
            let error = world.take_one(client);
            assert_eq!((error.quoted().source, error.quoted().identifier()), (client_address(client), 99));
        }
        assert!(world.drops().is_empty(), "{:?}", world.drops());
    }
}

#[test]
fn a_forged_error_dies_in_silence() {
    for shards in [1, 2] {
        let mut world = World::with_shards(shards).connected();
        let mut flow = Flow::open(&mut world, 1, 50_000, HTTPS);
        flow.send_up(&mut world, b"data", 1360);
        let genuine = world.take_one_outside();
        let forgeries = [
            genuine.clone().with(|ip| ip.body[4] ^= 0x40), // a sequence number that is not in flight
            genuine.clone().with(|ip| ip.body[1] ^= 2),    // another port of the same shard
            genuine.clone().with(|ip| ip.body[3] ^= 1),    // a destination with which nobody talks
            genuine.clone().with(|ip| ip.source = ROUTER),
        ];
        for forged in forgeries {
            let error = Ip::icmp_error(ROUTER, &forged, 3, 4, 68, 40).with(|ip| ip.destination = EXTERNAL);
            world.dies(DropReason::IcmpErrorUnmatched, |world| world.arrive(&error));
        }
        let mut damaged = Ip::icmp_error(ROUTER, &genuine, 3, 4, 1280, 40);
        damaged.body[5] ^= 1;
        world.dies(DropReason::BadTransportChecksum, |world| world.arrive(&damaged));
        world.arrive(&Ip::icmp_error(ROUTER, &genuine, 3, 4, 1280, 40));
        assert_eq!(world.take_one(1).mtu(), 1280, "the genuine one passes");
    }
}

#[test]
fn a_clients_error_about_what_it_received_reaches_the_internet_as_the_gateways() {
    let mut world = World::new().connected();
    world.send(0, &Ip::udp(here(0), endpoint(SERVER, 9), b"query"));
    let external = world.take_one_outside().from();
    world.arrive(&Ip::udp(endpoint(SERVER, 9), external, b"too late"));
    let late = world.take_one(0);
    world.send(0, &Ip::icmp_error(client_address(0), &late, 3, 3, 0, 36));
    let error = world.take_one_outside();
    assert_eq!((error.source, error.destination, error.icmp()), (EXTERNAL, SERVER, (3, 3)));
    assert_eq!((error.quoted().from(), error.quoted().to()), (endpoint(SERVER, 9), external));
}

#[test]
fn a_client_that_uses_up_the_ports_is_told_and_nobody_else_is_hurt() {
    let mut world = World::of(Plan { port_range: (40_000, 40_003), ..Plan::default() }).connected();
    let probe =
        |client, port| Ip::udp(endpoint(client_address(client), port), endpoint(SERVER, ECHO_PORT), b"echo");
    world.send(1, &probe(1, 7_000));
    world.take_one(1);
    for port in 5_000..5_003 {
        world.send(0, &probe(0, port));
        world.take_one(0);
    }
    let requests = world.reserve_requests;
    for port in 5_003..5_010 {
        world.send(0, &probe(0, port));
        let refusal = world.take_one(0);
        assert_eq!((refusal.source, refusal.icmp()), (GATEWAY, (3, 13)));
        assert_eq!(refusal.quoted().from(), endpoint(client_address(0), port));
    }
    assert_eq!(world.drops(), [("ports_exhausted", 7)].into());
    assert!(world.reserve_requests <= requests + 1, "a reserver that has no more is left in peace");
    for (client, port) in [(1, 7_000), (0, 5_000), (0, 5_002)] {
        world.send(client, &probe(client, port));
        assert_eq!(world.take_one(client).data(), b"echo", "mappings go on");
    }
    // TCP has ports of its own.
    Flow::open(&mut world, 2, 50_000, HTTPS);

    // When a mapping has expired and its port has rested, the port is lent again.
    world.pass(Duration::from_secs(301 + 121));
    world.send(2, &probe(2, 9_000));
    assert_eq!(world.take_one(2).data(), b"echo");
}

#[test]
fn a_client_whose_shared_port_is_taken_towards_a_destination_is_told_though_more_ports_may_come() {
    let mut world = World::of(Plan { port_range: (40_000, 40_000), ..Plan::default() }).connected();
    let owner = Flow::open(&mut world, 0, 50_000, HTTPS);
    let sharer = Flow::open(&mut world, 1, 50_000, endpoint(NEIGHBOUR, 443));
    assert_eq!(sharer.external, owner.external);
    world.pass(Duration::from_secs(11)); // the shortage is over, as far as is known
    let follower = Flow { remote: HTTPS, ..sharer };
    world.send(1, &follower.segment_up(SYN, &[]));
    assert_eq!(world.drops(), [("shared_port_taken", 1)].into());
    let refusal = world.take_one(1);
    assert_eq!((refusal.source, refusal.icmp()), (GATEWAY, (3, 13)));
    assert_eq!((refusal.quoted().from(), refusal.quoted().to()), (follower.local, HTTPS));
}

#[test]
fn a_client_that_has_all_it_may_have_is_told() {
    let config = NatConfig::default;
    let (another_mapping, another_session) = ((5_001, 9), (5_000, 10));
    // Each of the three clients has a mapping already, of the ping with which it came.
    for (nat, (port, to), reason) in [
        (
            NatConfig { max_mappings_per_client: 2, ..config() },
            another_mapping,
            DropReason::ClientMappingLimit,
        ),
        (
            NatConfig { max_new_mappings_per_second: 1, ..config() },
            another_mapping,
            DropReason::ClientMappingRate,
        ),
        (NatConfig { max_mappings: 3 + 1, ..config() }, another_mapping, DropReason::MappingsExhausted),
        (NatConfig { max_sessions_per_mapping: 1, ..config() }, another_session, DropReason::SessionLimit),
    ] {
        let mut world = World::of(Plan { nat, ..Plan::default() }).connected();
        world.pass(Duration::from_secs(2));
        world.send(0, &Ip::udp(here(0), endpoint(SERVER, 9), b"one"));
        world.take_one_outside();
        world.send(0, &Ip::udp(endpoint(client_address(0), port), endpoint(SERVER, to), b"one more"));
        let refusal = world.take_one(0);
        assert_eq!((refusal.source, refusal.icmp()), (GATEWAY, (3, 13)), "{}", reason.name());
        assert_eq!(refusal.quoted().from(), endpoint(client_address(0), port));
        assert_eq!(world.drops(), [(reason.name(), 1)].into());
        assert!(world.take_outside().is_empty());
    }
}

#[test]
fn a_destination_without_a_route_is_told_to_be_unreachable() {
    let mut world = World::new().connected();
    world.send(0, &Ip::udp(here(0), endpoint(client_address(77), 9), b"nobody holds this address"));
    assert_eq!(world.take_one(0).icmp(), (3, 1));
    world.remove_router();
    world.send(0, &Ip::udp(here(0), endpoint(SERVER, 9), b"no way"));
    let error = world.take_one(0);
    assert_eq!((error.source, error.icmp()), (GATEWAY, (3, 0)));
    assert_eq!((error.quoted().from(), error.quoted().to()), (here(0), endpoint(SERVER, 9)));
    assert_eq!(world.drops(), [("no_such_peer", 1), ("no_route", 1)].into());
    assert_eq!(world.status(0).mappings, [0, 0, 3], "no port was wasted on it");
    world.send(0, &Ip::udp(here(0), endpoint(NEIGHBOUR, ECHO_PORT), b"neighbours are reached"));
    assert_eq!(world.take_one(0).source, NEIGHBOUR);
}

#[test]
fn a_neighbour_that_does_not_answer_is_told_to_be_unreachable() {
    for shards in [1, 2] {
        let mut world = World::with_shards(shards).connected();
        let mappings = world.mappings();
        world.arp_is_silent = true;
        for client in 0..3 {
            let began = world.now;
            let to = endpoint(Ipv4Addr::new(203, 0, 113, 80 + client as u8), 443);
            let syn = |port| {
                let header = Tcp { sequence: 7_000, flags: SYN, window: 500, ..Tcp::default() };
                Ip::tcp(endpoint(client_address(client), port), to, &header, &[])
            };
            let is_told = |world: &mut World, port| {
                let error = world.take_one(client);
                assert_eq!((error.source, error.icmp()), (GATEWAY, (3, 1)), "RFC 1812 §5.2.7.1");
                let quoted = error.quoted();
                assert_eq!((quoted.from(), quoted.to()), (syn(port).from(), to));
                assert_eq!(word(&quoted.body, 4), 7_000, "the sequence number");
            };
            world.send(client, &syn(50_000));
            assert!(world.take(client).is_empty(), "it may answer yet");
            world.pass(Duration::from_secs(3));
            is_told(&mut world, 50_000);
            let held = world.mappings();
            assert_eq!(held, mappings + client + 1);
            // Whoever asks again while it is known not to answer is told at once, and no port is lent for it.
            for port in [50_000, 50_001] {
                world.send(client, &syn(port));
                is_told(&mut world, port);
            }
            assert_eq!((world.mappings(), world.now.since(began)), (held, Duration::from_secs(3)));
            world.ping(client, SERVER);
            assert_eq!(world.take_one(client).source, SERVER, "all others are reached");
            world.take_outside();
        }
        assert_eq!(world.drops(), [("next_hop_unresolved", 9)].into());
        // After a while it is asked for again.
        world.pass(Duration::from_secs(5));
        world.arp_is_silent = false;
        let to = Ipv4Addr::new(203, 0, 113, 80);
        world.ping(0, to);
        assert_eq!(world.take_one(0).source, to);
    }
}

#[test]
fn a_client_that_knocks_at_silent_neighbours_does_not_use_up_the_errors_of_the_others() {
    let mut world = World::new().connected();
    world.arp_is_silent = true;
    let knock = |world: &mut World, client, port, neighbour| {
        let to = endpoint(Ipv4Addr::new(203, 0, 113, neighbour), 443);
        world.send(client, &Ip::udp(endpoint(client_address(client), port), to, b"is anybody there"));
    };
    for port in 0..100 {
        knock(&mut world, 0, 50_000 + port, 80);
    }
    world.pass(Duration::from_millis(10));
    knock(&mut world, 1, 50_000, 81);
    world.pass(Duration::from_secs(3));
    let told = world.take(0).len();
    assert!((10..=25).contains(&told), "{told}");
    assert_eq!(world.take_one(1).icmp(), (3, 1));
}

#[test]
fn a_router_that_does_not_answer_makes_what_is_behind_it_unreachable() {
    let coalesce = CoalesceOptions { udp: true, ..CoalesceOptions::default() };
    let mut world = World::of(Plan { coalesce, ..Plan::default() }).connected();
    let other = Ipv4Addr::new(203, 0, 113, 2);
    world.arp_is_silent = true;
    world.set_router(other);
    let superpacket = Ip::udp(here(0), endpoint(SERVER, 9), &payload(3_000));
    world.send_superpacket(0, &superpacket, 1_000);
    world.pass(Duration::from_secs(3));
    let error = world.take_one(0);
    assert_eq!((error.source, error.icmp(), error.quoted().to()), (GATEWAY, (3, 1), superpacket.to()));
    assert_eq!(half(&error.body[8..], 2), 1_028, "the length of one segment");
    assert_eq!(world.drops(), [("next_hop_unresolved", 3)].into());
    // An error about an error would be one too many.
    let answered = Ip::udp(endpoint(SERVER, 9), here(0), b"late");
    world.send(0, &Ip::icmp_error(client_address(0), &answered, 3, 3, 0, 28));
    assert_eq!(world.take(0), vec![]);
}

#[test]
fn errors_are_limited_and_never_answered_with_errors() {
    let mut world = World::new().connected();
    for i in 0..200 {
        world.send(0, &Ip::udp(here(0), endpoint(SERVER, 1_000 + i), b"").with(|ip| ip.ttl = 1));
    }
    let errors = world.take(0);
    assert!((10..=25).contains(&errors.len()), "{}", errors.len());
    world.pass(Duration::from_secs(10));
    let about = Ip::udp(endpoint(SERVER, 9), here(0), b"");
    world.send(0, &Ip::icmp_error(client_address(0), &about, 3, 3, 0, 28).with(|ip| ip.ttl = 1));
    assert!(world.take(0).is_empty() && world.outside.is_empty());
}

#[test]
fn forged_packets_from_outside_do_not_use_up_the_errors_that_clients_get() {
    let mut world = World::new().connected();
    world.publish(Proto::Udp, 45_000, endpoint(client_address(0), 53)).unwrap();
    for n in 0..1_000 {
        let nobody = endpoint(Ipv4Addr::from_bits(0x0808_0000 + n), 53);
        world.arrive(&Ip::udp(nobody, endpoint(EXTERNAL, 45_000), b"query").with(|ip| ip.ttl = 1));
    }
    assert!(world.take_outside().len() < 600, "those to the outside are limited");
    for port in 0..20 {
        world
            .send(1, &Ip::udp(here(1), endpoint(SERVER, 33_434 + port), b"traceroute").with(|ip| ip.ttl = 1));
    }
    assert_eq!(world.take(1).len(), 20);
}

/// A segment of a connection from before the gateway's restart.
fn stale(client: usize, port: u16, flags: u8, data: &[u8]) -> Ip {
    let header = Tcp { sequence: 7_000, acknowledgment: 3_000, flags, window: 500, options: Vec::new() };
    Ip::tcp(endpoint(client_address(client), port), HTTPS, &header, data)
}

#[test]
fn a_segment_of_a_connection_that_a_restart_ended_is_answered_with_a_reset_that_its_sender_believes() {
    let mut world = World::with_shards(2).connected();
    world.send(1, &stale(1, 50_000, ACK | PSH, b"GET /"));
    let reset = world.take_one(1);
    assert_eq!((reset.from(), reset.to()), (HTTPS, endpoint(client_address(1), 50_000)));
    let header = reset.tcp_header();
    assert_eq!(
        (header.flags, header.sequence),
        (RST, 3_000),
        "RFC 9293 §3.10.7.1: the sequence number is their ACK"
    );
    assert_eq!(world.drops()["tcp_out_of_state"], 1, "and the segment is a dropped one");
    assert!(world.take_outside().is_empty(), "nobody outside hears of it");
    assert_eq!(world.mappings(), 3, "nothing is opened but the pings' mappings");
}

#[test]
fn resets_are_not_answered_and_nobody_outside_gets_any() {
    let mut world = World::new().connected();
    world.send(0, &stale(0, 50_000, RST | ACK, b""));
    assert!(world.take(0).is_empty());

    let flow = Flow::open(&mut world, 0, 50_001, HTTPS);
    for flags in [ACK, FIN | ACK, SYN | ACK, 0] {
        let header = Tcp { sequence: 5, acknowledgment: 6, flags, window: 7, ..Tcp::default() };
        world.arrive(&Ip::tcp(endpoint(SERVER, 444), flow.external, &header, b"?"));
    }
    assert!(world.take_outside().is_empty());
    assert!(world.take(0).iter().all(|ip| ip.tcp_header().flags & RST == 0));
}

#[test]
fn a_client_with_many_lost_connections_gets_resets_at_the_rate_of_errors() {
    let mut world = World::new().connected();
    for port in 0..500 {
        world.send(0, &stale(0, 20_000 + port, ACK, b"x"));
    }
    let at_once = world.take(0).len();
    assert!((10..=20).contains(&at_once), "{at_once}");
    // A keyed hash puts one pair of clients in a thousand into the same bucket, but hardly three.
    let answered = (1..3).filter(|&other| {
        world.send(other, &stale(other, 50_000, ACK, b"x"));
        world.take(other).len() == 1
    });
    assert!(answered.count() > 0, "other clients are not silenced by that");
    world.pass(Duration::from_secs(1));
    world.send(0, &stale(0, 20_000, ACK, b"x"));
    assert_eq!(world.take(0).len(), 1, "who asks again is answered later");
    assert_eq!(world.drops()["tcp_out_of_state"], 503);
}
