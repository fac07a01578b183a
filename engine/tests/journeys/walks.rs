//! From a client to the gateway, to the internet, to another client, and back.

use tidegate_engine::drop_reason::DropReason;

use super::packets::*;
use super::world::*;

#[test]
fn the_first_packet_makes_a_handshake_and_is_answered_by_the_gateway() {
    let mut world = World::new();
    world.ping(0, GATEWAY);
    let reply = world.take_one(0);
    assert_eq!((reply.source, reply.destination, reply.icmp()), (GATEWAY, client_address(0), (0, 0)));
    assert_eq!(reply.data(), b"are you there?");
    assert_eq!(world.host.len(), 1);
    assert!(world.outside.is_empty() && world.mappings() == 0 && world.drops().is_empty());
}

#[test]
fn a_ping_to_the_internet_is_answered() {
    let mut world = World::new();
    world.ping(0, SERVER);
    let request = world.take_one_outside();
    assert_eq!((request.source, request.destination, request.ttl), (EXTERNAL, SERVER, 63));
    let reply = world.take_one(0);
    assert_eq!((reply.source, reply.destination, reply.identifier()), (SERVER, client_address(0), 0x7a7a));
    assert_eq!((reply.ttl, reply.data()), (63, &b"are you there?"[..]));
    assert!(world.drops().is_empty(), "{:?}", world.drops());
    let _ = DropReason::ALL;
}
