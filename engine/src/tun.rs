//! The TUN device: IPv4 packets to and from the host's kernel, superpackets whole.
//!
//! Theory of operation. Each read and each write carries one packet behind a `virtio_net_hdr`. What the *reader* has
//! declared with `TUNSETOFFLOAD` decides what the kernel may hand it: with TSO a TCP superpacket of up to 64 KiB whose
//! checksum is partial, with USO the same for UDP. Writing superpackets needs no declaration, but the kernel may
//! refuse one with `EINVAL`; the caller then splits it and goes on.
//!
//! A device has one queue: several would reorder a flow. Shards that only write use a clone of the descriptor.

use std::ffi::CStr;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use libc::{
    IFF_NO_PI, IFF_TUN, IFF_VNET_HDR, TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6, TUN_F_USO4,
    TUN_F_USO6,
};

use crate::arena::{Arena, LARGEST_PACKET, Span};
use crate::sys::{self, Context, DeviceError, InterfaceRequest};
use crate::wire::VirtioNetHeader;

const DEVICE: &CStr = c"/dev/net/tun";

/// Which superpackets the kernel may hand over.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TunOffloads {
    /// TCP segmentation (TSO).
    pub tso: bool,
    /// UDP segmentation (USO), from Linux 6.2 on.
    pub uso: bool,
}

/// A TUN device. Non-persistent: it vanishes with its last descriptor.
#[derive(Debug)]
pub struct Tun {
    fd: OwnedFd,
    name: String,
    offloads: TunOffloads,
}

/// A packet from the host's kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TunPacket {
    /// The IP packet.
    pub span: Span,
    /// Its offload metadata.
    pub offload: VirtioNetHeader,
}

impl Tun {
    /// Creates the device `name` (at most 15 bytes, in which `%d` stands for a free number), or attaches to a
    /// persistent one of that name.
    ///
    /// Of `offloads`, what the kernel refuses is left out; [`Self::offloads`] says what is in use.
    ///
    /// # Errors
    /// `EBUSY` if another process holds the device, `EPERM` without `CAP_NET_ADMIN`, `ENOENT` without `/dev/net/tun`.
    pub fn open(name: &str, offloads: TunOffloads) -> Result<Self, DeviceError> {
        let mut request = request(name).context(|| format!("create the TUN device {name:?}"))?;
        let fd = sys::open_device(DEVICE).context(|| "open /dev/net/tun".into())?;
        sys::tun_set_interface(fd.as_fd(), &mut request)
            .context(|| format!("create the TUN device {name}"))?;
        sys::tun_set_header_size(fd.as_fd(), VirtioNetHeader::SIZE as libc::c_int)
            .context(|| format!("set the header size of the TUN device {name}"))?;
        let offloads = set_offloads(fd.as_fd(), offloads)
            .context(|| format!("set the offloads of the TUN device {name}"))?;
        let name = request.name.split(|&byte| byte == 0).next().unwrap_or_default();
        Ok(Self { fd, name: String::from_utf8_lossy(name).into_owned(), offloads })
    }

    /// Receives one packet into `buffer`, from the byte `offset` on; `None` if there is none.
    ///
    /// Behind `offset` there must be room for the largest packet ([`LARGEST_PACKET`]): the kernel cuts off what does
    /// not fit.
    ///
    /// # Errors
    /// [`Self::is_gone`] after the device was deleted, and what else the kernel says. (From a device that is down
    /// nothing comes, neither packets nor errors.)
    pub fn receive(
        &mut self,
        arena: &mut Arena,
        buffer: usize,
        offset: usize,
    ) -> io::Result<Option<TunPacket>> {
        let bytes = arena.buffer_mut(buffer).get_mut(offset..).unwrap_or_default();
        debug_assert!(bytes.len() >= LARGEST_PACKET, "a superpacket might be cut off");
        let len = match sys::read(self.fd.as_fd(), bytes) {
            Ok(len) => len,
            Err(error) if sys::would_block(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        let Some(header) = bytes[..len].first_chunk() else {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "a TUN packet without a virtio-net header",
            ));
        };
        let offload = VirtioNetHeader::from_bytes(*header);
        let packet = offset + VirtioNetHeader::SIZE..offset + len;
        Ok(Some(TunPacket { span: Span::new(buffer, packet), offload }))
    }

    /// Sends one packet, the concatenation of `slices` (at most [`sys::MAX_SLICES`] - 1).
    ///
    /// # Errors
    /// `EINVAL` if the kernel does not take this superpacket: split it and send the segments. `EIO` while the device
    /// is down; `WouldBlock` if its queue is full.
    pub fn send(&self, header: VirtioNetHeader, slices: &[IoSlice<'_>]) -> io::Result<()> {
        sys::write_vectored(self.fd.as_fd(), &header.to_bytes(), slices).map(drop)
    }

    /// Whether a read failed because the device was deleted: it will never bring anything again, and says so for ever.
    pub fn is_gone(error: &io::Error) -> bool {
        error.raw_os_error() == Some(libc::EBADFD)
    }

    /// Another handle of the same queue, for another shard to write to.
    ///
    /// # Errors
    /// Where the process has no more descriptors.
    pub fn try_clone(&self) -> Result<Self, DeviceError> {
        let fd = self
            .fd
            .try_clone()
            .context(|| format!("duplicate the descriptor of the TUN device {}", self.name))?;
        Ok(Self { fd, name: self.name.clone(), offloads: self.offloads })
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The offloads in use.
    pub fn offloads(&self) -> TunOffloads {
        self.offloads
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Tun {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

fn request(name: &str) -> io::Result<InterfaceRequest> {
    let mut request = InterfaceRequest {
        name: [0; libc::IFNAMSIZ],
        flags: (IFF_TUN | IFF_NO_PI | IFF_VNET_HDR) as u16,
        rest: [0; 22],
    };
    // One byte stays for the terminating zero.
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.bytes().any(|byte| byte == 0 || byte == b'/') {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a name has 1 to 15 bytes, without a slash"));
    }
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    Ok(request)
}

/// Declares what the reader understands, best first, until the kernel agrees.
///
/// The kernel takes USO for IPv4 only together with USO for IPv6, and segmentation only together with checksums
/// (`set_offload` in drivers/net/tun.c). `TSO_ECN` lets flows with CWR stay whole; TSO for IPv6 is asked for only
/// where the kernel wants it, since Tidegate drops IPv6.
fn set_offloads(fd: BorrowedFd<'_>, wanted: TunOffloads) -> io::Result<TunOffloads> {
    let checksums = TUN_F_CSUM;
    let tso = checksums | TUN_F_TSO4 | TUN_F_TSO_ECN;
    let uso = TUN_F_USO4 | TUN_F_USO6;
    let ladder = [
        (tso | uso, TunOffloads { tso: true, uso: true }),
        (tso | TUN_F_TSO6 | uso, TunOffloads { tso: true, uso: true }),
        (checksums | uso, TunOffloads { tso: false, uso: true }),
        (tso, TunOffloads { tso: true, uso: false }),
        (checksums | TUN_F_TSO4, TunOffloads { tso: true, uso: false }),
        (checksums | TUN_F_TSO4 | TUN_F_TSO6, TunOffloads { tso: true, uso: false }),
        (checksums, TunOffloads::default()),
    ];
    let wanted_none = wanted == TunOffloads::default();
    for (flags, offloads) in ladder {
        let too_much = (offloads.tso && !wanted.tso) || (offloads.uso && !wanted.uso);
        if !too_much && !wanted_none && sys::tun_set_offload(fd, flags).is_ok() {
            return Ok(offloads);
        }
    }
    // A persistent device may still have the declarations of its last owner.
    sys::tun_set_offload(fd, 0).map(|()| TunOffloads::default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_the_kernel_would_cut_is_refused() {
        assert!(request("tide0").is_ok());
        assert!(request("fifteen-bytes-x").is_ok());
        for name in ["", "sixteen-bytes-xx", "a/b", "a\0b"] {
            assert_eq!(request(name).err().map(|error| error.kind()), Some(io::ErrorKind::InvalidInput));
        }
    }
}
