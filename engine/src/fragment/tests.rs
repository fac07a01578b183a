use std::net::Ipv4Addr;
use std::time::Duration;

use proptest::prelude::*;

use super::fragmentation::Fragments;
use super::reassembly::*;
use crate::clock::Timestamp;
use crate::drop_reason::DropReason;
use crate::wire::ipv4::{protocol, u16_at};
use crate::wire::test_packets::{DF, MF, SERVER, Template, assert_valid, mend_header_checksum, payload};
use crate::wire::{Ipv4Packet, Offload};

/// A protocol whose header nobody checks.
const GRE: u8 = 47;
const START: Timestamp = Timestamp::from_secs(100);

fn cut(packet: &[u8], mtu: usize) -> Vec<Vec<u8>> {
    let mut fragments = Fragments::new(packet, mtu).unwrap();
    let mut out = vec![0; mtu];
    let mut all = Vec::new();
    while let Some(len) = fragments.next_into(&mut out) {
        all.push(out[..len].to_vec());
    }
    all
}

fn push_at(
    reassembly: &mut Reassembly,
    fragment: &[u8],
    now: Timestamp,
) -> Result<Option<Vec<u8>>, DropReason> {
    let mut fragment = fragment.to_vec();
    reassembly.push(&Ipv4Packet::parse(&mut fragment, 0, Offload::NONE).unwrap(), now)
}

fn push(reassembly: &mut Reassembly, fragment: &[u8]) -> Result<Option<Vec<u8>>, DropReason> {
    push_at(reassembly, fragment, START)
}

/// What comes of these fragments, each in turn.
fn outcomes(fragments: &[Vec<u8>]) -> Vec<Result<Option<Vec<u8>>, DropReason>> {
    let mut reassembly = Reassembly::default();
    fragments.iter().map(|fragment| push(&mut reassembly, fragment)).collect()
}

/// A fragment of its own: offset in units of 8 bytes.
fn fragment(flags: u16, offset: u16, bytes: &[u8]) -> Vec<u8> {
    Template { fragment: flags | offset, ..Template::default() }.ip(protocol::UDP, bytes)
}

/// The first fragment of a datagram of its own.
fn lone(source: u32, identification: u16, len: usize) -> Vec<u8> {
    let template = Template { fragment: MF, source: source.into(), identification, ..Template::default() };
    template.ip(protocol::UDP, &payload(len))
}

const HELD: Result<Option<Vec<u8>>, DropReason> = Ok(None);
const BAD: Result<Option<Vec<u8>>, DropReason> = Err(DropReason::BadFragment);

#[test]
fn a_datagram_is_cut_into_ordered_fragments_that_fill_the_mtu() {
    let packet = Template { fragment: 0, ..Template::default() }.udp(&payload(1000));
    let fragments = cut(&packet, 500);
    assert_eq!(fragments.iter().map(Vec::len).collect::<Vec<_>>(), [500, 500, 68]);
    assert_eq!(fragments.iter().map(|f| u16_at(f, 6)).collect::<Vec<_>>(), [MF, MF | 60, 120]);
    for fragment in &fragments {
        assert_valid(fragment);
        assert_eq!(u16_at(fragment, 4), u16_at(&packet, 4));
    }
    let rebuilt: Vec<u8> = fragments.iter().flat_map(|f| f[20..].to_vec()).collect();
    assert_eq!(rebuilt, packet[20..]);
}

#[test]
fn a_packet_that_fits_is_left_as_it_is() {
    let packet = Template::default().udp(&payload(472));
    assert_eq!(cut(&packet, 500), [packet]);
}

#[test]
fn a_fragment_is_cut_further() {
    for (flags, last) in [(MF, MF | 22), (0, 22)] {
        let fragments = cut(&fragment(flags, 10, &payload(120)), 68);
        assert_eq!(fragments.iter().map(|f| u16_at(f, 6)).collect::<Vec<_>>(), [MF | 10, MF | 16, last]);
    }
}

#[test]
fn later_fragments_carry_only_the_options_that_are_to_be_copied() {
    // Record route (not copied), no-operation, router alert (copied), end of list.
    let ip_options = vec![7, 7, 4, 0, 0, 0, 0, 1, 0x94, 4, 0, 0, 0, 0, 0, 0];
    let fragments = cut(&Template { ip_options, fragment: 0, ..Template::default() }.udp(&payload(300)), 100);
    assert_eq!(fragments[0][0], 0x49);
    for later in &fragments[1..] {
        assert_eq!(later[0], 0x46);
        assert_eq!(later[20..24], [0x94, 4, 0, 0]);
        assert_valid(later);
    }
    assert_eq!(fragments[1].len(), 24 + 72);
}

#[test]
fn copied_options_are_padded_to_whole_words() {
    let ip_options = vec![0x88, 3, 9, 1];
    let fragments = cut(&Template { ip_options, fragment: 0, ..Template::default() }.udp(&payload(300)), 100);
    assert_eq!(fragments[1][20..24], [0x88, 3, 9, 0]);
}

#[test]
fn what_cannot_be_fragmented_is_refused() {
    let packet = Template::default().udp(&payload(100));
    let refused = |packet: &[u8], mtu| Fragments::new(packet, mtu).unwrap_err();
    assert_eq!(refused(&packet, 27), DropReason::TooBig);
    assert_eq!(refused(&packet[..100], 68), DropReason::Truncated);
    assert_eq!(refused(&[], 68), DropReason::Truncated);
    assert_eq!(refused(&[0x60; 40], 68), DropReason::BadIpHeader);
    assert_eq!(refused(&fragment(MF, 8191, &payload(80)), 68), DropReason::BadFragment);
}

#[test]
fn a_datagram_is_whole_when_its_last_missing_fragment_arrives() {
    let packet = Template { fragment: 0, ..Template::default() }.udp(&payload(150));
    let [a, b, c] = cut(&packet, 80).try_into().unwrap();
    for order in [[&a, &b, &c], [&c, &b, &a], [&b, &c, &a], [&c, &a, &b]] {
        let mut reassembly = Reassembly::default();
        assert_eq!(push(&mut reassembly, order[0]), HELD);
        assert_eq!(push(&mut reassembly, order[1]), HELD);
        assert_eq!(push(&mut reassembly, order[2]), Ok(Some(packet.clone())));
        assert!(reassembly.is_empty());
        assert_eq!(reassembly.next_expiry(), None);
    }
}

#[test]
fn the_options_are_those_of_the_first_fragment_and_df_is_forgotten() {
    let ip_options = vec![7, 7, 4, 0, 0, 0, 0, 0];
    let template = Template { ip_options, fragment: DF, ..Template::default() };
    let mut fragments = cut(&template.udp(&payload(150)), 80);
    fragments.reverse();
    let whole = Template { fragment: 0, ..template }.udp(&payload(150));
    assert_eq!(outcomes(&fragments).pop(), Some(Ok(Some(whole))));
}

#[test]
fn a_packet_that_is_no_fragment_comes_back_as_it_is() {
    let packet = Template::default().udp(&payload(10));
    assert_eq!(outcomes(std::slice::from_ref(&packet)), [Ok(Some(packet))]);
}

#[test]
fn fragments_of_different_datagrams_never_mix() {
    let template = Template { fragment: MF, ..Template::default() };
    let others: [Template; 4] = [
        Template { source: SERVER, ..template.clone() },
        Template { destination: Ipv4Addr::new(192, 0, 2, 1), ..template.clone() },
        Template { identification: 1, ..template.clone() },
        template.clone(),
    ];
    let last = fragment(0, 1, &payload(8));
    for other in &others[..3] {
        assert_eq!(outcomes(&[other.ip(protocol::UDP, &payload(8)), last.clone()]), [HELD, HELD]);
    }
    let another_protocol = others[3].ip(protocol::ICMP, &payload(8));
    assert_eq!(outcomes(&[another_protocol, last]), [HELD, HELD]);
}

#[test]
fn overlapping_fragments_drop_the_whole_datagram_and_what_is_still_to_come() {
    let overlaps = [
        (fragment(MF, 0, &payload(16)), fragment(MF, 1, &payload(8))),
        (fragment(MF, 1, &payload(16)), fragment(MF, 0, &payload(16))),
        (fragment(MF, 1, &payload(16)), fragment(MF, 0, &payload(40))),
        (fragment(MF, 0, &payload(16)), fragment(MF, 0, &payload(8))),
        (fragment(MF, 0, &payload(16)), fragment(MF, 0, &[0; 16])),
        (fragment(0, 2, &payload(8)), fragment(0, 3, &payload(8))), // a second end
        (fragment(0, 2, &payload(8)), fragment(MF, 4, &payload(8))), // behind the end
        (fragment(MF, 4, &payload(8)), fragment(0, 2, &payload(8))), // an end before known data
        (fragment(MF, 4, &payload(8)), fragment(0, 4, &payload(8))), // the same bytes, but now the last
    ];
    for (first, second) in overlaps {
        let mut reassembly = Reassembly::default();
        assert_eq!(push(&mut reassembly, &first), HELD);
        assert_eq!(push(&mut reassembly, &second), BAD);
        assert_eq!(reassembly.take_discarded().get(DropReason::BadFragment), 1);
        assert_eq!(push(&mut reassembly, &fragment(MF, 20, &payload(8))), BAD);
        assert_eq!(reassembly.expire(START + TIMEOUT), 0);
        assert_eq!(push(&mut reassembly, &first), HELD, "the identification is free again");
    }
}

#[test]
fn a_fragment_that_arrives_twice_changes_nothing() {
    let packet = Template { fragment: 0, ..Template::default() }.udp(&payload(100));
    let [a, b] = cut(&packet, 80).try_into().unwrap();
    let outcomes = outcomes(&[a.clone(), a.clone(), a, b]);
    assert_eq!(outcomes, [HELD, HELD, HELD, Ok(Some(packet))]);
}

#[test]
fn fragments_that_are_wrong_by_themselves_are_refused_and_kept_by_nobody() {
    for bad in [
        fragment(MF, 0, &payload(15)),  // not a multiple of 8
        fragment(MF, 5, &[]),           // nothing in it
        fragment(0, 8191, &payload(8)), // beyond 65,535 bytes
        fragment(MF, 8180, &payload(1000)),
    ] {
        let mut reassembly = Reassembly::default();
        assert_eq!(push(&mut reassembly, &bad), BAD);
        assert!(reassembly.is_empty());
    }
}

#[test]
fn a_datagram_that_only_its_first_header_makes_too_long_is_refused() {
    let first = Template { fragment: MF, ip_options: vec![1; 40], ..Template::default() };
    let first = first.ip(protocol::UDP, &payload(65_000));
    assert_eq!(outcomes(&[fragment(0, 8125, &payload(510)), first]), [HELD, BAD]);
}

#[test]
fn congestion_is_remembered_and_its_denial_refused() {
    let with_ecn = |ecn: [u8; 2]| {
        let mut fragments = cut(&Template { fragment: 0, ..Template::default() }.udp(&payload(100)), 80);
        for (fragment, ecn) in fragments.iter_mut().zip(ecn) {
            fragment[1] = 0xb8 | ecn;
            mend_header_checksum(fragment);
        }
        outcomes(&fragments).pop().unwrap().map(|packet| packet.unwrap()[1])
    };
    assert_eq!(with_ecn([2, 3]), Ok(0xb8 | 3));
    assert_eq!(with_ecn([3, 2]), Ok(0xb8 | 3));
    assert_eq!(with_ecn([2, 2]), Ok(0xb8 | 2));
    assert_eq!(with_ecn([0, 3]), Err(DropReason::BadFragment));
}

#[test]
fn large_datagrams_in_small_fragments_become_whole() {
    for (len, mtu) in [(8 * 1024, 92), (65_507, 540)] {
        let packet = Template { fragment: 0, ..Template::default() }.udp(&payload(len));
        let fragments = cut(&packet, mtu);
        assert!(fragments.len() <= MAX_FRAGMENTS, "{}", fragments.len());
        assert_eq!(outcomes(&fragments).pop(), Some(Ok(Some(packet))));
    }
}

#[test]
fn a_datagram_in_too_many_fragments_is_refused() {
    let mut reassembly = Reassembly::default();
    for offset in 0..MAX_FRAGMENTS as u16 {
        assert_eq!(push(&mut reassembly, &fragment(MF, offset, &payload(8))), HELD);
    }
    let one_more = fragment(MF, MAX_FRAGMENTS as u16, &payload(8));
    assert_eq!(push(&mut reassembly, &one_more), Err(DropReason::FragmentLimit));
    assert_eq!(reassembly.take_discarded().get(DropReason::FragmentLimit), MAX_FRAGMENTS as u64);
}

#[test]
fn a_datagram_expires_15_seconds_after_its_first_fragment() {
    let mut reassembly = Reassembly::default();
    push(&mut reassembly, &fragment(MF, 4, &payload(8))).unwrap();
    push_at(&mut reassembly, &fragment(MF, 0, &payload(8)), START + Duration::from_secs(10)).unwrap();
    assert_eq!(reassembly.next_expiry(), Some(START + TIMEOUT));
    assert_eq!(reassembly.expire(START + TIMEOUT - Duration::from_nanos(1)), 0);
    assert_eq!(reassembly.expire(START + TIMEOUT), 2);
    assert!(reassembly.is_empty());
    assert_eq!(reassembly.next_expiry(), None);
}

#[test]
fn the_next_expiry_is_that_of_the_oldest_datagram_that_is_left() {
    let mut reassembly = Reassembly::default();
    push(&mut reassembly, &lone(1 << 24, 1, 8)).unwrap();
    push_at(&mut reassembly, &lone(1 << 24, 2, 8), START + Duration::from_secs(3)).unwrap();
    assert_eq!(reassembly.expire(START + TIMEOUT), 1);
    assert_eq!(reassembly.next_expiry(), Some(START + Duration::from_secs(3) + TIMEOUT));
}

#[test]
fn a_timeout_hands_out_the_first_fragment_if_it_had_arrived() {
    let mut reassembly = Reassembly::default();
    let first = lone(1 << 24, 1, 48);
    push(&mut reassembly, &first).unwrap();
    push(&mut reassembly, &fragment(MF, 4, &payload(8))).unwrap();
    let mut handed_out = Vec::new();
    assert_eq!(reassembly.expire_with(START + TIMEOUT, |first| handed_out.push(first.to_vec())), 2);
    assert_eq!(handed_out, [first]);
}

#[test]
fn one_flooding_source_pushes_out_its_own_datagrams_only() {
    let mut reassembly = Reassembly::default();
    let (flooder, victim) = (0x0a00_0001, 0x0a00_0002);
    push(&mut reassembly, &lone(victim, 1, 8)).unwrap();
    for identification in 0..1000 {
        let now = START + Duration::from_millis(identification);
        push_at(&mut reassembly, &lone(flooder, identification as u16, 8), now).unwrap();
    }
    assert_eq!(reassembly.len(), 1 + MAX_DATAGRAMS_PER_SOURCE);
    let dropped = reassembly.take_discarded().get(DropReason::FragmentLimit);
    assert_eq!(dropped, 1000 - MAX_DATAGRAMS_PER_SOURCE as u64);
    let rest = |source: u32, identification| {
        Template { fragment: 1, source: source.into(), identification, ..Template::default() }
            .ip(protocol::UDP, &payload(8))
    };
    assert!(push(&mut reassembly, &rest(victim, 1)).unwrap().is_some());
    assert!(push(&mut reassembly, &rest(flooder, 999)).unwrap().is_some(), "the newest are kept");
    assert!(push(&mut reassembly, &rest(flooder, 0)).unwrap().is_none(), "the oldest went");
}

#[test]
fn many_sources_together_are_bounded_and_the_newcomer_is_not_kept_out() {
    let mut reassembly = Reassembly::default();
    let sources = (MAX_DATAGRAMS / MAX_DATAGRAMS_PER_SOURCE) as u32;
    for source in 0..sources {
        for identification in 0..MAX_DATAGRAMS_PER_SOURCE {
            push(&mut reassembly, &lone(0x0a00_0001 + source, identification as u16, 8)).unwrap();
        }
    }
    for identification in 0..8 {
        assert_eq!(push(&mut reassembly, &lone(0x0b00_0001, identification, 8)), HELD);
    }
    assert_eq!(reassembly.take_discarded().get(DropReason::FragmentLimit), 8, "of those with a full share");
    assert_eq!(reassembly.len(), MAX_DATAGRAMS);
    assert_eq!(reassembly.expire(START + TIMEOUT), MAX_DATAGRAMS as u64);
}

#[test]
fn memory_is_bounded_by_source_and_in_all() {
    let large = 60_000;
    let per_source = MAX_BYTES_PER_SOURCE / (large + 64);
    let mut reassembly = Reassembly::default();
    for identification in 0..20 {
        assert_eq!(push(&mut reassembly, &lone(1 << 24, identification, large)), HELD);
    }
    assert_eq!(reassembly.take_discarded().get(DropReason::FragmentLimit), 20 - per_source as u64);

    let mut kept = 0;
    for source in 2..8 {
        for identification in 0..per_source as u16 {
            kept += usize::from(push(&mut reassembly, &lone(source << 24, identification, large)) == HELD);
        }
    }
    kept -= reassembly.take_discarded().get(DropReason::FragmentLimit) as usize;
    assert_eq!(kept + per_source, MAX_BYTES / (large + 64));
    push(&mut reassembly, &lone(9 << 24, 1, 8)).unwrap();
    let template = Template { source: (9 << 24).into(), identification: 1, ..Template::default() };
    let next = Template { fragment: MF | 1, ..template }.ip(protocol::UDP, &payload(large));
    assert_eq!(push(&mut reassembly, &next), HELD, "who holds little is not kept out by those who hold much");
    assert_eq!(reassembly.take_discarded().get(DropReason::FragmentLimit), 1, "but one of them makes room");
    reassembly.expire(START + TIMEOUT);
    assert_eq!(push(&mut reassembly, &lone(9 << 24, 1, large)), HELD, "time gives the memory back");
}

#[test]
fn a_flood_from_forged_sources_keeps_nobody_out() {
    let mut reassembly = Reassembly::default();
    let mut now = START;
    let mut flood = |reassembly: &mut Reassembly, count: u32| {
        for _ in 0..count {
            now = now + Duration::from_millis(1);
            let source = 0x0a00_0000 + now.since(START).as_millis() as u32;
            assert_eq!(push_at(reassembly, &lone(source, 1, 8), now), HELD);
        }
        now
    };
    flood(&mut reassembly, MAX_DATAGRAMS as u32);
    let honest =
        Template { source: (9 << 24).into(), fragment: 0, ..Template::default() }.udp(&payload(3_000));
    let fragments = cut(&honest, 1_500);
    let (last, before) = fragments.split_last().unwrap();
    for fragment in before {
        let now = flood(&mut reassembly, 100); // which goes on, and pushes out its own oldest
        assert_eq!(push_at(&mut reassembly, fragment, now), HELD);
    }
    let now = flood(&mut reassembly, 50);
    assert!(push_at(&mut reassembly, last, now).is_ok_and(|datagram| datagram == Some(honest)));
}

proptest! {
    #[test]
    fn fragments_in_any_order_become_the_datagram(
        len in 1usize..9000, mtu in 100usize..1500, again in 100usize..1500, ip_options in 0usize..10,
        copied in any::<bool>(), seed in any::<u64>()
    ) {
        let mut options = vec![1; 4 * ip_options];
        if let Some(router_alert) = options.get_mut(..4) {
            router_alert.copy_from_slice(&[if copied { 0x94 } else { 0x14 }, 4, 0, 0]);
        }
        let packet = Template { fragment: 0, ip_options: options, ..Template::default() }.udp(&payload(len));
        let mut fragments: Vec<_> = cut(&packet, mtu).iter().flat_map(|fragment| cut(fragment, again)).collect();
        prop_assume!(fragments.len() <= MAX_FRAGMENTS);
        prop_assert!(fragments.iter().all(|fragment| fragment.len() <= mtu.min(again)));
        shuffle(&mut fragments, seed);
        let outcomes = outcomes(&fragments);
        let (last, before) = outcomes.split_last().unwrap();
        prop_assert!(before.iter().all(|outcome| *outcome == HELD));
        prop_assert_eq!(last, &Ok(Some(packet)));
    }

    #[test]
    fn arbitrary_fragments_never_panic_and_leave_nothing_behind(
        fragments in proptest::collection::vec((0u16..3, any::<bool>(), 0u16..12, 0usize..40, any::<u8>()), 0..80)
    ) {
        let mut reassembly = Reassembly::default();
        for (identification, more, offset, len, ecn) in fragments {
            let len = if more { len * 8 } else { len };
            let fragment = Template {
                identification, tos: ecn, fragment: if more { MF } else { 0 } | offset, ..Template::default()
            };
            if let Ok(Some(packet)) = push(&mut reassembly, &fragment.ip(GRE, &payload(len))) {
                assert_eq!(usize::from(u16_at(&packet, 2)), packet.len());
            }
        }
        reassembly.expire(START + TIMEOUT);
        prop_assert!(reassembly.holds_nothing());
    }

    #[test]
    fn arbitrary_bytes_are_cut_without_a_panic(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..300), mtu in 0usize..200, out_len in 0usize..200
    ) {
        if bytes.len() > 20 {
            bytes[0] = 0x45 + (bytes[0] & 7);
            bytes[2] = 0;
        }
        if let Ok(mut fragments) = Fragments::new(&bytes, mtu) {
            let mut out = vec![0; out_len];
            while fragments.next_into(&mut out).is_some() {}
        }
    }
}

/// Fisher-Yates with a generator that is good enough for it.
fn shuffle(items: &mut [Vec<u8>], mut seed: u64) {
    for i in (1..items.len()).rev() {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        items.swap(i, (seed >> 33) as usize % (i + 1));
    }
}
