//! The external interface: a user-space face on the host's own network card and address.
//!
//! Tidegate shares the card and the address with the host's kernel. [`packet_socket`] receives the packets for our
//! ports and sends ours; [`reservation`] keeps the kernel silent about these ports, and everyone else off them;
//! [`next_hop`] says to which neighbour a packet goes, [`neighbor`] knows its link address, which [`arp_socket`] asks
//! for. [`binding`] tells whether the sockets are still on the card. Nothing of the host's is changed.

use std::net::Ipv4Addr;

use crate::bpf::{Assembler, Label, Test};

pub mod arp_socket;
pub mod binding;
pub mod gateway;
pub mod neighbor;
pub mod next_hop;
pub mod packet_socket;
pub mod reservation;

pub use gateway::ExternalGateway;

/// A link address (IEEE 802 MAC).
pub type MacAddress = [u8; 6];

/// Bytes of an Ethernet header without VLAN tag. On an AF_PACKET socket `csum_start` and `hdr_len` of the virtio-net
/// header count from its first byte.
pub const LINK_HEADER_LEN: u16 = 14;

/// The most external addresses that one gateway translates to.
pub const MAX_ADDRESSES: usize = 64;

/// EtherType of IPv4 (IEEE 802 "Ethertype" registry).
const ETHERTYPE_IPV4: u16 = 0x0800;
/// EtherType of ARP (RFC 826).
const ETHERTYPE_ARP: u16 = 0x0806;
/// A frame for this host's link address (linux/if_packet.h).
const PACKET_HOST: u32 = 0;
const PACKET_BROADCAST: u32 = 1;

/// Assembles: go to `elsewhere` unless the word at `offset` is one of `addresses`.
fn require_address(program: &mut Assembler, offset: u32, addresses: &[Ipv4Addr], elsewhere: Label) {
    let ours = program.label();
    program.load_word(offset);
    for &address in addresses {
        program.jump_if(Test::Equal(u32::from(address)), ours);
    }
    program.jump(elsewhere);
    program.place(ours);
}
