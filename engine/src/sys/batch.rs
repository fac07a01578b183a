//! Many datagrams a call: recvmmsg(2) and sendmmsg(2) with storage that is allocated once.

use std::io;
use std::mem;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::{c_int, c_void};

use super::{MAX_SLICES, SocketAddress, check, vector};
use crate::arena::{Arena, Slot};

/// The most messages that one call receives or sends.
pub(crate) const MAX_MESSAGES: usize = 64;

/// Bytes before the body of a message that the caller writes: virtio-net and Ethernet header.
pub(crate) const MAX_HEAD: usize = 24;

/// `SOL_UDP` of linux/socket.h.
pub(crate) const SOL_UDP: c_int = 17;

/// Ancillary data of one message, aligned as `struct cmsghdr` wants it.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; CONTROL_SIZE]);

/// Room for `UDP_SEGMENT`, or `UDP_GRO`, for `IP_PKTINFO` and for `IP_TOS`, which is one byte.
const CONTROL_SIZE: usize = 80;
const _: () = assert!(
    control_align(CONTROL_HEADER + 4)
        + control_align(CONTROL_HEADER + PACKET_INFO_SIZE)
        + control_align(CONTROL_HEADER + 1)
        <= CONTROL_SIZE
);
/// `struct in_pktinfo` of ip(7): the interface's index, then two addresses.
const PACKET_INFO_SIZE: usize = 12;
/// `struct cmsghdr` of the kernel: a `size_t` and two `int`s.
const CONTROL_HEADER: usize = mem::size_of::<usize>() + 8;
/// Ancillary data is aligned to the machine's word (`CMSG_ALIGN`).
const CONTROL_ALIGN: usize = mem::size_of::<usize>();

const fn control_align(len: usize) -> usize {
    len.div_ceil(CONTROL_ALIGN) * CONTROL_ALIGN
}

impl Control {
    const EMPTY: Self = Self([0; CONTROL_SIZE]);

    /// Writes how a message is to be sent, and returns how many bytes that are.
    fn describe(&mut self, segment_size: u16, source: Option<Ipv4Addr>) -> usize {
        let mut used = 0;
        if segment_size > 0 {
            used = self.push(used, SOL_UDP, libc::UDP_SEGMENT, &segment_size.to_ne_bytes());
        }
        if let Some(source) = source {
            // Any interface: which one is the route's affair, even if answers leave by another.
            let mut info = [0; PACKET_INFO_SIZE];
            info[SPEC_DST].copy_from_slice(&source.octets());
            used = self.push(used, libc::IPPROTO_IP, libc::IP_PKTINFO, &info);
        }
        used
    }

    /// Writes one `struct cmsghdr` and its data behind the `used` bytes, and returns how many are used then.
    fn push(&mut self, used: usize, level: c_int, kind: c_int, data: &[u8]) -> usize {
        let control = &mut self.0[used..];
        let len = CONTROL_HEADER + data.len();
        control[..CONTROL_ALIGN].copy_from_slice(&len.to_ne_bytes());
        control[CONTROL_ALIGN..CONTROL_ALIGN + 4].copy_from_slice(&level.to_ne_bytes());
        control[CONTROL_ALIGN + 4..CONTROL_HEADER].copy_from_slice(&kind.to_ne_bytes());
        control[CONTROL_HEADER..len].copy_from_slice(data);
        used + control_align(len)
    }
}

/// Where `ipi_spec_dst` lies in a `struct in_pktinfo`.
const SPEC_DST: std::ops::Range<usize> = 4..8;

/// Storage for recvmmsg(2).
pub(crate) struct ReceiveBatch {
    headers: Vec<libc::mmsghdr>,
    vectors: Vec<libc::iovec>,
    names: Vec<SocketAddress>,
    controls: Vec<Control>,
}

// SAFETY: the pointers inside point into the batch's own vectors, or (between calls: dangling, never read) to buffers
// of the last call.
unsafe impl Send for ReceiveBatch {}

impl ReceiveBatch {
    pub(crate) fn new() -> Self {
        Self {
            headers: vec![EMPTY_HEADER; MAX_MESSAGES],
            vectors: vec![EMPTY_VECTOR; MAX_MESSAGES],
            names: vec![SocketAddress::EMPTY; MAX_MESSAGES],
            controls: vec![Control::EMPTY; MAX_MESSAGES],
        }
    }

    /// Receives as many messages as there are, one into each of the arena's `slots`, and at most [`MAX_MESSAGES`].
    pub(crate) fn receive(
        &mut self,
        fd: BorrowedFd<'_>,
        arena: &mut Arena,
        slots: &[Slot],
    ) -> io::Result<usize> {
        let count = slots.len().min(MAX_MESSAGES);
        for (i, &slot) in slots.iter().take(count).enumerate() {
            let room = arena.slot_mut(slot);
            self.vectors[i] =
                libc::iovec { iov_base: room.as_mut_ptr().cast::<c_void>(), iov_len: room.len() };
            let header = &mut self.headers[i].msg_hdr;
            header.msg_name = self.names[i].bytes.as_mut_ptr().cast::<c_void>();
            header.msg_namelen = SocketAddress::CAPACITY;
            header.msg_iov = &raw mut self.vectors[i];
            header.msg_iovlen = 1;
            header.msg_control = self.controls[i].0.as_mut_ptr().cast::<c_void>();
            header.msg_controllen = CONTROL_SIZE as _;
            header.msg_flags = 0;
        }
        // SAFETY: the first `count` headers were pointed above at buffers of the arena, names and controls that live
        // through the call, are exclusively borrowed, and have the lengths given. Should two slots overlap, the kernel
        // writes one after the other.
        let received = check(unsafe {
            libc::recvmmsg(
                fd.as_raw_fd(),
                self.headers.as_mut_ptr(),
                count as _,
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        })?;
        Ok((received as usize).min(count))
    }

    /// How many bytes the message had (at most the buffer's size).
    pub(crate) fn len(&self, message: usize) -> usize {
        self.headers[message].msg_len as usize
    }

    /// Whether the message did not fit into its buffer.
    pub(crate) fn truncated(&self, message: usize) -> bool {
        self.headers[message].msg_hdr.msg_flags & libc::MSG_TRUNC != 0
    }

    /// Where the message came from.
    pub(crate) fn from(&self, message: usize) -> SocketAddress {
        self.names[message]
    }

    /// The segment size that `UDP_GRO` reports, if the message is a train.
    pub(crate) fn gro_segment_size(&self, message: usize) -> Option<usize> {
        let data = find_control(self.control(message), SOL_UDP, libc::UDP_GRO)?;
        let size = c_int::from_ne_bytes(data.get(..4)?.try_into().ok()?);
        usize::try_from(size).ok().filter(|&size| size > 0)
    }

    /// From which of the host's addresses to answer, if `IP_PKTINFO` tells. That is `ipi_spec_dst`: the address to
    /// which the message was sent, or, if that was a broadcast (`ipi_addr` has it), the one that the kernel would
    /// answer it from.
    pub(crate) fn local(&self, message: usize) -> Option<Ipv4Addr> {
        packet_info_local(self.control(message))
    }

    /// The type-of-service byte with which the message came, if `IP_RECVTOS` is on.
    pub(crate) fn tos(&self, message: usize) -> Option<u8> {
        find_control(self.control(message), libc::IPPROTO_IP, libc::IP_TOS)?.first().copied()
    }

    /// The ancillary data of the message.
    fn control(&self, message: usize) -> &[u8] {
        let used = self.headers[message].msg_hdr.msg_controllen.min(CONTROL_SIZE);
        &self.controls[message].0[..used]
    }
}

fn packet_info_local(control: &[u8]) -> Option<Ipv4Addr> {
    let info = find_control(control, libc::IPPROTO_IP, libc::IP_PKTINFO)?;
    let octets: [u8; 4] = info.get(SPEC_DST)?.try_into().ok()?;
    Some(Ipv4Addr::from(octets)).filter(|local| !local.is_unspecified())
}

/// Finds ancillary data by its level and type (cmsg(3)).
fn find_control(mut bytes: &[u8], level: c_int, kind: c_int) -> Option<&[u8]> {
    while bytes.len() >= CONTROL_HEADER {
        let (header, _) = bytes.split_at(CONTROL_HEADER);
        let (len, ids) = header.split_at(CONTROL_ALIGN);
        let len = usize::from_ne_bytes(len.try_into().ok()?);
        let data = bytes.get(CONTROL_HEADER..len)?;
        let id = |at: usize| ids.get(at..at + 4)?.try_into().ok().map(c_int::from_ne_bytes);
        if id(0) == Some(level) && id(4) == Some(kind) {
            return Some(data);
        }
        bytes = bytes.get(control_align(len)..)?;
    }
    None
}

/// One message to send.
pub(crate) struct Message<'a> {
    /// Where to; `None` on a socket that is bound to its interface.
    pub(crate) to: Option<SocketAddress>,
    /// What goes before the body.
    pub(crate) head: Head,
    /// The body.
    pub(crate) body: Body<'a>,
    /// `IP_PKTINFO`: the address that it leaves from; `None`: the socket's, or what the route says.
    pub(crate) source: Option<Ipv4Addr>,
    /// `UDP_SEGMENT`: the kernel splits the body into datagrams of this size. Zero: it does not.
    pub(crate) segment_size: u16,
}

/// Up to [`MAX_HEAD`] bytes.
#[derive(Clone, Copy)]
pub(crate) struct Head {
    bytes: [u8; MAX_HEAD],
    len: usize,
}

impl Head {
    pub(crate) const EMPTY: Self = Self { bytes: [0; MAX_HEAD], len: 0 };

    /// Appends; what does not fit is cut off (the callers' headers have constant sizes).
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        for (slot, byte) in self.bytes[self.len..].iter_mut().zip(bytes) {
            *slot = *byte;
            self.len += 1;
        }
    }
}

/// The bytes of a message.
#[derive(Clone, Copy)]
pub(crate) enum Body<'a> {
    Whole(&'a [u8]),
    Gather(&'a [io::IoSlice<'a>]),
}

/// What to do after the kernel refused a message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum AfterError {
    /// Go on with the next message.
    Skip,
    /// Try this one again. Not for ever: who says so counts.
    Again,
    /// Leave the rest.
    Stop,
}

/// Storage for sendmmsg(2).
pub(crate) struct SendBatch {
    headers: Vec<libc::mmsghdr>,
    vectors: Vec<libc::iovec>,
    names: Vec<SocketAddress>,
    controls: Vec<Control>,
    heads: Vec<Head>,
    ends: Vec<usize>,
}

// SAFETY: as of `ReceiveBatch`.
unsafe impl Send for SendBatch {}

impl SendBatch {
    pub(crate) fn new() -> Self {
        Self {
            headers: vec![EMPTY_HEADER; MAX_MESSAGES],
            vectors: Vec::with_capacity(MAX_MESSAGES * 4),
            names: vec![SocketAddress::EMPTY; MAX_MESSAGES],
            controls: vec![Control::EMPTY; MAX_MESSAGES],
            heads: vec![Head::EMPTY; MAX_MESSAGES],
            ends: Vec::with_capacity(MAX_MESSAGES),
        }
    }

    /// Sends the next [`MAX_MESSAGES`] messages without waiting, and returns how many it took from the iterator.
    ///
    /// `report` hears of each message, by its index and in order, whether the kernel took it; after it answered
    /// [`AfterError::Stop`] to a refusal, the rest is left and not reported, after [`AfterError::Again`] it hears of
    /// the same message once more.
    pub(crate) fn send<'a>(
        &mut self,
        fd: BorrowedFd<'_>,
        messages: impl Iterator<Item = Message<'a>>,
        mut report: impl FnMut(usize, io::Result<()>) -> AfterError,
    ) -> usize {
        self.vectors.clear();
        self.ends.clear();
        for (i, message) in messages.take(MAX_MESSAGES).enumerate() {
            self.prepare(i, &message);
        }
        let count = self.ends.len();
        self.point();

        let mut next = 0;
        while next < count {
            let rest = &mut self.headers[next..count];
            // SAFETY: `prepare` and `point` aimed the headers at names, vectors, heads and controls of `self`, none
            // of which moves before the call returns, and at bodies that `messages` borrows for `'a`; the kernel
            // reads them only.
            let result = check(unsafe {
                libc::sendmmsg(fd.as_raw_fd(), rest.as_mut_ptr(), rest.len() as _, libc::MSG_DONTWAIT as _)
            });
            match result {
                Ok(taken) => {
                    let end = (next + (taken as usize).max(1)).min(count);
                    for i in next..end {
                        report(i, Ok(()));
                    }
                    next = end;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => match report(next, Err(error)) {
                    AfterError::Skip => next += 1,
                    AfterError::Again => {}
                    AfterError::Stop => break,
                },
            }
        }
        count
    }

    /// Copies what is small of the message, and notes its slices.
    fn prepare(&mut self, i: usize, message: &Message<'_>) {
        self.heads[i] = message.head;
        if message.head.len > 0 {
            self.vectors.push(EMPTY_VECTOR); // aimed at the head in `point`
        }
        match message.body {
            Body::Whole(bytes) => self.vectors.push(vector(bytes)),
            // One more than the kernel takes is enough for it to refuse the message, instead of cutting it.
            Body::Gather(slices) => {
                self.vectors.extend(slices.iter().take(MAX_SLICES + 1).map(|slice| vector(slice)))
            }
        }
        self.ends.push(self.vectors.len());
        let header = &mut self.headers[i].msg_hdr;
        header.msg_namelen = message.to.map_or(0, |to| to.len);
        self.names[i] = message.to.unwrap_or(SocketAddress::EMPTY);
        header.msg_controllen = self.controls[i].describe(message.segment_size, message.source) as _;
    }

    /// Aims the pointers, now that nothing moves any more.
    fn point(&mut self) {
        let mut start = 0;
        for (i, &end) in self.ends.iter().enumerate() {
            if self.heads[i].len > 0 {
                let head = &self.heads[i];
                self.vectors[start] = vector(&head.bytes[..head.len]);
            }
            let header = &mut self.headers[i].msg_hdr;
            header.msg_iov = self.vectors[start..end].as_mut_ptr();
            header.msg_iovlen = (end - start) as _;
            header.msg_name = if header.msg_namelen == 0 {
                std::ptr::null_mut()
            } else {
                self.names[i].bytes.as_mut_ptr().cast::<c_void>()
            };
            header.msg_control = if header.msg_controllen == 0 {
                std::ptr::null_mut()
            } else {
                self.controls[i].0.as_mut_ptr().cast::<c_void>()
            };
            header.msg_flags = 0;
            start = end;
        }
    }
}

/// sendmsg(2) of one message, without waiting.
pub(crate) fn send_one(
    fd: BorrowedFd<'_>,
    to: &SocketAddress,
    source: Option<Ipv4Addr>,
    bytes: &[u8],
    segment_size: u16,
) -> io::Result<()> {
    let mut control = Control::EMPTY;
    let mut body = vector(bytes);
    let mut header = EMPTY_HEADER.msg_hdr;
    header.msg_name = to.bytes.as_ptr().cast_mut().cast::<c_void>();
    header.msg_namelen = to.len;
    header.msg_iov = &raw mut body;
    header.msg_iovlen = 1;
    header.msg_controllen = control.describe(segment_size, source) as _;
    if header.msg_controllen > 0 {
        header.msg_control = control.0.as_mut_ptr().cast::<c_void>();
    }
    // SAFETY: the header points at an address, a vector with its bytes, and ancillary data that outlive the call, with
    // their lengths; the kernel reads them only.
    let result = unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const header, libc::MSG_DONTWAIT) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

const EMPTY_VECTOR: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

// SAFETY: `mmsghdr` consists of integers and pointers, for which zero is a value.
const EMPTY_HEADER: libc::mmsghdr = unsafe { mem::zeroed() };

#[cfg(test)]
mod tests {
    use super::*;

    fn control(len: usize, level: c_int, kind: c_int, data: &[u8]) -> Vec<u8> {
        let mut bytes = len.to_ne_bytes().to_vec();
        bytes.extend(level.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(data);
        bytes.resize(control_align(bytes.len()), 0);
        bytes
    }

    #[test]
    fn ancillary_data_is_found_behind_other_ancillary_data() {
        let mut bytes = control(CONTROL_HEADER + 1, 1, 2, &[7]);
        bytes.extend(control(CONTROL_HEADER + 4, SOL_UDP, libc::UDP_GRO, &1400i32.to_ne_bytes()));
        assert_eq!(find_control(&bytes, SOL_UDP, libc::UDP_GRO), Some(&1400i32.to_ne_bytes()[..]));
        assert_eq!(find_control(&bytes, SOL_UDP, 1), None);
    }

    #[test]
    fn the_local_address_is_found_beside_the_segment_size_and_never_in_less_than_it_takes() {
        let info = [1, 0, 0, 0, 192, 0, 2, 7, 192, 0, 2, 255];
        let gro = control(CONTROL_HEADER + 4, SOL_UDP, libc::UDP_GRO, &1400i32.to_ne_bytes());
        let local = |len: usize, info: &[u8]| {
            let info = control(CONTROL_HEADER + len, libc::IPPROTO_IP, libc::IP_PKTINFO, info);
            packet_info_local(&[&gro[..], &info].concat())
        };
        assert_eq!(local(12, &info), Some(Ipv4Addr::new(192, 0, 2, 7)));
        assert_eq!((local(7, &info), local(0, &info), local(1000, &info)), (None, None, None));
        assert_eq!((local(12, &[0; 12]), packet_info_local(&gro)), (None, None));
    }

    #[test]
    fn what_is_written_for_a_message_is_found_in_it() {
        let mut written = Control::EMPTY;
        let source = Ipv4Addr::new(192, 0, 2, 7);
        let used = written.describe(1400, Some(source));
        assert_eq!(
            find_control(&written.0[..used], SOL_UDP, libc::UDP_SEGMENT),
            Some(&1400u16.to_ne_bytes()[..])
        );
        assert_eq!(packet_info_local(&written.0[..used]), Some(source));
        assert_eq!(written.describe(0, None), 0);
    }

    #[test]
    fn ancillary_data_that_lies_about_its_length_ends_the_search() {
        for len in [0, 1, CONTROL_HEADER - 1, 1000, usize::MAX] {
            assert_eq!(find_control(&control(len, 1, 2, &[0; 8]), SOL_UDP, libc::UDP_GRO), None);
        }
    }
}
