//! The system calls of the devices, as owned descriptors, safe functions and errors that say what was being done.
//!
//! This is the floor on which `tun`, `transport` and `external` stand: `unsafe` stays down here (and in
//! [`crate::wake`]). Every descriptor is non-blocking and close-on-exec.

use std::fmt;
use std::io;
use std::mem::{self, MaybeUninit};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use libc::{c_int, c_void};

pub mod batch;

/// A refusal by the operating system, with what was being done to what.
#[derive(Debug)]
pub struct DeviceError {
    action: String,
    source: io::Error,
}

impl DeviceError {
    /// `action` completes the sentence "cannot ...".
    pub fn new(action: impl Into<String>, source: io::Error) -> Self {
        Self { action: action.into(), source }
    }

    /// The error number, as of `errno`.
    pub fn raw_os_error(&self) -> Option<i32> {
        self.source.raw_os_error()
    }
}

impl fmt::Display for DeviceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {}: {}", self.action, self.source)
    }
}

impl std::error::Error for DeviceError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

/// Adds to an error what was being done.
pub(crate) trait Context<T> {
    /// `action` completes the sentence "cannot ...".
    fn context(self, action: impl FnOnce() -> String) -> Result<T, DeviceError>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, action: impl FnOnce() -> String) -> Result<T, DeviceError> {
        self.map_err(|source| DeviceError::new(action(), source))
    }
}

/// What became of the packets of one call.
#[derive(Default, Debug)]
pub struct SendOutcome {
    /// Packets that the kernel took.
    pub sent: usize,
    /// Packets that it did not: count them under `DropReason::SendFailed`.
    pub dropped: usize,
    /// The first refusal, for the log.
    pub error: Option<io::Error>,
    /// A local address from which nothing can be sent any more: its packets left from another.
    pub gone: Option<Ipv4Addr>,
}

impl SendOutcome {
    /// Counts packets that the kernel refused.
    pub(crate) fn lose(&mut self, packets: usize, error: io::Error) {
        self.dropped += packets;
        self.error.get_or_insert(error);
    }
}

/// Plain structures of the kernel: any bit pattern is a value, and there is no padding that could leak.
///
/// # Safety
/// Implementors are `repr(C)` (or primitive) without references, padding or invalid bit patterns.
pub(crate) unsafe trait Plain: Copy + 'static {}

// SAFETY: integers, and arrays of them, are plain.
unsafe impl Plain for c_int {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl<const N: usize> Plain for [u32; N] {}
// SAFETY: as above.
unsafe impl<const N: usize> Plain for [u8; N] {}

/// The result of a system call that returns -1 on failure.
pub(crate) fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn check_size(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Whether the call would have had to wait.
pub(crate) fn would_block(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}

/// Opens a non-blocking, close-on-exec socket. `protocol` is in the byte order that the family expects.
pub(crate) fn socket(family: c_int, kind: c_int, protocol: c_int) -> io::Result<OwnedFd> {
    // SAFETY: socket(2) takes no pointers.
    let fd =
        check(unsafe { libc::socket(family, kind | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC, protocol) })?;
    // SAFETY: the descriptor was just opened, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// setsockopt(2) with a plain value.
pub(crate) fn set_option<T: Plain>(
    fd: BorrowedFd<'_>,
    level: c_int,
    name: c_int,
    value: T,
) -> io::Result<()> {
    // SAFETY: the pointer and the length describe `value`, which the kernel only reads.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            (&raw const value).cast::<c_void>(),
            mem::size_of::<T>() as libc::socklen_t,
        )
    };
    check(result).map(drop)
}

/// getsockopt(2) of a plain value; what the kernel does not fill in stays as in `default`.
pub(crate) fn get_option<T: Plain>(
    fd: BorrowedFd<'_>,
    level: c_int,
    name: c_int,
    default: T,
) -> io::Result<T> {
    let mut value = default;
    let mut len = mem::size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `value`, for which any bit pattern is valid.
    let result = unsafe {
        libc::getsockopt(fd.as_raw_fd(), level, name, (&raw mut value).cast::<c_void>(), &raw mut len)
    };
    check(result).map(|_| value)
}

/// Asks for a socket buffer of `bytes`, past the system's limit if the process may, else up to it.
pub(crate) fn set_buffer(fd: BorrowedFd<'_>, direction: Buffer, bytes: usize) -> io::Result<()> {
    let (forced, limited) = match direction {
        Buffer::Receive => (libc::SO_RCVBUFFORCE, libc::SO_RCVBUF),
        Buffer::Send => (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF),
    };
    let bytes = c_int::try_from(bytes).unwrap_or(c_int::MAX / 2);
    set_option(fd, libc::SOL_SOCKET, forced, bytes)
        .or_else(|_| set_option(fd, libc::SOL_SOCKET, limited, bytes))
}

/// Which buffer of a socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Buffer {
    Receive,
    Send,
}

/// The packets that the kernel discarded because the socket's receive buffer was full (`SO_MEMINFO`).
pub(crate) fn receive_overruns(fd: BorrowedFd<'_>) -> io::Result<u32> {
    const SK_MEMINFO_DROPS: usize = 8; // linux/sock_diag.h
    get_option(fd, libc::SOL_SOCKET, libc::SO_MEMINFO, [0u32; 9]).map(|info| info[SK_MEMINFO_DROPS])
}

/// Whether the socket's receive buffer is more than half full, by the kernel's own accounting (`SO_MEMINFO`).
pub(crate) fn is_half_full(fd: BorrowedFd<'_>) -> io::Result<bool> {
    // linux/sock_diag.h
    const SK_MEMINFO_RMEM_ALLOC: usize = 0;
    const SK_MEMINFO_RCVBUF: usize = 1;
    get_option(fd, libc::SOL_SOCKET, libc::SO_MEMINFO, [0u32; 9])
        .map(|info| info[SK_MEMINFO_RMEM_ALLOC] > info[SK_MEMINFO_RCVBUF] / 2)
}

/// Hands a classic BPF program to the kernel, by one of the options that take a `sock_fprog`.
pub(crate) fn attach_program(
    fd: BorrowedFd<'_>,
    level: c_int,
    name: c_int,
    program: &[libc::sock_filter],
) -> io::Result<()> {
    let len =
        libc::c_ushort::try_from(program.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut() };
    // SAFETY: the kernel reads one `sock_fprog` and the `len` instructions to which it points; both outlive the call.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            (&raw const program).cast::<c_void>(),
            mem::size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    check(result).map(drop)
}

/// One eBPF instruction (`struct bpf_insn` of linux/bpf.h).
#[repr(C)]
pub(crate) struct EbpfInstruction {
    pub(crate) code: u8,
    pub(crate) registers: u8,
    pub(crate) offset: i16,
    pub(crate) immediate: i32,
}

/// Hands an eBPF socket filter to the kernel; sockets share it by [`attach_loaded`].
///
/// # Errors
/// `EPERM` without `CAP_BPF` where only the privileged may load programs, `ENOSYS` on a kernel without eBPF.
pub(crate) fn load_socket_filter(program: &[EbpfInstruction]) -> io::Result<OwnedFd> {
    /// The fields of `union bpf_attr` that loading a program reads, up to `kern_version`.
    #[repr(C)]
    struct Load {
        kind: u32,
        instruction_count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log_buffer: u64,
        kernel_version: u32,
        flags: u32,
    }
    const BPF_PROG_LOAD: c_int = 5;
    const BPF_PROG_TYPE_SOCKET_FILTER: u32 = 1;
    let attributes = Load {
        kind: BPF_PROG_TYPE_SOCKET_FILTER,
        instruction_count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: c"Dual MIT/GPL".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buffer: 0,
        kernel_version: 0,
        flags: 0,
    };
    // SAFETY: the kernel reads one `Load`, and the instructions and the text to which it points; all outlive the call.
    let fd = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const attributes, mem::size_of::<Load>() as u32)
    };
    let fd = check(fd as c_int)?;
    // SAFETY: the descriptor was just opened, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes a loaded program the filter of a socket.
///
/// # Errors
/// None is expected.
pub(crate) fn attach_loaded(fd: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    set_option(fd, libc::SOL_SOCKET, libc::SO_ATTACH_BPF, program.as_raw_fd())
}

/// A socket address as the kernel lays it out, for IPv4 and packet sockets.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(8))]
pub(crate) struct SocketAddress {
    bytes: [u8; 24],
    len: u32,
}

impl SocketAddress {
    pub(crate) const EMPTY: Self = Self { bytes: [0; 24], len: 0 };
    /// Room for the kernel to write one.
    pub(crate) const CAPACITY: u32 = 24;

    /// `struct sockaddr_in` of ip(7).
    pub(crate) fn inet(address: SocketAddrV4) -> Self {
        let mut bytes = [0; 24];
        bytes[0..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
        bytes[2..4].copy_from_slice(&address.port().to_be_bytes());
        bytes[4..8].copy_from_slice(&address.ip().octets());
        Self { bytes, len: 16 }
    }

    /// `struct sockaddr_ll` of packet(7), enough of it to bind to (and, on `SOCK_RAW`, to send through) an interface.
    pub(crate) fn link(ethertype: u16, ifindex: u32) -> Self {
        let mut bytes = [0; 24];
        bytes[0..2].copy_from_slice(&(libc::AF_PACKET as u16).to_ne_bytes());
        bytes[2..4].copy_from_slice(&ethertype.to_be_bytes());
        bytes[4..8].copy_from_slice(&ifindex.to_ne_bytes());
        Self { bytes, len: 20 }
    }

    /// Reads the interface's index from a `struct sockaddr_ll`; the kernel's -1 and 0 are no interface's.
    pub(crate) fn to_link(self) -> Option<u32> {
        let b = self.bytes;
        let family = u16::from_ne_bytes([b[0], b[1]]);
        (family == libc::AF_PACKET as u16).then(|| u32::from_ne_bytes([b[4], b[5], b[6], b[7]]))
    }

    /// Reads it as a `struct sockaddr_in`.
    pub(crate) fn to_inet(self) -> Option<SocketAddrV4> {
        let b = self.bytes;
        if u16::from_ne_bytes([b[0], b[1]]) != libc::AF_INET as u16 {
            return None;
        }
        Some(SocketAddrV4::new(Ipv4Addr::new(b[4], b[5], b[6], b[7]), u16::from_be_bytes([b[2], b[3]])))
    }
}

/// bind(2).
pub(crate) fn bind(fd: BorrowedFd<'_>, address: &SocketAddress) -> io::Result<()> {
    // SAFETY: the pointer and the length describe `address.bytes`, which the kernel only reads.
    let result =
        unsafe { libc::bind(fd.as_raw_fd(), address.bytes.as_ptr().cast::<libc::sockaddr>(), address.len) };
    check(result).map(drop)
}

/// listen(2).
pub(crate) fn listen(fd: BorrowedFd<'_>, backlog: c_int) -> io::Result<()> {
    // SAFETY: listen(2) takes no pointers.
    check(unsafe { libc::listen(fd.as_raw_fd(), backlog) }).map(drop)
}

/// The IPv4 address to which a socket is bound.
pub(crate) fn local_address(fd: BorrowedFd<'_>) -> io::Result<SocketAddrV4> {
    bound_to(fd)?.to_inet().ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// The index of the interface to which a packet socket is bound.
pub(crate) fn local_interface(fd: BorrowedFd<'_>) -> io::Result<u32> {
    bound_to(fd)?.to_link().ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// getsockname(2).
fn bound_to(fd: BorrowedFd<'_>) -> io::Result<SocketAddress> {
    let mut address = SocketAddress::EMPTY;
    let mut len = SocketAddress::CAPACITY;
    // SAFETY: the kernel writes at most `len` bytes to `address.bytes`, which has that many.
    let result = unsafe {
        libc::getsockname(fd.as_raw_fd(), address.bytes.as_mut_ptr().cast::<libc::sockaddr>(), &raw mut len)
    };
    check(result).map(|_| address)
}

/// read(2).
pub(crate) fn read(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the kernel writes at most `buffer.len()` bytes to `buffer`.
    check_size(unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast::<c_void>(), buffer.len()) })
}

/// The most slices that one call takes, the head included (`UIO_MAXIOV` of linux/uio.h).
pub const MAX_SLICES: usize = 1024;

/// writev(2) of `head` and then `slices`, as one packet.
///
/// # Errors
/// `InvalidInput` if there are too many slices, else what the kernel says.
pub(crate) fn write_vectored(
    fd: BorrowedFd<'_>,
    head: &[u8],
    slices: &[io::IoSlice<'_>],
) -> io::Result<usize> {
    if slices.len() >= MAX_SLICES {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    let mut vectors = [const { MaybeUninit::<libc::iovec>::uninit() }; MAX_SLICES];
    vectors[0].write(vector(head));
    for (vector_slot, slice) in vectors[1..].iter_mut().zip(slices) {
        vector_slot.write(vector(slice));
    }
    // SAFETY: the first `1 + slices.len()` vectors were written above and describe live slices, which the kernel
    // only reads.
    let result = unsafe {
        libc::writev(fd.as_raw_fd(), vectors.as_ptr().cast::<libc::iovec>(), 1 + slices.len() as c_int)
    };
    check_size(result)
}

/// A slice that the kernel will only read.
fn vector(bytes: &[u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast::<c_void>(), iov_len: bytes.len() }
}

/// Opens a device node for reading and writing.
pub(crate) fn open_device(path: &std::ffi::CStr) -> io::Result<OwnedFd> {
    // SAFETY: `path` is a C string, which the kernel only reads.
    let fd = check(unsafe { libc::open(path.as_ptr(), libc::O_RDWR | libc::O_NONBLOCK | libc::O_CLOEXEC) })?;
    // SAFETY: the descriptor was just opened, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The part of `struct ifreq` that TUN needs: name and flags, padded to the kernel's size.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct InterfaceRequest {
    pub(crate) name: [u8; libc::IFNAMSIZ],
    pub(crate) flags: u16,
    pub(crate) rest: [u8; 22],
}

/// ioctl(2) `TUNSETIFF`: makes the descriptor the interface `request.name`; the kernel writes the real name back.
pub(crate) fn tun_set_interface(fd: BorrowedFd<'_>, request: &mut InterfaceRequest) -> io::Result<()> {
    // SAFETY: `InterfaceRequest` has the size and layout of `struct ifreq`, which the kernel reads and writes.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF as _, std::ptr::from_mut(request)) }).map(drop)
}

/// ioctl(2) `TUNSETVNETHDRSZ`: the size of the virtio-net header before each packet.
pub(crate) fn tun_set_header_size(fd: BorrowedFd<'_>, size: c_int) -> io::Result<()> {
    // SAFETY: the kernel reads one `int`.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ as _, &raw const size) }).map(drop)
}

/// ioctl(2) `TUNSETOFFLOAD`: which superpackets the reader understands.
pub(crate) fn tun_set_offload(fd: BorrowedFd<'_>, flags: libc::c_uint) -> io::Result<()> {
    // SAFETY: `TUNSETOFFLOAD` takes its argument by value.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD as _, libc::c_ulong::from(flags)) })
        .map(drop)
}

/// Asks the scheduler to let the calling thread run soon rather than long: slices of `slice` instead of some
/// milliseconds (`sched_setattr(2)`; EEVDF heeds it from Linux 6.12 on). [`crate::time_slice`] says why.
///
/// A thread that was given another policy on purpose keeps it, and everyone keeps their nice value.
pub(crate) fn run_in_slices_of(slice: std::time::Duration) -> io::Result<()> {
    /// `struct sched_attr` of `linux/sched/types.h`, its first version.
    #[repr(C)]
    struct SchedAttr {
        size: u32,
        policy: u32,
        flags: u64,
        nice: i32,
        priority: u32,
        runtime: u64,
        deadline: u64,
        period: u64,
    }
    // SAFETY: neither call touches memory; 0 is the calling thread.
    let (policy, nice) = unsafe { (libc::sched_getscheduler(0), libc::getpriority(libc::PRIO_PROCESS, 0)) };
    if policy != libc::SCHED_OTHER {
        return Ok(());
    }
    let attributes = SchedAttr {
        size: mem::size_of::<SchedAttr>() as u32,
        policy: libc::SCHED_OTHER as u32,
        flags: 0,
        nice,
        priority: 0,
        runtime: slice.as_nanos() as u64,
        deadline: 0,
        period: 0,
    };
    // SAFETY: the kernel reads one `sched_attr` of the size that it names; thread 0 is the calling one.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    check(result as c_int).map(drop)
}

/// The soft and the hard limit of open descriptors.
pub(crate) fn descriptor_limits() -> io::Result<(u64, u64)> {
    let mut limits = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes one `rlimit`.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limits) })?;
    Ok((limits.rlim_cur, limits.rlim_max))
}

/// Sets the soft limit of open descriptors.
pub(crate) fn set_descriptor_limit(soft: u64, hard: u64) -> io::Result<()> {
    let limits = libc::rlimit { rlim_cur: soft, rlim_max: hard };
    // SAFETY: the kernel reads one `rlimit`.
    check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limits) }).map(drop)
}

/// What people call the interface `ifindex`; its number, if it is gone. For messages.
pub(crate) fn interface_name(ifindex: u32) -> String {
    let mut name = [0; libc::IF_NAMESIZE];
    // SAFETY: the kernel writes at most `IF_NAMESIZE` bytes, with a zero at their end.
    if unsafe { libc::if_indextoname(ifindex, name.as_mut_ptr()) }.is_null() {
        return format!("number {ifindex}");
    }
    let bytes: Vec<u8> = name.iter().take_while(|&&byte| byte != 0).map(|&byte| byte as u8).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
