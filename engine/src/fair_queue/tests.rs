//! Packets are named by numbers, clients by letters.

use std::collections::HashMap;
use std::time::Duration;

use proptest::prelude::*;

use super::*;

const BOUNDS: Amount = Amount { packets: 1_000, bytes: 100 * QUANTUM };
const BULK: usize = 60_000;
const PING: usize = 84;

fn at(ms: u64) -> Timestamp {
    Timestamp::from_secs(10) + Duration::from_millis(ms)
}

fn none(packet: u32) {
    panic!("packet {packet} was dropped");
}

/// Everything that waits, in the order in which it is served.
fn served(queue: &mut FairQueue<char, u32>, now: Timestamp) -> Vec<u32> {
    std::iter::from_fn(|| queue.pop(now, none).map(|(packet, _)| packet)).collect()
}

#[test]
fn a_client_that_rarely_sends_overtakes_one_that_sends_much() {
    let mut queue = FairQueue::new(BOUNDS);
    for bulk in 0..20 {
        queue.push('a', bulk, BULK, at(0), none);
    }
    assert_eq!(queue.pop(at(0), none), Some((0, BULK)));
    assert_eq!(queue.pop(at(0), none), Some((1, BULK)));
    queue.push('b', 100, PING, at(1), none);
    assert_eq!(queue.pop(at(1), none), Some((100, PING)), "the ping is next, whatever was there before");
    assert_eq!(served(&mut queue, at(1)), (2..20).collect::<Vec<_>>());
}

#[test]
fn clients_that_both_send_much_share_the_bytes_equally() {
    for (a, b) in [(BULK, BULK), (1_400, BULK), (300, 1_400)] {
        let mut queue = FairQueue::new(Amount { packets: 10_000, bytes: usize::MAX });
        for n in 0..4_000 {
            queue.push('a', 2 * n, a, at(0), none);
        }
        for n in 0..4_000 {
            queue.push('b', 2 * n + 1, b, at(0), none);
        }
        let mut bytes = [0, 0];
        while bytes[0] + bytes[1] < 4_000 * a {
            let (packet, len) = queue.pop(at(0), none).unwrap();
            bytes[packet as usize % 2] += len;
        }
        assert!(bytes[0].abs_diff(bytes[1]) <= 2 * QUANTUM, "{a} and {b} bytes a packet: {bytes:?}");
    }
}

#[test]
fn a_client_that_comes_back_at_once_does_not_overtake_the_others_again() {
    let mut queue = FairQueue::new(BOUNDS);
    for bulk in 0..10 {
        queue.push('a', bulk, BULK, at(0), none);
    }
    let mut order = Vec::new();
    for back in 0..6 {
        queue.push('b', 100 + back, BULK, at(0), none);
        order.push(queue.pop(at(0), none).unwrap().0);
        order.push(queue.pop(at(0), none).unwrap().0);
    }
    let of_a = order.iter().filter(|&&packet| packet < 100).count();
    assert!((5..=7).contains(&of_a), "{order:?}");
}

#[test]
fn a_standing_queue_loses_heads_and_only_its_own() {
    let mut queue = FairQueue::new(BOUNDS);
    let (mut next, mut dropped, mut served_bulk) = (0, Vec::new(), 0);
    for ms in 0..1_000 {
        // A sends as much as is served, but ten packets have been there from the beginning: each waits for 10 ms.
        for _ in 0..if ms == 0 { 10 } else { 1 } {
            queue.push('a', next, BULK, at(ms), none);
            next += 1;
        }
        queue.push('b', 1_000_000, PING, at(ms), none);
        let mut bulk = 0;
        while bulk == 0 {
            let Some((packet, bytes)) = queue.pop(at(ms), |packet| dropped.push(packet)) else { break };
            bulk += usize::from(bytes == BULK);
            if bytes == BULK {
                assert!(dropped.iter().all(|&gone| gone < packet), "dropped from the head");
            }
        }
        served_bulk += bulk;
    }
    assert!((5..=12).contains(&dropped.len()), "{dropped:?}: until the wait was below 5 ms");
    assert!(dropped.iter().all(|&packet| packet < 1_000_000), "the ping's queue does not stand");
    assert!(served_bulk >= 995, "{served_bulk}: the queue never ran dry");
}

#[test]
fn a_packet_that_costs_more_than_its_bytes_is_paid_for_once_it_was_served() {
    let mut queue = FairQueue::new(BOUNDS);
    for n in 0..900 {
        queue.push('h', 1_000 + n, 148, at(0), none);
    }
    for bulk in 0..20 {
        queue.push('a', bulk, BULK, at(0), none);
    }
    assert_eq!(queue.waiting().bytes, 900 * LEAST_COST + 20 * BULK, "its memory is what it was");
    let mut between = vec![0];
    while let Some((packet, _)) = queue.pop(at(0), none) {
        if packet >= 1_000 {
            queue.charge(QUANTUM / 4);
            *between.last_mut().unwrap() += 1;
        } else if packet < 19 {
            between.push(0);
        }
    }
    assert!(between[1..19].iter().all(|&handshakes| handshakes <= 4), "{between:?}");
    queue.charge(QUANTUM); // nobody's: the queue has ended
    queue.push('b', 1, BULK, at(1), none);
    queue.charge(QUANTUM);
    assert_eq!(queue.pop(at(1), none), Some((1, BULK)));
}

#[test]
fn when_too_much_waits_the_longest_queue_is_shortened() {
    let mut queue = FairQueue::new(BOUNDS);
    let mut dropped = Vec::new();
    queue.push('b', 1_000_000, PING, at(0), |packet| dropped.push(packet));
    for bulk in 0..300 {
        queue.push('a', bulk, BULK, at(0), |packet| dropped.push(packet));
    }
    let room = (BOUNDS.bytes - PING) / BULK;
    assert_eq!(dropped, (0..300 - room as u32).collect::<Vec<_>>(), "its oldest packets went");
    assert_eq!(queue.pop(at(0), none), Some((1_000_000, PING)));
}

#[test]
fn nothing_is_remembered_of_clients_when_nothing_waits() {
    let mut queue = FairQueue::new(BOUNDS);
    for client in 'a'..='z' {
        queue.push(client, 1, PING, at(0), none);
    }
    assert_eq!(served(&mut queue, at(0)).len(), 26);
    assert!(queue.queues.is_empty() && queue.by_key.is_empty());
    assert!(queue.new.is_empty() && queue.old.is_empty());
    assert!(queue.spare.len() <= SPARE_QUEUES);
}

#[derive(Clone, Debug)]
enum Step {
    Push { client: char, bytes: usize },
    Pop,
    Pass { ms: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (prop::char::range('a', 'f'), prop_oneof![Just(BULK), 0..2_000usize, Just(0)])
            .prop_map(|(client, bytes)| Step::Push { client, bytes }),
        3 => Just(Step::Pop),
        1 => (0..50u64).prop_map(|ms| Step::Pass { ms }),
    ]
}

#[test]
fn empty_packets_have_their_price() {
    let mut queue = FairQueue::new(BOUNDS);
    for n in 0..900 {
        queue.push('?', n, 0, at(0), none);
    }
    queue.push('b', 5_000, PING, at(0), none);
    let place = served(&mut queue, at(0)).iter().position(|&packet| packet == 5_000).unwrap();
    assert!(place <= QUANTUM / LEAST_COST + 1, "the others have their turn, at place {place}");
}

#[test]
fn where_nothing_has_bytes_the_bound_holds_and_the_flood_pays_for_it() {
    let mut queue = FairQueue::new(BOUNDS);
    queue.push('?', 0, 0, at(0), none);
    queue.push('b', 5_000, PING, at(0), none);
    for n in 1..3_000 {
        queue.push('?', n, 0, at(0), |packet| assert_ne!(packet, 5_000, "it waits in another queue"));
        assert!(queue.waiting().packets <= BOUNDS.packets);
    }
}

#[test]
fn a_flood_of_tiny_packets_costs_nobody_a_superpacket() {
    let mut queue = FairQueue::new(Amount { packets: 8_192, bytes: 128 * QUANTUM });
    for n in 0..8_188 {
        queue.push('?', n, 28, at(0), none);
    }
    for n in 0..8 {
        queue.push('a', 100_000 + n, BULK, at(0), |packet| assert!(packet < 100_000));
    }
}

proptest! {
    #[test]
    fn whatever_comes_the_bounds_hold_nothing_is_lost_and_each_clients_packets_keep_their_order(
        steps in prop::collection::vec(step(), 1..400)
    ) {
        let bounds = Amount { packets: 40, bytes: 12 * QUANTUM };
        let mut queue = FairQueue::new(bounds);
        let (mut clients, mut now, mut gone) = (Vec::new(), at(0), Vec::new());
        for step in steps {
            match step {
                Step::Push { client, bytes } => {
                    let packet = clients.len();
                    clients.push(client);
                    queue.push(client, packet, bytes, now, |packet| gone.push(packet));
                }
                Step::Pop => {
                    let next = queue.pop(now, |packet| gone.push(packet));
                    gone.extend(next.map(|(packet, _)| packet));
                }
                Step::Pass { ms } => now = now + Duration::from_millis(ms),
            }
            prop_assert!(queue.packets <= bounds.packets && queue.cost <= bounds.bytes);
            prop_assert_eq!(queue.is_empty(), queue.packets == 0);
            let sums = queue.queues.iter().fold((0, 0), |(packets, bytes), (_, queue)| {
                (packets + queue.packets.len(), bytes + queue.cost)
            });
            prop_assert_eq!(sums, (queue.packets, queue.cost));
            prop_assert_eq!(queue.new.len() + queue.old.len(), queue.queues.len());
        }
        while let Some((packet, _)) = queue.pop(now, |packet| gone.push(packet)) {
            gone.push(packet);
        }
        prop_assert_eq!(gone.len(), clients.len(), "each packet was served or dropped, once");
        let mut last = HashMap::new();
        for packet in gone {
            let before = last.insert(clients[packet], packet);
            prop_assert!(before.is_none_or(|before| before < packet));
        }
    }
}
