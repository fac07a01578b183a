#![allow(clippy::unwrap_used, reason = "a test")]
//! The NAT against a model: random walks of clients, strangers and time, and after each step the NAT must say what a
//! model of a hundred lines says.
//!
//! The model knows mappings, sessions, filters, limits, resting ports and timers, and looks everything up by brute
//! force. What it cannot know is which port is drawn; it takes the NAT's word for it and checks that the port was free.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::time::Duration;

use proptest::prelude::*;
use tidegate_engine::clock::Timestamp;
use tidegate_engine::drop_reason::DropReason;
use tidegate_engine::nat::{Endpoint, Filtering, Nat, NatConfig, NatCounts, Proto, ShardSlice};
use tidegate_engine::wire::{Ipv4Packet, Offload, checksum};

const EXTERNAL: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
const FIRST_PORT: u16 = 40_000;
/// So few that they run out.
const UDP_PORTS: u16 = 7;
/// So many that they do not, for sharing is tested elsewhere.
const TCP_PORTS: u16 = 32;
const CLIENT_LIMIT: usize = 6;

#[derive(Clone, Debug)]
enum Step {
    Send { protocol: Proto, client: u8, port: u8, remote: u8, remote_port: u8 },
    Receive { protocol: Proto, port: u8, remote: u8, remote_port: u8 },
    Pass { seconds: u16 },
    RemoveClient { client: u8 },
    Filter { filtering: Filtering },
}

fn protocols() -> impl Strategy<Value = Proto> {
    prop::sample::select(Proto::ALL.to_vec())
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let filterings =
        [Filtering::EndpointIndependent, Filtering::AddressDependent, Filtering::AddressAndPortDependent];
    let send = (protocols(), 0u8..3, 0u8..4, 0u8..3, 0u8..2).prop_map(
        |(protocol, client, port, remote, remote_port)| Step::Send {
            protocol,
            client,
            port,
            remote,
            remote_port,
        },
    );
    let receive = (protocols(), 0u8..12, 0u8..3, 0u8..2).prop_map(|(protocol, port, remote, remote_port)| {
        Step::Receive { protocol, port, remote, remote_port }
    });
    let step = prop_oneof![
        10 => send,
        10 => receive,
        5 => (0u16..130).prop_map(|seconds| Step::Pass { seconds }),
        2 => prop::sample::select(vec![60u16, 61, 120, 121, 240, 241, 300, 301, 600, 2000])
            .prop_map(|seconds| Step::Pass { seconds }),
        1 => (0u8..3).prop_map(|client| Step::RemoveClient { client }),
        1 => prop::sample::select(filterings.to_vec()).prop_map(|filtering| Step::Filter { filtering }),
    ];
    prop::collection::vec(step, 1..120)
}

#[derive(Debug)]
struct ModelMapping {
    external: u16,
    sessions: BTreeMap<Endpoint, ModelSession>,
}

#[derive(Debug)]
struct ModelSession {
    last_activity: u64,
    client_has_sent: bool,
}

#[derive(Default, Debug)]
struct Model {
    now: u64,
    filtering: Filtering,
    mappings: BTreeMap<(Proto, Endpoint), ModelMapping>,
    /// When each resting port is free again.
    resting: BTreeMap<(Proto, u16), u64>,
}

fn timeout(protocol: Proto) -> u64 {
    match protocol {
        Proto::Tcp => 240, // the model's connections never get beyond their SYNs
        Proto::Udp => 300,
        Proto::Icmp => 60,
    }
}

impl Model {
    fn pass(&mut self, seconds: u64) {
        for _ in 0..seconds {
            self.now += 1;
            let now = self.now;
            self.resting.retain(|_, free_at| *free_at > now);
            let mut released = Vec::new();
            self.mappings.retain(|&(protocol, _), mapping| {
                mapping.sessions.retain(|_, session| session.last_activity + timeout(protocol) >= now);
                if mapping.sessions.is_empty() && protocol == Proto::Udp {
                    released.push((protocol, mapping.external));
                }
                !mapping.sessions.is_empty()
            });
            self.resting.extend(released.into_iter().map(|port| (port, now + 120)));
        }
    }

    fn remove_client(&mut self, client: Ipv4Addr) {
        let (now, resting) = (self.now, &mut self.resting);
        self.mappings.retain(|&(protocol, internal), mapping| {
            if internal.address == client {
                resting.insert((protocol, mapping.external), now + 120);
            }
            internal.address != client
        });
    }

    /// What a client's packet must come to; `Ok(None)`: a new mapping.
    fn expect_send(&self, protocol: Proto, internal: Endpoint) -> Result<Option<u16>, DropReason> {
        if let Some(mapping) = self.mappings.get(&(protocol, internal)) {
            return Ok(Some(mapping.external));
        }
        if self.mappings.keys().filter(|(_, other)| other.address == internal.address).count() >= CLIENT_LIMIT
        {
            return Err(DropReason::ClientMappingLimit);
        }
        let taken = self.taken(protocol).len();
        if protocol == Proto::Udp && taken >= usize::from(UDP_PORTS) {
            return Err(DropReason::PortsExhausted);
        }
        Ok(None)
    }

    fn sent(&mut self, protocol: Proto, internal: Endpoint, remote: Endpoint, external: u16) {
        let now = self.now;
        let mapping = self
            .mappings
            .entry((protocol, internal))
            .or_insert_with(|| ModelMapping { external, sessions: BTreeMap::new() });
        mapping.sessions.insert(remote, ModelSession { last_activity: now, client_has_sent: true });
    }

    fn taken(&self, protocol: Proto) -> BTreeSet<u16> {
        let lent = self.mappings.iter().filter(|((p, _), _)| *p == protocol).map(|(_, m)| m.external);
        lent.chain(self.resting.keys().filter(|(p, _)| *p == protocol).map(|(_, port)| *port)).collect()
    }

    /// What a stranger's packet must come to; the model moves on.
    fn receive(&mut self, protocol: Proto, external: u16, remote: Endpoint) -> Result<Endpoint, DropReason> {
        let (now, filtering) = (self.now, self.filtering);
        let Some((&(_, internal), mapping)) =
            self.mappings.iter_mut().find(|((p, _), mapping)| *p == protocol && mapping.external == external)
        else {
            return Err(DropReason::NoMapping);
        };
        if let Some(session) = mapping.sessions.get_mut(&remote) {
            if session.client_has_sent {
                session.last_activity = now;
            }
            return Ok(internal);
        }
        let admitted = match filtering {
            Filtering::EndpointIndependent => true,
            Filtering::AddressDependent => mapping
                .sessions
                .iter()
                .any(|(other, session)| other.address == remote.address && session.client_has_sent),
            Filtering::AddressAndPortDependent => false,
        };
        if !admitted {
            return Err(DropReason::Filtered);
        }
        if protocol == Proto::Tcp {
            mapping.sessions.insert(remote, ModelSession { last_activity: now, client_has_sent: false });
        }
        Ok(internal)
    }

    fn counts(&self) -> (usize, usize, usize, usize, usize) {
        let count = |protocol| self.mappings.keys().filter(|(p, _)| *p == protocol).count();
        let sessions = self.mappings.values().map(|mapping| mapping.sessions.len()).sum();
        (count(Proto::Tcp), count(Proto::Udp), count(Proto::Icmp), sessions, self.resting.len())
    }
}

fn packet(protocol: Proto, source: Endpoint, destination: Endpoint, from_client: bool) -> Vec<u8> {
    let mut transport = match protocol {
        Proto::Tcp => {
            let mut tcp = vec![0; 20];
            tcp[4..8].copy_from_slice(&(if from_client { 100u32 } else { 900 }).to_be_bytes());
            tcp[12] = 0x50;
            tcp[13] = 0x02; // SYN
            tcp
        }
        Proto::Udp => vec![0, 0, 0, 0, 0, 8, 0, 0],
        Proto::Icmp => vec![if from_client { 8 } else { 0 }, 0, 0, 0, 0, 0, 0, 1],
    };
    let checksum_at = match protocol {
        Proto::Icmp => {
            let identifier = if from_client { source.port } else { destination.port };
            transport[4..6].copy_from_slice(&identifier.to_be_bytes());
            2
        }
        _ => {
            transport[0..2].copy_from_slice(&source.port.to_be_bytes());
            transport[2..4].copy_from_slice(&destination.port.to_be_bytes());
            if protocol == Proto::Tcp { 16 } else { 6 }
        }
    };
    let pseudo = match protocol {
        Proto::Icmp => checksum::Sum::ZERO,
        _ => checksum::pseudo_header(
            source.address,
            destination.address,
            protocol as u8,
            transport.len() as u16,
        ),
    };
    let sum = pseudo.add_bytes(&transport).finish();
    transport[checksum_at..checksum_at + 2].copy_from_slice(&sum.to_be_bytes());
    let mut bytes = vec![0x45, 0, 0, 20 + transport.len() as u8, 0, 1, 0, 0, 64, protocol as u8, 0, 0];
    bytes.extend(source.address.octets());
    bytes.extend(destination.address.octets());
    let sum = checksum::checksum(&bytes);
    bytes[10..12].copy_from_slice(&sum.to_be_bytes());
    bytes.extend(transport);
    bytes
}

/// Source and destination, with the identifier in place of both ports of ICMP.
fn ends(packet: &Ipv4Packet<'_>) -> (Endpoint, Endpoint) {
    let identifier = packet.icmp_identifier().unwrap_or(0);
    let (from, to) = packet.ports().unwrap_or((identifier, identifier));
    (Endpoint::new(packet.source(), from), Endpoint::new(packet.destination(), to))
}

struct Both {
    nat: Nat,
    model: Model,
}

impl Both {
    fn new() -> Self {
        let config = NatConfig { max_mappings_per_client: CLIENT_LIMIT, ..NatConfig::default() };
        let mut nat = Nat::new(config, &[EXTERNAL], ShardSlice::WHOLE, [3; 32]);
        nat.add_ports(Proto::Udp, EXTERNAL, &(FIRST_PORT..FIRST_PORT + UDP_PORTS).collect::<Vec<u16>>());
        nat.add_ports(Proto::Tcp, EXTERNAL, &(FIRST_PORT..FIRST_PORT + TCP_PORTS).collect::<Vec<u16>>());
        Self { nat, model: Model { now: 1_000, ..Model::default() } }
    }

    fn now(&self) -> Timestamp {
        Timestamp::from_secs(self.model.now)
    }

    fn walk(&mut self, step: &Step) -> Result<(), TestCaseError> {
        let remote_of = |protocol, remote, port| {
            let port = if protocol == Proto::Icmp { 0 } else { 50 + u16::from(port) };
            Endpoint::new(Ipv4Addr::new(198, 51, 100, remote), port)
        };
        let client_of = |client: u8| Ipv4Addr::new(10, 66, 77, 2 + client);
        match *step {
            Step::Send { protocol, client, port, remote, remote_port } => {
                let internal = Endpoint::new(client_of(client), 2_000 + u16::from(port));
                self.send(protocol, internal, remote_of(protocol, remote, remote_port))?;
            }
            Step::Receive { protocol, port, remote, remote_port } => {
                // ICMP identifiers are drawn from all numbers: take one that is in use.
                let external = match protocol {
                    Proto::Icmp => self.model.taken(protocol).into_iter().nth(usize::from(port)),
                    _ => Some(FIRST_PORT + u16::from(port)),
                };
                self.receive(protocol, external.unwrap_or(77), remote_of(protocol, remote, remote_port))?;
            }
            Step::Pass { seconds } => self.pass(u64::from(seconds)),
            Step::RemoveClient { client } => {
                self.nat.remove_client(client_of(client), self.now());
                self.model.remove_client(client_of(client));
            }
            Step::Filter { filtering } => {
                let config =
                    NatConfig { filtering, max_mappings_per_client: CLIENT_LIMIT, ..NatConfig::default() };
                self.nat.set_config(config, self.now());
                self.model.filtering = filtering;
            }
        }
        let NatCounts { tcp_mappings, udp_mappings, icmp_mappings, sessions, resting_ports, .. } =
            self.nat.counts();
        prop_assert_eq!(
            (tcp_mappings, udp_mappings, icmp_mappings, sessions, resting_ports),
            self.model.counts(),
            "after {:?}",
            step
        );
        prop_assert_eq!(self.nat.mappings(self.now()).count(), self.model.mappings.len());
        Ok(())
    }

    fn send(&mut self, protocol: Proto, internal: Endpoint, remote: Endpoint) -> Result<(), TestCaseError> {
        let now = self.now();
        let mut bytes = packet(protocol, internal, remote, true);
        let mut packet = Ipv4Packet::parse(&mut bytes, 0, Offload::NONE).expect("the packet is well-formed");
        let result = self.nat.translate_outbound(&mut packet, now);
        let expected = self.model.expect_send(protocol, internal);
        prop_assert_eq!(result.err(), expected.err(), "{:?} {} -> {}", protocol, internal, remote);
        let Ok(known) = expected else { return Ok(()) };
        prop_assert!(packet.transport_checksum_ok());
        let external = ends(&packet).0;
        prop_assert_eq!(external.address, EXTERNAL);
        match known {
            Some(port) => prop_assert_eq!(external.port, port, "endpoint-independent mapping"),
            None => {
                prop_assert!(!self.model.taken(protocol).contains(&external.port), "the port was not free")
            }
        }
        self.model.sent(protocol, internal, remote, external.port);
        Ok(())
    }

    fn receive(&mut self, protocol: Proto, external: u16, remote: Endpoint) -> Result<(), TestCaseError> {
        let now = self.now();
        let mut bytes = packet(protocol, remote, Endpoint::new(EXTERNAL, external), false);
        let mut packet = Ipv4Packet::parse(&mut bytes, 0, Offload::NONE).expect("the packet is well-formed");
        let result = self.nat.translate_inbound(&mut packet, now).map(|()| ends(&packet).1);
        let expected = self.model.receive(protocol, external, remote);
        prop_assert_eq!(result, expected, "{:?} {} <- {}", protocol, external, remote);
        prop_assert!(packet.transport_checksum_ok());
        Ok(())
    }

    fn pass(&mut self, seconds: u64) {
        let end = self.now() + Duration::from_secs(seconds);
        while let Some(due) = self.nat.next_expiry().filter(|&due| due <= end) {
            self.nat.expire(due.max(self.now()));
        }
        self.nat.expire(end);
        self.model.pass(seconds);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn the_nat_does_what_the_model_says(steps in steps()) {
        let mut both = Both::new();
        for step in &steps {
            both.walk(step)?;
        }
        both.pass(1_000);
        prop_assert_eq!(both.nat.counts(), NatCounts::default(), "everything ends");
        prop_assert_eq!(both.nat.next_expiry(), None);
    }
}
