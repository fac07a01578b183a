//! A TCP connection between a client and a host outside, seen from both ends.

use std::net::SocketAddrV4;

use super::packets::*;
use super::world::*;

pub const HTTPS: SocketAddrV4 = SocketAddrV4::new(SERVER, 443);
/// End of a train that a kernel would build: a little less than 64 KiB.
const SUPERPACKET: usize = 65_000;
pub const TIMESTAMPS: [u8; 12] = [1, 1, 8, 10, 0, 0, 0x12, 0x34, 0, 0, 0x43, 0x21];
pub const SACK: [u8; 12] = [1, 1, 5, 10, 0, 0, 0x10, 0, 0, 0, 0x20, 0];

#[derive(Clone, Debug)]
pub struct Flow {
    pub client: usize,
    pub local: SocketAddrV4,
    pub remote: SocketAddrV4,
    /// What stands for `local` outside.
    pub external: SocketAddrV4,
    /// The next sequence numbers, of the client and of the remote end.
    pub up: u32,
    pub down: u32,
    pub options: Vec<u8>,
    pub tos: u8,
}

impl Flow {
    /// After the three-way handshake.
    pub fn open(world: &mut World, client: usize, port: u16, remote: SocketAddrV4) -> Self {
        let local = endpoint(client_address(client), port);
        let (options, tos) = (Vec::new(), 0);
        let mut flow = Self { client, local, remote, external: local, up: 1_000, down: 9_000, options, tos };
        world.take(client);
        world.take_outside();
        world.send(client, &flow.segment_up(SYN, &[]));
        let syn = world.take_one_outside();
        assert_eq!((syn.to(), syn.tcp_header().flags, syn.tcp_header().sequence), (remote, SYN, 1_000));
        flow.external = syn.from();
        flow.up += 1;
        world.arrive(&flow.segment_down(SYN | ACK, &[]));
        let syn_ack = world.take_one(client);
        assert_eq!((syn_ack.from(), syn_ack.to()), (remote, local));
        assert_eq!(syn_ack.tcp_header().acknowledgment, 1_001);
        flow.down += 1;
        world.send(client, &flow.segment_up(ACK, &[]));
        assert_eq!(world.take_one_outside().from(), flow.external);
        flow
    }

    pub fn segment_up(&self, flags: u8, data: &[u8]) -> Ip {
        self.segment(self.local, self.remote, (self.up, self.down), flags, data)
    }

    pub fn segment_down(&self, flags: u8, data: &[u8]) -> Ip {
        self.segment(self.remote, self.external, (self.down, self.up), flags, data)
    }

    fn segment(
        &self,
        from: SocketAddrV4,
        to: SocketAddrV4,
        numbers: (u32, u32),
        flags: u8,
        data: &[u8],
    ) -> Ip {
        let acknowledgment = if flags & ACK != 0 { numbers.1 } else { 0 };
        let options = self.options.clone();
        let header = Tcp { sequence: numbers.0, acknowledgment, flags, window: 0xfff0, options };
        Ip::tcp(from, to, &header, data).with(|ip| ip.tos = self.tos)
    }

    /// The client sends, as its kernel would: in superpackets of segments of `mss` bytes, options included.
    pub fn send_up(&mut self, world: &mut World, data: &[u8], mss: usize) -> usize {
        let size = mss - self.options.len();
        let trains = data.chunks(SUPERPACKET / size * size);
        let count = trains.len();
        for train in trains {
            let packet = self.segment_up(ACK | PSH, train);
            if train.len() > size {
                world.send_superpacket(self.client, &packet, size);
            } else {
                world.send(self.client, &packet);
            }
            self.up += train.len() as u32;
        }
        count
    }

    /// The remote end sends, and the gateway's network card merges.
    pub fn send_down(&mut self, world: &mut World, data: &[u8], mss: usize) -> usize {
        let size = mss - self.options.len();
        let trains = data.chunks(SUPERPACKET / size * size);
        let count = trains.len();
        for train in trains {
            let packet = self.segment_down(ACK | PSH, train);
            if train.len() > size {
                world.arrive_superpacket(&packet, size);
            } else {
                world.arrive(&packet);
            }
            self.down += train.len() as u32;
        }
        count
    }
}

/// The bytes of the segments, in the order of their sequence numbers from `start` on; they must not leave a gap.
pub fn stream(segments: &[Ip], start: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    for segment in segments {
        assert_eq!(
            segment.tcp_header().sequence,
            start.wrapping_add(bytes.len() as u32),
            "in order, without a gap"
        );
        bytes.extend(segment.data());
    }
    bytes
}
