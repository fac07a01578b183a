//! What happens, or stops happening, with time. Each test takes microseconds.

use super::super::timers::*;
use super::*;

const SECOND: Duration = Duration::from_secs(1);

/// Alice and Bob send as they are told every second for 400 seconds: three renewals.
fn talk(alice: bool, bob: bool) -> World {
    let mut world = World::connected();
    for _ in 0..400 {
        world.pass(SECOND);
        if alice {
            world.alice_sends(b"tick");
        }
        if bob {
            world.bob_sends(b"tock");
        }
        world.deliver();
    }
    let expected = |talks| if talks { 400 } else { 0 };
    assert_eq!((world.bob.inbox.len(), world.alice.inbox.len()), (expected(alice), expected(bob)));
    assert!(world.alice.dropped.is_empty() && world.bob.dropped.is_empty());
    world
}

#[test]
fn a_session_is_renewed_every_two_minutes_by_its_initiator_without_loss() {
    for (alice, bob) in [(true, true), (true, false), (false, true)] {
        let world = talk(alice, bob);
        assert_eq!(world.count(ALICE, 1), 1 + 3, "alice {alice}, bob {bob}");
        assert_eq!(world.count(BOB, 1), 0, "the responder leaves it to the initiator");
        assert!(world.alice.tunnel.indices.len() <= 3);
    }
}

#[test]
fn packets_under_the_old_session_still_arrive_after_a_renewal() {
    let mut world = World::connected();
    world.pass(REKEY_AFTER_TIME);
    world.alice_sends(b"the last of the old session");
    let late = world.wire.pop_front().unwrap();
    world.poll();
    world.deliver();
    world.alice_sends(b"the first of the new one");
    world.deliver();
    world.deliver_one(late);
    assert_eq!(world.bob.inbox, [&b"the first of the new one"[..], &b"the last of the old session"[..]]);
}

#[test]
fn an_initiator_that_only_receives_renews_before_the_session_ends() {
    let mut world = World::connected();
    // Alice is not polled, so that her keepalives do not renew it earlier.
    world.now = world.now + REKEY_AFTER_TIME_RECEIVING;
    world.bob_sends(b"still here?");
    let data = world.wire.pop_front().unwrap();
    let answers = world.alice.receive(data, world.now);
    assert_eq!(answers[0].bytes[0], 1, "an initiation");
}

#[test]
fn what_is_idle_comes_to_rest() {
    let mut world = World::connected();
    world.pass(SECOND);
    world.bob_sends(b"one last word");
    world.deliver();
    world.pass(Duration::from_secs(3600));
    for end in [&world.alice, &world.bob] {
        assert_eq!(end.tunnel.next_wakeup(), None);
        assert_eq!(end.tunnel.indices.len(), 0, "sessions are gone, and their indices with them");
        assert!(end.dropped.is_empty());
    }
    assert_eq!((world.count(ALICE, 1), world.count(BOB, 1)), (1, 0), "nobody called again");
}

#[test]
fn a_session_neither_seals_nor_opens_when_it_is_over() {
    let mut world = World::connected();
    world.alice_sends(b"delayed");
    world.now = world.now + REJECT_AFTER_TIME;
    world.deliver();
    assert_eq!(world.bob.dropped, [DropReason::UnknownSession]);
    assert!(world.alice.tunnel.sealer(world.alice.peer, world.now).is_none());
    world.alice_sends(b"anew");
    world.deliver();
    assert_eq!(world.bob.inbox, [b"anew"]);
}

#[test]
fn whoever_has_nothing_to_say_answers_data_with_one_keepalive() {
    let mut world = World::connected();
    world.pass(Duration::from_secs(9));
    assert_eq!(world.alice.keepalives, 0);
    world.pass(Duration::from_secs(60));
    assert_eq!((world.alice.keepalives, world.bob.keepalives), (1, 0));
}

#[test]
fn whoever_answers_sends_no_keepalive() {
    let mut world = World::connected();
    world.bob_sends(b"yes?");
    world.deliver();
    world.pass(Duration::from_secs(60));
    assert_eq!((world.alice.keepalives, world.bob.keepalives), (0, 1));
}

#[test]
fn lost_handshake_messages_are_sent_again() {
    for lost in [1, 2] {
        let mut world = World::new();
        world.alice_sends(b"hello");
        while let Some(datagram) = world.wire.pop_front() {
            if datagram.bytes[0] != lost {
                world.deliver_one(datagram);
            }
        }
        assert!(world.bob.inbox.is_empty());
        world.pass(REKEY_TIMEOUT + MAX_JITTER);
        assert_eq!(world.bob.inbox, [b"hello"]);
        assert_eq!(world.count(ALICE, 1), 2);
    }
}

#[test]
fn a_handshake_that_nobody_answers_is_given_up_after_ninety_seconds() {
    let mut world = World::new();
    world.bob.address = EVE; // Nobody at Bob's.
    world.alice_sends(b"hello?");
    world.pass(Duration::from_secs(300));
    let initiations = world.count(ALICE, 1);
    assert!((16..=18).contains(&initiations), "{initiations} in 90 s, one each 5 to 5 1/3 s");
    assert_eq!(world.alice.tunnel.drops().get(DropReason::HandshakeTimeout), 1);
    assert_eq!(world.alice.tunnel.next_wakeup(), None);
    assert_eq!(world.alice.tunnel.indices.len(), 0);
}

#[test]
fn initiations_keep_their_distance() {
    let mut world = World::new();
    world.bob.address = EVE; // Nobody at Bob's.
    for _ in 0..100 {
        world.alice_sends(b"hello?");
        world.pass(Duration::from_millis(100));
    }
    assert_eq!(world.count(ALICE, 1), 2);
}

#[test]
fn a_finished_handshake_is_not_followed_by_another_at_once() {
    let mut world = World::connected();
    for (end, other) in [(&mut world.alice, BOB_KEY), (&mut world.bob, ALICE_KEY)] {
        let config = PeerConfig { preshared_key: Some([7; 32].into()), ..peer_config(other, None) };
        end.tunnel.set_peer(&config, world.now); // Which ends the session.
    }
    world.alice_sends(b"anew");
    world.pass(REKEY_TIMEOUT - Duration::from_millis(1));
    assert_eq!((world.count(ALICE, 1), world.bob.inbox.len()), (1, 0));
    world.pass(Duration::from_millis(1));
    assert_eq!((world.count(ALICE, 1), world.bob.inbox.len()), (2, 1));
}

#[test]
fn a_peer_that_lost_its_session_is_called_anew() {
    let mut world = World::connected();
    world.bob = World::new().bob; // Bob starts anew, and has forgotten everything.
    world.alice_sends(b"are you there?");
    world.deliver();
    assert_eq!(world.bob.dropped, [DropReason::UnknownSession]);
    world.pass(NO_REPLY_TIMEOUT + MAX_JITTER);
    assert_eq!(world.count(ALICE, 1), 2);
    world.alice_sends(b"there you are");
    world.deliver();
    assert_eq!(world.bob.inbox, [b"there you are"]);
}

#[test]
fn a_persistent_keepalive_connects_by_itself_and_stays_connected() {
    let mut world = World::with(|peer| {
        if peer.endpoint.is_some() {
            peer.persistent_keepalive = Some(Duration::from_secs(25));
        }
    });
    world.pass(Duration::from_secs(1000));
    // One each 25 seconds, and one to end each of the handshakes.
    let keepalives = world.bob.keepalives - world.count(BOB, 2);
    assert!((38..=42).contains(&keepalives), "{keepalives}");
    assert!(world.bob.tunnel.sealer(world.bob.peer, world.now).is_some());
    assert!(world.alice.dropped.is_empty() && world.bob.dropped.is_empty());
}

#[test]
fn a_persistent_keepalive_keeps_calling_a_peer_that_is_away() {
    let mut world = World::with(|peer| {
        if peer.endpoint.is_some() {
            peer.persistent_keepalive = Some(Duration::from_secs(25));
        }
    });
    let home = std::mem::replace(&mut world.bob.address, EVE);
    world.pass(Duration::from_secs(1000));
    world.bob.address = home;
    world.pass(Duration::from_secs(30));
    assert!(world.bob.tunnel.sealer(world.bob.peer, world.now).is_some());
}

#[test]
fn a_flow_wakes_nobody_up_per_packet() {
    let mut world = World::connected();
    world.wakeups = 0;
    for _ in 0..6000 {
        world.pass(Duration::from_millis(10));
        world.alice_sends(b"tick");
        world.bob_sends(b"tock");
        world.deliver();
    }
    assert!(world.wakeups <= 2 * 6 + 2, "{} in a minute", world.wakeups);
}

#[test]
fn packets_that_wait_outlive_a_change_of_keys_only_as_long_as_a_handshake_is_tried() {
    let mut world = World::new();
    world.alice_sends(b"waiting");
    world.wire.clear();
    let config = PeerConfig { preshared_key: Some([7; 32].into()), ..peer_config(BOB_KEY, Some(BOB)) };
    world.alice.tunnel.set_peer(&config, world.now);
    world.bob.address = EVE; // Nobody answers.
    world.pass(Duration::from_secs(200));
    assert_eq!(world.alice.tunnel.drops().get(DropReason::HandshakeTimeout), 1);
    assert_eq!(world.alice.tunnel.next_wakeup(), None);
}

/// What the wall clock shows at the origin of time, in these tests.
const WALL_CLOCK: Duration = Duration::from_secs(1_795_000_000);

#[test]
fn who_was_started_before_the_clock_was_right_is_heard_once_it_is() {
    let mut world = World::connected();
    let mut restarted = tunnel(ALICE_KEY);
    restarted.set_wall_clock(WALL_CLOCK - 3_600 * SECOND);
    world.alice.peer = restarted.set_peer(&peer_config(BOB_KEY, Some(BOB)), world.now);
    world.alice.tunnel = restarted;
    world.pass(SECOND);
    world.alice_sends(b"hello");
    world.deliver();
    assert_eq!(world.bob.dropped, [DropReason::BadHandshake], "an initiation of the past");
    world.alice.tunnel.set_wall_clock(WALL_CLOCK); // NTP
    world.pass(10 * SECOND);
    world.deliver();
    assert_eq!(world.bob.inbox.last().map(Vec::as_slice), Some(&b"hello"[..]));
}

#[test]
fn a_clock_that_is_set_back_disturbs_no_renewal() {
    let mut world = World::connected();
    for hours in 1..4 {
        world.alice.tunnel.set_wall_clock(WALL_CLOCK - hours * 3_600 * SECOND);
        for _ in 0..130 {
            world.pass(SECOND);
            world.alice_sends(b"tick");
            world.deliver();
        }
    }
    assert_eq!(world.bob.inbox.len(), 390);
    assert!(world.bob.dropped.is_empty(), "{:?}", world.bob.dropped);
    assert!(world.count(ALICE, 1) >= 4, "it was renewed");
}
