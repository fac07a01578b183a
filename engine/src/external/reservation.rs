//! The NAT's external ports, reserved so that the host stays out of them.
//!
//! # Theory of operation
//!
//! The NAT shares its address with the host's kernel, which would answer a TCP segment for an unknown port with RST and
//! a UDP datagram with *port unreachable*. A reserved port is an ordinary socket, a TCP listener or a bound UDP socket,
//! with a filter that drops everything. The kernel runs the filter before it would answer (`tcp_v4_rcv`: `tcp_filter`;
//! `__udp4_lib_rcv` answers only where it finds no socket), so it is silent, while AF_PACKET still sees every packet.
//! And since the port is taken by the rules of the system itself, no program can get it, by bind(2) or by connect(2),
//! nor does the NAT get a port that a program holds.
//!
//! The filter is attached before the socket can receive, and locked. All sockets share one program where the process
//! may load one (eBPF, `CAP_BPF`); elsewhere each has a copy, which costs some 9 us and 4 KiB of the kernel's memory
//! more. Neither SO_REUSEADDR nor SO_REUSEPORT is set: the kernel lets two sockets share a port only if both ask for
//! it.
//!
//! Sockets cost descriptors, so `RLIMIT_NOFILE` bounds how many ports there are ([`raise_nofile_limit`], [`budget`]).
//! Opening hundreds takes milliseconds, so it happens on a thread of its own ([`Reserver`]) and never on a packet's
//! way.
//!
//! # A port's life
//!
//! ```text
//!                                claim
//!      +--------------------------------------------------------+
//!      |                                                        v
//!  the host's <------------------ unreserve --------------- published
//!      |  ^                                                     ^
//!      |  +---- return ----+                                    |
//!      | reserve           |            claim, cede             |
//!      v         add       |                                    |
//!  reserved ------------> free ---------------------------------+
//!                         | ^ ^                                 |
//!                    draw | | +----- wake -----+                |
//!                         | | release          |                |
//!                         v |     release      |   claim, cede  |
//!                        lent -------------> resting -----------+
//! ```
//!
//! One word for each step, wherever ports are spoken of:
//!
//! - *reserve*: a socket is opened, and the port is on its way to the shard that asked ([`PortReservation::reserve`]);
//! - *add*: it joins the shard's pool, or is returned if it may not be lent any more (`Pools::add` in `nat/ports.rs`);
//! - *draw*: a new mapping has it (`Pools::draw`). The port is lent, and may be shared (RFC 7857 §3) while it is;
//! - *release*: its last mapping has ended (`Pools::release`). Where packets may still be under way to it, it rests;
//! - *wake*: it has rested for long enough (`Pools::wake`);
//! - *return*: instead of becoming free, or staying so, a port that may not be lent any more leaves the pool
//!   (`Pools::return_port`), and the reserver, told by the shard, closes the socket ([`PortReservation::return_port`]);
//! - *claim*: it is to be published ([`PortReservation::claim`]). Its socket, opened for that if there was none, stays
//!   open whatever the NAT returns;
//! - *cede*: the shard in whose pool it is takes it out (`Pools::cede`), so that nobody is lent what is published. If
//!   it is still on its way there, it is not added; if it is lent, it is not ceded, and the claim comes to nothing;
//! - *disclaim*: a claim that came to nothing ends ([`PortReservation::disclaim`]). The port is what it was before, or
//!   the host's if the NAT has returned it since;
//! - *unreserve*: it is published no longer, or was ceded and not published after all, and the engine has the socket
//!   closed ([`PortReservation::unreserve`]). Where a shard has not answered, it may have ceded the port or not, and is
//!   told to return it if it has (`Command::Unpublish`).
//!
//! When an address goes, all of its ports are the host's at once ([`PortReservation::retain_addresses`]).
//!
//! # What is kept, and what is claimed
//!
//! Some ports can be *kept* for the host's programs ([`PortReservation::keep`]): the kernel draws ports for these
//! (connect(2), and bind(2) to port 0) from a range of its own, and where all of that were reserved, the host could not
//! even ask for a name.
//!
//! A port that is published is *claimed*. It may be one that was reserved for the NAT to lend; that the NAT returns it
//! then, perhaps for a reason from before it was published, does not count: a claimed port is reserved until the claim
//! ends.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsFd, OwnedFd};

use crate::bpf::{DROP_ALL, SILENCE};
use crate::nat::Proto;
use crate::sys::{self, SocketAddress};

mod ownership;
mod reserver;
#[cfg(test)]
mod tests;

pub use ownership::PortOwnership;
pub use reserver::{Batch, PendingRequests, Refused, ReserveRequest, Reserver, ReserverHandle};

/// A protocol whose ports are reserved. (ICMP identifiers need not be: the host answers no echo replies.)
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PortProtocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl PortProtocol {
    /// As what the external ports of a NAT's protocol are reserved; `None` for ICMP identifiers.
    pub const fn of(protocol: Proto) -> Option<Self> {
        match protocol {
            Proto::Tcp => Some(Self::Tcp),
            Proto::Udp => Some(Self::Udp),
            Proto::Icmp => None,
        }
    }
}

impl From<PortProtocol> for Proto {
    fn from(protocol: PortProtocol) -> Self {
        match protocol {
            PortProtocol::Tcp => Self::Tcp,
            PortProtocol::Udp => Self::Udp,
        }
    }
}

/// Why there are fewer ports than were asked for.
#[derive(Debug)]
pub enum Shortage {
    /// Every port in the range is reserved already, held by a program of the host, or kept for one.
    NoFreePort,
    /// The process has as many descriptors for ports as it may have: raise `LimitNOFILE` of the service.
    Descriptors,
    /// Another refusal, as `EADDRNOTAVAIL` for an address that the host has not.
    Refused(io::Error),
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoFreePort => f.write_str(
                "every port of the range is reserved, or is held by a program of the host or left to one",
            ),
            Self::Descriptors => {
                f.write_str("the process has no more descriptors for ports: raise RLIMIT_NOFILE")
            }
            Self::Refused(error) => write!(f, "cannot reserve a port: {error}"),
        }
    }
}

/// The sockets that hold the reserved ports. A port is the host's again when its socket is dropped.
#[derive(Debug)]
pub struct PortReservation {
    sockets: HashMap<(PortProtocol, SocketAddrV4), OwnedFd>,
    /// Those of them that are claimed, and whether the NAT has them as well.
    claimed: HashMap<(PortProtocol, SocketAddrV4), bool>,
    ownership: PortOwnership,
    /// The addresses that there are, once they have changed.
    addresses: Option<Vec<Ipv4Addr>>,
    /// What is kept for the host's programs, first and last.
    kept: Option<(u16, u16)>,
    budget: usize,
    /// The filter that all sockets share; `None`: each has its own.
    silence: Option<OwnedFd>,
}

impl PortReservation {
    /// No ports yet, and at most `budget` ever, as of [`budget`].
    pub fn new(budget: usize) -> Self {
        let silence = sys::load_socket_filter(&SILENCE).ok(); // unprivileged: each socket has its own, then
        let (sockets, claimed) = (HashMap::new(), HashMap::new());
        let ownership = PortOwnership::new();
        Self { sockets, claimed, ownership, addresses: None, kept: None, budget, silence }
    }

    /// Reserves none of these ports, first and last, from now on. Those that are reserved already are for the NAT to
    /// return, and a port that is published may be one of them.
    pub fn keep(&mut self, ports: Option<(u16, u16)>) {
        self.kept = ports;
    }

    /// What is reserved, for others to read.
    pub fn ownership(&self) -> PortOwnership {
        self.ownership.clone()
    }

    /// Reserves ports out of `candidates`, in their order, until there are `count`.
    ///
    /// Candidates that are reserved already, that a program of the host holds, or that are kept for one, are passed
    /// over. Whatever is returned is reserved, also beside a [`Shortage`]. Of an address that has gone there are none,
    /// even if the host has it.
    pub fn reserve(
        &mut self,
        protocol: PortProtocol,
        address: Ipv4Addr,
        candidates: impl IntoIterator<Item = u16>,
        count: usize,
    ) -> (Vec<u16>, Option<Shortage>) {
        if self.addresses.as_ref().is_some_and(|addresses| !addresses.contains(&address)) {
            let gone = io::Error::from_raw_os_error(libc::EADDRNOTAVAIL);
            return (Vec::new(), Some(Shortage::Refused(gone)));
        }
        let mut ports = Vec::with_capacity(count.min(1024));
        let mut candidates = candidates.into_iter();
        while ports.len() < count {
            let Some(port) = candidates.next() else { return (ports, Some(Shortage::NoFreePort)) };
            if self.kept.is_some_and(|(first, last)| (first..=last).contains(&port)) {
                continue;
            }
            match self.open(protocol, SocketAddrV4::new(address, port)) {
                Ok(()) => ports.push(port),
                Err(error) if error.raw_os_error() == Some(libc::EADDRINUSE) => {} // the next one, then
                Err(error) => {
                    let shortage = match error.raw_os_error() {
                        Some(libc::EMFILE | libc::ENFILE) => Shortage::Descriptors,
                        _ => Shortage::Refused(error),
                    };
                    return (ports, Some(shortage));
                }
            }
        }
        (ports, None)
    }

    /// How many of `count` ports to reserve at once: pools grow by doubling, and as long as there is enough for all,
    /// the last one to grow should not find that the others' halves took it. Who needs more asks again.
    fn step(&self, count: usize) -> usize {
        let free = self.budget.saturating_sub(self.sockets.len());
        count.min((free / STEP_PART).max(SMALLEST_STEP))
    }

    /// How many of `count` ports a shard may have. When the budget runs low, a shard with more than its part of it
    /// leaves the rest to the others: else the clients of one would take the ports of all.
    fn room(&self, shard: u8, shards: u8, count: usize) -> usize {
        let free = self.budget.saturating_sub(self.sockets.len());
        let set_aside = self.budget / SET_ASIDE_PART;
        if shards <= 1 || free >= set_aside + count {
            return count;
        }
        let (shard, shards) = (u16::from(shard), u16::from(shards));
        let held = self.sockets.keys().filter(|(_, port)| port.port() % shards == shard).count();
        let part = self.budget / usize::from(shards);
        count.min(free.saturating_sub(set_aside).max(part.saturating_sub(held)))
    }

    /// Claims one port, to publish it. It is reserved then, if it was not before.
    ///
    /// # Errors
    /// `EADDRINUSE` if it is claimed already, or a program of the host holds it; `EMFILE` if the budget is spent;
    /// `EACCES` for a port below 1024 without `CAP_NET_BIND_SERVICE`.
    pub fn claim(&mut self, protocol: PortProtocol, port: SocketAddrV4) -> io::Result<()> {
        let key = (protocol, port);
        if self.claimed.contains_key(&key) {
            return Err(io::Error::from_raw_os_error(libc::EADDRINUSE));
        }
        let is_the_nats = self.sockets.contains_key(&key);
        if !is_the_nats {
            self.open(protocol, port)?;
        }
        self.claimed.insert(key, is_the_nats);
        Ok(())
    }

    /// Ends a claim that came to nothing: the port goes on being the NAT's if it was before, and has not been returned.
    pub fn disclaim(&mut self, protocol: PortProtocol, port: SocketAddrV4) {
        if self.claimed.remove(&(protocol, port)) == Some(false) {
            self.close(protocol, port);
        }
    }

    /// Closes a port's socket, whoever has the port: it is the host's again. Says whether it was reserved.
    pub fn unreserve(&mut self, protocol: PortProtocol, port: SocketAddrV4) -> bool {
        self.claimed.remove(&(protocol, port));
        self.close(protocol, port)
    }

    /// The NAT has the port no longer: it is the host's again, unless it is claimed.
    pub fn return_port(&mut self, protocol: PortProtocol, port: SocketAddrV4) {
        match self.claimed.get_mut(&(protocol, port)) {
            Some(is_the_nats) => *is_the_nats = false,
            None => _ = self.close(protocol, port),
        }
    }

    /// Opens a port's socket. Errors as of [`Self::claim`].
    fn open(&mut self, protocol: PortProtocol, port: SocketAddrV4) -> io::Result<()> {
        let held = port.port() == 0 || self.sockets.contains_key(&(protocol, port));
        if held {
            return Err(io::Error::from_raw_os_error(libc::EADDRINUSE));
        }
        if self.sockets.len() >= self.budget {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        let socket = silent_socket(protocol, port, self.silence.as_ref())?;
        if !self.ownership.set(protocol, port, true) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many external addresses"));
        }
        self.sockets.insert((protocol, port), socket);
        Ok(())
    }

    /// Closes a port's socket. Says whether there was one.
    fn close(&mut self, protocol: PortProtocol, port: SocketAddrV4) -> bool {
        let Some(socket) = self.sockets.remove(&(protocol, port)) else { return false };
        self.ownership.set(protocol, port, false);
        drop(socket);
        true
    }

    /// Unreserves the ports of all other addresses: they are no longer ours.
    pub fn retain_addresses(&mut self, addresses: &[Ipv4Addr]) {
        self.addresses = Some(addresses.to_vec());
        let ownership = &self.ownership;
        self.claimed.retain(|(_, port), _| addresses.contains(port.ip()));
        self.sockets.retain(|&(protocol, port), _| {
            let keep = addresses.contains(port.ip());
            if !keep {
                ownership.set(protocol, port, false);
            }
            keep
        });
    }

    /// How many ports are reserved.
    pub fn len(&self) -> usize {
        self.sockets.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.sockets.is_empty()
    }
}

impl Drop for PortReservation {
    fn drop(&mut self) {
        for &(protocol, port) in self.sockets.keys() {
            self.ownership.set(protocol, port, false);
        }
    }
}

/// Opens a socket that holds a port and never says a word.
fn silent_socket(
    protocol: PortProtocol,
    port: SocketAddrV4,
    shared_filter: Option<&OwnedFd>,
) -> io::Result<OwnedFd> {
    let (kind, number) = match protocol {
        PortProtocol::Tcp => (libc::SOCK_STREAM, libc::IPPROTO_TCP),
        PortProtocol::Udp => (libc::SOCK_DGRAM, libc::IPPROTO_UDP),
    };
    let socket = sys::socket(libc::AF_INET, kind, number)?;
    let fd = socket.as_fd();
    match shared_filter {
        Some(program) => sys::attach_loaded(fd, program.as_fd())?,
        None => sys::attach_program(fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &DROP_ALL)?,
    }
    sys::set_option(fd, libc::SOL_SOCKET, SO_LOCK_FILTER, 1u32)?;
    // ICMP errors for the NAT's flows find this socket, too. With this, a *fragmentation needed* among them does not
    // change the path MTU that the host's kernel keeps for its own connections.
    sys::set_option(fd, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_OMIT as u32)?;
    sys::bind(fd, &SocketAddress::inet(port))?;
    if protocol == PortProtocol::Tcp {
        // A socket that is bound but does not listen lets the kernel answer with RST.
        sys::listen(fd, 1)?;
    }
    Ok(socket)
}

/// Opens a socket for which the kernel takes packets of a protocol without ports to be delivered, so that it does not
/// answer them with *protocol unreachable* (`ip_protocol_deliver_rcu`): but for this address only, and the socket's
/// filter drops each. A protocol that a kernel module serves (`ip_gre`, `sctp`) is still answered by that module.
///
/// # Errors
/// Without `CAP_NET_RAW`; `EADDRNOTAVAIL` for an address that the host has not.
pub fn silence_protocol(protocol: u8, address: Ipv4Addr) -> io::Result<OwnedFd> {
    let socket = sys::socket(libc::AF_INET, libc::SOCK_RAW, i32::from(protocol))?;
    let fd = socket.as_fd();
    sys::attach_program(fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &DROP_ALL)?;
    sys::set_option(fd, libc::SOL_SOCKET, SO_LOCK_FILTER, 1u32)?;
    sys::bind(fd, &SocketAddress::inet(SocketAddrV4::new(address, 0)))?;
    Ok(socket)
}

/// A pool grows by this part of what is left of the budget, at most.
const STEP_PART: usize = 8;
/// But not by less than so many, while there are that many.
const SMALLEST_STEP: usize = 16;
/// This part of the budget is set aside for shards that have less than their part of it.
const SET_ASIDE_PART: usize = 8;
/// asm-generic/socket.h
const SO_LOCK_FILTER: libc::c_int = 44;

/// Raises the process's soft limit of open descriptors to the hard one, and returns it.
///
/// # Errors
/// None is expected.
pub fn raise_nofile_limit() -> io::Result<u64> {
    let (soft, hard) = sys::descriptor_limits()?;
    if soft < hard {
        sys::set_descriptor_limit(hard, hard)?;
    }
    Ok(hard)
}

/// How many ports may be reserved under a limit of `descriptors`: a tenth of them, and at least 256, are left for the
/// rest of the process.
pub fn budget(descriptors: u64) -> usize {
    usize::try_from(descriptors.saturating_sub((descriptors / 10).max(256))).unwrap_or(usize::MAX)
}

/// This part of the budget all first ports of one kind may be.
const FIRST_PART: usize = 4;

/// How many ports of a kind to reserve before the first packet in each of so many pools (an address of a shard):
/// `most`, as long as that is a quarter of those `available` for all together, so that every pool has some however few
/// there are, and most go to whoever turns out to need them.
pub fn first_ports(available: usize, pools: usize, most: usize) -> usize {
    (available / FIRST_PART / pools.max(1)).clamp(1, most)
}
