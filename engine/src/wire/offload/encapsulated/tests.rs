use super::*;
use crate::wire::test_packets::{Template, payload};

/// A tunnel that GRO looks into.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Tunnel {
    Ipip,
    SixInFour,
    Gre {
        flags: u16,
        kind: u16,
    },
    /// Bridged, with VLAN tags (IEEE 802.1Q, 802.1ad).
    Tagged(&'static [u16]),
}

const TUNNELS: [Tunnel; 9] = [
    Tunnel::Ipip,
    Tunnel::SixInFour,
    Tunnel::Gre { flags: 0, kind: ETHERTYPE_IPV4 },
    Tunnel::Gre { flags: 0, kind: ETHERTYPE_IPV6 },
    Tunnel::Gre { flags: GRE_KEY, kind: ETHERTYPE_IPV4 },
    Tunnel::Gre { flags: GRE_KEY | GRE_CHECKSUM, kind: ETHERTYPE_IPV6 },
    Tunnel::Gre { flags: GRE_CHECKSUM, kind: ETHERTYPE_BRIDGED },
    Tunnel::Tagged(&[ETHERTYPE_VLAN]),
    Tunnel::Tagged(&[ETHERTYPE_SERVICE_VLAN, ETHERTYPE_VLAN]),
];

const PLAIN_GRE: Tunnel = TUNNELS[2];

const FIRST: u8 = tcp_flags::ACK | tcp_flags::CWR;
const MIDDLE: u8 = tcp_flags::ACK;
const LAST: u8 = tcp_flags::ACK | tcp_flags::PSH | tcp_flags::FIN;

impl Tunnel {
    fn carries_ipv6(self) -> bool {
        matches!(self, Self::SixInFour | Self::Gre { kind: ETHERTYPE_IPV6, .. })
    }

    /// The segment number `n`, as it was sent.
    fn sends(self, n: u16, flags: u8, payload: &[u8]) -> Vec<u8> {
        let inner = Template {
            identification: 0xffff_u16.wrapping_add(n),
            sequence: (u32::MAX - 500).wrapping_add(1_000 * u32::from(n)),
            flags,
            tcp_options: vec![1; 12],
            ip_options: if self == PLAIN_GRE { vec![1; 4] } else { vec![] },
            ..Template::default()
        };
        let inner = if self.carries_ipv6() { in_ipv6(&inner.tcp(payload)) } else { inner.tcp(payload) };
        let outer = Template { identification: 7 + n, ..Template::default() };
        match self {
            Self::Ipip => outer.ip(IPIP, &inner),
            Self::SixInFour => outer.ip(IPV6, &inner),
            Self::Gre { flags, kind } => outer.ip(GRE, &gre(flags, kind, &[], &inner)),
            Self::Tagged(tags) => outer.ip(GRE, &gre(0, ETHERTYPE_BRIDGED, tags, &inner)),
        }
    }

    /// The header that the kernel puts before what it has merged.
    fn header(self, packet: &[u8], gso_size: u16) -> VirtioNetHeader {
        VirtioNetHeader {
            flags: F_NEEDS_CSUM,
            gso_type: GSO_ECN | if self.carries_ipv6() { GSO_TCPV6 } else { GSO_TCPV4 },
            hdr_len: packet.len() as u16,
            gso_size,
            csum_start: Layers::parse(packet).unwrap().tcp as u16,
            csum_offset: 16,
        }
    }

    /// What GRO makes of segments: the first one, with lengths, flags and payload of all. (Checksums are to be made
    /// anew.)
    fn merges(self, payload: &[u8]) -> Vec<u8> {
        self.sends(0, FIRST | MIDDLE | LAST, payload)
    }
}

/// The TCP segment of an IPv4 packet, in IPv6.
fn in_ipv6(packet: &[u8]) -> Vec<u8> {
    let mut tcp = packet[20..].to_vec();
    let addresses: Vec<u8> = (0..32).collect();
    put_u16(&mut tcp, 16, 0);
    let words = [&addresses[..], &(tcp.len() as u32).to_be_bytes(), &[0, 0, 0, 6], &tcp].concat();
    put_u16(&mut tcp, 16, checksum(&words));
    let len = (tcp.len() as u16).to_be_bytes();
    [&[0x60, 0, 0, 0][..], &len, &[protocol::TCP, 64], &addresses, &tcp].concat()
}

fn gre(flags: u16, kind: u16, tags: &[u16], inner: &[u8]) -> Vec<u8> {
    let mut packet = [flags, kind].map(u16::to_be_bytes).concat();
    packet.extend(vec![0; if flags & GRE_CHECKSUM != 0 { 4 } else { 0 }]);
    packet.extend(vec![9; if flags & GRE_KEY != 0 { 4 } else { 0 }]);
    if kind == ETHERTYPE_BRIDGED {
        packet.extend([2; 12]);
        tags.iter().for_each(|tag| packet.extend([tag.to_be_bytes(), [0x60, 42]].concat()));
        packet.extend(ETHERTYPE_IPV4.to_be_bytes());
    }
    packet.extend(inner);
    if flags & GRE_CHECKSUM != 0 {
        let sum = checksum(&packet);
        put_u16(&mut packet, 4, sum);
    }
    packet
}

#[test]
fn segments_come_out_as_they_were_sent() {
    for tunnel in TUNNELS {
        for len in [2_001, 2_999, 3_000] {
            let data = payload(len);
            let sent: Vec<_> = [FIRST, MIDDLE, LAST]
                .into_iter()
                .zip(data.chunks(1_000))
                .zip(0..)
                .map(|((flags, payload), n)| tunnel.sends(n, flags, payload))
                .collect();
            let mut merged = tunnel.merges(&data);
            let header = tunnel.header(&merged, 1_000);
            assert_eq!(header.split_encapsulated(&merged).as_ref(), Some(&sent), "{tunnel:?}, {len} bytes");
            merged.extend([0xff; 6]); // Ethernet's padding
            assert_eq!(header.split_encapsulated(&merged), Some(sent), "{tunnel:?}, {len} bytes");
        }
    }
}

#[test]
fn what_is_cut_off_is_refused_wherever_the_cut_is() {
    for tunnel in TUNNELS {
        let merged = tunnel.merges(&payload(3_000));
        let header = tunnel.header(&merged, 1_000);
        for len in 0..merged.len() {
            assert_eq!(header.split_encapsulated(&merged[..len]), None, "{tunnel:?}, {len} bytes");
            // Should the outer length say so, then the inner one does not.
            let mut cut = merged[..len].to_vec();
            if len >= 4 {
                put_u16(&mut cut, 2, len as u16);
            }
            assert_eq!(header.split_encapsulated(&cut), None, "{tunnel:?}, {len} bytes, whole");
        }
    }
}

#[test]
fn whatever_a_header_says_the_segments_carry_what_there_was() {
    for tunnel in TUNNELS {
        let merged = tunnel.merges(&payload(3_000));
        let header = tunnel.header(&merged, 1_000);
        for at in 0..Layers::parse(&merged).unwrap().payload {
            for value in 0..=255 {
                let mut forged = merged.clone();
                forged[at] = value;
                let Some(segments) = header.split_encapsulated(&forged) else { continue };
                let carried = |packet: &[u8]| packet.len() - Layers::parse(packet).unwrap().payload;
                let in_all: usize = segments.iter().map(|segment| carried(segment)).sum();
                assert_eq!(in_all, carried(&forged), "{tunnel:?}, byte {at} is {value}");
                assert!(segments.iter().all(|segment| carried(segment) <= 1_000));
            }
        }
    }
}

#[test]
fn a_superpacket_is_of_so_many_segments_as_somebody_sends_legitimately() {
    let split = |len, size| {
        let merged = PLAIN_GRE.merges(&payload(len));
        PLAIN_GRE.header(&merged, size).split_encapsulated(&merged).map(|segments| segments.len())
    };
    assert_eq!(split(65_000, 536), Some(122), "the MSS that every host takes (RFC 9293 §3.7.1)");
    let most = VirtioNetHeader::MAX_SPLIT_SEGMENTS;
    assert_eq!(split(most * 10, 10), Some(most));
    assert_eq!(split(most * 10 + 1, 10), None);
    assert_eq!(split(1_000, 1), None);
}

#[test]
fn a_frame_with_more_tags_than_there_are_is_refused() {
    let tunnel = Tunnel::Tagged(&[ETHERTYPE_SERVICE_VLAN, ETHERTYPE_VLAN, ETHERTYPE_VLAN]);
    assert!(Layers::parse(&tunnel.merges(&payload(3_000))).is_none());
}

#[test]
fn what_is_not_described_as_it_is_is_refused() {
    let merged = PLAIN_GRE.merges(&payload(3_000));
    let header = PLAIN_GRE.header(&merged, 1_000);
    assert!(header.split_encapsulated(&merged).is_some());
    for wrong in [
        VirtioNetHeader { flags: 0, ..header },
        VirtioNetHeader { gso_type: 0, ..header },
        VirtioNetHeader { gso_type: GSO_TCPV6, ..header },
        VirtioNetHeader { gso_type: 5, ..header }, // UDP
        VirtioNetHeader { gso_size: 0, ..header },
        VirtioNetHeader { csum_start: header.csum_start - 4, ..header },
        VirtioNetHeader { csum_offset: 6, ..header },
    ] {
        assert_eq!(wrong.split_encapsulated(&merged), None, "{wrong:?}");
    }
    let tiny = VirtioNetHeader { gso_size: 1, ..header };
    assert_eq!(tiny.split_encapsulated(&PLAIN_GRE.merges(&payload(4_000))), None, "4,000 segments");
    let nothing = PLAIN_GRE.merges(&[]);
    assert_eq!(header.split_encapsulated(&nothing), None, "no payload");
    for (at, value, what) in [
        (6, 0x20, "a fragment"),
        (7, 1, "the last fragment"),
        (9, 50, "ESP"),
        (20, 0x10, "GRE with a sequence number"),
        (20, 0x40, "GRE with a route"),
        (21, 1, "GRE, version 1"),
        (22, 0x88, "GRE of something else"),
        (24, 0x65, "not the version that GRE says"),
        (24 + 7, 1, "an inner fragment"),
        (24 + 9, protocol::UDP, "inner UDP"),
        (24 + 24 + 12, 0x40, "a TCP header that is too short"),
    ] {
        let mut other = merged.clone();
        other[at] = value;
        assert_eq!(header.split_encapsulated(&other), None, "{what}");
    }
}
