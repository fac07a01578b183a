//! The kernel's steering, the neighbours on the external link, and the internet.

use std::net::{Ipv4Addr, SocketAddrV4};

use tidegate_engine::external::MacAddress;

use super::node::DevicePacket;
use super::{ECHO_PORT, EXTERNAL, Event, LINK_HEADER, LOOPBACK, NEIGHBOUR, OUR_MAC, ROUTER, SERVER, World};
use crate::packets::{ICMP, Ip, TCP, UDP, endpoint, half};

/// The ports from which the router forwards, see [`World::loops_back`].
const FIRST_LOOPED: u16 = 60_000;
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
        (ICMP, 0 | 14) => usize::from(half(transport, 4)) % shards,
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

impl World {
    pub(super) fn reach_internet(&mut self, packet: &DevicePacket) {
        for bytes in self.transmit(packet, LINK_HEADER) {
            assert!(
                bytes.len() <= self.mtu || !self.is_strict,
                "{} bytes on a link of {}",
                bytes.len(),
                self.mtu
            );
            let ip = Ip::parse(&bytes);
            let (neighbour, mac) = if ip.destination.octets()[..3] == [203, 0, 113] {
                (ip.destination, mac_of(ip.destination))
            } else {
                (self.router, mac_of(self.router))
            };
            assert_eq!(packet.mac, mac, "the link address of {neighbour}");
            assert_eq!(ip.source, EXTERNAL, "only our own address leaves");
            if self.internet_answers {
                self.answer(&ip);
            }
            if self.loops_back && ip.protocol == UDP && !ip.is_fragment() && ip.to() == LOOPBACK {
                let known = self.looped.iter().position(|&from| from == ip.from());
                let place = known.unwrap_or_else(|| {
                    self.looped.push(ip.from());
                    self.looped.len() - 1
                });
                self.strike(
                    endpoint(ROUTER, FIRST_LOOPED + place as u16),
                    ip.data().to_vec(),
                    ip.data().len(),
                );
            }
            self.outside.push(ip);
        }
    }

    /// What the gateway answers to where the router forwards from, the router sends back; whether it was for there.
    pub(super) fn loop_back(&mut self, to: SocketAddrV4, train: &[u8], segment_size: usize) -> bool {
        let place = usize::from(to.port()).checked_sub(usize::from(FIRST_LOOPED));
        let inside = place.and_then(|place| self.looped.get(place)).copied();
        let Some(inside) = inside.filter(|_| *to.ip() == ROUTER) else { return false };
        for datagram in train.chunks(segment_size) {
            self.sent_back += 1;
            self.arrive_bytes(Ip::udp(LOOPBACK, inside, datagram).bytes(), [0; 10]);
        }
        true
    }

    fn answer(&mut self, ip: &Ip) {
        if ip.is_fragment() {
            return;
        }
        if ip.ttl == 1 && ip.destination == SERVER {
            self.arrive_bytes(Ip::icmp_error(self.router, ip, 11, 0, 0, 28).bytes(), [0; 10]);
        } else if ip.protocol == ICMP && ip.icmp() == (8, 0) {
            self.arrive_bytes(echo_reply(ip).bytes(), [0; 10]);
        } else if ip.protocol == UDP && ip.to().port() == ECHO_PORT {
            self.arrive_bytes(Ip::udp(ip.to(), ip.from(), ip.data()).bytes(), [0; 10]);
        }
    }

    pub(super) fn hear_arp(&mut self, shard: usize, frame: &[u8; 42]) {
        let asked = Ipv4Addr::new(frame[38], frame[39], frame[40], frame[41]);
        assert_eq!(frame[20..22], [0, 1], "a request");
        assert_eq!((&frame[22..28], &frame[28..32]), (&OUR_MAC[..], &EXTERNAL.octets()[..]));
        self.arp_requests.push(asked);
        if !self.arp_is_silent {
            self.events.push_back(Event::Arp(shard, arp_reply(asked).to_vec()));
        }
    }

    /// As the transport's BPF program.
    pub(super) fn steer(&self, datagram: &[u8]) -> usize {
        if let Some(shard) = self.all_datagrams_to {
            return shard;
        }
        let receiver = match datagram.first() {
            Some(4) => datagram.get(4),
            Some(2) => datagram.get(8),
            _ => None,
        };
        receiver.map_or(self.initiations_to, |&index| usize::from(index)) % self.shards.len()
    }
}
