//! One engine: the shards' threads, what they share, and their orderly beginning and end.
//!
//! Theory of operation. Constructing an engine opens every device, so that whatever the kernel refuses is refused
//! before anything runs; `start` spawns one thread per shard and, in a gateway, the port reserver; `stop` tells each
//! to end and joins it. Both work once; stopping twice does nothing. A shard that ends by itself says so in an event.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::sync::mpsc::{self, Sender, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use zeroize::Zeroize;

mod external;

use crate::client::{Client, ClientConfig};
use crate::clock::{Timestamp, monotonic_now, unix_time};
use crate::core::Core;
use crate::external::next_hop::ExternalLink;
use crate::external::reservation::{
    PortOwnership, PortProtocol, PortReservation, Reserver, budget, raise_nofile_limit,
};
use crate::gateway::{Gateway, GatewayConfig};
use crate::messages::{Command, EventKind, Events, MappingLog, ShardStatus};
use crate::nat::{Endpoint, MappingView, NatConfig, Proto};
use crate::prefix::Prefix;
use crate::shard::{CROSSING_QUEUE, CrossingSender, Devices, Links, Shard};
use crate::sys::{Context, DeviceError};
use crate::transport::udp::{UdpOptions, UdpTransport};
use crate::tun::{Tun, TunOffloads};
use crate::tunnel::{Cipher, PeerConfig, TunnelConfig};
use crate::wake::EventFd;
use crate::wire::CoalesceOptions;

/// How long a question to a shard may take. A shard answers between two turns, so this is generous.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// Bytes of a transport socket's buffers: a few milliseconds at full speed.
const SOCKET_BUFFER: usize = 4 << 20;
/// More shards than this do not fit the receiver index's low byte with room to spare.
const MAX_SHARDS: u8 = 64;

use external::{Publication, open_external};

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

/// Which offloads to try.
#[derive(Clone, Copy, Debug)]
pub struct OffloadSettings {
    /// TCP superpackets on the TUN device.
    pub tun: bool,
    /// UDP superpackets on the TUN device.
    pub tun_uso: bool,
    /// `UDP_SEGMENT`.
    pub udp_gso: bool,
    /// `UDP_GRO`.
    pub udp_gro: bool,
    /// Superpackets towards the external interface.
    pub external: bool,
    /// Gathering of consecutive segments.
    pub coalesce: bool,
}

/// What a gateway's engine is made of.
#[derive(Clone)]
#[allow(missing_docs, reason = "described in _engine.pyi")]
pub struct GatewaySettings {
    pub private_key: [u8; 32],
    pub listen: SocketAddrV4,
    pub subnet: Prefix,
    pub gateway_address: Ipv4Addr,
    pub tun_name: String,
    pub tunnel_mtu: usize,
    pub external: ExternalLink,
    pub host_addresses: Vec<Ipv4Addr>,
    pub nat: NatConfig,
    pub port_range: (u16, u16),
    pub offloads: OffloadSettings,
    pub shards: u8,
}

impl Drop for GatewaySettings {
    fn drop(&mut self) {
        self.private_key.zeroize();
    }
}

/// What a client's engine is made of.
#[derive(Clone)]
#[allow(missing_docs, reason = "described in _engine.pyi")]
pub struct ClientSettings {
    pub private_key: [u8; 32],
    pub address: Ipv4Addr,
    pub tun_name: String,
    pub mtu: usize,
    pub peer_public_key: [u8; 32],
    pub preshared_key: Option<[u8; 32]>,
    pub endpoint: SocketAddrV4,
    pub allowed_ips: Vec<Prefix>,
    pub persistent_keepalive: Option<Duration>,
    pub listen_port: u16,
    pub fwmark: u32,
    pub cipher: Cipher,
    pub offloads: OffloadSettings,
}

impl Drop for ClientSettings {
    fn drop(&mut self) {
        self.private_key.zeroize();
        if let Some(key) = &mut self.preshared_key {
            key.zeroize();
        }
    }
}

/// A shard that has not been started yet.
type Waiting = Box<dyn FnOnce() -> std::io::Result<()> + Send>;

/// The threads of an engine, from before their start until after their end.
struct Shards {
    waiting: Mutex<Vec<Waiting>>,
    running: Vec<JoinHandle<()>>,
    senders: Vec<CommandSender>,
    events: Events,
    started: bool,
}

/// The way to one shard.
#[derive(Clone)]
struct CommandSender {
    queue: Sender<Command>,
    wake: Arc<EventFd>,
}

impl CommandSender {
    /// A shard that has ended takes no commands, and needs none.
    fn send(&self, command: Command) -> bool {
        self.queue.send(command).is_ok() && self.wake.notify().is_ok()
    }
}

impl Shards {
    fn new(events: Events) -> Self {
        Self { waiting: Mutex::default(), running: Vec::new(), senders: Vec::new(), events, started: false }
    }

    fn add<C: Core + Send + 'static>(&mut self, shard: Shard<C>, sender: CommandSender) {
        self.waiting.get_mut().unwrap_or_else(PoisonError::into_inner).push(Box::new(move || shard.run()));
        self.senders.push(sender);
    }

    fn start(&mut self) -> Result<(), EngineError> {
        if self.started {
            return Err(EngineError::State("the engine was started before; it starts once".into()));
        }
        self.started = true;
        let waiting = std::mem::take(self.waiting.get_mut().unwrap_or_else(PoisonError::into_inner));
        for (number, run) in waiting.into_iter().enumerate() {
            let events = self.events.clone();
            let name = format!("shard-{number}");
            let thread = std::thread::Builder::new()
                .name(name.clone())
                .spawn(move || {
                    // A panic is a defect; it must take the gateway down by name, not leave half of it running.
                    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)) {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => events.push(EventKind::ShardFailed, format!("{name}: {error}")),
                        Err(panic) => {
                            let what = panic
                                .downcast_ref::<String>()
                                .map(String::as_str)
                                .or_else(|| panic.downcast_ref::<&str>().copied())
                                .unwrap_or("panic");
                            events.push(EventKind::ShardFailed, format!("{name}: {what}"));
                        }
                    }
                })
                .map_err(|error| DeviceError::new(format!("start the thread of shard {number}"), error))?;
            self.running.push(thread);
        }
        Ok(())
    }

    fn stop(&mut self) {
        self.waiting.get_mut().unwrap_or_else(PoisonError::into_inner).clear();
        for sender in &self.senders {
            sender.send(Command::Stop);
        }
        for thread in self.running.drain(..) {
            if thread.join().is_err() {
                self.events.push(EventKind::ShardFailed, "a shard's thread could not be joined");
            }
        }
        self.senders.clear();
    }

    /// Asks every shard the same question.
    fn ask<T>(&self, question: impl Fn(SyncSender<T>) -> Command) -> Result<Vec<T>, EngineError> {
        if self.running.is_empty() {
            return Err(EngineError::State("the engine is not running".into()));
        }
        let answers: Vec<_> = self
            .senders
            .iter()
            .map(|sender| {
                let (reply, answer) = mpsc::sync_channel(1);
                sender.send(question(reply));
                answer
            })
            .collect();
        answers
            .into_iter()
            .enumerate()
            .map(|(number, answer)| {
                answer.recv_timeout(ANSWER_TIMEOUT).map_err(|_| {
                    EngineError::State(format!("shard {number} did not answer within {ANSWER_TIMEOUT:?}"))
                })
            })
            .collect()
    }

    fn tell_all(&self, command: impl Fn() -> Command) {
        for sender in &self.senders {
            sender.send(command());
        }
    }
}

/// A gateway's engine.
pub struct GatewayEngine {
    shards: Shards,
    reservation: Option<PortReservation>,
    reserver: Option<Reserver>,
    ownership: PortOwnership,
    mapping_log: MappingLog,
    listen_port: u16,
    /// Where each peer lives, and under which address: the shards are told, this is who tells them.
    peers: HashMap<[u8; 32], (Ipv4Addr, u8)>,
    external_addresses: Vec<Ipv4Addr>,
    /// Every port that mappings may have: they outlive a change of the range.
    heard_ports: (u16, u16),
    published: HashMap<(Proto, u16), Publication>,
    /// Whose each protocol without ports is, and the sockets that keep the host silent about it.
    passed: BTreeMap<u8, Ipv4Addr>,
    silence: HashMap<(u8, Ipv4Addr), OwnedFd>,
    external_index: u32,
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
        let reservation = PortReservation::new(budget(descriptors));
        let mut engine = Self {
            shards: Shards::new(events.clone()),
            reserver: None,
            ownership: reservation.ownership(),
            mapping_log: MappingLog::new(events.clone()),
            reservation: Some(reservation),
            listen_port: settings.listen.port(),
            peers: HashMap::new(),
            external_addresses: settings.external.addresses.clone(),
            heard_ports: settings.port_range,
            published: HashMap::new(),
            passed: BTreeMap::new(),
            silence: HashMap::new(),
            external_index: settings.external.index,
            external_offload: offloads.external,
        };
        let tun = open_tun(&settings.tun_name, offloads)?;
        let filter = engine.filter();
        let sockets = open_external(&settings.external, offloads.external, shards)?;
        for (number, ((links, sender), mut external)) in
            link_up(shards, &events)?.into_iter().zip(sockets).enumerate()
        {
            let number = number as u8;
            let transport = UdpTransport::open(settings.listen, udp_options(offloads, shards > 1, 0))?;
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
                nat: settings.nat.clone(),
                port_range: settings.port_range,
                ownership: engine.ownership.clone(),
                mapping_log: engine.mapping_log.clone(),
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

fn udp_options(offloads: OffloadSettings, reuse_port: bool, fwmark: u32) -> UdpOptions {
    UdpOptions {
        gso: offloads.udp_gso,
        gro: offloads.udp_gro,
        reuse_port,
        fwmark,
        receive_buffer: SOCKET_BUFFER,
        send_buffer: SOCKET_BUFFER,
    }
}

fn coalescing(offloads: OffloadSettings, tun: &Tun) -> CoalesceOptions {
    CoalesceOptions { enabled: offloads.coalesce, udp: offloads.coalesce && tun.offloads().uso }
}

/// The queues between the shards, and from Python to each.
fn link_up(shards: u8, events: &Events) -> Result<Vec<(Links, CommandSender)>, DeviceError> {
    let mut receivers = Vec::new();
    let mut crossing_senders = Vec::new();
    for _ in 0..shards {
        let wake = Arc::new(EventFd::new()?);
        let (queue, crossings) = mpsc::sync_channel(CROSSING_QUEUE);
        crossing_senders.push(CrossingSender { queue, wake: Arc::clone(&wake) });
        receivers.push((wake, crossings));
    }
    Ok(receivers
        .into_iter()
        .map(|(wake, crossings)| {
            let (queue, commands) = mpsc::channel();
            let sender = CommandSender { queue, wake: Arc::clone(&wake) };
            let shards = crossing_senders.clone();
            (Links { wake, commands, crossings, shards, reserver: None, events: events.clone() }, sender)
        })
        .collect())
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
    let unix_time_at_origin = unix_time().saturating_sub(monotonic_now().since(Timestamp::ORIGIN));
    TunnelConfig { private_key, shard, shards, mtu, unix_time_at_origin }
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
        let Some(reservation) = self.reservation.take() else {
            return Err(EngineError::State("the engine was started before; it starts once".into()));
        };
        let senders = self.shards.senders.clone();
        let events = self.shards.events.clone();
        let reserver = Reserver::start(reservation, move |batch| {
            if let Some(shortage) = &batch.shortage {
                let request = &batch.request;
                events.push(
                    EventKind::PortsExhausted,
                    format!("{shortage} ({:?} on {})", request.protocol, request.address),
                );
            }
            if let Some(sender) = senders.get(usize::from(batch.request.shard)) {
                sender.send(Command::Ports(batch));
            }
        })?;
        self.shards.tell_all(|| Command::Reserver(reserver.handle()));
        self.reserver = Some(reserver);
        self.shards.start()
    }

    /// Stops and joins everything, and closes every socket. The second time nothing happens.
    pub fn stop(&mut self) {
        self.shards.stop();
        self.reservation = None;
        self.reserver = None;
        self.silence.clear();
    }

    /// What happened.
    pub fn events(&self) -> &Events {
        &self.shards.events
    }

    /// Which mappings began and ended.
    pub fn mapping_log(&self) -> &MappingLog {
        &self.mapping_log
    }

    /// Adds a peer, or changes its address, preshared key or cipher.
    ///
    /// # Errors
    /// If another peer holds the address, or this processor cannot run the cipher.
    pub fn set_peer(
        &mut self,
        public_key: [u8; 32],
        address: Ipv4Addr,
        preshared_key: Option<[u8; 32]>,
        cipher: Cipher,
    ) -> Result<(), EngineError> {
        check_cipher(cipher)?;
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
        let config =
            PeerConfig { public_key, preshared_key, endpoint: None, persistent_keepalive: None, cipher };
        self.shards.tell_all(|| Command::SetPeer { config: config.clone(), address, shard });
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
        self.shards.tell_all(|| Command::SetNat { config: config.clone(), port_range });
    }

    /// Every shard's counters.
    ///
    /// # Errors
    /// If the engine is not running, or a shard does not answer.
    pub fn status(&self) -> Result<Vec<ShardStatus>, EngineError> {
        self.shards.ask(Command::Status)
    }

    /// The NAT's mappings: of one client or of all, at most `limit`.
    ///
    /// # Errors
    /// As for [`Self::status`].
    pub fn mappings(&self, address: Option<Ipv4Addr>, limit: usize) -> Result<Vec<MappingView>, EngineError> {
        let mut mappings: Vec<_> = self
            .shards
            .ask(|reply| Command::Mappings { address, limit, reply })?
            .into_iter()
            .flatten()
            .collect();
        mappings.truncate(limit);
        Ok(mappings)
    }

    /// Reserved ports: TCP, UDP.
    pub fn reserved_ports(&self) -> [usize; 2] {
        [self.ownership.count(PortProtocol::Tcp), self.ownership.count(PortProtocol::Udp)]
    }

    fn least_loaded_shard(&self) -> u8 {
        let mut load = vec![0usize; self.shards.senders.len().max(1)];
        for &(_, shard) in self.peers.values() {
            load[usize::from(shard)] += 1;
        }
        load.iter().enumerate().min_by_key(|&(_, peers)| peers).map_or(0, |(shard, _)| shard as u8)
    }
}

impl Drop for GatewayEngine {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A client's engine: one shard.
pub struct ClientEngine {
    shards: Shards,
}

impl ClientEngine {
    /// Opens the TUN device and the transport.
    ///
    /// # Errors
    /// What the kernel refuses, or a cipher that this processor cannot run. Nothing is left open then.
    pub fn new(settings: ClientSettings) -> Result<Self, EngineError> {
        check_cipher(settings.cipher)?;
        let offloads = settings.offloads;
        let events = Events::new(EventFd::new()?);
        let tun = open_tun(&settings.tun_name, offloads)?;
        let listen = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, settings.listen_port);
        let transport = UdpTransport::open(listen, udp_options(offloads, false, settings.fwmark))?;
        let core = Client::new(
            ClientConfig {
                tunnel: tunnel_config(settings.private_key, 0, 1, settings.mtu),
                gateway: PeerConfig {
                    public_key: settings.peer_public_key,
                    preshared_key: settings.preshared_key,
                    endpoint: Some(settings.endpoint),
                    persistent_keepalive: settings.persistent_keepalive,
                    cipher: settings.cipher,
                },
                allowed_ips: settings.allowed_ips.clone(),
                coalesce: coalescing(offloads, &tun),
            },
            monotonic_now(),
        );
        let mut shards = Shards::new(events.clone());
        if let Some((links, sender)) = link_up(1, &events)?.pop() {
            let transport = Box::new(transport);
            let devices =
                Devices { transport, tun, reads_tun: true, tun_offload: offloads.tun, external: None };
            shards.add(Shard::new(core, devices, links)?, sender);
        }
        Ok(Self { shards })
    }

    /// Starts the thread, and the first handshake.
    ///
    /// # Errors
    /// If it was started before, or the thread cannot be started.
    pub fn start(&mut self) -> Result<(), EngineError> {
        self.shards.start()?;
        self.shards.tell_all(|| Command::StartHandshake);
        Ok(())
    }

    /// Stops and joins the thread, and closes everything. The second time nothing happens.
    pub fn stop(&mut self) {
        self.shards.stop();
    }

    /// What happened.
    pub fn events(&self) -> &Events {
        &self.shards.events
    }

    /// Sends to another address from now on, as when the gateway's name resolves anew.
    pub fn set_endpoint(&mut self, endpoint: SocketAddrV4) {
        self.shards.tell_all(|| Command::SetEndpoint(endpoint));
    }

    /// The counters.
    ///
    /// # Errors
    /// If the engine is not running, or does not answer.
    pub fn status(&self) -> Result<Vec<ShardStatus>, EngineError> {
        self.shards.ask(Command::Status)
    }
}

impl Drop for ClientEngine {
    fn drop(&mut self) {
        self.stop();
    }
}

fn check_cipher(cipher: Cipher) -> Result<(), EngineError> {
    if cipher.is_available() {
        return Ok(());
    }
    let name = cipher.name();
    Err(EngineError::Argument(format!("{name} is not to be had: this processor has no AES instructions")))
}
