//! RFC 5508: NAT Behavioral Requirements for ICMP.

use super::*;

const CLIENT: &str = "10.66.77.2:5000";
const SERVER: &str = "198.51.100.9:53";
/// Somebody on the path, who reports errors.
const ROUTER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 254);

/// Checks the error that a client gets: right checksums inside and out, and the quotation as the client sent it.
fn assert_quotes(error: &[u8], sent_by_client: &[u8]) {
    let quoted = &error[28..];
    let header_len = usize::from(quoted[0] & 15) * 4;
    assert_eq!(crate::wire::checksum::checksum(&quoted[..header_len]), 0, "the quoted header checksum");
    // But for identification and header checksum, which the NAT has the right to change.
    let comparable = |bytes: &[u8]| {
        let mut bytes = bytes[..quoted.len()].to_vec();
        bytes[4..6].fill(0);
        bytes[10..12].fill(0);
        bytes
    };
    assert_eq!(comparable(quoted), comparable(sent_by_client));
}

#[test]
fn a_ping_goes_there_and_its_answer_comes_back() {
    let mut world = World::new();
    let (client, server) = (address("10.66.77.2"), address("198.51.100.9"));
    let sent = world.send(icmp(8, client, server, 77)).unwrap();
    assert_eq!(source(&sent).address, EXTERNAL);
    let answer = world.receive(icmp(0, server, EXTERNAL, source(&sent).port)).unwrap();
    assert_eq!(destination(&answer), Endpoint::new(client, 77));
    // Timestamp queries too.
    let sent = world.send(icmp(13, client, server, 78)).unwrap();
    world.receive(icmp(14, server, EXTERNAL, source(&sent).port)).unwrap();
}

#[test]
fn the_checksum_of_an_answer_that_becomes_all_zeros_is_right() {
    let mut world = World::new();
    let (client, server) = (address("10.66.77.2"), address("198.51.100.9"));
    let [high, low] = (source(&world.send(icmp(8, client, server, 0)).unwrap()).port).to_be_bytes();
    let sum = !u16::from_be_bytes([high, low]);
    let [first, second] = sum.to_be_bytes();
    let answer = world.receive(ipv4(1, server, EXTERNAL, &[0, 0, first, second, high, low, 0, 0])).unwrap();
    assert_eq!(answer[20..], [0, 0, 0xff, 0xff, 0, 0, 0, 0]);
}

#[test]
fn the_checksum_of_an_answer_that_adds_up_to_all_ones_is_zero() {
    let mut world = World::new();
    let (client, server) = (address("10.66.77.2"), address("198.51.100.9"));
    let id = source(&world.send(icmp(8, client, server, 0xfffe)).unwrap()).port;
    let [high, low] = id.to_be_bytes();
    let [first, second] = (!(id + 1)).to_be_bytes();
    let answer = world.receive(ipv4(1, server, EXTERNAL, &[0, 0, first, second, high, low, 0, 1])).unwrap();
    assert_eq!(answer[20..], [0, 0, 0, 0, 0xff, 0xfe, 0, 1], "some compare it with what they compute");
}

#[test]
fn req_1_the_identifier_does_not_depend_on_the_destination_and_differs_between_clients() {
    let mut world = World::new();
    let mut ping = |client: &str, server: &str| {
        source(&world.send(icmp(8, address(client), address(server), 1)).unwrap()).port
    };
    let first = ping("10.66.77.2", "198.51.100.9");
    assert_eq!(ping("10.66.77.2", "192.0.2.1"), first);
    assert_ne!(ping("10.66.77.3", "198.51.100.9"), first);
}

#[test]
fn req_2_a_query_session_lives_sixty_seconds() {
    for (idle, expected) in [(59, Ok(())), (62, Err(DropReason::NoMapping))] {
        let mut world = World::new();
        let (client, server) = (address("10.66.77.2"), address("198.51.100.9"));
        let sent = world.send(icmp(8, client, server, 77)).unwrap();
        world.pass(idle);
        let answer = icmp(0, server, EXTERNAL, source(&sent).port);
        assert_eq!(world.receive(answer).map(|_| ()), expected);
    }
}

#[test]
fn every_identifier_is_lent_again_whatever_its_number() {
    // One of 128 shards, with 512 identifiers: eight of them are below 1024, where ports are of another class.
    let slice = ShardSlice { shard: 3, shards: 128 };
    let nat = Nat::new(NatConfig::default(), &[EXTERNAL], slice, [7; 32]);
    let mut world = World { nat, now: Timestamp::from_secs(1_000) };
    for round in 0..3 {
        let lent = (0..512).map(|n| world.send(icmp(8, address("10.66.77.2"), at(SERVER).address, n)));
        assert_eq!(lent.filter(Result::is_ok).count(), 512, "round {round}");
        world.pass(62);
        assert_eq!(world.nat.free_ports(Proto::Icmp, EXTERNAL, PortClass::Unprivileged), 512);
    }
}

#[test]
fn queries_from_outside_and_odd_messages_do_not_pass() {
    let mut world = World::new();
    let (client, server) = (address("10.66.77.2"), address("198.51.100.9"));
    let sent = world.send(icmp(8, client, server, 77)).unwrap();
    let id = source(&sent).port;
    for kind in [8, 13, 4, 5, 9, 10, 15, 17, 30, 255] {
        assert_eq!(
            world.receive(icmp(kind, server, EXTERNAL, id)),
            Err(DropReason::UnsupportedIcmp),
            "{kind}"
        );
    }
    for kind in [0, 14, 4, 5, 9, 10, 15, 17, 30, 255] {
        assert_eq!(world.send(icmp(kind, client, server, 77)), Err(DropReason::UnsupportedIcmp), "{kind}");
    }
}

#[test]
fn req_4_an_error_about_a_datagram_reaches_the_client_as_if_there_were_no_nat() {
    let mut world = World::new();
    for options in [vec![], vec![0x94, 4, 0, 0, 1, 1, 1, 1]] {
        for quoted_len in [8, 12, 1000] {
            let whole = udp(at(CLIENT), at(SERVER), b"a question of some length");
            let datagram =
                ipv4_with_options(17, at(CLIENT).address, at(SERVER).address, &options, &whole[20..]);
            let sent = world.send(datagram.clone()).unwrap();
            let quoted = &sent[..sent.len().min(20 + options.len() + quoted_len)];
            for (kind, code, rest) in [(3, 3, 0), (3, 4, 1280), (11, 0, 0), (12, 2, 0x1400_0000)] {
                let error = icmp_error(kind, code, ROUTER, EXTERNAL, rest, quoted);
                let received = world.receive(error).unwrap();
                assert_eq!(received[12..16], ROUTER.octets(), "the reporter's address is kept");
                assert_eq!(received[20..22], [kind, code]);
                assert_eq!(received[24..28], rest.to_be_bytes());
                assert_quotes(&received, &datagram);
            }
        }
    }
}

#[test]
fn req_4_an_error_about_a_zero_checksum_datagram_quotes_a_zero_checksum() {
    let mut world = World::new();
    let mut datagram = udp(at(CLIENT), at(SERVER), b"question");
    datagram[26..28].fill(0);
    let sent = world.send(datagram.clone()).unwrap();
    let received = world.receive(icmp_error(3, 3, ROUTER, EXTERNAL, 0, &sent)).unwrap();
    assert_quotes(&received, &datagram);
}

#[test]
fn req_4_an_error_about_a_ping_reaches_the_client() {
    let mut world = World::new();
    let ping = icmp(8, address("10.66.77.2"), address("198.51.100.9"), 77);
    let sent = world.send(ping.clone()).unwrap();
    let received = world.receive(icmp_error(11, 0, ROUTER, EXTERNAL, 0, &sent)).unwrap();
    assert_eq!(destination(&received).address, address("10.66.77.2"));
    assert_quotes(&received, &ping);
}

#[test]
fn req_4_an_error_about_a_tcp_segment_reaches_the_client_be_the_quotation_short_or_long() {
    let mut world = World::new();
    let syn = tcp(at(CLIENT), at(SERVER), "S", 100, 0, b"");
    let sent = world.send(syn.clone()).unwrap();
    for length in [28, 36, 38, 40] {
        let received = world.receive(icmp_error(3, 1, ROUTER, EXTERNAL, 0, &sent[..length])).unwrap();
        assert_quotes(&received, &syn);
    }
}

#[test]
fn req_3_a_wrong_outer_or_quoted_checksum_is_dropped() {
    let mut world = World::new();
    let sent = world.send(udp(at(CLIENT), at(SERVER), b"question")).unwrap();
    let mut outer = icmp_error(3, 3, ROUTER, EXTERNAL, 0, &sent);
    outer[22] ^= 1;
    assert_eq!(world.receive(outer), Err(DropReason::BadTransportChecksum));
    let mut quoted = sent.clone();
    quoted[10] ^= 1;
    let error = icmp_error(3, 3, ROUTER, EXTERNAL, 0, &quoted);
    assert_eq!(world.receive(error), Err(DropReason::BadIpChecksum));
    // The quoted transport checksum is nobody's business.
    let mut quoted = sent.clone();
    quoted[27] ^= 1;
    assert!(world.receive(icmp_error(3, 3, ROUTER, EXTERNAL, 0, &quoted)).is_ok());
}

#[test]
fn req_4_an_error_about_nothing_gets_silence() {
    let mut world = World::new();
    let never_sent = udp(Endpoint::new(EXTERNAL, 10_001), at(SERVER), b"question");
    let error = icmp_error(3, 3, ROUTER, EXTERNAL, 0, &never_sent);
    assert_eq!(world.receive(error), Err(DropReason::IcmpErrorUnmatched));
    // A live mapping is not enough: it must be a live flow.
    let sent = world.send(udp(at(CLIENT), at(SERVER), b"question")).unwrap();
    let elsewhere = udp(source(&sent), at("198.51.100.9:54"), b"question");
    let error = icmp_error(3, 3, ROUTER, EXTERNAL, 0, &elsewhere);
    assert_eq!(world.receive(error), Err(DropReason::IcmpErrorUnmatched));
}

#[test]
fn req_4_an_error_must_come_to_the_address_that_it_quotes_and_quote_no_answer() {
    let mut world = World::new();
    world.nat.set_external(&[EXTERNAL, SECOND_EXTERNAL], world.now);
    let sent = world.send(icmp(8, at(CLIENT).address, at(SERVER).address, 77)).unwrap();
    let home = source(&sent).address;
    let other = if home == EXTERNAL { SECOND_EXTERNAL } else { EXTERNAL };
    let error = icmp_error(3, 1, ROUTER, other, 0, &sent);
    assert_eq!(world.receive(error), Err(DropReason::IcmpErrorUnmatched));
    let answer = icmp(0, home, at(SERVER).address, source(&sent).port);
    let error = icmp_error(3, 1, ROUTER, home, 0, &answer);
    assert_eq!(world.receive(error), Err(DropReason::IcmpErrorUnmatched));
    assert!(world.receive(icmp_error(3, 1, ROUTER, home, 0, &sent)).is_ok());
}

#[test]
fn req_5_an_error_by_a_client_is_translated_on_its_way_out() {
    let mut world = World::new();
    let sent = world.send(udp(at(CLIENT), at(SERVER), b"question")).unwrap();
    let on_the_wire = udp(at(SERVER), source(&sent), b"answer");
    let received = world.receive(on_the_wire.clone()).unwrap();
    let error = icmp_error(3, 3, at(CLIENT).address, at(SERVER).address, 0, &received);
    let error = world.send(error).unwrap();
    assert_eq!(error[12..16], EXTERNAL.octets());
    assert_eq!(error[16..20], at(SERVER).address.octets());
    assert_quotes(&error, &on_the_wire);
}

#[test]
fn req_5_a_client_cannot_send_errors_about_flows_that_are_not_its_own() {
    let mut world = World::new();
    let sent = world.send(udp(at(CLIENT), at(SERVER), b"question")).unwrap();
    let received = world.receive(udp(at(SERVER), source(&sent), b"answer")).unwrap();
    let mallory = address("10.66.77.66");
    let error = icmp_error(3, 3, mallory, at(SERVER).address, 0, &received);
    assert_eq!(world.send(error), Err(DropReason::IcmpErrorUnmatched));
    let error = icmp_error(3, 3, at(CLIENT).address, address("192.0.2.1"), 0, &received);
    assert_eq!(world.send(error), Err(DropReason::IcmpErrorUnmatched), "nor to somebody else");
    let forged = udp(at("192.0.2.1:53"), at(CLIENT), b"never received");
    let error = icmp_error(3, 3, at(CLIENT).address, address("192.0.2.1"), 0, &forged);
    assert_eq!(world.send(error), Err(DropReason::IcmpErrorUnmatched));
}

#[test]
fn errors_never_refresh_a_session() {
    let mut world = World::new();
    let sent = world.send(udp(at(CLIENT), at(SERVER), b"question")).unwrap();
    let received = world.receive(udp(at(SERVER), source(&sent), b"answer")).unwrap();
    for _ in 0..29 {
        world.pass(10);
        world.receive(icmp_error(3, 3, ROUTER, EXTERNAL, 0, &sent)).unwrap();
        world.send(icmp_error(3, 3, at(CLIENT).address, at(SERVER).address, 0, &received)).unwrap();
    }
    world.pass(12);
    assert!(world.mapping(at(CLIENT)).is_none());
}

#[test]
fn req_7_errors_are_hairpinned() {
    let mut world = World::new();
    let (alice, bob) = (at("10.66.77.2:5000"), at("10.66.77.3:6000"));
    let outside_alice = source(&world.send(udp(alice, at(SERVER), b"")).unwrap());
    let outside_bob = source(&world.send(udp(bob, at(SERVER), b"")).unwrap());
    world.send(udp(bob, outside_alice, b"punch")).unwrap();
    let datagram = udp(alice, outside_bob, b"hello");
    let hairpinned = world.send(datagram.clone()).unwrap();
    let received = world.receive(hairpinned).unwrap();
    // Bob's port is closed: he says so to Alice's external address.
    let error = icmp_error(3, 3, bob.address, EXTERNAL, 0, &received);
    let mut error = world.send(error).unwrap();
    assert_eq!(ends(&error).0.address, EXTERNAL);
    let mut copy = error.clone();
    let packet = Ipv4Packet::parse(&mut copy, 0, Offload::NONE).unwrap();
    assert_eq!(external_port(&packet), Some((Proto::Udp, outside_alice.port)));
    error = world.receive(error).unwrap();
    assert_eq!(destination(&error).address, alice.address);
    assert_quotes(&error, &datagram);
}

#[test]
fn the_shard_of_an_error_is_that_of_the_quoted_port() {
    let sent = udp(Endpoint::new(EXTERNAL, 10_007), at(SERVER), b"question");
    let mut error = icmp_error(3, 3, ROUTER, EXTERNAL, 0, &sent);
    let packet = Ipv4Packet::parse(&mut error, 0, Offload::NONE).unwrap();
    assert_eq!(external_port(&packet), Some((Proto::Udp, 10_007)));
    let mut answer = icmp(0, ROUTER, EXTERNAL, 4711);
    let packet = Ipv4Packet::parse(&mut answer, 0, Offload::NONE).unwrap();
    assert_eq!(external_port(&packet), Some((Proto::Icmp, 4711)));
}

#[test]
fn a_truncated_quotation_is_dropped() {
    let mut world = World::new();
    let sent = world.send(udp(at(CLIENT), at(SERVER), b"question")).unwrap();
    for length in 0..28 {
        let error = icmp_error(3, 3, ROUTER, EXTERNAL, 0, &sent[..length]);
        assert_eq!(world.receive(error), Err(DropReason::Truncated), "{length}");
    }
    for first in [0x41, 0x44, 0x65, 0x05] {
        let mut quoted = sent.clone();
        quoted[0] = first;
        let error = icmp_error(3, 3, ROUTER, EXTERNAL, 0, &quoted);
        assert_eq!(world.receive(error), Err(DropReason::BadIpHeader), "{first:#x}");
    }
    let mut quoted = sent;
    quoted[0] = 0x4f;
    let error = icmp_error(3, 3, ROUTER, EXTERNAL, 0, &quoted);
    assert_eq!(world.receive(error), Err(DropReason::Truncated));
}
