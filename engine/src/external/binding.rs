//! Whether the interface is still the one that our sockets were bound to.
//!
//! When an interface is deleted, or moved to another network namespace, the kernel unbinds the packet sockets on it for
//! ever (`NETDEV_UNREGISTER` in `packet_notifier`, net/packet/af_packet.c). If it comes back with its old index,
//! nothing about it tells that they receive nothing any more. Their owners are the shards; so this is a socket beside
//! them, that shares their fate.

use std::os::fd::{AsFd, OwnedFd};

use super::packet_socket::open_deaf;
use crate::sys::{self, DeviceError};

/// No EtherType: a socket that is bound to an interface, but not hooked up to its frames.
const NOTHING: u16 = 0;

/// A packet socket that receives nothing, ever.
#[derive(Debug)]
pub struct Binding(OwnedFd);

impl Binding {
    /// Binds to the interface `ifindex`. To be opened before the sockets that it stands for, so that it is not bound to
    /// what came after them.
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_RAW`, `ENODEV` without the interface.
    pub fn open(ifindex: u32) -> Result<Self, DeviceError> {
        open_deaf(ifindex, NOTHING).map(Self)
    }

    /// Whether it is bound to `ifindex`, and has been since it was opened.
    pub fn holds(&self, ifindex: u32) -> bool {
        sys::local_interface(self.0.as_fd()).is_ok_and(|bound| bound == ifindex)
    }
}
