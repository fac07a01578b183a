//! What a kernel does with a packet and its virtio-net header, written down from its documentation (Linux,
//! Documentation/networking/{checksum-offloads,segmentation-offloads}.rst) and without the engine's own code.

use super::packets::{CWR, FIN, Ip, PSH, TCP, UDP, half, pseudo_sum, put, sum, word};

const NEEDS_CSUM: u8 = 1; // VIRTIO_NET_HDR_F_NEEDS_CSUM
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

/// `struct virtio_net_hdr`.
struct Header {
    flags: u8,
    gso_type: u8,
    hdr_len: usize,
    gso_size: usize,
    csum_start: usize,
    csum_offset: usize,
}

impl Header {
    fn read(bytes: [u8; 10]) -> Self {
        let native = |at: usize| usize::from(u16::from_ne_bytes([bytes[at], bytes[at + 1]]));
        Self {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: native(2),
            gso_size: native(4),
            csum_start: native(6),
            csum_offset: native(8),
        }
    }
}

/// The virtio-net header of a superpacket that a sender's kernel hands over.
pub fn superpacket_header(packet: &Ip, gso_size: usize, link_header: usize) -> [u8; 10] {
    let start = packet.header_len();
    let (kind, header_len, offset) = match packet.protocol {
        TCP => (GSO_TCPV4, usize::from(packet.body[12] >> 4) * 4, 16u16),
        _ => (GSO_UDP_L4, 8, 6),
    };
    let ecn = if packet.protocol == TCP && packet.body[13] & CWR != 0 { GSO_ECN } else { 0 };
    let words =
        [(link_header + start + header_len) as u16, gso_size as u16, (link_header + start) as u16, offset];
    let mut bytes = vec![NEEDS_CSUM, kind | ecn];
    bytes.extend(words.map(u16::to_ne_bytes).concat());
    bytes.try_into().unwrap()
}

/// The packets on the wire.
pub fn transmit(virtio: [u8; 10], packet: &[u8], link_header: usize) -> Vec<Vec<u8>> {
    let header = Header::read(virtio);
    let ip_len = usize::from(packet[0] & 15) * 4;
    let is_partial = header.flags & NEEDS_CSUM != 0;
    if is_partial {
        assert_eq!(header.csum_start, link_header + ip_len, "csum_start");
        assert_eq!(header.csum_offset, if packet[9] == UDP { 6 } else { 16 }, "csum_offset");
        let at = ip_len + header.csum_offset;
        let ip = Ip::parse(packet);
        let expected = pseudo_sum(ip.source, ip.destination, ip.protocol, ip.body.len());
        let found = half(packet, at);
        assert!(
            found == expected || (found ^ expected) == 0xffff && (found == 0 || expected == 0),
            "partial checksum"
        );
    }
    if header.gso_type == GSO_NONE {
        let mut packet = packet.to_vec();
        if is_partial {
            let at = ip_len + header.csum_offset;
            let sum = !sum(&packet[ip_len..]);
            let is_zero = sum == 0 && packet[9] == UDP;
            put(&mut packet, at, if is_zero { 0xffff } else { sum });
        }
        return vec![packet];
    }
    assert!(is_partial, "a superpacket's checksum is partial");
    assert!(header.gso_size > 0, "gso_size");
    let segments = match header.gso_type & !GSO_ECN {
        GSO_TCPV4 => tcp_segments(&header, packet, link_header),
        GSO_UDP_L4 => udp_segments(&header, packet, link_header),
        other => panic!("gso_type {other}"),
    };
    assert!(segments.len() > 1, "a superpacket stands for several");
    segments.iter().map(Ip::bytes).collect()
}

fn tcp_segments(header: &Header, packet: &[u8], link_header: usize) -> Vec<Ip> {
    let whole = Ip::parse(packet);
    let tcp_len = usize::from(whole.body[12] >> 4) * 4;
    assert_eq!(header.hdr_len, link_header + whole.header_len() + tcp_len, "hdr_len");
    let (tcp, data) = whole.body.split_at(tcp_len);
    assert!(tcp[13] & CWR == 0 || header.gso_type & GSO_ECN != 0, "CWR wants the ECN flag");
    let chunks: Vec<&[u8]> = data.chunks(header.gso_size).collect();
    let mut segments = Vec::new();
    for (i, chunk) in chunks.iter().enumerate() {
        let mut body = [tcp, chunk].concat();
        let sequence = word(tcp, 4).wrapping_add((i * header.gso_size) as u32);
        body[4..8].copy_from_slice(&sequence.to_be_bytes());
        if i > 0 {
            body[13] &= !CWR;
        }
        if i + 1 < chunks.len() {
            body[13] &= !(FIN | PSH);
        }
        let identification = whole.identification.wrapping_add(i as u16);
        segments.push(Ip { identification, body, ..whole.clone() }.summed());
    }
    segments
}

fn udp_segments(header: &Header, packet: &[u8], link_header: usize) -> Vec<Ip> {
    let whole = Ip::parse(packet);
    assert_eq!(header.hdr_len, link_header + whole.header_len() + 8, "hdr_len");
    let (udp, data) = whole.body.split_at(8);
    let chunks = data.chunks(header.gso_size).enumerate();
    let segment = |(i, chunk): (usize, &[u8])| {
        let mut body = [udp, chunk].concat();
        put(&mut body, 4, 8 + chunk.len() as u16);
        let identification = whole.identification.wrapping_add(i as u16);
        Ip { identification, body, ..whole.clone() }.summed()
    };
    chunks.map(segment).collect()
}
