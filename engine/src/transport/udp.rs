//! WireGuard's transport: one UDP socket per shard, with segmentation (GSO) on the way out and GRO on the way in.
//!
//! Theory of operation. `recvmmsg` fills one buffer per message; with `UDP_GRO` the kernel has already merged
//! consecutive datagrams of one sender, and says of which size they were. `sendmmsg` sends several trains, each with
//! `UDP_SEGMENT`. Nothing waits: where the kernel has no room, datagrams die and are counted, as on any link.
//!
//! UDP GSO is broken on some kernels and drivers. If the kernel refuses a train with `EIO` or `EINVAL`, the train goes
//! out datagram by datagram. Where the kernel refuses those as well, it says nothing about trains. Most other refusals
//! are about a route, so only those towards many destinations, without a train that was taken between them, switch GSO
//! off for good; many towards few let it rest ([`Refusals`]). [`Transport::gso`] tells.
//!
//! On a host with several addresses each datagram tells to which it was sent (`IP_PKTINFO`), and answers leave from
//! there ([`Path::local`]). Should the host have lost that address, they leave from another, and [`SendOutcome::gone`]
//! tells.
//!
//! Several shards share the port by `SO_REUSEPORT`. A program in the kernel reads the *receiver index* of each message
//! and picks the shard that handed it out, so that a peer stays on its shard wherever it roams
//! ([`UdpTransport::steer_by_receiver_index`]).

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use super::{MAX_TRAIN_BYTES, MAX_TRAIN_SEGMENTS, ReceivedTrain, SendOutcome, SendTrain, Transport};
use crate::arena::{Arena, Slot, Span};
use crate::bpf::{Assembler, AssemblyError, Instruction, Test};
use crate::path::Path;
use crate::sys::batch::{
    AfterError, Body, Head, MAX_MESSAGES, Message, ReceiveBatch, SOL_UDP, SendBatch, send_one,
};
use crate::sys::{self, Buffer, Context, DeviceError, SocketAddress};
use crate::wire::Ecn;

/// How to open the socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UdpOptions {
    /// Whether to send trains with `UDP_SEGMENT`.
    pub gso: bool,
    /// Whether to receive trains by `UDP_GRO`.
    pub gro: bool,
    /// Whether other sockets of this gateway share the port (`SO_REUSEPORT`).
    pub reuse_port: bool,
    /// Whether to answer from the address that was addressed, on a socket that listens on all of them. For those who
    /// are called: a caller, whose own address may change at any time, leaves it to the route, or it would not roam.
    pub sticky_source: bool,
    /// The mark of sent packets (`SO_MARK`), by which routing rules know them; 0: none.
    pub fwmark: u32,
    /// Bytes of the kernel's receive buffer.
    pub receive_buffer: usize,
    /// Bytes of the kernel's send buffer.
    pub send_buffer: usize,
}

impl Default for UdpOptions {
    fn default() -> Self {
        Self {
            gso: true,
            gro: true,
            reuse_port: false,
            sticky_source: false,
            fwmark: 0,
            receive_buffer: 4 * 1024 * 1024,
            send_buffer: 4 * 1024 * 1024,
        }
    }
}

/// A UDP socket that moves trains.
pub struct UdpTransport {
    fd: OwnedFd,
    gso: bool,
    refusals: Refusals,
    gro: bool,
    incoming: ReceiveBatch,
    outgoing: SendBatch,
}

impl UdpTransport {
    /// Opens a socket bound to `listen` (port 0: any).
    ///
    /// Outer packets are sent without DF, as WireGuard does: a path with a smaller MTU fragments them, and a forged
    /// *fragmentation needed* changes nothing (`IP_PMTUDISC_OMIT`).
    ///
    /// # Errors
    /// `EADDRINUSE` if a program holds the port, `EPERM` for a mark without `CAP_NET_ADMIN`.
    pub fn open(listen: SocketAddrV4, options: UdpOptions) -> Result<Self, DeviceError> {
        let fd = sys::socket(libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_UDP)
            .context(|| format!("open a UDP socket for {listen}"))?;
        let socket = fd.as_fd();
        let set = |level, name, value: u32, what: &str| {
            sys::set_option(socket, level, name, value)
                .context(|| format!("set {what} on the UDP socket of {listen}"))
        };
        if options.reuse_port {
            set(libc::SOL_SOCKET, libc::SO_REUSEPORT, 1, "SO_REUSEPORT")?;
        }
        if options.fwmark != 0 {
            set(libc::SOL_SOCKET, libc::SO_MARK, options.fwmark, "SO_MARK")?;
        }
        set(libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_OMIT as u32, "IP_MTU_DISCOVER")?;
        for (direction, bytes) in
            [(Buffer::Receive, options.receive_buffer), (Buffer::Send, options.send_buffer)]
        {
            sys::set_buffer(socket, direction, bytes)
                .context(|| format!("size the buffers of the UDP socket of {listen}"))?;
        }
        // A socket that is bound to an address sends from there anyway.
        if options.sticky_source && listen.ip().is_unspecified() {
            set(libc::IPPROTO_IP, libc::IP_PKTINFO, 1, "IP_PKTINFO")?;
        }
        // Where it is refused, the ECN field cannot be told, and the tunnel does without, as it would if nobody marked
        // anything.
        sys::set_option(socket, libc::IPPROTO_IP, libc::IP_RECVTOS, 1u32).ok();
        // A kernel that knows UDP_SEGMENT accepts the size 0, which means "off".
        let gso = options.gso && sys::set_option(socket, SOL_UDP, libc::UDP_SEGMENT, 0u32).is_ok();
        let gro = options.gro && sys::set_option(socket, SOL_UDP, libc::UDP_GRO, 1u32).is_ok();
        sys::bind(socket, &SocketAddress::inet(listen))
            .context(|| format!("bind a UDP socket to {listen}"))?;
        Ok(Self {
            fd,
            gso,
            refusals: Refusals::default(),
            gro,
            incoming: ReceiveBatch::new(),
            outgoing: SendBatch::new(),
        })
    }

    /// Makes the kernel pick the shard's socket by the receiver index (its lowest byte, modulo `shards`).
    ///
    /// Call it on the first socket of the port, and open the others in the order of their shards: the kernel numbers
    /// them in the order in which they were bound, and they share the program. Handshake initiations, which have no
    /// receiver yet, and whatever is no WireGuard message go to shard 0.
    ///
    /// # Errors
    /// `EINVAL` if the socket was opened without `reuse_port`, or `shards` is 0.
    pub fn steer_by_receiver_index(&self, shards: u8) -> Result<(), DeviceError> {
        receiver_index_program(shards)
            .map_err(io::Error::from)
            .and_then(|program| {
                sys::attach_program(
                    self.fd.as_fd(),
                    libc::SOL_SOCKET,
                    libc::SO_ATTACH_REUSEPORT_CBPF,
                    &program,
                )
            })
            .context(|| format!("steer UDP datagrams to {shards} shards"))
    }

    /// The address to which the socket is bound.
    ///
    /// # Errors
    /// None is expected.
    pub fn local_addr(&self) -> Result<SocketAddrV4, DeviceError> {
        sys::local_address(self.fd.as_fd()).context(|| "read the address of a UDP socket".into())
    }

    /// How many datagrams the kernel discarded so far because the receive buffer was full (wraps around).
    ///
    /// # Errors
    /// None is expected.
    pub fn receive_overruns(&self) -> Result<u32, DeviceError> {
        sys::receive_overruns(self.fd.as_fd()).context(|| "read the statistics of a UDP socket".into())
    }

    /// Sends up to [`MAX_MESSAGES`] trains, each as one message.
    fn send_trains(&mut self, trains: &[SendTrain<'_>], outcome: &mut SendOutcome) {
        let Self { fd, gso, refusals, outgoing, .. } = self;
        let messages = trains.iter().map(|train| Message {
            to: Some(SocketAddress::inet(train.to.remote)),
            head: Head::EMPTY,
            body: Body::Whole(train.bytes),
            source: train.to.local,
            segment_size: gso_size(train),
        });
        let mut reported = 0;
        outgoing.send(fd.as_fd(), messages, |i, result| {
            let train = &trains[i];
            reported = i + 1;
            match result {
                Ok(()) => {
                    if train.datagrams() > 1 {
                        refusals.end();
                    }
                    outcome.sent += train.datagrams();
                }
                Err(error) if sys::would_block(&error) => {
                    outcome.lose(train.datagrams(), error);
                    return AfterError::Stop;
                }
                Err(error) if train.datagrams() > 1 && refuses_trains(&error) => {
                    if send_apart(fd.as_fd(), train, outcome) && !is_gone(train.to, outcome) {
                        let errno = error.raw_os_error();
                        *gso &= beyond_limits(train) || !refusals.are_for_good(errno, *train.to.remote.ip());
                        outcome.error.get_or_insert(error);
                    }
                }
                Err(error) => send_again(fd.as_fd(), train, error, outcome),
            }
            AfterError::Skip
        });
        outcome.dropped += trains[reported..].iter().map(SendTrain::datagrams).sum::<usize>();
    }

    /// Sends trains without GSO: each datagram as a message.
    fn send_datagrams(&mut self, trains: &[SendTrain<'_>], outcome: &mut SendOutcome) {
        let fd = self.fd.as_fd();
        let apart = trains.iter().flat_map(|train| datagrams(train).map(move |bytes| (train.to, bytes)));
        let mut unreported = apart.clone();
        let mut messages = apart.map(|(to, bytes)| Message {
            to: Some(SocketAddress::inet(to.remote)),
            head: Head::EMPTY,
            body: Body::Whole(bytes),
            source: to.local,
            segment_size: 0,
        });
        let mut full = false;
        loop {
            let mut reported = 0;
            let taken = self.outgoing.send(fd, messages.by_ref(), |_, result| {
                reported += 1;
                match (result, unreported.next()) {
                    (Err(error), Some((to, bytes))) if !sys::would_block(&error) => {
                        send_again(fd, &SendTrain { to, bytes, segment_size: 0 }, error, outcome);
                    }
                    (Err(error), _) => {
                        full = true;
                        outcome.lose(1, error);
                    }
                    (Ok(()), _) => outcome.sent += 1,
                }
                if full { AfterError::Stop } else { AfterError::Skip }
            });
            outcome.dropped += taken - reported;
            if full {
                outcome.dropped += messages.count();
                return;
            }
            if taken < MAX_MESSAGES {
                return;
            }
        }
    }
}

impl Transport for UdpTransport {
    fn overruns(&self) -> u32 {
        self.receive_overruns().unwrap_or(0)
    }

    fn is_half_full(&self) -> bool {
        sys::is_half_full(self.fd.as_fd()).unwrap_or(false)
    }

    fn receive(
        &mut self,
        arena: &mut Arena,
        slots: &[Slot],
        trains: &mut Vec<ReceivedTrain>,
    ) -> io::Result<usize> {
        let received = match self.incoming.receive(self.fd.as_fd(), arena, slots) {
            Ok(received) => received,
            Err(error) if sys::would_block(&error) => return Ok(0),
            Err(error) => return Err(error),
        };
        trains.extend(slots.iter().take(received).enumerate().filter_map(|(i, slot)| {
            let len = self.incoming.len(i);
            // Always an IPv4 address: the socket is AF_INET.
            let remote = self.incoming.from(i).to_inet()?;
            let from = Path { remote, local: self.incoming.local(i) };
            let segment_size = self.incoming.gro_segment_size(i).unwrap_or(len).min(len);
            let ecn = self.incoming.tos(i).map_or(Ecn::NotEct, Ecn::of_tos);
            Some(ReceivedTrain {
                span: Span::new(slot.buffer, slot.start..slot.start + len),
                segment_size,
                from,
                ecn,
            })
        }));
        Ok(received)
    }

    fn send(&mut self, trains: &[SendTrain<'_>]) -> SendOutcome {
        let mut outcome = SendOutcome::default();
        for batch in trains.chunks(MAX_MESSAGES) {
            let are_single = batch.iter().all(|train| train.datagrams() == 1);
            if are_single || (self.gso && !self.refusals.rest()) {
                self.send_trains(batch, &mut outcome);
            } else {
                self.send_datagrams(batch, &mut outcome);
            }
        }
        outcome
    }

    fn gso(&self) -> bool {
        self.gso && self.refusals.rest.is_none()
    }

    fn gro(&self) -> bool {
        self.gro
    }
}

impl AsFd for UdpTransport {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for UdpTransport {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// Whether the kernel refuses the train, but perhaps not its datagrams (`udp_send_skb` in net/ipv4/udp.c): `EIO` where
/// the device or a transformation cannot do it, `EINVAL` on kernels with stricter rules, and `EMSGSIZE` where a
/// datagram is beyond the MTU, since a train cannot be fragmented.
fn refuses_trains(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL | libc::EMSGSIZE))
}

/// How trains were refused lately, with `EIO` or `EINVAL`.
///
/// One of these alone says little. Kernels before 6.14 mean the MTU of a route by `EINVAL`; `EIO` may be about one
/// route's IPsec policy, or about the one of several devices that makes no checksums. Peers behind such a route, even
/// if they are alone for a while, must not cost all the others their trains for good.
#[derive(Default)]
struct Refusals {
    /// How many the kernel has refused since it took one.
    in_a_row: u32,
    /// Towards whom. At most [`Self::ENOUGH`]; a train that is taken clears them.
    destinations: Vec<Ipv4Addr>,
    /// While no trains are tried: how many more batches go out without.
    rest: Option<u32>,
}

impl Refusals {
    /// So many destinations, and the kernel takes no trains at all. So many in a row, be it towards one (a client has
    /// no more), and then `EIO`, and trains rest: to have each refused costs more than to send it datagram by datagram.
    const ENOUGH: u32 = 64;
    /// How many batches go out without trains before they are tried again: some seconds' worth of a busy gateway.
    const REST: u32 = 16_384;

    /// A train was taken.
    fn end(&mut self) {
        self.in_a_row = 0;
        self.destinations.clear();
        self.rest = None;
    }

    /// Whether the next batch goes out without trains.
    fn rest(&mut self) -> bool {
        match &mut self.rest {
            None | Some(0) => false,
            Some(batches) => {
                *batches -= 1;
                true
            }
        }
    }

    /// Whether, after one more refusal, none should be tried any more.
    fn are_for_good(&mut self, errno: Option<i32>, to: Ipv4Addr) -> bool {
        if !matches!(errno, Some(libc::EIO | libc::EINVAL)) {
            return false;
        }
        self.in_a_row = self.in_a_row.saturating_add(1);
        if self.in_a_row >= Self::ENOUGH && errno == Some(libc::EIO) {
            self.rest = Some(Self::REST);
        } else if self.rest == Some(0) {
            self.rest = None; // tried again, and refused for another reason
        }
        if !self.destinations.contains(&to) {
            self.destinations.push(to);
        }
        self.destinations.len() >= Self::ENOUGH as usize
    }
}

/// Whether the caller, not the kernel, is to blame for a refusal.
fn beyond_limits(train: &SendTrain<'_>) -> bool {
    train.datagrams() > MAX_TRAIN_SEGMENTS || train.bytes.len() > MAX_TRAIN_BYTES
}

/// Sends a refused train datagram by datagram, at its place between the others. Returns whether any was taken.
fn send_apart(fd: BorrowedFd<'_>, train: &SendTrain<'_>, outcome: &mut SendOutcome) -> bool {
    let sent_before = outcome.sent;
    let to = SocketAddress::inet(train.to.remote);
    for bytes in datagrams(train) {
        match send_one(fd, &to, train.to.local, bytes, 0) {
            Ok(()) => outcome.sent += 1,
            Err(error) => {
                send_again(fd, &SendTrain { bytes, segment_size: 0, ..*train }, error, outcome);
            }
        }
    }
    outcome.sent > sent_before
}

/// Sends what was refused from another address, if that may be why: the host does not have its own any more, or no way
/// leads from there. (`ip_route_output_key_hash_rcu` in net/ipv4/route.c: `EINVAL`, on Linux 6.18 `ENETUNREACH`.) Any
/// other refusal is final.
fn send_again(fd: BorrowedFd<'_>, train: &SendTrain<'_>, error: io::Error, outcome: &mut SendOutcome) {
    let may_be_gone =
        train.to.local.is_some() && matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENETUNREACH));
    let to = SocketAddress::inet(train.to.remote);
    if may_be_gone && send_one(fd, &to, None, train.bytes, gso_size(train)).is_ok() {
        outcome.gone = train.to.local;
        outcome.sent += train.datagrams();
    } else {
        outcome.lose(train.datagrams(), error);
    }
}

/// The train's `UDP_SEGMENT`; 0 for a single datagram.
fn gso_size(train: &SendTrain<'_>) -> u16 {
    if train.datagrams() > 1 { train.segment_size.try_into().unwrap_or(0) } else { 0 }
}

/// Whether the host was found not to have the path's local address.
fn is_gone(path: Path, outcome: &SendOutcome) -> bool {
    path.local.is_some() && path.local == outcome.gone
}

fn datagrams<'a>(train: &SendTrain<'a>) -> impl Iterator<Item = &'a [u8]> + Clone + use<'a> {
    let size = if train.segment_size == 0 { train.bytes.len() } else { train.segment_size };
    // An empty train is one empty datagram, which `chunks` would not yield.
    let empty = train.bytes.is_empty().then_some(train.bytes);
    empty.into_iter().chain(train.bytes.chunks(size.max(1)))
}

/// Which socket of the group gets a datagram. The program sees the UDP payload from offset 0 (`run_bpf_filter` in
/// net/core/sock_reuseport.c pulls the UDP header off); what is too short for a load goes to 0.
///
/// Message layouts: WireGuard whitepaper §5.4.2 to §5.4.7. Indices are little-endian, so the byte at the field's
/// offset is the lowest.
fn receiver_index_program(shards: u8) -> Result<Vec<Instruction>, AssemblyError> {
    const RESPONSE: u32 = 2;
    const COOKIE_REPLY: u32 = 3;
    const DATA: u32 = 4;
    let mut program = Assembler::new();
    let (response, at_four, steer) = (program.label(), program.label(), program.label());
    program.load_byte(0);
    program.jump_if(Test::Equal(DATA), at_four);
    program.jump_if(Test::Equal(COOKIE_REPLY), at_four);
    program.jump_if(Test::Equal(RESPONSE), response);
    program.give(0);
    program.place(response);
    program.load_byte(8); // a response names its sender first
    program.jump(steer);
    program.place(at_four);
    program.load_byte(4);
    program.place(steer);
    program.modulo(u32::from(shards));
    program.give_a();
    program.assemble()
}

#[cfg(test)]
mod tests;
