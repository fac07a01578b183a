use super::tests_support::reply;
use super::*;

const OUR_MAC: MacAddress = [2, 0, 0, 0, 0, 0xa];
const ROUTER_MAC: MacAddress = [2, 0, 0, 0, 0, 1];
const OTHER_MAC: MacAddress = [2, 0, 0, 0, 0, 9];
const OURS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);
const ROUTER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const A_CLIENT: Asker = Some(Ipv4Addr::new(10, 66, 77, 2));
const ANOTHER_CLIENT: Asker = Some(Ipv4Addr::new(10, 66, 77, 3));

fn at(seconds: u64) -> Timestamp {
    Timestamp::from_secs(seconds)
}

fn link() -> ExternalLink {
    ExternalLink {
        interface: "eth0".into(),
        index: 2,
        mac: OUR_MAC,
        mtu: 1500,
        addresses: vec![OURS],
        on_link: vec!["192.0.2.0/24".parse().unwrap()],
        router: Some(ROUTER),
    }
}

fn cache() -> NeighborCache<u32> {
    NeighborCache::new(link())
}

/// The frames to send and the packets that died.
fn poll(cache: &mut NeighborCache<u32>, now: Timestamp) -> (Vec<ArpFrame>, Vec<u32>) {
    let (mut frames, mut dead) = (Vec::new(), Vec::new());
    cache.poll(now, |frame| frames.push(frame), |packet| dead.push(packet));
    (frames, dead)
}

fn answer(cache: &mut NeighborCache<u32>, mac: MacAddress, now: Timestamp) -> Result<Ipv4Addr, Ignored> {
    cache.receive(&reply(ROUTER, mac, OURS, OUR_MAC), now)
}

/// A cache that learnt the router at second 0.
fn learnt() -> NeighborCache<u32> {
    let mut cache = cache();
    assert_eq!(cache.resolve(ROUTER, A_CLIENT, at(0)), Resolution::Pending);
    assert_eq!(poll(&mut cache, at(0)).0.len(), 1);
    assert_eq!(answer(&mut cache, ROUTER_MAC, at(0)), Ok(ROUTER));
    cache
}

#[test]
fn a_neighbour_is_asked_for_and_its_packets_are_delivered_in_order() {
    let mut cache = cache();
    assert_eq!(cache.next_wakeup(), None);
    assert_eq!(cache.resolve(ROUTER, A_CLIENT, at(5)), Resolution::Pending);
    assert_eq!(
        (cache.hold(ROUTER, A_CLIENT, 1, 100), cache.hold(ROUTER, A_CLIENT, 2, 100)),
        (Ok(()), Ok(()))
    );
    assert_eq!(cache.next_wakeup(), Some(at(5)));
    let (frames, _) = poll(&mut cache, at(5));
    #[rustfmt::skip]
    let expected: ArpFrame = [
        0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 0xa, 8, 6,
        0, 1, 8, 0, 6, 4, 0, 1,
        2, 0, 0, 0, 0, 0xa, 192, 0, 2, 10,
        0, 0, 0, 0, 0, 0, 192, 0, 2, 1,
    ];
    assert_eq!(frames, [expected]);
    assert_eq!(answer(&mut cache, ROUTER_MAC, at(5)), Ok(ROUTER));
    assert_eq!(cache.drain(ROUTER).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(cache.resolve(ROUTER, A_CLIENT, at(6)), Resolution::Known(ROUTER_MAC));
    assert_eq!(cache.hold(ROUTER, A_CLIENT, 3, 100), Err(3));
}

#[test]
fn a_neighbour_is_asked_from_our_address_in_its_own_network() {
    let [second, router] = [70, 1].map(|host| Ipv4Addr::new(198, 51, 100, host));
    let mut on_link = link().on_link;
    on_link.push("198.51.100.0/24".parse().unwrap());
    let link = ExternalLink { addresses: vec![OURS, second], on_link, router: Some(router), ..link() };
    let mut cache = NeighborCache::<u32>::new(link);
    for (neighbor, expected) in [(router, second), (ROUTER, OURS)] {
        cache.resolve(neighbor, A_CLIENT, at(0));
        let (frames, _) = poll(&mut cache, at(0));
        assert_eq!(frames.len(), 1);
        assert_eq!(frames[0][arp::SENDER_ADDRESS..arp::TARGET_MAC], expected.octets());
        assert_eq!(cache.receive(&reply(neighbor, OTHER_MAC, expected, OUR_MAC), at(0)), Ok(neighbor));
        assert_eq!(cache.resolve(neighbor, A_CLIENT, at(1)), Resolution::Known(OTHER_MAC));
    }
}

#[test]
fn a_neighbour_that_does_not_answer_is_asked_three_times_and_then_left_alone() {
    let mut cache = cache();
    cache.resolve(ROUTER, A_CLIENT, at(0));
    cache.hold(ROUTER, A_CLIENT, 7, 100).unwrap();
    for second in 0..3 {
        assert_eq!(poll(&mut cache, at(second)).0.len(), 1, "second {second}");
        assert_eq!(poll(&mut cache, at(second)).0.len(), 0);
        assert_eq!(cache.next_wakeup(), Some(at(second + 1)));
    }
    assert_eq!(poll(&mut cache, at(3)), (vec![], vec![7]));
    assert_eq!(cache.resolve(ROUTER, A_CLIENT, at(7)), Resolution::Failed);
    assert_eq!(answer(&mut cache, ROUTER_MAC, at(7)), Err(Ignored::Unsolicited));
    assert_eq!(cache.next_wakeup(), Some(at(8)));
    poll(&mut cache, at(8));
    assert_eq!(cache.next_wakeup(), None);
    assert_eq!(cache.resolve(ROUTER, A_CLIENT, at(8)), Resolution::Pending);
}

#[test]
fn to_ask_whether_a_neighbour_has_failed_asks_nobody_and_keeps_nothing() {
    let mut cache = cache();
    assert!(!cache.has_failed(ROUTER));
    assert_eq!(cache.next_wakeup(), None);
    cache.resolve(ROUTER, A_CLIENT, at(0));
    for second in 0..4 {
        assert!(!cache.has_failed(ROUTER), "it may answer yet");
        poll(&mut cache, at(second));
    }
    let other = Ipv4Addr::new(192, 0, 2, 2);
    cache.resolve(other, A_CLIENT, at(3));
    assert_eq!((cache.has_failed(ROUTER), cache.has_failed(other)), (true, false));
    poll(&mut cache, at(8));
    assert!(!cache.has_failed(ROUTER), "it is asked anew");

    let mut cache = learnt();
    assert!(!cache.has_failed(ROUTER));
    cache.reset(link());
    assert!(!cache.has_failed(ROUTER));
}

#[test]
fn nobody_plants_an_address_unasked() {
    let mut cache = cache();
    assert_eq!(answer(&mut cache, OTHER_MAC, at(0)), Err(Ignored::Unsolicited));
    cache.resolve(ROUTER, A_CLIENT, at(0));
    // No request has left yet.
    assert_eq!(answer(&mut cache, OTHER_MAC, at(0)), Err(Ignored::Unsolicited));

    let mut cache = learnt();
    assert_eq!(answer(&mut cache, OTHER_MAC, at(1)), Err(Ignored::Unsolicited));
    assert_eq!(cache.resolve(ROUTER, A_CLIENT, at(1)), Resolution::Known(ROUTER_MAC));
}

#[test]
fn a_neighbour_that_is_said_to_have_moved_is_asked_where_it_was_and_then_everywhere() {
    let announcement = |mac| reply(ROUTER, mac, ROUTER, mac);
    // It was replaced: nobody answers at the old address.
    let mut cache = learnt();
    assert_eq!(cache.receive(&announcement(OTHER_MAC), at(10)), Err(Ignored::NoReply));
    assert_eq!(cache.next_wakeup(), Some(at(1)), "as it was");
    assert_eq!(poll(&mut cache, at(10)).0[0][..6], ROUTER_MAC);
    assert_eq!(answer(&mut cache, OTHER_MAC, at(10)), Err(Ignored::Unsolicited), "too easily said");
    assert_eq!(cache.resolve(ROUTER, A_CLIENT, at(10)), Resolution::Known(ROUTER_MAC));
    assert_eq!(poll(&mut cache, at(11)).0[0][..6], BROADCAST);
    assert_eq!(answer(&mut cache, OTHER_MAC, at(11)), Ok(ROUTER));
    assert_eq!(cache.resolve(ROUTER, A_CLIENT, at(11)), Resolution::Known(OTHER_MAC));

    // Nothing else was due for a minute: the doubt wakes the cache.
    let mut cache = learnt();
    poll(&mut cache, at(1));
    assert_eq!(cache.next_wakeup(), Some(at(60)));
    assert!(cache.receive(&announcement(OTHER_MAC), at(10)).is_err());
    assert_eq!(cache.next_wakeup(), Some(at(10)));

    // Said too soon after the last answer, it is asked a little later.
    let mut cache = learnt();
    assert!(cache.receive(&announcement(OTHER_MAC), at(0)).is_err());
    assert_eq!(poll(&mut cache, at(0)).0.len(), 0);
    assert_eq!(poll(&mut cache, at(1)).0[0][..6], ROUTER_MAC);

    // It is where it was: whoever says otherwise is not believed, and makes it be asked once a second at most.
    let mut cache = learnt();
    let mut asked = 0;
    for n in 10..1_000 {
        let now = at(0) + Duration::from_millis(10 * n);
        let heard = cache.receive(&announcement(OTHER_MAC), now);
        assert!(heard.is_err());
        assert!(answer(&mut cache, OTHER_MAC, now).is_err());
        for frame in poll(&mut cache, now).0 {
            assert_eq!(frame[..6], ROUTER_MAC);
            assert_eq!(answer(&mut cache, ROUTER_MAC, now), Ok(ROUTER));
            asked += 1;
        }
        assert_eq!(cache.resolve(ROUTER, A_CLIENT, now), Resolution::Known(ROUTER_MAC));
    }
    assert!((8..=10).contains(&asked), "{asked}");

    // A request of its own says as much as an announcement.
    let mut cache = learnt();
    let mut request = reply(ROUTER, OTHER_MAC, OURS, [0; 6]);
    request[arp::OPERATION + 1] = arp::REQUEST as u8;
    assert!(cache.receive(&request, at(10)).is_err());
    assert_eq!(poll(&mut cache, at(10)).0.len(), 1);
}

#[test]
fn malformed_replies_teach_nothing() {
    let mut cache = cache();
    cache.resolve(ROUTER, A_CLIENT, at(0));
    poll(&mut cache, at(0));
    let good = reply(ROUTER, ROUTER_MAC, OURS, OUR_MAC);
    for len in 0..good.len() {
        assert_eq!(cache.receive(&good[..len], at(0)), Err(Ignored::Malformed));
    }
    // EtherType, hardware, protocol, lengths, operation, group address, target.
    for position in [12, 14, 15, 16, 18, 19, 20, 21, 22, 38, 41] {
        let mut bad = good;
        bad[position] ^= 1;
        assert_eq!(cache.receive(&bad, at(0)), Err(Ignored::Malformed), "byte {position}");
    }
    assert_eq!(answer(&mut cache, [0; 6], at(0)), Err(Ignored::Malformed));
    let padded = [&good[..], &[0; 18]].concat();
    assert_eq!(cache.receive(&padded, at(0)), Ok(ROUTER));
}

#[test]
fn a_neighbour_in_use_is_confirmed_by_unicast_while_packets_go_on() {
    let mut cache = learnt();
    assert_eq!(cache.resolve(ROUTER, A_CLIENT, at(29)), Resolution::Known(ROUTER_MAC));
    assert_eq!(poll(&mut cache, at(29)).0.len(), 0);
    assert_eq!(cache.resolve(ROUTER, A_CLIENT, at(30)), Resolution::Known(ROUTER_MAC));
    let (frames, _) = poll(&mut cache, at(30));
    assert_eq!(frames.iter().map(|frame| &frame[..6]).collect::<Vec<_>>(), [ROUTER_MAC]);
    assert_eq!(answer(&mut cache, ROUTER_MAC, at(30)), Ok(ROUTER));
    assert_eq!(cache.resolve(ROUTER, A_CLIENT, at(59)), Resolution::Known(ROUTER_MAC));
    assert_eq!(poll(&mut cache, at(59)).0.len(), 0);
}

#[test]
fn who_answers_to_a_question_that_another_was_asked_is_not_believed() {
    // The router is there: however soon somebody else answers in its place, it stays, and is not asked more often for
    // it.
    let mut cache = learnt();
    for question in [30, 60, 90] {
        assert_eq!(cache.resolve(ROUTER, A_CLIENT, at(question)), Resolution::Known(ROUTER_MAC));
        assert_eq!(poll(&mut cache, at(question)).0.len(), 1);
        assert_eq!(answer(&mut cache, OTHER_MAC, at(question)), Err(Ignored::Unsolicited));
        assert_eq!(poll(&mut cache, at(question)).0.len(), 0);
        assert_eq!(answer(&mut cache, ROUTER_MAC, at(question)), Ok(ROUTER));
        assert_eq!(cache.resolve(ROUTER, A_CLIENT, at(question + 1)), Resolution::Known(ROUTER_MAC));
        assert_eq!(poll(&mut cache, at(question + 1)).0.len(), 0);
    }

    // It is not: the other one is found a second after it has said so, by a request to all.
    let mut cache = learnt();
    cache.resolve(ROUTER, A_CLIENT, at(30));
    assert_eq!(poll(&mut cache, at(30)).0.len(), 1);
    assert_eq!(answer(&mut cache, OTHER_MAC, at(30)), Err(Ignored::Unsolicited));
    assert_eq!(cache.next_wakeup(), Some(at(31)));
    assert_eq!(cache.resolve(ROUTER, A_CLIENT, at(30)), Resolution::Known(ROUTER_MAC));
    assert_eq!(poll(&mut cache, at(31)).0[0][..6], BROADCAST);
    assert_eq!(answer(&mut cache, OTHER_MAC, at(31)), Ok(ROUTER));
    assert_eq!(cache.resolve(ROUTER, A_CLIENT, at(31)), Resolution::Known(OTHER_MAC));
}

#[test]
fn a_neighbour_that_fell_silent_is_resolved_anew() {
    let mut cache = learnt();
    cache.resolve(ROUTER, A_CLIENT, at(30));
    let mut broadcasts = 0;
    for second in 30..36 {
        let (frames, _) = poll(&mut cache, at(second));
        assert_eq!(frames.len(), 1, "second {second}");
        broadcasts += usize::from(frames[0][..6] == BROADCAST);
        let expected = if second < 33 { Resolution::Known(ROUTER_MAC) } else { Resolution::Pending };
        assert_eq!(cache.resolve(ROUTER, A_CLIENT, at(second)), expected);
    }
    assert_eq!(broadcasts, 3);
    poll(&mut cache, at(36));
    assert_eq!(cache.resolve(ROUTER, A_CLIENT, at(36)), Resolution::Failed);
}

#[test]
fn an_unused_neighbour_is_forgotten_and_nothing_fires_any_more() {
    let mut cache = learnt();
    assert_eq!(cache.next_wakeup(), Some(at(1)));
    poll(&mut cache, at(1)); // the retry's deadline, which the answer has made moot
    assert_eq!(cache.next_wakeup(), Some(at(60)));
    cache.resolve(ROUTER, A_CLIENT, at(20));
    assert_eq!(poll(&mut cache, at(60)), (vec![], vec![]));
    assert_eq!(cache.next_wakeup(), Some(at(80)));
    poll(&mut cache, at(80));
    assert_eq!((cache.next_wakeup(), cache.entries.len()), (None, 0));
}

#[test]
fn nobody_takes_more_places_than_are_left_and_the_router_always_has_one() {
    let mut cache = cache();
    let mut next = (0..).map(|i| Ipv4Addr::from_bits(0xc633_6400 + i));
    let mut taken_by = |cache: &mut NeighborCache<u32>, asker| {
        let pending = |&neighbor: &Ipv4Addr| cache.resolve(neighbor, asker, at(0)) == Resolution::Pending;
        next.by_ref().take(2 * MAX_NEIGHBORS).take_while(pending).count()
    };
    let taken = [A_CLIENT, ANOTHER_CLIENT, None].map(|asker| taken_by(&mut cache, asker));
    assert_eq!(taken, [512, 256, 128], "half of what the one before has left");
    assert_eq!(taken_by(&mut cache, A_CLIENT), 0);
    for i in 4..20 {
        taken_by(&mut cache, Some(Ipv4Addr::new(10, 66, 77, i)));
    }
    assert_eq!(cache.entries.len(), MAX_NEIGHBORS);
    assert_eq!(taken_by(&mut cache, Some(Ipv4Addr::new(10, 66, 77, 20))), 0);
    assert_eq!(cache.resolve(ROUTER, A_CLIENT, at(0)), Resolution::Pending);
    // A neighbour that answers keeps its place, at its asker's expense; one that is given up does not.
    let answering = Ipv4Addr::from_bits(0xc633_6400);
    poll(&mut cache, at(0));
    assert_eq!(cache.receive(&reply(answering, OTHER_MAC, OURS, OUR_MAC), at(0)), Ok(answering));
    for second in 1..=8 {
        poll(&mut cache, at(second));
    }
    assert_eq!(cache.entries.keys().collect::<Vec<_>>(), [&answering]);
    assert_eq!([A_CLIENT, ANOTHER_CLIENT].map(|asker| taken_by(&mut cache, asker)), [511, 256]);
}

/// One client asks for addresses that nobody has, so many a second, for ten seconds, and a packet waits for each as
/// long as there is room. Of ten new neighbours of another meanwhile: for how many a packet waits at once. And how many
/// requests the link saw in the last second.
fn during_a_scan(per_second: u32) -> (usize, usize) {
    let (mut cache, mut let_in, mut requests) = (cache(), 0, 0);
    for ms in 0..10_000u32 {
        let now = at(0) + Duration::from_millis(ms.into());
        for scanned in ms * per_second / 1_000..(ms + 1) * per_second / 1_000 {
            let neighbor = Ipv4Addr::from_bits(0xc612_0000 + scanned);
            cache.resolve(neighbor, A_CLIENT, now);
            while cache.hold(neighbor, A_CLIENT, 1, 1_400).is_ok() {}
        }
        if ms % 1_000 == 999 {
            let neighbor = Ipv4Addr::new(192, 0, 2, 20 + (ms / 1_000) as u8);
            cache.resolve(neighbor, ANOTHER_CLIENT, now);
            let_in += usize::from(cache.hold(neighbor, ANOTHER_CLIENT, 2, 1_400).is_ok());
            poll(&mut cache, now);
            let known = cache.receive(&reply(neighbor, OTHER_MAC, OURS, OUR_MAC), now);
            assert_eq!(known.is_ok(), cache.entries.contains_key(&neighbor));
        }
        let asked = poll(&mut cache, now).0.len();
        requests += if ms < 9_000 { 0 } else { asked };
        assert!(cache.entries.len() <= MAX_NEIGHBORS);
    }
    (let_in, requests)
}

#[test]
fn a_client_that_scans_the_link_does_not_keep_the_neighbours_of_others_out() {
    for per_second in [10, 143, 700, 5_000, 100_000] {
        let (let_in, requests) = during_a_scan(per_second);
        assert_eq!(let_in, 10, "{per_second} addresses a second");
        assert!(requests <= MAX_NEIGHBORS, "{requests} requests a second");
    }
}

#[test]
fn where_places_are_wanted_a_neighbour_is_asked_once_but_the_router_as_often_as_ever() {
    let mut cache = cache();
    let neighbor = Ipv4Addr::new(192, 0, 2, 20);
    for (packet, neighbor) in [(1, neighbor), (2, ROUTER)] {
        cache.resolve(neighbor, A_CLIENT, at(0));
        cache.hold(neighbor, A_CLIENT, packet, 100).unwrap();
    }
    for i in 0..CROWDED as u32 {
        cache.resolve(Ipv4Addr::from(0xc633_6400 + i), A_CLIENT, at(0));
    }
    assert_eq!(poll(&mut cache, at(0)).0.len(), CROWDED + 2);
    let (frames, dead) = poll(&mut cache, at(1));
    assert_eq!((frames.len(), dead), (1, vec![1]), "the router is asked again");
    assert_eq!(
        cache.resolve(neighbor, A_CLIENT, at(1)),
        Resolution::Pending,
        "forgotten, and so asked for anew"
    );
    assert_eq!(cache.resolve(ROUTER, A_CLIENT, at(1)), Resolution::Pending);
    // There is room again, and all have their three requests.
    assert_eq!((1..4).map(|second| poll(&mut cache, at(second)).0.len()).sum::<usize>(), 3 + 1);
    assert_eq!(cache.resolve(ROUTER, A_CLIENT, at(3)), Resolution::Failed);
}

#[test]
fn held_packets_are_bounded_per_neighbour_per_client_and_in_total() {
    // Short ones reach the bound of packets, long ones that of bytes; the last one may exceed it.
    for (bytes, each, half) in [(100, 128, 512), (60_000, 5, 35)] {
        let mut cache = cache();
        let held_for = |cache: &mut NeighborCache<u32>, asker, third| {
            let neighbors = (0..32).map(|i| Ipv4Addr::new(198, 51, third, i));
            let held = neighbors.map(|neighbor| {
                cache.resolve(neighbor, asker, at(0));
                (0..200).filter(|&packet| cache.hold(neighbor, asker, packet, bytes).is_ok()).count()
            });
            held.collect::<Vec<_>>()
        };
        let held = held_for(&mut cache, A_CLIENT, 100);
        assert_eq!(
            (held[0], held.iter().sum::<usize>()),
            (each, half),
            "a client takes as much as it leaves"
        );
        assert!(held_for(&mut cache, ANOTHER_CLIENT, 101).iter().sum::<usize>() >= half / 2 - 1);
        for i in 4..20 {
            held_for(&mut cache, Some(Ipv4Addr::new(10, 66, 77, i)), 98 + i);
        }
        let total = cache.shares.held();
        assert!(total.packets <= MAX_HELD.packets && total.bytes < MAX_HELD.bytes + bytes, "{total:?}");
        poll(&mut cache, at(0)); // the requests
        let first = Ipv4Addr::new(198, 51, 100, 0);
        assert_eq!(cache.receive(&reply(first, OTHER_MAC, OURS, OUR_MAC), at(0)), Ok(first));
        assert_eq!(cache.drain(first).count(), each);
        assert_eq!(cache.shares.held().packets, total.packets - each);
        for second in 1..=4 {
            poll(&mut cache, at(second));
        }
        assert_eq!(cache.shares.held(), Amount::default(), "nobody answered");
        assert_eq!(held_for(&mut cache, A_CLIENT, 200)[0], each, "there is room again");
    }
}

#[test]
fn what_waits_comes_back_when_the_link_changes() {
    let mut cache = cache();
    for i in 0..32 {
        let neighbor = Ipv4Addr::new(198, 51, 100, i);
        cache.resolve(neighbor, A_CLIENT, at(0));
        while cache.hold(neighbor, A_CLIENT, 1, 100).is_ok() {}
    }
    assert_eq!(cache.reset(link()).len(), MAX_HELD.packets / 2);
    assert_eq!(cache.shares.held(), Amount::default());
}
