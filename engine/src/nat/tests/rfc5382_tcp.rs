//! RFC 5382: NAT Behavioral Requirements for TCP, as RFC 7857 updates it.

use super::*;

const CLIENT: &str = "10.66.77.2:5000";
const SERVER: &str = "198.51.100.9:443";
const HOUR: u64 = 3600;

/// Both ends of a connection, as a test speaks for them. The client's next sequence number is 101, the server's 901.
#[derive(Clone, Copy)]
struct Connection {
    client: Endpoint,
    server: Endpoint,
    external: Endpoint,
}

impl Connection {
    fn open(world: &mut World, client: &str, server: &str) -> Self {
        let (client, server) = (at(client), at(server));
        let external = source(&world.send(tcp(client, server, "S", 100, 0, b"")).unwrap());
        let connection = Self { client, server, external };
        connection.receives(world, "SA", 900, 101, b"").unwrap();
        connection.sends(world, "A", 101, 901, b"").unwrap();
        connection
    }

    fn sends(
        &self,
        world: &mut World,
        flags: &str,
        seq: u32,
        ack: u32,
        data: &[u8],
    ) -> Result<(), DropReason> {
        let sent = world.send(tcp(self.client, self.server, flags, seq, ack, data))?;
        assert_eq!(ends(&sent), (self.external, self.server));
        Ok(())
    }

    fn receives(
        &self,
        world: &mut World,
        flags: &str,
        seq: u32,
        ack: u32,
        data: &[u8],
    ) -> Result<(), DropReason> {
        let received = world.receive(tcp(self.server, self.external, flags, seq, ack, data))?;
        assert_eq!(ends(&received), (self.server, self.client));
        Ok(())
    }

    fn state(&self, world: &World) -> Option<MappingState> {
        world.mapping(self.client).map(|mapping| mapping.state)
    }
}

#[test]
fn a_connection_is_opened_used_and_closed() {
    let mut world = World::new();
    let connection = Connection::open(&mut world, CLIENT, SERVER);
    assert_eq!(connection.state(&world), Some(MappingState::Established));
    connection.sends(&mut world, "PA", 101, 901, b"request").unwrap();
    connection.receives(&mut world, "PA", 901, 108, b"response").unwrap();
    connection.sends(&mut world, "FA", 108, 909, b"").unwrap();
    assert_eq!(connection.state(&world), Some(MappingState::Established), "half closed");
    connection.receives(&mut world, "FA", 909, 109, b"").unwrap();
    assert_eq!(connection.state(&world), Some(MappingState::Closing));
    connection.sends(&mut world, "A", 109, 910, b"").unwrap();
    world.pass(242);
    assert_eq!(world.nat.counts().tcp_mappings, 0);
}

#[test]
fn req_1_the_mapping_does_not_depend_on_the_destination() {
    let mut world = World::new();
    let first = Connection::open(&mut world, CLIENT, SERVER);
    let second = Connection::open(&mut world, CLIENT, "192.0.2.1:80");
    assert_eq!(first.external, second.external);
}

#[test]
fn req_2a_a_simultaneous_open_succeeds() {
    let mut world = World::new();
    let (client, server) = (at(CLIENT), at(SERVER));
    let external = source(&world.send(tcp(client, server, "S", 100, 0, b"")).unwrap());
    let connection = Connection { client, server, external };
    connection.receives(&mut world, "S", 900, 0, b"").unwrap();
    connection.sends(&mut world, "SA", 100, 901, b"").unwrap();
    assert_eq!(connection.state(&world), Some(MappingState::Opening));
    connection.receives(&mut world, "SA", 900, 101, b"").unwrap();
    assert_eq!(connection.state(&world), Some(MappingState::Established));
}

#[test]
fn req_3_filtering_is_address_dependent_and_the_client_may_be_called_back() {
    let mut world = World::new();
    let external = Connection::open(&mut world, CLIENT, SERVER).external;
    let stranger = tcp(at("192.0.2.66:80"), external, "S", 1, 0, b"");
    assert_eq!(world.receive(stranger), Err(DropReason::Filtered));
    let called_back = Connection { client: at(CLIENT), server: at("198.51.100.9:20"), external };
    called_back.receives(&mut world, "S", 1, 0, b"").unwrap();
    called_back.sends(&mut world, "SA", 500, 2, b"").unwrap();
    called_back.receives(&mut world, "A", 2, 501, b"").unwrap();
    called_back.receives(&mut world, "PA", 2, 501, b"220 ready").unwrap();
}

#[test]
fn req_4_an_unsolicited_syn_gets_silence() {
    let mut world = World::new();
    let syn = tcp(at(SERVER), Endpoint::new(EXTERNAL, 10_001), "S", 1, 0, b"");
    assert_eq!(world.receive(syn), Err(DropReason::NoMapping));
    let external = Connection::open(&mut world, CLIENT, SERVER).external;
    let syn = tcp(at("192.0.2.66:80"), external, "S", 1, 0, b"");
    assert_eq!(world.receive(syn), Err(DropReason::Filtered));
    assert_eq!(world.nat.counts().sessions, 1, "and leaves no trace");
}

#[test]
fn req_5_an_established_connection_may_be_idle_for_two_hours_and_four_minutes() {
    let mut world = World::new();
    let connection = Connection::open(&mut world, CLIENT, SERVER);
    world.pass(2 * HOUR + 4 * 60);
    connection.receives(&mut world, "A", 901, 101, b"").unwrap();
    world.pass(2 * HOUR + 4 * 60);
    connection.sends(&mut world, "PA", 101, 901, b"alive").unwrap();
    world.pass(2 * HOUR + 4 * 60 + 2);
    assert_eq!(connection.state(&world), None);
}

#[test]
fn req_5_an_opening_connection_may_be_idle_for_four_minutes() {
    for (idle, lives) in [(239, true), (242, false)] {
        let mut world = World::new();
        let (client, server) = (at(CLIENT), at(SERVER));
        let external = source(&world.send(tcp(client, server, "S", 100, 0, b"")).unwrap());
        let connection = Connection { client, server, external };
        world.pass(idle);
        assert_eq!(connection.receives(&mut world, "SA", 900, 101, b"").is_ok(), lives);
    }
}

#[test]
fn rfc_7857_opening_and_closing_have_separate_timers() {
    let config = NatConfig { tcp_closing_timeout: Duration::from_secs(500), ..NatConfig::default() };
    let mut world = World::with(config);
    let connection = Connection::open(&mut world, CLIENT, SERVER);
    connection.sends(&mut world, "FA", 101, 901, b"").unwrap();
    connection.receives(&mut world, "FA", 901, 102, b"").unwrap();
    world.send(tcp(at("10.66.77.2:5001"), at(SERVER), "S", 100, 0, b"")).unwrap();
    world.pass(300);
    assert_eq!(connection.state(&world), Some(MappingState::Closing));
    assert!(world.mapping(at("10.66.77.2:5001")).is_none());
    world.pass(202);
    assert_eq!(connection.state(&world), None);
}

#[test]
fn req_7_mapping_and_filtering_are_per_protocol() {
    let mut world = World::new();
    let tcp_external = Connection::open(&mut world, CLIENT, SERVER).external;
    let udp_external = source(&world.send(udp(at(CLIENT), at("192.0.2.1:1"), b"")).unwrap());
    assert_ne!(tcp_external, udp_external);
    assert_eq!(world.receive(udp(at(SERVER), udp_external, b"")), Err(DropReason::Filtered));
    assert_eq!(world.receive(udp(at(SERVER), tcp_external, b"")), Err(DropReason::NoMapping));
}

#[test]
fn req_8_connections_are_hairpinned() {
    let mut world = World::new();
    let (alice, bob) = (at("10.66.77.2:5000"), at("10.66.77.3:6000"));
    let outside_bob = Endpoint::new(EXTERNAL, 8080);
    world.nat.publish(Proto::Tcp, outside_bob, bob, world.now).unwrap();
    let syn = world.send(tcp(alice, outside_bob, "S", 1, 0, b"")).unwrap();
    let outside_alice = source(&syn);
    assert_eq!(outside_alice.address, EXTERNAL);
    assert_eq!(ends(&world.receive(syn).unwrap()), (outside_alice, bob));
    let syn_ack = world.send(tcp(bob, outside_alice, "SA", 7, 2, b"")).unwrap();
    assert_eq!(ends(&world.receive(syn_ack).unwrap()), (outside_bob, alice));
    let ack = world.send(tcp(alice, outside_bob, "A", 2, 8, b"")).unwrap();
    world.receive(ack).unwrap();
    assert_eq!(world.mapping(alice).unwrap().state, MappingState::Established);
}

#[test]
fn req_10_a_reset_that_fits_closes_the_connection_and_state_is_kept_for_four_minutes() {
    let mut world = World::new();
    let connection = Connection::open(&mut world, CLIENT, SERVER);
    connection.receives(&mut world, "PA", 901, 101, b"data").unwrap();
    connection.receives(&mut world, "R", 905, 0, b"").unwrap();
    assert_eq!(connection.state(&world), Some(MappingState::Closing));
    world.pass(239);
    assert_eq!(connection.state(&world), Some(MappingState::Closing));
    world.pass(3);
    assert_eq!(connection.state(&world), None);
}

#[test]
fn a_connection_that_closes_late_ends_as_soon_as_one_that_closes_early() {
    for age in [0, 800, 7_000, 20_000] {
        let mut world = World::new();
        let connection = Connection::open(&mut world, CLIENT, SERVER);
        for _ in 0..age / 100 {
            world.pass(100);
            connection.sends(&mut world, "A", 101, 901, b"").unwrap();
        }
        connection.receives(&mut world, "R", 901, 0, b"").unwrap();
        world.pass(240);
        assert_eq!(connection.state(&world), Some(MappingState::Closing));
        world.pass(1);
        assert_eq!(connection.state(&world), None);
    }
}

#[test]
fn req_10_a_refused_connection_is_reported_to_the_client() {
    let mut world = World::new();
    let (client, server) = (at(CLIENT), at(SERVER));
    let external = source(&world.send(tcp(client, server, "S", 100, 0, b"")).unwrap());
    let connection = Connection { client, server, external };
    assert_eq!(connection.receives(&mut world, "RA", 0, 55, b""), Err(DropReason::TcpOutOfState));
    connection.receives(&mut world, "RA", 0, 101, b"").unwrap();
    assert_eq!(connection.state(&world), Some(MappingState::Closing));
}

#[test]
fn rfc_7857_a_connection_that_goes_on_after_a_reset_is_established_again() {
    let mut world = World::new();
    let connection = Connection::open(&mut world, CLIENT, SERVER);
    connection.receives(&mut world, "R", 901, 0, b"").unwrap();
    connection.sends(&mut world, "PA", 101, 901, b"what reset?").unwrap();
    assert_eq!(connection.state(&world), Some(MappingState::Established));
    world.pass(HOUR);
    connection.receives(&mut world, "A", 901, 112, b"").unwrap();
}

#[test]
fn rfc_7857_an_outbound_reset_refreshes_nothing() {
    let mut world = World::new();
    let connection = Connection::open(&mut world, CLIENT, SERVER);
    connection.sends(&mut world, "R", 101, 0, b"").unwrap();
    assert_eq!(connection.state(&world), Some(MappingState::Closing));
    for _ in 0..23 {
        world.pass(10);
        connection.sends(&mut world, "R", 101, 0, b"").unwrap();
    }
    world.pass(12);
    assert_eq!(connection.state(&world), None);
}

#[test]
fn rfc_7857_calls_that_the_client_answers_with_resets_keep_no_door_open() {
    for step in [0, 1] {
        let mut world = World::new();
        let connection = Connection::open(&mut world, CLIENT, SERVER);
        connection.sends(&mut world, "R", 101, 0, b"").unwrap();
        let calls = (0..5u16).map(|round| {
            world.pass(200);
            let server = Endpoint::new(connection.server.address, 1 + step * round);
            let call = Connection { server, ..connection };
            call.receives(&mut world, "S", u32::from(round), 0, b"")?;
            call.sends(&mut world, "RA", 0, 1, b"")
        });
        // From one port, the second finds the session of the first; from others, a door that is closed.
        assert_eq!(calls.filter(Result::is_ok).count(), if step == 0 { 2 } else { 1 });
    }
}

#[test]
fn a_client_may_use_its_port_again_after_the_connection_is_closed() {
    let mut world = World::new();
    let connection = Connection::open(&mut world, CLIENT, SERVER);
    connection.sends(&mut world, "R", 101, 0, b"").unwrap();
    connection.sends(&mut world, "S", 50_000, 0, b"").unwrap();
    assert_eq!(connection.state(&world), Some(MappingState::Opening));
    connection.receives(&mut world, "SA", 70_000, 50_001, b"").unwrap();
    connection.sends(&mut world, "A", 50_001, 70_001, b"").unwrap();
    assert_eq!(connection.state(&world), Some(MappingState::Established));
}

#[test]
fn a_connection_that_first_resets_a_stale_one_of_the_server_is_established() {
    let mut world = World::new();
    let (client, server) = (at(CLIENT), at(SERVER));
    let external = source(&world.send(tcp(client, server, "S", 100, 0, b"")).unwrap());
    let connection = Connection { client, server, external };
    connection.receives(&mut world, "A", 50_000, 70_000, b"").unwrap(); // RFC 9293 §3.5.1: half open there
    connection.sends(&mut world, "R", 70_000, 0, b"").unwrap();
    connection.sends(&mut world, "S", 100, 0, b"").unwrap();
    connection.receives(&mut world, "SA", 900, 101, b"").unwrap();
    connection.sends(&mut world, "A", 101, 901, b"").unwrap();
    assert_eq!(connection.state(&world), Some(MappingState::Established));
}

#[test]
fn a_server_may_call_from_its_port_after_the_clients_connection_is_closed() {
    for hangs_up in [false, true] {
        let mut world = World::new();
        let connection = Connection::open(&mut world, CLIENT, SERVER);
        connection.sends(&mut world, "FA", 101, 901, b"").unwrap();
        connection.receives(&mut world, "FA", 901, 102, b"").unwrap();
        connection.receives(&mut world, "S", 500_000, 0, b"").unwrap();
        if hangs_up {
            connection.receives(&mut world, "R", 500_001, 0, b"").unwrap();
            continue;
        }
        connection.sends(&mut world, "SA", 70_000, 500_001, b"").unwrap();
        connection.receives(&mut world, "A", 500_001, 70_001, b"").unwrap();
        assert_eq!(connection.state(&world), Some(MappingState::Established));
    }
}

#[test]
fn a_repeated_syn_changes_nothing() {
    let mut world = World::new();
    let connection = Connection::open(&mut world, CLIENT, SERVER);
    connection.sends(&mut world, "S", 100, 0, b"").unwrap();
    connection.receives(&mut world, "SA", 900, 101, b"").unwrap();
    assert_eq!(connection.state(&world), Some(MappingState::Established));
}

#[test]
fn data_without_a_syn_opens_nothing() {
    let mut world = World::new();
    for flags in ["A", "PA", "FA", "R", "RA", "SA", "SF", "SR", ""] {
        let segment = tcp(at(CLIENT), at(SERVER), flags, 1, 1, b"");
        assert_eq!(world.send(segment), Err(DropReason::TcpOutOfState), "{flags}");
    }
    assert_eq!(world.nat.counts(), NatCounts::default());
}

#[test]
fn a_superpacket_advances_the_connection_by_its_whole_payload() {
    let mut world = World::new();
    let connection = Connection::open(&mut world, CLIENT, SERVER);
    // 3,000 bytes in the head, 30,000 in the gather list; then a reset right behind them.
    let mut bytes = tcp(connection.server, connection.external, "A", 901, 101, &[0; 3000]);
    let total = bytes.len() + 30_000;
    bytes[2..4].copy_from_slice(&(total as u16).to_be_bytes());
    seal_header(&mut bytes);
    let gso = crate::wire::Gso { kind: crate::wire::GsoKind::Tcp4, segment_size: 1400 };
    let offload = Offload { gso: Some(gso), checksum: crate::wire::ChecksumState::Partial };
    // What a partial checksum field holds is the pseudo-header's sum.
    let partial = |bytes: &[u8]| {
        let (source, destination) = ends(bytes);
        let length = (total - 20) as u16;
        crate::wire::checksum::pseudo_header(source.address, destination.address, 6, length).partial()
    };
    let before = partial(&bytes);
    bytes[36..38].copy_from_slice(&before.to_be_bytes());
    let mut packet = Ipv4Packet::parse(&mut bytes, 30_000, offload).unwrap();
    world.nat.translate_inbound(&mut packet, world.now).unwrap();
    assert_eq!(destination(&bytes), connection.client);
    assert_eq!(u16::from_be_bytes([bytes[36], bytes[37]]), partial(&bytes));
    connection.sends(&mut world, "A", 101, 901 + 1400, b"").unwrap();
    connection.receives(&mut world, "R", 901 + 33_000, 0, b"").unwrap();
    assert_eq!(connection.state(&world), Some(MappingState::Closing));
}

#[test]
fn rfc_7857_a_port_is_shared_towards_other_destinations_once_the_pool_is_exhausted() {
    let mut world = World::with_ports(NatConfig::default(), 10_000..10_004);
    let mut first = Vec::new();
    for port in 1_100..1_104 {
        first.push(Connection::open(&mut world, &format!("10.66.77.2:{port}"), SERVER));
    }
    let ports: std::collections::HashSet<u16> = first.iter().map(|c| c.external.port).collect();
    assert_eq!(ports.len(), 4, "never shared while there are free ones");

    // The same destination: no way. Another one: shared, and both connections work.
    let syn = tcp(at("10.66.77.3:1100"), at(SERVER), "S", 1, 0, b"");
    assert_eq!(world.send(syn), Err(DropReason::PortsExhausted));
    let sharer = Connection::open(&mut world, "10.66.77.3:1101", "192.0.2.1:443");
    assert!(ports.contains(&sharer.external.port));
    sharer.receives(&mut world, "PA", 901, 101, b"data").unwrap();
    for connection in &first {
        connection.receives(&mut world, "PA", 901, 101, b"data").unwrap();
    }
    // The sharer cannot follow the owner to its destination.
    let syn = tcp(sharer.client, at(SERVER), "S", 1, 0, b"");
    assert_eq!(world.send(syn), Err(DropReason::SharedPortTaken));

    // The owner goes; the port is still the sharer's, and free only after it.
    world.nat.remove_client(address("10.66.77.2"), world.now);
    sharer.receives(&mut world, "PA", 905, 101, b"data").unwrap();
    world.pass(121);
    assert_eq!(world.nat.free_ports(Proto::Tcp, EXTERNAL, PortClass::Unprivileged), 3);
    world.nat.remove_client(address("10.66.77.3"), world.now);
    world.pass(121);
    assert_eq!(world.nat.free_ports(Proto::Tcp, EXTERNAL, PortClass::Unprivileged), 4);
}

#[test]
fn rfc_7857_a_pool_that_is_empty_for_a_moment_is_not_exhausted() {
    let mut world = World::with_ports(NatConfig::default(), 10_000..10_001);
    world.nat.expect_ports(Proto::Tcp, EXTERNAL, PortOutlook::More);
    let first = Connection::open(&mut world, "10.66.77.2:1100", SERVER);
    let elsewhere = tcp(at("10.66.77.2:1101"), at("198.51.100.10:443"), "S", 1, 0, b"");
    assert_eq!(world.send(elsewhere.clone()), Err(DropReason::PortsExhausted));
    world.nat.expect_ports(Proto::Tcp, EXTERNAL, PortOutlook::None);
    assert_eq!(source(&world.send(elsewhere).unwrap()), first.external);
}

#[test]
fn rfc_7857_a_port_is_shared_although_more_may_come_for_another_address() {
    let mut world = World::with_ports(NatConfig::default(), 10_000..10_001);
    world.nat.set_external(&[EXTERNAL, SECOND_EXTERNAL], world.now);
    world.nat.add_ports(Proto::Tcp, SECOND_EXTERNAL, &[10_000]);
    world.nat.expect_ports(Proto::Tcp, SECOND_EXTERNAL, PortOutlook::More);
    let mut seen = Vec::new();
    for client in 2..20 {
        let client = format!("10.66.77.{client}");
        let home = world.nat.default_external_address(address(&client)).unwrap();
        if seen.contains(&home) {
            continue;
        }
        seen.push(home);
        Connection::open(&mut world, &format!("{client}:1100"), SERVER);
        let elsewhere = tcp(at(&format!("{client}:1101")), at("198.51.100.10:443"), "S", 1, 0, b"");
        assert_eq!(world.send(elsewhere).is_ok(), home == EXTERNAL, "on {home}");
        assert_eq!(world.nat.expects_ports(Proto::Tcp, address(&client)), home == SECOND_EXTERNAL);
    }
    assert_eq!(seen.len(), 2);
}

#[test]
fn closed_connections_make_room_under_the_clients_cap_and_live_ones_do_not() {
    let mut world = World::with(NatConfig { max_mappings_per_client: 100, ..NatConfig::default() });
    let open = |world: &mut World, port: u16| Connection::open(world, &format!("10.66.77.2:{port}"), SERVER);
    let live: Vec<_> = (2_000..2_060).map(|port| open(&mut world, port)).collect();
    // One short connection after the other: each would wait for four minutes after its end.
    let short: Vec<_> = (3_000..3_500)
        .map(|port| {
            let connection = open(&mut world, port);
            connection.sends(&mut world, "R", 101, 0, b"").unwrap();
            connection
        })
        .collect();
    assert_eq!(world.nat.mappings_of(live[0].client.address), 100);
    let left = short.iter().map(|connection| connection.state(&world).is_some());
    assert!(left.eq((3_000..3_500).map(|port| port >= 3_460)), "the one that was closed first goes first");
    // One that is opened again is alive again.
    let again = &short[460];
    again.sends(&mut world, "S", 7_000, 0, b"").unwrap();
    for port in 4_000..4_039 {
        open(&mut world, port);
    }
    let more = tcp(at("10.66.77.2:5000"), at(SERVER), "S", 1, 0, b"");
    assert_eq!(world.send(more), Err(DropReason::ClientMappingLimit));
    assert!(live.iter().chain([again]).all(|connection| connection.state(&world).is_some()));
}

#[test]
fn a_closed_connection_of_the_same_client_makes_room_before_a_port_is_shared() {
    let mut world = World::with_ports(NatConfig::default(), 10_000..10_002);
    let closed = Connection::open(&mut world, "10.66.77.2:1100", SERVER);
    let live = Connection::open(&mut world, "10.66.77.3:1100", SERVER);
    closed.sends(&mut world, "R", 101, 0, b"").unwrap();
    let other = tcp(at("10.66.77.4:1100"), at(SERVER), "S", 1, 0, b"");
    assert_eq!(world.send(other), Err(DropReason::PortsExhausted), "another client's is left alone");
    let next = Connection::open(&mut world, "10.66.77.2:1101", SERVER);
    assert_eq!(next.external, closed.external);
    assert_eq!(closed.state(&world), None);
    live.receives(&mut world, "PA", 901, 101, b"data").unwrap();
}
