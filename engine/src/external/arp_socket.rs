//! ARP on the external interface (RFC 826): requests out, the replies to them in.
//!
//! The kernel's own neighbour table is neither read nor written. The filter lets in what is addressed to us (replies,
//! and the requests that the host's kernel answers), and what announces its own sender (gratuitous ARP, RFC 5227 §3);
//! whether one was asked for is for [`super::neighbor`] to judge.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use super::neighbor::arp;
use super::packet_socket::open_deaf;
use super::{ETHERTYPE_ARP, MAX_ADDRESSES, PACKET_BROADCAST, PACKET_HOST, require_address};
use crate::bpf::{Assembler, AssemblyError, DROP, Instruction, KEEP, Test};
use crate::sys::{self, Context, DeviceError};

/// Bytes of the smallest Ethernet frame without its checksum: an ARP frame and its padding.
pub const RECEIVE_SIZE: usize = 60;

/// A packet socket for ARP.
#[derive(Debug)]
pub struct ArpSocket {
    fd: OwnedFd,
    ifindex: u32,
}

impl ArpSocket {
    /// Opens a socket on the interface `ifindex` that receives what is for `addresses`, and announcements.
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_RAW`, `ENODEV` without the interface, `InvalidInput` for too many addresses.
    pub fn open(ifindex: u32, addresses: &[Ipv4Addr]) -> Result<Self, DeviceError> {
        let socket = Self { fd: open_deaf(ifindex, ETHERTYPE_ARP)?, ifindex };
        socket.set_addresses(addresses)?;
        Ok(socket)
    }

    /// Our addresses changed.
    ///
    /// # Errors
    /// `InvalidInput` for more than [`MAX_ADDRESSES`].
    pub fn set_addresses(&self, addresses: &[Ipv4Addr]) -> Result<(), DeviceError> {
        let program = if addresses.len() <= MAX_ADDRESSES {
            filter_program(addresses).map_err(io::Error::from)
        } else {
            Err(io::Error::new(io::ErrorKind::InvalidInput, "too many external addresses"))
        };
        program
            .and_then(|program| {
                sys::attach_program(self.fd.as_fd(), libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)
            })
            .context(|| format!("set the ARP filter of interface {}", sys::interface_name(self.ifindex)))
    }

    /// Receives one frame into `buffer` (of which [`RECEIVE_SIZE`] bytes are enough); `None` if there is none.
    ///
    /// # Errors
    /// `ENETDOWN`, once, when the interface went down.
    pub fn receive<'a>(&self, buffer: &'a mut [u8]) -> io::Result<Option<&'a [u8]>> {
        match sys::read(self.fd.as_fd(), buffer) {
            Ok(len) => Ok(Some(&buffer[..len])),
            Err(error) if sys::would_block(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sends a frame, as of [`super::neighbor::NeighborCache::poll`].
    ///
    /// # Errors
    /// What the kernel says; a lost request is repeated anyway.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        sys::write_vectored(self.fd.as_fd(), frame, &[]).map(drop)
    }
}

impl AsFd for ArpSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for ArpSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// The filter sees the frame from the link header on.
fn filter_program(addresses: &[Ipv4Addr]) -> Result<Vec<Instruction>, AssemblyError> {
    let mut program = Assembler::new();
    let (drop, known_type, addressed) = (program.label(), program.label(), program.label());
    program.load_half(12);
    program.jump_unless(Test::Equal(u32::from(ETHERTYPE_ARP)), drop);
    program.load_packet_type();
    program.jump_if(Test::Equal(PACKET_HOST), known_type);
    program.jump_unless(Test::Equal(PACKET_BROADCAST), drop);
    program.place(known_type);
    program.load_word(arp::SENDER_ADDRESS as u32);
    program.copy_into_x();
    program.load_word(arp::TARGET_ADDRESS as u32);
    program.jump_unless(Test::EqualX, addressed);
    program.give(KEEP);
    program.place(addressed);
    require_address(&mut program, arp::TARGET_ADDRESS as u32, addresses, drop);
    program.give(KEEP);
    program.place(drop);
    program.give(DROP);
    program.assemble()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bpf::interpreter::run;
    use crate::external::neighbor::tests_support::reply;

    #[test]
    fn what_is_for_us_and_what_announces_itself_is_let_in() {
        let ours = Ipv4Addr::new(192, 0, 2, 10);
        let router = Ipv4Addr::new(192, 0, 2, 1);
        let other = Ipv4Addr::new(192, 0, 2, 9);
        let program = filter_program(&[ours]).unwrap();
        let frame = reply(router, [2; 6], ours, [4; 6]);
        let announcement = reply(router, [2; 6], router, [2; 6]);
        for kind in [PACKET_HOST, PACKET_BROADCAST] {
            assert_eq!(run(&program, &frame, kind), KEEP);
            assert_eq!(run(&program, &announcement, kind), KEEP);
            assert_eq!(run(&program, &reply(router, [2; 6], other, [4; 6]), kind), DROP, "others' business");
        }
        assert_eq!(run(&program, &frame, 3), DROP, "another station's frame");
        assert!((0..arp::LEN).all(|len| run(&program, &frame[..len], PACKET_HOST) == DROP));
        let mut foreign = frame;
        foreign[13] ^= 1;
        assert_eq!(run(&program, &foreign, PACKET_HOST), DROP, "no ARP");
    }
}
