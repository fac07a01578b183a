//! The link addresses of our neighbours (RFC 826), without I/O.
//!
//! Theory of operation. [`NeighborCache::resolve`] answers at once: with the address, or that it is being asked for, or
//! that nobody answers. Meanwhile the caller may leave packets here ([`NeighborCache::hold`], as much as is usual in a
//! kernel). [`NeighborCache::poll`] is the one place where requests are made and entries expire; it wants to be called
//! at [`NeighborCache::next_wakeup`]. ARP frames go to [`NeighborCache::receive`], which believes only what was asked
//! for, so that nobody on the link can plant an address unasked. What says that a known neighbour has moved to another
//! link address raises a *doubt*, be it said unasked or as if in answer to a question that only the known address was
//! asked: the neighbour is asked there, and only if it is silent for a second is it resolved anew. So a router that was
//! replaced is found about a second after its successor has said anything, and one that is there cannot be supplanted.
//!
//! An entry's life: *resolving* (three broadcast requests, a second apart), then *known*, or *failed* for five seconds,
//! in which who wants to send there is to be told so ([`NeighborCache::has_failed`]). A known neighbour that is still
//! in use after 30 seconds is asked again, by unicast, while packets go on; if it does not answer three times, it is
//! resolved anew. A neighbour that is not used for 60 seconds is forgotten.
//!
//! One client can ask for all addresses of a large link, most of which nobody has. So none takes more places, be its
//! neighbours known or not, nor more of the room for packets that wait, than is still free ([`shares`]). Once a quarter
//! of the places is taken, a neighbour that does not answer has its own for one request, that is, a second, and not for
//! the eight of three requests and their failure; so a scan goes on, and the link still sees at most a request a second
//! for each place.

mod shares;

use std::collections::{HashMap, VecDeque};
use std::net::Ipv4Addr;
use std::time::Duration;

use super::next_hop::ExternalLink;
use super::{ETHERTYPE_ARP, ETHERTYPE_IPV4, MacAddress};
use crate::clock::Timestamp;
use crate::fair_queue::Amount;

pub use shares::Asker;
use shares::Shares;

/// Neighbours that are known or asked for at a time.
pub const MAX_NEIGHBORS: usize = 1024;
/// From so many on, those that do not answer make room soon.
const CROWDED: usize = MAX_NEIGHBORS / 4;
/// What waits for one neighbour: about as much as a kernel lets wait (Linux' `unres_qlen_bytes`, 208 KiB), so that the
/// first burst of a client is not cut short.
pub const MAX_HELD_PER_NEIGHBOR: Amount = Amount { packets: 128, bytes: 256 * 1024 };
/// What waits for all neighbours together.
pub const MAX_HELD: Amount = Amount { packets: 1024, bytes: 4 * 1024 * 1024 };

/// Requests before giving up, and the time between them (RFC 1122 §2.3.2.1: at most one a second).
const REQUESTS: u8 = 3;
const REQUEST_INTERVAL: Duration = Duration::from_secs(1);
/// How long a neighbour that does not answer is left alone.
const FAILED_FOR: Duration = Duration::from_secs(5);
/// After this time a neighbour in use is asked again (RFC 1122 §2.3.2.1, "unicast poll").
const CONFIRMED_FOR: Duration = Duration::from_secs(30);
/// After this time without use a neighbour is forgotten.
const UNUSED_FOR: Duration = Duration::from_secs(60);

const BROADCAST: MacAddress = [0xff; 6];

/// An ARP packet in its Ethernet frame (the driver pads it to the link's minimum).
pub type ArpFrame = [u8; arp::LEN];

/// Offsets and numbers of RFC 826, in an Ethernet frame.
pub(super) mod arp {
    pub(crate) const LEN: usize = 42;
    pub(crate) const HARDWARE: usize = 14;
    pub(crate) const OPERATION: usize = 20;
    pub(crate) const SENDER_MAC: usize = 22;
    pub(crate) const SENDER_ADDRESS: usize = 28;
    pub(crate) const TARGET_MAC: usize = 32;
    pub(crate) const TARGET_ADDRESS: usize = 38;
    pub(crate) const ETHERNET: u16 = 1; // ar$hrd
    pub(crate) const REQUEST: u16 = 1; // ares_op$REQUEST
    pub(crate) const REPLY: u16 = 2; // ares_op$REPLY
}

/// What is known about a neighbour.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Resolution {
    /// Its link address.
    Known(MacAddress),
    /// It is being asked for; a packet for it may be held.
    Pending,
    /// It does not answer, or there is no place for it among [`MAX_NEIGHBORS`], or none for its asker.
    Failed,
}

/// Why an ARP frame taught nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ignored {
    /// It is no well-formed reply to us from a link address of one station.
    Malformed,
    /// It is a reply that nobody asked for, or not from the link address that was asked.
    Unsolicited,
    /// It is no reply to us, but a request or an announcement.
    NoReply,
}

/// The neighbours of one interface; `P` is what waits for them.
#[derive(Debug)]
pub struct NeighborCache<P> {
    link: ExternalLink,
    entries: HashMap<Ipv4Addr, Entry<P>>,
    shares: Shares,
    /// How many of them do not answer: mostly none, and then no packet costs a look-up.
    failed: usize,
    wakeup: Option<Timestamp>,
}

#[derive(Debug)]
struct Entry<P> {
    state: State,
    used: Timestamp,
    /// Who is charged for its place: whoever asked for it first.
    asker: Asker,
    held: VecDeque<Held<P>>,
    held_bytes: usize,
}

/// A packet that waits for a neighbour.
#[derive(Debug)]
struct Held<P> {
    packet: P,
    bytes: usize,
    asker: Asker,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Resolving(Asking),
    Known { mac: MacAddress, confirmed: Timestamp, probe: Option<Asking>, doubted: bool },
    Failed { until: Timestamp },
}

/// How many requests were sent, and when the next one (or the verdict) is due.
#[derive(Clone, Copy, Debug)]
struct Asking {
    sent: u8,
    next: Timestamp,
}

impl<P> NeighborCache<P> {
    /// An empty cache of this interface.
    pub fn new(link: ExternalLink) -> Self {
        Self { link, entries: HashMap::new(), shares: Shares::default(), failed: 0, wakeup: None }
    }

    /// Looks a neighbour up, and begins to ask for it, on behalf of `asker`, where needed.
    pub fn resolve(&mut self, neighbor: Ipv4Addr, asker: Asker, now: Timestamp) -> Resolution {
        let Some(entry) = self.entries.get_mut(&neighbor) else { return self.begin(neighbor, asker, now) };
        entry.used = now;
        match &mut entry.state {
            State::Known { mac, confirmed, probe, .. } => {
                let mac = *mac;
                if probe.is_none() && now.since(*confirmed) >= CONFIRMED_FOR {
                    *probe = Some(Asking { sent: 0, next: now });
                    self.wake_at(now);
                }
                Resolution::Known(mac)
            }
            State::Resolving(_) => Resolution::Pending,
            State::Failed { .. } => Resolution::Failed,
        }
    }

    /// Whether the neighbour has been asked for and does not answer. Nobody is asked for it now.
    pub fn has_failed(&self, neighbor: Ipv4Addr) -> bool {
        let is_failed = |entry: &Entry<P>| matches!(entry.state, State::Failed { .. });
        self.failed > 0 && self.entries.get(&neighbor).is_some_and(is_failed)
    }

    /// Keeps a packet of `asker`, of so many bytes, until the neighbour is known.
    ///
    /// # Errors
    /// The packet, if the neighbour is not being asked for, or too much waits.
    pub fn hold(&mut self, neighbor: Ipv4Addr, asker: Asker, packet: P, bytes: usize) -> Result<(), P> {
        let Some(entry) = self.entries.get_mut(&neighbor) else { return Err(packet) };
        let resolving = matches!(entry.state, State::Resolving(_));
        if !resolving || entry.held().reaches(MAX_HELD_PER_NEIGHBOR) || !self.shares.may_hold(asker) {
            return Err(packet);
        }
        entry.held.push_back(Held { packet, bytes, asker });
        entry.held_bytes += bytes;
        self.shares.hold(asker, bytes);
        Ok(())
    }

    /// Learns from an ARP frame, which neighbour is known now; [`Self::drain`] then gives the packets held for it.
    ///
    /// # Errors
    /// Why it was ignored.
    pub fn receive(&mut self, frame: &[u8], now: Timestamp) -> Result<Ipv4Addr, Ignored> {
        let Heard { neighbor, mac, answers } =
            parse(frame, &self.link.addresses).ok_or(Ignored::Malformed)?;
        let ignored = if answers { Ignored::Unsolicited } else { Ignored::NoReply };
        let entry = self.entries.get_mut(&neighbor).ok_or(ignored)?;
        let asked = match entry.state {
            State::Resolving(asking) => asking.sent > 0,
            // Nobody but the one at that link address was asked.
            State::Known { mac: known, probe, .. } => {
                mac == known && probe.is_some_and(|asking| asking.sent > 0)
            }
            State::Failed { .. } => false,
        };
        if !(answers && asked) {
            if let Some(next) = entry.doubt(mac, now) {
                self.wake_at(next);
            }
            return Err(ignored);
        }
        entry.state = State::Known { mac, confirmed: now, probe: None, doubted: false };
        let expiry = entry.used + UNUSED_FOR;
        self.wake_at(expiry);
        Ok(neighbor)
    }

    /// Takes the packets held for a neighbour, in their order.
    pub fn drain(&mut self, neighbor: Ipv4Addr) -> impl Iterator<Item = P> + use<P> {
        let held = self.entries.get_mut(&neighbor).map(|entry| entry.release(&mut self.shares));
        held.unwrap_or_default().into_iter().map(|held| held.packet)
    }

    /// Makes the requests that are due, and forgets what has expired.
    ///
    /// `request` gets each frame to send; `undeliverable` each packet that waited for a neighbour that does not answer.
    pub fn poll(
        &mut self,
        now: Timestamp,
        mut request: impl FnMut(ArpFrame),
        mut undeliverable: impl FnMut(P),
    ) {
        if self.wakeup.is_none_or(|wakeup| now < wakeup) {
            return;
        }
        let mut wakeup: Option<Timestamp> = None;
        let Self { link, entries, shares, failed, .. } = self;
        *failed = 0;
        let crowded = entries.len() >= CROWDED;
        entries.retain(|&neighbor, entry| {
            let hurries = crowded && link.router != Some(neighbor);
            let ask = |to| request_frame(link, neighbor, to);
            let mut due = entry.advance(now, if hurries { 1 } else { REQUESTS }, |to| request(ask(to)));
            if matches!(entry.state, State::Failed { .. }) {
                entry.release(shares).into_iter().for_each(|held| undeliverable(held.packet));
                due = due.filter(|_| !hurries);
                *failed += usize::from(due.is_some());
            }
            wakeup = match (wakeup, due) {
                (Some(wakeup), Some(due)) => Some(wakeup.min(due)),
                (wakeup, due) => wakeup.or(due),
            };
            if due.is_none() {
                shares.give_up(entry.asker);
            }
            due.is_some()
        });
        self.wakeup = wakeup;
    }

    /// When [`Self::poll`] has something to do; `None`: never, as things are.
    pub fn next_wakeup(&self) -> Option<Timestamp> {
        self.wakeup
    }

    /// The link changed: everything is forgotten, and the packets that waited are returned.
    pub fn reset(&mut self, link: ExternalLink) -> Vec<P> {
        let old = std::mem::replace(self, Self::new(link));
        old.entries.into_values().flat_map(|entry| entry.held).map(|held| held.packet).collect()
    }

    /// Begins to ask for a neighbour. There is always room for the router, however many others are scanned for.
    fn begin(&mut self, neighbor: Ipv4Addr, asker: Asker, now: Timestamp) -> Resolution {
        let free = MAX_NEIGHBORS.saturating_sub(self.entries.len());
        if !self.shares.may_ask(asker, free) && self.link.router != Some(neighbor) {
            return Resolution::Failed;
        }
        self.shares.ask(asker);
        let state = State::Resolving(Asking { sent: 0, next: now });
        let entry = Entry { state, used: now, asker, held: VecDeque::new(), held_bytes: 0 };
        self.entries.insert(neighbor, entry);
        self.wake_at(now);
        Resolution::Pending
    }

    fn wake_at(&mut self, time: Timestamp) {
        self.wakeup = Some(self.wakeup.map_or(time, |wakeup| wakeup.min(time)));
    }
}

impl<P> Entry<P> {
    /// What waits for this neighbour.
    fn held(&self) -> Amount {
        Amount { packets: self.held.len(), bytes: self.held_bytes }
    }

    /// Takes what waits, and takes it off the `shares` of those whose packets they are.
    fn release(&mut self, shares: &mut Shares) -> VecDeque<Held<P>> {
        self.held.iter().for_each(|held| shares.release(held.asker, held.bytes));
        self.held_bytes = 0;
        std::mem::take(&mut self.held)
    }

    /// Somebody whom nobody asked says that the neighbour is at `claimed`. If that is news, the neighbour is to be
    /// asked, or given up, at the time that is returned. It is asked at once if it is not already, but not more often
    /// than once a second, whatever is said.
    fn doubt(&mut self, claimed: MacAddress, now: Timestamp) -> Option<Timestamp> {
        match &mut self.state {
            State::Known { mac, confirmed, probe, doubted: doubted @ false } if *mac != claimed => {
                let asking = match *probe {
                    Some(asked) if asked.sent > 0 => Asking { sent: REQUESTS, ..asked },
                    _ => Asking { sent: REQUESTS - 1, next: now.max(*confirmed + REQUEST_INTERVAL) },
                };
                *doubted = true;
                *probe = Some(asking);
                Some(asking.next)
            }
            _ => None,
        }
    }

    /// Does what is due and returns when the next thing is; `None`: the entry is to be forgotten. To find out where the
    /// neighbour is, so many `requests` are made.
    fn advance(
        &mut self,
        now: Timestamp,
        requests: u8,
        mut ask: impl FnMut(MacAddress),
    ) -> Option<Timestamp> {
        if let State::Known { mac, confirmed, probe, doubted } = self.state {
            let expiry = self.used + UNUSED_FOR;
            if now >= expiry {
                return None;
            }
            let Some(asking) = probe else { return Some(expiry) };
            if let Some(asking) = asking.advance(now, REQUESTS, || ask(mac)) {
                self.state = State::Known { mac, confirmed, probe: Some(asking), doubted };
                return Some(asking.next.min(expiry));
            }
            self.state = State::Resolving(Asking { sent: 0, next: now });
        }
        if let State::Resolving(asking) = self.state {
            if let Some(asking) = asking.advance(now, requests, || ask(BROADCAST)) {
                self.state = State::Resolving(asking);
                return Some(asking.next);
            }
            self.state = State::Failed { until: now + FAILED_FOR };
        }
        match self.state {
            State::Failed { until } if now < until => Some(until),
            _ => None,
        }
    }
}

impl Asking {
    /// Asks if it is time to; `None` if the last of so many `requests` was not answered in time.
    fn advance(self, now: Timestamp, requests: u8, ask: impl FnOnce()) -> Option<Self> {
        if now < self.next {
            return Some(self);
        }
        if self.sent >= requests {
            return None;
        }
        ask();
        Some(Self { sent: self.sent + 1, next: now + REQUEST_INTERVAL })
    }
}

fn request_frame(link: &ExternalLink, neighbor: Ipv4Addr, to: MacAddress) -> ArpFrame {
    frame(arp::REQUEST, (link.face_towards(neighbor), link.mac), (neighbor, [0; 6]), to)
}

fn frame(
    operation: u16,
    sender: (Ipv4Addr, MacAddress),
    target: (Ipv4Addr, MacAddress),
    to: MacAddress,
) -> ArpFrame {
    let mut frame = [0; arp::LEN];
    frame[0..6].copy_from_slice(&to);
    frame[6..12].copy_from_slice(&sender.1);
    frame[12..14].copy_from_slice(&ETHERTYPE_ARP.to_be_bytes());
    frame[arp::HARDWARE..arp::OPERATION].copy_from_slice(&KIND);
    frame[arp::OPERATION..arp::SENDER_MAC].copy_from_slice(&operation.to_be_bytes());
    frame[arp::SENDER_MAC..arp::SENDER_ADDRESS].copy_from_slice(&sender.1);
    frame[arp::SENDER_ADDRESS..arp::TARGET_MAC].copy_from_slice(&sender.0.octets());
    frame[arp::TARGET_MAC..arp::TARGET_ADDRESS].copy_from_slice(&target.1);
    frame[arp::TARGET_ADDRESS..].copy_from_slice(&target.0.octets());
    frame
}

/// Hardware and protocol type, and the lengths of their addresses: Ethernet, IPv4, 6, 4.
const KIND: [u8; 6] = {
    let ([h0, h1], [p0, p1]) = (arp::ETHERNET.to_be_bytes(), ETHERTYPE_IPV4.to_be_bytes());
    [h0, h1, p0, p1, 6, 4]
};

/// What an ARP frame says of its sender.
struct Heard {
    neighbor: Ipv4Addr,
    mac: MacAddress,
    /// It is a reply to us, rather than a request or an announcement.
    answers: bool,
}

fn parse(frame: &[u8], ours: &[Ipv4Addr]) -> Option<Heard> {
    let frame: &ArpFrame = frame.first_chunk()?;
    let operation = u16::from_be_bytes([frame[arp::OPERATION], frame[arp::OPERATION + 1]]);
    let to_us = ours.iter().any(|ours| frame[arp::TARGET_ADDRESS..] == ours.octets());
    let announces = frame[arp::TARGET_ADDRESS..] == frame[arp::SENDER_ADDRESS..arp::TARGET_MAC];
    let well_formed = frame[12..14] == ETHERTYPE_ARP.to_be_bytes()
        && frame[arp::HARDWARE..arp::OPERATION] == KIND
        && matches!(operation, arp::REQUEST | arp::REPLY)
        && (to_us || announces);
    let mut mac = [0; 6];
    mac.copy_from_slice(&frame[arp::SENDER_MAC..arp::SENDER_ADDRESS]);
    let mut address = [0; 4];
    address.copy_from_slice(&frame[arp::SENDER_ADDRESS..arp::TARGET_MAC]);
    // A station's own address is no group address (IEEE 802: lowest bit of the first byte) and not zero.
    let station = mac[0] & 1 == 0 && mac != [0; 6];
    let answers = operation == arp::REPLY && to_us;
    (well_formed && station).then_some(Heard { neighbor: Ipv4Addr::from(address), mac, answers })
}

#[cfg(test)]
pub(super) mod tests_support {
    use super::*;

    /// A reply of `from` to `to`.
    pub(crate) fn reply(from: Ipv4Addr, mac: MacAddress, to: Ipv4Addr, to_mac: MacAddress) -> ArpFrame {
        frame(arp::REPLY, (from, mac), (to, to_mac), to_mac)
    }
}

#[cfg(test)]
mod tests;
