use super::*;
use crate::bpf::interpreter::run;

const OURS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);
const PACKET_OTHERHOST: u32 = 3;

fn rules() -> FilterRules {
    FilterRules {
        addresses: vec![OURS],
        ports: 1024..=60_000,
        other_protocols: vec![],
        except_udp: Some(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 51_820)),
    }
}

/// An IPv4 packet with `options` words of IP options and a transport header of 8 bytes.
fn packet(to: Ipv4Addr, protocol: u8, transport: [u8; 8], options: u8, fragment: u16) -> Vec<u8> {
    let mut bytes = vec![0x45 + options, 0, 0, 28, 0, 0];
    bytes.extend(fragment.to_be_bytes());
    bytes.extend([64, protocol, 0, 0, 198, 51, 100, 1]);
    bytes.extend(to.octets());
    bytes.extend(vec![1; usize::from(options) * 4]);
    bytes.extend(transport);
    bytes
}

fn to_port(port: u16) -> [u8; 8] {
    let [high, low] = port.to_be_bytes();
    [0, 80, high, low, 0, 8, 0, 0]
}

fn kept(rules: &FilterRules, packet: &[u8]) -> bool {
    let frame = [&[0; 12][..], &[8, 0], packet].concat();
    run(&filter_program(rules).unwrap(), &frame, PACKET_HOST) == KEEP
}

#[test]
fn a_protocol_without_ports_is_let_in_if_it_is_somebodys() {
    const GRE: u8 = 47;
    let packet = packet(OURS, GRE, [0; 8], 0, 0);
    assert!(!kept(&rules(), &packet));
    let passing = FilterRules { other_protocols: vec![50, GRE], ..rules() };
    assert!(kept(&passing, &packet));
    assert!(kept(&passing, &self::packet(OURS, 6, to_port(2_000), 0, 0)));
    let every = FilterRules { other_protocols: (100..132).collect(), ..rules() };
    assert_eq!(every.other_protocols.len(), MAX_OTHER_PROTOCOLS);
    assert!(kept(&every, &self::packet(OURS, 131, [0; 8], 0, 0)));
    assert!(!kept(&every, &packet));
}

#[test]
fn only_ports_that_may_be_the_nats_are_let_in() {
    for options in [0, 3, 10] {
        for (protocol, port, expected) in [
            (protocol::TCP, 1023, false),
            (protocol::TCP, 1024, true),
            (protocol::TCP, 51_820, true),
            (protocol::TCP, 60_000, true),
            (protocol::TCP, 60_001, false),
            (protocol::UDP, 1024, true),
            (protocol::UDP, 51_820, false),
            (protocol::UDP, 22, false),
            (47, 2000, false), // GRE
        ] {
            let packet = packet(OURS, protocol, to_port(port), options, 0x4000);
            assert_eq!(kept(&rules(), &packet), expected, "{protocol} {port}, {options} options");
        }
    }
    let all = FilterRules { ports: 0..=u16::MAX, except_udp: None, ..rules() };
    assert!([0, 1, u16::MAX].iter().all(|&port| kept(&all, &packet(OURS, 17, to_port(port), 0, 0))));
}

#[test]
fn where_the_gateway_listens_on_one_address_the_port_is_the_nats_on_the_others() {
    let other = Ipv4Addr::new(192, 0, 2, 11);
    let listening_on = |address| FilterRules {
        addresses: vec![OURS, other],
        except_udp: Some(SocketAddrV4::new(address, 51_820)),
        ..rules()
    };
    let inside = Ipv4Addr::new(10, 0, 0, 5);
    for (listen, expected) in [
        (Ipv4Addr::UNSPECIFIED, [false, false]),
        (OURS, [false, true]),
        (other, [true, false]),
        (inside, [true, true]),
    ] {
        let rules = listening_on(listen);
        let kept_at = |to| kept(&rules, &packet(to, protocol::UDP, to_port(51_820), 3, 0));
        assert_eq!([OURS, other].map(kept_at), expected, "on {listen}");
        assert!(kept(&rules, &packet(OURS, protocol::TCP, to_port(51_820), 0, 0)), "TCP has its own ports");
        assert!(!kept(&rules, &packet(other, protocol::UDP, to_port(22), 0, 0)));
        assert!(!kept(&rules, &packet(inside, protocol::UDP, to_port(2_000), 0, 0)));
    }
}

#[test]
fn only_icmp_that_answers_us_is_let_in() {
    for kind in 0..=255u8 {
        let packet = packet(OURS, protocol::ICMP, [kind, 0, 0, 0, 0, 0, 0, 0], 2, 0);
        assert_eq!(kept(&rules(), &packet), [0, 3, 11, 12, 14].contains(&kind), "type {kind}");
    }
}

#[test]
fn fragments_are_let_in_whatever_they_begin_with() {
    for fragment in [0x2000, 0x2001, 0x0001, 0x1fff] {
        assert!(kept(&rules(), &packet(OURS, protocol::UDP, to_port(22), 0, fragment)));
    }
}

#[test]
fn only_our_addresses_are_let_in() {
    let many: Vec<_> = (0..MAX_ADDRESSES as u8).map(|i| Ipv4Addr::new(203, 0, 113, i)).collect();
    let rules = FilterRules { addresses: many.clone(), ..rules() };
    assert!(many.iter().all(|&address| kept(&rules, &packet(address, 6, to_port(2000), 0, 0))));
    assert!(!kept(&rules, &packet(OURS, 6, to_port(2000), 0, 0)));
    let none = FilterRules { addresses: vec![], ..rules };
    assert!(!kept(&none, &packet(OURS, 6, to_port(2000), 0, 0)));
}

#[test]
fn frames_for_other_hosts_and_of_other_protocols_are_not_let_in() {
    let program = filter_program(&rules()).unwrap();
    let mut frame = [&[0; 12][..], &[8, 0], &packet(OURS, 6, to_port(2000), 0, 0)].concat();
    assert_eq!(run(&program, &frame, PACKET_HOST), KEEP);
    assert_eq!(run(&program, &frame, PACKET_OTHERHOST), DROP);
    frame[12..14].copy_from_slice(&0x86ddu16.to_be_bytes());
    assert_eq!(run(&program, &frame, PACKET_HOST), DROP);
}

#[test]
fn truncated_frames_are_not_let_in() {
    let program = filter_program(&rules()).unwrap();
    let frame = [&[0; 12][..], &[8, 0], &packet(OURS, 6, to_port(2000), 0, 0)].concat();
    let needed = 14 + 20 + 4; // up to the destination port
    for len in 0..frame.len() {
        let expected = if len < needed { DROP } else { KEEP };
        assert_eq!(run(&program, &frame[..len], PACKET_HOST), expected, "{len} bytes");
    }
}

#[test]
fn a_packet_goes_to_the_shard_of_its_port_or_identifier() {
    let program = fanout_program(3).unwrap();
    let shard = |packet: &[u8]| run(&program, packet, PACKET_HOST);
    for options in [0, 5] {
        for port in [1024, 1025, 1026, 40_000, 65_535] {
            for protocol in [protocol::TCP, protocol::UDP] {
                assert_eq!(shard(&packet(OURS, protocol, to_port(port), options, 0)), u32::from(port) % 3);
            }
        }
        let [high, low] = 50_000u16.to_be_bytes();
        for kind in [0, 14] {
            let reply = packet(OURS, protocol::ICMP, [kind, 0, 9, 9, high, low, 0, 1], options, 0);
            assert_eq!(shard(&reply), 50_000 % 3, "type {kind}");
        }
        let error = packet(OURS, protocol::ICMP, [3, 0, 9, 9, high, low, 0, 1], options, 0);
        assert_eq!(shard(&error), 0);
    }
    assert_eq!(shard(&packet(OURS, protocol::UDP, to_port(50_000), 0, 0x2000)), 0);
    assert_eq!(shard(&[]), 0);
}

#[test]
fn the_offload_metadata_of_a_frame_counts_from_its_ip_header() {
    let header: Vec<u8> = [[1, 1].to_vec(), 54u16.to_ne_bytes().to_vec(), 1448u16.to_ne_bytes().to_vec()]
        .into_iter()
        .chain([34u16.to_ne_bytes().to_vec(), 16u16.to_ne_bytes().to_vec()])
        .flatten()
        .collect();
    let frame = [&header[..], &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 8, 0], &[0x45; 40]].concat();
    let parsed = parse_frame(&frame, Slot { buffer: 5, start: 100 }).unwrap();
    assert_eq!(parsed.span, Span::new(5, 124..164));
    assert_eq!(parsed.source_mac, [7, 8, 9, 10, 11, 12]);
    let bytes = parsed.header.to_bytes();
    assert_eq!(bytes[2..4], 40u16.to_ne_bytes());
    assert_eq!(bytes[6..8], 20u16.to_ne_bytes());
    assert!((0..24).all(|len| parse_frame(&frame[..len], Slot::whole(0)).is_none()));
}
