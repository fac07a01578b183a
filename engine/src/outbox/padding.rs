//! Small packets of several lengths, made alike so that they leave as one train.
//!
//! Theory of operation. A train takes datagrams of one length (only its last may be shorter), and each train passes the
//! kernel's whole UDP path at both ends, whatever is in it. The small packets of many connections, SYN, ACK, request
//! and FIN one behind another, would leave as almost as many trains as there are packets. WireGuard lets zeros follow a
//! packet, which every receiver cuts off by the packet's own length, and so the neighbours of one peer are padded to
//! the longest of them. Only small packets are: none grows by more than some hundred bytes, and the acknowledgements of
//! a bulk transfer, which are of one length as they are, not at all.

use super::PeerFrame;

/// The longest packet, in bytes, to whose length others are padded: a SYN is half as long, a plain request fits.
const LARGEST: usize = 160;

/// Neighbours in the outbox that become one train.
#[derive(Default, Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Run {
    /// The first frame that does not belong to it.
    end: usize,
    /// The length of its longest packet.
    longest: usize,
}

impl Run {
    /// The length to which the frame `at` is padded, at least. Frames are asked about in their order.
    pub(super) fn padded_len(&mut self, frames: &[PeerFrame], at: usize) -> usize {
        if at >= self.end {
            *self = Self::at(frames, at);
        }
        // The last of a train may be shorter.
        if at + 1 < self.end { self.longest } else { 0 }
    }

    /// The run that begins at the frame `start`; of that frame alone, if it is not small.
    fn at(frames: &[PeerFrame], start: usize) -> Self {
        let frames = frames.get(start..).unwrap_or_default();
        let peer = frames.first().map(|frame| frame.peer);
        let lengths = frames.iter().map_while(|frame| {
            let len = frame.shape.total_len();
            let is_small = len <= LARGEST && frame.shape.segment_count() == 1;
            (is_small && Some(frame.peer) == peer).then_some(len)
        });
        let (count, longest) = lengths.fold((0, 0), |(count, longest), len| (count + 1, len.max(longest)));
        Self { end: start + count.max(1), longest }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Bytes, Gather};
    use super::*;
    use crate::tunnel::PeerId;
    use crate::wire::test_packets::Template;
    use crate::wire::{Ipv4Packet, Offload};

    fn padded(packets: &[(u32, usize)]) -> Vec<usize> {
        let frames: Vec<PeerFrame> = packets
            .iter()
            .map(|&(peer, len)| {
                let mut bytes = Template::default().udp(&vec![0; len - 28]);
                let shape = Ipv4Packet::parse(&mut bytes, 0, Offload::NONE).unwrap().shape();
                PeerFrame::new(PeerId(peer), Gather::whole(Bytes::Owned(bytes)), shape)
            })
            .collect();
        let mut run = Run::default();
        (0..frames.len()).map(|at| run.padded_len(&frames, at)).collect()
    }

    #[test]
    fn small_packets_of_one_peer_are_padded_to_the_longest_but_for_the_last() {
        assert_eq!(padded(&[(1, 60), (1, 52), (1, 136), (1, 52)]), [136, 136, 136, 0]);
    }

    #[test]
    fn a_peers_packets_are_not_padded_for_anothers() {
        assert_eq!(padded(&[(1, 60), (1, 52), (2, 136), (2, 40), (1, 52)]), [60, 0, 136, 0, 0]);
    }

    #[test]
    fn nothing_is_padded_to_a_large_packet_nor_across_it() {
        assert_eq!(padded(&[(1, 60), (1, 80), (1, 161), (1, 160), (1, 52)]), [80, 0, 0, 160, 0]);
    }
}
