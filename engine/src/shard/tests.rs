use super::*;
use crate::arena::Span;
use crate::client::{Client, ClientConfig};
use crate::fair_queue::Owner;
use crate::handoffs::HANDOFF_QUEUE;
use crate::tunnel::{Cipher, PeerConfig, TunnelConfig, public_key};
use crate::wire::test_packets::{Template, payload};
use crate::wire::{CoalesceOptions, VirtioNetHeader};

const NOW: Timestamp = Timestamp::from_secs(10);

/// A core that takes packets, and does nothing with them.
fn idle_core() -> Client {
    let tunnel = TunnelConfig {
        private_key: [1; 32],
        shard: 0,
        shards: 1,
        mtu: 1_420,
        unix_time_at_origin: Duration::ZERO,
    };
    let gateway = PeerConfig {
        public_key: public_key(&[2; 32]),
        preshared_key: None,
        endpoint: None,
        persistent_keepalive: None,
        cipher: Cipher::default(),
    };
    let events = Events::new(EventFd::new().unwrap());
    let coalesce = CoalesceOptions::default();
    Client::new(ClientConfig { tunnel, gateway, allowed_ips: Vec::new(), coalesce, events }, NOW)
}

/// TCP in GRE, in `segments` segments of ten bytes each, as the kernel merges them; and what it says of it.
fn merged_in_gre(segments: usize) -> (Vec<u8>, VirtioNetHeader) {
    const NEEDS_CSUM: u8 = 1;
    const TCPV4: u8 = 1;
    const GRE: u8 = 47;
    let inner = Template::default().tcp(&payload(10 * segments));
    let packet = Template::default().ip(GRE, &[&[0, 0, 8, 0][..], &inner].concat());
    let words = [packet.len() as u16, 10, 20 + 4 + 20, 16].map(u16::to_ne_bytes).concat();
    let bytes = [&[NEEDS_CSUM, TCPV4][..], &words].concat();
    (packet, VirtioNetHeader::from_bytes(bytes.try_into().unwrap()))
}

#[test]
fn what_one_turn_splits_leaves_room_in_the_queue_before_another_shard() {
    for segments in [10, 64, VirtioNetHeader::MAX_SPLIT_SEGMENTS] {
        let (packet, header) = merged_in_gre(segments);
        assert_eq!(header.split_encapsulated(&packet).map(|split| split.len()), Some(segments));
        let mut arena = Arena::new(EXTERNAL_BUFFERS);
        let mut frames = Intake::new(0..EXTERNAL_BUFFERS);
        let mut waiting = 0;
        while let Some((slots, arrived)) = frames.room(NOW) {
            for slot in slots {
                let span = Span::new(slot.buffer, slot.start..slot.start + packet.len());
                arena.get_mut(span).copy_from_slice(&packet);
                arrived.push(Frame { span, header, source_mac: [0; 6] });
            }
            waiting += arrived.len();
            let owner = |_: &Arena, _: &Frame| Owner::Client(Ipv4Addr::new(10, 66, 77, 2));
            frames.accept(NOW, &mut arena, || false, owner);
        }
        let mut core = idle_core();
        serve_frames(NOW, &mut frames, &mut core, &mut arena, &mut Outbox::default());
        frames.end_turn();
        let mut left = 0;
        while frames.is_waiting() {
            left += std::iter::from_fn(|| frames.next(NOW)).count();
            frames.end_turn();
        }
        let split = (waiting - left) * segments;
        assert!(split >= segments, "what comes is served");
        assert!(split <= HANDOFF_QUEUE * 3 / 4, "{split} in one turn, {segments} of a frame");
    }
}
