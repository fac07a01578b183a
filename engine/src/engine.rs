//! One engine: the shards' threads, what they share, and their orderly beginning and end.
//!
//! Theory of operation. Constructing an engine opens every device, so that whatever the kernel refuses is refused
//! before anything runs; `start` spawns one thread per shard and, in a gateway, the port reserver; `stop` tells each
//! to end and joins it. Both work once; stopping twice does nothing. A shard that ends by itself says so in an event.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;

mod client;
mod external;
mod ports;
mod settings;
mod shards;

pub use client::ClientEngine;
use external::{Publication, open_external};
use ports::Ports;
pub use settings::{ClientSettings, GatewaySettings, OffloadSettings};
use shards::{Shards, link_up};
use zeroize::Zeroizing;

use crate::access_policy::AccessPolicy;
use crate::clock::unix_time_at_origin;
use crate::external::binding::Binding;
use crate::external::reservation::{
    PortOwnership, PortProtocol, PortReservation, budget, raise_nofile_limit,
};
use crate::gateway::{Gateway, GatewayConfig};
use crate::messages::{Command, EventKind, Events, MappingLog, ShardStatus};
use crate::nat::{MappingQuery, MappingView, NatConfig, Proto};
use crate::shard::{Devices, Shard};
use crate::sys::{Context, DeviceError};
use crate::transport::udp::{UdpOptions, UdpTransport};
use crate::tun::{Tun, TunOffloads};
use crate::tunnel::{Cipher, PeerConfig, TunnelConfig};
use crate::wake::EventFd;
use crate::wire::CoalesceOptions;

/// Bytes of a transport socket's buffers: a few milliseconds at full speed.
const SOCKET_BUFFER: usize = 4 << 20;
/// Each shard has its share of the external ports: with more shards it would be small. (The receiver index has room for
/// 256.)
const MAX_SHARDS: u8 = 64;

/// Why an engine refuses.
#[derive(Debug)]
pub enum EngineError {
    /// The operating system said no.
    Device(DeviceError),
    /// An argument makes no sense.
    Argument(String),
    /// Not now: started twice, or not running.
    State(String),
}

impl fmt::Display for EngineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device(error) => error.fmt(f),
            Self::Argument(text) | Self::State(text) => f.write_str(text),
        }
    }
}

impl From<DeviceError> for EngineError {
    fn from(error: DeviceError) -> Self {
        Self::Device(error)
    }
}

/// A gateway's engine.
pub struct GatewayEngine {
    shards: Shards,
    ports: Ports,
    ownership: PortOwnership,
    mapping_log: MappingLog,
    listen: SocketAddrV4,
    /// Where each peer lives, and under which address: the shards are told, this is who tells them.
    peers: HashMap<[u8; 32], (Ipv4Addr, u8)>,
    external_addresses: Vec<Ipv4Addr>,
    /// Every port that mappings may have: they outlive a change of the range.
    heard_ports: (u16, u16),
    published: HashMap<(Proto, u16), Publication>,
    /// Where a published port is not published, and why. Of one address and port at most one, for as long as it is so.
    failed: BTreeMap<(Proto, u16, Ipv4Addr), String>,
    /// Whose each protocol without ports is, and the sockets that keep the host silent about it.
    passed: BTreeMap<u8, Ipv4Addr>,
    silence: HashMap<(u8, Ipv4Addr), OwnedFd>,
    /// What tells whether the shards' sockets are still bound to the external interface.
    external_binding: Binding,
    external_offload: bool,
}

impl GatewayEngine {
    /// Opens the TUN device and every socket.
    ///
    /// # Errors
    /// What the kernel refuses, or which setting makes no sense. Nothing is left open then.
    pub fn new(settings: GatewaySettings) -> Result<Self, EngineError> {
        let shards = shard_count(settings.shards)?;
        let offloads = settings.offloads;
        let events = Events::new(EventFd::new()?);
        let descriptors = raise_nofile_limit().context(|| "raise the limit of open files".into())?;
        let budget = budget(descriptors);
        let mut reservation = PortReservation::new(budget);
        reservation.keep(settings.nat.kept_ports);
        let mut engine = Self {
            shards: Shards::new(events.clone()),
            ownership: reservation.ownership(),
            mapping_log: MappingLog::new(events.clone()),
            ports: Ports::Waiting(reservation),
            listen: settings.listen,
            peers: HashMap::new(),
            external_addresses: settings.external.addresses.clone(),
            heard_ports: settings.port_range,
            published: HashMap::new(),
            failed: BTreeMap::new(),
            passed: BTreeMap::new(),
            silence: HashMap::new(),
            external_binding: Binding::open(settings.external.index)?,
            external_offload: offloads.external,
        };
        let tun = open_tun(&settings.tun_name, offloads)?;
        let filter = engine.filter();
        let sockets = open_external(&settings.external, offloads.external, shards)?;
        for (number, ((links, sender), mut external)) in
            link_up(shards, &events)?.into_iter().zip(sockets).enumerate()
        {
            let number = number as u8;
            let transport = UdpTransport::open(
                settings.listen,
                UdpOptions { reuse_port: shards > 1, sticky_source: true, ..udp_options(offloads) },
            )?;
            if number == 0 && shards > 1 {
                transport.steer_by_receiver_index(shards)?;
            }
            external.set_link(&settings.external, &filter)?;
            let core = Gateway::new(GatewayConfig {
                shard: number,
                shards,
                tunnel: tunnel_config(settings.private_key, number, shards, settings.tunnel_mtu),
                subnet: settings.subnet,
                gateway_address: settings.gateway_address,
                external: settings.external.clone(),
                host_addresses: settings.host_addresses.clone(),
                access: settings.access.clone(),
                nat: settings.nat.clone(),
                port_range: settings.port_range,
                port_budget: budget,
                ownership: engine.ownership.clone(),
                mapping_log: engine.mapping_log.clone(),
                events: events.clone(),
                coalesce: coalescing(offloads, &tun),
                seed: random_seed()?,
            });
            let devices = Devices {
                transport: Box::new(transport),
                tun: tun.try_clone()?,
                reads_tun: number == 0,
                tun_offload: offloads.tun,
                external: Some(external),
            };
            engine.shards.add(Shard::new(core, devices, links)?, sender);
        }
        Ok(engine)
    }
}

fn open_tun(name: &str, offloads: OffloadSettings) -> Result<Tun, DeviceError> {
    Tun::open(name, TunOffloads { tso: offloads.tun, uso: offloads.tun && offloads.tun_uso })
}

fn udp_options(offloads: OffloadSettings) -> UdpOptions {
    UdpOptions {
        gso: offloads.udp_gso,
        gro: offloads.udp_gro,
        receive_buffer: SOCKET_BUFFER,
        send_buffer: SOCKET_BUFFER,
        ..UdpOptions::default()
    }
}

fn coalescing(offloads: OffloadSettings, tun: &Tun) -> CoalesceOptions {
    CoalesceOptions { enabled: offloads.coalesce, udp: offloads.coalesce && tun.offloads().uso }
}

/// `0` means one per core.
fn shard_count(wanted: u8) -> Result<u8, EngineError> {
    if wanted > MAX_SHARDS {
        return Err(EngineError::Argument(format!("shards must be at most {MAX_SHARDS}, not {wanted}")));
    }
    if wanted > 0 {
        return Ok(wanted);
    }
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    Ok(cores.min(usize::from(MAX_SHARDS)) as u8)
}

fn tunnel_config(private_key: [u8; 32], shard: u8, shards: u8, mtu: usize) -> TunnelConfig {
    TunnelConfig { private_key, shard, shards, mtu, unix_time_at_origin: unix_time_at_origin() }
}

fn random_seed() -> Result<[u8; 32], EngineError> {
    let mut seed = [0; 32];
    getrandom::fill(&mut seed)
        .map_err(|error| EngineError::State(format!("the kernel gives no randomness: {error}")))?;
    Ok(seed)
}

impl GatewayEngine {
    /// Starts the reserver and the shards.
    ///
    /// # Errors
    /// If it was started before, or a thread cannot be started.
    pub fn start(&mut self) -> Result<(), EngineError> {
        let senders = self.shards.senders.clone();
        let events = self.shards.events.clone();
        let reserver = self.ports.start(move |batch| {
            let request = &batch.request;
            if let Some(shortage) = batch.shortage.as_ref().filter(|_| !request.in_advance) {
                events.push(
                    EventKind::PortsExhausted,
                    format!("{shortage} ({:?} on {})", request.protocol, request.address),
                );
            }
            if let Some(sender) = senders.get(usize::from(batch.request.shard)) {
                sender.send(Command::Ports(batch));
            }
        })?;
        self.shards.tell_all(|| Command::Reserver(reserver.clone()));
        self.shards.start()
    }

    /// Stops and joins everything, and closes every socket. The second time nothing happens.
    ///
    /// # Errors
    /// If a shard hangs: it keeps its sockets until the process ends.
    pub fn stop(&mut self) -> Result<(), EngineError> {
        let stopped = self.shards.stop();
        self.ports = Ports::Stopped;
        self.silence.clear();
        stopped
    }

    /// What happened.
    pub fn events(&self) -> &Events {
        &self.shards.events
    }

    /// Which mappings began and ended.
    pub fn mapping_log(&self) -> &MappingLog {
        &self.mapping_log
    }

    /// Adds a peer, or changes its address, preshared key or cipher. `endpoint` is where it was heard of last, if that
    /// is known from before the engine was made; with `call`, its handshake begins at once, in its turn among those of
    /// all peers.
    ///
    /// # Errors
    /// If another peer holds the address, this processor cannot run the cipher, or the engine was stopped.
    pub fn set_peer(
        &mut self,
        public_key: [u8; 32],
        address: Ipv4Addr,
        preshared_key: Option<[u8; 32]>,
        cipher: Cipher,
        endpoint: Option<SocketAddrV4>,
        call: bool,
    ) -> Result<(), EngineError> {
        check_cipher(cipher)?;
        if self.shards.senders.is_empty() {
            return Err(EngineError::State("the engine was stopped".into()));
        }
        if self.peers.iter().any(|(key, &(held, _))| held == address && *key != public_key) {
            return Err(EngineError::Argument(format!("another peer holds {address}")));
        }
        let shard = match self.peers.get(&public_key) {
            Some(&(former, shard)) => {
                if former != address {
                    self.unpublish_all_of(former);
                    self.cease_to_pass(former);
                    self.shards.tell_all(|| Command::RemovePeer { public_key, address: former });
                }
                shard
            }
            None => self.least_loaded_shard(),
        };
        self.peers.insert(public_key, (address, shard));
        let preshared_key = preshared_key.map(Zeroizing::new);
        for (number, sender) in self.shards.senders.iter().enumerate() {
            // The other shards need to know where the peer lives, and no secrets.
            let preshared_key = preshared_key.clone().filter(|_| number == usize::from(shard));
            let config =
                PeerConfig { public_key, preshared_key, endpoint, persistent_keepalive: None, cipher };
            sender.send(Command::SetPeer { config, address, shard, call });
        }
        Ok(())
    }

    /// Removes a peer with its sessions, mappings and published ports; false if there was none.
    pub fn remove_peer(&mut self, public_key: &[u8; 32]) -> bool {
        let Some((address, _)) = self.peers.remove(public_key) else { return false };
        self.unpublish_all_of(address);
        self.cease_to_pass(address);
        self.shards.tell_all(|| Command::RemovePeer { public_key: *public_key, address });
        true
    }

    /// The NAT's settings changed. Mappings that there are live on, also on ports outside the new range.
    pub fn set_nat(&mut self, config: NatConfig, port_range: (u16, u16)) {
        self.heard_ports = (self.heard_ports.0.min(port_range.0), self.heard_ports.1.max(port_range.1));
        self.renew_filter();
        // First of all: what a shard asks for once it knows of them is none of them.
        self.ports.keep(config.kept_ports);
        self.shards.tell_all(|| Command::SetNat { config: config.clone(), port_range });
    }

    /// What clients may reach changed, also in sessions that there are.
    pub fn set_access(&mut self, access: &AccessPolicy) {
        self.shards.tell_all(|| Command::SetAccess(access.clone()));
    }

    /// Every shard's counters.
    ///
    /// # Errors
    /// If the engine is not running, or a shard does not answer.
    pub fn status(&self) -> Result<Vec<ShardStatus>, EngineError> {
        self.shards.ask(Command::Status)
    }

    /// The NAT's mappings that `query` asks for, at most `limit`, of all shards alike.
    ///
    /// # Errors
    /// As for [`Self::status`].
    pub fn mappings(&self, query: MappingQuery, limit: usize) -> Result<Vec<MappingView>, EngineError> {
        Ok(some_of_each(self.shards.ask(|reply| Command::Mappings { query, limit, reply })?, limit))
    }

    /// Reserved ports: TCP, UDP.
    pub fn reserved_ports(&self) -> [usize; 2] {
        [self.ownership.count(PortProtocol::Tcp), self.ownership.count(PortProtocol::Udp)]
    }

    fn least_loaded_shard(&self) -> u8 {
        let mut load = vec![0usize; self.shards.senders.len()];
        for &(_, shard) in self.peers.values() {
            load[usize::from(shard)] += 1;
        }
        load.iter().enumerate().min_by_key(|&(_, peers)| peers).map_or(0, |(shard, _)| shard as u8)
    }
}

impl Drop for GatewayEngine {
    fn drop(&mut self) {
        self.stop().ok(); // whoever wants to know of a shard that hangs has called it
    }
}

fn check_cipher(cipher: Cipher) -> Result<(), EngineError> {
    if cipher.is_available() {
        return Ok(());
    }
    let name = cipher.name();
    Err(EngineError::Argument(format!("{name} is not available: this processor has no AES instructions")))
}

/// At most `limit` items of the lists, as many of each as of the others while it has any.
fn some_of_each<T>(lists: Vec<Vec<T>>, limit: usize) -> Vec<T> {
    let mut left: Vec<_> = lists.into_iter().map(Vec::into_iter).collect();
    let mut items = Vec::new();
    while items.len() < limit && left.iter().any(|list| list.len() > 0) {
        items.extend(left.iter_mut().filter_map(Iterator::next));
    }
    items.truncate(limit);
    items
}

#[cfg(test)]
mod tests {
    use super::some_of_each;

    #[test]
    fn a_list_that_stops_early_has_something_of_every_shard() {
        let shards = || vec![(0..100).collect(), Vec::new(), vec![200, 201], (300..400).collect()];
        assert_eq!(some_of_each(shards(), 8), [0, 200, 300, 1, 201, 301, 2, 302]);
        assert_eq!(some_of_each(shards(), 2), [0, 200]);
        let mut all = some_of_each(shards(), 1_000);
        all.sort_unstable();
        assert_eq!(all, shards().concat(), "nothing is left out where all are wanted");
    }
}
