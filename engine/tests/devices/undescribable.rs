//! Frames that a virtio-net header cannot express, on a TAP device: a UDP datagram that is to leave in fragments (UFO).

use std::fs::File;
use std::io::Write;

use super::*;
use crate::world::tap;

/// The headers before a frame, for a TAP device.
const PLAIN: [u8; 10] = [0; 10];
const VIRTIO_NET_HDR_GSO_UDP: u8 = 3;

fn fragments_of(size: u16) -> [u8; 10] {
    let words = [14 + 20 + 8, size, 14 + 20, 6].map(u16::to_ne_bytes).concat(); // UDP begins behind Ethernet and IPv4
    let bytes = [&[1, VIRTIO_NET_HDR_GSO_UDP][..], &words].concat(); // VIRTIO_NET_HDR_F_NEEDS_CSUM
    bytes.try_into().unwrap()
}

/// An ordinary packet arrives, and then one that cannot be described.
fn arrive(tap: &mut File, mac: [u8; 6]) {
    let probe = Probe { source: (NEIGHBOR, 5_000), destination: (GATEWAY, 4_000) };
    for (header, packet) in
        [(PLAIN, probe.udp(b"plain")), (fragments_of(1_480), probe.udp_superpacket(&[7; 8_000], 1_480).0)]
    {
        let frame = [&header[..], &mac, &[2, 0, 0, 0, 0, 9], &[8, 0], &packet].concat();
        assert_eq!(tap.write(&frame).unwrap(), frame.len());
    }
}

#[test]
fn a_frame_that_cannot_be_described_is_counted_once_and_blamed_on_nothing_that_is_sent() {
    if !privileged() {
        return;
    }
    Namespace::new().run(|| {
        std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
        let mut tap = tap("t0");
        ip(&["address", "add", "192.0.2.1/24", "dev", "t0"]);
        ip(&["link", "set", "t0", "up"]);
        let (mut socket, mac) = (listening("t0", GATEWAY), interface_mac("t0"));
        let mut arena = Arena::new(8);
        let mut read =
            |socket: &mut PacketSocket| socket.receive(&mut arena, &slots(8), &mut Vec::new()).unwrap();

        let probe = Probe { source: (GATEWAY, 40_000), destination: (NEIGHBOR, 50_000) };
        let ordinary = (probe.udp(b"answer"), VirtioNetHeader::default());
        for (packet, header) in [probe.tcp_superpacket(&[0; 4_000], 1_400), ordinary] {
            arrive(&mut tap, mac);
            assert_eq!(read(&mut socket), 1, "what became of the other one is for the next call to say");
            let slices = [IoSlice::new(&packet)];
            let frame = SendFrame { destination_mac: [2; 6], header, slices: &slices };
            let mut refused = Vec::new();
            let outcome = socket.send(&[frame; 2], &mut refused);
            assert_eq!((outcome.sent, outcome.dropped, refused.len()), (2, 0, 0), "{outcome:?}");
            assert_eq!((read(&mut socket), socket.take_undescribable()), (0, 1));
        }
        arrive(&mut tap, mac);
        assert_eq!((read(&mut socket), read(&mut socket), socket.take_undescribable()), (1, 0, 1));
    });
}
