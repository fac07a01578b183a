//! RFC 6056, RFC 6864, published ports and what else `docs/nat.md` lists.

use super::*;
use std::collections::HashSet;

const CLIENT: &str = "10.66.77.2:5000";
const SERVER: &str = "198.51.100.9:53";

#[test]
fn rfc_6056_external_ports_are_drawn_at_random() {
    let draw = |seed| {
        let mut nat = Nat::new(NatConfig::default(), &[EXTERNAL], ShardSlice::WHOLE, [seed; 32]);
        let ports: Vec<u16> = (10_000..20_000).collect();
        nat.add_ports(Proto::Udp, EXTERNAL, &ports);
        let mut world = World { nat, now: Timestamp::from_secs(1) };
        let next = |port| {
            let internal = Endpoint::new(address("10.66.77.2"), port);
            source(&world.send(udp(internal, at(SERVER), b"")).unwrap()).port
        };
        (2_000..2_200).map(next).collect::<Vec<u16>>()
    };
    let (one, two) = (draw(1), draw(2));
    assert_eq!(one, draw(1), "the seed decides");
    assert_ne!(one, two);
    // Not monotonous, not near the last one, and all over the range.
    let steps: Vec<i32> = one.windows(2).map(|pair| i32::from(pair[1]) - i32::from(pair[0])).collect();
    assert!((60..140).contains(&steps.iter().filter(|&&step| step > 0).count()));
    assert!(steps.iter().filter(|step| step.abs() < 100).count() < 20);
    let quarters: HashSet<u16> = one.iter().map(|port| (port - 10_000) / 2_500).collect();
    assert_eq!(quarters.len(), 4);
}

#[test]
fn rfc_6864_datagrams_that_may_be_fragmented_get_identifications_of_their_own() {
    let mut world = World::new();
    let mut seen = HashSet::new();
    // Ten clients that all count from the same number.
    for client in 2..12 {
        for _ in 0..50 {
            let internal = Endpoint::new(Ipv4Addr::new(10, 66, 77, client), 5000);
            let sent = world.send(udp(internal, at(SERVER), b"")).unwrap();
            assert!(seen.insert([sent[4], sent[5]]));
        }
    }
}

#[test]
fn rfc_6864_an_atomic_datagram_keeps_its_identification() {
    let mut world = World::new();
    let mut datagram = udp(at(CLIENT), at(SERVER), b"");
    datagram[6] |= 0x40; // don't fragment
    seal_header(&mut datagram);
    assert_eq!(world.send(datagram).unwrap()[4..6], [0x12, 0x34]);
}

#[test]
fn rfc_6864_each_shard_counts_in_its_own_part_of_the_numbers() {
    let mut seen = HashSet::new();
    for shard in 0..3 {
        let slice = ShardSlice { shard, shards: 3 };
        let mut nat = Nat::new(NatConfig::default(), &[EXTERNAL], slice, [7; 32]);
        let ports: Vec<u16> = (10_000..10_100).collect();
        nat.add_ports(Proto::Udp, EXTERNAL, &ports);
        let mut world = World { nat, now: Timestamp::from_secs(1) };
        for _ in 0..20_000 {
            let sent = world.send(udp(at(CLIENT), at(SERVER), b"")).unwrap();
            assert!(seen.insert([sent[4], sent[5]]));
        }
    }
}

#[test]
fn rfc_6864_a_superpacket_takes_as_many_numbers_as_it_becomes_datagrams() {
    let mut world = World::new();
    let identification = |bytes: &[u8]| u16::from_be_bytes([bytes[4], bytes[5]]);
    let before = identification(&world.send(udp(at(CLIENT), at(SERVER), b"")).unwrap());
    let mut bytes = udp(at(CLIENT), at(SERVER), &[0; 2_500]);
    let gso = crate::wire::Gso { kind: crate::wire::GsoKind::Udp4, segment_size: 1_000 };
    let offload = Offload { gso: Some(gso), ..Offload::NONE };
    let mut packet = Ipv4Packet::parse(&mut bytes, 0, offload).unwrap();
    world.nat.translate_outbound(&mut packet, world.now).unwrap();
    assert_eq!(identification(&bytes), before + 1);
    let after = world.send(udp(at(CLIENT), at(SERVER), b"")).unwrap();
    assert_eq!(identification(&after), before + 1 + 3);
}

#[test]
fn other_protocols_are_dropped_with_a_reason() {
    let mut world = World::new();
    for protocol in [2, 41, 47, 50, 132] {
        let packet = ipv4(protocol, at(CLIENT).address, at(SERVER).address, &[0; 40]);
        assert_eq!(world.send(packet), Err(DropReason::UnsupportedProtocol));
        let packet = ipv4(protocol, at(SERVER).address, EXTERNAL, &[0; 40]);
        assert_eq!(world.receive(packet), Err(DropReason::UnsupportedProtocol));
    }
}

#[test]
fn a_published_port_is_open_to_everybody_and_answers_from_that_port() {
    let mut world = World::new();
    let (published, inner) = (Endpoint::new(EXTERNAL, 8080), at("10.66.77.2:80"));
    world.nat.publish(Proto::Udp, published, inner, world.now).unwrap();
    assert!(world.nat.owns_port(Proto::Udp, EXTERNAL, 8080));
    for day in 0..3 {
        let stranger = Endpoint::new(address("192.0.2.1"), 1000 + day);
        let received = world.receive(udp(stranger, published, b"hello")).unwrap();
        assert_eq!(ends(&received), (stranger, inner));
        assert_eq!(ends(&world.send(udp(inner, stranger, b"hello")).unwrap()), (published, stranger));
        world.pass(24 * 3600);
    }
    let listed = world.mapping(inner).unwrap();
    assert_eq!((listed.state, listed.expires_in, listed.sessions), (MappingState::Published, None, 0));
}

#[test]
fn a_published_tcp_port_takes_connections_and_keeps_their_state() {
    let mut world = World::new();
    let (published, inner) = (Endpoint::new(EXTERNAL, 8080), at("10.66.77.2:80"));
    let visitor = at("192.0.2.1:1000");
    world.nat.publish(Proto::Tcp, published, inner, world.now).unwrap();
    let data = tcp(visitor, published, "PA", 1, 1, b"data");
    assert_eq!(world.receive(data.clone()), Err(DropReason::TcpOutOfState));
    world.receive(tcp(visitor, published, "S", 0, 0, b"")).unwrap();
    let syn_ack = world.send(tcp(inner, visitor, "SA", 0, 1, b"")).unwrap();
    assert_eq!(ends(&syn_ack), (published, visitor));
    world.receive(data).unwrap();
    world.pass(3600);
    world.receive(tcp(visitor, published, "PA", 5, 1, b"data")).unwrap();
    let other_direction = source(&world.send(tcp(inner, at(SERVER), "S", 1, 0, b"")).unwrap());
    assert_eq!(other_direction, published, "what it opens itself comes from there too");
    assert!(world.nat.unpublish(Proto::Tcp, published, world.now));
    assert!(!world.nat.unpublish(Proto::Tcp, published, world.now));
    assert_eq!(world.nat.counts(), NatCounts::default());
}

#[test]
fn a_port_is_published_once_and_never_one_in_use() {
    let mut world = World::with_ports(NatConfig::default(), 10_000..10_001);
    let (one, two) = (at("10.66.77.2:80"), at("10.66.77.3:80"));
    let now = world.now;
    let in_use = source(&world.send(udp(at(CLIENT), at(SERVER), b"")).unwrap());
    let mut publish = |protocol, external, internal| world.nat.publish(protocol, external, internal, now);
    assert_eq!(publish(Proto::Udp, in_use, one), Err(PublishError::PortInUse));
    assert_eq!(publish(Proto::Icmp, in_use, one), Err(PublishError::NotTcpOrUdp));
    assert_eq!(publish(Proto::Udp, at("192.0.2.1:80"), one), Err(PublishError::NotExternal));
    let external = Endpoint::new(EXTERNAL, 8080);
    assert_eq!(publish(Proto::Udp, external, one), Ok(()));
    assert_eq!(publish(Proto::Udp, external, two), Err(PublishError::PortInUse));
    let other = Endpoint::new(EXTERNAL, 8081);
    assert_eq!(publish(Proto::Udp, other, one), Err(PublishError::EndpointPublished));
    // A free port of the pool leaves the pool, and comes back only if it is added again.
    let free = Endpoint::new(EXTERNAL, 10_000);
    assert_eq!(publish(Proto::Tcp, free, two), Ok(()));
    assert_eq!(world.nat.free_ports(Proto::Tcp, EXTERNAL, PortClass::Unprivileged), 0);
    assert_eq!(world.nat.add_ports(Proto::Tcp, EXTERNAL, &[10_000]), 0);
    assert_eq!(world.nat.remove_client(two.address, now), [(Proto::Tcp, free)]);
    assert!(!world.nat.owns_port(Proto::Tcp, EXTERNAL, 10_000));
    assert_eq!(world.nat.add_ports(Proto::Tcp, EXTERNAL, &[10_000]), 1);
}

#[test]
fn a_port_that_another_shard_publishes_is_lent_to_nobody() {
    let mut world = World::with_ports(NatConfig::default(), 10_000..10_002);
    let (one, other) = (Endpoint::new(EXTERNAL, 10_000), Endpoint::new(EXTERNAL, 10_001));
    assert_eq!(world.nat.cede_port(Proto::Udp, one), Ok(()));
    assert_eq!(source(&world.send(udp(at(CLIENT), at(SERVER), b"")).unwrap()), other);
    let next = udp(at("10.66.77.3:5000"), at(SERVER), b"");
    assert_eq!(world.send(next), Err(DropReason::PortsExhausted));
    assert_eq!(world.nat.cede_port(Proto::Udp, other), Err(PublishError::PortInUse));
}

#[test]
fn publishing_replaces_the_mapping_that_the_endpoint_had() {
    let mut world = World::new();
    let before = source(&world.send(udp(at(CLIENT), at(SERVER), b"")).unwrap());
    let published = Endpoint::new(EXTERNAL, 8080);
    world.nat.publish(Proto::Udp, published, at(CLIENT), world.now).unwrap();
    assert_eq!(source(&world.send(udp(at(CLIENT), at(SERVER), b"")).unwrap()), published);
    assert_eq!(world.receive(udp(at(SERVER), before, b"")), Err(DropReason::NoMapping));
}

#[test]
fn a_change_of_the_external_address_ends_its_mappings() {
    let mut world = World::new();
    let before = source(&world.send(udp(at(CLIENT), at(SERVER), b"")).unwrap());
    world.nat.publish(Proto::Udp, Endpoint::new(EXTERNAL, 53), at("10.66.77.2:53"), world.now).unwrap();
    let published = world.nat.set_external(&[SECOND_EXTERNAL], world.now);
    assert_eq!(published, [(Proto::Udp, Endpoint::new(EXTERNAL, 53))]);
    assert_eq!(world.nat.counts(), NatCounts::default());
    assert_eq!(world.receive(udp(at(SERVER), before, b"")), Err(DropReason::NoMapping));
    assert_eq!(world.send(udp(at(CLIENT), at(SERVER), b"")), Err(DropReason::PortsExhausted));
    world.nat.add_ports(Proto::Udp, SECOND_EXTERNAL, &[10_000]);
    let after = source(&world.send(udp(at(CLIENT), at(SERVER), b"")).unwrap());
    assert_eq!(after, Endpoint::new(SECOND_EXTERNAL, 10_000));
    world.nat.set_external(&[], world.now);
    assert_eq!(world.send(udp(at(CLIENT), at(SERVER), b"")), Err(DropReason::PortsExhausted));
}

#[test]
fn a_protocol_without_ports_leaves_from_an_address_that_is_still_ours() {
    const GRE: u8 = 47;
    let client = at(CLIENT).address;
    let addresses = [EXTERNAL, SECOND_EXTERNAL];
    let nat = Nat::new(NatConfig::default(), &addresses, ShardSlice::WHOLE, [7; 32]);
    let mut world = World { nat, now: Timestamp::from_secs(1_000) };
    world.nat.pass_protocols(vec![(GRE, client)]);
    let gre =
        |world: &mut World| source(&world.send(ipv4(GRE, client, at(SERVER).address, &[0; 40])).unwrap());
    let home = gre(&mut world).address;
    let other = addresses.into_iter().find(|&address| address != home).unwrap();
    // Its ping comes from there, too; what it publishes is on the other address, and outlives the first.
    let ping = world.send(icmp(8, client, at(SERVER).address, 1)).unwrap();
    assert_eq!(source(&ping).address, home);
    world.nat.publish(Proto::Udp, Endpoint::new(other, 53), at("10.66.77.2:53"), world.now).unwrap();
    world.nat.set_external(&[other], world.now);
    assert_eq!(gre(&mut world).address, other);
}

#[test]
fn a_shorter_timeout_holds_for_sessions_that_are_there_already() {
    let mut world = World::new();
    world.send(udp(at(CLIENT), at(SERVER), b"")).unwrap();
    let config = NatConfig { udp_timeout: Duration::from_secs(120), ..NatConfig::default() };
    world.nat.set_config(config, world.now);
    world.pass(122);
    assert_eq!(world.nat.counts().udp_mappings, 0);
}

#[test]
fn a_clock_that_stood_still_for_hours_is_no_problem() {
    let mut world = World::new();
    world.send(udp(at(CLIENT), at(SERVER), b"")).unwrap();
    world.now = Timestamp::from_secs(10_000_000);
    let external = source(&world.send(udp(at("10.66.77.2:5001"), at(SERVER), b"")).unwrap());
    world.nat.expire(world.now);
    assert_eq!(world.nat.counts().udp_mappings, 1);
    assert!(world.receive(udp(at(SERVER), external, b"")).is_ok());
    world.pass(302);
    assert_eq!(world.nat.counts().udp_mappings, 0);
}

#[test]
fn a_range_that_shrinks_ends_no_mapping_and_lends_nothing_outside_of_it() {
    let mut world = World::with_ports(NatConfig::default(), 10_000..10_020);
    let client = |n: u16| Endpoint::new(Ipv4Addr::new(10, 66, 77, 2), 5_000 + n);
    let ports: Vec<Endpoint> =
        (0..20).map(|n| source(&world.send(udp(client(n), at(SERVER), b"")).unwrap())).collect();
    world.pass(200);
    // Ten of them are in use when the upper half is taken away, ten are about to expire.
    for n in 0..10 {
        world.send(udp(client(n), at(SERVER), b"")).unwrap();
    }
    world.nat.set_port_range(10_000..=10_009);
    let returned = world.nat.take_returned_ports();
    assert!(returned.iter().all(|&(protocol, _)| protocol == Proto::Tcp), "those of UDP are all lent");
    assert_eq!(returned.len(), 10);
    for (n, &external) in ports.iter().enumerate() {
        assert_eq!(source(&world.send(udp(client(n as u16), at(SERVER), b"")).unwrap()), external);
        assert!(world.receive(udp(at(SERVER), external, b"")).is_ok(), "{external} lives on");
    }
    world.pass(302 + 122);
    let mut returned = world.nat.take_returned_ports();
    returned.sort();
    let outside: Vec<_> = (10_010..10_020).map(|port| (Proto::Udp, Endpoint::new(EXTERNAL, port))).collect();
    assert_eq!(returned.len(), 10);
    assert_eq!(returned, outside, "each is the caller's once it has rested");
    assert!(outside.iter().all(|&(_, port)| !world.nat.owns_port(Proto::Udp, EXTERNAL, port.port)));

    for n in 0..10 {
        let lent = source(&world.send(udp(client(100 + n), at(SERVER), b"")).unwrap());
        assert!((10_000..=10_009).contains(&lent.port), "{lent}");
    }
    assert_eq!(world.send(udp(client(200), at(SERVER), b"")), Err(DropReason::PortsExhausted));
    assert_eq!(world.nat.add_ports(Proto::Udp, EXTERNAL, &[10_015]), 0, "a batch that comes too late");
    assert_eq!(world.nat.take_returned_ports(), [(Proto::Udp, Endpoint::new(EXTERNAL, 10_015))]);
}

#[test]
fn free_ports_outside_a_smaller_range_are_returned_at_once_and_shared_with_nobody() {
    let mut world = World::with_ports(NatConfig::default(), 10_000..10_020);
    world.nat.set_port_range(10_000..=10_000);
    let returned = world.nat.take_returned_ports();
    assert_eq!(returned.len(), 2 * 19, "of TCP and UDP");
    // The last TCP port that is left is shared, towards other destinations; none of the others is.
    for n in 1..20 {
        let server = Endpoint::new(Ipv4Addr::new(198, 51, 100, n), 443);
        let sent =
            world.send(tcp(Endpoint::new(Ipv4Addr::new(10, 66, 77, n), 5_000), server, "S", 1, 0, b""));
        assert_eq!(source(&sent.unwrap()).port, 10_000);
    }
}

#[test]
fn a_lower_cap_ends_nothing_and_a_stricter_filter_holds_at_once() {
    let mut world = World::new();
    let client = |n: u16| Endpoint::new(Ipv4Addr::new(10, 66, 77, 2), 5_000 + n);
    let external = source(&world.send(udp(client(0), at(SERVER), b"")).unwrap());
    for n in 1..10 {
        world.send(udp(client(n), at(SERVER), b"")).unwrap();
    }
    let other_port = Endpoint::new(at(SERVER).address, 999);
    assert!(world.receive(udp(other_port, external, b"")).is_ok());
    let config = NatConfig {
        max_mappings_per_client: 5,
        filtering: Filtering::AddressAndPortDependent,
        ..NatConfig::default()
    };
    world.nat.set_config(config, world.now);
    assert_eq!(world.nat.counts().udp_mappings, 10);
    assert!(world.receive(udp(at(SERVER), external, b"")).is_ok());
    assert_eq!(world.receive(udp(other_port, external, b"")), Err(DropReason::Filtered));
    assert_eq!(world.send(udp(client(20), at(SERVER), b"")), Err(DropReason::ClientMappingLimit));
}

#[test]
fn whose_a_packet_from_outside_is_can_be_told_before_it_is_checked() {
    let mut world = World::new();
    let (one, two) = ("10.66.77.2:5000", "10.66.77.3:5000");
    let [for_one, for_two] =
        [one, two].map(|client| source(&world.send(udp(at(client), at(SERVER), b"")).unwrap()));
    let ping = icmp(8, address("10.66.77.3"), at(SERVER).address, 77);
    let identifier = u16::from_be_bytes(world.send(ping).unwrap()[24..26].try_into().unwrap());
    let published = Endpoint::new(EXTERNAL, 8_080);
    world.nat.publish(Proto::Tcp, published, at("10.66.77.4:80"), world.now).unwrap();

    world.nat.pass_protocols(vec![(47, address("10.66.77.5"))]); // GRE
    let elsewhere = Endpoint::new(EXTERNAL, 9_090);
    let publisher = |protocol, external| {
        ((protocol, external) == (Proto::Udp, elsewhere)).then_some(address("10.66.77.6"))
    };

    let recipient = |packet: &[u8]| world.nat.recipient(packet, publisher).map(|client| client.octets()[3]);
    assert_eq!(recipient(&udp(at(SERVER), for_one, b"")), Some(2));
    assert_eq!(recipient(&udp(at(SERVER), for_two, b"")), Some(3));
    let stranger = at("192.0.2.7:999");
    assert_eq!(recipient(&udp(stranger, for_two, b"")), Some(3), "the port is the client's");
    assert_eq!(recipient(&tcp(stranger, published, "S", 1, 0, b"")), Some(4));
    assert_eq!(recipient(&icmp(0, at(SERVER).address, EXTERNAL, identifier)), Some(3));
    assert_eq!(recipient(&icmp(14, at(SERVER).address, EXTERNAL, identifier)), Some(3), "a timestamp reply");
    assert_eq!(recipient(&icmp(8, at(SERVER).address, EXTERNAL, identifier)), None, "a query");
    assert_eq!(recipient(&icmp(0, at(SERVER).address, EXTERNAL, identifier ^ 1)), None);
    assert_eq!(recipient(&tcp(at(SERVER), for_one, "A", 1, 0, b"")), None, "another protocol's port");
    assert_eq!(recipient(&udp(stranger, elsewhere, b"")), Some(6), "published for a client of another shard");
    assert_eq!(recipient(&tcp(stranger, elsewhere, "S", 1, 0, b"")), None);
    let mut gre = udp(stranger, for_one, b"");
    gre[9] = 47;
    assert_eq!(recipient(&gre), Some(5), "it has no ports");
    gre[9] = 50;
    assert_eq!(recipient(&gre), None, "ESP is nobody's");

    let mut fragment = udp(at(SERVER), for_one, b"");
    fragment[6] |= 0x20; // More Fragments
    assert_eq!(recipient(&fragment), None, "the pieces of a datagram stay together");
    assert!((0..24).all(|len| recipient(&udp(at(SERVER), for_one, b"")[..len]).is_none()));
}
