//! How the NAT gets external ports: asked for at the reserver before they run low, and returned to it.
//! [`crate::external::reservation`] has a port's whole life.
//!
//! Theory of operation. A *pool* is the ports of one protocol, address and class. Each asks for its first ports before
//! the first packet ([`Gateway::port_requests`]), and for as many again whenever it runs low; what comes is added
//! ([`Gateway::add_ports`]). Where the reserver had fewer than were wanted, the pool leaves it in peace for
//! [`SHORTAGE_LASTS`], and the NAT knows meanwhile that no more are to be expected.

use std::net::Ipv4Addr;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::{Gateway, HashMap};
use crate::clock::Timestamp;
use crate::external::reservation::{Batch, PortProtocol, ReserveRequest, first_ports};
use crate::nat::{Endpoint, PRIVILEGED_PORTS, PortClass, PortDemand, PortOutlook, Proto};

/// TCP ports of the first batch at most: a burst of that many connections finds its ports made, instead of having them
/// made in its midst. And of any batch: reserving one takes some 6 us of the reserver's time.
const LARGEST_BATCH: usize = 2_048;
/// UDP ports of the first batch at most (a resolver's or QUIC client's flows are few beside the TCP connections of a
/// page); and as many TCP ports, however small the range is.
const FIRST_BATCH: usize = 256;
/// Ports below 1024 that all shards together begin with, at most: few clients use such source ports (NTP, IKE), and the
/// host's own programs have use for them.
const PRIVILEGED_BATCH: usize = 16;
/// How many of them the pools of all shards, addresses and protocols together may have. The host has few to give
/// ([`PRIVILEGED_PORTS`]), and a pool does not return those that it has: who finds none gets another port.
const PRIVILEGED_MOST: usize = 64;
/// A shard begins with that many at least, and may have them.
const SMALLEST_PRIVILEGED_BATCH: usize = 2;
/// This part of what there is for others is for them.
const PRIVILEGED_PART: usize = 4;
/// How long the reserver is left in peace after it had fewer ports than were wanted.
const SHORTAGE_LASTS: Duration = Duration::from_secs(10);

/// How the pools of external ports are refilled: what was asked for and has not come yet, and how much to ask for.
pub(super) struct PortSupply {
    range: (u16, u16),
    /// What of the range is not to be had.
    kept: Option<(u16, u16)>,
    /// How many ports all shards together may reserve.
    budget: usize,
    asked: Vec<(Proto, Ipv4Addr, PortClass)>,
    /// Pools for which there were fewer ports than were asked for the last time. They stay in `asked` until then;
    /// `None`: that is over, and whoever finds too few ports asks again.
    short: Vec<((Proto, Ipv4Addr, PortClass), Option<Timestamp>)>,
    /// How many ports each pool has got, less those that it has returned or, if privileged, ceded.
    granted: HashMap<(Proto, Ipv4Addr, PortClass), usize>,
    /// Whether the first ports of every pool were asked for: before the first packet, which should not have to wait.
    begun: bool,
}

impl PortSupply {
    pub(super) fn new(range: (u16, u16), kept: Option<(u16, u16)>, budget: usize) -> Self {
        Self {
            range,
            kept,
            budget,
            asked: Vec::new(),
            short: Vec::new(),
            granted: HashMap::default(),
            begun: false,
        }
    }

    /// When [`Self::expire`] has something to do: as long as a shortage lasts, clients are told that there are no
    /// ports.
    pub(super) fn next_expiry(&self) -> Option<Timestamp> {
        self.short.iter().filter_map(|&(_, until)| until).min()
    }

    /// Ends the shortages that have lasted long enough: the next packet that finds too few ports asks. That there are
    /// more only the answer can tell.
    pub(super) fn expire(&mut self, now: Timestamp) {
        for (pool, until) in &mut self.short {
            if until.is_some_and(|until| now >= until) {
                *until = None;
                self.asked.retain(|waiting| waiting != pool);
            }
        }
    }

    /// Whether there are more ports of the protocol and address. Unless there are none, a pool that is empty has asked
    /// for some (or does so at the end of this turn), and they may come any moment.
    fn outlook(&self, protocol: Proto, address: Ipv4Addr) -> PortOutlook {
        let pool = (protocol, address, PortClass::Unprivileged);
        let shortage = self.short.iter().find(|(short, _)| *short == pool);
        shortage
            .map(|(_, until)| if until.is_some() { PortOutlook::None } else { PortOutlook::Unsure })
            .unwrap_or(PortOutlook::More)
    }

    /// Forgets the addresses that are gone; those that are new are to be supplied.
    pub(super) fn set_addresses(&mut self, addresses: &[Ipv4Addr]) {
        self.asked.retain(|(_, address, _)| addresses.contains(address));
        self.short.retain(|((_, address, _), _)| addresses.contains(address));
        self.granted.retain(|(_, address, _), _| addresses.contains(address));
        self.begun = false;
    }

    /// Ports are drawn from another range from now on: where there were none left, there may be some.
    pub(super) fn set_range(&mut self, range: (u16, u16), kept: Option<(u16, u16)>) {
        let before = (self.range, self.kept);
        (self.range, self.kept) = (range, kept);
        if (range, kept) != before {
            for (pool, _) in self.short.drain(..) {
                self.asked.retain(|&asked| asked != pool);
            }
        }
    }

    fn ports(&self, class: PortClass) -> RangeInclusive<u16> {
        match class {
            PortClass::Privileged => PRIVILEGED_PORTS,
            PortClass::Unprivileged => self.range.0..=self.range.1,
        }
    }

    /// How many unprivileged ports there can be.
    fn lendable(&self) -> usize {
        let ((first, last), (kept_first, kept_last)) = (self.range, self.kept.unwrap_or((1, 0)));
        let kept = (first.max(kept_first)..=last.min(kept_last)).len();
        (first..=last).len() - kept
    }

    /// How many ports to ask for: as many as there are, so that growth keeps pace with the need. None where a pool has
    /// all of the privileged ones that it may have. `pools`: how many addresses of how many shards share what there is.
    fn batch(&self, protocol: Proto, address: Ipv4Addr, class: PortClass, pools: usize) -> usize {
        match (class, protocol) {
            (PortClass::Privileged, _) => {
                let most = (PRIVILEGED_BATCH / pools.max(1)).max(SMALLEST_PRIVILEGED_BATCH);
                let part = (PRIVILEGED_MOST / 2 / pools.max(1)).max(SMALLEST_PRIVILEGED_BATCH); // of TCP, or of UDP
                let left = part.saturating_sub(self.granted((protocol, address, class)));
                first_ports(self.budget / PRIVILEGED_PART, pools, most).min(left)
            }
            (PortClass::Unprivileged, Proto::Tcp) => {
                // Of a small range, most are left to the host's own programs until somebody needs them.
                let of_range = first_ports(self.lendable(), pools, LARGEST_BATCH);
                let most = of_range.max(FIRST_BATCH);
                self.grown(protocol, address, first_ports(self.budget, pools, most))
            }
            (PortClass::Unprivileged, _) => {
                self.grown(protocol, address, first_ports(self.budget, pools, FIRST_BATCH))
            }
        }
    }

    fn grown(&self, protocol: Proto, address: Ipv4Addr, first: usize) -> usize {
        self.granted((protocol, address, PortClass::Unprivileged)).clamp(first, LARGEST_BATCH)
    }

    fn granted(&self, pool: (Proto, Ipv4Addr, PortClass)) -> usize {
        self.granted.get(&pool).copied().unwrap_or(0)
    }

    /// A port of a pool is published: a privileged one is counted as the pool's no longer, an unprivileged one not
    /// until it is returned.
    pub(super) fn cede(&mut self, protocol: Proto, Endpoint { address, port }: Endpoint) {
        if PortClass::of(port) == PortClass::Privileged {
            self.uncount(protocol, address, PortClass::Privileged, 1);
        }
    }

    /// The pool has so many ports less.
    fn uncount(&mut self, protocol: Proto, address: Ipv4Addr, class: PortClass, ports: usize) {
        if let Some(granted) = self.granted.get_mut(&(protocol, address, class)) {
            *granted = granted.saturating_sub(ports);
        }
    }
}

impl Gateway {
    /// Tells the NAT what there is to hope for.
    pub(super) fn update_expectations(&mut self) {
        for &address in &self.external.addresses {
            for protocol in [Proto::Tcp, Proto::Udp] {
                self.nat.expect_ports(protocol, address, self.supply.outlook(protocol, address));
            }
        }
    }

    pub(super) fn add_ports(&mut self, batch: &Batch, now: Timestamp) {
        let protocol = Proto::from(batch.request.protocol);
        let address = batch.request.address;
        if !self.nat.is_external(address) {
            return; // it went while its ports were being reserved
        }
        let class = PortClass::of(*batch.request.ports.end());
        let pool = (protocol, address, class);
        self.supply.short.retain(|&(short, _)| short != pool);
        if batch.shortage.is_some() {
            self.supply.short.push((pool, Some(now + SHORTAGE_LASTS)));
        } else {
            self.supply.asked.retain(|&asked| asked != pool);
        }
        // One may have been published while the batch was on its way.
        let published = |port| self.published.contains_key(&(protocol, Endpoint::new(address, port)));
        let ports: Vec<u16> = batch.ports.iter().copied().filter(|&port| !published(port)).collect();
        let added = self.nat.add_ports(protocol, address, &ports);
        *self.supply.granted.entry(pool).or_default() += added;
        self.update_expectations();
    }

    /// What the reserver should be asked for: the first ports of every pool, and more for those that run low. And what
    /// is returned to it.
    pub(super) fn port_requests(&mut self) -> Vec<ReserveRequest> {
        let mut requests = self.port_returns();
        if !self.supply.begun {
            self.supply.begun = true;
            for address in self.external.addresses.clone() {
                if self.supply.granted.keys().any(|&(_, supplied, _)| supplied == address) {
                    continue; // known from before
                }
                for protocol in [Proto::Tcp, Proto::Udp] {
                    for class in [PortClass::Unprivileged, PortClass::Privileged] {
                        requests.extend(self.port_request(protocol, address, class, false));
                    }
                }
            }
        }
        while let Some(demand) = self.nat.next_port_demand() {
            let PortDemand { protocol, address, class, in_advance } = demand;
            requests.extend(self.port_request(protocol, address, class, in_advance));
        }
        requests
    }

    /// The request for one pool, unless ports for it are on their way already. ICMP identifiers are not reserved.
    fn port_request(
        &mut self,
        protocol: Proto,
        address: Ipv4Addr,
        class: PortClass,
        in_advance: bool,
    ) -> Option<ReserveRequest> {
        let reserved = PortProtocol::of(protocol)?;
        if self.supply.asked.contains(&(protocol, address, class)) {
            return None;
        }
        let pools = usize::from(self.shards) * self.external.addresses.len();
        let count = self.supply.batch(protocol, address, class, pools);
        if count == 0 {
            return None;
        }
        self.supply.asked.push((protocol, address, class));
        Some(ReserveRequest {
            protocol: reserved,
            address,
            shard: self.shard,
            shards: self.shards,
            ports: self.supply.ports(class),
            count,
            in_advance,
            returned: Vec::new(),
        })
    }

    /// Returns to the reserver what the NAT may lend no longer.
    fn port_returns(&mut self) -> Vec<ReserveRequest> {
        let mut requests: Vec<ReserveRequest> = Vec::new();
        for (protocol, Endpoint { address, port }) in self.nat.take_returned_ports() {
            let Some(protocol) = PortProtocol::of(protocol) else { continue }; // identifiers have no range
            let external = Endpoint::new(address, port);
            if let Some(publication) = self.published.get_mut(&(Proto::from(protocol), external)) {
                // Published while it was on its way: to be returned if that comes to nothing.
                publication.was_ours = true;
                continue;
            }
            let same = |request: &ReserveRequest| (request.protocol, request.address) == (protocol, address);
            let at = requests.iter().position(same).unwrap_or(requests.len());
            if at == requests.len() {
                requests.push(ReserveRequest {
                    protocol,
                    address,
                    shard: self.shard,
                    shards: self.shards,
                    ports: self.supply.ports(PortClass::Unprivileged),
                    count: 0,
                    in_advance: false,
                    returned: Vec::new(),
                });
            }
            requests[at].returned.push(port);
        }
        for ReserveRequest { protocol, address, returned, .. } in &requests {
            // A privileged one was published before, and has been counted then.
            let class = PortClass::Unprivileged;
            let ports = returned.iter().filter(|&&port| PortClass::of(port) == class).count();
            self.supply.uncount(Proto::from(*protocol), *address, class, ports);
        }
        requests
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shortage_asks_to_be_ended() {
        let mut supply = PortSupply::new((1_024, 65_535), None, 100);
        assert_eq!(supply.next_expiry(), None);
        let until = Timestamp::from_secs(10);
        let pool = (Proto::Tcp, Ipv4Addr::LOCALHOST, PortClass::Unprivileged);
        supply.asked.push(pool);
        supply.short.push((pool, Some(until)));
        let outlook = |supply: &PortSupply, protocol| supply.outlook(protocol, Ipv4Addr::LOCALHOST);
        assert_eq!((supply.next_expiry(), outlook(&supply, Proto::Tcp)), (Some(until), PortOutlook::None));
        supply.expire(until);
        assert!(supply.next_expiry().is_none() && supply.asked.is_empty());
        assert_eq!(outlook(&supply, Proto::Tcp), PortOutlook::Unsure, "until there is an answer");
        assert_eq!(outlook(&supply, Proto::Udp), PortOutlook::More);
        let another = Ipv4Addr::new(203, 0, 113, 2);
        assert_eq!(supply.outlook(Proto::Tcp, another), PortOutlook::More, "of another address");
    }

    #[test]
    fn what_is_kept_for_the_host_does_not_count() {
        let lendable = |kept| PortSupply::new((40_000, 40_099), kept, 100).lendable();
        let kept = [
            None,
            Some((40_050, 40_099)),
            Some((39_000, 40_009)),
            Some((1, 39_999)),
            Some((40_000, u16::MAX)),
        ];
        assert_eq!(kept.map(lendable), [100, 50, 90, 100, 0]);
    }

    #[test]
    fn all_shards_together_take_few_of_the_hosts_privileged_ports() {
        let supply = PortSupply::new((1024, u16::MAX), None, 60_000);
        let batch =
            |pools| supply.batch(Proto::Udp, Ipv4Addr::new(203, 0, 113, 1), PortClass::Privileged, pools);
        assert_eq!([0, 1, 4, 16].map(batch), [16, 16, 4, 2]);
    }

    #[test]
    fn no_pool_has_more_than_its_part_of_the_privileged_ports_however_many_its_clients_want() {
        let address = Ipv4Addr::new(203, 0, 113, 1);
        for (pools, part) in [(1, 32), (2, 16), (3, 10), (4, 8), (16, 2), (64, 2)] {
            let mut supply = PortSupply::new((1024, u16::MAX), None, 60_000);
            for protocol in [Proto::Tcp, Proto::Udp] {
                let pool = (protocol, address, PortClass::Privileged);
                let ask = |supply: &mut PortSupply| {
                    let count = supply.batch(protocol, address, PortClass::Privileged, pools);
                    *supply.granted.entry(pool).or_default() += count;
                    count
                };
                assert_eq!((0..1_000).map(|_| ask(&mut supply)).sum::<usize>(), part, "{pools} pools");
                supply.cede(protocol, Endpoint::new(address, 2_000));
                assert_eq!(ask(&mut supply), 0);
                supply.cede(protocol, Endpoint::new(address, 600));
                assert_eq!((ask(&mut supply), ask(&mut supply)), (1, 0), "in place of a published one");
            }
        }
    }
}
