//! The thread that reserves ports, so that no packet waits for it.

use std::collections::VecDeque;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::ops::RangeInclusive;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;

use super::{PortOwnership, PortProtocol, PortReservation, Shortage};
use crate::sys::{Context, DeviceError};

/// Requests that may wait; more are refused.
const QUEUE: usize = 256;

/// A wish for ports.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReserveRequest {
    /// The protocol.
    pub protocol: PortProtocol,
    /// The external address.
    pub address: Ipv4Addr,
    /// The shard that asks; it gets ports whose remainder by `shards` is its number.
    pub shard: u8,
    /// How many shards there are.
    pub shards: u8,
    /// The ports to choose from (RFC 4787 REQ-3a keeps the classes 0-1023 and 1024-65535 apart).
    pub ports: RangeInclusive<u16>,
    /// How many.
    pub count: usize,
    /// Whether nobody misses any yet.
    pub in_advance: bool,
    /// Ports of the same protocol and address that the shard returns. Who only returns ports and wants none gets no
    /// answer.
    pub returned: Vec<u16>,
}

/// The answer to a [`ReserveRequest`].
#[derive(Debug)]
pub struct Batch {
    /// What was asked for.
    pub request: ReserveRequest,
    /// The ports, in random order.
    pub ports: Vec<u16>,
    /// Why there are no more. Without it, there may be fewer than were asked for, and more for those who ask again.
    pub shortage: Option<Shortage>,
}

/// Why the thread was not asked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Refused {
    /// It has too much to do: ask again later.
    Busy(ReserveRequest),
    /// It has ended.
    Gone,
}

enum ReserverCommand {
    Reserve(ReserveRequest),
    Claim(PortProtocol, SocketAddrV4, SyncSender<io::Result<()>>),
    Disclaim(PortProtocol, SocketAddrV4),
    Unreserve(PortProtocol, SocketAddrV4),
    RetainAddresses(Vec<Ipv4Addr>, SyncSender<()>),
    Keep(Option<(u16, u16)>),
    Stop,
}

/// The thread, and the sockets that it owns: they are closed when it is stopped.
#[derive(Debug)]
pub struct Reserver {
    handle: ReserverHandle,
    ownership: PortOwnership,
    thread: Option<JoinHandle<()>>,
}

/// A way to ask the thread. Asking never blocks.
#[derive(Clone, Debug)]
pub struct ReserverHandle(SyncSender<ReserverCommand>);

impl Reserver {
    /// Starts the thread; it calls `deliver` with each answer, and waits whenever there is nothing to do.
    ///
    /// # Errors
    /// Where the system has no more threads.
    pub fn start(
        reservation: PortReservation,
        deliver: impl FnMut(Batch) + Send + 'static,
    ) -> Result<Self, DeviceError> {
        let (sender, receiver) = sync_channel(QUEUE);
        let ownership = reservation.ownership();
        let thread = std::thread::Builder::new()
            .name("tidegate-ports".into())
            .spawn(move || work(reservation, &receiver, deliver))
            .context(|| "start the thread that reserves ports".into())?;
        Ok(Self { handle: ReserverHandle(sender), ownership, thread: Some(thread) })
    }

    /// A way to ask.
    pub fn handle(&self) -> ReserverHandle {
        self.handle.clone()
    }

    /// What is reserved.
    pub fn ownership(&self) -> PortOwnership {
        self.ownership.clone()
    }

    /// Claims one port and waits until that is done. Not for a packet's way: use it to publish a port. What was asked
    /// of the thread before, as to return the port, has been done by then.
    ///
    /// # Errors
    /// As of [`PortReservation::claim`]; `BrokenPipe` after [`Self::stop`].
    pub fn claim(&self, protocol: PortProtocol, port: SocketAddrV4) -> io::Result<()> {
        let (reply, answer) = sync_channel(1);
        let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        self.handle
            .0
            .send(ReserverCommand::Claim(protocol, port, reply))
            .map_err(|_| io::ErrorKind::BrokenPipe)?;
        answer.recv().map_err(gone)?
    }

    /// Ends a claim that came to nothing ([`PortReservation::disclaim`]). As [`Self::claim`], it may wait for the
    /// thread's current work.
    pub fn disclaim(&self, protocol: PortProtocol, port: SocketAddrV4) {
        // Fails only after `Self::stop`, which has unreserved every port.
        drop(self.handle.0.send(ReserverCommand::Disclaim(protocol, port)));
    }

    /// Unreserves one port ([`PortReservation::unreserve`]). As [`Self::claim`], it may wait for the thread's current
    /// work.
    pub fn unreserve(&self, protocol: PortProtocol, port: SocketAddrV4) {
        // Fails only after `Self::stop`, which has unreserved every port.
        drop(self.handle.0.send(ReserverCommand::Unreserve(protocol, port)));
    }

    /// Unreserves the ports of all other addresses, and waits until that is done. What was reserved of them before has
    /// been delivered by then, and nothing is from then on.
    pub fn retain_addresses(&self, addresses: &[Ipv4Addr]) {
        let (reply, answer) = sync_channel(1);
        // Either fails only after `Self::stop`, when there are no ports at all.
        drop(self.handle.0.send(ReserverCommand::RetainAddresses(addresses.to_vec(), reply)));
        answer.recv().ok();
    }

    /// Other ports are kept for the host's programs ([`PortReservation::keep`]). As [`Self::claim`], it may wait for
    /// the thread's current work.
    pub fn keep(&self, ports: Option<(u16, u16)>) {
        // Fails only after `Self::stop`, when there are no ports at all.
        drop(self.handle.0.send(ReserverCommand::Keep(ports)));
    }

    /// Ends the thread, waits for it, and unreserves every port. Stopping twice does nothing.
    pub fn stop(&mut self) {
        if let Some(thread) = self.thread.take() {
            // Either fails only if `deliver` has panicked, which ended the thread and was reported where it happened.
            drop(self.handle.0.send(ReserverCommand::Stop));
            drop(thread.join());
        }
    }
}

impl Drop for Reserver {
    fn drop(&mut self) {
        self.stop();
    }
}

impl ReserverHandle {
    /// Asks for ports; the answer goes to the `deliver` of [`Reserver::start`].
    ///
    /// # Errors
    /// [`Refused`], with the request where it is to be asked again.
    pub fn request(&self, request: ReserveRequest) -> Result<(), Refused> {
        self.0.try_send(ReserverCommand::Reserve(request)).map_err(|refused| match refused {
            TrySendError::Full(ReserverCommand::Reserve(request)) => Refused::Busy(request),
            _ => Refused::Gone,
        })
    }
}

/// Requests on their way to the thread. Every shard that asks counts on an answer, so what the thread has no room for
/// waits here, and is asked for again.
#[derive(Debug, Default)]
pub struct PendingRequests(VecDeque<ReserveRequest>);

impl PendingRequests {
    /// Whether all requests have gone.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Asks for what waits and for `more`, in this order. Returns false if the thread has ended: then there is nobody
    /// to ask any more.
    pub fn send(&mut self, more: Vec<ReserveRequest>, reserver: &ReserverHandle) -> bool {
        self.0.extend(more);
        while let Some(request) = self.0.pop_front() {
            match reserver.request(request) {
                Ok(()) => {}
                Err(Refused::Busy(request)) => {
                    self.0.push_front(request);
                    return true;
                }
                Err(Refused::Gone) => {
                    self.0.clear();
                    return false;
                }
            }
        }
        true
    }
}

fn work(
    mut reservation: PortReservation,
    commands: &Receiver<ReserverCommand>,
    mut deliver: impl FnMut(Batch),
) {
    let ownership = reservation.ownership();
    // Ends with `Stop`, or with the last handle.
    while let Ok(command) = commands.recv() {
        match command {
            ReserverCommand::Reserve(request) => {
                for &port in &request.returned {
                    reservation.return_port(request.protocol, SocketAddrV4::new(request.address, port));
                }
                if request.count == 0 {
                    continue; // nobody waits for an answer
                }
                let candidates = Candidates::new(&request, &ownership);
                let step = reservation.step(request.count);
                let room = reservation.room(request.shard, request.shards, step);
                let (ports, shortage) =
                    reservation.reserve(request.protocol, request.address, candidates, room);
                let shortage = shortage.or_else(|| (room < step).then_some(Shortage::Descriptors));
                deliver(Batch { request, ports, shortage });
            }
            ReserverCommand::Claim(protocol, port, reply) => {
                // Nobody waits any more if this fails, and the port is theirs to unreserve.
                drop(reply.send(reservation.claim(protocol, port)));
            }
            ReserverCommand::Disclaim(protocol, port) => reservation.disclaim(protocol, port),
            ReserverCommand::Unreserve(protocol, port) => {
                reservation.unreserve(protocol, port);
            }
            ReserverCommand::RetainAddresses(addresses, reply) => {
                reservation.retain_addresses(&addresses);
                reply.send(()).ok(); // whoever asked waits
            }
            ReserverCommand::Keep(ports) => reservation.keep(ports),
            ReserverCommand::Stop => break,
        }
    }
}

/// The ports that a shard may have and that nobody has reserved, in random order: external ports are hard to guess (RFC
/// 6056 §3.3.1).
struct Candidates {
    ports: Vec<u16>,
}

impl Candidates {
    fn new(request: &ReserveRequest, ownership: &PortOwnership) -> Self {
        let shards = u16::from(request.shards.max(1));
        let fits = |port: &u16| {
            *port != 0
                && port % shards == u16::from(request.shard)
                && !ownership.is_reserved(request.protocol, request.address, *port)
        };
        Self { ports: request.ports.clone().filter(fits).collect() }
    }
}

impl Iterator for Candidates {
    type Item = u16;

    fn next(&mut self) -> Option<u16> {
        // Without randomness from the system there are no ports, rather than ports that can be guessed.
        let random = if self.ports.is_empty() { return None } else { getrandom::u64().ok()? };
        let at = (u128::from(random) * self.ports.len() as u128) >> 64;
        Some(self.ports.swap_remove(at as usize))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{budget, first_ports};
    use super::*;
    use std::collections::HashSet;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    /// An address of each test's own: the tests run side by side, and would take each other's ports.
    const fn address_of(test: u8) -> Ipv4Addr {
        Ipv4Addr::new(127, 0, 78, test)
    }

    fn request(address: Ipv4Addr, shard: u8, count: usize) -> ReserveRequest {
        ReserveRequest {
            protocol: PortProtocol::Udp,
            address,
            shard,
            shards: 4,
            ports: 63_000..=63_399,
            count,
            in_advance: false,
            returned: Vec::new(),
        }
    }

    #[test]
    fn each_shard_gets_ports_of_its_own_until_there_are_no_more() {
        let (sender, batches) = channel();
        let mut reserver =
            Reserver::start(PortReservation::new(1000), move |batch| sender.send(batch).unwrap()).unwrap();
        let handle = reserver.handle();
        let mut seen = HashSet::new();
        let request = |shard, count| request(address_of(1), shard, count);
        for (shard, count, expected) in [(0, 60, 60), (3, 60, 60), (3, 60, 40), (3, 1, 0)] {
            handle.request(request(shard, count)).unwrap();
            let batch = batches.recv_timeout(Duration::from_secs(10)).unwrap();
            assert_eq!(batch.ports.len(), expected);
            assert_eq!(matches!(batch.shortage, Some(Shortage::NoFreePort)), expected < count);
            assert!(batch.ports.iter().all(|port| (63_000..=63_399).contains(port)));
            assert!(batch.ports.iter().all(|&port| port % 4 == u16::from(shard) && seen.insert(port)));
            assert!(!batch.ports.is_sorted() || batch.ports.len() < 2);
        }
        let ownership = reserver.ownership();
        assert_eq!(ownership.count(PortProtocol::Udp), 160);
        reserver.stop();
        reserver.stop();
        assert_eq!(ownership.count(PortProtocol::Udp), 0);
        assert_eq!(handle.request(request(0, 1)), Err(Refused::Gone));
    }

    #[test]
    fn ports_that_are_returned_are_the_hosts_again() {
        let (sender, batches) = channel();
        let reserver =
            Reserver::start(PortReservation::new(1000), move |batch| sender.send(batch).unwrap()).unwrap();
        let handle = reserver.handle();
        let address = address_of(2);
        let request = |count| request(address, 0, count);
        handle.request(request(100)).unwrap();
        let returned = batches.recv_timeout(Duration::from_secs(10)).unwrap().ports;
        let port = SocketAddrV4::new(address, returned[7]);
        std::net::UdpSocket::bind(port).unwrap_err();
        handle.request(ReserveRequest { returned, ..request(0) }).unwrap();
        // The next answer is to the next wish: all hundred are to be had once more.
        handle.request(request(1)).unwrap();
        let again = batches.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!((again.request.count, again.ports.len()), (1, 1));
        assert_eq!(reserver.ownership().count(PortProtocol::Udp), 1);
        if again.ports != [port.port()] {
            drop(std::net::UdpSocket::bind(port).unwrap());
        }
    }

    #[test]
    fn a_shard_that_took_most_of_the_budget_leaves_some_to_the_others() {
        let (sender, batches) = channel();
        let reserver =
            Reserver::start(PortReservation::new(160), move |batch| sender.send(batch).unwrap()).unwrap();
        // Asks until there are no more, and counts what it got.
        let ask = |shard| {
            let mut ports = 0;
            loop {
                let wish = ReserveRequest { ports: 61_600..=62_399, ..request(address_of(3), shard, 100) };
                reserver.handle().request(wish).unwrap();
                let batch = batches.recv_timeout(Duration::from_secs(10)).unwrap();
                ports += batch.ports.len();
                match batch.shortage {
                    None => assert!(!batch.ports.is_empty(), "nothing, and no reason"),
                    Some(Shortage::Descriptors) => return ports,
                    Some(other) => panic!("{other}"),
                }
            }
        };
        assert_eq!(
            ask(0),
            140,
            "while there is enough, one may have more than its part, but not the last eighth"
        );
        assert_eq!(ask(0), 0);
        assert_eq!(ask(1), 20, "which is for those that have little");
    }

    #[test]
    fn with_few_descriptors_every_shard_has_its_first_ports_of_both_protocols() {
        let (sender, batches) = channel();
        let (available, shards) = (budget(1_024), 4);
        let reserver =
            Reserver::start(PortReservation::new(available), move |batch| sender.send(batch).unwrap())
                .unwrap();
        let first = first_ports(available, shards, 2_048);
        for protocol in [PortProtocol::Tcp, PortProtocol::Udp] {
            for shard in 0..shards as u8 {
                let wish = ReserveRequest { protocol, ..request(address_of(4), shard, first) };
                reserver.handle().request(wish).unwrap();
                let batch = batches.recv_timeout(Duration::from_secs(10)).unwrap();
                assert_eq!(
                    (batch.ports.len(), batch.shortage.is_some()),
                    (first, false),
                    "{protocol:?} {shard}"
                );
            }
        }
        let taken = 2 * shards * first;
        assert!(taken <= available / 2, "{taken} of {available}: the rest is for who needs it");
    }

    #[test]
    fn no_request_is_lost_while_the_thread_is_busy() {
        let (go_on, stopped) = channel::<()>();
        let (sender, batches) = channel();
        let mut reserver = Reserver::start(PortReservation::new(10), move |batch| {
            stopped.recv().ok();
            sender.send(batch).unwrap();
        })
        .unwrap();
        let handle = reserver.handle();
        let mut pending = PendingRequests::default();
        let request = |shard, count| request(address_of(5), shard, count);
        // More than fit, beside the one that the thread is at.
        let wanted = QUEUE + 10;
        assert!(pending.send((0..wanted).map(|n| request(n as u8 % 4, 1)).collect(), &handle));
        assert!(!pending.is_empty());
        drop(go_on);
        for n in 0..wanted {
            let batch = batches.recv_timeout(Duration::from_secs(10)).unwrap();
            assert_eq!(batch.request.shard, n as u8 % 4, "in order");
            assert!(pending.send(Vec::new(), &handle));
        }
        assert!(pending.is_empty());
        reserver.stop();
        assert!(!pending.send(vec![request(0, 1)], &handle) && pending.is_empty());
    }

    #[test]
    fn a_port_is_claimed_after_all_that_was_asked_before() {
        let (go_on, stopped) = channel::<()>();
        let (sender, batches) = channel();
        let reserver = Reserver::start(PortReservation::new(100), move |batch: Batch| {
            sender.send(batch).unwrap();
            stopped.recv().ok();
        })
        .unwrap();
        let (handle, udp) = (reserver.handle(), PortProtocol::Udp);
        let address = address_of(6);
        let request = |count| request(address, 0, count);
        handle.request(request(2)).unwrap();
        let returned = batches.recv_timeout(Duration::from_secs(10)).unwrap().ports;
        let [first, second] = [0, 1].map(|index: usize| SocketAddrV4::new(address, returned[index]));
        // While the thread is at its batch: one port is returned, another one's publication ends, and both are
        // published.
        handle.request(ReserveRequest { returned: vec![first.port()], ..request(0) }).unwrap();
        reserver.unreserve(udp, second);
        assert!(reserver.ownership().is_reserved(udp, address, first.port()), "as far as one can see");
        std::thread::scope(|scope| {
            let claims = [first, second].map(|port| {
                let reserver = &reserver;
                scope.spawn(move || reserver.claim(udp, port))
            });
            drop(go_on);
            assert!(claims.into_iter().all(|claim| claim.join().unwrap().is_ok()));
        });
        assert!([first, second].iter().all(|&port| std::net::UdpSocket::bind(port).is_err()));
        // What is returned from now on is the publication's.
        handle.request(ReserveRequest { returned: vec![first.port()], ..request(1) }).unwrap();
        batches.recv_timeout(Duration::from_secs(10)).unwrap();
        std::net::UdpSocket::bind(first).unwrap_err();
    }

    #[test]
    fn what_was_reserved_of_an_address_is_delivered_before_the_address_has_gone() {
        let (go_on, stopped) = channel::<()>();
        let (sender, batches) = channel();
        let reserver = Reserver::start(PortReservation::new(100), move |batch: Batch| {
            stopped.recv().ok();
            sender.send(batch).unwrap();
        })
        .unwrap();
        let [here, gone] = [7, 8].map(address_of);
        let request = |address| request(address, 1, 5);
        for _ in 0..2 {
            reserver.handle().request(request(gone)).unwrap();
        }
        drop(go_on);
        reserver.retain_addresses(&[here]);
        let delivered: Vec<usize> = batches.try_iter().map(|batch| batch.ports.len()).collect();
        assert_eq!((delivered, reserver.ownership().count(PortProtocol::Udp)), (vec![5, 5], 0));
        // Somebody who has not heard of it asks, and the host has the address still.
        reserver.handle().request(request(gone)).unwrap();
        let batch = batches.recv_timeout(Duration::from_secs(10)).unwrap();
        assert!(batch.ports.is_empty() && matches!(batch.shortage, Some(Shortage::Refused(_))), "{batch:?}");
        reserver.retain_addresses(&[here, gone]);
        reserver.handle().request(request(gone)).unwrap();
        assert_eq!(batches.recv_timeout(Duration::from_secs(10)).unwrap().ports.len(), 5);
    }

    #[test]
    fn a_published_port_is_claimed_or_its_holder_is_told_of() {
        let mut reserver = Reserver::start(PortReservation::new(10), drop).unwrap();
        let address = address_of(9);
        let port = SocketAddrV4::new(address, 63_500);
        let holder = std::net::TcpListener::bind(port).unwrap();
        let refusal = reserver.claim(PortProtocol::Tcp, port).unwrap_err();
        assert_eq!(refusal.raw_os_error(), Some(libc::EADDRINUSE));
        drop(holder);
        reserver.claim(PortProtocol::Tcp, port).unwrap();
        assert!(reserver.ownership().is_reserved(PortProtocol::Tcp, address, 63_500));
        reserver.unreserve(PortProtocol::Tcp, port);
        reserver.stop();
        assert_eq!(reserver.claim(PortProtocol::Tcp, port).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
