//! RFC 4787: Network Address Translation Behavioral Requirements for Unicast UDP.

use super::*;

const CLIENT: &str = "10.66.77.2:5000";
const SERVER: &str = "198.51.100.9:53";

fn ask(world: &mut World, client: &str, server: &str) -> Endpoint {
    source(&world.send(udp(at(client), at(server), b"question")).unwrap())
}

fn answer(world: &mut World, server: &str, external: Endpoint) -> Result<Endpoint, DropReason> {
    world.receive(udp(at(server), external, b"answer")).map(|bytes| destination(&bytes))
}

#[test]
fn a_datagram_goes_there_and_its_answer_comes_back() {
    let mut world = World::new();
    let external = ask(&mut world, CLIENT, SERVER);
    let answer = world.receive(udp(at(SERVER), external, b"answer")).unwrap();
    assert_eq!(ends(&answer), (at(SERVER), at(CLIENT)));
    assert_eq!(&answer[28..], b"answer");
}

#[test]
fn req_1_the_mapping_does_not_depend_on_the_destination() {
    let mut world = World::new();
    let first = ask(&mut world, CLIENT, SERVER);
    assert_eq!(first.address, EXTERNAL);
    assert_eq!(ask(&mut world, CLIENT, "198.51.100.9:54"), first);
    assert_eq!(ask(&mut world, CLIENT, "192.0.2.77:9999"), first);
    assert_eq!(world.mapping(at(CLIENT)).unwrap().sessions, 3);
}

#[test]
fn req_2_all_mappings_of_a_client_have_the_same_external_address() {
    let mut world = World::new();
    world.nat.set_external(&[EXTERNAL, SECOND_EXTERNAL], world.now);
    let ports: Vec<u16> = (20_000..21_000).collect();
    for protocol in [Proto::Tcp, Proto::Udp] {
        assert_eq!(world.nat.add_ports(protocol, SECOND_EXTERNAL, &ports), ports.len());
    }
    let mut used = std::collections::HashSet::new();
    for client in 2..40 {
        let internal = |port| Endpoint::new(Ipv4Addr::new(10, 66, 77, client), port);
        let home = source(&world.send(udp(internal(1024), at(SERVER), b"")).unwrap()).address;
        for port in 1025..1035 {
            assert_eq!(source(&world.send(udp(internal(port), at(SERVER), b"")).unwrap()).address, home);
            let syn = tcp(internal(port), at(SERVER), "S", 1, 0, b"");
            assert_eq!(source(&world.send(syn).unwrap()).address, home);
        }
        let ping = icmp(8, internal(0).address, at(SERVER).address, 77);
        assert_eq!(source(&world.send(ping).unwrap()).address, home);
        used.insert(home);
    }
    assert_eq!(used.len(), 2, "and the clients are spread over the addresses");
}

#[test]
fn req_3_two_live_mappings_never_have_the_same_external_port() {
    let mut world = World::with_ports(NatConfig::default(), 10_000..10_100);
    let mut seen = std::collections::HashSet::new();
    for port in 2_000..2_100 {
        assert!(seen.insert(ask(&mut world, &format!("10.66.77.2:{port}"), SERVER)));
    }
    let refused = world.send(udp(at("10.66.77.3:2000"), at("192.0.2.1:1"), b""));
    assert_eq!(refused, Err(DropReason::PortsExhausted), "even towards another destination");
}

#[test]
fn req_3a_the_class_of_the_port_is_kept() {
    let mut world = World::new();
    let privileged: Vec<u16> = (600..700).collect();
    world.nat.add_ports(Proto::Udp, EXTERNAL, &privileged);
    for port in [53, 123, 500, 1023] {
        assert!(ask(&mut world, &format!("10.66.77.2:{port}"), SERVER).port < 1024);
    }
    for port in [1024, 5000, 65535] {
        assert!(ask(&mut world, &format!("10.66.77.2:{port}"), SERVER).port >= 1024);
    }
    assert_eq!(world.nat.free_ports(Proto::Udp, EXTERNAL, PortClass::Privileged), 96);
}

#[test]
fn req_3a_a_privileged_port_makes_do_with_another_if_there_is_none() {
    let mut world = World::new();
    assert!(ask(&mut world, "10.66.77.2:123", SERVER).port >= 1024);
    let demand = world.nat.next_port_demand().unwrap();
    assert_eq!((demand.protocol, demand.class), (Proto::Udp, PortClass::Privileged), "but the shell is told");
}

#[test]
fn req_5_a_mapping_lives_five_minutes() {
    let mut world = World::new();
    let external = ask(&mut world, CLIENT, SERVER);
    world.pass(299);
    assert_eq!(answer(&mut world, SERVER, external), Ok(at(CLIENT)));

    let mut world = World::new();
    let external = ask(&mut world, CLIENT, SERVER);
    world.pass(302);
    assert_eq!(answer(&mut world, SERVER, external), Err(DropReason::NoMapping));
    assert_eq!(world.nat.counts().udp_mappings, 0);
}

#[test]
fn req_6_outbound_packets_refresh_the_mapping() {
    let mut world = World::new();
    let external = ask(&mut world, CLIENT, SERVER);
    for _ in 0..20 {
        world.pass(290);
        assert_eq!(ask(&mut world, CLIENT, SERVER), external);
    }
}

#[test]
fn req_6_a_refreshed_mapping_lives_to_the_second() {
    for refreshed_after in 0..=300 {
        let mut world = World::new();
        ask(&mut world, CLIENT, SERVER);
        world.pass(refreshed_after);
        ask(&mut world, CLIENT, SERVER);
        world.pass(300);
        assert!(world.mapping(at(CLIENT)).is_some(), "{refreshed_after}");
        world.pass(1);
        assert!(world.mapping(at(CLIENT)).is_none(), "{refreshed_after}");
    }
}

#[test]
fn req_6_filtered_packets_do_not_refresh_the_mapping() {
    let mut world = World::new();
    let external = ask(&mut world, CLIENT, SERVER);
    for _ in 0..31 {
        world.pass(10);
        _ = answer(&mut world, "192.0.2.66:53", external);
    }
    assert!(world.mapping(at(CLIENT)).is_none());
}

#[test]
fn req_6_a_stranger_whom_the_filter_admits_does_not_refresh_the_mapping_either() {
    let mut world =
        World::with(NatConfig { filtering: Filtering::EndpointIndependent, ..NatConfig::default() });
    let external = ask(&mut world, CLIENT, SERVER);
    for _ in 0..29 {
        world.pass(10);
        assert_eq!(answer(&mut world, "192.0.2.66:53", external), Ok(at(CLIENT)));
    }
    world.pass(20);
    assert!(world.mapping(at(CLIENT)).is_none());
}

#[test]
fn req_8_address_dependent_filtering_admits_every_port_of_an_address_sent_to() {
    let mut world = World::new();
    let external = ask(&mut world, CLIENT, SERVER);
    assert_eq!(answer(&mut world, "198.51.100.9:54", external), Ok(at(CLIENT)));
    assert_eq!(answer(&mut world, "198.51.100.10:53", external), Err(DropReason::Filtered));
    ask(&mut world, CLIENT, "198.51.100.10:1");
    assert_eq!(answer(&mut world, "198.51.100.10:53", external), Ok(at(CLIENT)));
}

#[test]
fn req_8_an_address_is_admitted_only_as_long_as_a_session_with_it_lives() {
    let mut world = World::new();
    let external = ask(&mut world, CLIENT, SERVER);
    ask(&mut world, CLIENT, "192.0.2.1:1");
    for _ in 0..4 {
        world.pass(100);
        ask(&mut world, CLIENT, "192.0.2.1:1");
    }
    assert_eq!(answer(&mut world, "192.0.2.1:2", external), Ok(at(CLIENT)));
    assert_eq!(answer(&mut world, SERVER, external), Err(DropReason::Filtered));
}

#[test]
fn req_8_endpoint_independent_filtering_admits_everybody() {
    let mut world =
        World::with(NatConfig { filtering: Filtering::EndpointIndependent, ..NatConfig::default() });
    let external = ask(&mut world, CLIENT, SERVER);
    assert_eq!(answer(&mut world, "192.0.2.66:7", external), Ok(at(CLIENT)));
}

#[test]
fn req_8_address_and_port_dependent_filtering_admits_only_endpoints_sent_to() {
    let mut world =
        World::with(NatConfig { filtering: Filtering::AddressAndPortDependent, ..NatConfig::default() });
    let external = ask(&mut world, CLIENT, SERVER);
    assert_eq!(answer(&mut world, SERVER, external), Ok(at(CLIENT)));
    assert_eq!(answer(&mut world, "198.51.100.9:54", external), Err(DropReason::Filtered));
}

#[test]
fn req_8_the_filtering_can_be_changed_while_mappings_live() {
    let mut world = World::new();
    let external = ask(&mut world, CLIENT, SERVER);
    let strict = NatConfig { filtering: Filtering::AddressAndPortDependent, ..NatConfig::default() };
    world.nat.set_config(strict, world.now);
    assert_eq!(answer(&mut world, "198.51.100.9:54", external), Err(DropReason::Filtered));
    world.nat.set_config(NatConfig::default(), world.now);
    assert_eq!(answer(&mut world, "198.51.100.9:54", external), Ok(at(CLIENT)));
}

#[test]
fn req_9a_a_hairpinned_datagram_shows_the_external_source() {
    let mut world = World::new();
    let (alice, bob) = (at("10.66.77.2:5000"), at("10.66.77.3:6000"));
    // Both have talked to a rendezvous server, and then send to each other's external endpoint.
    let outside_alice = ask(&mut world, "10.66.77.2:5000", SERVER);
    let outside_bob = ask(&mut world, "10.66.77.3:6000", SERVER);
    assert!(world.nat.owns_port(Proto::Udp, EXTERNAL, outside_bob.port));
    let on_the_way = world.send(udp(bob, outside_alice, b"punch")).unwrap();
    assert_eq!(world.receive(on_the_way), Err(DropReason::Filtered), "Alice has not sent to Bob yet");

    let on_the_way = world.send(udp(alice, outside_bob, b"hello")).unwrap();
    assert_eq!(ends(&on_the_way), (outside_alice, outside_bob));
    assert_eq!(ends(&world.receive(on_the_way).unwrap()), (outside_alice, bob));
    let back = world.send(udp(bob, outside_alice, b"hello")).unwrap();
    assert_eq!(ends(&world.receive(back).unwrap()), (outside_bob, alice));
}

#[test]
fn req_10_a_payload_that_names_addresses_is_left_alone() {
    let mut world = World::new();
    // As in a STUN answer, and as in FTP's PORT.
    let inner = [&at(CLIENT).address.octets()[..], b"PORT 10,66,77,2,19,136\r\n10.66.77.2:5000"].concat();
    let sent = world.send(udp(at(CLIENT), at(SERVER), &inner)).unwrap();
    assert_eq!(sent[28..], inner);
    let external = source(&sent);
    let outer = [&external.address.octets()[..], &external.port.to_be_bytes(), b"203.0.113.1"].concat();
    let received = world.receive(udp(at(SERVER), external, &outer)).unwrap();
    assert_eq!(received[28..], outer);
}

#[test]
fn req_11_the_mapping_stays_endpoint_independent_under_load() {
    let mut world = World::with_ports(NatConfig::default(), 10_000..10_050);
    let first = ask(&mut world, CLIENT, SERVER);
    for port in 2_000..2_100 {
        _ = world.send(udp(Endpoint::new(address("10.66.77.3"), port), at(SERVER), b""));
    }
    assert_eq!(ask(&mut world, CLIENT, "192.0.2.1:1"), first, "although the pool is exhausted");
}

#[test]
fn req_12_an_icmp_message_removes_no_mapping() {
    let mut world = World::new();
    let sent = world.send(udp(at(CLIENT), at(SERVER), b"question")).unwrap();
    for (kind, code) in [(3, 0), (3, 1), (3, 3), (3, 4), (3, 13), (11, 0), (12, 0)] {
        let error = icmp_error(kind, code, address("192.0.2.254"), EXTERNAL, 0, &sent[..28]);
        assert_eq!(destination(&world.receive(error).unwrap()).address, at(CLIENT).address);
    }
    assert_eq!(answer(&mut world, SERVER, source(&sent)), Ok(at(CLIENT)));
    assert_eq!(world.mapping(at(CLIENT)).unwrap().sessions, 1);
}

#[test]
fn req_14_a_fragment_that_nobody_reassembled_is_dropped() {
    let mut world = World::new();
    let mut first = udp(at(CLIENT), at(SERVER), b"half");
    first[6] |= 0x20; // more fragments
    seal_header(&mut first);
    assert_eq!(world.send(first), Err(DropReason::BadFragment));
}

#[test]
fn a_zero_checksum_stays_zero() {
    let mut world = World::new();
    let mut datagram = udp(at(CLIENT), at(SERVER), b"question");
    datagram[26..28].fill(0);
    let sent = world.send(datagram).unwrap();
    assert_eq!(sent[26..28], [0, 0]);
    let mut answer = udp(at(SERVER), source(&sent), b"answer");
    answer[26..28].fill(0);
    assert_eq!(world.receive(answer).unwrap()[26..28], [0, 0]);
}
