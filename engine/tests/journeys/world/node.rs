//! A core, and the loop around it.

use std::net::{Ipv4Addr, SocketAddrV4};

use tidegate_engine::arena::{Arena, Span};
use tidegate_engine::clock::Timestamp;
use tidegate_engine::core::Core;
use tidegate_engine::external::MacAddress;
use tidegate_engine::handoffs::Handoff;
use tidegate_engine::outbox::{Outbox, TrainBuffer, send_to_peers};
use tidegate_engine::path::Path;
use tidegate_engine::transport::ReceivedTrain;
use tidegate_engine::wire::Ecn;

/// Trains that one turn of the loop takes (`TRANSPORT_BUFFERS`).
pub const TRAINS_PER_TURN: usize = 8;

/// A core and what its loop owns.
pub struct Node<C> {
    pub core: C,
    pub arena: Arena,
    pub outbox: Outbox,
    sealed: TrainBuffer,
}

/// A train of datagrams.
#[derive(Clone, Debug)]
pub struct Train {
    pub from: SocketAddrV4,
    pub segment_size: usize,
    pub bytes: Vec<u8>,
    /// Of the outer headers.
    pub ecn: Ecn,
}

/// A packet that a core gave to a device of the kernel.
#[derive(Clone, Debug)]
pub struct DevicePacket {
    pub virtio: [u8; 10],
    pub bytes: Vec<u8>,
    pub mac: MacAddress,
}

/// What came out of a turn.
#[derive(Default)]
pub struct Output {
    pub external: Vec<DevicePacket>,
    pub tun: Vec<DevicePacket>,
    pub arp: Vec<[u8; 42]>,
    pub trains: Vec<(Path, usize, Vec<u8>)>,
    pub handoffs: Vec<(u8, Handoff)>,
}

impl<C: Core> Node<C> {
    pub fn new(core: C) -> Self {
        Self {
            core,
            arena: Arena::new(TRAINS_PER_TURN),
            outbox: Outbox::default(),
            sealed: TrainBuffer::default(),
        }
    }

    pub fn store(&mut self, buffer: usize, bytes: &[u8]) -> Span {
        self.arena.buffer_mut(buffer)[..bytes.len()].copy_from_slice(bytes);
        Span::new(buffer, 0..bytes.len())
    }

    /// The end of a turn, as in `Shard::run` and `Shard::send`.
    pub fn finish(&mut self, now: Timestamp) -> Output {
        if self.core.next_wakeup().is_some_and(|due| due <= now) {
            self.core.poll(now, &mut self.outbox);
        }
        let Self { core, arena, outbox, sealed } = self;
        let mut output = Output::default();
        for (frames, packets) in [(&outbox.external, &mut output.external), (&outbox.tun, &mut output.tun)] {
            packets.extend(frames.iter().map(|frame| DevicePacket {
                virtio: frame.header.to_bytes(),
                bytes: outbox.to_vec(&frame.packet, arena),
                mac: frame.destination_mac,
            }));
        }
        output.arp.append(&mut outbox.arp);
        send_to_peers(outbox, core, arena, sealed, now, |trains, _| {
            output.trains.extend(trains.iter().map(|t| (t.to, t.segment_size, t.bytes.to_vec())));
        });
        output.handoffs.append(&mut outbox.handoffs);
        outbox.clear();
        output
    }
}

/// `local` is the address that was addressed, where the node's socket tells.
pub fn receive_trains<C: Core>(
    node: &mut Node<C>,
    now: Timestamp,
    trains: &[Train],
    local: Option<Ipv4Addr>,
) {
    for (buffer, train) in trains.iter().enumerate() {
        let span = node.store(buffer, &train.bytes);
        let from = Path { remote: train.from, local };
        let train = ReceivedTrain { span, segment_size: train.segment_size, from, ecn: train.ecn };
        node.core.receive_datagrams(now, &mut node.arena, train, &mut node.outbox);
    }
    node.core.flush_peers(now, &mut node.arena, &mut node.outbox);
}
