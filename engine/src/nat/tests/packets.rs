//! Packets, made by hand and checked by hand: nothing here uses the code under test except for the checksum.

use std::net::Ipv4Addr;

use super::super::config::Endpoint;
use crate::wire::checksum;

/// `10.66.77.2:5000` and the like.
pub fn at(text: &str) -> Endpoint {
    let (address, port) = text.split_once(':').unwrap();
    Endpoint::new(address.parse().unwrap(), port.parse().unwrap())
}

pub fn address(text: &str) -> Ipv4Addr {
    text.parse().unwrap()
}

pub fn ipv4(protocol: u8, source: Ipv4Addr, destination: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    ipv4_with_options(protocol, source, destination, &[], payload)
}

pub fn ipv4_with_options(
    protocol: u8,
    source: Ipv4Addr,
    destination: Ipv4Addr,
    options: &[u8],
    payload: &[u8],
) -> Vec<u8> {
    let header_len = 20 + options.len();
    let mut bytes = vec![0; header_len];
    bytes[0] = 0x40 | (header_len / 4) as u8;
    bytes[1] = 0xb9; // DSCP EF, ECT(1)
    bytes[2..4].copy_from_slice(&((header_len + payload.len()) as u16).to_be_bytes());
    bytes[4..6].copy_from_slice(&0x1234u16.to_be_bytes());
    bytes[8] = 64;
    bytes[9] = protocol;
    bytes[12..16].copy_from_slice(&source.octets());
    bytes[16..20].copy_from_slice(&destination.octets());
    bytes[20..].copy_from_slice(options);
    seal_header(&mut bytes);
    bytes.extend_from_slice(payload);
    bytes
}

/// Makes the header checksum right again.
pub fn seal_header(bytes: &mut [u8]) {
    let header_len = usize::from(bytes[0] & 15) * 4;
    bytes[10..12].fill(0);
    let sum = checksum::checksum(&bytes[..header_len]);
    bytes[10..12].copy_from_slice(&sum.to_be_bytes());
}

fn seal_transport(protocol: u8, source: Endpoint, destination: Endpoint, bytes: &mut [u8], at: usize) {
    let sum = checksum::pseudo_header(source.address, destination.address, protocol, bytes.len() as u16)
        .add_bytes(bytes)
        .finish();
    bytes[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

pub fn udp(source: Endpoint, destination: Endpoint, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 8];
    bytes[0..2].copy_from_slice(&source.port.to_be_bytes());
    bytes[2..4].copy_from_slice(&destination.port.to_be_bytes());
    bytes[4..6].copy_from_slice(&(8 + payload.len() as u16).to_be_bytes());
    bytes.extend_from_slice(payload);
    seal_transport(17, source, destination, &mut bytes, 6);
    ipv4(17, source.address, destination.address, &bytes)
}

/// A TCP segment: flags as letters of "FSRPA", then numbers.
pub fn tcp(
    source: Endpoint,
    destination: Endpoint,
    flags: &str,
    sequence: u32,
    acknowledgment: u32,
    payload: &[u8],
) -> Vec<u8> {
    tcp_with_options(source, destination, flags, sequence, acknowledgment, &[], payload)
}

pub fn tcp_with_options(
    source: Endpoint,
    destination: Endpoint,
    flags: &str,
    sequence: u32,
    acknowledgment: u32,
    options: &[u8],
    payload: &[u8],
) -> Vec<u8> {
    let bits = flags.chars().map(|flag| match flag {
        'F' => 1,
        'S' => 2,
        'R' => 4,
        'P' => 8,
        'A' => 16,
        other => panic!("no such flag: {other}"),
    });
    let header_len = 20 + options.len();
    let mut bytes = vec![0; header_len];
    bytes[0..2].copy_from_slice(&source.port.to_be_bytes());
    bytes[2..4].copy_from_slice(&destination.port.to_be_bytes());
    bytes[4..8].copy_from_slice(&sequence.to_be_bytes());
    bytes[8..12].copy_from_slice(&acknowledgment.to_be_bytes());
    bytes[12] = ((header_len / 4) << 4) as u8;
    bytes[13] = bits.sum();
    bytes[14..16].copy_from_slice(&1000u16.to_be_bytes()); // window
    bytes[20..].copy_from_slice(options);
    bytes.extend_from_slice(payload);
    seal_transport(6, source, destination, &mut bytes, 16);
    ipv4(6, source.address, destination.address, &bytes)
}

/// An ICMP query or its answer, with a sequence number and data.
pub fn icmp(kind: u8, source: Ipv4Addr, destination: Ipv4Addr, identifier: u16) -> Vec<u8> {
    let [high, low] = identifier.to_be_bytes();
    ipv4(1, source, destination, &icmp_message(&[kind, 0, 0, 0, high, low, 0, 1, b'p', b'i', b'n', b'g']))
}

/// An ICMP error that quotes `quoted`.
pub fn icmp_error(
    kind: u8,
    code: u8,
    source: Ipv4Addr,
    destination: Ipv4Addr,
    rest: u32,
    quoted: &[u8],
) -> Vec<u8> {
    let mut bytes = vec![kind, code, 0, 0];
    bytes.extend_from_slice(&rest.to_be_bytes());
    bytes.extend_from_slice(quoted);
    ipv4(1, source, destination, &icmp_message(&bytes))
}

fn icmp_message(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[2..4].fill(0);
    let sum = checksum::checksum(&bytes);
    bytes[2..4].copy_from_slice(&sum.to_be_bytes());
    bytes
}

/// The packet's source and destination with its ports, or identifiers in place of both.
pub fn ends(bytes: &[u8]) -> (Endpoint, Endpoint) {
    let header_len = usize::from(bytes[0] & 15) * 4;
    let word = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    let address = |at: usize| Ipv4Addr::new(bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]);
    let (from, to) = match bytes[9] {
        1 => (word(header_len + 4), word(header_len + 4)),
        _ => (word(header_len), word(header_len + 2)),
    };
    (Endpoint::new(address(12), from), Endpoint::new(address(16), to))
}

pub fn source(bytes: &[u8]) -> Endpoint {
    ends(bytes).0
}

pub fn destination(bytes: &[u8]) -> Endpoint {
    ends(bytes).1
}
