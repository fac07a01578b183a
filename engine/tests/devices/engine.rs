//! A whole gateway's engine, and waiting for what it does.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use tidegate_engine::access_policy::AccessPolicy;
use tidegate_engine::clock::monotonic_now;
use tidegate_engine::engine::{GatewayEngine, GatewaySettings, OffloadSettings};
use tidegate_engine::nat::NatConfig;
use tidegate_engine::tunnel::Cipher;

use crate::packets::GATEWAY;
use crate::world::external_link;

pub const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 66, 77, 2);

/// One of two shards on `g0`, with one client.
pub fn engine() -> GatewayEngine {
    let offloads = OffloadSettings {
        tun: true,
        tun_uso: true,
        udp_gso: true,
        udp_gro: true,
        external: true,
        coalesce: true,
    };
    let settings = GatewaySettings {
        private_key: [1; 32],
        listen: SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 51_820),
        subnet: "10.66.77.0/24".parse().unwrap(),
        gateway_address: Ipv4Addr::new(10, 66, 77, 1),
        tun_name: "tide%d".into(),
        tunnel_mtu: 1_420,
        external: external_link(),
        host_addresses: vec![GATEWAY],
        access: AccessPolicy::default(),
        nat: NatConfig::default(),
        port_range: (1_024, 65_535),
        offloads,
        shards: 2,
    };
    let mut engine = GatewayEngine::new(settings).unwrap();
    engine.set_peer([7; 32], CLIENT, None, Cipher::default(), None, false).unwrap();
    engine
}

pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = monotonic_now() + Duration::from_secs(20);
    while !holds() {
        assert!(monotonic_now() < deadline, "waited in vain for {what}");
        std::thread::yield_now();
    }
}
