//! The kernel's steering, and the neighbours on the external link.

use std::net::Ipv4Addr;

use tidegate_engine::external::MacAddress;

use super::{EXTERNAL, NEIGHBOUR, OUR_MAC, ROUTER};
use crate::packets::{ICMP, Ip, TCP, UDP, half};

const ROUTER_MAC: MacAddress = [2, 0, 0, 0, 0, 1];
const NEIGHBOUR_MAC: MacAddress = [2, 0, 0, 0, 0, 77];

/// As the external interface's BPF program.
pub fn fanout(bytes: &[u8], shards: usize) -> usize {
    let header_len = usize::from(bytes.first().unwrap_or(&0) & 15) * 4;
    if bytes.len() < header_len + 8 || header_len < 20 || half(bytes, 6) & 0x3fff != 0 {
        return 0;
    }
    let transport = &bytes[header_len..];
    match (bytes[9], transport[0]) {
        (TCP | UDP, _) => usize::from(half(transport, 2)) % shards,
        (ICMP, 0) => usize::from(half(transport, 4)) % shards,
        _ => 0,
    }
}

pub fn echo_reply(request: &Ip) -> Ip {
    let mut body = request.body.clone();
    body[0] = 0;
    Ip::new(request.destination, request.source, ICMP, body).summed()
}

pub fn mac_of(neighbour: Ipv4Addr) -> MacAddress {
    match neighbour {
        ROUTER => ROUTER_MAC,
        NEIGHBOUR => NEIGHBOUR_MAC,
        other => [2, 0, 0, 0, 1, other.octets()[3]],
    }
}

pub fn arp_reply(from: Ipv4Addr) -> [u8; 42] {
    let mut frame = [0; 42];
    frame[0..6].copy_from_slice(&OUR_MAC);
    frame[6..12].copy_from_slice(&mac_of(from));
    frame[12..22].copy_from_slice(&[0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 2]);
    frame[22..28].copy_from_slice(&mac_of(from));
    frame[28..32].copy_from_slice(&from.octets());
    frame[32..38].copy_from_slice(&OUR_MAC);
    frame[38..42].copy_from_slice(&EXTERNAL.octets());
    frame
}
