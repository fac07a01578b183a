//! What clients may not reach by the operator's word: each other, or the gateway's own network (203.0.113.0/24, in
//! which its external address, its neighbour and its router are).

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use tidegate_engine::access_policy::AccessPolicy;
use tidegate_engine::messages::Command;
use tidegate_engine::nat::Proto;

use super::flow::{Flow, HTTPS};
use super::packets::*;
use super::world::*;

const GRE: u8 = 47;
const PORT: u16 = 45_000;
const LAN_WEB: SocketAddrV4 = SocketAddrV4::new(NEIGHBOUR, 80);
const LAN_ECHO: SocketAddrV4 = SocketAddrV4::new(NEIGHBOUR, ECHO_PORT);

fn here(client: usize) -> SocketAddrV4 {
    endpoint(client_address(client), 5_000)
}

impl World {
    fn keep_clients_apart(&mut self) {
        self.tell_all(|| Command::SetAccess(AccessPolicy::new(false, Vec::new())));
    }

    fn deny_lan(&mut self) {
        let lan = "203.0.113.0/24".parse().unwrap();
        self.tell_all(|| Command::SetAccess(AccessPolicy::new(true, vec![lan])));
    }

    fn permit_everything(&mut self) {
        self.tell_all(|| Command::SetAccess(AccessPolicy::default()));
    }

    /// A client sends a packet, reaches nobody with it, and is told so by the gateway.
    fn is_denied(&mut self, client: usize, packet: &Ip) {
        let before = self.drops().get("denied").copied().unwrap_or(0);
        self.send(client, packet);
        let told = self.take_one(client);
        assert_eq!((told.source, told.icmp()), (GATEWAY, (3, 13)));
        assert_eq!((told.quoted().source, told.quoted().destination), (packet.source, packet.destination));
        assert_eq!(self.drops()["denied"], before + 1);
        assert!(self.outside.is_empty() && self.host.is_empty() && self.delivered.iter().all(Vec::is_empty));
        self.pass(Duration::from_secs(1)); // so that the rate of errors does not matter
    }
}

/// One packet of each protocol that a client may send.
fn one_of_each(client: usize, to: Ipv4Addr) -> [Ip; 4] {
    let syn = Tcp { sequence: 1, flags: SYN, window: 500, ..Tcp::default() };
    [
        Ip::tcp(here(client), endpoint(to, 80), &syn, &[]),
        Ip::udp(here(client), endpoint(to, 53), b"query"),
        Ip::echo(8, client_address(client), to, 7, 1, b"ping"),
        Ip::new(client_address(client), to, GRE, vec![1; 20]),
    ]
}

#[test]
fn clients_that_are_kept_apart_do_not_reach_each_other_but_everything_else() {
    for shards in [1, 2] {
        let mut world = World::with_shards(shards).connected();
        world.keep_clients_apart();
        let nobodys = Ipv4Addr::new(10, 66, 77, 99);
        for (from, to) in
            [(0, client_address(1)), (1, client_address(0)), (2, client_address(0)), (0, nobodys)]
        {
            for packet in one_of_each(from, to) {
                world.is_denied(from, &packet); // alike whether anybody is there or not
            }
        }
        for client in 0..3 {
            for to in [GATEWAY, SERVER, NEIGHBOUR] {
                world.ping(client, to);
                assert_eq!(world.take_one(client).source, to);
            }
            let to = endpoint(client_address(client), 5_353);
            world.send_from_host(&Ip::udp(endpoint(GATEWAY, 53), to, b"answer"));
            assert_eq!(world.take_one(client).data(), b"answer", "the host is no client");
        }
        world.permit_everything();
        world.send(0, &Ip::udp(here(0), here(1), b"hello"));
        assert_eq!(world.take_one(1).data(), b"hello");
    }
}

#[test]
fn clients_that_are_kept_apart_reach_each_others_published_ports_like_everybody() {
    for shards in [1, 2] {
        let mut world = World::with_shards(shards).connected();
        let externals = vec!["203.0.113.0/24".parse().unwrap()]; // nothing of it leaves through the interface
        world.tell_all(|| Command::SetAccess(AccessPolicy::new(false, externals.clone())));
        world.publish(Proto::Udp, PORT, endpoint(client_address(1), 53)).unwrap();
        let port = endpoint(EXTERNAL, PORT);
        world.send(0, &Ip::udp(here(0), port, b"query"));
        let query = world.take_one(1);
        assert_eq!(query.source, EXTERNAL, "nobody learns who it is");
        world.send(1, &Ip::udp(query.to(), query.from(), b"answer"));
        let answer = world.take_one(0);
        assert_eq!((answer.from(), answer.data()), (port, &b"answer"[..]));
        assert!(world.drops().is_empty(), "{:?}", world.drops());
    }
}

#[test]
fn a_client_does_not_reach_a_denied_network_with_any_protocol_but_everything_else() {
    for shards in [1, 2] {
        let mut world = World::with_shards(shards).connected();
        world.tell_all(|| Command::PassProtocols(vec![(GRE, client_address(1))]));
        world.deny_lan();
        let mappings = world.mappings();
        for (client, to) in [(1, NEIGHBOUR), (0, ROUTER)] {
            for packet in one_of_each(client, to) {
                world.is_denied(client, &packet);
            }
        }
        assert_eq!(world.mappings(), mappings, "no port is lent for it");

        // A datagram counts when it is whole.
        let datagram = Ip::udp(here(1), LAN_ECHO, &payload(3_000));
        let [first, rest @ ..] = &datagram.fragments(1_400)[..] else { panic!("it is cut") };
        world.send(1, first);
        for fragment in &rest[..rest.len() - 1] {
            world.send(1, fragment);
        }
        world.is_denied(1, &rest[rest.len() - 1]);

        for (to, expected) in [(GATEWAY, GATEWAY), (SERVER, SERVER), (EXTERNAL, EXTERNAL)] {
            world.ping(1, to);
            assert_eq!(
                world.take_one(1).source,
                expected,
                "not through the external interface, or not denied"
            );
        }
        world.host.clear();
        world.take_outside();
        world.send(1, &Ip::new(client_address(1), SERVER, GRE, vec![1; 20]));
        assert_eq!(world.take_one_outside().protocol, GRE);
    }
}

#[test]
fn sessions_with_a_network_that_becomes_denied_end_there_and_live_again_when_it_no_longer_is() {
    let mut world = World::with_shards(2).connected();
    let mut web = Flow::open(&mut world, 1, 50_000, LAN_WEB);
    let mut elsewhere = Flow::open(&mut world, 1, 50_001, HTTPS);
    let query = Ip::udp(here(1), LAN_ECHO, b"echo");
    world.send(1, &query);
    assert_eq!(world.take_one(1).data(), b"echo");
    world.take_outside();

    world.deny_lan();
    world.is_denied(1, &query);
    world.is_denied(1, &web.segment_up(ACK | PSH, b"GET /"));
    let train = web.segment_up(ACK | PSH, &payload(40_000));
    let before = world.drops()["denied"];
    world.send_superpacket(1, &train, 1_360);
    // Answered once, and counted as the 30 packets that it stands for.
    assert_eq!((world.take_one(1).icmp(), world.drops()["denied"]), ((3, 13), before + 30));
    assert!(world.take_outside().is_empty());
    elsewhere.send_up(&mut world, b"data", 1_360);
    assert_eq!(world.take_one_outside().data(), b"data");

    world.permit_everything();
    world.send(1, &query);
    assert_eq!(world.take_one(1).data(), b"echo");
    world.take_outside();
    web.send_up(&mut world, b"GET /", 1_360);
    assert_eq!(world.take_one_outside().from(), web.external, "the session has not been lost");
}

#[test]
fn errors_of_a_denied_network_about_what_goes_elsewhere_reach_the_client() {
    let mut world = World::new().connected();
    world.deny_lan();
    let mut flow = Flow::open(&mut world, 0, 50_000, HTTPS); // by way of the router, which is in the network
    flow.send_up(&mut world, &payload(1_360), 1_360);
    let segment = world.take_one_outside();
    world.arrive(&Ip::icmp_error(ROUTER, &segment, 3, 4, 1_280, 40));
    let error = world.take_one(0);
    assert_eq!((error.source, error.icmp(), error.mtu()), (ROUTER, (3, 4), 1_280));
}

#[test]
fn a_visitor_from_a_denied_network_is_answered_on_a_published_tcp_port_and_that_opens_nothing_else() {
    for shards in [1, 2] {
        let mut world = World::with_shards(shards).connected();
        let service = endpoint(client_address(1), 80);
        world.publish(Proto::Tcp, PORT, service).unwrap();
        world.deny_lan();
        let visitor = endpoint(NEIGHBOUR, 33_000);
        let segment = |from, to, sequence, acknowledgment, flags, data: &[u8]| {
            Ip::tcp(
                from,
                to,
                &Tcp { sequence, acknowledgment, flags, window: 0xfff0, ..Tcp::default() },
                data,
            )
        };
        let visit = |sequence, acknowledgment, flags, data: &[u8]| {
            segment(visitor, endpoint(EXTERNAL, PORT), sequence, acknowledgment, flags, data)
        };
        let answer = |sequence, acknowledgment, flags, data: &[u8]| {
            segment(service, visitor, sequence, acknowledgment, flags, data)
        };
        world.arrive(&visit(70, 0, SYN, b""));
        assert_eq!(world.take_one(1).from(), visitor);
        world.send(1, &answer(500, 71, SYN | ACK, b""));
        assert_eq!(world.take_one_outside().to(), visitor);
        world.arrive(&visit(71, 501, ACK | PSH, b"GET /"));
        assert_eq!(world.take_one(1).data(), b"GET /");
        world.send(1, &answer(501, 76, ACK | PSH, b"200 OK"));
        assert_eq!(world.take_one_outside().data(), b"200 OK");
        assert!(world.drops().is_empty(), "{:?}", world.drops());

        // Its port is no way to others, nor to the visitor but in the visitor's own connection.
        world.is_denied(1, &segment(service, LAN_WEB, 1, 0, SYN, b""));
        world.is_denied(1, &segment(service, endpoint(NEIGHBOUR, 33_001), 1, 1, ACK, b"data"));
        world.is_denied(1, &answer(9_000, 0, SYN, b""));
        world.is_denied(1, &Ip::udp(service, visitor, b"not even TCP"));
    }
}

#[test]
fn somebody_who_forges_a_call_from_a_denied_network_does_not_let_a_client_in_there() {
    let mut world = World::new().connected();
    let service = endpoint(client_address(0), 80);
    world.publish(Proto::Tcp, PORT, service).unwrap();
    world.deny_lan();
    // An accomplice of the client's claims to be the web server there, which the client then calls.
    let syn = |sequence| Tcp { sequence, flags: SYN, window: 500, ..Tcp::default() };
    world.arrive(&Ip::tcp(LAN_WEB, endpoint(EXTERNAL, PORT), &syn(70), &[]));
    assert_eq!(world.take_one(0).from(), LAN_WEB);
    world.is_denied(0, &Ip::tcp(service, LAN_WEB, &syn(1), &[]));

    // Nor after an answer, which the true server refuses; nor with what else it might take for a call: it may answer a
    // SYN whatever comes with it (RFC 9293 §3.10.7.2).
    let answer = Tcp { acknowledgment: 71, flags: SYN | ACK, ..syn(500) };
    world.send(0, &Ip::tcp(service, LAN_WEB, &answer, &[]));
    assert_eq!(world.take_one_outside().to(), LAN_WEB);
    let refusal = Tcp { sequence: 71, flags: RST, ..Tcp::default() };
    world.arrive(&Ip::tcp(LAN_WEB, endpoint(EXTERNAL, PORT), &refusal, &[]));
    assert_eq!(world.take_one(0).from(), LAN_WEB);
    for flags in [SYN, SYN | FIN, SYN | RST, SYN | PSH, SYN | FIN | PSH] {
        world.is_denied(0, &Ip::tcp(service, LAN_WEB, &Tcp { flags, ..syn(9_000) }, &[]));
    }
}

#[test]
fn a_visitor_from_a_denied_network_gets_no_answer_from_a_published_udp_port() {
    let mut world = World::new().connected();
    let service = endpoint(client_address(0), 53);
    world.publish(Proto::Udp, PORT, service).unwrap();
    world.deny_lan();
    let visitor = endpoint(NEIGHBOUR, 33_000);
    world.arrive(&Ip::udp(visitor, endpoint(EXTERNAL, PORT), b"query"));
    assert_eq!(world.take_one(0).data(), b"query");
    world.is_denied(0, &Ip::udp(service, visitor, b"answer"));
}

#[test]
fn a_client_that_insists_is_told_at_the_rate_of_errors() {
    let mut world = World::new().connected();
    world.deny_lan();
    for port in 1..=200 {
        world.send(0, &Ip::udp(here(0), endpoint(NEIGHBOUR, port), b"scan"));
    }
    let told = world.take(0).len();
    assert!((10..=25).contains(&told), "{told}");
    assert_eq!(world.drops(), [("denied", 200)].into());
}
