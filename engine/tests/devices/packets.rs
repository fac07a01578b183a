//! Packets made by hand.

use std::net::Ipv4Addr;

use tidegate_engine::wire::checksum::{checksum, pseudo_header};
use tidegate_engine::wire::{VirtioNetHeader, protocol};

pub use tidegate_engine::wire::ipv4::tcp_flags;

pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
pub const NEIGHBOR: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);

/// Bytes of link and IPv4 header: where a virtio-net header on a packet socket sees the transport header.
const ETHERNET: usize = 14;
const IPV4: usize = 20;

#[derive(Clone, Copy)]
pub struct Probe {
    pub source: (Ipv4Addr, u16),
    pub destination: (Ipv4Addr, u16),
}

impl Probe {
    pub fn udp(self, payload: &[u8]) -> Vec<u8> {
        let mut packet = self.ip(protocol::UDP, &self.udp_header(payload), payload);
        self.finish(&mut packet, 6);
        packet
    }

    pub fn tcp(self, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = self.ip(protocol::TCP, &self.tcp_header(flags, 1, 1, &[]), payload);
        self.finish(&mut packet, 16);
        packet
    }

    /// The second step of a handshake, from a peer whose largest segment is `mss`.
    pub fn syn_ack(self, acknowledgment: u32, mss: u16) -> Vec<u8> {
        let [high, low] = mss.to_be_bytes();
        let header = self.tcp_header(tcp_flags::SYN | tcp_flags::ACK, 77, acknowledgment, &[2, 4, high, low]);
        let mut packet = self.ip(protocol::TCP, &header, &[]);
        self.finish(&mut packet, 16);
        packet
    }

    /// The answer to an ICMP query, by its type.
    pub fn icmp_reply(self, kind: u8, identifier: u16) -> Vec<u8> {
        let [high, low] = identifier.to_be_bytes();
        self.icmp(&[kind, 0, 0, 0, high, low, 0, 1])
    }

    /// Time exceeded, about nothing in particular.
    pub fn icmp_error(self) -> Vec<u8> {
        let inner = Probe { source: self.destination, destination: self.source }.udp(&[]);
        self.icmp(&[&[11, 0, 0, 0, 0, 0, 0, 0][..], &inner].concat())
    }

    /// `packet` as the first fragment of a datagram.
    pub fn fragment(self, mut packet: Vec<u8>) -> Vec<u8> {
        packet[6] |= 0x20; // more fragments
        fix_header(&mut packet);
        packet
    }

    /// `packet` with four bytes of IP options (no operation).
    pub fn with_options(self, mut packet: Vec<u8>) -> Vec<u8> {
        packet[0] += 1;
        packet.splice(IPV4..IPV4, [1, 1, 1, 1]);
        let len = packet.len() as u16;
        packet[2..4].copy_from_slice(&len.to_be_bytes());
        fix_header(&mut packet);
        packet
    }

    /// For a packet socket: `csum_start` and `hdr_len` count the link header.
    pub fn tcp_superpacket(self, payload: &[u8], segment_size: u16) -> (Vec<u8>, VirtioNetHeader) {
        let mut packet = self.ip(protocol::TCP, &self.tcp_header(tcp_flags::ACK, 1, 1, &[]), payload);
        self.finish_partially(&mut packet, 16);
        (packet, virtio(1, ETHERNET + IPV4 + 20, segment_size, ETHERNET + IPV4, 16))
    }

    /// For a TUN device.
    pub fn udp_superpacket(self, payload: &[u8], segment_size: u16) -> (Vec<u8>, VirtioNetHeader) {
        let mut packet = self.ip(protocol::UDP, &self.udp_header(payload), payload);
        self.finish_partially(&mut packet, 6);
        (packet, virtio(5, IPV4 + 8, segment_size, IPV4, 6))
    }

    fn udp_header(self, payload: &[u8]) -> Vec<u8> {
        let len = 8 + payload.len() as u16;
        [self.source.1, self.destination.1, len, 0].map(u16::to_be_bytes).concat()
    }

    fn tcp_header(self, flags: u8, sequence: u32, acknowledgment: u32, options: &[u8]) -> Vec<u8> {
        let mut header = [self.source.1, self.destination.1].map(u16::to_be_bytes).concat();
        header.extend(sequence.to_be_bytes());
        header.extend(acknowledgment.to_be_bytes());
        header.extend([((20 + options.len()) * 4) as u8, flags, 0xff, 0xff, 0, 0, 0, 0]);
        header.extend(options);
        header
    }

    fn icmp(self, message: &[u8]) -> Vec<u8> {
        let mut packet = self.ip(protocol::ICMP, message, &[]);
        let sum = checksum(&packet[IPV4..]);
        packet[22..24].copy_from_slice(&sum.to_be_bytes());
        packet
    }

    fn ip(self, protocol: u8, header: &[u8], payload: &[u8]) -> Vec<u8> {
        let len = (IPV4 + header.len() + payload.len()) as u16;
        let mut packet = vec![0x45, 0];
        packet.extend(len.to_be_bytes());
        packet.extend([0, 1, 0, 0, 64, protocol, 0, 0]);
        packet.extend(self.source.0.octets());
        packet.extend(self.destination.0.octets());
        packet.extend(header);
        packet.extend(payload);
        fix_header(&mut packet);
        packet
    }

    fn finish(self, packet: &mut [u8], at: usize) {
        let len = (packet.len() - IPV4) as u16;
        let sum = pseudo_header(self.source.0, self.destination.0, packet[9], len);
        let sum = sum.add_bytes(&packet[IPV4..]).finish();
        packet[IPV4 + at..IPV4 + at + 2].copy_from_slice(&sum.to_be_bytes());
    }

    fn finish_partially(self, packet: &mut [u8], at: usize) {
        let len = (packet.len() - IPV4) as u16;
        let sum = pseudo_header(self.source.0, self.destination.0, packet[9], len).partial();
        packet[IPV4 + at..IPV4 + at + 2].copy_from_slice(&sum.to_be_bytes());
    }
}

fn fix_header(packet: &mut [u8]) {
    packet[10..12].fill(0);
    let header_len = usize::from(packet[0] & 15) * 4;
    let sum = checksum(&packet[..header_len]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
}

fn virtio(kind: u8, headers: usize, segment_size: u16, start: usize, offset: u16) -> VirtioNetHeader {
    let words = [headers as u16, segment_size, start as u16, offset].map(u16::to_ne_bytes).concat();
    let bytes = [&[1, kind][..], &words].concat(); // VIRTIO_NET_HDR_F_NEEDS_CSUM
    VirtioNetHeader::from_bytes(bytes.try_into().unwrap())
}
