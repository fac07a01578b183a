//! Peers, neighbours, mappings and the gateway itself, as time passes.

use std::net::SocketAddrV4;
use std::time::Duration;

use tidegate_engine::core::Core;
use tidegate_engine::drop_reason::DropReason;
use tidegate_engine::external::reservation::PortProtocol;
use tidegate_engine::messages::{Command, EventKind};
use tidegate_engine::nat::{MappingEvent, MappingRecord, NatConfig, Proto};

use super::flow::{Flow, HTTPS};
use super::packets::*;
use super::world::*;

const SECOND: Duration = Duration::from_secs(1);

fn echo(client: usize, port: u16) -> Ip {
    Ip::udp(endpoint(client_address(client), port), endpoint(SERVER, ECHO_PORT), b"echo")
}

#[test]
fn packets_wait_for_the_next_hops_link_address_and_leave_in_order() {
    let mut world = World::new();
    world.arp_is_silent = true;
    for i in 0..10 {
        world.send(0, &Ip::udp(endpoint(client_address(0), 5_000), endpoint(SERVER, 9), &[i]));
    }
    assert!(world.outside.is_empty());
    assert_eq!(world.arp_requests, [ROUTER], "asked once");
    world.pass(SECOND);
    assert_eq!(world.arp_requests, [ROUTER, ROUTER]);
    world.arp(0, arp_reply(ROUTER).to_vec());
    world.settle();
    let data: Vec<u8> = world.take_outside().iter().map(|packet| packet.data()[0]).collect();
    assert_eq!(data, (0..10).collect::<Vec<u8>>());
    assert!(world.drops().is_empty());
}

#[test]
fn a_next_hop_that_does_not_answer_keeps_few_packets_and_not_for_long() {
    let mut world = World::new();
    world.arp_is_silent = true;
    for i in 0..132 {
        world.send(0, &Ip::udp(endpoint(client_address(0), 5_000), endpoint(SERVER, 9), &[i]));
    }
    assert_eq!(world.drops(), [("next_hop_unresolved", 4)].into(), "no more than 128 wait");
    world.pass(4 * SECOND);
    assert_eq!(world.drops(), [("next_hop_unresolved", 132)].into());
    world.dies(DropReason::UnsolicitedArp, |world| world.arp(0, arp_reply(ROUTER).to_vec()));
    // Another neighbour is another matter.
    world.arp_is_silent = false;
    world.send(0, &Ip::udp(endpoint(client_address(0), 5_000), endpoint(NEIGHBOUR, 9), b"neighbour"));
    assert_eq!(world.take_one_outside().destination, NEIGHBOUR);
    world.pass(6 * SECOND);
    world.send(0, &echo(0, 5_000));
    assert_eq!(world.take_outside().len(), 1, "and after a while it is asked again");
}

/// 4,096 UDP ports, which come in batches of 2,048 at most.
fn with_4096_ports() -> World {
    let nat = NatConfig { max_new_mappings_per_second: 1_000_000, ..NatConfig::default() };
    World::of(Plan { port_range: (40_000, 44_095), nat, ..Plan::default() }).connected()
}

/// A client sends from each of these ports. How many packets get through?
fn insist(world: &mut World, client: usize, ports: std::ops::Range<u16>) -> usize {
    for port in ports {
        world.send(client, &Ip::udp(endpoint(client_address(client), port), endpoint(SERVER, 9), b""));
    }
    world.take(client);
    world.take_outside().len()
}

#[test]
fn the_last_eighth_of_the_ports_is_set_aside_for_others_however_long_two_clients_insist() {
    let mut world = with_4096_ports();
    let taken = insist(&mut world, 0, 2_000..4_500) + insist(&mut world, 1, 2_000..4_500);
    assert_eq!(taken, 4_096 - 512);
    for round in 0..3 {
        world.pass(11 * SECOND);
        let more = [0, 1].map(|client| insist(&mut world, client, 5_000..5_100));
        assert_eq!(more, [0, 0], "round {round}: that there are no more is not forgotten");
    }
    assert_eq!(insist(&mut world, 2, 2_000..2_600), 512);
}

#[test]
fn who_has_a_share_of_the_ports_gets_more_when_there_are_more() {
    let mut world = with_4096_ports();
    // Half of them are a program's of the host, for now.
    let hold = |world: &World, held: bool| {
        for port in 42_048..=44_095 {
            assert!(world.ownership.set(PortProtocol::Udp, SocketAddrV4::new(EXTERNAL, port), held));
        }
    };
    hold(&world, true);
    assert_eq!(insist(&mut world, 0, 2_000..4_500), 2_048 - 256);
    hold(&world, false);
    world.pass(11 * SECOND);
    let more = insist(&mut world, 0, 5_000..5_100);
    assert_eq!(more, 99, "the first one asks");
}

#[test]
fn a_client_with_a_thousand_ports_below_1024_takes_few_of_those_of_the_host() {
    for shards in [1, 2] {
        let nat = NatConfig { max_new_mappings_per_second: 1_000_000, ..NatConfig::default() };
        let mut world = World::of(Plan { shards, nat, ..Plan::default() }).connected();
        assert_eq!(insist(&mut world, 0, 24..1_024), 1_000, "the others get unprivileged ports");
        for port in 24..1_024 {
            let syn = Tcp { flags: SYN, ..Tcp::default() };
            world.send(0, &Ip::tcp(endpoint(client_address(0), port), HTTPS, &syn, &[]));
        }
        assert_eq!(world.take_outside().len(), 1_000);
        for protocol in [PortProtocol::Tcp, PortProtocol::Udp] {
            let taken = (512..1_024).filter(|&port| world.ownership.is_reserved(protocol, EXTERNAL, port));
            // The shard of the client has its part, and the other one has begun with one.
            let most = 32 / usize::from(shards) + usize::from(shards) - 1;
            assert_eq!(taken.count(), most, "{protocol:?} of {shards} shards");
        }
    }
}

#[test]
fn ports_that_are_kept_for_the_host_from_now_on_are_returned_when_nobody_uses_them() {
    let mut world = with_4096_ports();
    let kept = |world: &World, protocol| {
        (42_000..=44_095).filter(|&port| world.ownership.is_reserved(protocol, EXTERNAL, port)).count()
    };
    assert_eq!(insist(&mut world, 0, 2_000..4_500), 2_500);
    let used = world.mappings();
    let before = kept(&world, PortProtocol::Udp);
    assert!(before > 500, "{before}");
    let keep = |world: &mut World, kept_ports| {
        world.kept_ports = kept_ports;
        let config = NatConfig { kept_ports, max_new_mappings_per_second: 1_000_000, ..NatConfig::default() };
        world.tell_all(|| Command::SetNat { config: config.clone(), port_range: (40_000, 44_095) });
    };
    keep(&mut world, Some((42_000, 44_095)));
    let in_use = kept(&world, PortProtocol::Udp);
    assert!(in_use < before, "{in_use}: the free ones are the host's again");
    assert_eq!(world.mappings(), used, "what was mapped stays mapped");
    world.pass(Duration::from_secs(302 + 122));
    assert_eq!([PortProtocol::Tcp, PortProtocol::Udp].map(|protocol| kept(&world, protocol)), [0, 0]);
    assert_eq!(insist(&mut world, 0, 2_000..4_500), 2_000 - 250, "of the others");

    keep(&mut world, None);
    assert!(insist(&mut world, 1, 2_000..4_500) > 1_000, "they are the gateway's by its settings");
}

#[test]
fn a_new_router_takes_over_and_connections_go_on() {
    for shards in [1, 2] {
        let mut world = World::with_shards(shards).connected();
        let mut flow = Flow::open(&mut world, 1, 50_000, HTTPS);
        let asked = world.arp_requests.len();
        world.set_router([203, 0, 113, 2].into());
        flow.send_up(&mut world, b"by another way", 1360);
        let segment = world.take_one_outside(); // the world checks its link address
        assert_eq!(segment.from(), flow.external, "the mapping is the same");
        assert_eq!(world.arp_requests[asked..], [std::net::Ipv4Addr::new(203, 0, 113, 2)]);
        flow.send_down(&mut world, b"answer", 1360);
        assert_eq!(world.take_one(1).data(), b"answer");
        assert!(world.drops().is_empty());
    }
}

#[test]
fn a_router_that_changes_its_card_is_found_again() {
    let mut world = World::new().connected();
    let asked = world.arp_requests.len();
    for _ in 0..9 {
        world.pass(10 * SECOND);
        world.send(0, &echo(0, 5_000));
    }
    let asked = world.arp_requests.len() - asked;
    assert!((2..=3).contains(&asked), "confirmed every half minute while in use, not {asked} times");
    assert!(world.drops().is_empty());
}

#[test]
fn a_removed_peer_takes_its_mappings_along_and_disturbs_nobody() {
    for shards in [1, 2] {
        let mut world = World::with_shards(shards).connected();
        let mut flows: Vec<Flow> =
            (0..3).map(|client| Flow::open(&mut world, client, 50_000, HTTPS)).collect();
        for flow in &mut flows {
            flow.send_up(&mut world, &payload(5_000), 1360);
        }
        world.take_outside();
        let mappings = world.mappings();
        world.remove_peer(0);
        assert_eq!(world.mappings(), mappings - 2, "its TCP and its ICMP mapping");
        let late = flows[0].segment_down(ACK, b"late");
        world.dies(DropReason::NoMapping, |world| world.arrive(&late));
        let early = flows[0].segment_up(ACK, b"still here");
        world.dies(DropReason::UnknownSession, |world| world.send(0, &early));
        for flow in &mut flows[1..] {
            flow.send_up(&mut world, b"undisturbed", 1360);
            assert_eq!(world.take_one_outside().from(), flow.external);
            flow.send_down(&mut world, b"likewise", 1360);
            assert_eq!(world.take_one(flow.client).data(), b"likewise");
        }
        world.send(1, &Ip::udp(endpoint(client_address(1), 1), endpoint(client_address(0), 2), b"gone?"));
        assert_eq!(world.take_one(1).icmp(), (3, 1));

        world.set_peer(0, 0);
        world.pass(20 * SECOND); // it notices the silence and makes a new handshake
        world.ping(0, SERVER);
        assert!(world.take(0).iter().any(|packet| packet.source == SERVER), "it may come back");
    }
}

#[test]
fn a_client_is_called_where_it_was_before_the_restart_and_is_reached_at_once() {
    for shards in [1, 2] {
        let mut world = World::with_shards(shards);
        for client in 0..world.clients.len() {
            world.call_peer(client, world.endpoints[client]);
            world.send_from_host(&Ip::udp(
                endpoint(GATEWAY, 9),
                endpoint(client_address(client), 9),
                b"there?",
            ));
            assert_eq!(world.take_one(client).data(), b"there?");
            let shard = world.home_of(client);
            let peers = world.status(shard).peers;
            let peer = peers.iter().find(|peer| peer.address == Some(client_address(client))).unwrap();
            assert_eq!(peer.last_handshake, Some(Duration::ZERO));
        }
        assert!(world.drops().is_empty());
    }
}

#[test]
fn a_client_that_is_no_longer_there_is_called_for_a_minute_and_a_half() {
    let mut world = World::new();
    let gone = "192.0.2.200:40000".parse().unwrap();
    world.call_peer(0, gone);
    assert_eq!(world.lost.len(), 1);
    world.pass(Duration::from_secs(100));
    let calls = world.lost.len();
    assert!((12..=19).contains(&calls), "every five seconds: {calls}");
    world.pass(Duration::from_secs(3600));
    assert_eq!(world.lost.len(), calls);
    assert_eq!(world.next_wakeup(), None);
    world.ping(0, SERVER);
    assert!(!world.take(0).is_empty(), "and it comes back from elsewhere");
}

#[test]
fn nobody_is_called_inside_the_vpn() {
    let mut world = World::new();
    world.call_peer(0, endpoint(client_address(9), 51_820));
    world.pass(Duration::from_secs(100));
    assert!(world.lost.is_empty());
    assert_eq!(world.status(0).peers.iter().filter_map(|peer| peer.endpoint).count(), 0);
    assert!(world.drops().is_empty());
}

#[test]
fn many_clients_are_called_one_after_another() {
    let clients = 60;
    let mut world = World::of(Plan { clients, ..Plan::default() });
    let told =
        |world: &World| world.status(0).peers.iter().filter(|peer| peer.last_handshake.is_some()).count();
    for client in 0..clients {
        world.call_peer(client, world.endpoints[client]);
    }
    assert_eq!(told(&world), 16, "at once");
    world.pass(Duration::from_millis(100));
    assert_eq!(told(&world), 26, "and 100 a second");
    world.pass(SECOND);
    assert_eq!(told(&world), clients);
}

#[test]
fn that_handshakes_were_completed_is_told_once_in_a_turn() {
    for shards in [1, 2] {
        let world = World::with_shards(shards).connected();
        let kinds: Vec<EventKind> = world.told.take().into_iter().map(|event| event.kind).collect();
        assert_eq!(kinds, [EventKind::HandshakeCompleted], "one that nobody has read says it all");
    }
    let mut world = World::new().connected();
    world.told.take();
    world.ping(0, SERVER);
    assert_eq!(world.told.take(), [], "a packet is no handshake");
    world.pass(Duration::from_secs(130));
    world.ping(0, SERVER);
    assert_eq!(world.told.take().len(), 1, "a renewal is one");
}

#[test]
fn whoever_is_refused_is_told_of_with_the_reason() {
    for shards in [1, 2] {
        let mut world = World::with_shards(shards);
        let replayed = world.record(|world| world.ping(1, SERVER)).swap_remove(0);
        world.remove_peer(0);
        world.told.take();
        world.ping(0, SERVER);
        world.strike(replayed.from, replayed.bytes, replayed.segment_size);
        world.settle();
        let told = world.told.take();
        assert!(told.iter().all(|event| event.kind == EventKind::HandshakeRefused));
        let details: Vec<_> = told.into_iter().map(|event| event.detail).collect();
        assert_eq!(
            details,
            [
                "unknown_peer from 192.0.2.101:40000: A handshake from a key that is not a peer's.",
                "bad_handshake from 192.0.2.102:40001: A handshake that does not decrypt, is replayed, or answers nothing.",
            ]
        );
        world.pass(Duration::from_secs(59));
        assert_eq!(world.told.take(), [], "it tries again every five seconds");
        world.pass(Duration::from_secs(10));
        let told = world.told.take();
        assert_eq!(told.len(), 1);
        assert!(told[0].detail.ends_with(" others since the last line."), "{}", told[0].detail);
    }
}

#[test]
fn what_a_turn_has_for_a_removed_peer_is_not_sealed_for_the_next_one_with_its_number() {
    let mut world = World::new().connected();
    // In one turn of the loop: a packet for client 0 comes, client 0 is removed, and another peer gets its number.
    let secret = Ip::udp(endpoint(GATEWAY, 53), endpoint(client_address(0), 1), b"for client 0 alone");
    world.in_one_turn(0, |world| {
        world.hand_from_host(0, &secret);
        world.hand_removal(0);
        world.hand_new_peer(7);
    });
    assert_eq!(world.drops(), [("no_such_peer", 1)].into());
}

#[test]
fn an_idle_gateway_has_forgotten_everything_and_never_wakes() {
    for shards in [1, 2] {
        let mut world = World::with_shards(shards).connected();
        world.publish(Proto::Udp, 45_000, endpoint(client_address(2), 53)).unwrap();
        let mut flow = Flow::open(&mut world, 0, 50_000, HTTPS);
        flow.send_up(&mut world, &payload(50_000), 1360);
        world.send(1, &echo(1, 5_000));
        let half = Ip::udp(endpoint(client_address(2), 1), endpoint(SERVER, 9), &payload(3_000));
        world.send(2, &half.fragments(TUNNEL_MTU)[0]);
        world.send(0, &Ip::udp(endpoint(client_address(0), 1), endpoint([203, 0, 113, 99].into(), 9), b""));
        world.pass(Duration::from_secs(3 * 3600));
        assert_eq!(world.next_wakeup(), None, "nothing to wait for");
        for shard in 0..world.shards.len() {
            let status = world.status(shard);
            let published = usize::from(shard == world.home_of(2));
            assert_eq!((status.mappings, status.sessions), ([0, published, 0], 0));
        }
        world.take(0);
        world.ping(0, SERVER);
        assert_eq!(world.take_one(0).source, SERVER, "and awakes at the first packet");
    }
}

#[test]
fn an_idle_connection_stays_two_hours_and_four_minutes_and_no_longer() {
    let mut world = World::new().connected();
    let mut flow = Flow::open(&mut world, 0, 50_000, HTTPS);
    world.pass(Duration::from_secs(7_439));
    flow.send_down(&mut world, b"still there?", 1360);
    // The session of the tunnel is long over: the packet makes the client's gateway call it.
    world.pass(SECOND);
    assert_eq!(world.take_one(0).data(), b"still there?", "RFC 5382 REQ-5");
    assert!(world.drops().is_empty());

    world.pass(Duration::from_secs(7_442));
    assert_eq!(world.mappings(), 0);
    world.take(0);
    let late = flow.segment_down(ACK, b"too late");
    world.dies(DropReason::NoMapping, |world| world.arrive(&late));
    let orphan = flow.segment_up(ACK, b"hello?");
    world.send(0, &orphan);
    assert_eq!(world.drops()["tcp_out_of_state"], 1);
    assert!(world.take_outside().is_empty());
    assert_eq!(world.take_one(0).tcp_header().flags, RST, "the client is told to connect anew");
}

#[test]
fn sessions_are_renewed_under_traffic_without_losing_a_packet() {
    let mut world = World::new().connected();
    let mut sent = 0;
    for _ in 0..300 {
        world.pass(2 * SECOND);
        world.send(0, &echo(0, 5_000));
        sent += 1;
    }
    assert_eq!(world.take(0).len(), sent);
    assert!(world.drops().is_empty());
}

#[test]
fn what_waited_for_a_session_leaves_before_what_came_with_it() {
    let mut world = World::new().connected();
    let data = |packets: Vec<Ip>| packets.iter().map(|packet| packet.data()[0]).collect::<Vec<_>>();
    // The client calls: a packet comes in the turn that brings the gateway's response.
    let up = |n| Ip::udp(endpoint(client_address(0), 5_000), endpoint(SERVER, 9), &[n]);
    world.pass(600 * SECOND);
    world.send_bytes(0, &up(1).bytes(), [0; 10]);
    world.send_bytes(0, &up(2).bytes(), [0; 10]);
    world.hand_from_client(0, 7, &up(3));
    world.settle();
    assert_eq!(data(world.take_outside()), [1, 2, 3]);
    // The gateway calls.
    let down = |n| Ip::udp(endpoint(GATEWAY, 9), endpoint(client_address(0), 5_000), &[n]);
    world.pass(600 * SECOND);
    world.send_from_host_bytes(&down(1).bytes(), [0; 10]);
    world.send_from_host_bytes(&down(2).bytes(), [0; 10]);
    world.hand_from_host(7, &down(3));
    world.settle();
    assert_eq!(data(world.take(0)), [1, 2, 3]);
    assert!(world.drops().is_empty());
}

#[test]
fn a_client_that_moves_is_answered_where_it_is() {
    let mut world = World::with_shards(2).connected();
    world.move_client(1, endpoint([192, 0, 2, 250].into(), 999));
    world.ping(1, SERVER);
    assert_eq!(world.take_one(1).source, SERVER);
    let status = world.status(1);
    assert_eq!(status.peers[0].endpoint, Some(endpoint([192, 0, 2, 250].into(), 999)));
}

#[test]
fn an_initiation_reaches_the_shard_of_its_peer_wherever_the_kernel_brings_it() {
    for initiations_to in [0, 1] {
        let mut world = World::with_shards(2);
        world.initiations_to = initiations_to;
        for client in 0..3 {
            world.ping(client, GATEWAY);
            assert_eq!(world.take_one(client).source, GATEWAY);
            let home = world.home_of(client);
            assert!(world.status(home).peers.iter().any(|peer| peer.address == Some(client_address(client))));
        }
        assert!(world.drops().is_empty());
    }
}

#[test]
fn status_and_mappings_tell_what_there_is() {
    let mut world = World::with_shards(2).connected();
    world.send(0, &echo(0, 5_000));
    Flow::open(&mut world, 0, 50_000, HTTPS);
    let status = world.status(0);
    assert_eq!(status.mappings, [1, 1, 2], "clients 0 and 2 have pinged");
    let peer = status.peers.iter().find(|peer| peer.address == Some(client_address(0))).unwrap();
    assert_eq!(peer.mappings, 3);
    assert!(peer.received_packets >= 4 && peer.last_handshake.is_some());
    assert_eq!(world.shards[1].core.status(world.now).peers.len(), 1);
}

#[test]
fn the_log_tells_which_client_had_which_port_from_when_to_when() {
    let nat = NatConfig { log_mappings: true, ..NatConfig::default() };
    let mut world = World::of(Plan { shards: 2, nat, ..Plan::default() }).connected();
    world.mapping_log.take(usize::MAX);
    let begin = world.now;
    for client in 0..2 {
        world.send(client, &echo(client, 5_000));
        world.send(client, &echo(client, 5_000));
    }
    let seen: Vec<Ip> = world.take_outside();
    let (created, missing) = world.mapping_log.take(usize::MAX);
    assert_eq!((created.len(), missing), (2, 0), "one record for each mapping, not for each packet");
    for (client, record) in created.iter().enumerate() {
        let MappingRecord { event, at, protocol, internal, external, created } = *record;
        assert_eq!((event, protocol, at, created), (MappingEvent::Created, Proto::Udp, begin, begin));
        assert_eq!((internal.address, internal.port), (client_address(client), 5_000));
        assert!(seen.iter().any(|ip| ip.source == external.address && half(&ip.body, 0) == external.port));
    }
    world.pass(Duration::from_secs(302));
    let (ended, _) = world.mapping_log.take(usize::MAX);
    assert_eq!(ended.len(), 2 + 3, "of each client's ping, too");
    let ended: Vec<_> = ended.into_iter().filter(|record| record.protocol == Proto::Udp).collect();
    for record in ended {
        assert_eq!(record.event, MappingEvent::Ended);
        assert!(created.iter().any(|c| (c.internal, c.external) == (record.internal, record.external)));
        assert!((300..=302).contains(&record.at.since(begin).as_secs()));
    }
}

#[test]
fn a_log_that_nobody_reads_is_bounded_and_counts_what_is_missing() {
    let nat = NatConfig { log_mappings: true, ..NatConfig::default() };
    let mut world = World::of(Plan { nat, ..Plan::default() }).connected();
    world.mapping_log.take(usize::MAX);
    world.internet_answers = false;
    // 8,700 mappings that begin and end: 17,400 records, of which 16,384 are kept.
    for port in 0..8_700u16 {
        world.send(0, &echo(0, 1_000 + port));
        if port % 500 == 0 {
            world.pass(SECOND); // a client opens 2,000 mappings a second
        }
    }
    world.pass(Duration::from_secs(400));
    assert_eq!(world.mappings(), 0);
    let mut records = 0;
    let mut missing = 0;
    loop {
        let (taken, lost) = world.mapping_log.take(1_000);
        assert!(taken.len() <= 1_000);
        (records, missing) = (records + taken.len(), missing + lost);
        if taken.is_empty() {
            break;
        }
    }
    assert_eq!(records, 16_384);
    assert_eq!(records as u64 + missing, 17_400 + 3, "and the ends of the pings' mappings");
}

#[test]
fn no_log_is_kept_unless_it_is_wanted() {
    let mut world = World::new().connected();
    world.send(0, &echo(0, 5_000));
    world.pass(Duration::from_secs(302));
    assert_eq!(world.mapping_log.take(usize::MAX), (Vec::new(), 0));
}
