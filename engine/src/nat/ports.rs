//! The external ports: which are ours, which are free, which rest. [`crate::external::reservation`] has a port's whole
//! life; this is the middle of it.
//!
//! # Theory of operation
//!
//! A TCP or UDP port becomes ours when the shell has reserved it with a socket and adds it ([`Pools::add`]); ICMP
//! identifiers need no reservation and are ours from the start. A new mapping draws a free port at random (RFC 6056
//! §3.3.1, with a cryptographic generator), so that nobody outside can guess it. A port that a mapping releases may
//! rest first ([`REST`]), so that packets that are still under way for its last user do not reach the next one.
//!
//! The range of ports may change while mappings live. What falls outside of it is never lent again: a port that is free
//! is returned to the shell at once, one that is lent when its mapping has ended and it has rested
//! ([`Pools::take_returned`]).

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::config::{Endpoint, PortClass, PortDemand, PortOutlook, Proto, ShardSlice};
use super::random::Random;
use crate::clock::Timestamp;

/// How long a released port rests (RFC 6888 REQ-8).
pub(super) const REST: Duration = Duration::from_secs(120);
/// A pool with fewer free ports than this, beside those that are set aside if there are no more, asks for more: a tenth
/// of a second's worth for a client that opens 2,000 connections per second, which the reserver needs on a busy
/// machine.
const LOW_WATER: usize = 224;
/// The same for ports below 1024: few clients use them, and the host has few to give
/// ([`PRIVILEGED_PORTS`](super::PRIVILEGED_PORTS)).
const PRIVILEGED_LOW_WATER: usize = 4;
/// This part of a pool is set aside: when no more of its ports are free, and no more will come, these are for clients
/// with few mappings. Likewise with a shard's mappings and sessions. (What is *kept* is the host's.)
pub(super) const SET_ASIDE_PART: usize = 8;
/// Of a smaller pool nothing is set aside.
pub(super) const SMALLEST_TO_SET_ASIDE_OF: usize = 1024;
/// How many ports are looked at for one that may be shared.
const SHARING_ATTEMPTS: usize = 32;

/// The pools of all external addresses.
#[derive(Debug)]
pub(super) struct Pools {
    addresses: Vec<AddressPools>,
    /// In the order in which their rest ends. Bounded by the number of ports.
    resting: VecDeque<Resting>,
    /// Some pool asks for ports.
    demand: bool,
    /// The unprivileged TCP and UDP ports that may be lent.
    lendable: Lendable,
    /// Ports that are the shell's again, until it takes them. Bounded by the number of ports.
    returned: Vec<(Proto, Endpoint)>,
}

/// A range of ports without those that are kept for the host's programs, first and last.
#[derive(Debug)]
struct Lendable {
    range: RangeInclusive<u16>,
    kept: Option<(u16, u16)>,
}

#[derive(Debug)]
struct AddressPools {
    address: Ipv4Addr,
    pools: [Pool; 3],
}

/// The ports of one external address and protocol.
#[derive(Debug, Default)]
struct Pool {
    privileged: Vec<u16>,
    unprivileged: Vec<u16>,
    /// Free, lent or resting.
    owned: PortSet,
    /// Asks for ports, by class.
    demand: [bool; 2],
    /// A client has got none of them since, for it has its share.
    has_refused: bool,
    /// Whether ports may still come.
    outlook: PortOutlook,
}

#[derive(Clone, Copy, Debug)]
struct Resting {
    until: Timestamp,
    protocol: Proto,
    address: Ipv4Addr,
    port: u16,
}

impl Pools {
    pub(super) fn new() -> Self {
        Self {
            addresses: Vec::new(),
            resting: VecDeque::new(),
            demand: false,
            lendable: Lendable { range: 1024..=u16::MAX, kept: None },
            returned: Vec::new(),
        }
    }

    /// Lends ports of `range` without those that are `kept` from now on. Other free ones are returned, and so will be
    /// those that are lent or rest, when they would be free.
    pub(super) fn set_range(&mut self, range: RangeInclusive<u16>, kept: Option<(u16, u16)>) {
        self.lendable = Lendable { range, kept };
        for AddressPools { address, pools } in &mut self.addresses {
            for protocol in [Proto::Tcp, Proto::Udp] {
                let Pool { unprivileged, owned, .. } = &mut pools[protocol.index()];
                unprivileged.retain(|&port| {
                    let stays = self.lendable.contains(port);
                    if !stays {
                        owned.remove(port);
                        self.returned.push((protocol, Endpoint::new(*address, port)));
                    }
                    stays
                });
            }
        }
    }

    /// The ports that were returned since the last call. Costs nothing if there are none.
    pub(super) fn take_returned(&mut self) -> Vec<(Proto, Endpoint)> {
        std::mem::take(&mut self.returned)
    }

    /// A port that is in no pool, as when it was ceded ([`Self::cede`]), is the shell's again.
    pub(super) fn return_port(&mut self, protocol: Proto, external: Endpoint) {
        self.returned.push((protocol, external));
    }

    /// Whether the port may be lent. ICMP identifiers and privileged ports have no range.
    fn may_lend(&self, protocol: Proto, port: u16) -> bool {
        protocol == Proto::Icmp
            || protocol.class_of(port) == PortClass::Privileged
            || self.lendable.contains(port)
    }

    /// Begins to use these external addresses, and ceases to use the others.
    pub(super) fn set_addresses(&mut self, addresses: &[Ipv4Addr], slice: ShardSlice) {
        self.addresses.retain(|pools| addresses.contains(&pools.address));
        self.resting.retain(|resting| addresses.contains(&resting.address));
        self.returned.retain(|(_, port)| addresses.contains(&port.address));
        for &address in addresses {
            if self.contains(address) {
                continue; // listed twice, or known from before
            }
            let mut pools = AddressPools { address, pools: Default::default() };
            let identifiers = &mut pools.pools[Proto::Icmp.index()];
            identifiers.unprivileged = (0..=u16::MAX).filter(|&id| slice.owns(id)).collect();
            identifiers.unprivileged.iter().for_each(|&id| _ = identifiers.owned.insert(id));
            self.addresses.push(pools);
        }
    }

    /// Whether `address` is one of the external addresses.
    pub(super) fn contains(&self, address: Ipv4Addr) -> bool {
        self.addresses.iter().any(|pools| pools.address == address)
    }

    /// The external addresses, in the order in which they were given.
    pub(super) fn address(&self, index: usize) -> Option<Ipv4Addr> {
        self.addresses.get(index).map(|pools| pools.address)
    }

    /// How many external addresses there are.
    pub(super) fn address_count(&self) -> usize {
        self.addresses.len()
    }

    /// Makes the port ours, and free. False if it was ours before, or the address is unknown, or it may not be lent
    /// (any more): then it is returned.
    pub(super) fn add(&mut self, protocol: Proto, address: Ipv4Addr, port: u16) -> bool {
        let may_lend = self.may_lend(protocol, port);
        if !may_lend && !self.owns(protocol, address, port) && self.contains(address) {
            self.return_port(protocol, Endpoint::new(address, port));
        }
        let Some(pool) = self.pool_mut(protocol, address) else { return false };
        let new = may_lend && pool.owned.insert(port);
        if new {
            pool.free_mut(protocol.class_of(port)).push(port);
        }
        new
    }

    /// Takes the port out of the pool for good, to be published, whether it was free, resting or never ours. False: a
    /// mapping has it.
    pub(super) fn cede(&mut self, protocol: Proto, address: Ipv4Addr, port: u16) -> bool {
        let Some(pool) = self.pool_mut(protocol, address) else { return false };
        if !pool.owned.contains(port) {
            return true;
        }
        let free = pool.free_mut(protocol.class_of(port));
        if let Some(at) = free.iter().position(|&p| p == port) {
            free.swap_remove(at);
            pool.owned.remove(port);
            return true;
        }
        let before = self.resting.len();
        self.resting.retain(|r| (r.protocol, r.address, r.port) != (protocol, address, port));
        let rested = self.resting.len() < before;
        if rested {
            if let Some(pool) = self.pool_mut(protocol, address) {
                pool.owned.remove(port);
            }
        }
        rested
    }

    /// Whether the port is ours: free, lent or resting.
    pub(super) fn owns(&self, protocol: Proto, address: Ipv4Addr, port: u16) -> bool {
        self.pool(protocol, address).is_some_and(|pool| pool.owned.contains(port))
    }

    /// Whether ports may still come: then an empty pool is not an exhausted one.
    pub(super) fn more_to_come(&self, protocol: Proto, address: Ipv4Addr) -> bool {
        self.pool(protocol, address).is_some_and(|pool| pool.outlook != PortOutlook::None)
    }

    /// Says whether they may.
    pub(super) fn set_outlook(&mut self, protocol: Proto, address: Ipv4Addr, outlook: PortOutlook) {
        if let Some(pool) = self.pool_mut(protocol, address) {
            pool.outlook = outlook;
        }
    }

    /// How many ports can be drawn.
    pub(super) fn free(&self, protocol: Proto, address: Ipv4Addr, class: PortClass) -> usize {
        self.pool(protocol, address).map_or(0, |pool| pool.free(class).len())
    }

    /// Whether the unprivileged ports, or the identifiers, that are left are set aside for clients that have few.
    pub(super) fn runs_low(&self, protocol: Proto, address: Ipv4Addr) -> bool {
        let is_low = |pool: &Pool| pool.set_aside() > 0 && pool.unprivileged.len() <= pool.set_aside();
        self.pool(protocol, address).is_some_and(|pool| pool.outlook != PortOutlook::More && is_low(pool))
    }

    /// How many ports are ours, of all addresses together.
    pub(super) fn owned(&self, protocol: Proto) -> usize {
        self.addresses.iter().map(|address| address.pools[protocol.index()].owned.len()).sum()
    }

    /// How many ports rest.
    pub(super) fn resting(&self) -> usize {
        self.resting.len()
    }

    /// Draws a free port, of `class` if there is one; a privileged one may be replaced by an unprivileged one, never
    /// the other way round (RFC 4787 REQ-3 a).
    pub(super) fn draw(
        &mut self,
        protocol: Proto,
        address: Ipv4Addr,
        class: PortClass,
        random: &mut Random,
    ) -> Option<u16> {
        let pool = self.addresses.iter_mut().find(|pools| pools.address == address)?;
        let pool = &mut pool.pools[protocol.index()];
        let set_aside = pool.set_aside();
        let mut draw = |class| {
            let free = pool.free_mut(class);
            let port = random.below(free.len()).map(|at| free.swap_remove(at));
            let low_water = match class {
                PortClass::Privileged => PRIVILEGED_LOW_WATER,
                PortClass::Unprivileged => LOW_WATER + set_aside,
            };
            if free.len() < low_water && protocol != Proto::Icmp {
                pool.demand[class as usize] = true;
                self.demand = true;
            }
            port
        };
        match class {
            PortClass::Unprivileged => draw(PortClass::Unprivileged),
            PortClass::Privileged => draw(PortClass::Privileged).or_else(|| draw(PortClass::Unprivileged)),
        }
    }

    /// Asks for unprivileged ports, as drawing one from a pool that runs low does: for a client that gets none of those
    /// that are left. Identifiers are all there.
    pub(super) fn ask(&mut self, protocol: Proto, address: Ipv4Addr) {
        if protocol == Proto::Icmp {
            return;
        }
        let Some(pool) = self.pool_mut(protocol, address) else { return };
        pool.demand[PortClass::Unprivileged as usize] = true;
        pool.has_refused = true;
        self.demand = true;
    }

    /// A few ports that are ours and not free, from a random one on: candidates for sharing.
    pub(super) fn candidates(
        &self,
        protocol: Proto,
        address: Ipv4Addr,
        class: PortClass,
        random: &mut Random,
    ) -> impl Iterator<Item = u16> + '_ {
        let start = random.below(1 << 16).unwrap_or(0) as u16;
        self.pool(protocol, address)
            .into_iter()
            .flat_map(move |pool| pool.owned.from(start))
            .filter(move |&port| protocol.class_of(port) == class && self.may_lend(protocol, port))
            .take(SHARING_ATTEMPTS)
    }

    /// A drawn port is lent no longer: from `rest_from` on it rests, or without that is free at once.
    pub(super) fn release(
        &mut self,
        protocol: Proto,
        address: Ipv4Addr,
        port: u16,
        rest_from: Option<Timestamp>,
    ) {
        match rest_from {
            Some(now) => self.resting.push_back(Resting { until: now + REST, protocol, address, port }),
            None => self.free_or_return(protocol, address, port),
        }
    }

    /// The ports that have rested enough are free.
    pub(super) fn wake(&mut self, now: Timestamp) {
        while let Some(&Resting { until, protocol, address, port }) = self.resting.front() {
            if until > now {
                return;
            }
            self.resting.pop_front();
            self.free_or_return(protocol, address, port);
        }
        if self.resting.is_empty() {
            self.resting = VecDeque::new();
        }
    }

    /// When [`Self::wake`] next has something to do.
    pub(super) fn next_wake(&self) -> Option<Timestamp> {
        self.resting.front().map(|resting| resting.until)
    }

    /// A pool that has been drawn low since it was last filled; each is reported once per draw.
    pub(super) fn next_demand(&mut self) -> Option<PortDemand> {
        if !self.demand {
            return None;
        }
        for AddressPools { address, pools } in &mut self.addresses {
            for protocol in [Proto::Tcp, Proto::Udp] {
                for class in [PortClass::Privileged, PortClass::Unprivileged] {
                    let pool = &mut pools[protocol.index()];
                    if std::mem::take(&mut pool.demand[class as usize]) {
                        let in_advance = class == PortClass::Unprivileged
                            && !std::mem::take(&mut pool.has_refused)
                            && pool.free(class).len() >= LOW_WATER;
                        return Some(PortDemand { protocol, address: *address, class, in_advance });
                    }
                }
            }
        }
        self.demand = false;
        None
    }

    /// A port that nobody uses any more is free; outside the range it is returned.
    fn free_or_return(&mut self, protocol: Proto, address: Ipv4Addr, port: u16) {
        let may_lend = self.may_lend(protocol, port);
        // The address may have gone in the meantime, and its pool with it.
        if let Some(pool) = self.pool_mut(protocol, address) {
            if pool.owned.contains(port) {
                if may_lend {
                    pool.free_mut(protocol.class_of(port)).push(port);
                } else {
                    pool.owned.remove(port);
                    self.return_port(protocol, Endpoint::new(address, port));
                }
            }
        }
    }

    fn pool(&self, protocol: Proto, address: Ipv4Addr) -> Option<&Pool> {
        self.addresses
            .iter()
            .find(|pools| pools.address == address)
            .map(|pools| &pools.pools[protocol.index()])
    }

    fn pool_mut(&mut self, protocol: Proto, address: Ipv4Addr) -> Option<&mut Pool> {
        self.addresses
            .iter_mut()
            .find(|pools| pools.address == address)
            .map(|pools| &mut pools.pools[protocol.index()])
    }
}

impl Lendable {
    fn contains(&self, port: u16) -> bool {
        self.range.contains(&port) && self.kept.is_none_or(|(first, last)| !(first..=last).contains(&port))
    }
}

impl Pool {
    /// How many of its ports, or identifiers, are for clients that have few, if they are the last ones.
    fn set_aside(&self) -> usize {
        let owned = self.owned.len();
        if owned >= SMALLEST_TO_SET_ASIDE_OF { owned / SET_ASIDE_PART } else { 0 }
    }

    fn free(&self, class: PortClass) -> &Vec<u16> {
        match class {
            PortClass::Privileged => &self.privileged,
            PortClass::Unprivileged => &self.unprivileged,
        }
    }

    fn free_mut(&mut self, class: PortClass) -> &mut Vec<u16> {
        match class {
            PortClass::Privileged => &mut self.privileged,
            PortClass::Unprivileged => &mut self.unprivileged,
        }
    }
}

/// A set of ports: one bit each.
#[derive(Debug)]
struct PortSet {
    bits: Box<[u64; 1024]>,
    len: usize,
}

impl Default for PortSet {
    fn default() -> Self {
        Self { bits: Box::new([0; 1024]), len: 0 }
    }
}

impl PortSet {
    fn len(&self) -> usize {
        self.len
    }

    fn contains(&self, port: u16) -> bool {
        self.bits[usize::from(port / 64)] & (1 << (port % 64)) != 0
    }

    /// True if it was not in the set before.
    fn insert(&mut self, port: u16) -> bool {
        let new = !self.contains(port);
        self.bits[usize::from(port / 64)] |= 1 << (port % 64);
        self.len += usize::from(new);
        new
    }

    fn remove(&mut self, port: u16) {
        self.len -= usize::from(self.contains(port));
        self.bits[usize::from(port / 64)] &= !(1 << (port % 64));
    }

    /// The ports of the set, from the word of `start` on and once around.
    fn from(&self, start: u16) -> impl Iterator<Item = u16> + '_ {
        (0..1024u16).map(move |step| (start / 64 + step) % 1024).flat_map(move |index| {
            let mut word = self.bits[usize::from(index)];
            std::iter::from_fn(move || {
                let bit = word.trailing_zeros();
                word &= word.checked_sub(1)?;
                Some(index * 64 + bit as u16)
            })
        })
    }
}
