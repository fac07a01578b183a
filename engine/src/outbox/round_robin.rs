//! Who is served first when several peers have packets in one turn: deficit round robin (Shreedhar and Varghese, 1996).
//!
//! Theory of operation. Sealing is the most expensive step of a packet's way, and a turn may bring some superpackets
//! for one peer and a ping for another. In the order of their arrival the ping would wait for all of them. So the peers
//! take turns: in each round every peer is served [`QUANTUM`] bytes, and what it has beyond waits for the next. A
//! peer's own packets keep their order. Nothing is held back beyond the turn, so no queue stands here, and nothing is
//! dropped.
//!
//! The queues before the core ([`crate::intake`]) order packets by whose they are, but not those of the TUN device and
//! of other shards, and those between clients by their sender.

use super::PeerFrame;

/// Bytes that a peer is served before the others have their turn: one superpacket.
const QUANTUM: usize = 65_535;

/// Puts packets for peers into the order in which they are sealed.
#[derive(Default, Debug)]
pub(super) struct RoundRobin {
    /// Bytes of each peer so far, by its number; zero between two calls. Bounded as the peers are.
    served: Vec<usize>,
}

impl RoundRobin {
    /// Reorders `frames` so that the peers take turns.
    pub(super) fn arrange(&mut self, frames: &mut [PeerFrame]) {
        let Some(first) = frames.first().map(|frame| frame.peer) else { return };
        if frames.iter().all(|frame| frame.peer == first) {
            return; // the rule, and then there is nothing to do
        }
        for frame in frames.iter_mut() {
            let peer = frame.peer.0 as usize;
            if peer >= self.served.len() {
                self.served.resize(peer + 1, 0);
            }
            frame.round = (self.served[peer] / QUANTUM) as u32;
            self.served[peer] += frame.shape.total_len();
        }
        for frame in &*frames {
            self.served[frame.peer.0 as usize] = 0;
        }
        frames.sort_by_key(|frame| frame.round); // stable: within a round, as they came
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Bytes, Gather};
    use super::*;
    use crate::tunnel::PeerId;
    use crate::wire::test_packets::Template;
    use crate::wire::{Ipv4Packet, Offload};

    /// A packet whose first byte of payload tells which one it is.
    fn frame(peer: u32, len: usize, name: u8) -> PeerFrame {
        let mut bytes = Template::default().udp(&vec![name; len]);
        let shape = Ipv4Packet::parse(&mut bytes, 0, Offload::NONE).unwrap().shape();
        PeerFrame::new(PeerId(peer), Gather::whole(Bytes::Owned(bytes)), shape)
    }

    fn arranged(mut frames: Vec<PeerFrame>) -> Vec<(u32, char)> {
        let mut order = RoundRobin::default();
        order.arrange(&mut frames);
        assert!(order.served.iter().all(|&bytes| bytes == 0), "something is left for the next turn");
        let name = |frame: &PeerFrame| match &frame.packet.head {
            Bytes::Owned(bytes) => char::from(bytes[28]),
            Bytes::Arena(_) => '?',
        };
        frames.iter().map(|frame| (frame.peer.0, name(frame))).collect()
    }

    #[test]
    fn a_ping_does_not_wait_for_another_peers_superpackets() {
        let order = arranged(vec![
            frame(3, 60_000, b'a'),
            frame(3, 60_000, b'b'),
            frame(3, 60_000, b'c'),
            frame(8, 64, b'p'),
        ]);
        assert_eq!(order, [(3, 'a'), (3, 'b'), (8, 'p'), (3, 'c')]);
    }

    #[test]
    fn peers_with_much_to_say_take_turns_and_keep_the_order_of_their_own_packets() {
        let bursts = [(1, b"abcd"), (0, b"uvwx")];
        let frames =
            bursts.iter().flat_map(|(peer, names)| names.iter().map(|&name| frame(*peer, 65_400, name)));
        let order = arranged(frames.collect());
        let of = |peer| order.iter().filter(|(p, _)| *p == peer).map(|(_, name)| *name).collect::<String>();
        assert_eq!((of(1), of(0)), ("abcd".to_owned(), "uvwx".to_owned()));
        let first_half: Vec<u32> = order[..4].iter().map(|(peer, _)| *peer).collect();
        assert_eq!(first_half.iter().filter(|&&peer| peer == 0).count(), 2, "{order:?}");
    }

    #[test]
    fn one_peer_alone_is_left_as_it_is() {
        let order = arranged(vec![frame(5, 60_000, b'a'), frame(5, 60_000, b'b'), frame(5, 10, b'c')]);
        assert_eq!(order, [(5, 'a'), (5, 'b'), (5, 'c')]);
    }
}
