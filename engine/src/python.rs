//! The Python module `tidegate._engine`: with `python/` the only place that knows PyO3. Its types are described in `_engine.pyi`.

mod nat;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use pyo3::exceptions::{PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;

use crate::clock::{Timestamp, monotonic_now, unix_time};
use crate::engine::{
    ClientEngine, ClientSettings, EngineError, GatewayEngine, GatewaySettings, OffloadSettings,
};
use crate::external::next_hop::ExternalLink as Link;
use crate::messages::{Events, MappingLog, ShardStatus};
use crate::nat::{Endpoint, Filtering, MappingRecord as Record, MappingView, NatConfig, Proto};
use crate::prefix::Prefix;
use crate::traffic::Direction;
use crate::tunnel::Cipher;

/// External ports, inclusive.
const DEFAULT_PORT_RANGE: (u16, u16) = (1024, 65_535);

fn value_error(message: impl Into<String>) -> PyErr {
    PyValueError::new_err(message.into())
}

impl From<EngineError> for PyErr {
    fn from(error: EngineError) -> Self {
        match error {
            // `OSError(errno, text)`: Python picks the subclass (PermissionError, …) by itself.
            EngineError::Device(error) => match error.raw_os_error() {
                Some(errno) => PyOSError::new_err((errno, error.to_string())),
                None => PyOSError::new_err(error.to_string()),
            },
            EngineError::Argument(message) => PyValueError::new_err(message),
            EngineError::State(message) => PyRuntimeError::new_err(message),
        }
    }
}

fn key(name: &str, bytes: &[u8]) -> PyResult<[u8; 32]> {
    bytes.try_into().map_err(|_| value_error(format!("{name} must be 32 bytes, not {}", bytes.len())))
}

fn address(text: &str) -> PyResult<Ipv4Addr> {
    text.parse().map_err(|_| value_error(format!("{text:?} is not an IPv4 address")))
}

fn addresses(texts: &[String]) -> PyResult<Vec<Ipv4Addr>> {
    texts.iter().map(|text| address(text)).collect()
}

fn prefix(text: &str) -> PyResult<Prefix> {
    text.parse().map_err(value_error)
}

fn endpoint((host, port): &(String, u16)) -> PyResult<SocketAddrV4> {
    Ok(SocketAddrV4::new(address(host)?, *port))
}

fn seconds(name: &str, value: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(value)
        .map_err(|_| value_error(format!("{name} must be a number of seconds, not {value}")))
}

fn transport_protocol(name: &str) -> PyResult<Proto> {
    match name {
        "tcp" => Ok(Proto::Tcp),
        "udp" => Ok(Proto::Udp),
        _ => Err(value_error(format!("{name:?} is neither \"tcp\" nor \"udp\""))),
    }
}

fn cipher(name: &str) -> PyResult<Cipher> {
    Cipher::from_name(name).ok_or_else(|| {
        let known = Cipher::ALL.map(Cipher::name).join(" or ");
        value_error(format!("cipher must be {known}, not {name:?}"))
    })
}

#[pyclass(frozen, module = "tidegate._engine")]
#[derive(Clone)]
struct Offloads(OffloadSettings);

#[pymethods]
impl Offloads {
    #[new]
    #[pyo3(signature = (*, tun=true, tun_uso=true, udp_gso=true, udp_gro=true, external=true, coalesce=true))]
    fn new(tun: bool, tun_uso: bool, udp_gso: bool, udp_gro: bool, external: bool, coalesce: bool) -> Self {
        Self(OffloadSettings { tun, tun_uso, udp_gso, udp_gro, external, coalesce })
    }
}

#[pyclass(frozen, module = "tidegate._engine")]
#[derive(Clone)]
struct NatOptions {
    config: NatConfig,
    port_range: (u16, u16),
}

#[pymethods]
impl NatOptions {
    #[new]
    #[pyo3(signature = (*, filtering="address-dependent", udp_timeout=300.0, tcp_established_timeout=7440.0,
        tcp_opening_timeout=240.0, tcp_closing_timeout=240.0, icmp_timeout=60.0, max_mappings=200_000, max_mappings_per_client=16_384,
        max_new_mappings_per_second=2_000, max_sessions_per_mapping=4_096, port_range=DEFAULT_PORT_RANGE,
        log_mappings=false))]
    #[allow(clippy::too_many_arguments, reason = "keyword-only in Python")]
    fn new(
        filtering: &str,
        udp_timeout: f64,
        tcp_established_timeout: f64,
        tcp_opening_timeout: f64,
        tcp_closing_timeout: f64,
        icmp_timeout: f64,
        max_mappings: usize,
        max_mappings_per_client: usize,
        max_new_mappings_per_second: u32,
        max_sessions_per_mapping: usize,
        port_range: (u16, u16),
        log_mappings: bool,
    ) -> PyResult<Self> {
        let filtering = match filtering {
            "endpoint-independent" => Filtering::EndpointIndependent,
            "address-dependent" => Filtering::AddressDependent,
            "address-and-port-dependent" => Filtering::AddressAndPortDependent,
            other => {
                return Err(value_error(format!("{other:?} is not a filtering behaviour (RFC 4787 §5)")));
            }
        };
        if port_range.0 < 1024 || port_range.0 > port_range.1 {
            return Err(value_error(format!(
                "port_range must go upwards from at least 1024, not {}-{}",
                port_range.0, port_range.1
            )));
        }
        let config = NatConfig {
            filtering,
            udp_timeout: seconds("udp_timeout", udp_timeout)?,
            tcp_established_timeout: seconds("tcp_established_timeout", tcp_established_timeout)?,
            tcp_opening_timeout: seconds("tcp_opening_timeout", tcp_opening_timeout)?,
            tcp_closing_timeout: seconds("tcp_closing_timeout", tcp_closing_timeout)?,
            icmp_timeout: seconds("icmp_timeout", icmp_timeout)?,
            max_mappings,
            max_mappings_per_client,
            max_new_mappings_per_second,
            max_sessions_per_mapping,
            log_mappings,
        };
        Ok(Self { config, port_range })
    }
}

#[pyclass(frozen, module = "tidegate._engine")]
#[derive(Clone)]
struct ExternalLink(Link);

#[pymethods]
impl ExternalLink {
    #[new]
    #[pyo3(signature = (*, interface, index, mac, mtu, addresses, on_link, next_hop))]
    fn new(
        interface: String,
        index: u32,
        mac: &[u8],
        mtu: usize,
        addresses: Vec<String>,
        on_link: Vec<String>,
        next_hop: Option<String>,
    ) -> PyResult<Self> {
        let mac = mac.try_into().map_err(|_| value_error("mac must be 6 bytes"))?;
        let addresses = self::addresses(&addresses)?;
        if addresses.is_empty() {
            return Err(value_error(format!("interface {interface} has no IPv4 address to translate to")));
        }
        Ok(Self(Link {
            interface,
            index,
            mac,
            mtu,
            addresses,
            on_link: on_link.iter().map(|text| prefix(text)).collect::<PyResult<_>>()?,
            router: next_hop.as_deref().map(address).transpose()?,
        }))
    }
}

#[pyclass(frozen, module = "tidegate._engine")]
struct GatewayOptions(GatewaySettings);

#[pymethods]
impl GatewayOptions {
    #[new]
    #[pyo3(signature = (*, private_key, listen, subnet, gateway_address, tun_name, tunnel_mtu, external,
        host_addresses, nat, offloads, shards))]
    #[allow(clippy::too_many_arguments, reason = "keyword-only in Python")]
    fn new(
        private_key: &[u8],
        listen: (String, u16),
        subnet: &str,
        gateway_address: &str,
        tun_name: String,
        tunnel_mtu: usize,
        external: &ExternalLink,
        host_addresses: Vec<String>,
        nat: &NatOptions,
        offloads: &Offloads,
        shards: u8,
    ) -> PyResult<Self> {
        Ok(Self(GatewaySettings {
            private_key: key("private_key", private_key)?,
            listen: endpoint(&listen)?,
            subnet: prefix(subnet)?,
            gateway_address: address(gateway_address)?,
            tun_name,
            tunnel_mtu,
            external: external.0.clone(),
            host_addresses: addresses(&host_addresses)?,
            nat: nat.config.clone(),
            port_range: nat.port_range,
            offloads: offloads.0,
            shards,
        }))
    }
}

#[pyclass(frozen, module = "tidegate._engine")]
struct ClientOptions(ClientSettings);

#[pymethods]
impl ClientOptions {
    #[new]
    #[pyo3(signature = (*, private_key, address, tun_name, mtu, peer_public_key, preshared_key, endpoint,
        allowed_ips, persistent_keepalive, listen_port, fwmark, offloads, cipher="chacha20-poly1305"))]
    #[allow(clippy::too_many_arguments, reason = "keyword-only in Python")]
    fn new(
        private_key: &[u8],
        address: &str,
        tun_name: String,
        mtu: usize,
        peer_public_key: &[u8],
        preshared_key: Option<&[u8]>,
        endpoint: (String, u16),
        allowed_ips: Vec<String>,
        persistent_keepalive: u16,
        listen_port: u16,
        fwmark: u32,
        offloads: &Offloads,
        cipher: &str,
    ) -> PyResult<Self> {
        Ok(Self(ClientSettings {
            private_key: key("private_key", private_key)?,
            address: self::address(address)?,
            tun_name,
            mtu,
            peer_public_key: key("peer_public_key", peer_public_key)?,
            preshared_key: preshared_key.map(|bytes| key("preshared_key", bytes)).transpose()?,
            endpoint: self::endpoint(&endpoint)?,
            allowed_ips: allowed_ips.iter().map(|text| prefix(text)).collect::<PyResult<_>>()?,
            persistent_keepalive: (persistent_keepalive > 0)
                .then(|| Duration::from_secs(u64::from(persistent_keepalive))),
            listen_port,
            fwmark,
            cipher: self::cipher(cipher)?,
            offloads: offloads.0,
        }))
    }
}

#[pyclass(frozen, get_all, module = "tidegate._engine")]
#[derive(Clone)]
struct PeerStatus {
    public_key: Cow<'static, [u8]>,
    address: Option<String>,
    endpoint: Option<(String, u16)>,
    last_handshake: Option<f64>,
    received_bytes: u64,
    sent_bytes: u64,
    received_packets: u64,
    sent_packets: u64,
    mappings: usize,
}

#[pyclass(frozen, get_all, module = "tidegate._engine")]
struct Mapping {
    protocol: &'static str,
    internal: (String, u16),
    external: (String, u16),
    age: f64,
    idle: f64,
    expires_in: Option<f64>,
    sessions: usize,
    state: &'static str,
}

impl From<MappingView> for Mapping {
    fn from(view: MappingView) -> Self {
        let text = |endpoint: Endpoint| (endpoint.address.to_string(), endpoint.port);
        Self {
            protocol: view.protocol.name(),
            internal: text(view.internal),
            external: text(view.external),
            age: view.age.as_secs_f64(),
            idle: view.idle.as_secs_f64(),
            expires_in: view.expires_in.map(|left| left.as_secs_f64()),
            sessions: view.sessions,
            state: view.state.name(),
        }
    }
}

#[pyclass(frozen, get_all, module = "tidegate._engine")]
struct MappingRecord {
    event: &'static str,
    protocol: &'static str,
    internal: (String, u16),
    external: (String, u16),
    time: f64,
    age: f64,
}

impl MappingRecord {
    /// `origin` is the wall clock's time at [`Timestamp::ORIGIN`].
    fn new(record: &Record, origin: Duration) -> Self {
        let text = |endpoint: Endpoint| (endpoint.address.to_string(), endpoint.port);
        Self {
            event: record.event.name(),
            protocol: record.protocol.name(),
            internal: text(record.internal),
            external: text(record.external),
            time: (origin + record.at.since(Timestamp::ORIGIN)).as_secs_f64(),
            age: record.at.since(record.created).as_secs_f64(),
        }
    }
}

#[pyclass(frozen, get_all, module = "tidegate._engine")]
struct Status {
    peers: Vec<PeerStatus>,
    mappings: BTreeMap<&'static str, usize>,
    reserved_ports: BTreeMap<&'static str, usize>,
    sessions: usize,
    resting_ports: usize,
    clients: usize,
    drops: BTreeMap<&'static str, u64>,
    explanations: BTreeMap<&'static str, &'static str>,
    packets: BTreeMap<&'static str, u64>,
    bytes: BTreeMap<&'static str, u64>,
    offloads: BTreeMap<&'static str, bool>,
    shards: usize,
}

impl Status {
    fn new(shards: &[ShardStatus], reserved: [usize; 2]) -> Self {
        let mut merged = ShardStatus::default();
        let mut offloads = BTreeMap::new();
        let mut peers = Vec::new();
        for shard in shards {
            merged.drops.merge(&shard.drops);
            merged.traffic.merge(&shard.traffic);
            for (sum, count) in merged.mappings.iter_mut().zip(shard.mappings) {
                *sum += count;
            }
            for &(name, on) in &shard.offloads {
                // An offload counts as in use only where every shard uses it.
                offloads.entry(name).and_modify(|all| *all &= on).or_insert(on);
            }
            peers.extend(shard.peers.iter().map(|peer| PeerStatus {
                public_key: Cow::Owned(peer.public_key.to_vec()),
                address: peer.address.map(|address| address.to_string()),
                endpoint: peer.endpoint.map(|endpoint| (endpoint.ip().to_string(), endpoint.port())),
                last_handshake: peer.last_handshake.map(|ago| ago.as_secs_f64()),
                received_bytes: peer.received_bytes,
                sent_bytes: peer.sent_bytes,
                received_packets: peer.received_packets,
                sent_packets: peer.sent_packets,
                mappings: peer.mappings,
            }));
        }
        let [tcp, udp, icmp] = merged.mappings;
        Self {
            peers,
            mappings: BTreeMap::from([("tcp", tcp), ("udp", udp), ("icmp", icmp)]),
            reserved_ports: BTreeMap::from([("tcp", reserved[0]), ("udp", reserved[1])]),
            sessions: shards.iter().map(|shard| shard.sessions).sum(),
            resting_ports: shards.iter().map(|shard| shard.resting_ports).sum(),
            clients: shards.iter().map(|shard| shard.clients).sum(),
            drops: merged.drops.nonzero().map(|(reason, count)| (reason.name(), count)).collect(),
            explanations: merged
                .drops
                .nonzero()
                .map(|(reason, _)| (reason.name(), reason.explanation()))
                .collect(),
            packets: Direction::ALL.iter().map(|&d| (d.name(), merged.traffic.packets(d))).collect(),
            bytes: Direction::ALL.iter().map(|&d| (d.name(), merged.traffic.bytes(d))).collect(),
            offloads,
            shards: shards.len(),
        }
    }
}

#[pyclass(frozen, get_all, module = "tidegate._engine")]
struct Event {
    kind: &'static str,
    detail: String,
}

fn events(events: Vec<crate::messages::Event>) -> Vec<Event> {
    events.into_iter().map(|event| Event { kind: event.kind.name(), detail: event.detail }).collect()
}

/// Every method may be called from any thread: while one waits for the shards, another waits for it, without the
/// interpreter's lock. Only events are read beside them.
#[pyclass(frozen, module = "tidegate._engine")]
struct Gateway {
    engine: Mutex<GatewayEngine>,
    events: Events,
    mapping_log: MappingLog,
}

impl Gateway {
    fn with<T: Send>(&self, py: Python<'_>, work: impl FnOnce(&mut GatewayEngine) -> T + Send) -> T {
        py.detach(|| work(&mut self.engine.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

#[pymethods]
impl Gateway {
    #[new]
    fn new(py: Python<'_>, options: &GatewayOptions) -> PyResult<Self> {
        let settings = options.0.clone();
        let engine = py.detach(|| GatewayEngine::new(settings))?;
        let (events, mapping_log) = (engine.events().clone(), engine.mapping_log().clone());
        Ok(Self { engine: Mutex::new(engine), events, mapping_log })
    }

    fn start(&self, py: Python<'_>) -> PyResult<()> {
        Ok(self.with(py, GatewayEngine::start)?)
    }

    fn stop(&self, py: Python<'_>) {
        self.with(py, GatewayEngine::stop);
    }

    fn event_fd(&self) -> i32 {
        self.events.wake().as_fd().as_raw_fd()
    }

    fn poll_events(&self) -> Vec<Event> {
        events(self.events.take())
    }

    fn poll_mapping_log(&self, limit: usize) -> (Vec<MappingRecord>, u64) {
        let (records, missing) = self.mapping_log.take(limit);
        let origin = unix_time().saturating_sub(monotonic_now().since(Timestamp::ORIGIN));
        (records.iter().map(|record| MappingRecord::new(record, origin)).collect(), missing)
    }

    #[pyo3(signature = (public_key, address, preshared_key=None, *, cipher="chacha20-poly1305"))]
    fn set_peer(
        &self,
        py: Python<'_>,
        public_key: &[u8],
        address: &str,
        preshared_key: Option<&[u8]>,
        cipher: &str,
    ) -> PyResult<()> {
        let public_key = key("public_key", public_key)?;
        let preshared_key = preshared_key.map(|bytes| key("preshared_key", bytes)).transpose()?;
        let (address, cipher) = (self::address(address)?, self::cipher(cipher)?);
        Ok(self.with(py, |engine| engine.set_peer(public_key, address, preshared_key, cipher))?)
    }

    fn remove_peer(&self, py: Python<'_>, public_key: &[u8]) -> PyResult<bool> {
        let public_key = key("public_key", public_key)?;
        Ok(self.with(py, |engine| engine.remove_peer(&public_key)))
    }

    fn set_external(&self, py: Python<'_>, link: &ExternalLink, host_addresses: Vec<String>) -> PyResult<()> {
        let (link, addresses) = (link.0.clone(), addresses(&host_addresses)?);
        Ok(self.with(py, |engine| engine.set_external(link, addresses))?)
    }

    fn set_nat(&self, py: Python<'_>, options: &NatOptions) {
        let (config, port_range) = (options.config.clone(), options.port_range);
        self.with(py, |engine| engine.set_nat(config, port_range));
    }

    fn pass_protocols(&self, py: Python<'_>, clients: BTreeMap<u8, String>) -> PyResult<()> {
        let clients = clients
            .iter()
            .map(|(&protocol, client)| Ok((protocol, address(client)?)))
            .collect::<PyResult<BTreeMap<_, _>>>()?;
        Ok(self.with(py, |engine| engine.pass_protocols(clients))?)
    }

    fn publish(
        &self,
        py: Python<'_>,
        protocol: &str,
        external_port: u16,
        internal: (String, u16),
    ) -> PyResult<()> {
        let protocol = transport_protocol(protocol)?;
        let internal = Endpoint::new(address(&internal.0)?, internal.1);
        Ok(self.with(py, |engine| engine.publish(protocol, external_port, internal))?)
    }

    fn unpublish(&self, py: Python<'_>, protocol: &str, external_port: u16) -> PyResult<bool> {
        let protocol = transport_protocol(protocol)?;
        Ok(self.with(py, |engine| engine.unpublish(protocol, external_port)))
    }

    fn status(&self, py: Python<'_>) -> PyResult<Status> {
        let (shards, ports) =
            self.with(py, |engine| engine.status().map(|shards| (shards, engine.reserved_ports())))?;
        Ok(Status::new(&shards, ports))
    }

    #[pyo3(signature = (address=None, limit=10_000))]
    fn mappings(&self, py: Python<'_>, address: Option<&str>, limit: usize) -> PyResult<Vec<Mapping>> {
        let address = address.map(self::address).transpose()?;
        let views = self.with(py, |engine| engine.mappings(address, limit))?;
        Ok(views.into_iter().map(Mapping::from).collect())
    }
}

#[pyclass(module = "tidegate._engine")]
struct Client(ClientEngine);

#[pymethods]
impl Client {
    #[new]
    fn new(options: &ClientOptions) -> PyResult<Self> {
        Ok(Self(ClientEngine::new(options.0.clone())?))
    }

    fn start(&mut self) -> PyResult<()> {
        Ok(self.0.start()?)
    }

    fn stop(&mut self, py: Python<'_>) {
        py.detach(|| self.0.stop());
    }

    fn event_fd(&self) -> i32 {
        self.0.events().wake().as_fd().as_raw_fd()
    }

    fn poll_events(&self) -> Vec<Event> {
        events(self.0.events().take())
    }

    fn set_endpoint(&mut self, endpoint: (String, u16)) -> PyResult<()> {
        self.0.set_endpoint(self::endpoint(&endpoint)?);
        Ok(())
    }

    fn status(&self, py: Python<'_>) -> PyResult<Status> {
        let shards = py.detach(|| self.0.status())?;
        Ok(Status::new(&shards, [0, 0]))
    }
}

/// The engine's version.
#[pyfunction]
fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// Whether this processor has the instructions that AES-256-GCM wants.
#[pyfunction]
fn aes_available() -> bool {
    Cipher::Aes256Gcm.is_available()
}

#[pymodule]
fn _engine(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Offloads>()?;
    module.add_class::<NatOptions>()?;
    module.add_class::<ExternalLink>()?;
    module.add_class::<GatewayOptions>()?;
    module.add_class::<ClientOptions>()?;
    module.add_class::<PeerStatus>()?;
    module.add_class::<Mapping>()?;
    module.add_class::<MappingRecord>()?;
    module.add_class::<Status>()?;
    module.add_class::<Event>()?;
    module.add_class::<Gateway>()?;
    module.add_class::<Client>()?;
    module.add_class::<nat::Nat>()?;
    module.add("Dropped", module.py().get_type::<nat::Dropped>())?;
    module.add_function(wrap_pyfunction!(aes_available, module)?)?;
    module.add_function(wrap_pyfunction!(version, module)?)?;
    Ok(())
}
