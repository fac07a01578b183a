//! What Eve may try: she reads everything, writes anything, from any address, and knows all public keys.

use proptest::prelude::*;

use super::super::cookie::{
    Admission, AdmissionVerdict, CookieJar, LOAD_THRESHOLD, MacKeys, SOURCE_BURST, TOTAL_BURST, TOTAL_RATE,
};
use super::super::messages::{Initiation, Message};
use super::super::peer::MOVES_AT_ONCE;
use super::super::receive::HANDSHAKE_WORK;
use super::super::send::{INITIATION_BURST, INITIATION_RATE, RETRY_BURST, RETRY_RATE};
use super::super::timers::REKEY_TIMEOUT;
use super::*;
use crate::fair_queue::Owner;

impl World {
    /// Eve sends a copy of `datagram`; what Bob says to that.
    fn eve_sends(&mut self, bytes: &[u8]) -> (Received, Outgoing) {
        self.bob_receives(EVE, bytes)
    }

    fn bob_receives(&mut self, from: SocketAddrV4, bytes: &[u8]) -> (Received, Outgoing) {
        let mut out = Outgoing::default();
        let from = Path { remote: from, local: Some(*BOB.ip()) };
        let received = self.bob.tunnel.receive(self.now, from, &mut bytes.to_vec(), &mut out);
        (received, out)
    }

    /// The last message of `kind` that `from` sent.
    fn recorded(&self, from: SocketAddrV4, kind: u8) -> Vec<u8> {
        let mut messages = self.recording.iter().rev();
        let found = messages.find(|datagram| datagram.from == from && datagram.bytes[0] == kind);
        found.unwrap().bytes.clone()
    }

    /// Eve keeps Bob busy within this second: she knows his public key, so her mac1 is right.
    fn flood(&mut self) {
        let mut eve = tunnel([0xee; 32]);
        let bob = eve.set_peer(&peer_config(BOB_KEY, Some(BOB)), self.now);
        let mut out = Outgoing::default();
        eve.enqueue(bob, b"x", self.now, &mut out).unwrap();
        for _ in 0..=LOAD_THRESHOLD {
            self.eve_sends(&out.datagrams[0].1);
        }
    }
}

#[test]
fn a_replayed_data_message_is_dropped_and_moves_no_endpoint() {
    let mut world = World::connected();
    let data = world.recorded(ALICE, 4);
    assert_eq!(world.eve_sends(&data).0, Received::Drop(DropReason::Replayed));
    assert_eq!(world.bob.stats().endpoint, Some(ALICE));
}

#[test]
fn a_changed_data_message_is_dropped_and_moves_no_endpoint() {
    let mut world = World::connected();
    world.alice_sends(b"genuine");
    let genuine = world.wire.pop_front().unwrap();
    for position in 8..genuine.bytes.len() {
        let mut forged = genuine.bytes.clone();
        forged[position] ^= 0x40;
        let (received, _) = world.eve_sends(&forged);
        // A changed counter is another nonce, or beyond the last counter that there is.
        let reasons = [DropReason::BadAuthentication, DropReason::UnknownSession];
        assert!(reasons.map(Received::Drop).contains(&received), "{position}: {received:?}");
    }
    assert_eq!(world.bob.stats().endpoint, Some(ALICE));
    world.deliver_one(genuine);
    assert_eq!(world.bob.inbox, [b"genuine"], "the forgeries used up nothing");
}

#[test]
fn a_replayed_initiation_is_neither_answered_nor_believed() {
    let mut world = World::connected();
    world.pass(Duration::from_secs(1));
    let initiation = world.recorded(ALICE, 1);
    let (received, out) = world.eve_sends(&initiation);
    assert_eq!(received, Received::Drop(DropReason::BadHandshake));
    assert!(out.datagrams.is_empty());
    assert_eq!(world.bob.stats().endpoint, Some(ALICE));
    world.bob_sends(b"still you and me");
    world.deliver();
    assert_eq!(world.alice.inbox, [b"still you and me"]);
}

#[test]
fn an_initiation_is_answered_at_most_every_twenty_milliseconds() {
    let mut world = World::connected();
    // Of an Alice who started anew, and whose clock has moved on by enough to give another timestamp.
    let mut alice = tunnel(ALICE_KEY);
    let bob = alice.set_peer(&peer_config(BOB_KEY, Some(BOB)), world.now);
    let mut out = Outgoing::default();
    alice.enqueue(bob, b"x", world.now + Duration::from_millis(100), &mut out).unwrap();
    let initiation = &out.datagrams[0].1;

    world.now = world.now + Duration::from_millis(19);
    assert_eq!(world.bob_receives(ALICE, initiation).0, Received::Drop(DropReason::HandshakeRateLimited));
    world.now = world.now + Duration::from_millis(1);
    assert!(matches!(world.bob_receives(ALICE, initiation).0, Received::Handshake { .. }));
}

#[test]
fn a_forged_or_replayed_response_does_not_end_the_handshake() {
    let mut world = World::new();
    world.alice_sends(b"hello");
    let initiation = world.wire.pop_front().unwrap();
    world.deliver_one(initiation);
    let response = world.wire.pop_front().unwrap();
    let mut forged = response.clone();
    forged.bytes[12] ^= 1; // The ephemeral key, and mac1 no longer fits.
    world.deliver_one(forged);
    assert_eq!(world.alice.dropped, [DropReason::BadMac]);
    // Eve knows Alice's public key, so she can make it fit.
    let mut forged = response.clone();
    forged.bytes[12] ^= 1;
    let keys = MacKeys::new(&public_key(&ALICE_KEY));
    CookieJar::default().sign(&keys, &mut forged.bytes, world.now).unwrap();
    world.deliver_one(forged);
    assert_eq!(world.alice.dropped, [DropReason::BadMac, DropReason::BadHandshake]);

    world.deliver_one(response.clone());
    world.deliver();
    assert_eq!(world.bob.inbox, [b"hello"]);
    world.deliver_one(response);
    assert_eq!(world.alice.dropped[2..], [DropReason::UnknownSession]);
}

#[test]
fn a_stranger_gets_no_answer() {
    let mut world = World::new();
    let mut eve = tunnel([0xee; 32]);
    let bob = eve.set_peer(&peer_config(BOB_KEY, Some(BOB)), world.now);
    let mut out = Outgoing::default();
    eve.enqueue(bob, b"let me in", world.now, &mut out).unwrap();
    let (received, answer) = world.eve_sends(&out.datagrams[0].1);
    assert_eq!(received, Received::Drop(DropReason::UnknownPeer));
    assert!(answer.datagrams.is_empty());
}

#[test]
fn who_does_not_know_our_public_key_cannot_make_us_compute() {
    let mut world = World::new();
    let mut carol = tunnel([0xca; 32]);
    let somebody = carol.set_peer(&peer_config([0xdd; 32], Some(BOB)), world.now);
    let mut out = Outgoing::default();
    carol.enqueue(somebody, b"x", world.now, &mut out).unwrap();
    assert_eq!(world.eve_sends(&out.datagrams[0].1).0, Received::Drop(DropReason::BadMac));
}

#[test]
fn under_load_a_handshake_needs_a_cookie_and_gets_one() {
    let mut world = World::new();
    world.flood();
    world.alice_sends(b"hello");
    world.deliver();
    assert_eq!(world.bob.dropped, [DropReason::CookieRequired]);
    assert_eq!((world.count(BOB, 3), world.count(BOB, 2)), (1, 0));
    assert_eq!(world.recorded(ALICE, 1)[132..], [0; 16], "no mac2 yet");

    world.now = world.now + Duration::from_secs(6);
    world.flood();
    world.poll();
    let initiation = world.recorded(ALICE, 1);
    assert_ne!(initiation[132..], [0; 16], "mac2");
    // The cookie is worth nothing from another address.
    let elsewhere = SocketAddrV4::new(*EVE.ip(), 1);
    let (received, out) = world.bob_receives(elsewhere, &initiation);
    assert_eq!(received, Received::Drop(DropReason::CookieRequired));
    assert_eq!(out.datagrams[0].0, Path { remote: elsewhere, local: Some(*BOB.ip()) });
    world.deliver();
    assert_eq!(world.bob.inbox, [b"hello"]);
}

#[test]
fn under_load_a_source_with_a_cookie_is_held_to_its_rate() {
    let mut world = World::new();
    world.flood();
    world.alice_sends(b"hello");
    world.deliver();
    world.now = world.now + Duration::from_secs(6);
    world.flood();
    world.poll();
    world.deliver();
    let initiation = world.recorded(ALICE, 1);
    for _ in 1..SOURCE_BURST {
        let (received, _) = world.bob_receives(ALICE, &initiation);
        assert_eq!(received, Received::Drop(DropReason::BadHandshake), "a replay, but it was read");
    }
    let (received, _) = world.bob_receives(ALICE, &initiation);
    assert_eq!(received, Received::Drop(DropReason::HandshakeRateLimited));
    world.pass(Duration::from_secs(300));
    assert_eq!(world.bob.tunnel.next_wakeup(), None, "the source is forgotten");
}

#[test]
fn under_load_all_sources_together_are_held_to_a_rate() {
    let bob = public_key(&BOB_KEY);
    let (keys, mut admission) = (MacKeys::new(&bob), Admission::new(&bob));
    let mut judge = |source: u32, jar: &mut CookieJar, now| {
        let mut message = Initiation::template(source);
        jar.sign(&keys, &mut message, now).unwrap();
        let Ok(Message::Initiation(message)) = Message::parse(&message) else { unreachable!() };
        let from = SocketAddrV4::new(Ipv4Addr::from_bits(source), 1);
        match admission.judge(&message, from, now) {
            Ok(AdmissionVerdict::Admit) => true,
            Ok(AdmissionVerdict::Challenge(reply)) => {
                let Ok(Message::CookieReply(reply)) = Message::parse(&reply) else { unreachable!() };
                jar.receive(&keys, reply, now).unwrap();
                false
            }
            Err(reason) => {
                assert_eq!(reason, DropReason::HandshakeRateLimited);
                false
            }
        }
    };
    let now = Timestamp::from_secs(1_000);
    let mut eve = CookieJar::default();
    assert!((0..LOAD_THRESHOLD).all(|_| judge(0, &mut eve, now)));
    let mut admitted = |now, sources: std::ops::Range<u32>| {
        let admitted = sources.filter(|&source| {
            let mut jar = CookieJar::default();
            assert!(!judge(source, &mut jar, now), "without a cookie");
            judge(source, &mut jar, now)
        });
        admitted.count() as u32
    };
    assert_eq!(admitted(now, 1..2_000), TOTAL_BURST);
    assert_eq!(admitted(now + Duration::from_millis(50), 5_000..5_500), TOTAL_RATE / 20);
    // 800 that come back within a third of a second, as to a gateway that was restarted, almost all get in.
    let later = |n: u32| now + Duration::from_secs(1) + Duration::from_millis(33) * n;
    let admitted: u32 = (1..=10).map(|n| admitted(later(n), n * 10_000..n * 10_000 + 80)).sum();
    assert!(admitted > 790, "{admitted}");
}

#[test]
fn only_handshakes_that_are_read_are_dear() {
    let mut world = World::connected();
    let work = |world: &mut World, bytes: &[u8]| {
        world.eve_sends(bytes);
        world.bob.tunnel.take_work()
    };
    world.bob.tunnel.take_work();
    let mut initiation = world.recorded(ALICE, 1);
    assert_eq!(work(&mut world, &initiation), HANDSHAKE_WORK, "a replay, as is found out by reading it");
    let data = world.recorded(ALICE, 4);
    assert_eq!(work(&mut world, &data), 0);
    let response = world.recorded(BOB, 2);
    assert_eq!(work(&mut world, &response), 0, "it answers nothing of Bob's");
    world.flood();
    world.bob.tunnel.take_work();
    assert_eq!(work(&mut world, &initiation), 0, "it is challenged");
    initiation[100] ^= 1;
    assert_eq!(work(&mut world, &initiation), 0, "a wrong mac1");
}

#[test]
fn a_forged_cookie_reply_is_refused() {
    let mut world = World::new();
    world.flood();
    world.alice_sends(b"hello");
    world.deliver();
    world.now = world.now + Duration::from_secs(6);
    world.flood();
    world.poll();
    let mut reply = world.recorded(BOB, 3);
    reply[4..8].copy_from_slice(&world.recorded(ALICE, 1)[4..8]); // For the new handshake.
    world.deliver_one(Datagram { from: BOB, to: ALICE, bytes: reply });
    assert_eq!(world.alice.dropped, [DropReason::BadHandshake]);
}

#[test]
fn load_passes_and_leaves_nothing_behind() {
    let mut world = World::new();
    world.flood();
    world.alice_sends(b"hello");
    world.deliver();
    world.pass(Duration::from_secs(30));
    assert_eq!(world.bob.inbox, [b"hello"], "the retry found no more load");
    world.pass(Duration::from_secs(300));
    assert_eq!((world.alice.tunnel.next_wakeup(), world.bob.tunnel.next_wakeup()), (None, None));
}

#[test]
fn a_shard_under_load_still_reads_what_another_shard_has_admitted() {
    let mut world = World::new();
    world.flood();
    world.alice_sends(b"hello");
    let mut initiation = world.wire.pop_front().unwrap().bytes;
    let mut out = Outgoing::default();
    let received = world.bob.tunnel.receive_forwarded(world.now, ALICE.into(), &mut initiation, &mut out);
    assert!(matches!(received, Received::Handshake { .. }));
}

#[test]
fn a_response_that_another_shard_hands_over_is_judged_by_its_own_shard_and_that_shards_cookie() {
    let mut world = World::new();
    let handed_over = |world: &mut World, from: SocketAddrV4, bytes: &[u8]| {
        let mut out = Outgoing::default();
        let received =
            world.alice.tunnel.receive_forwarded(world.now, from.into(), &mut bytes.to_vec(), &mut out);
        (received, out.datagrams)
    };
    // Bob's response to Alice's initiation, after many forged ones with a right mac1.
    let responded_in_a_flood = |world: &mut World| {
        let initiation = world.wire.pop_front().unwrap();
        world.deliver_one(initiation);
        let response = world.wire.pop_front().unwrap().bytes;
        let mut forged = response.clone();
        forged[12] ^= 1;
        let keys = MacKeys::new(&public_key(&ALICE_KEY));
        CookieJar::default().sign(&keys, &mut forged, world.now).unwrap();
        world.alice.tunnel.take_work();
        for _ in 0..2 * LOAD_THRESHOLD {
            handed_over(world, EVE, &forged);
        }
        assert_eq!(world.alice.tunnel.take_work(), LOAD_THRESHOLD as usize * HANDSHAKE_WORK);
        response
    };
    world.alice_sends(b"hello");
    let response = responded_in_a_flood(&mut world);
    let (received, mut answers) = handed_over(&mut world, BOB, &response);
    assert_eq!(received, Received::Drop(DropReason::CookieRequired));
    let (to, cookie) = answers.remove(0);
    world.deliver_one(Datagram { from: ALICE, to: to.remote, bytes: cookie });

    world.now = world.now + Duration::from_secs(6);
    world.poll();
    let response = responded_in_a_flood(&mut world);
    assert_ne!(response[76..], [0; 16], "mac2");
    assert!(matches!(handed_over(&mut world, BOB, &response).0, Received::Handshake { .. }));
}

/// The kernel would ask for the link address of each place, and keep packets meanwhile in the buffer of a socket that
/// is everybody's.
#[test]
fn data_moves_a_peer_at_a_bounded_rate_and_a_handshake_at_once() {
    let mut world = World::connected();
    let place = |number: u16| SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 200), number);
    let heard_at = |world: &mut World, place: SocketAddrV4| {
        world.alice_sends(b"here I am");
        let bytes = world.wire.pop_front().unwrap().bytes;
        assert!(
            matches!(world.bob_receives(place, &bytes).0, Received::Packet { .. }),
            "it is believed itself"
        );
        world.bob.stats().endpoint == Some(place)
    };
    let moved = |world: &mut World, places: std::ops::Range<u16>| {
        places.filter(|&number| heard_at(world, place(number))).count()
    };
    assert_eq!(moved(&mut world, 1..1_000), MOVES_AT_ONCE as usize);
    world.now = world.now + Duration::from_millis(999);
    assert_eq!(moved(&mut world, 1_000..2_000), 0);
    for _ in 0..10 {
        world.now = world.now + Duration::from_secs(1);
        assert_eq!(moved(&mut world, 2_000..2_100), 1);
        world.bob.tunnel.set_endpoint(world.bob.peer, ALICE, world.now);
    }
    // Where it is, and where it was before, it may be as often as it likes.
    world.now = world.now + Duration::from_secs(1);
    assert!(heard_at(&mut world, place(5_000)));
    assert!((0..100).all(|_| heard_at(&mut world, ALICE) && heard_at(&mut world, place(5_000))));
    assert!(!heard_at(&mut world, place(5_001)));

    // A handshake is at once where it comes from, but not everywhere.
    let mut at_once = 0;
    for number in 6_000..6_100 {
        world.now = world.now + Duration::from_millis(20);
        let mut alice = tunnel(ALICE_KEY);
        let bob = alice.set_peer(&peer_config(BOB_KEY, Some(BOB)), world.now);
        let mut out = Outgoing::default();
        alice.enqueue(bob, b"x", world.now + Duration::from_secs(number.into()), &mut out).unwrap();
        let (received, answer) = world.bob_receives(place(number), &out.datagrams[0].1);
        assert!(matches!(received, Received::Handshake { .. }));
        assert_eq!(answer.datagrams[0].0.remote, place(number), "where it is answered, whatever is believed");
        at_once += usize::from(world.bob.stats().endpoint == Some(place(number)));
        assert!(at_once > 0);
    }
    assert_eq!(at_once, MOVES_AT_ONCE as usize + 1, "within two seconds");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Anything at all, with a plausible type now and then.
    #[test]
    fn garbage_of_any_length_is_dropped(mut bytes in prop::collection::vec(any::<u8>(), 0..300), kind in 0u8..6) {
        let mut world = World::connected();
        if let Some(header) = bytes.first_chunk_mut::<4>() {
            *header = [kind, 0, 0, 0];
        }
        // For a session that exists.
        let data = world.recorded(ALICE, 4);
        if let Some(index) = bytes.get_mut(4..8) {
            index.copy_from_slice(&data[4..8]);
        }
        let (received, out) = world.eve_sends(&bytes);
        prop_assert!(matches!(received, Received::Drop(_)), "{:?}", received);
        prop_assert!(out.datagrams.is_empty());
        prop_assert_eq!(world.bob.stats().endpoint, Some(ALICE));
    }

    /// Genuine messages, cut or changed in one place.
    #[test]
    fn damaged_messages_are_dropped(which in 0usize..4, position in 0usize..148, flip in 1u8.., cut: bool) {
        let mut world = World::new();
        world.alice_sends(b"hello");
        for _ in 0..which {
            let datagram = world.wire.pop_front().unwrap();
            world.deliver_one(datagram);
            if world.wire.is_empty() {
                world.bob_sends(b"hello yourself");
            }
        }
        let mut datagram = world.wire.pop_front().unwrap();
        let position = position % datagram.bytes.len();
        if cut {
            datagram.bytes.truncate(position);
        } else {
            datagram.bytes[position] ^= flip;
        }
        let to_bob = datagram.to == BOB;
        let mac2 = datagram.bytes.len() - 16.min(datagram.bytes.len());
        let meaningless = !cut && datagram.bytes[0] != 4 && position >= mac2; // mac2 is not looked at.
        world.deliver_one(datagram);
        let dropped = if to_bob { &world.bob.dropped } else { &world.alice.dropped };
        prop_assert_eq!(dropped.len(), usize::from(!meaningless));
    }
}

#[test]
fn only_a_datagram_from_where_a_peer_is_seems_to_be_the_peers() {
    let world = World::connected();
    let bob = world.bob.tunnel.peers.get(world.bob.peer).unwrap();
    assert!(bob.endpoint.unwrap().local.is_some(), "to which of Bob's addresses does not matter");
    let data = world.recorded(ALICE, 4);
    let sender = |datagram: &[u8], from| world.bob.tunnel.sender(datagram, from);
    assert_eq!(sender(&data, ALICE), Owner::Client(world.bob.peer));
    assert_eq!(
        sender(&data, EVE),
        Owner::Unknown,
        "whoever has only seen the index does not get into Alice's queue"
    );
    let mut other = data.clone();
    other[5] ^= 1;
    assert_eq!(sender(&other, ALICE), Owner::Unknown, "an index that nobody has");
    assert_eq!(
        sender(&world.recorded(ALICE, 1), EVE),
        Owner::Handshake,
        "a handshake, wherever it comes from"
    );
    assert_eq!(sender(&data[..20], ALICE), Owner::Unknown);
}

const NOW: Timestamp = Timestamp::from_secs(1_000);

/// The private key of one of many peers.
fn key_of(n: u16) -> [u8; 32] {
    let mut private_key = ALICE_KEY;
    private_key[1..3].copy_from_slice(&n.to_be_bytes());
    private_key
}

/// Where it is.
fn endpoint_of(n: u16) -> SocketAddrV4 {
    SocketAddrV4::new(*ALICE.ip(), 1_024 + n)
}

/// A tunnel with `count` peers whose endpoints are known, and no session.
fn with_idle_peers(count: u16) -> (Tunnel, Vec<PeerId>) {
    let mut tunnel = tunnel(BOB_KEY);
    let config = |n| peer_config(key_of(n), Some(endpoint_of(n)));
    let peers = (0..count).map(|n| tunnel.set_peer(&config(n), NOW)).collect();
    (tunnel, peers)
}

#[test]
fn a_packet_to_each_of_a_thousand_idle_peers_begins_few_handshakes_at_once_and_each_in_its_turn() {
    let (mut tunnel, peers) = with_idle_peers(1_000);
    let mut out = Outgoing::default();
    peers.iter().for_each(|&peer| tunnel.enqueue(peer, b"is anybody there?", NOW, &mut out).unwrap());
    assert_eq!(out.datagrams.len(), INITIATION_BURST as usize, "each costs some 100 us of one turn");
    let mut now = NOW;
    let mut called: Vec<_> = out.datagrams.drain(..).map(|(to, _)| to.remote).collect();
    while called.len() < peers.len() {
        now = tunnel.next_wakeup().unwrap();
        tunnel.poll(now, &mut out);
        assert!(out.datagrams.len() <= INITIATION_BURST as usize, "{} in one turn", out.datagrams.len());
        called.extend(out.datagrams.drain(..).map(|(to, _)| to.remote));
    }
    assert_eq!(
        called,
        (0..1_000).map(endpoint_of).collect::<Vec<_>>(),
        "first come, first served, and nobody is called twice before everybody was once"
    );
    let took = now.since(NOW);
    assert!(took <= Duration::from_secs(1_000 / u64::from(INITIATION_RATE)), "{took:?}");
}

#[test]
fn the_only_handshake_never_waits_for_its_turn() {
    let (mut tunnel, peers) = with_idle_peers(1);
    let mut out = Outgoing::default();
    for round in 0..100 {
        let now = NOW + REKEY_TIMEOUT * round;
        // Another key each time, so that nothing is left of the last handshake.
        let preshared_key = Some([round as u8 + 1; 32].into());
        let config = PeerConfig { preshared_key, ..peer_config(key_of(0), Some(endpoint_of(0))) };
        tunnel.set_peer(&config, now);
        tunnel.enqueue(peers[0], b"hello", now, &mut out).unwrap();
        assert_eq!(out.datagrams.drain(..).count(), 1, "round {round}");
    }
}

#[test]
fn who_is_called_for_the_first_time_does_not_wait_behind_calls_that_nobody_answers() {
    let (mut tunnel, peers) = with_idle_peers(1_001);
    let (&newcomer, silent) = peers.split_last().unwrap();
    let mut out = Outgoing::default();
    let mut most_at_once = 0;
    let mut poll_until = |tunnel: &mut Tunnel, out: &mut Outgoing, end: Timestamp| {
        let mut called = Vec::new();
        while let Some(now) = tunnel.next_wakeup().filter(|&now| now <= end) {
            tunnel.poll(now, out);
            most_at_once = most_at_once.max(out.datagrams.len());
            called.extend(out.datagrams.drain(..).map(|(to, _)| (to.remote, now)));
        }
        called
    };
    let mut calls = 0;
    for second in 0..60 {
        let now = NOW + Duration::from_secs(second);
        silent.iter().for_each(|&peer| tunnel.enqueue(peer, b"is anybody there?", now, &mut out).unwrap());
        calls += out.datagrams.drain(..).count();
        calls += poll_until(&mut tunnel, &mut out, now + Duration::from_secs(1)).len();
    }
    let at_most = 60 * (INITIATION_RATE + RETRY_RATE) as usize;
    assert!((3_000..at_most).contains(&calls), "{calls}: they are called again, but not all the time");
    let now = NOW + Duration::from_secs(60);
    tunnel.enqueue(newcomer, b"hello", now, &mut out).unwrap();
    let mut called: Vec<_> = out.datagrams.drain(..).map(|(to, _)| (to.remote, now)).collect();
    called.extend(poll_until(&mut tunnel, &mut out, now + Duration::from_secs(20)));
    called.retain(|&(to, _)| to == endpoint_of(1_000));
    let waited: Vec<_> = called.into_iter().map(|(_, at)| at.since(now)).collect();
    assert!(waited[0] <= Duration::from_secs(1), "{waited:?}");
    assert!(waited[1] <= Duration::from_secs(7), "{waited:?}: the first datagram may have been lost");
    assert!(most_at_once <= (INITIATION_BURST + RETRY_BURST) as usize, "{most_at_once} in one turn");
}
