//! A crowd of WireGuard clients in one process, to see what their sessions and mappings cost a gateway in memory.
//!
//! `crowd ENDPOINT GATEWAY_KEY INNER_GATEWAY TARGET MAPPINGS`, with one client a line on standard input: its private
//! key (hexadecimal, as the gateway's public one) and its inner address.
//!
//! Each client has a UDP socket and a [`Tunnel`] of its own. It shakes hands, pings the gateway through the tunnel, and
//! then makes its share of `MAPPINGS` at the gateway: a tenth by datagrams to `TARGET`'s echo service from as many
//! ports (each costs the gateway a reserved port, which is an open file), the rest by pings with as many identifiers
//! (which cost none). What is not answered is sent again; the crowd ends well only if everything was. It keeps nothing
//! alive afterwards: sessions and mappings live on at the gateway until their timers end.

#![allow(clippy::indexing_slicing, reason = "the packets are its own")]

use std::collections::BTreeSet;
use std::error::Error;
use std::io::{self, BufRead};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::time::Duration;

use tidegate_engine::clock::{Timestamp, monotonic_now, unix_time_at_origin};
use tidegate_engine::nat::Proto;
use tidegate_engine::tunnel::{Cipher, Outgoing, PeerConfig, PeerId, Received, Tunnel, TunnelConfig};
use tidegate_engine::wire::checksum;

const ECHO_PORT: u16 = 7; // RFC 862
const FIRST_PORT: u16 = 20_000;
const ECHO_REQUEST: u8 = 8; // RFC 792
const MTU: usize = 1420;
/// How long answers may take before what is missing is sent again.
const PATIENCE: Duration = Duration::from_millis(200);
const PASSES: usize = 40;
/// Clients come at most so fast: beyond 200 handshakes a second a gateway asks for cookies, and then lets one address
/// have 20, as WireGuard does.
const PACE: Duration = Duration::from_millis(7);

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [endpoint, gateway_key, inner_gateway, target, mappings] = arguments.as_slice() else {
        return Err("usage: crowd ENDPOINT GATEWAY_KEY INNER_GATEWAY TARGET MAPPINGS < CLIENTS".into());
    };
    let gateway = Gateway { endpoint: endpoint.parse()?, public_key: key(gateway_key)? };
    let (inner_gateway, target): (Ipv4Addr, Ipv4Addr) = (inner_gateway.parse()?, target.parse()?);
    let mappings: usize = mappings.parse()?;
    let lines: Vec<String> = io::stdin().lock().lines().collect::<io::Result<_>>()?;
    let mut answered = 0;
    for (number, line) in lines.iter().enumerate() {
        let (private_key, address) = line.split_once(' ').ok_or("a client is a key and an address")?;
        let mut client = Client::new(key(private_key)?, address.parse()?, &gateway)?;
        let begun = monotonic_now();
        client.exchange(inner_gateway, 0, 1)?;
        // The shares differ by one at most.
        let share = mappings * (number + 1) / lines.len() - mappings * number / lines.len();
        client.exchange(target, share / 10, share)?;
        answered += share;
        client.listen_until(begun + PACE)?;
    }
    println!("{} clients, {answered} mappings, all answered", lines.len());
    Ok(())
}

struct Gateway {
    endpoint: SocketAddrV4,
    public_key: [u8; 32],
}

struct Client {
    address: Ipv4Addr,
    tunnel: Tunnel,
    gateway: PeerId,
    socket: UdpSocket,
    out: Outgoing,
}

impl Client {
    fn new(private_key: [u8; 32], address: Ipv4Addr, gateway: &Gateway) -> Result<Self> {
        let now = monotonic_now();
        let mut tunnel = Tunnel::new(TunnelConfig {
            private_key,
            shard: 0,
            shards: 1,
            mtu: MTU,
            unix_time_at_origin: unix_time_at_origin(),
        });
        let peer = PeerConfig {
            public_key: gateway.public_key,
            preshared_key: None,
            endpoint: Some(gateway.endpoint),
            persistent_keepalive: None,
            cipher: Cipher::ChaCha20Poly1305,
        };
        let gateway_id = tunnel.set_peer(&peer, now);
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.connect(gateway.endpoint)?;
        Ok(Self { address, tunnel, gateway: gateway_id, socket, out: Outgoing::default() })
    }

    /// Sends `count` requests to `target`, the first `datagrams` of them by UDP, until each was answered.
    fn exchange(&mut self, target: Ipv4Addr, datagrams: usize, count: usize) -> Result<()> {
        let mut missing: BTreeSet<Request> = (0..count)
            .map(|n| if n < datagrams { Request::Datagram(n as u16) } else { Request::Ping(n as u16) })
            .collect();
        for _ in 0..PASSES {
            for request in &missing {
                let packet = request.packet(self.address, target);
                self.tunnel
                    .enqueue(self.gateway, &packet, monotonic_now(), &mut self.out)
                    .map_err(|reason| format!("{}: not sealed: {reason:?}", self.address))?;
                self.send()?;
            }
            let mut until = monotonic_now() + PATIENCE;
            while !missing.is_empty()
                && let Some(packet) = self.receive(until)?
            {
                if Request::answered_by(&packet).is_some_and(|request| missing.remove(&request)) {
                    until = monotonic_now() + PATIENCE;
                }
            }
            if missing.is_empty() {
                return Ok(());
            }
        }
        Err(format!(
            "{}: {} of {count} requests were never answered by {target}",
            self.address,
            missing.len()
        )
        .into())
    }

    fn listen_until(&mut self, until: Timestamp) -> Result<()> {
        while self.receive(until)?.is_some() {}
        Ok(())
    }

    /// The next inner packet, if it comes in time; handshakes take their steps meanwhile.
    fn receive(&mut self, until: Timestamp) -> Result<Option<Vec<u8>>> {
        let mut datagram = [0; 2048];
        loop {
            let now = monotonic_now();
            self.tunnel.poll(now, &mut self.out);
            self.send()?;
            let left = until.since(now);
            if left.is_zero() {
                return Ok(None);
            }
            self.socket.set_read_timeout(Some(left))?;
            let (len, from) = match self.socket.recv_from(&mut datagram) {
                Ok((len, SocketAddr::V4(from))) => (len, from),
                Ok((_, SocketAddr::V6(from))) => return Err(format!("a datagram from {from}").into()),
                Err(late) if late.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error.into()),
            };
            let received =
                self.tunnel.receive(monotonic_now(), from.into(), &mut datagram[..len], &mut self.out);
            self.send()?;
            match received {
                Received::Packet { plaintext, .. } => return Ok(Some(datagram[plaintext].to_vec())),
                Received::Keepalive { .. } | Received::Handshake { .. } => {}
                Received::OtherShard(shard) => return Err(format!("there is no shard {shard}").into()),
                Received::Drop(reason) => return Err(format!("the gateway's datagram: {reason:?}").into()),
            }
        }
    }

    fn send(&mut self) -> Result<()> {
        for (_, datagram) in self.out.datagrams.drain(..) {
            self.socket.send(&datagram)?;
        }
        Ok(())
    }
}

/// A packet that wants an answer, and makes a mapping of its own.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Request {
    Datagram(u16),
    Ping(u16),
}

impl Request {
    fn packet(self, source: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
        let (protocol, transport) = match self {
            Self::Datagram(n) => {
                let [port, echo] = [FIRST_PORT + n, ECHO_PORT].map(u16::to_be_bytes);
                (Proto::Udp, vec![port[0], port[1], echo[0], echo[1], 0, 12, 0, 0, b't', b'i', b'd', b'e'])
            }
            Self::Ping(n) => {
                let mut message = vec![ECHO_REQUEST, 0, 0, 0, 0, 0, 0, 1];
                message[4..6].copy_from_slice(&n.to_be_bytes());
                let sum = checksum::checksum(&message);
                message[2..4].copy_from_slice(&sum.to_be_bytes());
                (Proto::Icmp, message)
            }
        };
        let len = 20 + transport.len() as u8;
        let mut packet = vec![0x45, 0, 0, len, 0, 0, 0x40, 0, 64, protocol as u8, 0, 0];
        packet.extend(source.octets());
        packet.extend(target.octets());
        let sum = checksum::checksum(&packet);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        packet.extend(transport);
        packet
    }

    /// The request that a packet answers.
    fn answered_by(packet: &[u8]) -> Option<Self> {
        let field = |at: usize| Some(u16::from_be_bytes([*packet.get(at)?, *packet.get(at + 1)?]));
        match *packet.get(9)? {
            protocol if protocol == Proto::Udp as u8 => {
                Some(Self::Datagram(field(22)?.checked_sub(FIRST_PORT)?))
            }
            protocol if protocol == Proto::Icmp as u8 && *packet.get(20)? == 0 => {
                Some(Self::Ping(field(24)?))
            }
            _ => None,
        }
    }
}

fn key(text: &str) -> Result<[u8; 32]> {
    let mut key = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return Err("a key is 64 hexadecimal digits".into());
    }
    for (n, byte) in key.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * n..2 * n + 2], 16)?;
    }
    Ok(key)
}
