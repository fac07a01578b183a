//! Packets made and read by hand: nothing here calls the engine's own arithmetic.

use std::net::{Ipv4Addr, SocketAddrV4};

pub const ICMP: u8 = 1;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;

pub const FIN: u8 = 0x01;
pub const SYN: u8 = 0x02;
pub const RST: u8 = 0x04;
pub const PSH: u8 = 0x08;
pub const ACK: u8 = 0x10;
pub const ECE: u8 = 0x40;
pub const CWR: u8 = 0x80;

pub const DF: u16 = 0x4000;
pub const MF: u16 = 0x2000;

/// The textbook's one's-complement sum (RFC 1071 §4.1), not complemented.
pub fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The sum of the pseudo-header of a segment of `len` bytes.
pub fn pseudo_sum(source: Ipv4Addr, destination: Ipv4Addr, protocol: u8, len: usize) -> u16 {
    let mut bytes = [source.octets(), destination.octets()].concat();
    bytes.extend([0, protocol]);
    bytes.extend((len as u16).to_be_bytes());
    sum(&bytes)
}

fn add(a: u16, b: u16) -> u16 {
    sum(&[a.to_be_bytes(), b.to_be_bytes()].concat())
}

pub fn half(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

pub fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from(half(bytes, at)) << 16 | u32::from(half(bytes, at + 2))
}

pub fn put(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

pub fn endpoint(address: Ipv4Addr, port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(address, port)
}

/// Distinguishable payload bytes.
pub fn payload(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 251 + i / 65_521) as u8).collect()
}

/// One IPv4 packet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ip {
    pub source: Ipv4Addr,
    pub destination: Ipv4Addr,
    pub protocol: u8,
    pub tos: u8,
    pub ttl: u8,
    pub identification: u16,
    /// Flags and fragment offset as they stand on the wire.
    pub fragment: u16,
    pub options: Vec<u8>,
    /// Transport header and data.
    pub body: Vec<u8>,
}

/// The TCP header's fields but for the ports.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Tcp {
    pub sequence: u32,
    pub acknowledgment: u32,
    pub flags: u8,
    pub window: u16,
    pub options: Vec<u8>,
}

impl Ip {
    pub fn new(source: Ipv4Addr, destination: Ipv4Addr, protocol: u8, body: Vec<u8>) -> Self {
        let (tos, ttl, identification, fragment) = (0, 64, 0x1234, 0);
        let options = Vec::new();
        Self { source, destination, protocol, tos, ttl, identification, fragment, options, body }
    }

    pub fn udp(source: SocketAddrV4, destination: SocketAddrV4, data: &[u8]) -> Self {
        let mut body =
            [source.port(), destination.port(), 8 + data.len() as u16, 0].map(u16::to_be_bytes).concat();
        body.extend(data);
        Self::new(*source.ip(), *destination.ip(), UDP, body).summed()
    }

    /// With DF, as every TCP sends.
    pub fn tcp(source: SocketAddrV4, destination: SocketAddrV4, header: &Tcp, data: &[u8]) -> Self {
        let mut body = [source.port(), destination.port()].map(u16::to_be_bytes).concat();
        body.extend(header.sequence.to_be_bytes());
        body.extend(header.acknowledgment.to_be_bytes());
        assert_eq!(header.options.len() % 4, 0);
        body.extend([((20 + header.options.len()) * 4) as u8, header.flags]);
        body.extend(header.window.to_be_bytes());
        body.extend([0; 4]);
        body.extend(&header.options);
        body.extend(data);
        Self { fragment: DF, ..Self::new(*source.ip(), *destination.ip(), TCP, body) }.summed()
    }

    /// An echo request (8) or reply (0).
    pub fn echo(
        kind: u8,
        source: Ipv4Addr,
        destination: Ipv4Addr,
        id: u16,
        sequence: u16,
        data: &[u8],
    ) -> Self {
        let mut body = vec![kind, 0, 0, 0];
        body.extend(id.to_be_bytes());
        body.extend(sequence.to_be_bytes());
        body.extend(data);
        Self::new(source, destination, ICMP, body).summed()
    }

    /// An ICMP error that quotes the first `quote` bytes of what came.
    pub fn icmp_error(from: Ipv4Addr, about: &Self, kind: u8, code: u8, word: u16, quote: usize) -> Self {
        let quoted = about.bytes();
        let mut body = vec![kind, code, 0, 0, 0, 0];
        body.extend(word.to_be_bytes());
        body.extend(&quoted[..quoted.len().min(quote)]);
        Self::new(from, about.source, ICMP, body).summed()
    }

    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    pub fn dont_fragment(self) -> Self {
        self.with(|ip| ip.fragment = DF)
    }

    /// With a right transport checksum.
    pub fn summed(mut self) -> Self {
        if let Some(at) = self.checksum_at() {
            put(&mut self.body, at, 0);
            let sum = !self.covered_sum();
            put(&mut self.body, at, if sum == 0 && self.protocol == UDP { 0xffff } else { sum });
        }
        self
    }

    /// With the pseudo-header's sum in the checksum field, as a sender leaves it to its network card.
    pub fn partial(mut self) -> Self {
        if let (Some(at), true) = (self.checksum_at(), self.protocol != ICMP) {
            let sum = pseudo_sum(self.source, self.destination, self.protocol, self.body.len());
            put(&mut self.body, at, sum);
        }
        self
    }

    /// Where in the body the transport checksum stands.
    pub fn checksum_at(&self) -> Option<usize> {
        match self.protocol {
            TCP => Some(16),
            UDP => Some(6),
            ICMP => Some(2),
            _ => None,
        }
    }

    fn covered_sum(&self) -> u16 {
        let sum = sum(&self.body);
        if self.protocol == ICMP {
            return sum;
        }
        add(sum, pseudo_sum(self.source, self.destination, self.protocol, self.body.len()))
    }

    pub fn header_len(&self) -> usize {
        20 + self.options.len()
    }

    pub fn len(&self) -> usize {
        self.header_len() + self.body.len()
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut header = vec![0x40 | (self.header_len() / 4) as u8, self.tos];
        header.extend((self.len() as u16).to_be_bytes());
        header.extend(self.identification.to_be_bytes());
        header.extend(self.fragment.to_be_bytes());
        header.extend([self.ttl, self.protocol, 0, 0]);
        header.extend(self.source.octets());
        header.extend(self.destination.octets());
        header.extend(&self.options);
        let sum = !sum(&header);
        put(&mut header, 10, sum);
        [header, self.body.clone()].concat()
    }

    /// Reads a packet as it stands on a wire. Whatever is wrong with its header fails the test.
    pub fn parse(bytes: &[u8]) -> Self {
        let header_len = usize::from(bytes[0] & 15) * 4;
        assert_eq!(bytes[0] >> 4, 4, "not IPv4");
        assert_eq!(usize::from(half(bytes, 2)), bytes.len(), "total length");
        assert_eq!(sum(&bytes[..header_len]), 0xffff, "IP header checksum");
        Self {
            source: Ipv4Addr::from(word(bytes, 12)),
            destination: Ipv4Addr::from(word(bytes, 16)),
            protocol: bytes[9],
            tos: bytes[1],
            ttl: bytes[8],
            identification: half(bytes, 4),
            fragment: half(bytes, 6),
            options: bytes[20..header_len].to_vec(),
            body: bytes[header_len..].to_vec(),
        }
    }

    /// Like [`Self::parse`], and verifies the transport checksum of what is no fragment.
    pub fn verify(bytes: &[u8]) -> Self {
        let ip = Self::parse(bytes);
        if !ip.is_fragment() {
            ip.verify_checksum();
        }
        ip
    }

    pub fn verify_checksum(&self) {
        let Some(at) = self.checksum_at() else { return };
        if self.protocol == UDP {
            assert_eq!(usize::from(half(&self.body, 4)), self.body.len(), "UDP length");
        }
        let none = self.protocol == UDP && half(&self.body, at) == 0;
        assert!(none || self.covered_sum() == 0xffff, "transport checksum of {self:?}");
    }

    pub fn is_fragment(&self) -> bool {
        self.fragment & 0x3fff != 0
    }

    pub fn offset(&self) -> usize {
        usize::from(self.fragment & 0x1fff) * 8
    }

    pub fn more_fragments(&self) -> bool {
        self.fragment & MF != 0
    }

    pub fn from(&self) -> SocketAddrV4 {
        endpoint(self.source, half(&self.body, 0))
    }

    pub fn to(&self) -> SocketAddrV4 {
        endpoint(self.destination, half(&self.body, 2))
    }

    /// Type and code of an ICMP message.
    pub fn icmp(&self) -> (u8, u8) {
        assert_eq!(self.protocol, ICMP);
        (self.body[0], self.body[1])
    }

    pub fn identifier(&self) -> u16 {
        half(&self.body, 4)
    }

    /// The last word of an ICMP error's header: the MTU of *fragmentation needed*.
    pub fn mtu(&self) -> u16 {
        half(&self.body, 6)
    }

    /// The headers that an ICMP error quotes. Its IP header must be right; it may claim more than is quoted.
    pub fn quoted(&self) -> Self {
        let quote = &self.body[8..];
        let mut whole = quote.to_vec();
        whole.resize(usize::from(half(quote, 2)), 0);
        let mut ip = Self::parse(&whole);
        ip.body.truncate(quote.len() - ip.header_len());
        ip
    }

    pub fn tcp_header(&self) -> Tcp {
        assert_eq!(self.protocol, TCP);
        let header_len = usize::from(self.body[12] >> 4) * 4;
        Tcp {
            sequence: word(&self.body, 4),
            acknowledgment: word(&self.body, 8),
            flags: self.body[13],
            window: half(&self.body, 14),
            options: self.body[20..header_len].to_vec(),
        }
    }

    /// What follows the transport header.
    pub fn data(&self) -> &[u8] {
        match self.protocol {
            TCP => &self.body[usize::from(self.body[12] >> 4) * 4..],
            _ => &self.body[8..],
        }
    }

    /// RFC 791 §3.2, for packets without options.
    pub fn fragments(&self, mtu: usize) -> Vec<Self> {
        assert!(self.options.is_empty());
        let size = (mtu - 20) / 8 * 8;
        let count = self.body.len().div_ceil(size);
        let piece = |(i, body): (usize, &[u8])| {
            let more = if i + 1 < count { MF } else { 0 };
            let fragment = (self.fragment & DF) | more | (i * size / 8) as u16;
            Self { fragment, body: body.to_vec(), ..self.clone() }
        };
        self.body.chunks(size).enumerate().map(piece).collect()
    }
}

/// Puts fragments together by the book; they must fit without gap and overlap, whatever their order.
pub fn reassemble(fragments: &[Ip]) -> Ip {
    let mut sorted = fragments.to_vec();
    sorted.sort_by_key(Ip::offset);
    let mut whole = Ip { body: Vec::new(), ..sorted[0].clone() };
    for (i, fragment) in sorted.iter().enumerate() {
        assert_eq!(fragment.offset(), whole.body.len(), "a gap or an overlap");
        assert_eq!(fragment.more_fragments(), i + 1 < sorted.len());
        assert_eq!(
            (fragment.source, fragment.destination, fragment.identification),
            (whole.source, whole.destination, whole.identification)
        );
        whole.body.extend(&fragment.body);
    }
    whole.fragment &= DF;
    whole.verify_checksum();
    whole
}
