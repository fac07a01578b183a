//! The settings of a gateway and of a client, checked when Python makes them.

use std::time::Duration;

use pyo3::prelude::*;

use super::arguments::{self, address, addresses, endpoint, key, prefix, prefixes, seconds, value_error};
use crate::access_policy::AccessPolicy;
use crate::engine::{ClientSettings, GatewaySettings, OffloadSettings};
use crate::external::next_hop::ExternalLink as Link;
use crate::nat::{Filtering, NatConfig};

/// External ports, inclusive.
pub(super) const DEFAULT_PORT_RANGE: (u16, u16) = (1024, 65_535);

#[pyclass(frozen, module = "tidegate._engine")]
#[derive(Clone)]
pub(super) struct Offloads(OffloadSettings);

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
pub(super) struct NatOptions {
    pub(super) config: NatConfig,
    pub(super) port_range: (u16, u16),
}

#[pymethods]
impl NatOptions {
    #[new]
    #[pyo3(signature = (*, filtering=None, udp_timeout=None, tcp_established_timeout=None, tcp_opening_timeout=None,
        tcp_closing_timeout=None, icmp_timeout=None, max_mappings=None, max_mappings_per_client=None,
        max_new_mappings_per_second=None, max_sessions_per_mapping=None, port_range=DEFAULT_PORT_RANGE,
        kept_ports=None, log_mappings=false))]
    #[allow(clippy::too_many_arguments, reason = "keyword-only in Python")]
    fn new(
        filtering: Option<&str>,
        udp_timeout: Option<f64>,
        tcp_established_timeout: Option<f64>,
        tcp_opening_timeout: Option<f64>,
        tcp_closing_timeout: Option<f64>,
        icmp_timeout: Option<f64>,
        max_mappings: Option<usize>,
        max_mappings_per_client: Option<usize>,
        max_new_mappings_per_second: Option<u32>,
        max_sessions_per_mapping: Option<usize>,
        port_range: (u16, u16),
        kept_ports: Option<(u16, u16)>,
        log_mappings: bool,
    ) -> PyResult<Self> {
        let mut config = NatConfig { kept_ports, log_mappings, ..NatConfig::default() };
        if let Some(name) = filtering {
            config.filtering = match name {
                "endpoint-independent" => Filtering::EndpointIndependent,
                "address-dependent" => Filtering::AddressDependent,
                "address-and-port-dependent" => Filtering::AddressAndPortDependent,
                other => {
                    return Err(value_error(format!("{other:?} is not a filtering behaviour (RFC 4787 §5)")));
                }
            };
        }
        if port_range.0 < 1024 || port_range.0 > port_range.1 {
            return Err(value_error(format!(
                "port_range must go upwards from at least 1024, not {}-{}",
                port_range.0, port_range.1
            )));
        }
        if let Some((first, last)) = kept_ports.filter(|(first, last)| first > last) {
            return Err(value_error(format!("kept_ports must go upwards, not {first}-{last}")));
        }
        for (name, given, timeout) in [
            ("udp_timeout", udp_timeout, &mut config.udp_timeout),
            ("tcp_established_timeout", tcp_established_timeout, &mut config.tcp_established_timeout),
            ("tcp_opening_timeout", tcp_opening_timeout, &mut config.tcp_opening_timeout),
            ("tcp_closing_timeout", tcp_closing_timeout, &mut config.tcp_closing_timeout),
            ("icmp_timeout", icmp_timeout, &mut config.icmp_timeout),
        ] {
            if let Some(given) = given {
                *timeout = seconds(name, given)?;
            }
        }
        for (given, limit) in [
            (max_mappings, &mut config.max_mappings),
            (max_mappings_per_client, &mut config.max_mappings_per_client),
            (max_sessions_per_mapping, &mut config.max_sessions_per_mapping),
        ] {
            *limit = given.unwrap_or(*limit);
        }
        config.max_new_mappings_per_second =
            max_new_mappings_per_second.unwrap_or(config.max_new_mappings_per_second);
        Ok(Self { config, port_range })
    }
}

#[pyclass(frozen, module = "tidegate._engine")]
#[derive(Clone)]
pub(super) struct ExternalLink(pub(super) Link);

#[pymethods]
impl ExternalLink {
    #[new]
    #[pyo3(signature = (*, interface, index, mac, mtu, addresses, on_link, router))]
    fn new(
        interface: String,
        index: u32,
        mac: &[u8],
        mtu: usize,
        addresses: Vec<String>,
        on_link: Vec<String>,
        router: Option<String>,
    ) -> PyResult<Self> {
        let mac = mac.try_into().map_err(|_| value_error("mac must be 6 bytes"))?;
        let addresses = arguments::addresses(&addresses)?;
        if addresses.is_empty() {
            return Err(value_error(format!("interface {interface} has no IPv4 address to translate to")));
        }
        Ok(Self(Link {
            interface,
            index,
            mac,
            mtu,
            addresses,
            on_link: prefixes(&on_link)?,
            router: router.as_deref().map(address).transpose()?,
        }))
    }
}

#[pyclass(frozen, module = "tidegate._engine")]
pub(super) struct GatewayOptions(pub(super) GatewaySettings);

#[pymethods]
impl GatewayOptions {
    #[new]
    #[pyo3(signature = (*, private_key, listen, subnet, gateway_address, tun_name, tunnel_mtu, external,
        host_addresses, between_clients, denied, nat, offloads, shards))]
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
        between_clients: bool,
        denied: Vec<String>,
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
            access: AccessPolicy::new(between_clients, prefixes(&denied)?),
            nat: nat.config.clone(),
            port_range: nat.port_range,
            offloads: offloads.0,
            shards,
        }))
    }
}

#[pyclass(frozen, module = "tidegate._engine")]
pub(super) struct ClientOptions(pub(super) ClientSettings);

#[pymethods]
impl ClientOptions {
    #[new]
    #[pyo3(signature = (*, private_key, tun_name, mtu, peer_public_key, preshared_key, endpoint,
        allowed_ips, persistent_keepalive, listen_port, fwmark, offloads, cipher="chacha20-poly1305"))]
    #[allow(clippy::too_many_arguments, reason = "keyword-only in Python")]
    fn new(
        private_key: &[u8],
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
            tun_name,
            mtu,
            peer_public_key: key("peer_public_key", peer_public_key)?,
            preshared_key: preshared_key.map(|bytes| key("preshared_key", bytes)).transpose()?,
            endpoint: arguments::endpoint(&endpoint)?,
            allowed_ips: prefixes(&allowed_ips)?,
            persistent_keepalive: (persistent_keepalive > 0)
                .then(|| Duration::from_secs(u64::from(persistent_keepalive))),
            listen_port,
            fwmark,
            cipher: arguments::cipher(cipher)?,
            offloads: offloads.0,
        }))
    }
}
