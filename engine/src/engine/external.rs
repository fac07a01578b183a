//! The external side of the whole gateway: its interface, its addresses, and the ports that are published on them.
//!
//! Theory of operation. A port is published on the first external address (what answers has one address to come from),
//! and on every shard: that of the client's translates, the others send it what they get, and none lends the port to
//! anybody. First the port is claimed, whether it is the NAT's already or not: by the thread that reserves ports, and
//! so after all that was returned to it before. Then the shards are told; if one of them refuses, all unpublish it
//! again. Before the engine has been started they will find their orders waiting, and have no reason to refuse: so what
//! was published before a restart is published before the first packet. ([`crate::external::reservation`] has a port's
//! whole life.)
//!
//! When an address goes, so do its reserved ports; when another one is the first, everything is published there. What
//! is refused there is remembered with its reason, and tried again at the next change. When the interface is another
//! one, or was away, every shard gets new sockets.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::sync::mpsc;

use super::{EngineError, GatewayEngine};
use crate::external::ExternalGateway;
use crate::external::binding::Binding;
use crate::external::next_hop::ExternalLink;
use crate::external::packet_socket::{FilterRules, MAX_OTHER_PROTOCOLS};
use crate::external::reservation::{PortProtocol, silence_protocol};
use crate::messages::{Command, EventKind};
use crate::nat::{Endpoint, PRIVILEGED_PORTS, Proto, PublishError};
use crate::sys::{Context, DeviceError};

/// A published port.
#[derive(Clone, Copy, Debug)]
pub(super) struct Publication {
    /// The client's address and port.
    internal: Endpoint,
    /// Where the client lives.
    shard: u8,
}

/// Opens every shard's sockets on the interface; they share its packets, and are deaf until they are told what to let
/// through.
pub(super) fn open_external(
    link: &ExternalLink,
    offload: bool,
    shards: u8,
) -> Result<Vec<ExternalGateway>, DeviceError> {
    let mut fanout = None;
    (0..shards)
        .map(|_| {
            let external = ExternalGateway::open(link, offload)?;
            if shards > 1 {
                fanout = Some(external.packets.join_fanout(fanout, shards)?);
            }
            Ok(external)
        })
        .collect()
}

impl GatewayEngine {
    /// The kernel's view of the external interface changed; or it is another interface, or the same after it was away.
    ///
    /// # Errors
    /// If new sockets on the interface cannot be opened; nothing has changed then.
    pub fn set_external(
        &mut self,
        link: ExternalLink,
        host_addresses: Vec<Ipv4Addr>,
    ) -> Result<(), EngineError> {
        if !self.external_binding.holds(link.index) {
            let binding = Binding::open(link.index)?;
            let shards = self.shards.senders.len() as u8;
            let sockets = open_external(&link, self.external_offload, shards)?;
            for (sender, sockets) in self.shards.senders.iter().zip(sockets) {
                sender.send(Command::ExternalSockets(Box::new(sockets)));
            }
            self.external_binding = binding;
        }
        let former = self.external_addresses.first().copied();
        self.external_addresses.clone_from(&link.addresses);
        match self.sockets_for_silence(&self.passed) {
            Ok(silence) => self.silence = silence,
            Err(error) => self.shards.events.push(EventKind::PublicationFailed, error.to_string()),
        }
        let filter = self.filter();
        // First the sockets, so that no shard takes ports of an address that went for those of one that came back: what
        // was reserved of it before is in the shards' queues when this returns.
        self.ports.retain_addresses(&self.external_addresses);
        self.shards.tell_all(|| Command::SetExternal {
            link: link.clone(),
            host_addresses: host_addresses.clone(),
            filter: filter.clone(),
        });
        self.move_publications(former);
        Ok(())
    }

    /// Publishes on the first external address what is not published there: if it is another one than the `former` one,
    /// everything; else what was refused there before.
    fn move_publications(&mut self, former: Option<Ipv4Addr>) {
        let address = self.external_addresses.first().copied();
        let refused = std::mem::take(&mut self.failed);
        let mut silence: Option<String> = None;
        for ((protocol, port), publication) in self.published.clone() {
            let held = former.filter(|&former| !refused.contains_key(&(protocol, port, former)));
            if held.is_some() && held == address {
                continue; // there already
            }
            // Of an address that has gone nothing is left to withdraw.
            if let Some(former) = held.filter(|former| self.external_addresses.contains(former)) {
                self.withdraw(protocol, port, former);
            }
            let Some(address) = address else { continue };
            // Once a shard has not answered, no other port waits for it: whoever needs the engine would wait for them
            // all.
            let outcome = match &silence {
                Some(silence) => Err(silence.clone()),
                None => self.publish_on(address, protocol, port, publication).map_err(|error| {
                    let why = error.to_string();
                    silence = matches!(error, EngineError::State(_)).then(|| why.clone());
                    why
                }),
            };
            if let Err(why) = outcome {
                let detail = format!("{}/{port} on {address}: {why}", protocol.name());
                self.shards.events.push(EventKind::PublicationFailed, detail);
                self.failed.insert((protocol, port, address), why);
            }
        }
    }

    /// The published ports that are not published on an address which came later, and why.
    pub fn failed_publications(&self) -> impl Iterator<Item = (Proto, u16, Ipv4Addr, &str)> {
        self.failed.iter().map(|(&(protocol, port, address), why)| (protocol, port, address, why.as_str()))
    }

    /// Forwards a port of the first external address to a client. Before [`Self::start`], too.
    ///
    /// # Errors
    /// `EADDRINUSE` if a program on the host or a mapping holds the port, or it is published already.
    pub fn publish(&mut self, protocol: Proto, port: u16, internal: Endpoint) -> Result<(), EngineError> {
        let Some(&(_, shard)) = self.peers.values().find(|&&(address, _)| address == internal.address) else {
            return Err(EngineError::Argument(format!("no peer holds {}", internal.address)));
        };
        if self.published.contains_key(&(protocol, port)) {
            return Err(in_use(protocol, port, PublishError::PortInUse));
        }
        let publication = Publication { internal, shard };
        if let Some(&address) = self.external_addresses.first() {
            self.publish_on(address, protocol, port, publication)?;
        }
        self.published.insert((protocol, port), publication);
        self.renew_filter();
        Ok(())
    }

    /// Ends the forwarding of an external port, which is the host's again; false if there was none.
    pub fn unpublish(&mut self, protocol: Proto, port: u16) -> bool {
        let known = self.published.remove(&(protocol, port)).is_some();
        if known {
            let address = self.external_addresses.first().copied();
            let held = address.filter(|&address| !self.failed.contains_key(&(protocol, port, address)));
            if let Some(address) = held {
                self.withdraw(protocol, port, address);
            }
            self.failed.retain(|&(of, failed, _), _| (of, failed) != (protocol, port));
            self.renew_filter();
        }
        known
    }

    /// Ends all forwarding to a client.
    pub(super) fn unpublish_all_of(&mut self, client: Ipv4Addr) {
        let to_client = |publication: &Publication| publication.internal.address == client;
        let ports: Vec<_> =
            self.published.iter().filter(|(_, to)| to_client(to)).map(|(&port, _)| port).collect();
        for (protocol, port) in ports {
            self.unpublish(protocol, port);
        }
    }

    /// Says whose the protocols without ports are, by number: what arrives of one at any external address goes to that
    /// client. Those that are not named are nobody's.
    ///
    /// # Errors
    /// If one of them is TCP, UDP or ICMP, there are too many, or no peer holds the address; if the host cannot be kept
    /// from answering. Nothing has changed then.
    pub fn pass_protocols(&mut self, clients: BTreeMap<u8, Ipv4Addr>) -> Result<(), EngineError> {
        if clients.len() > MAX_OTHER_PROTOCOLS {
            return Err(EngineError::Argument(format!("more than {MAX_OTHER_PROTOCOLS} protocols")));
        }
        for (&protocol, client) in &clients {
            if protocol == 0 || protocol == u8::MAX || Proto::from_number(protocol).is_some() {
                return Err(EngineError::Argument(format!("protocol {protocol} cannot be one client's")));
            }
            if !self.peers.values().any(|(address, _)| address == client) {
                return Err(EngineError::Argument(format!("no peer holds {client}")));
            }
        }
        self.silence = self.sockets_for_silence(&clients)?;
        self.passed = clients;
        self.renew_filter();
        self.shards.tell_all(|| Command::PassProtocols(self.passed.clone().into_iter().collect()));
        Ok(())
    }

    /// Whatever is the client's is nobody's any more.
    pub(super) fn cease_to_pass(&mut self, client: Ipv4Addr) {
        let before = self.passed.len();
        self.passed.retain(|_, held_by| *held_by != client);
        if self.passed.len() < before {
            self.silence.retain(|(protocol, _), _| self.passed.contains_key(protocol));
            self.renew_filter();
            self.shards.tell_all(|| Command::PassProtocols(self.passed.clone().into_iter().collect()));
        }
    }

    fn sockets_for_silence(
        &self,
        clients: &BTreeMap<u8, Ipv4Addr>,
    ) -> Result<HashMap<(u8, Ipv4Addr), OwnedFd>, EngineError> {
        let mut sockets = HashMap::new();
        for &protocol in clients.keys() {
            for &address in &self.external_addresses {
                let what = || format!("keep the host from answering protocol {protocol} on {address}");
                sockets.insert((protocol, address), silence_protocol(protocol, address).context(what)?);
            }
        }
        Ok(sockets)
    }

    /// What the external interface's sockets let through: packets for ports that the NAT may own.
    pub(super) fn filter(&self) -> FilterRules {
        let published = self.published.keys().map(|&(_, port)| port);
        let (first, last) = self.heard_ports;
        let lowest = published.clone().fold(first.min(*PRIVILEGED_PORTS.start()), u16::min);
        let highest = published.fold(last.max(*PRIVILEGED_PORTS.end()), u16::max);
        FilterRules {
            addresses: self.external_addresses.clone(),
            ports: lowest..=highest,
            other_protocols: self.passed.keys().copied().collect(),
            except_udp: Some(self.listen),
        }
    }

    pub(super) fn renew_filter(&self) {
        let filter = self.filter();
        self.shards.tell_all(|| Command::SetFilter(filter.clone()));
    }

    /// Publishes on one address: reserves the port and tells the shards. Refused, it leaves nothing behind.
    fn publish_on(
        &mut self,
        address: Ipv4Addr,
        protocol: Proto,
        port: u16,
        publication: Publication,
    ) -> Result<(), EngineError> {
        let Publication { internal, shard } = publication;
        let reserved =
            PortProtocol::of(protocol).ok_or_else(|| in_use(protocol, port, PublishError::NotTcpOrUdp))?;
        let external = Endpoint::new(address, port);
        let place = SocketAddrV4::new(address, port);
        self.ports
            .claim(reserved, place)
            .context(|| format!("publish {} port {port} of {address}", protocol.name()))?;
        let order = |reply| Command::Publish { protocol, external, internal, shard, reply };
        let answers = if self.ports.is_running() {
            match self.shards.ask(order) {
                Ok(answers) => answers,
                Err(silence) => {
                    // A shard that is late finds both orders, in their order. If the port was ours, one of its mappings
                    // may have it: then it goes on being the NAT's. Else the shard has ceded it by then, and is the one
                    // to return it.
                    self.shards.tell_all(|| Command::Unpublish { protocol, external, returns_port: true });
                    self.ports.disclaim(reserved, place);
                    return Err(silence);
                }
            }
        } else {
            let (reply, _) = mpsc::sync_channel(self.shards.senders.len());
            self.shards.tell_all(|| order(reply.clone()));
            Vec::new() // they will find it waiting, and have no reason to refuse
        };
        let Some(refusal) = answers.iter().find_map(|answer| answer.err()) else { return Ok(()) };
        self.shards.tell_all(|| Command::Unpublish { protocol, external, returns_port: false });
        // The shard whose port it would be has either ceded it, or is one of those that refused.
        if answers[usize::from(port) % answers.len()].is_ok() {
            self.ports.unreserve(reserved, place);
        } else {
            self.ports.disclaim(reserved, place);
        }
        Err(in_use(protocol, port, refusal))
    }

    /// Unpublishes a port on `address`: it is the host's again.
    fn withdraw(&mut self, protocol: Proto, port: u16, address: Ipv4Addr) {
        let Some(reserved) = PortProtocol::of(protocol) else { return };
        let external = Endpoint::new(address, port);
        self.shards.tell_all(|| Command::Unpublish { protocol, external, returns_port: false });
        self.ports.unreserve(reserved, SocketAddrV4::new(address, port));
    }
}

fn in_use(protocol: Proto, port: u16, refusal: PublishError) -> EngineError {
    let source = io::Error::from_raw_os_error(libc::EADDRINUSE);
    DeviceError::new(format!("publish {} port {port} ({refusal})", protocol.name()), source).into()
}
