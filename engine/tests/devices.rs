//! The devices against a real kernel, in network namespaces of their own.
//!
//! ```text
//!   namespace "gateway"                 namespace "neighbour"
//!   our sockets   [g0] ----- veth ----- [n0]   the prober, and an ordinary kernel
//!   192.0.2.1/24                        192.0.2.2/24
//! ```
//!
//! They need root (`CAP_NET_ADMIN`, `CAP_SYS_ADMIN`). Without it they say so and pass, except under `CI`, where they
//! fail. No test waits for time to pass: each ends with a packet that must arrive.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails; the helpers are tests, too")]

#[path = "devices/came_back.rs"]
mod came_back;
#[path = "devices/engine.rs"]
mod engine;
#[path = "devices/packets.rs"]
mod packets;
#[path = "devices/publications.rs"]
mod publications;
#[path = "devices/undescribable.rs"]
mod undescribable;
#[path = "devices/world.rs"]
mod world;

use std::io::IoSlice;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};

use packets::{GATEWAY, NEIGHBOR, Probe, tcp_flags};
use tidegate_engine::arena::{Arena, Slot};
use tidegate_engine::clock::Timestamp;
use tidegate_engine::external::arp_socket::ArpSocket;
use tidegate_engine::external::neighbor::{NeighborCache, Resolution};
use tidegate_engine::external::packet_socket::{FilterRules, Frame, PacketSocket, SendFrame};
use tidegate_engine::external::reservation::{PortProtocol, PortReservation};
use tidegate_engine::transport::udp::{UdpOptions, UdpTransport};
use tidegate_engine::transport::{SendTrain, Transport};
use tidegate_engine::tun::{Tun, TunOffloads};
use tidegate_engine::wire::{Gso, GsoKind, Ipv4Packet, Offload, VirtioNetHeader};
use world::{Namespace, external_link, interface_index, interface_mac, ip, pair, privileged, readable, run};

/// Lets in everything for `address` that the NAT could want.
fn everything_for(address: Ipv4Addr) -> FilterRules {
    FilterRules { addresses: vec![address], ports: 0..=u16::MAX, other_protocols: vec![], except_udp: None }
}

/// A packet socket on `name` that hears everything for `address`.
fn listening(name: &str, address: Ipv4Addr) -> PacketSocket {
    let socket = PacketSocket::open(interface_index(name), interface_mac(name)).unwrap();
    socket.set_filter(&everything_for(address)).unwrap();
    socket
}

/// Receives until `count` frames are there, and returns the packets.
fn receive(socket: &mut PacketSocket, count: usize) -> Vec<(Frame, Vec<u8>)> {
    let mut arena = Arena::new(32);
    let mut packets = Vec::new();
    while packets.len() < count {
        assert!(readable(&*socket), "only {} of {count} frames arrived", packets.len());
        let mut frames = Vec::new();
        socket.receive(&mut arena, &slots(32), &mut frames).unwrap();
        packets.extend(frames.iter().map(|&frame| (frame, arena.get(frame.span).to_vec())));
    }
    packets
}

/// The first `count` buffers of an arena, whole.
fn slots(count: usize) -> Vec<Slot> {
    (0..count).map(Slot::whole).collect()
}

/// Sends packets as they are, in one call.
fn send(socket: &mut PacketSocket, destination_mac: [u8; 6], packets: &[Vec<u8>]) {
    let slices: Vec<_> = packets.iter().map(|packet| [IoSlice::new(packet)]).collect();
    let header = VirtioNetHeader::default();
    let frames: Vec<_> = slices.iter().map(|slices| SendFrame { destination_mac, header, slices }).collect();
    let mut refused = Vec::new();
    let outcome = socket.send(&frames, &mut refused);
    assert_eq!((outcome.sent, refused.len()), (packets.len(), 0), "{outcome:?}");
}

#[test]
fn reserved_ports_are_silent_and_the_packet_socket_sees_all() {
    if !privileged() {
        return;
    }
    let (gateway, neighbor) = pair();
    let (reservation, mut ours, mac) = gateway.run(|| {
        let mut reservation = PortReservation::new(10);
        for protocol in [PortProtocol::Tcp, PortProtocol::Udp] {
            let (ports, shortage) = reservation.reserve(protocol, GATEWAY, [40_000], 1);
            assert!(ports == [40_000] && shortage.is_none());
        }
        (reservation, listening("g0", GATEWAY), interface_mac("g0"))
    });
    let heard = neighbor.run(move || {
        let mut prober = listening("n0", NEIGHBOR);
        let to = |port| Probe { source: (NEIGHBOR, 5000), destination: (GATEWAY, port) };
        let mut probes: Vec<_> = [
            tcp_flags::SYN,
            tcp_flags::SYN | tcp_flags::ACK,
            tcp_flags::ACK,
            tcp_flags::PSH | tcp_flags::ACK,
            tcp_flags::FIN | tcp_flags::ACK,
            tcp_flags::RST,
        ]
        .map(|flags| to(40_000).tcp(flags, b"data"))
        .to_vec();
        probes.push(to(40_000).udp(b"probe"));
        // The control: what the kernel answers for ports that nobody reserved.
        probes.push(to(40_001).udp(b"probe"));
        probes.push(to(40_001).tcp(tcp_flags::SYN, b""));
        send(&mut prober, mac, &probes);
        receive(&mut prober, 2).into_iter().map(|(_, packet)| packet).collect::<Vec<_>>()
    });
    assert_eq!(heard.len(), 2, "{heard:?}");
    assert_eq!((heard[0][9], heard[0][20], heard[0][21]), (1, 3, 3), "port unreachable");
    assert_eq!(heard[0][20 + 8 + 20 + 2..][..2], 40_001u16.to_be_bytes());
    assert_eq!((heard[1][9], heard[1][33] & tcp_flags::RST), (6, tcp_flags::RST));
    assert_eq!(heard[1][20..22], 40_001u16.to_be_bytes());

    let seen = gateway.run(move || receive(&mut ours, 9).len());
    assert_eq!(seen, 9);
    drop(reservation);
}

#[test]
fn no_program_gets_a_reserved_port_by_connecting() {
    if !privileged() {
        return;
    }
    let (gateway, neighbor) = pair();
    let listener = neighbor.run(|| TcpListener::bind((NEIGHBOR, 80)).unwrap());
    gateway.run(|| {
        std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", "40000 40003").unwrap();
        let mut reservation = PortReservation::new(10);
        for protocol in [PortProtocol::Tcp, PortProtocol::Udp] {
            assert_eq!(reservation.reserve(protocol, GATEWAY, [40_000, 40_001, 40_003], 3).0.len(), 3);
        }
        let stream = TcpStream::connect((NEIGHBOR, 80)).unwrap();
        assert_eq!(stream.local_addr().unwrap().port(), 40_002);
        let refused = TcpStream::connect((NEIGHBOR, 80)).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EADDRNOTAVAIL));

        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        assert_eq!(socket.local_addr().unwrap().port(), 40_002);
        let refused = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EADDRINUSE));
    });
    drop(listener);
}

#[test]
fn the_hosts_programs_have_what_is_kept_for_them_when_all_other_ports_are_reserved() {
    if !privileged() {
        return;
    }
    let (gateway, neighbor) = pair();
    let listener = neighbor.run(|| TcpListener::bind((NEIGHBOR, 80)).unwrap());
    gateway.run(|| {
        std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", "40000 40399").unwrap();
        let mut reservation = PortReservation::new(1_000);
        reservation.keep(Some((40_300, 40_399)));
        for protocol in [PortProtocol::Tcp, PortProtocol::Udp] {
            assert_eq!(reservation.reserve(protocol, GATEWAY, 40_000..=40_399, 400).0.len(), 300);
        }
        for _ in 0..50 {
            let resolver = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
            resolver.connect((NEIGHBOR, 53)).unwrap();
            let stream = TcpStream::connect((NEIGHBOR, 80)).unwrap();
            for port in [resolver.local_addr(), stream.local_addr()].map(|address| address.unwrap().port()) {
                assert!((40_300..=40_399).contains(&port));
            }
        }
    });
    drop(listener);
}

#[test]
fn a_superpacket_crosses_the_wire_whole() {
    if !privileged() {
        return;
    }
    let (gateway, neighbor) = pair();
    let mac = neighbor.run(|| interface_mac("n0"));
    let mut receiver = neighbor.run(|| listening("n0", NEIGHBOR));
    let probe = Probe { source: (GATEWAY, 40_000), destination: (NEIGHBOR, 50_000) };
    let payload: Vec<u8> = (0..44 * 1400 + 9).map(|i| (i % 253) as u8).collect();
    let (superpacket, header) = probe.tcp_superpacket(&payload, 1400);

    let packet = superpacket.clone();
    let gateway_mac = gateway.run(move || {
        let mut sender = PacketSocket::open(interface_index("g0"), interface_mac("g0")).unwrap();
        // A gather list, as the gateway has it.
        let (head, tail) = packet.split_at(40);
        let mut slices = vec![IoSlice::new(head)];
        slices.extend(tail.chunks(1400).map(IoSlice::new));
        let frame = SendFrame { destination_mac: mac, header, slices: &slices };
        let mut refused = Vec::new();
        let outcome = sender.send(&[frame; 3], &mut refused);
        assert_eq!((outcome.sent, outcome.dropped, refused.len()), (3, 0, 0), "{outcome:?}");
        interface_mac("g0")
    });
    neighbor.run(move || {
        for (frame, bytes) in receive(&mut receiver, 3) {
            let offload = frame.header.offload().unwrap();
            assert_eq!(offload.gso, Some(Gso { kind: GsoKind::Tcp4, segment_size: 1400 }));
            assert_eq!(frame.source_mac, gateway_mac);
            assert!(bytes == superpacket);
        }
        assert_eq!(receiver.statistics().unwrap().overruns, 0);
    });
}

#[test]
fn a_link_without_offloads_gets_right_segments() {
    if !privileged() {
        return;
    }
    let (gateway, neighbor) = pair();
    gateway.run(|| run("ethtool", &["-K", "g0", "tx", "off", "tso", "off", "gso", "off"]));
    neighbor.run(|| run("ethtool", &["-K", "n0", "gro", "off"]));
    let mac = neighbor.run(|| interface_mac("n0"));
    let mut receiver = neighbor.run(|| listening("n0", NEIGHBOR));
    let probe = Probe { source: (GATEWAY, 40_000), destination: (NEIGHBOR, 50_000) };
    let payload: Vec<u8> = (0..20 * 1400 + 9).map(|i| (i % 253) as u8).collect();
    let (packet, header) = probe.tcp_superpacket(&payload, 1400);
    gateway.run(move || {
        let mut sender = PacketSocket::open(interface_index("g0"), interface_mac("g0")).unwrap();
        let slices = [IoSlice::new(&packet)];
        let outcome =
            sender.send(&[SendFrame { destination_mac: mac, header, slices: &slices }], &mut Vec::new());
        assert_eq!(outcome.sent, 1, "{outcome:?}");
    });
    neighbor.run(move || {
        let mut received = Vec::new();
        for (frame, mut bytes) in receive(&mut receiver, 21) {
            assert_eq!(frame.header.offload(), Some(Offload::NONE));
            received.extend_from_slice(&bytes[40..]);
            let packet = Ipv4Packet::parse(&mut bytes, 0, Offload::NONE).unwrap();
            assert!(packet.transport_checksum_ok());
        }
        assert!(received == payload);
    });
}

#[test]
fn a_superpacket_that_the_kernel_refuses_is_given_back() {
    if !privileged() {
        return;
    }
    let (gateway, _neighbor) = pair();
    gateway.run(|| {
        let mut sender = PacketSocket::open(interface_index("g0"), interface_mac("g0")).unwrap();
        let probe = Probe { source: (GATEWAY, 40_000), destination: (NEIGHBOR, 50_000) };
        let (good, good_header) = probe.tcp_superpacket(&[0; 4000], 1400);
        // Claims to be a superpacket with headers longer than the packet itself.
        let mut bad_header = good_header.to_bytes();
        bad_header[2..4].copy_from_slice(&9000u16.to_ne_bytes());
        let bad_header = VirtioNetHeader::from_bytes(bad_header);
        let slices = [IoSlice::new(&good)];
        let frame = |header| SendFrame { destination_mac: [2; 6], header, slices: &slices };
        let mut refused = Vec::new();
        let outcome = sender.send(&[frame(good_header), frame(bad_header), frame(good_header)], &mut refused);
        assert_eq!((outcome.sent, outcome.dropped, refused), (2, 0, vec![1]));

        let too_long = vec![0; 3000];
        let slices = [IoSlice::new(&too_long)];
        let plain =
            SendFrame { destination_mac: [2; 6], header: VirtioNetHeader::default(), slices: &slices };
        let outcome = sender.send(&[plain], &mut Vec::new());
        assert_eq!((outcome.sent, outcome.dropped), (0, 1));
        assert_eq!(outcome.error.and_then(|error| error.raw_os_error()), Some(libc::EMSGSIZE));

        ip(&["link", "set", "g0", "down"]);
        let outcome = sender.send(&[frame(good_header), frame(good_header)], &mut Vec::new());
        assert_eq!((outcome.sent, outcome.dropped), (0, 2 * 3), "a superpacket is lost as its segments");
    });
}

#[test]
fn nothing_is_queued_before_the_filter_is_set() {
    if !privileged() {
        return;
    }
    let (gateway, neighbor) = pair();
    let (mut deaf, mac) = gateway.run(|| {
        (PacketSocket::open(interface_index("g0"), interface_mac("g0")).unwrap(), interface_mac("g0"))
    });
    let probe = |port| Probe { source: (NEIGHBOR, 5000), destination: (GATEWAY, port) };
    let mut prober = neighbor.run(move || {
        let mut prober = PacketSocket::open(interface_index("n0"), interface_mac("n0")).unwrap();
        send(&mut prober, mac, &[probe(1000).udp(b"early")]);
        prober
    });
    deaf.set_filter(&FilterRules { ports: 1024..=65_535, ..everything_for(GATEWAY) }).unwrap();
    neighbor.run(move || {
        send(&mut prober, mac, &[probe(1000).udp(b"low"), probe(2000).udp(b"heard")]);
    });
    let packets = gateway.run(move || receive(&mut deaf, 1));
    assert_eq!(packets.len(), 1);
    assert_eq!(&packets[0].1[28..33], b"heard");
}

#[test]
fn the_fanout_steers_by_port_and_identifier_and_survives_a_link_flap() {
    if !privileged() {
        return;
    }
    const SHARDS: u8 = 3;
    let (gateway, neighbor) = pair();
    let (mut sockets, mac) = gateway.run(|| {
        let mac = interface_mac("g0");
        let sockets: Vec<_> =
            (0..SHARDS).map(|_| PacketSocket::open(interface_index("g0"), mac).unwrap()).collect();
        let group = sockets[0].join_fanout(None, SHARDS).unwrap();
        for socket in &sockets[1..] {
            assert_eq!(socket.join_fanout(Some(group), SHARDS).unwrap(), group);
        }
        sockets.iter().for_each(|socket| socket.set_filter(&everything_for(GATEWAY)).unwrap());
        (sockets, mac)
    });
    let mut prober = neighbor.run(|| PacketSocket::open(interface_index("n0"), interface_mac("n0")).unwrap());

    for round in 0..2 {
        let ports = 40_000..40_030u16;
        let probe = |port| Probe { source: (NEIGHBOR, 5000), destination: (GATEWAY, port) };
        let mut probes = Vec::new();
        for port in ports.clone() {
            probes.push(probe(port).udp(&port.to_be_bytes()));
            probes.push(probe(port).with_options(probe(port).tcp(tcp_flags::ACK, &port.to_be_bytes())));
            probes.extend([0, 14].map(|kind| probe(0).icmp_reply(kind, port))); // to echo, to timestamp
        }
        // To shard 0, whatever their ports: a fragment and an ICMP error.
        probes.push(probe(40_001).fragment(probe(40_001).udp(b"fragment")));
        probes.push(probe(0).icmp_error());
        let total = probes.len();
        prober = neighbor.run(move || {
            for chunk in probes.chunks(40) {
                send(&mut prober, mac, chunk);
            }
            prober
        });
        sockets = gateway.run(move || {
            for (shard, socket) in sockets.iter_mut().enumerate() {
                let expected = 4 * 10 + if shard == 0 { 2 } else { 0 };
                let packets = receive(socket, expected);
                assert_eq!(packets.len(), expected, "shard {shard} of {total}, round {round}");
                for (_, packet) in packets {
                    let at = usize::from(packet[0] & 15) * 4;
                    let word = |at: usize| u16::from_be_bytes([packet[at], packet[at + 1]]);
                    match (packet[9], word(6) & 0x3fff, packet[at]) {
                        (1, 0, 0 | 14) => assert_eq!(word(at + 4) % 3, shard as u16),
                        (6 | 17, 0, _) => assert_eq!(word(at + 2) % 3, shard as u16),
                        _ => assert_eq!(shard, 0),
                    }
                }
            }
            // The kernel unhooks the sockets while the link is down, and tells each of them once.
            ip(&["link", "set", "g0", "down"]);
            ip(&["link", "set", "g0", "up"]);
            for socket in &mut sockets {
                let error = socket.receive(&mut Arena::new(1), &slots(1), &mut Vec::new()).unwrap_err();
                assert_eq!(error.raw_os_error(), Some(libc::ENETDOWN));
                assert_eq!(socket.receive(&mut Arena::new(1), &slots(1), &mut Vec::new()).unwrap(), 0);
            }
            sockets
        });
    }
}

#[test]
fn a_neighbour_is_resolved_by_arp() {
    if !privileged() {
        return;
    }
    let (gateway, neighbor) = pair();
    let expected = neighbor.run(|| interface_mac("n0"));
    gateway.run(move || {
        let socket = ArpSocket::open(interface_index("g0"), &[GATEWAY]).unwrap();
        let mut cache = NeighborCache::<()>::new(external_link());
        let now = Timestamp::from_secs(1);
        assert_eq!(cache.resolve(NEIGHBOR, None, now), Resolution::Pending);
        cache.poll(now, |frame| socket.send(&frame).unwrap(), drop);
        assert!(readable(&socket));
        let mut buffer = [0; 128];
        let frame = socket.receive(&mut buffer).unwrap().unwrap();
        assert_eq!(cache.receive(frame, now), Ok(NEIGHBOR));
        assert_eq!(cache.resolve(NEIGHBOR, None, now), Resolution::Known(expected));
    });
}

#[test]
fn datagrams_are_steered_by_receiver_index_to_the_shard_that_gave_it() {
    if !privileged() {
        return;
    }
    const SHARDS: u8 = 4;
    Namespace::new().run(|| {
        ip(&["link", "set", "lo", "up"]);
        let listen = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 51_820);
        let options = UdpOptions { reuse_port: true, ..UdpOptions::default() };
        let open = || UdpTransport::open(listen, options).unwrap();
        let mut shards = vec![open()];
        shards[0].steer_by_receiver_index(SHARDS).unwrap();
        shards.extend((1..SHARDS).map(|_| open()));
        let mut message = |kind: u8, index_at: usize, index: u8| {
            // From a new port each time, so that a hash of the addresses would scatter them.
            let from = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0);
            let mut client = UdpTransport::open(from, UdpOptions::default()).unwrap();
            let mut bytes = [0x5a; 32];
            bytes[0] = kind;
            bytes[index_at] = index;
            let outcome = client.send(&[SendTrain { to: listen.into(), bytes: &bytes, segment_size: 32 }]);
            assert_eq!(outcome.sent, 1);
            let mut arena = Arena::new(2);
            let received =
                shards.iter_mut().map(|shard| shard.receive(&mut arena, &slots(2), &mut Vec::new()).unwrap());
            let counts: Vec<_> = received.collect();
            assert_eq!(counts.iter().sum::<usize>(), 1);
            counts.iter().position(|&count| count == 1).unwrap() as u8
        };
        for index in 0..16 {
            assert_eq!(message(1, 4, index), 0, "initiation");
            assert_eq!(message(2, 8, index), index % SHARDS, "response");
            assert_eq!(message(3, 4, index), index % SHARDS, "cookie reply");
            assert_eq!(message(4, 4, index), index % SHARDS, "data");
            assert_eq!(message(200, 4, index), 0, "no WireGuard");
        }
    });
}

#[test]
fn the_tun_device_hands_over_superpackets_of_udp_and_tcp() {
    if !privileged() {
        return;
    }
    Namespace::new().run(|| {
        std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
        let mut tun = Tun::open("tide%d", TunOffloads { tso: true, uso: true }).unwrap();
        assert_eq!(tun.name(), "tide0");
        assert_eq!(tun.offloads(), TunOffloads { tso: true, uso: true });
        ip(&["address", "add", "192.0.2.1/24", "dev", "tide0"]);
        ip(&["link", "set", "tide0", "mtu", "1400", "up"]);
        let mut arena = Arena::new(1);
        let mut next = |tun: &mut Tun| loop {
            assert!(readable(&*tun));
            if let Some(received) = tun.receive(&mut arena, 0, 0).unwrap() {
                return (received.offload, arena.get(received.span).to_vec());
            }
        };

        // UDP: a train becomes one superpacket.
        let mut socket = UdpTransport::open(SocketAddrV4::new(GATEWAY, 0), UdpOptions::default()).unwrap();
        let train =
            SendTrain { to: SocketAddrV4::new(NEIGHBOR, 9).into(), bytes: &[7; 10_000], segment_size: 1000 };
        assert_eq!(socket.send(&[train]).sent, 10);
        let (header, packet) = next(&mut tun);
        let gso = header.offload().unwrap().gso;
        assert_eq!(gso, Some(Gso { kind: GsoKind::Udp4, segment_size: 1000 }));
        assert_eq!(packet.len(), 28 + 10_000);

        // TCP: we play the other end of a connection; once it stands, the kernel sends a superpacket.
        let client = std::thread::spawn(|| {
            use std::io::Write;
            let mut stream = TcpStream::connect((NEIGHBOR, 80)).unwrap();
            stream.write_all(&[9; 60_000]).unwrap();
            stream
        });
        let (_, syn) = next(&mut tun);
        let port = u16::from_be_bytes([syn[20], syn[21]]);
        let sequence = u32::from_be_bytes([syn[24], syn[25], syn[26], syn[27]]);
        let probe = Probe { source: (NEIGHBOR, 80), destination: (GATEWAY, port) };
        let answer = probe.syn_ack(sequence.wrapping_add(1), 1000);
        tun.try_clone().unwrap().send(VirtioNetHeader::default(), &[IoSlice::new(&answer)]).unwrap();
        let superpacket = loop {
            let (header, packet) = next(&mut tun);
            if header.offload().unwrap().gso.is_some() {
                break (header, packet);
            }
        };
        let gso = superpacket.0.offload().unwrap().gso;
        assert_eq!(gso, Some(Gso { kind: GsoKind::Tcp4, segment_size: 1000 }));
        assert!(superpacket.1.len() > 5000, "{}", superpacket.1.len());
        drop(client.join().unwrap());
    });
}

#[test]
fn a_superpacket_is_injected_through_the_tun_device() {
    if !privileged() {
        return;
    }
    Namespace::new().run(|| {
        let tun = Tun::open("tide0", TunOffloads { tso: true, uso: true }).unwrap();
        ip(&["address", "add", "192.0.2.1/24", "dev", "tide0"]);
        ip(&["link", "set", "tide0", "up"]);
        let mut receiver =
            UdpTransport::open(SocketAddrV4::new(GATEWAY, 4000), UdpOptions::default()).unwrap();
        let probe = Probe { source: (NEIGHBOR, 5000), destination: (GATEWAY, 4000) };
        let (packet, header) = probe.udp_superpacket(&[3; 5500], 1000);
        let (head, tail) = packet.split_at(28);
        tun.send(header, &[IoSlice::new(head), IoSlice::new(tail)]).unwrap();
        assert!(readable(&receiver));
        let mut trains = Vec::new();
        let mut arena = Arena::new(8);
        receiver.receive(&mut arena, &slots(8), &mut trains).unwrap();
        let lengths: Vec<_> =
            trains.iter().flat_map(|train| train.datagrams()).map(|span| span.len).collect();
        assert_eq!(lengths, [1000, 1000, 1000, 1000, 1000, 500]);
    });
}

#[test]
fn the_tun_device_opens_with_the_offloads_that_were_wanted_and_once() {
    if !privileged() {
        return;
    }
    Namespace::new().run(|| {
        for (tso, uso) in [(false, false), (true, false), (false, true), (true, true)] {
            let wanted = TunOffloads { tso, uso };
            // A new name each time: a child that another test has forked may hold a closed device until it execs.
            let tun = Tun::open("tide%d", wanted).unwrap();
            assert_eq!(tun.offloads(), wanted);
            let error = Tun::open(tun.name(), wanted).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EBUSY));
            let text = format!("cannot create the TUN device {}: ", tun.name());
            assert!(error.to_string().starts_with(&text), "{error}");
        }
    });
}
