use super::*;
use crate::bpf::interpreter::run;

fn loopback(gso: bool, gro: bool) -> UdpTransport {
    let listen = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0);
    UdpTransport::open(listen, UdpOptions { gso, gro, ..UdpOptions::default() }).unwrap()
}

/// Receives until `bytes` bytes are there.
fn receive(transport: &mut UdpTransport, arena: &mut Arena, bytes: usize) -> Vec<ReceivedTrain> {
    let epoll = crate::wake::Epoll::new().unwrap();
    epoll.add(&*transport, 0).unwrap();
    let mut events = crate::wake::Readiness::with_capacity(1);
    let mut trains = Vec::new();
    while trains.iter().map(|train: &ReceivedTrain| train.span.len as usize).sum::<usize>() < bytes {
        epoll.wait(&mut events, Some(std::time::Duration::from_secs(5))).unwrap();
        assert!(events.tokens().count() > 0, "only {trains:?} arrived");
        let next = trains.len();
        let slots: Vec<_> = (next..arena.len()).map(Slot::whole).collect();
        transport.receive(arena, &slots, &mut trains).unwrap();
    }
    trains
}

#[test]
fn a_message_is_steered_by_the_lowest_byte_of_its_receiver_index() {
    let program = receiver_index_program(4).unwrap();
    let message = |kind: u8| [kind, 0, 0, 0, 7, 1, 2, 3, 6, 4, 5, 6, 0, 0, 0, 0];
    let shards = [1, 2, 3, 4, 9].map(|kind| run(&program, &message(kind), 0));
    assert_eq!(shards, [0, 6 % 4, 7 % 4, 7 % 4, 0]);
    assert_eq!(run(&program, &message(4)[..4], 0), 0);
    assert_eq!(run(&program, &[], 0), 0);
}

#[test]
fn a_train_arrives_whole_and_unchanged_with_and_without_offloads() {
    for (gso, gro) in [(true, true), (true, false), (false, true), (false, false)] {
        let (mut sender, mut receiver) = (loopback(gso, gro), loopback(gso, gro));
        let mut arena = Arena::new(64);
        // Two trains, of which the last datagrams are shorter.
        let bytes: Vec<u8> = (0..45 * 1400 + 77).map(|i| (i % 251) as u8).collect();
        let to = receiver.local_addr().unwrap();
        let train = SendTrain { to: to.into(), bytes: &bytes, segment_size: 1400 };
        let small = SendTrain { to: to.into(), bytes: &bytes[..100], segment_size: 100 };
        let outcome = sender.send(&[train, small]);
        assert_eq!((outcome.sent, outcome.dropped), (47, 0), "{outcome:?}");
        assert_eq!((sender.gso(), receiver.gro()), (gso, gro));

        let trains = receive(&mut receiver, &mut arena, bytes.len() + 100);
        if gso && gro {
            assert_eq!(trains.len(), 2);
            assert_eq!((trains[0].span.len as usize, trains[0].segment_size), (bytes.len(), 1400));
        }
        let mut received = Vec::new();
        let mut lengths = Vec::new();
        for datagram in trains.iter().flat_map(|train| train.datagrams()) {
            received.extend_from_slice(arena.get(datagram));
            lengths.push(datagram.len);
        }
        assert_eq!(received, [&bytes[..], &bytes[..100]].concat());
        assert_eq!(lengths, [vec![1400; 45], vec![77, 100]].concat());
        assert!(trains.iter().all(|train| train.from == sender.local_addr().unwrap().into()));
    }
}

#[test]
fn what_the_network_wrote_into_the_ecn_field_arrives_with_each_train_beside_all_else_that_is_told() {
    let options = UdpOptions { sticky_source: true, ..UdpOptions::default() };
    let anywhere = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0);
    let (mut sender, mut receiver) = (loopback(true, true), UdpTransport::open(anywhere, options).unwrap());
    let to = SocketAddrV4::new(Ipv4Addr::LOCALHOST, receiver.local_addr().unwrap().port());
    let bytes = vec![5; 3_000];
    let mut arena = Arena::new(8);
    for (tos, expected) in
        [(0, Ecn::NotEct), (0xb8, Ecn::NotEct), (0xb9, Ecn::Ect1), (2, Ecn::Ect0), (3, Ecn::Ce)]
    {
        sys::set_option(sender.fd.as_fd(), libc::IPPROTO_IP, libc::IP_TOS, tos).unwrap();
        let outcome = sender.send(&[SendTrain { to: to.into(), bytes: &bytes, segment_size: 1_000 }]);
        assert_eq!(outcome.sent, 3);
        for train in receive(&mut receiver, &mut arena, bytes.len()) {
            let from = Path { remote: sender.local_addr().unwrap(), local: Some(Ipv4Addr::LOCALHOST) };
            assert_eq!((train.ecn, train.segment_size, train.from), (expected, 1_000, from), "TOS {tos:#x}");
        }
    }
}

#[test]
fn a_train_that_the_kernel_refuses_goes_out_datagram_by_datagram() {
    let (mut sender, mut receiver) = (loopback(true, false), loopback(true, false));
    let to = receiver.local_addr().unwrap();
    // More segments than any kernel takes: the caller's fault, for which GSO is not switched off.
    let bytes = vec![5; 300];
    let outcome = sender.send(&[SendTrain { to: to.into(), bytes: &bytes, segment_size: 1 }]);
    assert_eq!((outcome.sent, outcome.dropped, sender.gso()), (300, 0, true));
    assert_eq!(outcome.error.and_then(|error| error.raw_os_error()), Some(libc::EINVAL));
    let mut arena = Arena::new(64);
    let mut trains = Vec::new();
    let slots: Vec<_> = (0..64).map(Slot::whole).collect();
    for _ in 0..5 {
        receiver.receive(&mut arena, &slots, &mut trains).unwrap();
    }
    assert_eq!(trains.len(), 300);

    // The kernel refuses to segment for a socket without UDP checksums: as on a device that cannot.
    sys::set_option(sender.fd.as_fd(), libc::SOL_SOCKET, libc::SO_NO_CHECK, 1u32).unwrap();
    let refused = |sender: &mut UdpTransport, host: u32| {
        let to = SocketAddrV4::new(Ipv4Addr::from_bits(0x7f01_0000 + host), 9);
        let outcome = sender.send(&[SendTrain { to: to.into(), bytes: &bytes, segment_size: 100 }]);
        assert_eq!((outcome.sent, outcome.dropped), (3, 0));
        (outcome.error.is_some(), sender.gso())
    };
    for host in 1..Refusals::ENOUGH {
        assert_eq!(refused(&mut sender, host), (true, true), "it may be the fault of one route");
    }
    // A train that passes proves it.
    sys::set_option(sender.fd.as_fd(), libc::SOL_SOCKET, libc::SO_NO_CHECK, 0u32).unwrap();
    assert_eq!(refused(&mut sender, 0), (false, true));
    sys::set_option(sender.fd.as_fd(), libc::SOL_SOCKET, libc::SO_NO_CHECK, 1u32).unwrap();
    for host in [1, 2].repeat(Refusals::ENOUGH as usize) {
        assert_eq!(refused(&mut sender, host), (true, true), "two peers alone never decide");
    }
    // Trains rest, the kernel is not asked, and one that it takes then ends that.
    sender.refusals.rest = Some(1);
    assert_eq!(refused(&mut sender, 1), (false, false));
    sys::set_option(sender.fd.as_fd(), libc::SOL_SOCKET, libc::SO_NO_CHECK, 0u32).unwrap();
    assert_eq!(refused(&mut sender, 1), (false, true));
    sys::set_option(sender.fd.as_fd(), libc::SOL_SOCKET, libc::SO_NO_CHECK, 1u32).unwrap();
    for host in 1..Refusals::ENOUGH {
        assert_eq!(refused(&mut sender, host), (true, true));
    }
    assert_eq!(refused(&mut sender, 0), (true, false), "too many of them: the kernel takes none");
    sender.refusals.end();
    assert_eq!(refused(&mut sender, 0), (false, false), "and is not asked any more");
}

#[test]
fn a_route_that_takes_no_trains_costs_the_others_none() {
    let [ipsec, small] = [Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2)];
    let mut refusals = Refusals::default();
    for _ in 0..1_000 {
        for _ in 1..Refusals::ENOUGH / 2 {
            assert!(!refusals.are_for_good(Some(libc::EIO), ipsec));
            assert!(!refusals.are_for_good(Some(libc::EINVAL), small));
        }
        assert!(!refusals.rest());
        refusals.end(); // towards another one
    }
    for _ in 0..1_000 {
        assert!(!refusals.are_for_good(Some(libc::EINVAL), small) && !refusals.rest());
    }
    let mut others = (0..Refusals::ENOUGH).map(|host| Ipv4Addr::from_bits(0xc633_6400 + host));
    let given_up = others.position(|to| refusals.are_for_good(Some(libc::EINVAL), to));
    assert_eq!(given_up, Some(Refusals::ENOUGH as usize - 2), "with that one, it is enough of them");
}

#[test]
fn destinations_to_which_nothing_can_be_sent_cost_the_others_no_trains() {
    let mut sender = loopback(true, false);
    let bytes = vec![5; 300];
    for host in 1..=2 * Refusals::ENOUGH {
        let to = SocketAddrV4::new(Ipv4Addr::from_bits(0x7f01_0000 + host), 0); // EINVAL, in trains and apart
        let outcome = sender.send(&[SendTrain { to: to.into(), bytes: &bytes, segment_size: 100 }]);
        assert_eq!((outcome.sent, outcome.dropped, sender.gso()), (0, 3, true));
    }
}

#[test]
fn a_device_that_takes_no_trains_any_more_is_tried_now_and_then() {
    let to = Ipv4Addr::LOCALHOST; // a client has no more destinations than one
    let mut refusals = Refusals::default();
    let rests_after = |refusals: &mut Refusals, errno| {
        assert!(!refusals.are_for_good(Some(errno), to));
        refusals.rest()
    };
    for _ in 0..3 {
        for _ in 1..Refusals::ENOUGH {
            assert!(!rests_after(&mut refusals, libc::EMSGSIZE), "that is about the datagrams' size");
            assert!(!rests_after(&mut refusals, libc::EIO));
        }
        assert!(!rests_after(&mut refusals, libc::EINVAL), "that may be the MTU of its route");
        for _ in 0..3 {
            assert!(rests_after(&mut refusals, libc::EIO));
            assert!((1..Refusals::REST).all(|_| refusals.rest()));
            assert!(!refusals.rest(), "one more attempt");
        }
        refusals.end(); // it is taken
    }
}

/// A socket on all addresses of the host.
fn everywhere(gso: bool, sticky_source: bool) -> UdpTransport {
    let listen = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0);
    let options = UdpOptions { gso, gro: gso, sticky_source, ..UdpOptions::default() };
    UdpTransport::open(listen, options).unwrap()
}

#[test]
fn answers_leave_from_the_address_that_was_addressed() {
    let (second, bytes) = (Ipv4Addr::new(127, 0, 0, 2), vec![7; 3_500]);
    for (gso, segment_size) in [(true, 1_000), (true, 3_500), (false, 1_000), (false, 3_500)] {
        let (mut gateway, mut client) = (everywhere(gso, true), loopback(gso, gso));
        let (addressed, caller) =
            (SocketAddrV4::new(second, gateway.local_addr().unwrap().port()), client.local_addr().unwrap());
        let mut arena = Arena::new(64);
        client.send(&[SendTrain { to: addressed.into(), bytes: &bytes, segment_size }]);
        let trains = receive(&mut gateway, &mut arena, bytes.len());
        let path = Path { remote: caller, local: Some(second) };
        assert!(trains.iter().all(|train| train.from == path), "{trains:?}");
        if gso {
            assert_eq!((trains.len(), trains[0].segment_size), (1, segment_size));
        }

        let answer = SendTrain { to: path, bytes: &bytes, segment_size };
        let outcome = gateway.send(&[answer, answer]);
        assert_eq!((outcome.sent, outcome.dropped), (2 * answer.datagrams(), 0), "{outcome:?}");
        assert_eq!((outcome.gone, gateway.gso()), (None, gso));
        let trains = receive(&mut client, &mut arena, 2 * bytes.len());
        assert!(trains.iter().all(|train| train.from == addressed.into()), "{trains:?}");
    }
}

#[test]
fn a_caller_leaves_its_address_to_the_route() {
    let (mut caller, mut gateway) = (everywhere(true, false), loopback(true, true));
    let mut arena = Arena::new(64);
    let to = SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 2), caller.local_addr().unwrap().port());
    gateway.send(&[SendTrain { to: to.into(), bytes: b"answer", segment_size: 0 }]);
    let trains = receive(&mut caller, &mut arena, 6);
    assert_eq!(trains[0].from, gateway.local_addr().unwrap().into());
}

#[test]
fn what_should_leave_from_an_address_that_the_host_has_lost_leaves_from_another() {
    let (lost, bytes) = (Ipv4Addr::new(192, 0, 2, 77), vec![7; 3_500]); // TEST-NET-1, RFC 5737
    for gso in [true, false] {
        let (mut gateway, mut client) = (everywhere(gso, true), loopback(gso, gso));
        let remote = client.local_addr().unwrap();
        for segment_size in [1_000, 3_500] {
            let train = |local| SendTrain { to: Path { remote, local }, bytes: &bytes, segment_size };
            let datagrams = train(None).datagrams();
            let outcome = gateway.send(&[train(Some(lost)), train(None), train(Some(lost))]);
            assert_eq!((outcome.sent, outcome.dropped), (3 * datagrams, 0), "{outcome:?}");
            assert_eq!(outcome.gone, Some(lost));
            receive(&mut client, &mut Arena::new(64), 3 * bytes.len());
        }
        for host in 0..2 * Refusals::ENOUGH {
            let remote = SocketAddrV4::new(Ipv4Addr::from_bits(0x7f01_0000 + host), 9);
            let to = Path { remote, local: Some(lost) };
            gateway.send(&[SendTrain { to, bytes: &bytes, segment_size: 1_000 }]);
        }
        assert_eq!(gateway.gso(), gso, "that is not for want of GSO");
    }
}

#[test]
fn a_datagram_that_is_refused_from_any_address_costs_the_peer_none() {
    let mut gateway = everywhere(true, true);
    let remote = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0); // EINVAL, and who sends from there is no peer
    let to = Path { remote, local: Some(Ipv4Addr::LOCALHOST) };
    let outcome = gateway.send(&[SendTrain { to, bytes: b"lost", segment_size: 0 }]);
    assert_eq!((outcome.sent, outcome.dropped, outcome.gone), (0, 1, None));
}

#[test]
fn a_full_buffer_loses_datagrams_and_never_waits() {
    let listen = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0);
    let options = UdpOptions { receive_buffer: 1, ..UdpOptions::default() };
    let receiver = UdpTransport::open(listen, options).unwrap();
    let mut sender = loopback(true, false);
    let bytes = vec![0; 60_000];
    let train = SendTrain { to: receiver.local_addr().unwrap().into(), bytes: &bytes, segment_size: 1000 };
    let outcome = sender.send(&[train; 40]);
    assert_eq!(outcome.sent + outcome.dropped, 40 * 60);
    assert!(receiver.is_half_full() && !sender.is_half_full());
    assert!(receiver.receive_overruns().unwrap() > 0);
}

#[test]
fn a_datagram_that_cannot_be_sent_is_counted() {
    let mut sender = loopback(true, true);
    let to = SocketAddrV4::new(Ipv4Addr::BROADCAST, 9); // EACCES without SO_BROADCAST
    let outcome = sender.send(&[SendTrain { to: to.into(), bytes: b"lost", segment_size: 0 }]);
    assert_eq!((outcome.sent, outcome.dropped), (0, 1));
    assert_eq!(outcome.error.and_then(|error| error.raw_os_error()), Some(libc::EACCES));
}
