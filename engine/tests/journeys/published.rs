//! Published ports: from outside, and by way of the external address from inside (hairpinning, RFC 4787 REQ-9).

use tidegate_engine::core::Core;
use tidegate_engine::drop_reason::DropReason;
use tidegate_engine::external::reservation::{Batch, PortProtocol, ReserveRequest};
use tidegate_engine::fair_queue::Owner;
use tidegate_engine::handoffs::Handoff;
use tidegate_engine::messages::Command;
use tidegate_engine::nat::{Endpoint, Proto, PublishError};
use tidegate_engine::wire::Offload;

use super::flow::HTTPS;
use super::packets::*;
use super::world::*;

/// Of either remainder by two: so it belongs to the client's own shard once, and to the other one once.
const PORTS: [u16; 2] = [45_000, 45_001];

#[test]
fn a_published_port_reaches_its_client_on_whichever_shard_that_lives() {
    for (shards, port) in [(1, PORTS[0]), (2, PORTS[0]), (2, PORTS[1])] {
        let mut world = World::with_shards(shards).connected();
        for client in [0, 1] {
            let (port, server) = (port + 2 * client as u16, endpoint(client_address(client), 8_443));
            world.publish(Proto::Tcp, port, server).unwrap();
            let to = endpoint(EXTERNAL, port);
            let header = Tcp { sequence: 70, flags: SYN, window: 500, ..Tcp::default() };
            world.arrive(&Ip::tcp(HTTPS, to, &header, &[]));
            let syn = world.take_one(client);
            assert_eq!((syn.from(), syn.to(), syn.ttl), (HTTPS, server, 63));
            let header =
                Tcp { sequence: 500, acknowledgment: 71, flags: SYN | ACK, window: 500, ..Tcp::default() };
            world.send(client, &Ip::tcp(server, HTTPS, &header, &[]));
            let answer = world.take_one_outside();
            assert_eq!((answer.from(), answer.to()), (to, HTTPS));
        }
        assert!(world.drops().is_empty(), "{:?}", world.drops());
    }
}

#[test]
fn what_crosses_to_a_published_port_is_its_clients_or_whose_client_sends_it() {
    let mut world = World::with_shards(2).connected();
    let [publisher, sender] = [0, 1].map(client_address);
    world.publish(Proto::Udp, PORTS[1], endpoint(publisher, 53)).unwrap(); // packets come to the sender's shard
    let port = endpoint(EXTERNAL, PORTS[1]);
    world.crossed.clear();
    world.arrive(&Ip::udp(endpoint(SERVER, 4_000), port, b"query"));
    assert_eq!(world.crossed, [Owner::Client(publisher)]);
    world.send(1, &Ip::udp(endpoint(sender, 6_000), port, b"query"));
    assert_eq!(world.crossed[1..], [Owner::Client(sender)]);
    world.take(0);
}

#[test]
fn what_comes_for_a_client_of_another_shard_waits_in_the_queue_of_that_client() {
    const GRE: u8 = 47;
    const ESP: u8 = 50;
    let mut world = World::with_shards(2).connected();
    let publisher = client_address(0);
    world.publish(Proto::Udp, PORTS[1], endpoint(publisher, 53)).unwrap(); // packets come to shard 1
    world.tell_all(|| Command::PassProtocols(vec![(GRE, publisher)]));
    let (from, port) = (endpoint(SERVER, 4_000), endpoint(EXTERNAL, PORTS[1]));
    for shard in [0, 1] {
        let recipient = |packet: Ip| world.shards[shard].core.recipient(&packet.bytes());
        let of = |protocol| Ip::new(SERVER, EXTERNAL, protocol, vec![1; 20]);
        assert_eq!(recipient(Ip::udp(from, port, b"query")), Owner::Client(publisher));
        assert_eq!(recipient(of(GRE)), Owner::Client(publisher));
        assert_eq!(recipient(of(ESP)), Owner::Unknown);
        assert_eq!(recipient(Ip::tcp(from, port, &Tcp::default(), &[])), Owner::Unknown, "not published");
        assert_eq!(recipient(Ip::udp(from, endpoint(EXTERNAL, PORTS[1] + 2), b"scan")), Owner::Unknown);
        for fragment in [Ip::udp(from, port, b"query"), of(GRE)] {
            let fragment = fragment.with(|ip| ip.fragment = 0x2000); // More Fragments
            assert_eq!(recipient(fragment), Owner::Unknown, "the pieces of a datagram stay together");
        }
    }
}

#[test]
fn a_client_reaches_a_published_port_by_the_external_address() {
    for (shards, port) in [(1, PORTS[0]), (2, PORTS[0]), (2, PORTS[1])] {
        for (from, to) in [(0, 1), (1, 0), (0, 2), (0, 0)] {
            let mut world = World::with_shards(shards).connected();
            let service = endpoint(client_address(to), 8_443);
            world.publish(Proto::Udp, port, service).unwrap();
            let (here, there) = (endpoint(client_address(from), 6_000), endpoint(EXTERNAL, port));
            world.send(from, &Ip::udp(here, there, b"question"));
            let question = world.take_one(to);
            assert_eq!((question.source, question.to(), question.ttl), (EXTERNAL, service, 62), "two hops");
            assert_eq!(question.data(), b"question");
            world.send(to, &Ip::udp(service, question.from(), b"answer"));
            let answer = world.take_one(from);
            assert_eq!((answer.from(), answer.to(), answer.data()), (there, here, &b"answer"[..]));
            assert!(world.outside.is_empty() && world.host.is_empty(), "nothing leaves");
            assert!(world.drops().is_empty(), "{:?}", world.drops());
        }
    }
}

#[test]
fn an_icmp_error_about_a_hairpinned_packet_reaches_its_sender_with_the_headers_it_knows() {
    for (shards, port) in [(1, PORTS[0]), (2, PORTS[0]), (2, PORTS[1])] {
        for (from, to) in [(0, 1), (1, 0), (0, 2)] {
            let mut world = World::with_shards(shards).connected();
            let service = endpoint(client_address(to), 8_443);
            world.publish(Proto::Udp, port, service).unwrap();
            let (here, there) = (endpoint(client_address(from), 6_000), endpoint(EXTERNAL, port));
            world.send(from, &Ip::udp(here, there, b"anybody?"));
            let question = world.take_one(to);
            world.send(to, &Ip::icmp_error(client_address(to), &question, 3, 3, 0, 28));
            let error = world.take_one(from);
            assert_eq!((error.source, error.icmp()), (EXTERNAL, (3, 3)));
            assert_eq!((error.quoted().from(), error.quoted().to()), (here, there));
            assert!(world.outside.is_empty() && world.host.is_empty(), "nothing leaves");
            assert!(world.drops().is_empty(), "{:?}", world.drops());
        }
    }
}

#[test]
fn the_gateways_own_error_about_a_hairpinned_packet_reaches_its_sender() {
    for (shards, port) in [(1, PORTS[0]), (2, PORTS[0]), (2, PORTS[1])] {
        let mut world = World::with_shards(shards).connected();
        world.publish(Proto::Udp, port, endpoint(client_address(1), 8_443)).unwrap();
        let (here, there) = (endpoint(client_address(0), 6_000), endpoint(EXTERNAL, port));
        // The first hop is the gateway as the client's router, the second the gateway as the server's.
        world.send(0, &Ip::udp(here, there, b"hop 2").with(|ip| ip.ttl = 2));
        let error = world.take_one(0);
        assert_eq!((error.source, error.icmp()), (EXTERNAL, (11, 0)));
        assert_eq!((error.quoted().from(), error.quoted().to()), (here, there));
        assert!(world.outside.is_empty() && world.arp_requests.iter().all(|&asked| asked == ROUTER));
    }
}

#[test]
fn a_clients_packet_to_the_external_address_is_the_hosts_unless_the_port_is_the_nats() {
    let mut world = World::new().connected();
    world.send(0, &Ip::udp(endpoint(client_address(0), 6_000), endpoint(EXTERNAL, 22), b"for the host"));
    assert_eq!(world.host.len(), 1);
    world.ping(0, EXTERNAL);
    assert_eq!(world.take_one(0).source, EXTERNAL);
    assert!(world.outside.is_empty());
}

#[test]
fn a_port_whose_client_is_gone_gets_silence_and_no_packet_goes_in_circles() {
    for port in PORTS {
        let mut world = World::with_shards(2).connected();
        world.publish(Proto::Udp, port, endpoint(client_address(0), 53)).unwrap();
        world.remove_peer(0);
        let probe = Ip::udp(endpoint(SERVER, 4_000), endpoint(EXTERNAL, port), b"anybody there?");
        world.dies(DropReason::NoMapping, |world| world.arrive(&probe));
        // The port is free for another.
        world.publish(Proto::Udp, port, endpoint(client_address(1), 53)).unwrap();
        world.arrive(&probe);
        assert_eq!(world.take_one(1).data(), b"anybody there?");
    }
}

#[test]
fn a_port_that_leads_to_one_client_is_not_led_to_another() {
    for port in PORTS {
        let mut world = World::with_shards(2).connected();
        world.publish(Proto::Udp, port, endpoint(client_address(0), 53)).unwrap();
        let refused = world.publish(Proto::Udp, port, endpoint(client_address(1), 53));
        assert_eq!(refused, Err(PublishError::PortInUse));
        world.arrive(&Ip::udp(endpoint(SERVER, 4_000), endpoint(EXTERNAL, port), b"query"));
        assert_eq!(world.take_one(0).data(), b"query");
    }
}

#[test]
fn shards_that_disagree_about_a_port_or_a_peer_do_not_send_its_packets_in_circles() {
    let mut world = World::with_shards(2).connected();
    // Shard 1 has been told already that its port leads to shard 0, which knows nothing of it.
    let (external, internal) = (Endpoint::new(EXTERNAL, PORTS[1]), Endpoint::new(client_address(0), 53));
    let (reply, _answer) = std::sync::mpsc::sync_channel(1);
    world.tell(1, Command::Publish { protocol: Proto::Udp, external, internal, shard: 0, reply });
    let probe = Ip::udp(endpoint(SERVER, 4_000), endpoint(EXTERNAL, PORTS[1]), b"whose am I?");
    world.dies(DropReason::NoMapping, |world| world.arrive(&probe));
    // Client 1 lives on shard 1.
    let packet = Ip::udp(endpoint(client_address(0), 1), endpoint(client_address(1), 2), b"astray").bytes();
    world.dies(DropReason::NoSuchPeer, |world| {
        world.cross(0, Handoff::ToPeer { packet, offload: Offload::NONE, client: client_address(0) });
    });
}

#[test]
fn a_refused_publication_leaves_nothing_behind() {
    let mut world = World::with_shards(2).connected();
    let service = endpoint(client_address(0), 53);
    world.publish(Proto::Udp, PORTS[0], service).unwrap();
    assert_eq!(world.publish(Proto::Udp, PORTS[1], service), Err(PublishError::EndpointPublished));
    // The engine unpublishes it everywhere.
    let external = Endpoint::new(EXTERNAL, PORTS[1]);
    world.tell_all(|| Command::Unpublish { protocol: Proto::Udp, external, returns_port: false });
    let probe = Ip::udp(endpoint(SERVER, 4_000), endpoint(EXTERNAL, PORTS[1]), b"probe");
    world.dies(DropReason::NoMapping, |world| world.arrive(&probe));
    world.arrive(&Ip::udp(endpoint(SERVER, 4_000), endpoint(EXTERNAL, PORTS[0]), b"query"));
    assert_eq!(world.take_one(0).to(), service);
}

#[test]
fn a_port_whose_publication_came_to_nothing_is_returned_by_the_shard_that_had_it() {
    for client in [0, 1] {
        let plan = Plan { shards: 2, port_range: (40_000, 40_005), ..Plan::default() };
        let mut world = World::of(plan).connected();
        let reserved = |world: &World, port| world.ownership.is_reserved(PortProtocol::Udp, EXTERNAL, port);
        // One that was the NAT's, and one that was not and is for the engine to unreserve.
        let all: Vec<u16> = (40_000..=40_005).filter(|&port| reserved(&world, port)).collect();
        for port in [all[0], PORTS[0]] {
            world.publish(Proto::Udp, port, endpoint(client_address(client), 53)).unwrap();
            let external = Endpoint::new(EXTERNAL, port);
            world.tell_all(|| Command::Unpublish { protocol: Proto::Udp, external, returns_port: true });
        }
        let left: Vec<u16> = (40_000..=40_005).filter(|&port| reserved(&world, port)).collect();
        assert_eq!(left, all[1..]);
        assert!(reserved(&world, PORTS[0]));
    }
}

#[test]
fn a_port_published_for_a_client_of_one_shard_is_not_lent_by_another() {
    // The port belongs to shard 0 by its remainder; the client that publishes it lives on shard 1.
    let mut world = World::with_shards(2).connected();
    let service = endpoint(client_address(1), 53);
    let lent: Vec<u16> = (0..4u16)
        .map(|n| {
            world.send(0, &Ip::udp(endpoint(client_address(0), 6_000 + n), endpoint(SERVER, 53), b"query"));
            world.take_one_outside().from().port()
        })
        .collect();
    assert_eq!(world.publish(Proto::Udp, lent[0], service), Err(PublishError::PortInUse), "a mapping has it");
}

#[test]
fn a_port_that_was_published_while_its_batch_was_under_way_is_lent_by_nobody() {
    // Shard 0 has two ports, and a third is on its way when client 1, who lives on shard 1, publishes it.
    const LATE: u16 = 40_004;
    let plan = Plan { shards: 2, port_range: (40_000, 40_005), ..Plan::default() };
    let mut world = World::of(plan).connected();
    world.publish(Proto::Udp, LATE, endpoint(client_address(1), 53)).unwrap();
    let request = ReserveRequest {
        protocol: PortProtocol::Udp,
        address: EXTERNAL,
        shard: 0,
        shards: 2,
        ports: LATE..=LATE,
        count: 1,
        in_advance: false,
        returned: Vec::new(),
    };
    world.tell(0, Command::Ports(Batch { request, ports: vec![LATE], shortage: None }));
    let lent = |world: &mut World, port| {
        world.send(0, &Ip::udp(endpoint(client_address(0), port), endpoint(SERVER, 9), b"query"));
        world.take_outside().len()
    };
    assert_eq!([6_000, 6_001, 6_002, 6_003].map(|port| lent(&mut world, port)), [1, 1, 0, 0]);
    world.arrive(&Ip::udp(endpoint(SERVER, 4_000), endpoint(EXTERNAL, LATE), b"query"));
    assert_eq!(world.take_one(1).data(), b"query");
}
