//! Who takes part in the gateway's script, and where: addresses, keys, settings; and the packets they make.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::LazyLock;
use std::time::Duration;

use tidegate_engine::external::MacAddress;
use tidegate_engine::external::next_hop::ExternalLink;
use tidegate_engine::nat::{Filtering, NatConfig};
use tidegate_engine::prefix::Prefix;
use tidegate_engine::tunnel::{Cipher, PeerConfig, TunnelConfig, public_key};
use tidegate_engine::wire::{Offload, VirtioNetHeader};

use super::super::packets::{ICMP, TCP, UDP, ipv4, mend};
use super::super::script::Script;

pub(super) const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 66, 77, 1);
pub(super) const EXTERNAL: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
pub(super) const ROUTER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
pub(super) const ENDPOINT: SocketAddrV4 = SocketAddrV4::new(EXTERNAL, 51_820);
pub(super) const STRANGER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 66), 6666);
pub(super) const KEY: [u8; 32] = [0x77; 32];
/// The gateway's public key and the clients': computed once, for it takes longer than many a script.
pub(super) static PUBLIC_KEY: LazyLock<[u8; 32]> = LazyLock::new(|| public_key(&KEY));
pub(super) static PUBLIC_KEYS: LazyLock<[[u8; 32]; CLIENTS]> =
    LazyLock::new(|| std::array::from_fn(|client| public_key(&client_key(client))));
pub(super) const MAC: MacAddress = [2, 0, 0, 0, 0, 10];
pub(super) const TUNNEL_MTU: usize = 1420;
/// One of many shards has few ICMP identifiers, and is therefore made in no time.
pub(super) const SHARDS: u8 = 64;
pub(super) const CLIENTS: usize = 2;
pub(super) const MAX_MAPPINGS: usize = 24;

/// Arbitrary bytes behind a header that is right, mostly, or wholly arbitrary ones.
pub(super) fn packet(script: &mut Script<'_>, source: Ipv4Addr, destination: Ipv4Addr) -> Vec<u8> {
    let mode = script.byte();
    let protocol = script.pick([ICMP, TCP, UDP, TCP, UDP, 47]);
    let body = script.some_bytes(96);
    let mut bytes = match mode % 8 {
        // As it is.
        0 => return body,
        // A header of the script's own: options, fragments, TTL.
        1 | 2 => {
            let mut bytes = body;
            if bytes.len() < 20 {
                bytes.resize(20, 0);
            }
            bytes[12..16].copy_from_slice(&source.octets());
            bytes[16..20].copy_from_slice(&destination.octets());
            bytes
        }
        // Too long for some MTU.
        3 => {
            let len = usize::from(script.word()) % 3000;
            let body = body.into_iter().cycle().take(len).collect();
            ipv4(protocol, source, destination, body)
        }
        _ => ipv4(protocol, source, destination, body),
    };
    if mode & 8 != 0 {
        bytes[6] |= 0x40; // DF
    }
    mend(&mut bytes);
    bytes
}

/// Makes of a packet the one that would follow it.
pub(super) fn follow(bytes: &mut [u8]) {
    if bytes.len() < 40 || bytes[0] != 0x45 {
        return;
    }
    let identification = u16::from_be_bytes([bytes[4], bytes[5]]).wrapping_add(1);
    bytes[4..6].copy_from_slice(&identification.to_be_bytes());
    if bytes[9] == TCP {
        let headers_len = 20 + usize::from(bytes[32] >> 4) * 4;
        let payload = bytes.len().saturating_sub(headers_len) as u32;
        let sequence = u32::from_be_bytes([bytes[24], bytes[25], bytes[26], bytes[27]]).wrapping_add(payload);
        bytes[24..28].copy_from_slice(&sequence.to_be_bytes());
    }
    mend(bytes);
}

/// Offload metadata as the kernel's header would say it: none, mostly.
pub(super) fn virtio(script: &mut Script<'_>) -> Offload {
    match script.byte() % 4 {
        0 => VirtioNetHeader::from_bytes(std::array::from_fn(|_| script.byte())).offload(),
        _ => None,
    }
    .unwrap_or(Offload::NONE)
}

pub(super) fn remote(byte: u8) -> Ipv4Addr {
    match byte % 8 {
        0 => EXTERNAL,
        1 => ROUTER,
        2 => client_address(0),
        _ => Ipv4Addr::new(198, 51, 100, byte % 4),
    }
}

pub(super) fn to_client(to: SocketAddrV4, datagram: Vec<u8>) -> Option<(usize, Vec<u8>)> {
    let client = (0..CLIENTS).find(|&client| client_endpoint(client) == to);
    assert!(client.is_some() || to == STRANGER);
    client.map(|client| (client, datagram))
}

pub(super) fn arp_reply(request: &[u8], station: u8) -> Vec<u8> {
    let Some(asked) = request.get(38..42) else { return Vec::new() };
    let theirs = [2, 0, 0, 0, 1, station];
    [&MAC[..], &theirs, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 2], &theirs, asked, &MAC, &EXTERNAL.octets()].concat()
}

pub(super) fn client_address(client: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 66, 77, 2 + client as u8)
}

pub(super) fn client_endpoint(client: usize) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 101 + client as u8), 40_000)
}

pub(super) fn client_key(client: usize) -> [u8; 32] {
    [client as u8 + 1; 32]
}

pub(super) fn tunnel_config(private_key: [u8; 32], shards: u8) -> TunnelConfig {
    let unix_time_at_origin = Duration::from_secs(1_795_000_000);
    TunnelConfig { private_key, shard: 0, shards, mtu: TUNNEL_MTU, unix_time_at_origin }
}

pub(super) fn peer_config(public_key: [u8; 32], endpoint: Option<SocketAddrV4>) -> PeerConfig {
    let cipher = Cipher::default();
    PeerConfig { public_key, preshared_key: None, endpoint, persistent_keepalive: None, cipher }
}

pub(super) fn nat_config(flags: u8) -> NatConfig {
    let filterings =
        [Filtering::AddressDependent, Filtering::EndpointIndependent, Filtering::AddressAndPortDependent];
    NatConfig {
        filtering: filterings[usize::from(flags >> 4) % 3],
        max_mappings: MAX_MAPPINGS * usize::from(SHARDS),
        max_mappings_per_client: 10,
        max_sessions_per_mapping: 5,
        ..NatConfig::default()
    }
}

pub(super) fn external_link(mtu: usize, router: Option<Ipv4Addr>) -> ExternalLink {
    ExternalLink {
        interface: "eth0".into(),
        index: 2,
        mac: MAC,
        mtu,
        addresses: vec![EXTERNAL],
        on_link: vec![prefix(EXTERNAL)],
        router,
    }
}

/// The /24 around an address.
pub(super) fn prefix(address: Ipv4Addr) -> Prefix {
    Prefix::new(address, 24).expect("24 bits are a prefix")
}
