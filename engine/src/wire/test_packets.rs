//! Packets for tests, right in every checksum unless a test damages them.

use std::net::Ipv4Addr;

use super::checksum;
use super::ipv4::{Ipv4Packet, protocol, put_u16, tcp_flags};

pub const ALICE: Ipv4Addr = Ipv4Addr::new(10, 66, 77, 2);
pub const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);

/// A packet in the making.
#[derive(Clone, Debug)]
pub struct Template {
    pub source: Ipv4Addr,
    pub destination: Ipv4Addr,
    pub tos: u8,
    pub ttl: u8,
    pub identification: u16,
    /// Flags and fragment offset, as they stand on the wire.
    pub fragment: u16,
    pub ip_options: Vec<u8>,
    pub ports: (u16, u16),
    pub sequence: u32,
    pub acknowledgment: u32,
    pub window: u16,
    pub flags: u8,
    pub tcp_options: Vec<u8>,
}

pub const DF: u16 = 0x4000;
pub const MF: u16 = 0x2000;

impl Default for Template {
    fn default() -> Self {
        Self {
            source: ALICE,
            destination: SERVER,
            tos: 0,
            ttl: 64,
            identification: 0x1234,
            fragment: DF,
            ip_options: Vec::new(),
            ports: (40_000, 443),
            sequence: 1000,
            acknowledgment: 2000,
            window: 512,
            flags: tcp_flags::ACK,
            tcp_options: Vec::new(),
        }
    }
}

impl Template {
    pub fn tcp(&self, payload: &[u8]) -> Vec<u8> {
        let header_len = 20 + self.tcp_options.len();
        let mut segment = vec![0; header_len];
        put_u16(&mut segment, 0, self.ports.0);
        put_u16(&mut segment, 2, self.ports.1);
        segment[4..8].copy_from_slice(&self.sequence.to_be_bytes());
        segment[8..12].copy_from_slice(&self.acknowledgment.to_be_bytes());
        segment[12] = (header_len as u8 / 4) << 4;
        segment[13] = self.flags;
        put_u16(&mut segment, 14, self.window);
        segment[20..].copy_from_slice(&self.tcp_options);
        segment.extend_from_slice(payload);
        let sum = self.transport_checksum(protocol::TCP, &segment);
        put_u16(&mut segment, 16, sum);
        self.ip(protocol::TCP, &segment)
    }

    pub fn udp(&self, payload: &[u8]) -> Vec<u8> {
        let mut datagram = vec![0; 8];
        put_u16(&mut datagram, 0, self.ports.0);
        put_u16(&mut datagram, 2, self.ports.1);
        put_u16(&mut datagram, 4, 8 + payload.len() as u16);
        datagram.extend_from_slice(payload);
        let sum = match self.transport_checksum(protocol::UDP, &datagram) {
            0 => 0xffff,
            sum => sum,
        };
        put_u16(&mut datagram, 6, sum);
        self.ip(protocol::UDP, &datagram)
    }

    pub fn icmp(&self, kind: u8, code: u8, rest: &[u8]) -> Vec<u8> {
        let mut message = vec![kind, code, 0, 0];
        message.extend_from_slice(rest);
        let sum = checksum::checksum(&message);
        put_u16(&mut message, 2, sum);
        self.ip(protocol::ICMP, &message)
    }

    pub fn ip(&self, protocol: u8, payload: &[u8]) -> Vec<u8> {
        let header_len = 20 + self.ip_options.len();
        let mut packet = vec![0; header_len];
        packet[0] = 0x40 | (header_len as u8 / 4);
        packet[1] = self.tos;
        put_u16(&mut packet, 2, (header_len + payload.len()) as u16);
        put_u16(&mut packet, 4, self.identification);
        put_u16(&mut packet, 6, self.fragment);
        packet[8] = self.ttl;
        packet[9] = protocol;
        packet[12..16].copy_from_slice(&self.source.octets());
        packet[16..20].copy_from_slice(&self.destination.octets());
        packet[20..].copy_from_slice(&self.ip_options);
        mend_header_checksum(&mut packet);
        packet.extend_from_slice(payload);
        packet
    }

    fn transport_checksum(&self, protocol: u8, bytes: &[u8]) -> u16 {
        checksum::pseudo_header(self.source, self.destination, protocol, bytes.len() as u16)
            .add_bytes(bytes)
            .finish()
    }
}

/// Makes the IP header checksum right after a test has changed the header.
pub fn mend_header_checksum(packet: &mut [u8]) {
    let header_len = usize::from(packet[0] & 0x0f) * 4;
    put_u16(packet, 10, 0);
    let sum = checksum::checksum(&packet[..header_len]);
    put_u16(packet, 10, sum);
}

/// Asserts that both checksums of an ordinary packet are right.
pub fn assert_valid(packet: &[u8]) {
    let mut packet = packet.to_vec();
    let len = packet.len();
    let view = Ipv4Packet::parse(&mut packet, 0, super::Offload::NONE).unwrap();
    assert_eq!(view.total_len(), len);
    assert!(view.transport_checksum_ok());
}

/// Distinguishable payload bytes.
pub fn payload(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 251) as u8).collect()
}
