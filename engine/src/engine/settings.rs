//! What an engine is made of: plain values from Python, whose keys are erased once they have been used.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use zeroize::Zeroize;

use crate::access_policy::AccessPolicy;
use crate::external::next_hop::ExternalLink;
use crate::nat::NatConfig;
use crate::prefix::Prefix;
use crate::tunnel::Cipher;

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
    pub access: AccessPolicy,
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
