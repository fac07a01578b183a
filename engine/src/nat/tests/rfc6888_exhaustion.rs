//! RFC 6888: Common Requirements for Carrier-Grade NATs: what one client may take, and what happens when there is no
//! more.

use super::*;

const SERVER: &str = "198.51.100.9:53";

fn open(world: &mut World, client: &str, port: u16) -> Result<Endpoint, DropReason> {
    let internal = Endpoint::new(address(client), port);
    world.send(udp(internal, at(SERVER), b"")).map(|bytes| source(&bytes))
}

#[test]
fn req_4_a_client_has_at_most_so_many_mappings() {
    let mut world = World::with(NatConfig { max_mappings_per_client: 10, ..NatConfig::default() });
    for port in 2_000..2_010 {
        open(&mut world, "10.66.77.2", port).unwrap();
    }
    assert_eq!(open(&mut world, "10.66.77.2", 2_010), Err(DropReason::ClientMappingLimit));
    assert!(open(&mut world, "10.66.77.2", 2_009).is_ok(), "those it has go on");
    assert!(open(&mut world, "10.66.77.3", 2_010).is_ok(), "others are not concerned");
    assert_eq!(world.nat.mappings_of(address("10.66.77.2")), 10);
    world.pass(302);
    assert_eq!(world.nat.mappings_of(address("10.66.77.2")), 0);
    assert!(open(&mut world, "10.66.77.2", 2_010).is_ok());
}

#[test]
fn req_4c_a_client_opens_at_most_so_many_mappings_a_second() {
    let mut world = World::with(NatConfig { max_new_mappings_per_second: 10, ..NatConfig::default() });
    let mut ports = 2_000..;
    let mut burst = |world: &mut World, client| {
        ports.by_ref().take(100).filter(|&port| open(world, client, port).is_ok()).count()
    };
    assert_eq!(burst(&mut world, "10.66.77.2"), 10);
    assert_eq!(burst(&mut world, "10.66.77.3"), 10, "each client has its own allowance");
    world.now = world.now + Duration::from_millis(300);
    assert_eq!(burst(&mut world, "10.66.77.2"), 3);
    world.now = world.now + Duration::from_secs(60);
    assert_eq!(burst(&mut world, "10.66.77.2"), 10, "which does not pile up");
}

#[test]
fn the_table_is_bounded() {
    let mut world = World::with(NatConfig { max_mappings: 20, ..NatConfig::default() });
    for client in 2..22 {
        open(&mut world, &format!("10.66.77.{client}"), 2_000).unwrap();
    }
    assert_eq!(open(&mut world, "10.66.77.99", 2_000), Err(DropReason::MappingsExhausted));
    assert!(open(&mut world, "10.66.77.2", 2_000).is_ok(), "live mappings are not evicted");
}

#[test]
fn a_shard_takes_its_part_of_the_bound() {
    let slice = ShardSlice { shard: 1, shards: 4 };
    let config = NatConfig { max_mappings: 20, ..NatConfig::default() };
    let mut nat = Nat::new(config, &[EXTERNAL], slice, [7; 32]);
    let ports: Vec<u16> = (10_000..10_100).collect();
    assert_eq!(nat.add_ports(Proto::Udp, EXTERNAL, &ports), 25, "those of the other shards are refused");
    let mut world = World { nat, now: Timestamp::from_secs(5) };
    for client in 2..7 {
        assert_eq!(open(&mut world, &format!("10.66.77.{client}"), 2_000).unwrap().port % 4, 1);
    }
    // 20 divided by 4 shards: that was all, whatever the protocol.
    assert_eq!(open(&mut world, "10.66.77.7", 2_000), Err(DropReason::MappingsExhausted));
    let ping = |client| icmp(8, Ipv4Addr::new(10, 66, 77, client), at(SERVER).address, 1);
    assert_eq!(world.send(ping(7)), Err(DropReason::MappingsExhausted));
    world.nat.remove_client(address("10.66.77.2"), world.now);
    assert_eq!(source(&world.send(ping(7)).unwrap()).port % 4, 1, "identifiers are divided, too");
}

#[test]
fn sessions_are_bounded_per_mapping_and_per_client() {
    let config =
        NatConfig { max_sessions_per_mapping: 5, max_mappings_per_client: 3, ..NatConfig::default() };
    let mut world = World::with(config);
    let mut tally = Vec::new();
    for port in 2_000..2_003 {
        let send = |server| {
            let internal = Endpoint::new(address("10.66.77.2"), port);
            world.send(udp(internal, Endpoint::new(address("192.0.2.1"), server), b""))
        };
        let results: Vec<_> = (1..=6).map(send).collect();
        tally.push(results.iter().filter(|result| result.is_ok()).count());
        assert_eq!(results[5], Err(DropReason::SessionLimit));
    }
    assert_eq!(tally, [5, 5, 2], "5 per mapping, and 4 times 3 in all");
}

#[test]
fn sessions_are_bounded_in_all() {
    let config = NatConfig { max_mappings: 3, max_mappings_per_client: 100, ..NatConfig::default() };
    let mut world = World::with(config);
    let mut talk = |client: &str, server: u16| {
        world.send(udp(at(client), Endpoint::new(address("192.0.2.1"), server), b"")).map(drop)
    };
    // One client alone stays far below its own limit of 4 times 100.
    for server in 0..12 {
        assert_eq!(talk("10.66.77.2:2000", server), Ok(()));
    }
    assert_eq!(talk("10.66.77.2:2000", 12), Err(DropReason::SessionLimit), "4 times 3");
    assert_eq!(talk("10.66.77.3:2000", 1), Err(DropReason::SessionLimit));
    assert_eq!(talk("10.66.77.2:2000", 11), Ok(()), "those that are there go on");
}

#[test]
fn req_8_a_released_udp_port_rests_two_minutes() {
    let mut world = World::with_ports(NatConfig::default(), 10_000..10_001);
    let external = open(&mut world, "10.66.77.2", 2_000).unwrap();
    world.pass(302);
    assert_eq!(world.nat.counts().udp_mappings, 0);
    assert_eq!(open(&mut world, "10.66.77.3", 2_000), Err(DropReason::PortsExhausted));
    assert!(world.nat.owns_port(Proto::Udp, EXTERNAL, external.port), "it is still ours");
    world.pass(117);
    assert_eq!(open(&mut world, "10.66.77.3", 2_000), Err(DropReason::PortsExhausted));
    world.pass(4);
    assert_eq!(open(&mut world, "10.66.77.3", 2_000), Ok(external));
}

#[test]
fn the_ports_of_a_removed_client_rest_for_every_protocol() {
    let mut world = World::with_ports(NatConfig::default(), 10_000..10_001);
    open(&mut world, "10.66.77.2", 2_000).unwrap();
    world.send(tcp(at("10.66.77.2:2000"), at(SERVER), "S", 1, 0, b"")).unwrap();
    assert!(world.nat.remove_client(address("10.66.77.2"), world.now).is_empty());
    assert_eq!(world.nat.counts(), NatCounts { resting_ports: 2, ..NatCounts::default() });
    let syn = tcp(at("10.66.77.3:2000"), at(SERVER), "S", 1, 0, b"");
    assert_eq!(world.send(syn.clone()), Err(DropReason::PortsExhausted));
    world.pass(121);
    assert!(world.send(syn).is_ok());
    assert!(open(&mut world, "10.66.77.3", 2_000).is_ok());
}

#[test]
fn a_released_tcp_port_is_free_at_once() {
    let mut world = World::with_ports(NatConfig::default(), 10_000..10_001);
    world.send(tcp(at("10.66.77.2:2000"), at(SERVER), "S", 1, 0, b"")).unwrap();
    world.pass(242);
    assert_eq!(world.nat.free_ports(Proto::Tcp, EXTERNAL, PortClass::Unprivileged), 1);
}

/// How many UDP ports are left to draw.
fn free(world: &World, class: PortClass) -> usize {
    world.nat.free_ports(Proto::Udp, EXTERNAL, class)
}

#[test]
fn the_shell_is_told_when_a_pool_runs_low() {
    let mut world = World::with_ports(NatConfig::default(), 10_000..10_226);
    for port in 2_000..2_002 {
        open(&mut world, "10.66.77.2", port).unwrap();
        assert_eq!(world.nat.next_port_demand(), None);
    }
    open(&mut world, "10.66.77.2", 2_002).unwrap();
    let class = PortClass::Unprivileged;
    let demand = PortDemand { protocol: Proto::Udp, address: EXTERNAL, class, in_advance: false };
    assert_eq!((world.nat.next_port_demand(), free(&world, class)), (Some(demand), 223));
    assert_eq!(world.nat.next_port_demand(), None, "once");
}

#[test]
fn the_shell_is_told_in_advance_when_a_pool_is_down_to_what_is_set_aside_of_it() {
    let mut world = World::new(); // with 2,000 ports, of which 250 are set aside
    let mut demands = Vec::new();
    let next_demand = |world: &mut World| {
        let demand = world.nat.next_port_demand()?;
        Some((free(world, demand.class), demand.in_advance))
    };
    for port in 2_000..4_000 {
        let opened = open(&mut world, "10.66.77.2", port);
        demands.extend(next_demand(&mut world));
        if opened.is_err() {
            break;
        }
    }
    assert_eq!((demands[0], demands[demands.len() - 2]), ((473, true), (250, true)));
    assert_eq!(demands.last(), Some(&(250, false)), "somebody gets none");
    demands.clear();
    for client in 3..=30 {
        open(&mut world, &format!("10.66.77.{client}"), 2_000).unwrap();
        demands.extend(next_demand(&mut world));
    }
    assert_eq!((demands[0], demands[25], demands[26]), ((249, true), (224, true), (223, false)));
}

#[test]
fn privileged_ports_are_asked_for_when_few_are_left() {
    let mut world = World::new();
    let ports: Vec<u16> = (600..616).collect();
    world.nat.add_ports(Proto::Udp, EXTERNAL, &ports);
    for port in 500..512 {
        assert!(open(&mut world, "10.66.77.2", port).unwrap().port < 1_024);
        assert_eq!(world.nat.next_port_demand(), None, "{port}");
    }
    open(&mut world, "10.66.77.2", 512).unwrap();
    let class = PortClass::Privileged;
    let demand = PortDemand { protocol: Proto::Udp, address: EXTERNAL, class, in_advance: false };
    assert_eq!((world.nat.next_port_demand(), free(&world, class)), (Some(demand), 3));
}

#[test]
fn idle_costs_nothing() {
    let mut world = World::new();
    assert_eq!(world.nat.next_expiry(), None);
    open(&mut world, "10.66.77.2", 2_000).unwrap();
    let due = world.nat.next_expiry().unwrap();
    assert!(due >= world.now + Duration::from_secs(300) && due <= world.now + Duration::from_secs(301));
    world.pass(301 + 121);
    assert_eq!(world.nat.next_expiry(), None, "and once everything is gone, there is no timer left");
}

#[test]
fn memory_returns_to_its_floor() {
    let config = NatConfig { max_new_mappings_per_second: 1_000_000, ..NatConfig::default() };
    let mut world = World::with_ports(config, 10_000..30_000);
    let empty = world.nat.table.capacity();
    let mut peak = 0;
    for round in 0..5 {
        for port in 10_000..20_000 {
            let internal = Endpoint::new(Ipv4Addr::new(10, 66, 77, 2 + round), port);
            world.send(tcp(internal, at(SERVER), "S", 1, 0, b"")).unwrap();
        }
        if round == 0 {
            peak = world.nat.table.capacity();
        }
        assert!(world.nat.table.capacity() <= peak, "churn does not grow the table");
        world.pass(242);
        assert_eq!(world.nat.counts(), NatCounts::default());
    }
    let floor = world.nat.table.capacity();
    assert!(floor <= empty + 20_000 && floor < peak / 5, "{empty} {floor} {peak}");
}

#[test]
fn expiry_does_a_bounded_amount_of_work_at_a_time() {
    let config = NatConfig { max_new_mappings_per_second: 1_000_000, ..NatConfig::default() };
    let mut world = World::with_ports(config, 10_000..22_000);
    for port in 10_000..20_000 {
        let internal = Endpoint::new(address("10.66.77.2"), port);
        world.send(tcp(internal, at(SERVER), "S", 1, 0, b"")).unwrap();
    }
    world.now = world.now + Duration::from_secs(300);
    let mut calls = 0;
    while world.nat.next_expiry().is_some_and(|due| due <= world.now) {
        let before = world.nat.counts().sessions;
        world.nat.expire(world.now);
        assert!(before - world.nat.counts().sessions <= 4_096);
        calls += 1;
    }
    assert_eq!((calls, world.nat.counts().sessions), (3, 0));
}

#[test]
fn a_listing_tells_who_has_an_external_port() {
    let mut nat = Nat::new(NatConfig::default(), &[EXTERNAL, SECOND_EXTERNAL], ShardSlice::WHOLE, [7; 32]);
    for external in [EXTERNAL, SECOND_EXTERNAL] {
        for protocol in [Proto::Tcp, Proto::Udp] {
            nat.add_ports(protocol, external, &[10_000]);
        }
    }
    let mut world = World { nat, now: Timestamp::from_secs(1_000) };
    // Whoever has no port of its own shares one, towards another destination.
    for n in 2..12 {
        let client = Endpoint::new(Ipv4Addr::new(10, 66, 77, n), 2_000);
        world.send(tcp(client, Endpoint::new(address("192.0.2.1"), n.into()), "S", 1, 0, b"")).unwrap();
        _ = world.send(udp(client, at(SERVER), b""));
    }
    let mut all: Vec<_> = world.nat.mappings(world.now).collect();
    assert_eq!(all.len(), 12, "ten of TCP, and one of UDP at each address");
    let mut found = Vec::new();
    for external in [EXTERNAL, SECOND_EXTERNAL] {
        let query = MappingQuery {
            external_address: Some(external),
            external_port: Some(10_000),
            ..MappingQuery::default()
        };
        let here: Vec<_> = world.nat.find_mappings(query, world.now).collect();
        assert!(here.len() > 2, "those who share it, and whose it is of UDP");
        assert!(here.iter().all(|mapping| mapping.external == Endpoint::new(external, 10_000)));
        found.extend(here);
    }
    let key = |mapping: &MappingView| (mapping.protocol, mapping.internal);
    found.sort_by_key(key);
    all.sort_by_key(key);
    assert_eq!(found, all);
    let anywhere = MappingQuery { external_port: Some(10_000), ..MappingQuery::default() };
    assert_eq!(world.nat.find_mappings(anywhere, world.now).count(), 12);
    let his = MappingQuery { client: Some(address("10.66.77.2")), ..anywhere };
    assert!(world.nat.find_mappings(his, world.now).all(|m| m.internal == at("10.66.77.2:2000")));
    let nobodys = MappingQuery { external_port: Some(10_001), ..anywhere };
    assert_eq!(world.nat.find_mappings(nobodys, world.now).count(), 0);
}

#[test]
fn a_listing_names_no_destinations() {
    let mut world = World::new();
    let external = open(&mut world, "10.66.77.2", 2_000).unwrap();
    world.pass(100);
    let listed: Vec<_> = world.nat.mappings(world.now).collect();
    let expected = MappingView {
        protocol: Proto::Udp,
        internal: at("10.66.77.2:2000"),
        external,
        age: Duration::from_secs(100),
        idle: Duration::from_secs(100),
        expires_in: Some(Duration::from_secs(200)),
        sessions: 1,
        state: MappingState::Active,
    };
    assert_eq!(listed, [expected]);
}
