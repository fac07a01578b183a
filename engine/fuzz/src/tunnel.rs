//! Alice, Bob and Eve: honest packets, mutated, repeated, swapped and invented datagrams, and time.
//!
//! What comes out of a tunnel was put into the other, byte for byte, and comes out once. The timers do not run wild.
//! When Eve is gone, time takes everything away, and Alice and Bob reach each other again, whatever Eve did.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::LazyLock;
use std::time::Duration;

use tidegate_engine::clock::Timestamp;
use tidegate_engine::tunnel::{
    Cipher, Outgoing, PeerConfig, PeerId, QUEUE_LIMIT, Received, Sealer, Tunnel, TunnelConfig, public_key,
};

use super::script::Script;

const ADDRESSES: [SocketAddrV4; 2] = [
    SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 1), 51820),
    SocketAddrV4::new(Ipv4Addr::new(198, 51, 100, 1), 51820),
];
const EVE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(203, 0, 113, 66), 6666);
const KEYS: [[u8; 32]; 2] = [[0xa1; 32], [0xb0; 32]];
/// Computed once: it takes longer than many a script.
static PUBLIC_KEYS: LazyLock<[[u8; 32]; 2]> = LazyLock::new(|| KEYS.map(|key| public_key(&key)));
const MTU: usize = 1420;
/// Sessions, handshakes, cookies and keepalives are over after that.
const LONG: Duration = Duration::from_secs(600);
/// More datagrams and wake-ups than a script can bring about honestly.
const STORM: usize = 20_000;

struct Datagram {
    from: SocketAddrV4,
    to: usize,
    bytes: Vec<u8>,
}

struct End {
    tunnel: Tunnel,
    peer: PeerId,
    /// The packets that are to come out here, and how often they did.
    expected: BTreeMap<Vec<u8>, usize>,
    received: usize,
}

struct World {
    now: Timestamp,
    ends: [End; 2],
    wire: Vec<Datagram>,
    /// What was ever on the wire.
    recording: Vec<Datagram>,
    /// How many packets were sent: each begins with its number.
    sent: u32,
    wakeups: usize,
}

/// Follows the script.
pub fn run(input: &[u8]) {
    let mut script = Script::new(input);
    let mut world = World::new(&mut script);
    while !script.is_over() {
        world.step(&mut script);
    }
    world.end();
}

impl World {
    fn new(script: &mut Script<'_>) -> Self {
        let now = Timestamp::from_secs(1_000);
        let flags = script.byte();
        let end = |own: usize| {
            let mut tunnel = Tunnel::new(TunnelConfig {
                private_key: KEYS[own],
                shard: 0,
                shards: 2,
                mtu: MTU,
                unix_time_at_origin: Duration::from_secs(1_795_000_000),
            });
            let peer = tunnel.set_peer(&config(own, flags), now);
            End { tunnel, peer, expected: BTreeMap::new(), received: 0 }
        };
        let ends = [end(0), end(1)];
        Self { now, ends, wire: Vec::new(), recording: Vec::new(), sent: 0, wakeups: 0 }
    }

    fn step(&mut self, script: &mut Script<'_>) {
        let op = script.byte();
        let end = usize::from(op >> 7);
        match op % 12 {
            0 | 1 => {
                let body = script.some_bytes(64);
                self.send(end, &body);
            }
            2 => self.deliver_all(),
            3 => {
                if let Some(datagram) = self.take(script) {
                    self.deliver(datagram);
                }
            }
            4 => drop(self.take(script)),
            // Repeated, perhaps damaged, from anywhere.
            5 | 6 => {
                if let Some(mut datagram) = self.recorded(script) {
                    let (at, change) = (usize::from(script.byte()), script.byte());
                    if let Some(byte) = datagram.bytes.get_mut(at) {
                        *byte ^= change;
                    }
                    datagram.from = script.pick([datagram.from, EVE]);
                    self.deliver(datagram);
                }
            }
            // The length is another.
            7 => {
                if let Some(mut datagram) = self.recorded(script) {
                    datagram.bytes.resize(usize::from(script.word() % 2048), 0);
                    self.deliver(datagram);
                }
            }
            // The front of one, the rest of another.
            8 => {
                if let (Some(front), Some(mut datagram)) = (self.recorded(script), self.recorded(script)) {
                    let len = usize::from(script.byte()).min(front.bytes.len()).min(datagram.bytes.len());
                    datagram.bytes[..len].copy_from_slice(&front.bytes[..len]);
                    self.deliver(datagram);
                }
            }
            9 => {
                let mut bytes = script.some_bytes(192);
                if let (Some(first), true) = (bytes.first_chunk_mut::<4>(), script.byte() % 2 == 0) {
                    *first = [first[0] % 5, 0, 0, 0];
                }
                self.deliver(Datagram { from: EVE, to: end, bytes });
            }
            10 => {
                let duration = Duration::from_millis(u64::from(script.word()) * 5);
                match script.byte() % 4 {
                    // The loop was busy: nobody polled meanwhile.
                    0 => self.now = self.now + duration,
                    _ => self.pass(duration, script.byte() % 2 == 0),
                }
            }
            _ => {
                let flags = script.byte();
                let (now, end_of) = (self.now, &mut self.ends[end]);
                match script.byte() % 4 {
                    0 => drop(end_of.tunnel.remove_peer(&PUBLIC_KEYS[1 - end])),
                    1 => end_of.tunnel.set_endpoint(end_of.peer, EVE, now),
                    2 => end_of.tunnel.set_peer_elsewhere(PUBLIC_KEYS[1 - end], 1),
                    _ => {}
                }
                // Whatever it was, afterwards there is a peer, perhaps with another cipher or preshared key.
                end_of.peer = end_of.tunnel.set_peer(&config(end, flags), now);
            }
        }
    }

    /// Eve is gone: silence, then a new beginning.
    fn end(&mut self) {
        self.wire.clear();
        for own in 0..2 {
            let (now, end) = (self.now, &mut self.ends[own]);
            end.peer = end.tunnel.set_peer(&config(own, 0), now);
            end.tunnel.set_endpoint(end.peer, ADDRESSES[1 - own], now);
        }
        self.pass(LONG, false);
        self.wire.clear();
        for end in &self.ends {
            assert_eq!(end.tunnel.next_wakeup(), None, "silence");
        }
        for from in 0..2 {
            let before = self.ends[1 - from].received;
            self.send(from, b"are you there?");
            self.deliver_all();
            assert_eq!(self.ends[1 - from].received, before + 1, "Eve leaves no trace");
        }
    }

    // ---- Sending and receiving, as a shard does.

    fn send(&mut self, from: usize, body: &[u8]) {
        let mut packet = self.sent.to_be_bytes().to_vec();
        packet.extend_from_slice(body);
        packet.push(0xff); // The padding begins behind it.
        self.sent += 1;
        let (now, end) = (self.now, &mut self.ends[from]);
        let mut out = Outgoing::default();
        if let Some(mut sealer) = end.tunnel.sealer(end.peer, now) {
            let mut buffer = vec![0xee; sealer.datagram_len(packet.len())];
            buffer[Sealer::HEADER_LEN..Sealer::HEADER_LEN + packet.len()].copy_from_slice(&packet);
            if sealer.seal(&mut buffer, packet.len()).is_ok() {
                out.datagrams.push((sealer.endpoint(), buffer));
            }
        } else {
            // The reason may be that of another packet.
            end.tunnel.enqueue(end.peer, &packet, now, &mut out).ok();
        }
        self.ends[1 - from].expected.insert(packet, 0);
        self.post(from, out);
    }

    fn deliver(&mut self, mut datagram: Datagram) {
        let (now, end) = (self.now, &mut self.ends[datagram.to]);
        let mut out = Outgoing::default();
        match end.tunnel.receive(now, datagram.from.into(), &mut datagram.bytes, &mut out) {
            Received::Packet { peer, plaintext } => {
                assert_eq!(peer, end.peer);
                let plaintext = &datagram.bytes[plaintext];
                let len = plaintext.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
                assert!(plaintext.len() - len < 16, "padding");
                let times = end.expected.get_mut(&plaintext[..len]).expect("it was sent");
                *times += 1;
                assert_eq!(*times, 1, "it comes out once");
                end.received += 1;
            }
            Received::Keepalive { peer } | Received::Handshake { peer } => assert_eq!(peer, end.peer),
            Received::OtherShard(shard) => assert_eq!(shard, 1),
            Received::Drop(_) => {}
        }
        assert!(out.datagrams.len() <= QUEUE_LIMIT + 2, "one datagram lets loose a flood");
        self.post(datagram.to, out);
    }

    fn post(&mut self, from: usize, out: Outgoing) {
        for (to, bytes) in out.datagrams {
            let Some(to) = ADDRESSES.iter().position(|&address| address == to.remote) else {
                assert_eq!(to.remote, EVE);
                continue;
            };
            let datagram = |bytes| Datagram { from: ADDRESSES[from], to, bytes };
            self.recording.push(datagram(bytes.clone()));
            self.wire.push(datagram(bytes));
        }
        assert!(self.recording.len() < STORM, "datagrams without end");
    }

    fn deliver_all(&mut self) {
        while !self.wire.is_empty() {
            let datagram = self.wire.remove(0);
            self.deliver(datagram);
        }
    }

    /// Takes a datagram off the wire.
    fn take(&mut self, script: &mut Script<'_>) -> Option<Datagram> {
        let at = usize::from(script.byte()).checked_rem(self.wire.len())?;
        Some(self.wire.remove(at))
    }

    /// A copy of one of the last datagrams.
    fn recorded(&self, script: &mut Script<'_>) -> Option<Datagram> {
        let back = usize::from(script.byte()).checked_rem(self.recording.len())?;
        let Datagram { from, to, bytes } = &self.recording[self.recording.len() - 1 - back];
        Some(Datagram { from: *from, to: *to, bytes: bytes.clone() })
    }

    // ---- Time.

    /// Both ends are polled when they ask for it, with what they send delivered at once, or not at all.
    fn pass(&mut self, duration: Duration, is_delivered: bool) {
        let end = self.now + duration;
        loop {
            let wakeups = self.ends.iter().filter_map(|end| end.tunnel.next_wakeup());
            let Some(due) = wakeups.min().filter(|&due| due <= end) else { break };
            self.now = self.now.max(due);
            self.wakeups += 1;
            assert!(self.wakeups < STORM, "a timer fires again and again");
            for from in 0..2 {
                let mut out = Outgoing::default();
                self.ends[from].tunnel.poll(self.now, &mut out);
                self.post(from, out);
            }
            if is_delivered {
                self.deliver_all();
            }
        }
        self.now = self.now.max(end);
    }
}

/// What `own` knows of the other; both agree where the flags are equal.
fn config(own: usize, flags: u8) -> PeerConfig {
    PeerConfig {
        public_key: PUBLIC_KEYS[1 - own],
        preshared_key: (flags & 1 != 0).then(|| [7; 32].into()),
        endpoint: (own == 0).then_some(ADDRESSES[1]),
        persistent_keepalive: (flags & 2 != 0).then_some(Duration::from_secs(25)),
        cipher: if flags & 4 != 0 { Cipher::Aes256Gcm } else { Cipher::ChaCha20Poly1305 },
    }
}
