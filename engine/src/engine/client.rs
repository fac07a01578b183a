//! A client's engine, from Python's side: a TUN device, a transport and one shard.

use std::net::{Ipv4Addr, SocketAddrV4};

use zeroize::Zeroizing;

use super::shards::{Shards, link_up};
use super::{ClientSettings, EngineError, check_cipher, coalescing, open_tun, tunnel_config, udp_options};
use crate::client::{Client, ClientConfig};
use crate::clock::monotonic_now;
use crate::messages::{Command, Events, ShardStatus};
use crate::shard::{Devices, Shard};
use crate::transport::udp::{UdpOptions, UdpTransport};
use crate::tunnel::PeerConfig;
use crate::wake::EventFd;

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
        let options = UdpOptions { fwmark: settings.fwmark, ..udp_options(offloads) };
        let transport = UdpTransport::open(listen, options)?;
        let core = Client::new(
            ClientConfig {
                tunnel: tunnel_config(settings.private_key, 0, 1, settings.mtu),
                gateway: PeerConfig {
                    public_key: settings.peer_public_key,
                    preshared_key: settings.preshared_key.map(Zeroizing::new),
                    endpoint: Some(settings.endpoint),
                    persistent_keepalive: settings.persistent_keepalive,
                    cipher: settings.cipher,
                },
                allowed_ips: settings.allowed_ips.clone(),
                coalesce: coalescing(offloads, &tun),
                events: events.clone(),
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
    ///
    /// # Errors
    /// If the thread hangs: it keeps its devices until the process ends.
    pub fn stop(&mut self) -> Result<(), EngineError> {
        self.shards.stop()
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
        self.stop().ok(); // whoever wants to know of a thread that hangs has called it
    }
}
