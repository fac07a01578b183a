//! What peers who mean well experience.

use super::*;

#[test]
fn packets_travel_both_ways_after_a_handshake() {
    let mut world = World::connected();
    world.bob_sends(b"hello Alice");
    world.alice_sends(b"hello Bob");
    world.deliver();
    assert_eq!(world.alice.inbox, [b"hello Alice"]);
    assert_eq!(world.bob.inbox, [b"hello Bob"]);
    assert_eq!((world.count(ALICE, 1), world.count(BOB, 2)), (1, 1));
    assert_eq!(world.bob.stats().endpoint, Some(ALICE));
    assert!(world.alice.stats().last_handshake.is_some() && world.bob.stats().last_handshake.is_some());
}
