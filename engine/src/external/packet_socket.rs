//! The external interface's packets: an AF_PACKET socket per shard (packet(7)).
//!
//! Theory of operation. The kernel hands the socket a copy of each frame that passes the filter: IPv4 for this host,
//! to one of our addresses, to a port that may be the NAT's ([`FilterRules`]). Frames that the card or the kernel has
//! merged (GRO) stay whole, up to 64 KiB, and the virtio-net header before each (`PACKET_VNET_HDR`) says how to split
//! them and whether the checksum is still to be made. On the way out the same header lets superpackets stay whole down
//! to the driver.
//!
//! The socket is born deaf: first a filter that drops everything, then bound, then made a member of its *fanout*, in
//! which a program picks the shard by port, and only then does [`PacketSocket::set_filter`] let packets in. So nothing
//! is queued that was not asked for, and nothing reaches the wrong shard while there are only some of them.
//!
//! A frame of a kind of offload that a virtio-net header cannot express is lost, and the kernel says `EINVAL`. If
//! others came before it in one recvmmsg(2), that is said by the next call on the socket, be it to receive or to send:
//! so the first `EINVAL` to something that is sent is not believed.
//!
//! AF_PACKET rather than raw sockets: a firewall's INPUT policy blinds raw sockets, raw sockets deliver reassembled
//! datagrams without offload metadata, and raw sends above the MTU fail.

use std::io::{self, IoSlice};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use libc::c_int;

use super::{ETHERTYPE_IPV4, LINK_HEADER_LEN, MAX_ADDRESSES, MacAddress, PACKET_HOST, require_address};
use crate::arena::{Arena, Slot, Span};
use crate::bpf::{Assembler, AssemblyError, DROP, DROP_ALL, Instruction, KEEP, Test};
use crate::intake::Arrival;
use crate::sys::batch::{AfterError, Body, Head, MAX_MESSAGES, Message, ReceiveBatch, SendBatch};
use crate::sys::{self, Buffer, Context, DeviceError, SocketAddress};
use crate::wire::{VirtioNetHeader, protocol};

pub use crate::sys::SendOutcome;

// linux/if_packet.h
pub(super) const PACKET_IGNORE_OUTGOING: c_int = 23;
const PACKET_STATISTICS: c_int = 6;
const PACKET_VNET_HDR: c_int = 15;
const PACKET_FANOUT: c_int = 18;
const PACKET_FANOUT_DATA: c_int = 22;
const PACKET_FANOUT_CBPF: u32 = 6;
const PACKET_FANOUT_FLAG_UNIQUEID: u32 = 0x2000;

/// Where the IPv4 packet begins in a received buffer: behind virtio-net and Ethernet header.
const PACKET_OFFSET: usize = VirtioNetHeader::SIZE + LINK_HEADER_LEN as usize;

/// Bytes of the kernel's buffers: some 60 superpackets.
const SOCKET_BUFFER: usize = 8 * 1024 * 1024;

/// How often one call tries to get past frames that the kernel cannot describe.
const MAX_UNDESCRIBABLE: usize = 8;

/// More would make the filter's jumps too long.
pub const MAX_OTHER_PROTOCOLS: usize = 32;

/// Which frames the kernel hands over: everything that may be the NAT's, and nothing else.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FilterRules {
    /// Our external addresses, at most [`MAX_ADDRESSES`].
    pub addresses: Vec<Ipv4Addr>,
    /// Destination ports of TCP and UDP that may be the NAT's.
    pub ports: RangeInclusive<u16>,
    /// Other protocols to let through, whose packets have no ports: at most [`MAX_OTHER_PROTOCOLS`].
    pub other_protocols: Vec<u8>,
    /// Where the gateway itself listens for WireGuard, on all addresses if it is the unspecified one: these datagrams
    /// arrive through the transport.
    pub except_udp: Option<SocketAddrV4>,
}

/// An AF_PACKET socket on the external interface.
pub struct PacketSocket {
    fd: OwnedFd,
    ifindex: u32,
    source_mac: MacAddress,
    incoming: ReceiveBatch,
    outgoing: SendBatch,
    undescribable: u64,
}

/// A received frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Frame {
    /// The IPv4 packet, without link header (Ethernet padding may follow it).
    pub span: Span,
    /// Its offload metadata, counted from the IPv4 header's first byte.
    pub header: VirtioNetHeader,
    /// The neighbour that sent it.
    pub source_mac: MacAddress,
}

impl Arrival for Frame {
    fn span(&self) -> Span {
        self.span
    }

    fn moved_to(self, span: Span) -> Self {
        Self { span, ..self }
    }

    fn packets(&self) -> u64 {
        1
    }

    fn segments(&self) -> usize {
        // As if its headers were split, too: what the kernel says of their length is no more than a hint.
        self.header.segment_count(self.span.len as usize)
    }
}

/// A frame to be sent.
#[derive(Clone, Copy, Debug)]
pub struct SendFrame<'a> {
    /// The next hop.
    pub destination_mac: MacAddress,
    /// Offload metadata as of `VirtioNetHeader::for_shape(shape, LINK_HEADER_LEN)`.
    pub header: VirtioNetHeader,
    /// The IPv4 packet, in at most [`sys::MAX_SLICES`] - 1 pieces.
    pub slices: &'a [IoSlice<'a>],
}

impl SendFrame<'_> {
    /// How many packets it stands for.
    fn packets(&self) -> usize {
        let len = self.slices.iter().map(|slice| slice.len()).sum::<usize>() + usize::from(LINK_HEADER_LEN);
        self.header.segment_count(len.saturating_sub(self.header.headers_len()))
    }
}

/// What the kernel counted since the last time it was asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PacketStatistics {
    /// Frames that passed the filter.
    pub passed: u32,
    /// Those of them that were discarded because the receive buffer was full.
    pub overruns: u32,
}

impl PacketSocket {
    /// Opens a deaf socket on the interface `ifindex`, whose link address is `source_mac`.
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_RAW`, `ENODEV` without the interface.
    pub fn open(ifindex: u32, source_mac: MacAddress) -> Result<Self, DeviceError> {
        let fd = open_deaf(ifindex, ETHERTYPE_IPV4)?;
        sys::set_option(fd.as_fd(), libc::SOL_PACKET, PACKET_VNET_HDR, 1u32)
            .context(|| format!("get offload metadata on interface {}", sys::interface_name(ifindex)))?;
        for direction in [Buffer::Receive, Buffer::Send] {
            sys::set_buffer(fd.as_fd(), direction, SOCKET_BUFFER).context(|| {
                format!("size the buffers of the packet socket on interface {}", sys::interface_name(ifindex))
            })?;
        }
        Ok(Self {
            fd,
            ifindex,
            source_mac,
            incoming: ReceiveBatch::new(),
            outgoing: SendBatch::new(),
            undescribable: 0,
        })
    }

    /// Shares the interface's packets among `shards` sockets: the destination port of TCP and UDP, or the identifier of
    /// an ICMP query's answer, modulo `shards` picks the socket; fragments and ICMP errors go to shard 0.
    ///
    /// The first socket founds the group (`None`) and gets its number, with which the others join it. They number
    /// themselves in the order of joining (after a link flap, of opening), so open and join in the order of the shards,
    /// and [`Self::set_filter`] only then.
    ///
    /// # Errors
    /// `EINVAL` if the sockets are not of one interface, or `shards` is 0.
    pub fn join_fanout(&self, group: Option<u16>, shards: u8) -> Result<u16, DeviceError> {
        let socket = self.fd.as_fd();
        let what = || format!("join the fanout of interface {}", sys::interface_name(self.ifindex));
        let program = fanout_program(shards).map_err(io::Error::from).context(what)?;
        let flags = if group.is_some() { 0 } else { PACKET_FANOUT_FLAG_UNIQUEID };
        let argument = u32::from(group.unwrap_or(0)) | (PACKET_FANOUT_CBPF | flags) << 16;
        sys::set_option(socket, libc::SOL_PACKET, PACKET_FANOUT, argument).context(what)?;
        if let Some(group) = group {
            return Ok(group);
        }
        sys::attach_program(socket, libc::SOL_PACKET, PACKET_FANOUT_DATA, &program).context(what)?;
        let joined = sys::get_option(socket, libc::SOL_PACKET, PACKET_FANOUT, 0u32).context(what)?;
        Ok(joined as u16) // the group's number is in the low half
    }

    /// Starts receiving: from now on, frames that fit `rules` are received. May be called again, at any time.
    ///
    /// # Errors
    /// `InvalidInput` for more than [`MAX_ADDRESSES`] addresses.
    pub fn set_filter(&self, rules: &FilterRules) -> Result<(), DeviceError> {
        let program = if rules.addresses.len() <= MAX_ADDRESSES {
            filter_program(rules).map_err(io::Error::from)
        } else {
            Err(io::Error::new(io::ErrorKind::InvalidInput, "too many external addresses"))
        };
        program
            .and_then(|program| {
                sys::attach_program(self.fd.as_fd(), libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)
            })
            .context(|| format!("set the packet filter of interface {}", sys::interface_name(self.ifindex)))
    }

    /// The interface's link address changed.
    pub fn set_source_mac(&mut self, mac: MacAddress) {
        self.source_mac = mac;
    }

    /// Receives what is there, one frame into each of the arena's `slots`, without waiting.
    ///
    /// Appends to `frames` and returns how many.
    ///
    /// # Errors
    /// `ENETDOWN`, once, when the interface went down; what else the kernel says.
    pub fn receive(
        &mut self,
        arena: &mut Arena,
        slots: &[Slot],
        frames: &mut Vec<Frame>,
    ) -> io::Result<usize> {
        let before = frames.len();
        for _ in 0..MAX_UNDESCRIBABLE {
            match self.incoming.receive(self.fd.as_fd(), arena, slots) {
                Ok(received) => {
                    for (i, &slot) in slots.iter().take(received).enumerate() {
                        let bytes = arena.slot_mut(slot).get(..self.incoming.len(i)).unwrap_or_default();
                        match parse_frame(bytes, slot) {
                            Some(frame) if !self.incoming.truncated(i) => frames.push(frame),
                            _ => self.undescribable += 1,
                        }
                    }
                    return Ok(frames.len() - before);
                }
                Err(error) if sys::would_block(&error) => return Ok(0),
                Err(error) if is_invalid(&error) => self.undescribable += 1,
                Err(error) => return Err(error),
            }
        }
        Ok(0)
    }

    /// Sends frames in their order, without waiting: what the kernel has no room for is dropped and counted.
    ///
    /// A superpacket that the kernel does not take as such is neither sent nor dropped: its index is appended to
    /// `refused`, for the caller to split it and send the segments.
    pub fn send(&mut self, frames: &[SendFrame<'_>], refused: &mut Vec<usize>) -> SendOutcome {
        let mut outcome = SendOutcome::default();
        let Self { fd, outgoing, source_mac, undescribable, .. } = self;
        let (mut full, mut doubted) = (false, None);
        for (n, batch) in frames.chunks(MAX_MESSAGES).enumerate() {
            let mut reported = 0;
            let messages = batch.iter().map(|frame| Message {
                to: None,
                head: frame_head(frame, *source_mac),
                body: Body::Gather(frame.slices),
                source: None,
                segment_size: 0,
            });
            outgoing.send(fd.as_fd(), messages, |i, result| {
                reported = i + 1;
                let index = n * MAX_MESSAGES + i;
                match result {
                    Ok(()) => {
                        outcome.sent += 1;
                        // What was said about this one was about a frame that had been received.
                        *undescribable += u64::from(doubted == Some(index));
                    }
                    Err(error) if is_invalid(&error) && doubted.is_none() => {
                        doubted = Some(index);
                        return AfterError::Again;
                    }
                    Err(error) if is_invalid(&error) && is_superpacket(&batch[i]) => refused.push(index),
                    Err(error) => {
                        full = sys::would_block(&error);
                        outcome.lose(batch[i].packets(), error);
                    }
                }
                if full { AfterError::Stop } else { AfterError::Skip }
            });
            let unreported = if full { &frames[n * MAX_MESSAGES + reported..] } else { &batch[reported..] };
            outcome.dropped += unreported.iter().map(SendFrame::packets).sum::<usize>();
            if full {
                break;
            }
        }
        outcome
    }

    /// Whether what waits fills more than half of the kernel's buffer; false where the kernel does not tell.
    pub fn is_half_full(&self) -> bool {
        sys::is_half_full(self.fd.as_fd()).unwrap_or(false)
    }

    /// What the kernel counted since the last call.
    ///
    /// # Errors
    /// None is expected.
    pub fn statistics(&self) -> Result<PacketStatistics, DeviceError> {
        // `struct tpacket_stats`
        let [passed, overruns] =
            sys::get_option(self.fd.as_fd(), libc::SOL_PACKET, PACKET_STATISTICS, [0u32; 2]).context(
                || format!("read the statistics of interface {}", sys::interface_name(self.ifindex)),
            )?;
        Ok(PacketStatistics { passed, overruns })
    }

    /// Frames lost since the last call because the kernel could not describe them, or because they were no whole
    /// frames.
    pub fn take_undescribable(&mut self) -> u64 {
        std::mem::take(&mut self.undescribable)
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for PacketSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// Opens a packet socket that drops everything until it gets another filter.
///
/// The protocol 0 keeps it unbound until the filter is there; our own packets are never looped back to us.
pub(super) fn open_deaf(ifindex: u32, ethertype: u16) -> Result<OwnedFd, DeviceError> {
    let fd = sys::socket(libc::AF_PACKET, libc::SOCK_RAW, 0)
        .context(|| format!("open a packet socket on interface {}", sys::interface_name(ifindex)))?;
    let socket = fd.as_fd();
    sys::attach_program(socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &DROP_ALL)
        .and_then(|()| sys::set_option(socket, libc::SOL_PACKET, PACKET_IGNORE_OUTGOING, 1u32))
        .and_then(|()| sys::bind(socket, &SocketAddress::link(ethertype, ifindex)))
        .context(|| format!("bind a packet socket to interface {}", sys::interface_name(ifindex)))?;
    Ok(fd)
}

/// Takes a received buffer apart; `None` if it is shorter than its headers.
fn parse_frame(bytes: &[u8], slot: Slot) -> Option<Frame> {
    let (header, rest) = bytes.split_first_chunk::<{ VirtioNetHeader::SIZE }>()?;
    let (link_header, _) = rest.split_first_chunk::<{ LINK_HEADER_LEN as usize }>()?;
    let mut source_mac = [0; 6];
    source_mac.copy_from_slice(&link_header[6..12]);
    let mut header = *header;
    for at in [2, 6] {
        // hdr_len, csum_start
        let from_frame = u16::from_ne_bytes([header[at], header[at + 1]]);
        header[at..at + 2].copy_from_slice(&from_frame.saturating_sub(LINK_HEADER_LEN).to_ne_bytes());
    }
    Some(Frame {
        span: Span::new(slot.buffer, slot.start + PACKET_OFFSET..slot.start + bytes.len()),
        header: VirtioNetHeader::from_bytes(header),
        source_mac,
    })
}

fn frame_head(frame: &SendFrame<'_>, source_mac: MacAddress) -> Head {
    let mut head = Head::EMPTY;
    head.push(&frame.header.to_bytes());
    head.push(&frame.destination_mac);
    head.push(&source_mac);
    head.push(&ETHERTYPE_IPV4.to_be_bytes());
    head
}

fn is_invalid(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EINVAL)
}

fn is_superpacket(frame: &SendFrame<'_>) -> bool {
    frame.header.offload().is_some_and(|offload| offload.gso.is_some())
}

/// Fields of the IPv4 header (RFC 791 §3.1), from its first byte.
mod ip {
    pub(super) const FRAGMENT: u32 = 6;
    /// More Fragments, and the offset.
    pub(super) const FRAGMENT_BITS: u32 = 0x3fff;
    pub(super) const PROTOCOL: u32 = 9;
    pub(super) const DESTINATION: u32 = 16;
}

/// ICMP types that the NAT translates (RFC 792; `message` in nat/icmp.rs).
const ICMP_REPLIES: [u32; 2] = [0, 14]; // echo reply, timestamp reply
const ICMP_ERRORS: [u32; 3] = [3, 11, 12]; // destination unreachable, time exceeded, parameter problem

/// Destination port of TCP and UDP, from the transport header's first byte.
const DESTINATION_PORT: u32 = 2;

/// The filter sees the frame from the link header on.
fn filter_program(rules: &FilterRules) -> Result<Vec<Instruction>, AssemblyError> {
    const LINK: u32 = LINK_HEADER_LEN as u32;
    let mut program = Assembler::new();
    let (keep, drop) = (program.label(), program.label());
    let (udp, icmp, port) = (program.label(), program.label(), program.label());

    program.load_half(LINK - 2);
    program.jump_unless(Test::Equal(u32::from(ETHERTYPE_IPV4)), drop);
    program.load_packet_type();
    program.jump_unless(Test::Equal(PACKET_HOST), drop);
    require_address(&mut program, LINK + ip::DESTINATION, &rules.addresses, drop);

    // Only the first fragment has ports, so all of them are let in and sorted after reassembly.
    program.load_half(LINK + ip::FRAGMENT);
    program.jump_if(Test::AnyBit(ip::FRAGMENT_BITS), keep);
    program.load_header_length_into_x(LINK);
    program.load_byte(LINK + ip::PROTOCOL);
    program.jump_if(Test::Equal(u32::from(protocol::TCP)), port);
    program.jump_if(Test::Equal(u32::from(protocol::UDP)), udp);
    program.jump_if(Test::Equal(u32::from(protocol::ICMP)), icmp);
    for &other in &rules.other_protocols {
        program.jump_if(Test::Equal(u32::from(other)), keep);
    }
    program.jump(drop);

    program.place(icmp);
    program.load_byte_beyond_x(LINK);
    for kind in ICMP_REPLIES.into_iter().chain(ICMP_ERRORS) {
        program.jump_if(Test::Equal(kind), keep);
    }
    program.jump(drop);

    program.place(udp);
    if let Some(own) = rules.except_udp {
        if !own.ip().is_unspecified() {
            program.load_word(LINK + ip::DESTINATION);
            program.jump_unless(Test::Equal(u32::from(*own.ip())), port);
        }
        program.load_half_beyond_x(LINK + DESTINATION_PORT);
        program.jump_if(Test::Equal(u32::from(own.port())), drop);
    }
    program.place(port);
    program.load_half_beyond_x(LINK + DESTINATION_PORT);
    program.jump_unless(Test::AtLeast(u32::from(*rules.ports.start())), drop);
    program.jump_if(Test::AtLeast(u32::from(*rules.ports.end()) + 1), drop);

    program.place(keep);
    program.give(KEEP);
    program.place(drop);
    program.give(DROP);
    program.assemble()
}

/// Which socket of the fanout gets a frame. The program sees the packet from the *network* header on
/// (`fanout_demux_bpf` in net/packet/af_packet.c runs before the link header is put back).
fn fanout_program(shards: u8) -> Result<Vec<Instruction>, AssemblyError> {
    const IDENTIFIER: u32 = 4; // of an ICMP query, RFC 792
    let mut program = Assembler::new();
    let (ports, reply, first, steer) = (program.label(), program.label(), program.label(), program.label());
    program.load_half(ip::FRAGMENT);
    program.jump_if(Test::AnyBit(ip::FRAGMENT_BITS), first);
    program.load_header_length_into_x(0);
    program.load_byte(ip::PROTOCOL);
    program.jump_if(Test::Equal(u32::from(protocol::TCP)), ports);
    program.jump_if(Test::Equal(u32::from(protocol::UDP)), ports);
    program.jump_unless(Test::Equal(u32::from(protocol::ICMP)), first);
    program.load_byte_beyond_x(0);
    for kind in ICMP_REPLIES {
        program.jump_if(Test::Equal(kind), reply);
    }
    program.jump(first);
    program.place(reply);
    program.load_half_beyond_x(IDENTIFIER);
    program.jump(steer);
    program.place(ports);
    program.load_half_beyond_x(DESTINATION_PORT);
    program.place(steer);
    program.modulo(u32::from(shards));
    program.give_a();
    program.place(first);
    program.give(0);
    program.assemble()
}

#[cfg(test)]
mod tests;
