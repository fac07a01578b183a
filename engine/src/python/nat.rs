//! `tidegate._engine.Nat`: the NAT's core, one packet at a time, for tests and tinkerers. No gateway uses it.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::Duration;

use pyo3::create_exception;
use pyo3::exceptions::{PyException, PyRuntimeError};
use pyo3::prelude::*;

use super::arguments::{addresses, key, seconds, value_error};
use super::options::NatOptions;
use super::status::Mapping;
use crate::clock::Timestamp;
use crate::drop_reason::DropReason;
use crate::nat::{Nat as Core, NatConfig, Proto, ShardSlice};
use crate::wire::{Ipv4Packet, Offload};

create_exception!(tidegate._engine, Dropped, PyException, "The packet is not delivered; `reason` names why.");

/// The NAT of a gateway with one shard.
#[pyclass(module = "tidegate._engine")]
pub(super) struct Nat(Core);

#[pymethods]
impl Nat {
    #[new]
    #[pyo3(signature = (*, external, options=None, ports=None, seed=None))]
    fn new(
        external: Vec<String>,
        options: Option<&NatOptions>,
        ports: Option<(u16, u16)>,
        seed: Option<&[u8]>,
    ) -> PyResult<Self> {
        let external = addresses(&external)?;
        let (config, port_range) = match options {
            Some(options) => (options.config.clone(), options.port_range),
            None => (NatConfig::default(), super::options::DEFAULT_PORT_RANGE),
        };
        let (first, last) = ports.unwrap_or(port_range);
        if first == 0 || first > last {
            return Err(value_error(format!("ports must go upwards from at least 1, not {first}-{last}")));
        }
        let seed = match seed {
            Some(seed) => key("seed", seed)?,
            None => random_seed()?,
        };
        let mut core = Core::new(config, &external, ShardSlice::WHOLE, seed);
        let ports: Vec<u16> = (first..=last).collect();
        for &address in &external {
            for protocol in [Proto::Tcp, Proto::Udp] {
                core.add_ports(protocol, address, &ports);
            }
        }
        Ok(Self(core))
    }

    fn translate_outbound(
        &mut self,
        py: Python<'_>,
        packet: &[u8],
        now: f64,
    ) -> PyResult<Cow<'static, [u8]>> {
        let now = timestamp(now)?;
        translate(py, packet, |packet| self.0.translate_outbound(packet, now).map(drop))
    }

    fn translate_inbound(&mut self, py: Python<'_>, packet: &[u8], now: f64) -> PyResult<Cow<'static, [u8]>> {
        let now = timestamp(now)?;
        translate(py, packet, |packet| self.0.translate_inbound(packet, now))
    }

    fn expire(&mut self, now: f64) -> PyResult<()> {
        let now = timestamp(now)?;
        // The core does a bounded amount of work at a time; here nobody waits.
        while self.0.next_expiry().is_some_and(|due| due <= now) {
            self.0.expire(now);
        }
        Ok(())
    }

    fn next_expiry(&self) -> Option<f64> {
        self.0.next_expiry().map(|due| due.since(Timestamp::ORIGIN).as_secs_f64())
    }

    fn remove_client(&mut self, address: &str, now: f64) -> PyResult<()> {
        self.0.remove_client(super::address(address)?, timestamp(now)?);
        Ok(())
    }

    fn mappings(&self, now: f64) -> PyResult<Vec<Mapping>> {
        let now = timestamp(now)?;
        Ok(self.0.mappings(now).map(Mapping::from).collect())
    }

    #[getter]
    fn counts(&self) -> BTreeMap<&'static str, usize> {
        let counts = self.0.counts();
        BTreeMap::from([
            ("tcp_mappings", counts.tcp_mappings),
            ("udp_mappings", counts.udp_mappings),
            ("icmp_mappings", counts.icmp_mappings),
            ("sessions", counts.sessions),
            ("resting_ports", counts.resting_ports),
            ("clients", counts.clients),
        ])
    }
}

/// A translated copy of `packet`.
fn translate(
    py: Python<'_>,
    packet: &[u8],
    step: impl FnOnce(&mut Ipv4Packet<'_>) -> Result<(), DropReason>,
) -> PyResult<Cow<'static, [u8]>> {
    let mut copy = packet.to_vec();
    Ipv4Packet::parse(&mut copy, 0, Offload::NONE)
        .and_then(|mut packet| {
            step(&mut packet)?;
            Ok(Cow::Owned(packet.head().to_vec()))
        })
        .map_err(|reason| dropped(py, reason))
}

fn dropped(py: Python<'_>, reason: DropReason) -> PyErr {
    let error = Dropped::new_err(reason.name());
    match error.value(py).setattr("reason", reason.name()) {
        Ok(()) => error,
        Err(refused) => refused,
    }
}

fn timestamp(now: f64) -> PyResult<Timestamp> {
    Ok(Timestamp::ORIGIN + seconds("now", now)?.min(Duration::from_nanos(u64::MAX)))
}

fn random_seed() -> PyResult<[u8; 32]> {
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).map_err(|error| PyRuntimeError::new_err(error.to_string()))?;
    Ok(seed)
}
