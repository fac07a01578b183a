//! Between which two addresses the datagrams of a peer travel.

use std::net::{Ipv4Addr, SocketAddrV4};

/// Where a peer is, and by which of our addresses it knows us.
///
/// On a host with several addresses the kernel picks the source of what is sent by the route alone. But a NAT or a
/// firewall before the peer lets in answers only from where its datagrams went: so they leave from the address that was
/// addressed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Path {
    /// The peer's end.
    pub remote: SocketAddrV4,
    /// Our end; `None` leaves it to the route.
    pub local: Option<Ipv4Addr>,
}

impl From<SocketAddrV4> for Path {
    fn from(remote: SocketAddrV4) -> Self {
        Self { remote, local: None }
    }
}
