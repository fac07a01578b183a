//! The Python module `tidegate._engine`: with `python/` the only place that knows PyO3. Its types are described in
//! `_engine.pyi`.

mod arguments;
mod nat;
mod options;
mod status;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Mutex, PoisonError};

use pyo3::exceptions::{PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;

use self::arguments::{address, addresses, key, prefixes, transport_protocol};
use self::options::{ClientOptions, ExternalLink, GatewayOptions, NatOptions, Offloads};
use self::status::{Event, Mapping, MappingRecord, PeerStatus, Status, events};
use crate::access_policy::AccessPolicy;
use crate::clock::unix_time_at_origin;
use crate::engine::{ClientEngine, EngineError, GatewayEngine};
use crate::messages::{Events, MappingLog};
use crate::nat::{Endpoint, MappingQuery};
use crate::tunnel::{Cipher, Library};

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

    fn stop(&self, py: Python<'_>) -> PyResult<()> {
        Ok(self.with(py, GatewayEngine::stop)?)
    }

    fn event_fd(&self) -> i32 {
        self.events.wake().as_fd().as_raw_fd()
    }

    fn poll_events(&self) -> Vec<Event> {
        events(self.events.take())
    }

    fn poll_mapping_log(&self, limit: usize) -> (Vec<MappingRecord>, u64) {
        let (records, missing) = self.mapping_log.take(limit);
        let origin = unix_time_at_origin();
        (records.iter().map(|record| MappingRecord::new(record, origin)).collect(), missing)
    }

    #[pyo3(signature = (public_key, address, preshared_key=None, *, cipher="chacha20-poly1305", endpoint=None, call=false))]
    #[allow(clippy::too_many_arguments, reason = "keyword-only in Python")]
    fn set_peer(
        &self,
        py: Python<'_>,
        public_key: &[u8],
        address: &str,
        preshared_key: Option<&[u8]>,
        cipher: &str,
        endpoint: Option<(String, u16)>,
        call: bool,
    ) -> PyResult<()> {
        let public_key = key("public_key", public_key)?;
        let preshared_key = preshared_key.map(|bytes| key("preshared_key", bytes)).transpose()?;
        let (address, cipher) = (self::address(address)?, arguments::cipher(cipher)?);
        let endpoint = endpoint.as_ref().map(arguments::endpoint).transpose()?;
        Ok(self
            .with(py, |engine| engine.set_peer(public_key, address, preshared_key, cipher, endpoint, call))?)
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

    fn set_access(&self, py: Python<'_>, between_clients: bool, denied: Vec<String>) -> PyResult<()> {
        let access = AccessPolicy::new(between_clients, prefixes(&denied)?);
        self.with(py, |engine| engine.set_access(&access));
        Ok(())
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

    fn failed_publications(&self, py: Python<'_>) -> Vec<(&'static str, u16, String, String)> {
        self.with(py, |engine| {
            engine
                .failed_publications()
                .map(|(protocol, port, address, why)| {
                    (protocol.name(), port, address.to_string(), why.into())
                })
                .collect()
        })
    }

    fn status(&self, py: Python<'_>) -> PyResult<Status> {
        let (shards, ports) =
            self.with(py, |engine| engine.status().map(|shards| (shards, engine.reserved_ports())))?;
        Ok(Status::new(&shards, ports))
    }

    #[pyo3(signature = (address=None, limit=10_000, *, external=None))]
    fn mappings(
        &self,
        py: Python<'_>,
        address: Option<&str>,
        limit: usize,
        external: Option<(Option<String>, u16)>,
    ) -> PyResult<Vec<Mapping>> {
        let (external_address, external_port) = external.unzip();
        let query = MappingQuery {
            client: address.map(self::address).transpose()?,
            external_address: external_address.flatten().as_deref().map(self::address).transpose()?,
            external_port,
        };
        let views = self.with(py, |engine| engine.mappings(query, limit))?;
        Ok(views.into_iter().map(Mapping::from).collect())
    }
}

/// As [`Gateway`]: every method may be called from any thread.
#[pyclass(frozen, module = "tidegate._engine")]
struct Client {
    engine: Mutex<ClientEngine>,
    events: Events,
}

impl Client {
    fn with<T: Send>(&self, py: Python<'_>, work: impl FnOnce(&mut ClientEngine) -> T + Send) -> T {
        py.detach(|| work(&mut self.engine.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

#[pymethods]
impl Client {
    #[new]
    fn new(py: Python<'_>, options: &ClientOptions) -> PyResult<Self> {
        let settings = options.0.clone();
        let engine = py.detach(|| ClientEngine::new(settings))?;
        let events = engine.events().clone();
        Ok(Self { engine: Mutex::new(engine), events })
    }

    fn start(&self, py: Python<'_>) -> PyResult<()> {
        Ok(self.with(py, ClientEngine::start)?)
    }

    fn stop(&self, py: Python<'_>) -> PyResult<()> {
        Ok(self.with(py, ClientEngine::stop)?)
    }

    fn event_fd(&self) -> i32 {
        self.events.wake().as_fd().as_raw_fd()
    }

    fn poll_events(&self) -> Vec<Event> {
        events(self.events.take())
    }

    fn set_endpoint(&self, py: Python<'_>, endpoint: (String, u16)) -> PyResult<()> {
        let endpoint = arguments::endpoint(&endpoint)?;
        self.with(py, |engine| engine.set_endpoint(endpoint));
        Ok(())
    }

    fn status(&self, py: Python<'_>) -> PyResult<Status> {
        let shards = self.with(py, |engine| engine.status())?;
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

/// Which library seals and opens data messages where so many threads do.
#[pyfunction]
fn aead_library(shards: u8) -> &'static str {
    Library::fastest(shards).name()
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
    module.add_function(wrap_pyfunction!(aead_library, module)?)?;
    module.add_function(wrap_pyfunction!(aes_available, module)?)?;
    module.add_function(wrap_pyfunction!(version, module)?)?;
    Ok(())
}
