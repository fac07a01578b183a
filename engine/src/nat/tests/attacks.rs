//! Attacks that must fail.

use super::*;

const CLIENT: &str = "10.66.77.2:5000";
const SERVER: &str = "198.51.100.9:443";

/// An established connection: the client's next sequence number is 101, the server's 901, windows are 1,000 bytes.
fn connect(world: &mut World, client: &str, server: &str) -> Endpoint {
    let (client, server) = (at(client), at(server));
    let external = source(&world.send(tcp(client, server, "S", 100, 0, b"")).unwrap());
    world.receive(tcp(server, external, "SA", 900, 101, b"")).unwrap();
    world.send(tcp(client, server, "A", 101, 901, b"")).unwrap();
    external
}

fn state(world: &World) -> MappingState {
    world.mapping(at(CLIENT)).unwrap().state
}

#[test]
fn a_reset_with_a_guessed_sequence_number_is_dropped() {
    let mut world = World::new();
    let external = connect(&mut world, CLIENT, SERVER);
    for guess in [0, 1, 900, 901u32.wrapping_sub(70_000), 901 + 70_000, 1 << 31, u32::MAX] {
        let reset = tcp(at(SERVER), external, "R", guess, 0, b"");
        assert_eq!(world.receive(reset), Err(DropReason::TcpOutOfState), "{guess}");
        let reset = tcp(at(SERVER), external, "RA", guess, 101, b"");
        assert_eq!(world.receive(reset), Err(DropReason::TcpOutOfState), "{guess}");
    }
    assert_eq!(state(&world), MappingState::Established);
}

#[test]
fn a_reset_inside_the_window_but_not_at_its_edge_is_left_to_the_client_to_judge() {
    let mut world = World::new();
    let external = connect(&mut world, CLIENT, SERVER);
    assert!(world.receive(tcp(at(SERVER), external, "R", 950, 0, b"")).is_ok());
    assert_eq!(state(&world), MappingState::Established, "RFC 5961: the client challenges it");
}

#[test]
fn the_window_is_scaled_if_both_ends_agreed_on_it() {
    const SCALE_7: [u8; 4] = [1, 3, 3, 7];
    for (server_options, in_window) in [(&SCALE_7[..], true), (&[], false)] {
        let mut world = World::new();
        let (client, server) = (at(CLIENT), at(SERVER));
        let syn = tcp_with_options(client, server, "S", 100, 0, &SCALE_7, b"");
        let external = source(&world.send(syn).unwrap());
        let syn_ack = tcp_with_options(server, external, "SA", 900, 101, server_options, b"");
        world.receive(syn_ack).unwrap();
        world.send(tcp(client, server, "A", 101, 901, b"")).unwrap();
        // The client offers 1,000 bytes, or 1,000 times 128.
        let reset = tcp(server, external, "R", 901 + 100_000, 0, b"");
        assert_eq!(world.receive(reset).is_ok(), in_window);
        let reset = tcp(server, external, "R", 901 + 128_000, 0, b"");
        assert_eq!(world.receive(reset), Err(DropReason::TcpOutOfState), "the first byte behind the window");
        assert_eq!(state(&world), MappingState::Established);
    }
}

#[test]
fn segments_outside_the_window_do_not_poison_the_sequence_check() {
    let mut world = World::new();
    let external = connect(&mut world, CLIENT, SERVER);
    let forged = 0x4000_0000;
    world.receive(tcp(at(SERVER), external, "PA", forged, 101, b"poison")).unwrap();
    world.receive(tcp(at(SERVER), external, "FA", forged, 101, b"")).unwrap();
    world.receive(tcp(at(SERVER), external, "SA", forged, 101, b"")).unwrap();
    world.receive(tcp(at(SERVER), external, "S", forged, 0, b"")).unwrap();
    for sequence in [forged, forged + 1, forged + 6, forged + 7] {
        let reset = tcp(at(SERVER), external, "R", sequence, 0, b"");
        assert_eq!(world.receive(reset), Err(DropReason::TcpOutOfState));
    }
    // Nor does an acknowledgment of what was never sent.
    world.receive(tcp(at(SERVER), external, "A", 901, 0x5000_0000, b"")).unwrap();
    world.receive(tcp(at(SERVER), external, "PA", 901, 101, b"real")).unwrap();
    assert!(world.receive(tcp(at(SERVER), external, "R", 905, 0, b"")).is_ok());
    assert_eq!(state(&world), MappingState::Closing);
}

#[test]
fn a_stranger_cannot_keep_a_connection_alive() {
    let mut world = World::new();
    let external = connect(&mut world, CLIENT, SERVER);
    world.send(tcp(at(CLIENT), at(SERVER), "R", 101, 0, b"")).unwrap();
    for _ in 0..23 {
        world.pass(10);
        _ = world.receive(tcp(at(SERVER), external, "PA", 0x4000_0000, 0x5000_0000, b"forged"));
        _ = world.receive(tcp(at(SERVER), external, "S", 0x4000_0000, 0, b""));
        _ = world.receive(tcp(at("198.51.100.9:1"), external, "S", 1, 0, b""));
        _ = world.receive(tcp(at("198.51.100.9:1"), external, "PA", 2, 0, b"hello?"));
    }
    world.pass(12);
    let left = world.mapping(at(CLIENT)).map(|mapping| mapping.sessions);
    assert_eq!(left, Some(1), "the call from another port of the server's is only opening");
    let call = |port| tcp(Endpoint::new(at(SERVER).address, port), external, "S", 1, 0, b"");
    assert_eq!(world.receive(call(2)), Err(DropReason::Filtered), "and opens no door for further ones");
    world.receive(call(1)).unwrap();
    world.pass(10);
    assert!(world.mapping(at(CLIENT)).is_none());
}

#[test]
fn frag_needed_with_a_guessed_sequence_number_is_dropped() {
    let mut world = World::new();
    let external = connect(&mut world, CLIENT, SERVER);
    let sent = world.send(tcp(at(CLIENT), at(SERVER), "PA", 101, 901, &[0; 1000])).unwrap();
    let router = address("192.0.2.254");
    let genuine = icmp_error(3, 4, router, EXTERNAL, 1280, &sent[..28]);
    assert!(world.receive(genuine.clone()).is_ok());
    for guess in [0, 100, 1101, 2000, 101 + (1 << 31), u32::MAX] {
        let quoted = tcp(external, at(SERVER), "PA", guess, 901, &[0; 1000]);
        let forged = icmp_error(3, 4, router, EXTERNAL, 1280, &quoted[..28]);
        assert_eq!(world.receive(forged), Err(DropReason::IcmpErrorUnmatched), "{guess}");
    }
    // Once the segment is acknowledged, it is not in flight any more.
    world.receive(tcp(at(SERVER), external, "A", 901, 1101, b"")).unwrap();
    assert_eq!(world.receive(genuine), Err(DropReason::IcmpErrorUnmatched));
}

#[test]
fn an_error_about_a_flow_that_does_not_live_is_dropped() {
    let mut world = World::new();
    let external = connect(&mut world, CLIENT, SERVER);
    // The client's mapping lives, and that number is in flight; but not towards that address.
    world.send(tcp(at(CLIENT), at(SERVER), "PA", 101, 901, &[0; 1000])).unwrap();
    let quoted = tcp(external, at("192.0.2.1:443"), "PA", 101, 901, b"");
    let forged = icmp_error(3, 4, address("192.0.2.254"), EXTERNAL, 68, &quoted);
    assert_eq!(world.receive(forged), Err(DropReason::IcmpErrorUnmatched));
}

#[test]
fn inner_addresses_from_outside_reach_nobody() {
    let mut world = World::new();
    let external = connect(&mut world, CLIENT, SERVER);
    let forged = tcp(at("10.66.77.3:443"), external, "S", 1, 0, b"");
    assert_eq!(world.receive(forged), Err(DropReason::Filtered));
    let forged = tcp(at(SERVER), at(CLIENT), "A", 901, 101, b"");
    assert_eq!(world.receive(forged), Err(DropReason::NoMapping), "an inner destination is no external one");
}

#[test]
fn one_client_cannot_exhaust_the_table() {
    let config = NatConfig { max_mappings_per_client: 50, ..NatConfig::default() };
    let mut world = World::with(config);
    for port in 0..=u16::MAX {
        _ = world.send(udp(Endpoint::new(address("10.66.77.66"), port), at(SERVER), b""));
    }
    assert_eq!(world.nat.mappings_of(address("10.66.77.66")), 50);
    connect(&mut world, CLIENT, SERVER);
}

#[test]
fn a_flood_of_syns_does_not_close_a_published_port() {
    let config = NatConfig { max_sessions_per_mapping: 64, ..NatConfig::default() };
    let mut world = World::with(config);
    let (published, inner) = (Endpoint::new(EXTERNAL, 443), at("10.66.77.2:443"));
    world.nat.publish(Proto::Tcp, published, inner, world.now).unwrap();
    let mut visitors = Vec::new();
    for flood in 0..5_000u32 {
        let nobody = Endpoint::new(Ipv4Addr::from_bits(0xc000_0200 + flood % 256), 1000 + flood as u16);
        _ = world.receive(tcp(nobody, published, "S", flood, 0, b""));
        if flood % 200 == 0 {
            let visitor = Endpoint::new(address("198.51.100.1"), 2000 + flood as u16);
            world.receive(tcp(visitor, published, "S", 1, 0, b"")).unwrap();
            world.send(tcp(inner, visitor, "SA", 1, 2, b"")).unwrap();
            world.receive(tcp(visitor, published, "A", 2, 2, b"")).unwrap();
            visitors.push(visitor);
        }
    }
    for visitor in visitors {
        assert!(world.receive(tcp(visitor, published, "PA", 2, 2, b"hi")).is_ok());
    }
    assert!(world.mapping(inner).unwrap().sessions <= 64);
}

#[test]
fn a_flood_of_syns_that_the_server_answers_does_not_close_a_published_port_either() {
    let full = NatConfig { max_sessions_per_mapping: 64, ..NatConfig::default() };
    let few = NatConfig { max_mappings_per_client: 16, ..NatConfig::default() }; // 64 sessions for the client in all
    for config in [full, few] {
        let mut world = World::with(config);
        let (published, inner) = (Endpoint::new(EXTERNAL, 443), at("10.66.77.2:443"));
        world.nat.publish(Proto::Tcp, published, inner, world.now).unwrap();
        let call = |world: &mut World, caller, n| {
            world.receive(tcp(caller, published, "S", n, 0, b"")).unwrap();
            world.send(tcp(inner, caller, "SA", 1, n + 1, b"")).unwrap();
        };
        let mut visitors = Vec::new();
        let mut nobodies = 0..;
        for visitor in 0..20 {
            let visitor = Endpoint::new(address("198.51.100.1"), 2_000 + visitor);
            call(&mut world, visitor, 1);
            // The round trip of a handshake: room for half of what there is room for.
            for n in nobodies.by_ref().take(32) {
                call(&mut world, Endpoint::new(Ipv4Addr::from_bits(0xc000_0200 + n % 256), 1_000), n);
            }
            world.receive(tcp(visitor, published, "PA", 2, 2, b"hi")).unwrap();
            visitors.push(visitor);
        }
        for visitor in visitors {
            assert!(world.receive(tcp(visitor, published, "PA", 4, 2, b"ho")).is_ok(), "{visitor}");
        }
        assert!(world.mapping(inner).unwrap().sessions <= 64);
    }
}

#[test]
fn a_visitor_that_calls_again_from_the_same_port_is_the_newest_in_a_flood() {
    let full = NatConfig { max_sessions_per_mapping: 64, ..NatConfig::default() };
    let few = NatConfig { max_mappings_per_client: 16, ..NatConfig::default() }; // 64 sessions for the client in all
    for (config, was_answered) in [(full.clone(), true), (full, false), (few.clone(), true), (few, false)] {
        let mut world = World::with(config);
        let (published, inner) = (Endpoint::new(EXTERNAL, 443), at("10.66.77.2:443"));
        let visitor = at("198.51.100.1:2000");
        world.nat.publish(Proto::Tcp, published, inner, world.now).unwrap();
        world.receive(tcp(visitor, published, "S", 1, 0, b"")).unwrap();
        if was_answered {
            world.send(tcp(inner, visitor, "SA", 1, 2, b"")).unwrap();
            world.receive(tcp(visitor, published, "FA", 2, 2, b"")).unwrap();
            world.send(tcp(inner, visitor, "FA", 2, 3, b"")).unwrap();
            world.receive(tcp(visitor, published, "A", 3, 3, b"")).unwrap();
        }
        let mut nobodies = (1..).map(|n| Endpoint::new(address("203.0.113.1"), n));
        for nobody in nobodies.by_ref().take(63) {
            world.receive(tcp(nobody, published, "S", 1, 0, b"")).unwrap();
        }
        world.receive(tcp(visitor, published, "S", 1_000, 0, b"")).unwrap();
        for nobody in nobodies.take(63) {
            world.receive(tcp(nobody, published, "S", 1, 0, b"")).unwrap();
        }
        let answer = world.send(tcp(inner, visitor, "SA", 5_000, 1_001, b"")).map(|packet| source(&packet));
        assert_eq!(answer, Ok(published), "answered before: {was_answered}");
        world.receive(tcp(visitor, published, "A", 1_001, 5_001, b"")).unwrap();
        world.receive(tcp(visitor, published, "PA", 1_001, 5_001, b"hi")).unwrap();
        assert!(world.nat.counts().sessions <= 64);
    }
}

#[test]
fn visitors_that_have_gone_do_not_close_a_published_port() {
    let config = NatConfig { max_sessions_per_mapping: 64, ..NatConfig::default() };
    let mut world = World::with(config);
    let (published, inner) = (Endpoint::new(EXTERNAL, 443), at("10.66.77.2:443"));
    world.nat.publish(Proto::Tcp, published, inner, world.now).unwrap();
    for port in 2_000..2_500 {
        let visitor = Endpoint::new(address("198.51.100.1"), port);
        world.receive(tcp(visitor, published, "S", 1, 0, b"")).unwrap();
        world.send(tcp(inner, visitor, "SA", 1, 2, b"")).unwrap();
        world.receive(tcp(visitor, published, "FA", 2, 2, b"")).unwrap();
        world.send(tcp(inner, visitor, "FA", 2, 3, b"")).unwrap();
        world.receive(tcp(visitor, published, "A", 3, 3, b"")).unwrap();
    }
}

#[test]
fn visitors_that_vanish_do_not_close_a_published_port_whose_server_gives_them_up() {
    let full = NatConfig { max_sessions_per_mapping: 64, ..NatConfig::default() };
    let few = NatConfig { max_mappings_per_client: 16, ..NatConfig::default() }; // 64 sessions for the client in all
    for config in [full, few] {
        let mut world = World::with(config);
        let (published, inner) = (Endpoint::new(EXTERNAL, 443), at("10.66.77.2:443"));
        world.nat.publish(Proto::Tcp, published, inner, world.now).unwrap();
        for port in 2_000..2_500 {
            let visitor = Endpoint::new(address("198.51.100.1"), port);
            let called = world.receive(tcp(visitor, published, "S", 1, 0, b"")).map(drop);
            assert_eq!(called, Ok(()), "{visitor}");
            world.send(tcp(inner, visitor, "SA", 1, 2, b"")).unwrap();
            world.receive(tcp(visitor, published, "A", 2, 2, b"")).unwrap();
            world.send(tcp(inner, visitor, "FA", 2, 2, b"")).unwrap();
        }
    }
}

#[test]
fn what_a_server_that_closes_first_still_sends_gets_through_a_flood() {
    for before in 0..64 {
        let config = NatConfig { max_sessions_per_mapping: 64, ..NatConfig::default() };
        let mut world = World::with(config);
        let (published, inner) = (Endpoint::new(EXTERNAL, 443), at("10.66.77.2:443"));
        world.nat.publish(Proto::Tcp, published, inner, world.now).unwrap();
        let mut nobodies = 0..;
        let mut flood = |world: &mut World, calls| {
            for n in nobodies.by_ref().take(calls) {
                let nobody = Endpoint::new(Ipv4Addr::from_bits(0xc000_0200 + n % 256), 1_000);
                world.receive(tcp(nobody, published, "S", n, 0, b"")).unwrap();
            }
        };
        let visitor = at("198.51.100.1:2000");
        world.receive(tcp(visitor, published, "S", 1, 0, b"")).unwrap();
        world.send(tcp(inner, visitor, "SA", 1, 2, b"")).unwrap();
        world.receive(tcp(visitor, published, "A", 2, 2, b"")).unwrap();
        flood(&mut world, 64 + before);
        world.send(tcp(inner, visitor, "FPA", 2, 2, b"all")).unwrap();
        // The round trip of a retransmission: room for half of what there is room for.
        flood(&mut world, 32);
        let again = world.send(tcp(inner, visitor, "FPA", 2, 2, b"all")).map(drop);
        assert_eq!(again, Ok(()), "{before}");
        assert!(world.receive(tcp(visitor, published, "A", 2, 6, b"")).is_ok(), "{before}");
    }
}

#[test]
fn visitors_that_the_server_has_not_given_up_make_no_room() {
    let config = NatConfig { max_sessions_per_mapping: 64, ..NatConfig::default() };
    let mut world = World::with(config);
    let (published, inner) = (Endpoint::new(EXTERNAL, 443), at("10.66.77.2:443"));
    world.nat.publish(Proto::Tcp, published, inner, world.now).unwrap();
    let visitors = (2_000..2_064).map(|port| Endpoint::new(address("198.51.100.1"), port));
    for visitor in visitors.clone() {
        world.receive(tcp(visitor, published, "S", 1, 0, b"")).unwrap();
        world.send(tcp(inner, visitor, "SA", 1, 2, b"")).unwrap();
        // It has no more to say, and wants to hear the answer.
        world.receive(tcp(visitor, published, "FA", 2, 2, b"")).unwrap();
    }
    let late = tcp(at("198.51.100.2:2000"), published, "S", 1, 0, b"");
    assert_eq!(world.receive(late), Err(DropReason::SessionLimit));
    for visitor in visitors {
        world.send(tcp(inner, visitor, "PA", 2, 3, b"answer")).unwrap();
    }
}

#[test]
fn forged_datagrams_that_the_server_answers_do_not_close_a_published_udp_port() {
    let full = NatConfig { max_sessions_per_mapping: 64, ..NatConfig::default() };
    let few = NatConfig { max_mappings_per_client: 16, ..NatConfig::default() }; // 64 sessions for the client in all
    let all = NatConfig { max_mappings: 16, ..NatConfig::default() }; // and for the shard
    for config in [full, few, all] {
        let mut world = World::with(config);
        let (published, inner) = (Endpoint::new(EXTERNAL, 443), at("10.66.77.2:443"));
        world.nat.publish(Proto::Udp, published, inner, world.now).unwrap();
        let own = source(&world.send(udp(at("10.66.77.2:5000"), at(SERVER), b"")).unwrap());
        let visitor = at("198.51.100.1:2000");
        for n in 0..5_000u32 {
            let nobody = Endpoint::new(Ipv4Addr::from_bits(0xc000_0200 + n % 256), 1_000 + n as u16);
            for sender in [nobody, visitor] {
                world.receive(udp(sender, published, b"question")).unwrap();
                let answer = world.send(udp(inner, sender, b"answer")).map(|answer| source(&answer));
                assert_eq!(answer, Ok(published), "{n}: {sender}");
            }
        }
        assert!(world.nat.counts().sessions <= 65);
        assert!(world.receive(udp(at(SERVER), own, b"")).is_ok(), "what the client has opened is not ended");
        for n in 0..10 {
            let query = udp(at("10.66.77.2:5001"), Endpoint::new(at(SERVER).address, n), b"");
            assert_eq!(world.send(query).map(drop), Ok(()), "nor is the client kept in");
        }
    }
}

#[test]
fn sessions_of_a_drawn_udp_port_make_no_room_for_they_are_its_filter() {
    let config = NatConfig { max_sessions_per_mapping: 64, ..NatConfig::default() };
    let mut world = World::with(config);
    let client = at(CLIENT);
    let servers = (1..=64).map(|n| Endpoint::new(Ipv4Addr::new(192, 0, 2, n), 53));
    let mut external = Endpoint::new(EXTERNAL, 0);
    for server in servers.clone() {
        external = source(&world.send(udp(client, server, b"")).unwrap());
    }
    assert_eq!(world.send(udp(client, at(SERVER), b"")), Err(DropReason::SessionLimit));
    for server in servers {
        assert!(world.receive(udp(server, external, b"")).is_ok(), "{server}");
    }
}

#[test]
fn the_hashes_are_keyed_so_that_nobody_can_choose_endpoints_that_collide() {
    use std::hash::BuildHasher;
    let bucket = |seed: u8| {
        let nat = Nat::new(NatConfig::default(), &[EXTERNAL], ShardSlice::WHOLE, [seed; 32]);
        move |endpoint: &u64| nat.table.hasher.hash_one(endpoint) % 256
    };
    // What somebody found to collide on a gateway of his own ...
    let his = bucket(1);
    let colliding: Vec<u64> = (0..100_000).filter(|endpoint| his(endpoint) == 0).collect();
    assert!(colliding.len() > 300);
    // ... is spread over the buckets of every other one.
    let used: std::collections::HashSet<u64> = colliding.iter().map(bucket(2)).collect();
    assert!(used.len() > 128, "{} buckets of 256", used.len());
}

#[test]
fn no_bytes_whatsoever_make_the_nat_panic() {
    use proptest::prelude::*;
    let mut world = World::new();
    let external = connect(&mut world, CLIENT, SERVER);
    let world = std::cell::RefCell::new(world);
    let bytes = proptest::collection::vec(any::<u8>(), 8..80);
    proptest!(ProptestConfig::with_cases(4096), |(protocol in prop::sample::select(vec![1u8, 6, 17, 47]),
        mut payload in bytes, kind in 0u8..16, inward: bool)| {
        if protocol == 1 {
            payload[0] = kind;
            if let Some(quoted) = payload.get_mut(8..28) {
                // Let many get beyond the first check.
                quoted[0] = 0x45 + (quoted[0] & 1);
                quoted[12..16].copy_from_slice(&EXTERNAL.octets());
            }
            payload[2..4].fill(0);
            let sum = crate::wire::checksum::checksum(&payload);
            payload[2..4].copy_from_slice(&sum.to_be_bytes());
        }
        let (from, to) = if inward { (at(SERVER).address, external.address) } else { (at(CLIENT).address, at(SERVER).address) };
        let mut bytes = ipv4(protocol, from, to, &payload);
        let mut world = world.borrow_mut();
        let now = world.now;
        for cut in 0..bytes.len() {
            world.nat.prefetch_inbound(&bytes[..cut]);
            world.nat.prefetch_outbound(&bytes[..cut]);
        }
        if let Ok(mut packet) = Ipv4Packet::parse(&mut bytes, 0, Offload::NONE) {
            if inward {
                _ = world.nat.translate_inbound(&mut packet, now);
            } else {
                _ = world.nat.translate_outbound(&mut packet, now);
            }
            _ = external_port(&packet);
        }
    });
}

#[test]
fn a_guessed_segment_with_an_old_acknowledgment_does_not_prepare_a_reset() {
    let mut world = World::new();
    let external = connect(&mut world, CLIENT, SERVER);
    // In the window by luck, and acknowledges what nobody could acknowledge so late (RFC 5961 §5).
    for late in [70_000, 1_000_000_000] {
        let guess = tcp(at(SERVER), external, "PA", 901 + 500, 101u32.wrapping_sub(late), b"x");
        assert!(world.receive(guess).is_ok(), "the client judges it");
        assert!(
            world.receive(tcp(at(SERVER), external, "R", 901 + 501, 0, b"")).is_ok(),
            "and challenges that"
        );
        assert_eq!(state(&world), MappingState::Established, "{late}");
    }
    world.pass(2 * 3600);
    assert_eq!(state(&world), MappingState::Established, "it did not even look alive or dying");
}

#[test]
fn a_guessed_segment_that_acknowledges_nothing_or_has_a_syn_does_not_prepare_a_reset() {
    // The client's TCP drops what has no ACK, and challenges a SYN (RFC 9293 §3.10.7.4, RFC 5961 §4).
    for flags in ["", "P", "F", "FP", "S", "SF", "SA"] {
        let mut world = World::new();
        let external = connect(&mut world, CLIENT, SERVER);
        world.pass(7_000);
        // In the window by luck.
        let guess = tcp(at(SERVER), external, flags, 901 + 500, 101, b"x");
        assert!(world.receive(guess).is_ok(), "{flags}: the client judges it");
        for next in 1401..=1404 {
            let reset = tcp(at(SERVER), external, "R", next, 0, b"");
            assert!(world.receive(reset).is_ok(), "{flags}, {next}: and challenges that");
        }
        assert_eq!(state(&world), MappingState::Established, "{flags}");
        world.send(tcp(at(CLIENT), at(SERVER), "FA", 101, 901, b"")).unwrap();
        assert_eq!(state(&world), MappingState::Established, "{flags}: the server has not finished");

        let mut world = World::new();
        let external = connect(&mut world, CLIENT, SERVER);
        world.pass(7_000);
        for (sequence, data) in [(901 + 500, b"x".as_slice()), (900, b"")] {
            _ = world.receive(tcp(at(SERVER), external, flags, sequence, 101, data));
        }
        world.pass(442);
        assert!(world.mapping(at(CLIENT)).is_none(), "{flags}: it did not look alive");
    }
}

#[test]
fn a_forged_call_does_not_take_the_place_of_the_server_that_the_client_calls() {
    for forged in [5, 5 + 0x5555_5555, 5 + 0xaaaa_aaaa] {
        for (flags, refuses) in [("S", false), ("SF", false), ("S", true)] {
            let mut world = World::new();
            let (client, server) = (at(CLIENT), at(SERVER));
            let external = source(&world.send(tcp(client, server, "S", 100, 0, b"")).unwrap());
            // As if both had called, and one had thought better of it: but a stranger chooses the numbers.
            world.receive(tcp(server, external, flags, forged, 0, b"")).unwrap();
            for next in [forged, forged + 1, forged + 2] {
                world.receive(tcp(server, external, "R", next, 0, b"")).unwrap();
            }
            if refuses {
                world.receive(tcp(server, external, "RA", 0, 101, b"")).unwrap();
                assert_eq!(state(&world), MappingState::Closing, "{forged}");
                continue;
            }
            world.receive(tcp(server, external, "SA", 900, 101, b"")).unwrap();
            world.send(tcp(client, server, "A", 101, 901, b"")).unwrap();
            assert_eq!(state(&world), MappingState::Established, "{forged}");
            world.send(tcp(client, server, "FA", 101, 901, b"")).unwrap();
            assert_eq!(state(&world), MappingState::Established, "{forged}: the server has not finished");
            world.receive(tcp(server, external, "R", 901, 0, b"")).unwrap();
            assert_eq!(state(&world), MappingState::Closing, "{forged}");
        }
    }
}

#[test]
fn two_clients_that_take_all_they_can_get_leave_ports_for_a_third() {
    for protocol in [Proto::Udp, Proto::Tcp] {
        let mut world = World::new(); // 2,000 ports of each protocol, and no more to come
        let open = |world: &mut World, client: u8, n: u16| {
            let internal = Endpoint::new(Ipv4Addr::new(10, 66, 77, client), 2_000 + n);
            match protocol {
                Proto::Udp => world.send(udp(internal, at(SERVER), b"")),
                _ => world.send(tcp(internal, at(SERVER), "S", 1, 0, b"")),
            }
        };
        let mut refused = 0;
        for n in 0..1_500 {
            for client in [2, 3] {
                match open(&mut world, client, n) {
                    Ok(_) => {}
                    Err(DropReason::ClientShare) => refused += 1,
                    Err(reason) => panic!("{reason:?}"),
                }
            }
            world.now = world.now + Duration::from_millis(1);
        }
        assert_eq!(refused, 3_000 - 1_750, "{protocol:?}: an eighth of the ports is left");
        assert_eq!(world.nat.free_ports(protocol, EXTERNAL, PortClass::Unprivileged), 250);
        for n in 0..250 {
            assert!(open(&mut world, 4, n).is_ok(), "{protocol:?}: the third client's {n}th");
        }
        assert_eq!(
            open(&mut world, 4, 250),
            Err(DropReason::PortsExhausted),
            "{protocol:?}: there are no more"
        );
    }
}

#[test]
fn a_client_that_has_its_share_of_tcp_ports_shares_ports_towards_other_destinations() {
    let mut world = World::new();
    for n in 0..1_900u16 {
        let server = Endpoint::new(Ipv4Addr::new(198, 51, 100, 9), 1_000 + n);
        let internal = Endpoint::new(Ipv4Addr::new(10, 66, 77, 2), 2_000 + n);
        assert!(world.send(tcp(internal, server, "S", 1, 0, b"")).is_ok(), "{n}");
    }
    assert_eq!(world.nat.free_ports(Proto::Tcp, EXTERNAL, PortClass::Unprivileged), 250, "for others");
}

#[test]
fn a_client_that_has_its_share_of_tcp_ports_shares_them_also_while_more_are_asked_for() {
    let mut world = World::new();
    world.nat.expect_ports(Proto::Tcp, EXTERNAL, PortOutlook::Unsure);
    for n in 0..1_900u16 {
        let server = Endpoint::new(Ipv4Addr::new(198, 51, 100, 9), 1_000 + n);
        let internal = Endpoint::new(Ipv4Addr::new(10, 66, 77, 2), 2_000 + n);
        while world.nat.next_port_demand().is_some() {}
        assert!(world.send(tcp(internal, server, "S", 1, 0, b"")).is_ok(), "{n}");
    }
    assert_eq!(world.nat.free_ports(Proto::Tcp, EXTERNAL, PortClass::Unprivileged), 250, "for others");
    assert!(world.nat.next_port_demand().is_some());
}

/// One of four shards, with room for 2,048 mappings and 8,192 sessions, and 2,500 UDP ports.
fn shard() -> World {
    let config =
        NatConfig { max_mappings: 8_192, max_new_mappings_per_second: 1_000_000, ..NatConfig::default() };
    let slice = ShardSlice { shard: 1, shards: 4 };
    let mut nat = Nat::new(config, &[EXTERNAL], slice, [7; 32]);
    let ports: Vec<u16> = (10_000..20_000).collect();
    assert_eq!(nat.add_ports(Proto::Udp, EXTERNAL, &ports), 2_500);
    World { nat, now: Timestamp::from_secs(1_000) }
}

/// How many of the packets of a client got through, and what the last one met.
fn insist(
    world: &mut World,
    packets: impl Iterator<Item = Vec<u8>>,
) -> (usize, Option<Result<(), DropReason>>) {
    packets.fold((0, None), |(passed, _), packet| {
        let sent = world.send(packet).map(drop);
        (passed + usize::from(sent.is_ok()), Some(sent))
    })
}

#[test]
fn one_client_leaves_sessions_of_its_shard_for_others() {
    let mut world = shard();
    let mut talk = |client: u8, sessions: u16| {
        let packets = (0..sessions).map(|n| {
            let internal = Endpoint::new(Ipv4Addr::new(10, 66, 77, client), 2_000 + n / 4_000);
            udp(internal, Endpoint::new(at(SERVER).address, n), b"")
        });
        insist(&mut world, packets)
    };
    assert_eq!(talk(2, 10_000), (7_168, Some(Err(DropReason::ClientShare))));
    assert_eq!(talk(3, 1_024), (1_024, Some(Ok(()))));
    assert_eq!(talk(4, 1), (0, Some(Err(DropReason::SessionLimit))), "there are no more");
}

#[test]
fn one_client_leaves_mappings_of_its_shard_for_others() {
    let mut world = shard();
    let mut talk = |client: u8, mappings: u16| {
        let packets = (0..mappings)
            .map(|n| udp(Endpoint::new(Ipv4Addr::new(10, 66, 77, client), 2_000 + n), at(SERVER), b""));
        insist(&mut world, packets)
    };
    assert_eq!(talk(2, 3_000), (1_792, Some(Err(DropReason::ClientShare))));
    assert_eq!(talk(3, 256), (256, Some(Ok(()))));
    assert_eq!(talk(4, 1), (0, Some(Err(DropReason::MappingsExhausted))), "there are no more");
}

#[test]
fn one_client_leaves_icmp_identifiers_of_its_shard_for_others() {
    let mut world = shard();
    let config = NatConfig { max_new_mappings_per_second: 1_000_000, ..NatConfig::default() };
    world.nat.set_config(config, world.now);
    let mut ping = |client: u8, count: u16| {
        let packets = (0..count).map(|n| icmp(8, Ipv4Addr::new(10, 66, 77, client), at(SERVER).address, n));
        insist(&mut world, packets)
    };
    assert_eq!(ping(2, 20_000), (14_336, Some(Err(DropReason::ClientShare))), "of 16,384");
    assert_eq!(ping(3, 2_048), (2_048, Some(Ok(()))));
}
