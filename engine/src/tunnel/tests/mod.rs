//! Alice, Bob and Eve in memory, under a virtual clock.
//!
//! ```text
//!  Alice 192.0.2.1:51820 ------- the wire: a queue of datagrams ------- Bob 198.51.100.1:51820
//!                                           |
//!                                 Eve, who reads and writes
//! ```

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use super::*;

mod hostile;
mod journeys;
mod time;
mod vectors;

const ALICE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 1), 51820);
const BOB: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(198, 51, 100, 1), 51820);
const EVE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(203, 0, 113, 66), 6666);
const ALICE_KEY: [u8; 32] = [0xa1; 32];
const BOB_KEY: [u8; 32] = [0xb0; 32];
const MTU: usize = 1420;

/// A datagram on its way.
#[derive(Clone, Debug)]
struct Datagram {
    from: SocketAddrV4,
    to: SocketAddrV4,
    bytes: Vec<u8>,
}

/// One end: a tunnel with one peer.
struct End {
    tunnel: Tunnel,
    address: SocketAddrV4,
    /// Whether it hears which of its addresses was addressed, as a gateway does.
    sticky_source: bool,
    peer: PeerId,
    /// The packets that came out of the tunnel.
    inbox: Vec<Vec<u8>>,
    dropped: Vec<DropReason>,
    keepalives: usize,
}

/// Both ends and the wire between them.
struct World {
    now: Timestamp,
    alice: End,
    bob: End,
    wire: VecDeque<Datagram>,
    /// Everything that was ever on the wire.
    recording: Vec<Datagram>,
    /// How often `pass` polled.
    wakeups: usize,
}

fn tunnel(private_key: [u8; 32]) -> Tunnel {
    Tunnel::new(TunnelConfig {
        private_key,
        shard: 0,
        shards: 1,
        mtu: MTU,
        unix_time_at_origin: Duration::from_secs(1_795_000_000),
    })
}

fn peer_config(private_key: [u8; 32], endpoint: Option<SocketAddrV4>) -> PeerConfig {
    PeerConfig {
        public_key: public_key(&private_key),
        preshared_key: None,
        endpoint,
        persistent_keepalive: None,
        cipher: Cipher::default(),
    }
}

impl World {
    /// Alice knows where Bob is, Bob does not know where Alice is: a client and its gateway.
    fn new() -> Self {
        Self::with(|_| ())
    }

    /// Both peers' configurations are adjusted by `adjust`.
    fn with(adjust: impl Fn(&mut PeerConfig)) -> Self {
        let now = Timestamp::from_secs(1000);
        let end = |own: [u8; 32], address, other: [u8; 32], endpoint| {
            let mut tunnel = tunnel(own);
            let mut config = peer_config(other, endpoint);
            adjust(&mut config);
            let peer = tunnel.set_peer(&config, now);
            let sticky_source = endpoint.is_none();
            End {
                tunnel,
                address,
                sticky_source,
                peer,
                inbox: Vec::new(),
                dropped: Vec::new(),
                keepalives: 0,
            }
        };
        Self {
            now,
            alice: end(ALICE_KEY, ALICE, BOB_KEY, Some(BOB)),
            bob: end(BOB_KEY, BOB, ALICE_KEY, None),
            wire: VecDeque::new(),
            recording: Vec::new(),
            wakeups: 0,
        }
    }

    /// A world whose handshake is done.
    fn connected() -> Self {
        let mut world = Self::new();
        world.alice_sends(b"first");
        world.deliver();
        assert_eq!(world.bob.inbox.pop().as_deref(), Some(&b"first"[..]));
        world
    }

    fn alice_sends(&mut self, packet: &[u8]) {
        let sent = self.alice.send(packet, self.now);
        self.put(sent);
    }

    fn bob_sends(&mut self, packet: &[u8]) {
        let sent = self.bob.send(packet, self.now);
        self.put(sent);
    }

    /// Puts datagrams on the wire.
    fn put(&mut self, datagrams: Vec<Datagram>) {
        self.recording.extend(datagrams.iter().cloned());
        self.wire.extend(datagrams);
    }

    /// Delivers until the wire is quiet.
    fn deliver(&mut self) {
        while let Some(datagram) = self.wire.pop_front() {
            self.deliver_one(datagram);
        }
    }

    fn deliver_one(&mut self, datagram: Datagram) {
        let end = if datagram.to == self.bob.address {
            &mut self.bob
        } else if datagram.to == self.alice.address {
            &mut self.alice
        } else {
            return;
        };
        let answers = end.receive(datagram, self.now);
        self.put(answers);
    }

    /// Lets time pass, both ends polled when they ask for it, with everything delivered at once.
    fn pass(&mut self, duration: Duration) {
        let end = self.now + duration;
        loop {
            let wakeups = [self.alice.tunnel.next_wakeup(), self.bob.tunnel.next_wakeup()];
            let Some(next) = wakeups.into_iter().flatten().min().filter(|&next| next <= end) else { break };
            self.now = self.now.max(next);
            self.wakeups += 1;
            self.poll();
            self.deliver();
        }
        self.now = end;
    }

    fn poll(&mut self) {
        for sent in [self.alice.poll(self.now), self.bob.poll(self.now)] {
            self.put(sent);
        }
    }

    /// The messages of `kind` that `from` has sent so far.
    fn count(&self, from: SocketAddrV4, kind: u8) -> usize {
        self.recording.iter().filter(|datagram| datagram.from == from && datagram.bytes[0] == kind).count()
    }
}

impl End {
    /// Sends as a shard does: seal if there is a session, else wait for one.
    fn send(&mut self, packet: &[u8], now: Timestamp) -> Vec<Datagram> {
        let mut out = Outgoing::default();
        if let Some(mut sealer) = self.tunnel.sealer(self.peer, now) {
            let mut buffer = vec![0xee; sealer.datagram_len(packet.len())];
            buffer[Sealer::HEADER_LEN..Sealer::HEADER_LEN + packet.len()].copy_from_slice(packet);
            let len = sealer.seal(&mut buffer, packet.len()).unwrap();
            assert_eq!(len, buffer.len());
            out.datagrams.push((sealer.endpoint(), buffer));
        } else if let Err(reason) = self.tunnel.enqueue(self.peer, packet, now, &mut out) {
            self.dropped.push(reason);
        }
        self.posted(out)
    }

    fn receive(&mut self, mut datagram: Datagram, now: Timestamp) -> Vec<Datagram> {
        let mut out = Outgoing::default();
        let from = Path { remote: datagram.from, local: self.sticky_source.then_some(*self.address.ip()) };
        match self.tunnel.receive(now, from, &mut datagram.bytes, &mut out) {
            Received::Packet { peer, plaintext } => {
                assert_eq!(peer, self.peer);
                // The tests' packets are texts: padding is what no text ends with.
                let packet = &datagram.bytes[plaintext];
                let len = packet.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
                self.inbox.push(packet[..len].to_vec());
            }
            Received::Keepalive { .. } => self.keepalives += 1,
            Received::Handshake { peer } => assert_eq!(peer, self.peer),
            Received::OtherShard(shard) => panic!("no shard {shard} here"),
            Received::Drop(reason) => self.dropped.push(reason),
        }
        self.posted(out)
    }

    fn poll(&mut self, now: Timestamp) -> Vec<Datagram> {
        let mut out = Outgoing::default();
        self.tunnel.poll(now, &mut out);
        self.posted(out)
    }

    fn posted(&self, out: Outgoing) -> Vec<Datagram> {
        let datagram = |(to, bytes): (Path, _)| {
            let from = SocketAddrV4::new(to.local.unwrap_or(*self.address.ip()), self.address.port());
            Datagram { from, to: to.remote, bytes }
        };
        out.datagrams.into_iter().map(datagram).collect()
    }

    fn stats(&self) -> PeerStats {
        self.tunnel.peer(self.peer).unwrap()
    }
}
