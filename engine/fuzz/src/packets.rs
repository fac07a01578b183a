//! Packets with lengths and checksums made right, so that they get beyond the first check: a fuzzer does not guess
//! checksums.

use std::net::Ipv4Addr;

use tidegate_engine::wire::checksum::{self, Sum};

pub const ICMP: u8 = 1;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;

/// A packet with these bytes behind a header without options.
pub fn ipv4(protocol: u8, source: Ipv4Addr, destination: Ipv4Addr, mut transport: Vec<u8>) -> Vec<u8> {
    if protocol == UDP && transport.len() >= 8 {
        let length = transport.len() as u16;
        transport[4..6].copy_from_slice(&length.to_be_bytes());
    }
    if protocol == TCP && transport.len() >= 20 {
        transport[12] = transport[12].clamp(0x50, 0x5f);
    }
    let mut bytes = vec![0x45, 0, 0, 0, 0, 1, 0, 0, 64, protocol, 0, 0];
    bytes.extend(source.octets());
    bytes.extend(destination.octets());
    bytes.extend(transport);
    mend(&mut bytes);
    bytes
}

/// Makes version, header length, total length and checksums right, as far as there are bytes for it.
pub fn mend(bytes: &mut [u8]) {
    if bytes.len() < 20 || bytes.len() > 65_535 {
        return;
    }
    let words = usize::from(bytes[0] & 15).clamp(5, bytes.len() / 4);
    bytes[0] = 0x40 | words as u8;
    let total_len = bytes.len() as u16;
    bytes[2..4].copy_from_slice(&total_len.to_be_bytes());
    if u16::from_be_bytes([bytes[6], bytes[7]]) & 0x3fff == 0 {
        mend_transport(bytes, words * 4);
    }
    bytes[10..12].fill(0);
    let sum = checksum::checksum(&bytes[..words * 4]);
    bytes[10..12].copy_from_slice(&sum.to_be_bytes());
}

fn mend_transport(bytes: &mut [u8], header_len: usize) {
    let (protocol, source, destination) = (bytes[9], address_at(bytes, 12), address_at(bytes, 16));
    let transport = &mut bytes[header_len..];
    let (at, pseudo) = match protocol {
        ICMP => (2, Sum::ZERO),
        TCP => (16, checksum::pseudo_header(source, destination, TCP, transport.len() as u16)),
        UDP => (6, checksum::pseudo_header(source, destination, UDP, transport.len() as u16)),
        _ => return,
    };
    if let Some(field) = transport.get_mut(at..at + 2) {
        field.fill(0);
        let sum = pseudo.add_bytes(transport).finish();
        let sum = if sum == 0 && protocol == UDP { 0xffff } else { sum };
        transport[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    }
}

/// An ICMP error that quotes `packet`'s first `quoted` bytes.
pub fn icmp_error(kind: u8, code: u8, from: Ipv4Addr, to: Ipv4Addr, packet: &[u8], quoted: usize) -> Vec<u8> {
    let mut icmp = vec![kind, code, 0, 0, 0, 0, 5, 0];
    icmp.extend_from_slice(&packet[..packet.len().min(quoted)]);
    ipv4(ICMP, from, to, icmp)
}

/// The answer to `packet`: its ends swapped, the rest of its transport header overwritten by `changes`.
pub fn answer(packet: &[u8], to: Ipv4Addr, changes: &[u8]) -> Option<Vec<u8>> {
    let header_len = usize::from(packet.first()? & 15) * 4;
    let mut transport = packet.get(header_len..)?.to_vec();
    transport.truncate(60);
    match (packet[9], transport.len()) {
        (ICMP, 1..) => transport[0] = 0,
        (TCP | UDP, 4..) => {
            let (from, to) = transport.split_at_mut(2);
            from.swap_with_slice(&mut to[..2]);
        }
        _ => return None,
    }
    for (at, &byte) in transport.iter_mut().skip(4).zip(changes) {
        *at = byte;
    }
    Some(ipv4(packet[9], address_at(packet, 16), to, transport))
}

pub fn address_at(bytes: &[u8], at: usize) -> Ipv4Addr {
    Ipv4Addr::new(bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3])
}
