//! Congestion that a router between client and gateway marks on the outer headers, rather than dropping what it marks
//! (RFC 3168): it reaches the two ends inside (RFC 6040).

use tidegate_engine::drop_reason::DropReason;
use tidegate_engine::wire::Ecn;

use super::flow::{Flow, HTTPS};
use super::packets::*;
use super::world::*;

const NOT_ECT: u8 = Ecn::NotEct as u8;
const ECT_0: u8 = Ecn::Ect0 as u8;
const ECT_1: u8 = Ecn::Ect1 as u8;
const CE: u8 = Ecn::Ce as u8;
/// Expedited forwarding (RFC 3246), which a mark leaves as it is.
const EF: u8 = 0xb8;

#[test]
fn a_mark_of_the_outer_header_reaches_the_end_inside_on_both_ways() {
    for (shards, misdirected_to) in [(1, None), (2, None), (2, Some(0)), (2, Some(1))] {
        let mut world = World::with_shards(shards).connected();
        world.all_datagrams_to = misdirected_to;
        for client in 0..3 {
            let mut flow = Flow::open(&mut world, client, 50_000, HTTPS);
            for (outer, inner, expected) in [
                (Ecn::Ce, ECT_0, CE),
                (Ecn::Ce, ECT_1, CE),
                (Ecn::Ce, CE, CE),
                (Ecn::Ect0, ECT_0, ECT_0),
                (Ecn::Ect1, ECT_0, ECT_1),
                (Ecn::Ect0, ECT_1, ECT_1),
                (Ecn::Ect0, NOT_ECT, NOT_ECT),
                (Ecn::NotEct, CE, CE),
                (Ecn::NotEct, ECT_1, ECT_1),
            ] {
                (world.link.ecn, flow.tos) = (outer, EF | inner);
                flow.send_up(&mut world, b"up", 1360);
                let up = world.take_one_outside();
                assert_eq!((up.tos, up.data()), (EF | expected, &b"up"[..]), "{outer:?}, {inner:#b}");
                flow.send_down(&mut world, b"down", 1360);
                let down = world.take_one(client);
                assert_eq!((down.tos, down.data()), (EF | expected, &b"down"[..]), "{outer:?}, {inner:#b}");
            }
            world.link.ecn = Ecn::NotEct;
        }
        assert!(world.drops().is_empty());
    }
}

#[test]
fn a_marked_packet_of_a_sender_that_knows_losses_only_is_lost() {
    for (shards, misdirected_to) in [(1, None), (2, Some(0)), (2, Some(1))] {
        let mut world = World::with_shards(shards).connected();
        world.all_datagrams_to = misdirected_to;
        let here = endpoint(client_address(0), 5_000);
        world.send(0, &Ip::udp(here, endpoint(SERVER, 9), b"hello"));
        let outside = world.take_one_outside().from();
        world.link.ecn = Ecn::Ce;
        world.dies(DropReason::CongestionMarked, |world| {
            world.send(0, &Ip::udp(here, endpoint(SERVER, 9), b"hello?"));
        });
        world.link.ecn = Ecn::NotEct;
        let datagram =
            world.sealed_by(0, &Ip::udp(endpoint(client_address(1), 1), endpoint(SERVER, 9), b"lie"));
        world.link.ecn = Ecn::Ce;
        world.dies(DropReason::WrongInnerSource, |world| {
            world.strike_from(0, datagram);
        });
        // On the way back, it is the client that opens it.
        let before = world.device_packets;
        world.arrive(&Ip::udp(endpoint(SERVER, 9), outside, b"answer"));
        assert_eq!((world.take(0), world.device_packets), (vec![], before));
        assert_eq!(world.drops()["congestion_marked"], 2);
    }
}

#[test]
fn marked_segments_become_a_superpacket_of_their_own() {
    let mut world = World::new().connected();
    let mut flow = Flow::open(&mut world, 0, 50_000, HTTPS);
    flow.tos = ECT_0;
    let (data, before) = (payload(30 * 1360), world.device_packets);
    let mut expected = Vec::new();
    // Three trains of ten segments each, which meet in one turn.
    for (train, ecn) in data.chunks(10 * 1360).zip([Ecn::NotEct, Ecn::Ce, Ecn::NotEct]) {
        world.link.ecn = ecn;
        let packet = flow.segment_up(ACK | PSH, train);
        let header = super::kernel::superpacket_header(&packet, 1360, 0);
        world.send_bytes(0, &packet.partial().bytes(), header);
        flow.up += train.len() as u32;
        expected.extend([if ecn == Ecn::Ce { CE } else { ECT_0 }; 10]);
    }
    world.settle();
    let tos: Vec<u8> = world.take_outside().iter().map(|segment| segment.tos).collect();
    assert_eq!(tos, expected);
    assert_eq!(world.device_packets - before, 3);
}
