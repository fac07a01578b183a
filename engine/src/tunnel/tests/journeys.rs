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

#[test]
fn both_ciphers_and_a_preshared_key_work() {
    for cipher in Cipher::ALL {
        let mut world = World::with(|peer| {
            peer.cipher = cipher;
            peer.preshared_key = Some([7; 32].into());
        });
        world.alice_sends(b"hello");
        world.deliver();
        world.bob_sends(b"hello yourself");
        world.deliver();
        assert_eq!(
            (world.bob.inbox, world.alice.inbox),
            (vec![b"hello".to_vec()], vec![b"hello yourself".to_vec()])
        );
    }
}

#[test]
fn peers_that_disagree_about_the_cipher_exchange_nothing() {
    for (alices, bobs) in
        [(Cipher::ChaCha20Poly1305, Cipher::Aes256Gcm), (Cipher::Aes256Gcm, Cipher::ChaCha20Poly1305)]
    {
        let mut world = World::new();
        let alice = PeerConfig { cipher: alices, ..peer_config(BOB_KEY, Some(BOB)) };
        let bob = PeerConfig { cipher: bobs, ..peer_config(ALICE_KEY, None) };
        world.alice.tunnel.set_peer(&alice, world.now);
        world.bob.tunnel.set_peer(&bob, world.now);
        // Long enough for many handshakes, so that nobody thinks better of it.
        for _ in 0..600 {
            world.alice_sends(b"hello");
            world.bob_sends(b"hello?");
            world.deliver();
            world.pass(Duration::from_secs(1));
        }
        assert!(world.alice.inbox.is_empty() && world.bob.inbox.is_empty());
        assert_eq!((world.alice.keepalives, world.bob.keepalives), (0, 0));
        assert!(world.alice.stats().last_handshake.is_some(), "the handshake knows nothing of the cipher");
        // Where both begin handshakes, sessions replace each other before their data arrives.
        let expected = [DropReason::BadAuthentication, DropReason::UnknownSession, DropReason::NoEndpoint];
        for end in [&world.alice, &world.bob] {
            assert!(end.dropped.iter().all(|reason| expected.contains(reason)));
            let counted = end.dropped.iter().filter(|&&reason| reason == DropReason::BadAuthentication);
            assert!(counted.count() > 100);
        }
    }
}

#[test]
fn a_changed_cipher_begins_with_a_new_session_and_then_works() {
    let mut world = World::connected();
    let bob = PeerConfig { cipher: Cipher::Aes256Gcm, ..peer_config(ALICE_KEY, None) };
    let alice = PeerConfig { cipher: Cipher::Aes256Gcm, ..peer_config(BOB_KEY, None) };
    world.bob.tunnel.set_peer(&bob, world.now);
    world.alice.tunnel.set_peer(&alice, world.now);
    world.pass(Duration::from_secs(6));
    world.alice_sends(b"faster now");
    world.deliver();
    assert_eq!(world.bob.inbox, [b"faster now"]);
    assert_eq!((world.count(ALICE, 1), world.count(BOB, 2)), (2, 2));
}

#[test]
fn peers_that_disagree_about_the_preshared_key_get_no_session() {
    let mut world = World::new();
    let config = PeerConfig { preshared_key: Some([7; 32].into()), ..peer_config(ALICE_KEY, None) };
    world.bob.tunnel.set_peer(&config, world.now);
    world.alice_sends(b"hello");
    world.deliver();
    assert_eq!(world.alice.dropped, [DropReason::BadHandshake]);
    assert!(world.alice.tunnel.sealer(world.alice.peer, world.now).is_none());
}

#[test]
fn packets_wait_for_the_handshake_and_keep_their_order() {
    let mut world = World::new();
    let packets: Vec<Vec<u8>> =
        (0..QUEUE_LIMIT).map(|number| format!("packet {number}").into_bytes()).collect();
    packets.iter().for_each(|packet| world.alice_sends(packet));
    assert_eq!(world.count(ALICE, 1), 1, "one handshake for all of them");
    world.deliver();
    assert_eq!(world.bob.inbox, packets);
}

#[test]
fn of_too_many_waiting_packets_the_oldest_are_dropped() {
    let mut world = World::new();
    (0..QUEUE_LIMIT + 2).for_each(|number| world.alice_sends(format!("packet {number}").as_bytes()));
    assert_eq!(world.alice.dropped, [DropReason::NoSession; 2]);
    world.deliver();
    assert_eq!(world.bob.inbox.len(), QUEUE_LIMIT);
    assert_eq!(world.bob.inbox[0], b"packet 2");
}

#[test]
fn a_peer_that_was_never_heard_of_cannot_be_sent_to() {
    let mut world = World::new();
    world.bob_sends(b"where are you?");
    assert_eq!(world.bob.dropped, [DropReason::NoEndpoint]);
    assert_eq!(world.bob.tunnel.next_wakeup(), None);
}

#[test]
fn the_responder_seals_only_after_the_first_data_message() {
    let mut world = World::new();
    world.alice_sends(b"hello");
    let initiation = world.wire.pop_front().unwrap();
    world.deliver_one(initiation);
    assert!(world.bob.tunnel.sealer(world.bob.peer, world.now).is_none());
    assert!(world.bob.stats().last_handshake.is_none());
    world.deliver();
    assert!(world.bob.tunnel.sealer(world.bob.peer, world.now).is_some());
}

#[test]
fn packets_of_the_responder_that_waited_follow_the_first_data_message() {
    let mut world = World::new();
    world.alice_sends(b"hello");
    let initiation = world.wire.pop_front().unwrap();
    world.deliver_one(initiation);
    world.bob_sends(b"welcome");
    world.wire.retain(|datagram| datagram.bytes[0] != 1); // Bob's own initiation is lost.
    world.deliver();
    assert_eq!(world.alice.inbox, [b"welcome"]);
}

#[test]
fn both_may_begin_at_the_same_time() {
    let mut world = World::new();
    world.bob.tunnel.set_endpoint(world.bob.peer, ALICE, world.now);
    world.alice_sends(b"me first");
    world.bob_sends(b"no, me first");
    world.deliver();
    assert_eq!(world.alice.inbox, [b"no, me first"]);
    assert_eq!(world.bob.inbox, [b"me first"]);
    for end in [&mut world.alice, &mut world.bob] {
        let peer = end.tunnel.peers.get_mut(end.peer).unwrap();
        assert!(peer.sessions.sealing(world.now).unwrap().is_initiator, "each keeps to its own session");
    }
    for _ in 0..400 {
        world.pass(Duration::from_secs(1));
        world.alice_sends(b"tick");
        world.bob_sends(b"tock");
        world.deliver();
    }
    assert_eq!((world.alice.inbox.len(), world.bob.inbox.len()), (401, 401));
    assert!(world.alice.dropped.is_empty() && world.bob.dropped.is_empty());
}

#[test]
fn packets_may_overtake_each_other() {
    let mut world = World::connected();
    (0..1000).for_each(|number| world.alice_sends(format!("packet {number}").as_bytes()));
    world.wire.make_contiguous().reverse();
    world.deliver();
    assert_eq!(world.bob.inbox.len(), 1000);
    assert!(world.bob.dropped.is_empty());
}

#[test]
fn a_roaming_peer_is_followed_by_its_authentic_messages() {
    let mut world = World::connected();
    world.alice.address = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 99), 40000);
    world.alice_sends(b"I moved");
    world.deliver();
    assert_eq!(world.bob.stats().endpoint, Some(world.alice.address));
    world.bob_sends(b"I see");
    world.deliver();
    assert_eq!(world.alice.inbox, [b"I see"]);
    assert_eq!(world.count(world.alice.address, 1), 0, "no handshake was needed");
}

#[test]
fn a_peer_is_answered_from_the_address_at_which_it_called() {
    let mut world = World::new();
    let path = |end: &End| end.tunnel.peers.get(end.peer).unwrap().endpoint.unwrap();
    let second = Ipv4Addr::new(198, 51, 100, 7);
    assert_eq!(path(&world.alice).local, None, "who is configured has not called");
    for address in [second, *BOB.ip()] {
        // The handshake at one address, then data at another.
        world.bob.address.set_ip(address);
        world.alice.tunnel.set_endpoint(world.alice.peer, world.bob.address, world.now);
        world.alice_sends(b"hello");
        world.deliver();
        world.bob_sends(b"hello");
        assert_eq!(path(&world.bob), Path { remote: ALICE, local: Some(address) });
        let answers: Vec<_> = world.wire.iter().collect();
        assert!(!answers.is_empty() && answers.iter().all(|answer| answer.from == world.bob.address));
        world.deliver();
    }
    let answers = world.recording.iter().filter(|datagram| datagram.from.ip() == &second);
    assert_eq!(answers.map(|answer| answer.bytes[0]).collect::<Vec<_>>(), [2, 4], "the response, too");
}

#[test]
fn an_address_that_the_host_has_lost_is_forgotten_until_the_peer_is_heard_of_again() {
    let mut world = World::connected();
    let path = |world: &World| world.bob.tunnel.peers.get(world.bob.peer).unwrap().endpoint.unwrap();
    world.bob.tunnel.forget_local(Ipv4Addr::new(198, 51, 100, 7));
    assert_eq!(path(&world).local, Some(*BOB.ip()), "that was another");
    world.bob.tunnel.forget_local(*BOB.ip());
    assert_eq!(path(&world), ALICE.into());
    world.alice_sends(b"still there");
    world.deliver();
    assert_eq!(path(&world).local, Some(*BOB.ip()));
}

#[test]
fn a_peer_that_does_not_answer_is_called_once_more_from_its_address_and_then_from_any() {
    let mut world = World::connected();
    let called_from = |world: &mut World| {
        let mut out = Outgoing::default();
        while out.datagrams.is_empty() {
            world.now = world.bob.tunnel.next_wakeup().unwrap();
            world.bob.tunnel.poll(world.now, &mut out);
        }
        assert_eq!(out.datagrams[0].1[0], 1, "an initiation");
        out.datagrams[0].0
    };
    world.bob_sends(b"are you there?");
    assert_eq!(called_from(&mut world), Path { remote: ALICE, local: Some(*BOB.ip()) });
    assert_eq!(called_from(&mut world), ALICE.into());
}

#[test]
fn data_is_padded_to_sixteen_bytes_but_not_beyond_the_mtu() {
    let mut world = World::connected();
    for (packet, datagram) in
        [(1, 16 + 32), (16, 16 + 32), (100, 112 + 32), (1415, 1420 + 32), (1420, 1420 + 32)]
    {
        world.alice_sends(&vec![0x45; packet]);
        assert_eq!(world.wire.pop_front().unwrap().bytes.len(), datagram);
    }
    let counted = world.alice.stats().traffic;
    assert_eq!((counted.sent_packets, counted.sent_bytes), (6, 5 + 1 + 16 + 100 + 1415 + 1420));
}

#[test]
fn packets_can_be_padded_to_a_length_but_not_beyond_the_mtu() {
    let mut world = World::connected();
    let mut sealer = world.alice.tunnel.sealer(world.alice.peer, world.now).unwrap();
    let mut buffer = [0x45; 2_000];
    for (packet, least, datagram) in
        [(52, 136, 144 + 32), (150, 136, 160 + 32), (52, 0, 64 + 32), (1400, 1500, 1420 + 32)]
    {
        sealer.pad_to(least);
        assert_eq!(sealer.datagram_len(packet), datagram);
        assert_eq!(sealer.seal(&mut buffer, packet), Ok(datagram));
    }
}

#[test]
fn changing_a_peer_leaves_its_session_alone_unless_its_secrets_change() {
    let mut world = World::connected();
    let mut config = peer_config(BOB_KEY, None);
    assert_eq!(world.alice.tunnel.set_peer(&config, world.now), world.alice.peer);
    assert!(world.alice.tunnel.sealer(world.alice.peer, world.now).is_some());
    assert_eq!(world.alice.stats().endpoint, Some(BOB));
    config.preshared_key = Some([1; 32].into());
    world.alice.tunnel.set_peer(&config, world.now);
    assert!(world.alice.tunnel.sealer(world.alice.peer, world.now).is_none());
    assert_eq!(world.alice.tunnel.indices.len(), 0);
}

#[test]
fn nothing_is_left_of_a_removed_peer() {
    let mut world = World::connected();
    world.alice_sends(b"too late");
    let key = public_key(&ALICE_KEY);
    assert_eq!(world.bob.tunnel.remove_peer(&key), Some(world.bob.peer));
    assert_eq!(world.bob.tunnel.remove_peer(&key), None);
    assert_eq!(world.bob.tunnel.next_wakeup(), None);
    assert_eq!(world.bob.tunnel.indices.len(), 0);
    assert_eq!(world.bob.tunnel.peers().count(), 0);
    world.deliver();
    assert_eq!(world.bob.dropped, [DropReason::UnknownSession]);
    assert!(world.bob.tunnel.sealer(world.bob.peer, world.now).is_none());
}

#[test]
fn a_client_that_starts_anew_is_welcome() {
    let mut world = World::connected();
    world.pass(Duration::from_secs(1));
    let fresh = World::new();
    world.alice = fresh.alice;
    world.alice_sends(b"it is me again");
    world.deliver();
    world.bob_sends(b"so it is");
    world.deliver();
    assert_eq!(world.bob.inbox, [b"it is me again"]);
    assert_eq!(world.alice.inbox, [b"so it is"]);
}

/// A gateway of two shards; Alice lives on the second.
#[test]
fn an_initiation_is_sent_on_to_the_shard_of_its_peer() {
    let mut world = World::new();
    let shard = |number| {
        Tunnel::new(TunnelConfig {
            private_key: BOB_KEY,
            shard: number,
            shards: 2,
            mtu: MTU,
            unix_time_at_origin: Duration::ZERO,
        })
    };
    let (mut zero, mut one, mut out) = (shard(0), shard(1), Outgoing::default());
    zero.set_peer_elsewhere(public_key(&ALICE_KEY), 1);
    let peer = one.set_peer(&peer_config(ALICE_KEY, None), world.now);

    world.alice_sends(b"hello");
    let mut initiation = world.wire.pop_front().unwrap().bytes;
    assert_eq!(zero.receive(world.now, ALICE.into(), &mut initiation, &mut out), Received::OtherShard(1));
    assert!(out.datagrams.is_empty());
    let received = one.receive_forwarded(world.now, ALICE.into(), &mut initiation, &mut out);
    assert_eq!(received, Received::Handshake { peer });

    let (to, response) = out.datagrams.pop().unwrap();
    let answers = world.alice.receive(Datagram { from: BOB, to: to.remote, bytes: response }, world.now);
    let mut data = answers[0].bytes.clone();
    assert_eq!(data[4], 1, "the low byte of the receiver index names the shard");
    assert_eq!(zero.receive(world.now, ALICE.into(), &mut data, &mut out), Received::OtherShard(1));
    assert!(matches!(one.receive(world.now, ALICE.into(), &mut data, &mut out), Received::Packet { .. }));

    zero.remove_peer(&public_key(&ALICE_KEY));
    let again = zero.receive(world.now, ALICE.into(), &mut initiation, &mut out);
    assert_eq!(again, Received::Drop(DropReason::UnknownPeer));
}
