use super::*;
use std::net::{TcpListener, TcpStream, UdpSocket};

const HERE: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 77);

/// Ports above the ephemeral range, so that the tests' own connections do not get in the way.
fn ports(start: u16) -> impl Iterator<Item = u16> {
    start..start + 200
}

#[test]
fn a_pool_grows_by_a_part_of_what_is_left() {
    assert_eq!(PortReservation::new(40_000).step(2_048), 2_048);
    assert_eq!(PortReservation::new(8_000).step(2_048), 1_000);
    assert_eq!(PortReservation::new(8_000).step(20), 20);
    assert_eq!(PortReservation::new(1_000).step(2_048), 125);
    assert_eq!(PortReservation::new(50).step(2_048), 16, "but not by drops");
}

#[test]
fn the_first_ports_are_a_quarter_of_all_at_most() {
    assert_eq!(first_ports(18_000, 2, 2_048), 2_048, "of 2,250: a burst's worth is enough");
    assert_eq!(first_ports(18_000, 4, 2_048), 1_125);
    assert_eq!(first_ports(18_000, 64, 2_048), 70);
    assert_eq!(first_ports(768, 4, 2_048), 48, "1,024 descriptors");
    assert_eq!(first_ports(768, 0, 2_048), 192, "no address yet");
    assert_eq!(first_ports(100, 64, 2_048), 1);
}

#[test]
fn a_port_that_a_program_holds_is_passed_over() {
    let mut reservation = PortReservation::new(100);
    let tcp = TcpListener::bind((HERE, 61_500)).unwrap();
    let udp = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 61_501)).unwrap();
    let (tcp_ports, shortage) = reservation.reserve(PortProtocol::Tcp, HERE, 61_500..=61_502, 3);
    assert!(matches!(shortage, Some(Shortage::NoFreePort)));
    assert_eq!(tcp_ports, [61_501, 61_502]);
    let (udp_ports, _) = reservation.reserve(PortProtocol::Udp, HERE, 61_500..=61_502, 3);
    assert_eq!(udp_ports, [61_500, 61_502]);
    drop((tcp, udp));
}

#[test]
fn what_is_kept_for_the_hosts_programs_is_never_reserved_unless_it_is_published() {
    let mut reservation = PortReservation::new(100);
    reservation.keep(Some((61_610, 61_614)));
    for protocol in [PortProtocol::Tcp, PortProtocol::Udp] {
        let (taken, shortage) = reservation.reserve(protocol, HERE, 61_608..=61_616, 9);
        assert_eq!(taken, [61_608, 61_609, 61_615, 61_616]);
        assert!(matches!(shortage, Some(Shortage::NoFreePort)));
    }
    reservation.claim(PortProtocol::Tcp, SocketAddrV4::new(HERE, 61_612)).unwrap();
    reservation.keep(None);
    let (taken, _) = reservation.reserve(PortProtocol::Tcp, HERE, 61_608..=61_616, 9);
    assert_eq!(taken, [61_610, 61_611, 61_613, 61_614]);
}

#[test]
fn a_reserved_port_can_neither_be_bound_nor_shared() {
    let mut reservation = PortReservation::new(100);
    for protocol in [PortProtocol::Tcp, PortProtocol::Udp] {
        let (taken, _) = reservation.reserve(protocol, HERE, ports(62_000), 1);
        let port = SocketAddrV4::new(HERE, taken[0]);
        let wildcard = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, taken[0]);
        let (kind, number) = match protocol {
            PortProtocol::Tcp => (libc::SOCK_STREAM, 6),
            PortProtocol::Udp => (libc::SOCK_DGRAM, 17),
        };
        for address in [port, wildcard] {
            for options in [&[][..], &[libc::SO_REUSEADDR], &[libc::SO_REUSEPORT], &[2, 15]] {
                let socket = sys::socket(libc::AF_INET, kind, number).unwrap();
                for &option in options {
                    sys::set_option(socket.as_fd(), libc::SOL_SOCKET, option, 1u32).unwrap();
                }
                let result = sys::bind(socket.as_fd(), &SocketAddress::inet(address));
                assert_eq!(
                    result.unwrap_err().raw_os_error(),
                    Some(libc::EADDRINUSE),
                    "{protocol:?} {options:?}"
                );
            }
        }
        assert!(reservation.unreserve(protocol, port));
        assert!(!reservation.unreserve(protocol, port));
        match protocol {
            PortProtocol::Tcp => drop(TcpListener::bind(port).unwrap()),
            PortProtocol::Udp => drop(UdpSocket::bind(port).unwrap()),
        }
    }
}

#[test]
fn a_claimed_port_stays_reserved_whatever_the_nat_returns() {
    let mut reservation = PortReservation::new(100);
    let ownership = reservation.ownership();
    let tcp = PortProtocol::Tcp;
    let is_reserved = |port: SocketAddrV4| {
        let known = ownership.is_reserved(tcp, HERE, port.port());
        assert_eq!(TcpListener::bind(port).is_err(), known);
        known
    };
    let (taken, _) = reservation.reserve(tcp, HERE, ports(61_700), 4);
    let [published, refused, lent, left] =
        [0, 1, 2, 3].map(|index: usize| SocketAddrV4::new(HERE, taken[index]));
    let new = SocketAddrV4::new(HERE, 61_950);
    for port in [published, refused, lent, new] {
        reservation.claim(tcp, port).unwrap();
        assert_eq!(reservation.claim(tcp, port).unwrap_err().raw_os_error(), Some(libc::EADDRINUSE));
    }
    for port in [published, refused, left, new] {
        reservation.return_port(tcp, port);
    }
    assert_eq!([published, refused, lent, left, new].map(is_reserved), [true, true, true, false, true]);
    for port in [refused, lent, new] {
        reservation.disclaim(tcp, port);
    }
    assert_eq!([refused, lent, new].map(is_reserved), [false, true, false], "the NAT has one of them");
    reservation.return_port(tcp, lent);
    assert!(reservation.unreserve(tcp, published) && !reservation.unreserve(tcp, published));
    assert_eq!([published, lent].map(is_reserved), [false; 2]);

    reservation.claim(tcp, published).unwrap();
    reservation.retain_addresses(&[]);
    reservation.claim(tcp, published).unwrap();
    assert_eq!(reservation.len(), 1);
}

#[test]
fn every_reserved_port_is_known_until_it_is_unreserved() {
    let mut reservation = PortReservation::new(100);
    let ownership = reservation.ownership();
    let (taken, shortage) = reservation.reserve(PortProtocol::Udp, HERE, ports(62_300), 3);
    assert!(shortage.is_none());
    assert!(taken.iter().all(|&port| ownership.is_reserved(PortProtocol::Udp, HERE, port)));
    assert!(!ownership.is_reserved(PortProtocol::Tcp, HERE, taken[0]));
    assert!(!ownership.is_reserved(PortProtocol::Udp, Ipv4Addr::LOCALHOST, taken[0]));
    reservation.unreserve(PortProtocol::Udp, SocketAddrV4::new(HERE, taken[0]));
    assert!(!ownership.is_reserved(PortProtocol::Udp, HERE, taken[0]));
    drop(reservation);
    assert!(!ownership.is_reserved(PortProtocol::Udp, HERE, taken[1]));
}

#[test]
fn the_ports_of_an_address_that_went_are_unreserved() {
    let gone = Ipv4Addr::new(127, 0, 0, 79);
    let mut reservation = PortReservation::new(100);
    let ownership = reservation.ownership();
    for address in [HERE, gone] {
        assert_eq!(reservation.reserve(PortProtocol::Tcp, address, ports(62_400), 3).0.len(), 3);
    }
    reservation.retain_addresses(&[HERE]);
    assert_eq!((reservation.len(), ownership.count(PortProtocol::Tcp)), (3, 3));
    assert!(ports(62_400).all(|port| !ownership.is_reserved(PortProtocol::Tcp, gone, port)));
}

#[test]
fn a_spent_budget_and_a_foreign_address_are_told_apart() {
    let mut reservation = PortReservation::new(2);
    let (taken, shortage) = reservation.reserve(PortProtocol::Tcp, HERE, ports(62_600), 3);
    assert_eq!(taken.len(), 2);
    assert!(matches!(shortage, Some(Shortage::Descriptors)));
    let mut reservation = PortReservation::new(2);
    let elsewhere = Ipv4Addr::new(192, 0, 2, 200);
    let (taken, shortage) = reservation.reserve(PortProtocol::Udp, elsewhere, ports(62_600), 1);
    assert_eq!(taken.len(), 0);
    let Some(Shortage::Refused(error)) = shortage else { panic!("{shortage:?}") };
    assert_eq!(error.raw_os_error(), Some(libc::EADDRNOTAVAIL));
}

#[test]
fn a_connection_to_a_reserved_port_hears_nothing_whether_the_filter_is_shared_or_its_own() {
    let mut shared = PortReservation::new(2);
    assert!(shared.silence.is_some() || sys::load_socket_filter(&SILENCE).is_err());
    let mut own = PortReservation::new(2);
    own.silence = None;
    for reservation in [&mut shared, &mut own] {
        let (taken, _) = reservation.reserve(PortProtocol::Tcp, HERE, ports(62_900), 1);
        let address = SocketAddrV4::new(HERE, taken[0]).into();
        let patience = std::time::Duration::from_millis(200);
        let error = TcpStream::connect_timeout(&address, patience).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}

#[test]
fn the_budget_leaves_descriptors_for_the_rest_of_the_process() {
    assert_eq!([0, 256, 1024, 20_000].map(budget), [0, 0, 768, 18_000]);
    assert_eq!(raise_nofile_limit().unwrap(), sys::descriptor_limits().unwrap().0);
}
