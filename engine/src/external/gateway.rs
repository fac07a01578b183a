//! The external interface as one device of a shard: packets out, packets in, and ARP beside them.

use std::io::IoSlice;

use super::arp_socket::ArpSocket;
use super::next_hop::ExternalLink;
use super::packet_socket::{FilterRules, PacketSocket, SendFrame};
use crate::arena::{Arena, Span};
use crate::outbox::DeviceFrame;
use crate::sys::DeviceError;
use crate::wire::VirtioNetHeader;

/// The user-space face of the external interface.
pub struct ExternalGateway {
    /// Receives the packets for our ports, and sends.
    pub packets: PacketSocket,
    /// Asks for link addresses.
    pub arp: ArpSocket,
    /// Whether superpackets go out whole.
    pub offload: bool,
    refused: Vec<usize>,
}

impl ExternalGateway {
    /// Opens the sockets. They let nothing through until [`Self::set_link`] says what: a shard joins the fanout of the
    /// others first, so that it does not get what belongs to them.
    ///
    /// # Errors
    /// What the kernel refuses, as without `CAP_NET_RAW`.
    pub fn open(link: &ExternalLink, offload: bool) -> Result<Self, DeviceError> {
        let packets = PacketSocket::open(link.index, link.mac)?;
        let arp = ArpSocket::open(link.index, &link.addresses)?;
        Ok(Self { packets, arp, offload, refused: Vec::new() })
    }

    /// Takes the link's addresses and the ports to let through, at the beginning and whenever they change.
    ///
    /// # Errors
    /// What the kernel refuses; the sockets go on with what they had.
    pub fn set_link(&mut self, link: &ExternalLink, filter: &FilterRules) -> Result<(), DeviceError> {
        self.packets.set_filter(filter)?;
        self.packets.set_source_mac(link.mac);
        self.arp.set_addresses(&link.addresses)
    }

    /// Sends packets to their next hops, and returns how many packets the kernel had no room for.
    ///
    /// What the kernel does not take as a superpacket is split here, and everything from then on. `segment` is room for
    /// one packet.
    pub fn send_outbound(
        &mut self,
        frames: &[DeviceFrame],
        tails: &[Span],
        arena: &Arena,
        segment: &mut [u8],
    ) -> usize {
        if !self.offload {
            return frames.iter().map(|frame| self.send_split(frame, tails, arena, segment)).sum();
        }
        let mut slices = Vec::with_capacity(frames.len() + tails.len());
        for frame in frames {
            slices.push(IoSlice::new(frame.packet.head.get(arena)));
            slices.extend(frame.packet.tails_of(tails).iter().map(|&tail| IoSlice::new(arena.get(tail))));
        }
        let mut rest = &slices[..];
        let messages: Vec<SendFrame<'_>> = frames
            .iter()
            .map(|frame| {
                let (slices, others) = rest.split_at(1 + frame.packet.tails.len());
                rest = others;
                SendFrame { destination_mac: frame.destination_mac, header: frame.header, slices }
            })
            .collect();
        self.refused.clear();
        let mut dropped = self.packets.send(&messages, &mut self.refused).dropped;
        if !self.refused.is_empty() {
            self.offload = false;
            for index in std::mem::take(&mut self.refused) {
                dropped += self.send_split(&frames[index], tails, arena, segment);
            }
        }
        dropped
    }

    fn send_split(
        &mut self,
        frame: &DeviceFrame,
        tails: &[Span],
        arena: &Arena,
        segment: &mut [u8],
    ) -> usize {
        let mut segments = frame.packet.segments(frame.shape, tails, arena);
        let mut dropped = 0;
        while let Some(len) = segments.next_into(segment) {
            let slices = [IoSlice::new(&segment[..len])];
            let message = SendFrame {
                destination_mac: frame.destination_mac,
                header: VirtioNetHeader::default(),
                slices: &slices,
            };
            dropped += self.packets.send(&[message], &mut self.refused).dropped;
        }
        dropped
    }
}
