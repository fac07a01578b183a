//! Datagrams in fragments, both ways, and what is cut because it is too big (RFC 791, RFC 4787 REQ-13 and REQ-14).

use std::time::Duration;

use tidegate_engine::drop_reason::DropReason;
use tidegate_engine::nat::Proto;
use tidegate_engine::traffic::Direction;

use super::packets::*;
use super::world::*;

fn big(identification: u16) -> Ip {
    let packet = Ip::udp(endpoint(client_address(0), 5_000), endpoint(SERVER, 9), &payload(8_192));
    packet.with(|ip| ip.identification = identification)
}

/// An order in which no fragment follows the one before it.
fn shuffled(mut fragments: Vec<Ip>) -> Vec<Ip> {
    fragments.reverse();
    let middle = fragments.len() / 2;
    fragments.swap(0, middle);
    fragments
}

#[test]
fn eight_kilobytes_of_udp_travel_in_fragments_out_of_order_both_ways() {
    for shards in [1, 2] {
        let mut world = World::with_shards(shards).connected();
        for client in 0..3 {
            let here = endpoint(client_address(client), 5_000);
            let sent = Ip::udp(here, endpoint(SERVER, 9), &payload(8_192));
            for fragment in shuffled(sent.fragments(TUNNEL_MTU)) {
                world.send(client, &fragment);
            }
            let outside = world.take_outside();
            assert_eq!(outside.len(), 8_200_usize.div_ceil(1480));
            assert!(outside.is_sorted_by_key(Ip::offset), "in order (REQ-13)");
            let arrived = reassemble(&outside);
            assert_eq!((arrived.source, arrived.to(), arrived.data()), (EXTERNAL, sent.to(), sent.data()));

            let answer = Ip::udp(endpoint(SERVER, 9), arrived.from(), &payload(8_000));
            for fragment in shuffled(answer.fragments(EXTERNAL_MTU)) {
                world.arrive(&fragment);
            }
            let inside = world.take(client);
            assert!(inside.iter().all(|fragment| fragment.len() <= TUNNEL_MTU));
            let arrived = reassemble(&inside);
            assert_eq!((arrived.from(), arrived.to(), arrived.data()), (answer.from(), here, answer.data()));
        }
        assert!(world.drops().is_empty(), "{:?}", world.drops());
    }
}

#[test]
fn fragments_to_the_host_and_to_other_clients_arrive() {
    let mut world = World::with_shards(2).connected();
    let here = endpoint(client_address(0), 5_000);
    for fragment in shuffled(Ip::udp(here, endpoint(GATEWAY, 53), &payload(4_000)).fragments(TUNNEL_MTU)) {
        world.send(0, &fragment);
    }
    assert_eq!(world.host.len(), 1);
    assert_eq!(world.host[0].data(), payload(4_000));
    for client in [1, 2] {
        let there = endpoint(client_address(client), 9);
        for fragment in shuffled(Ip::udp(here, there, &payload(4_000)).fragments(TUNNEL_MTU)) {
            world.send(0, &fragment);
        }
        let arrived = reassemble(&world.take(client));
        assert_eq!((arrived.from(), arrived.to(), arrived.data()), (here, there, &payload(4_000)[..]));
    }
    let answer = Ip::udp(endpoint(GATEWAY, 53), here, &payload(4_000));
    for fragment in answer.fragments(TUNNEL_MTU) {
        world.send_from_host(&fragment);
    }
    assert_eq!(reassemble(&world.take(0)).data(), answer.data());
    assert!(world.drops().is_empty(), "{:?}", world.drops());
}

#[test]
fn a_datagram_in_fragments_counts_as_one() {
    let mut world = World::new().connected();
    let before = world.status(0).traffic;
    big(7).fragments(TUNNEL_MTU).iter().for_each(|fragment| world.send(0, fragment));
    let after = world.status(0).traffic;
    assert_eq!(after.packets(Direction::FromPeers) - before.packets(Direction::FromPeers), 1);
    assert_eq!(after.bytes(Direction::FromPeers) - before.bytes(Direction::FromPeers), 8_220);
}

#[test]
fn without_df_what_is_too_big_is_cut_in_both_directions() {
    let mut world = World::of(Plan { external_mtu: 1300, ..Plan::default() }).connected();
    let sent = Ip::udp(endpoint(client_address(0), 5_000), endpoint(SERVER, 9), &payload(1_392));
    world.send(0, &sent);
    let first = reassemble(&world.take_outside());
    assert_eq!(first.data(), sent.data());
    world.send(0, &sent);
    let second = reassemble(&world.take_outside());
    assert_ne!(first.identification, second.identification, "RFC 6864 §4.2: unique");

    let mut world = World::new().connected();
    world.send(0, &sent);
    let external = world.take_one_outside().from();
    let answer = Ip::udp(endpoint(SERVER, 9), external, &payload(1_472));
    world.arrive(&answer);
    let inside = world.take(0);
    assert_eq!(inside.len(), 2);
    assert_eq!(reassemble(&inside).data(), answer.data());
}

#[test]
fn df_on_fragments_does_not_condemn_the_datagram() {
    let mut world = World::new().connected();
    let sent = big(7).dont_fragment();
    for fragment in sent.fragments(TUNNEL_MTU) {
        assert_ne!(fragment.fragment & DF, 0);
        world.send(0, &fragment);
    }
    assert_eq!(reassemble(&world.take_outside()).data(), sent.data());
}

#[test]
fn fragments_that_overlap_are_refused_with_their_datagram() {
    let mut world = World::new().connected();
    let mut fragments = big(7).fragments(TUNNEL_MTU);
    world.send(0, &fragments[0]);
    fragments[1].fragment -= 1;
    world.dies(DropReason::BadFragment, |world| world.send(0, &fragments[1]));
    for fragment in &fragments[2..] {
        world.dies(DropReason::BadFragment, |world| world.send(0, fragment));
    }
    world.pass(Duration::from_secs(16));
    assert_eq!(world.drops()["bad_fragment"], fragments.len() as u64, "and so is what was kept");
    assert!(world.take(0).is_empty() && world.outside.is_empty());
}

#[test]
fn a_client_whose_fragments_went_missing_is_told_so() {
    for shards in [1, 2] {
        let mut world = World::with_shards(shards).connected();
        for client in [0, 1] {
            let here = endpoint(client_address(client), 5_000);
            let fragments = Ip::udp(here, endpoint(SERVER, 9), &payload(8_192)).fragments(TUNNEL_MTU);
            fragments[..3].iter().for_each(|fragment| world.send(client, fragment));
            world.pass(Duration::from_secs(14));
            assert!(world.take(client).is_empty());
            world.pass(Duration::from_secs(2));
            let error = world.take_one(client);
            assert_eq!((error.source, error.icmp()), (GATEWAY, (11, 1)));
            assert_eq!((error.quoted().from(), error.quoted().fragment), (here, MF));
            // Without the first fragment nobody knows whom to tell (RFC 792).
            fragments[1..].iter().for_each(|fragment| world.send(client, fragment));
            world.pass(Duration::from_secs(16));
            assert!(world.take(client).is_empty());
        }
        assert_eq!(world.drops(), [("fragment_timeout", 2 * (3 + 5))].into());
    }
}

#[test]
fn the_internet_is_told_of_missing_fragments_only_if_they_were_for_a_mapping() {
    let mut world = World::new().connected();
    world.send(0, &big(7).with(|ip| ip.body.truncate(8)).with(|ip| put(&mut ip.body, 4, 8)).summed());
    let external = world.take_one_outside().from();
    let first = |from, to| Ip::udp(from, to, &payload(4_000)).fragments(EXTERNAL_MTU).remove(0);
    world.arrive(&first(endpoint(SERVER, 9), external));
    world.pass(Duration::from_secs(16));
    let error = world.take_one_outside();
    assert_eq!((error.source, error.destination, error.icmp()), (EXTERNAL, SERVER, (11, 1)));
    assert_eq!((error.quoted().from(), error.quoted().to()), (endpoint(SERVER, 9), external));

    let unmapped = if external.port() == 40_000 { 40_001 } else { 40_000 };
    for (from, port) in [(endpoint(SERVER, 9), unmapped), (endpoint(NEIGHBOUR, 9), external.port())] {
        world.arrive(&first(from, endpoint(EXTERNAL, port)));
        world.pass(Duration::from_secs(16));
        assert!(world.take_outside().is_empty(), "a scanner learns nothing from {from}");
    }
    // A published port is no secret.
    world.publish(Proto::Udp, 45_000, endpoint(client_address(0), 53)).unwrap();
    world.arrive(&first(endpoint(NEIGHBOUR, 9), endpoint(EXTERNAL, 45_000)));
    world.pass(Duration::from_secs(16));
    assert_eq!(world.take_one_outside().destination, NEIGHBOUR);
}

#[test]
fn a_flood_of_fragments_stops_nobody_elses_fragments() {
    let mut world = World::new().connected();
    world.send(0, &big(7).with(|ip| ip.body.truncate(8)).with(|ip| put(&mut ip.body, 4, 8)).summed());
    let external = world.take_one_outside().from();
    for identification in 0..2_000 {
        let flood = Ip::udp(endpoint(NEIGHBOUR, 1), endpoint(EXTERNAL, 40_000), &payload(4_000));
        let flood = flood.with(|ip| ip.identification = identification).fragments(EXTERNAL_MTU);
        world.arrive(&flood[1]);
        world.send(1, &big(identification).with(|ip| ip.source = client_address(1)).fragments(TUNNEL_MTU)[2]);
    }
    let answer = Ip::udp(endpoint(SERVER, 9), external, &payload(8_000));
    shuffled(answer.fragments(EXTERNAL_MTU)).iter().for_each(|fragment| world.arrive(fragment));
    assert_eq!(reassemble(&world.take(0)).data(), answer.data());
    big(9).fragments(TUNNEL_MTU).iter().for_each(|fragment| world.send(0, fragment));
    assert_eq!(reassemble(&world.take_outside()).data(), big(9).data());
    world.pass(Duration::from_secs(16));
    let drops = world.drops();
    assert_eq!(drops["fragment_limit"] + drops["fragment_timeout"], 4_000, "{drops:?}");
}
