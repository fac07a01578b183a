//! Calls: connections that somebody outside begins, to a published port or back to a client.

use super::*;

const CLIENT: &str = "10.66.77.2:443";
const CALLER: &str = "198.51.100.9:2000";
const HOUR: u64 = 3_600;

/// Numbers of which each comes before the next, and the first behind the last (RFC 9293 §3.4).
const THIRDS: [u32; 3] = [5, 5 + 0x5555_5555, 5 + 0xaaaa_aaaa];

/// A client, and somebody who may call it: each says what the other one gets.
struct Line {
    world: World,
    external: Endpoint,
}

impl Line {
    /// To a published port.
    fn published() -> Self {
        let mut world = World::new();
        let external = Endpoint::new(EXTERNAL, 443);
        world.nat.publish(Proto::Tcp, external, at(CLIENT), world.now).unwrap();
        Self { world, external }
    }

    /// The caller says something.
    fn hears(&mut self, flags: &str, seq: u32, ack: u32, data: &[u8]) -> Result<(), DropReason> {
        self.world.receive(tcp(at(CALLER), self.external, flags, seq, ack, data)).map(drop)
    }

    /// The client does.
    fn says(&mut self, flags: &str, seq: u32, ack: u32, data: &[u8]) -> Result<(), DropReason> {
        self.world.send(tcp(at(CLIENT), at(CALLER), flags, seq, ack, data)).map(drop)
    }

    /// The connection stands if it outlives an hour of silence; and an RST that fits is believed.
    fn assert_stands(mut self, caller_next: u32, client_next: u32) {
        self.world.pass(HOUR);
        assert_eq!(self.hears("PA", caller_next, client_next, b"hi"), Ok(()), "{caller_next}");
        assert_eq!(self.hears("R", caller_next.wrapping_add(2), 0, b""), Ok(()), "{caller_next}");
        self.world.pass(242);
        assert_eq!(self.world.nat.counts().sessions, 0, "{caller_next}: the RST has closed it");
    }
}

#[test]
fn a_call_is_followed_though_an_earlier_one_was_never_answered() {
    for (first, second) in [(THIRDS[0], THIRDS[1]), (THIRDS[1], THIRDS[0]), (THIRDS[2], THIRDS[0])] {
        let mut line = Line::published();
        line.hears("S", first, 0, b"").unwrap();
        line.world.pass(200);
        line.hears("S", second, 0, b"").unwrap();
        line.says("SA", 900, second + 1, b"").unwrap();
        line.hears("A", second + 1, 901, b"").unwrap();
        line.assert_stands(second + 1, 901);
        // Nor is it bound if it hangs up.
        let mut line = Line::published();
        line.hears("S", first, 0, b"").unwrap();
        line.hears("S", second, 0, b"").unwrap();
        assert_eq!(line.hears("R", second + 1, 0, b""), Ok(()));
    }
}

#[test]
fn a_visitor_whose_connection_the_client_has_forgotten_may_call_again() {
    for (first, second) in [(THIRDS[0], THIRDS[1]), (THIRDS[1], THIRDS[0]), (THIRDS[2], THIRDS[0])] {
        let mut line = Line::published();
        line.hears("S", first, 0, b"").unwrap();
        line.says("SA", 900, first + 1, b"").unwrap();
        line.hears("A", first + 1, 901, b"").unwrap();
        // The client's machine has been started anew, and knows nothing of it.
        line.hears("S", second, 0, b"").unwrap();
        line.says("SA", THIRDS[2], second + 1, b"").unwrap();
        line.hears("A", second + 1, THIRDS[2] + 1, b"").unwrap();
        line.assert_stands(second + 1, THIRDS[2] + 1);
    }
}

#[test]
fn a_client_may_call_whom_it_has_not_answered() {
    for (call, answer) in [(THIRDS[0], THIRDS[1]), (THIRDS[1], THIRDS[0]), (THIRDS[2], THIRDS[0])] {
        let mut line = Line::published();
        line.hears("S", call, 0, b"").unwrap();
        line.says("S", 100, 0, b"").unwrap();
        line.hears("SA", answer, 101, b"").unwrap();
        line.says("A", 101, answer + 1, b"").unwrap();
        line.assert_stands(answer + 1, 101);
    }
}

#[test]
fn a_client_may_call_whom_it_has_refused() {
    type Refusal = fn(&mut Line, u32) -> Result<(), DropReason>;
    let by_the_client: Refusal = |line, call| line.says("RA", 0, call + 1, b"");
    let by_the_caller: Refusal = |line, call| line.hears("R", call + 1, 0, b"");
    for refuse in [by_the_client, by_the_caller] {
        for (call, answer) in [(THIRDS[0], THIRDS[1]), (THIRDS[1], THIRDS[0]), (THIRDS[2], THIRDS[0])] {
            let mut line = Line::published();
            line.hears("S", call, 0, b"").unwrap();
            refuse(&mut line, call).unwrap();
            line.says("S", 100, 0, b"").unwrap();
            line.hears("SA", answer, 101, b"").unwrap();
            line.says("A", 101, answer + 1, b"").unwrap();
            line.hears("S", THIRDS[2] + 7, 0, b"").unwrap(); // forged: it takes nothing over
            line.assert_stands(answer + 1, 101);
        }
    }
}

#[test]
fn a_client_is_told_that_whom_it_has_not_answered_refuses_its_call() {
    for call in THIRDS {
        let mut line = Line::published();
        line.hears("S", call, 0, b"").unwrap();
        line.says("S", 100, 0, b"").unwrap();
        // A closed port answers so, whatever was there before (RFC 9293 §3.10.7.1).
        assert_eq!(line.hears("RA", 0, 7_777, b""), Err(DropReason::TcpOutOfState), "that was no answer");
        assert_eq!(line.hears("R", 0, 101, b""), Err(DropReason::TcpOutOfState), "nor was that");
        assert_eq!(line.hears("RA", 0, 101, b""), Ok(()), "{call}");
        assert_eq!(line.world.nat.counts().sessions, 1);
        // It calls until somebody is there.
        line.says("S", 100, 0, b"").unwrap();
        line.hears("SA", THIRDS[1], 101, b"").unwrap();
        line.says("A", 101, THIRDS[1] + 1, b"").unwrap();
        line.assert_stands(THIRDS[1] + 1, 101);
    }
}

#[test]
fn a_forged_second_call_does_not_take_the_place_of_the_one_that_the_client_answers() {
    for (first, forged) in [(THIRDS[0], THIRDS[1]), (THIRDS[1], THIRDS[0]), (THIRDS[0], THIRDS[2])] {
        let mut line = Line::published();
        line.hears("S", first, 0, b"").unwrap();
        line.hears("S", forged, 0, b"").unwrap();
        line.says("SA", 900, first + 1, b"").unwrap();
        line.hears("A", first + 1, 901, b"").unwrap();
        line.assert_stands(first + 1, 901);
    }
}

#[test]
fn a_guessed_answer_does_not_take_the_place_of_an_earlier_call() {
    let mut line = Line::published();
    // A simultaneous open, and somebody who does not know the number of the client's SYN.
    line.hears("S", THIRDS[0], 0, b"").unwrap();
    line.says("S", 100, 0, b"").unwrap();
    for guess in [0, 100, 102, 7_777, 1 << 31] {
        line.hears("SA", THIRDS[2], guess, b"").unwrap();
    }
    line.says("SA", 100, THIRDS[0] + 1, b"").unwrap();
    line.hears("SA", THIRDS[0], 101, b"").unwrap();
    line.assert_stands(THIRDS[0] + 1, 101);
}

#[test]
fn a_guessed_segment_amid_a_handshake_does_not_prepare_a_reset() {
    for flags in ["", "P", "F", "S", "SA", "A", "PA", "FA"] {
        for is_answered in [false, true] {
            if flags == "S" && !is_answered {
                continue; // another call: it is the client's answer that tells which one it believes
            }
            let mut line = Line::published();
            line.hears("S", 1, 0, b"").unwrap();
            if is_answered {
                line.says("SA", 900_000, 2, b"").unwrap();
            }
            // In the window by luck, but it does not acknowledge the SYN of the client.
            for acknowledgment in [0, 850_000, 900_000, 900_002] {
                line.hears(flags, 501, acknowledgment, b"x").unwrap();
            }
            if !is_answered {
                line.says("SA", 900_000, 2, b"").unwrap();
            }
            for next in 501..=504 {
                line.hears("R", next, 0, b"").unwrap();
            }
            line.hears("A", 2, 900_001, b"").unwrap();
            line.assert_stands(2, 900_001);
        }
    }
}

/// A client with 64 sessions at most, because that is what it may have, or because all may have no more. One of its
/// ports can be flooded, and its line is to another.
struct Flooded {
    line: Line,
    flooded: Endpoint,
    nobodies: std::ops::RangeFrom<u32>,
}

impl Flooded {
    fn both() -> [Self; 2] {
        let client = NatConfig { max_mappings_per_client: 16, ..NatConfig::default() };
        let all = NatConfig { max_mappings: 16, ..NatConfig::default() };
        [client, all].map(Self::with)
    }

    fn with(config: NatConfig) -> Self {
        let mut world = World::with(config);
        let (external, flooded) = (Endpoint::new(EXTERNAL, 443), Endpoint::new(EXTERNAL, 80));
        world.nat.publish(Proto::Tcp, external, at(CLIENT), world.now).unwrap();
        world.nat.publish(Proto::Tcp, flooded, at("10.66.77.2:80"), world.now).unwrap();
        Self { line: Line { world, external }, flooded, nobodies: 0.. }
    }

    fn flood(&mut self, calls: usize) {
        for n in self.nobodies.by_ref().take(calls) {
            let nobody = Endpoint::new(Ipv4Addr::from_bits(0xc000_0200 + n % 256), 1_000 + n as u16);
            self.line.world.receive(tcp(nobody, self.flooded, "S", n, 0, b"")).unwrap();
        }
        assert!(self.line.world.nat.counts().sessions <= 64);
    }

    /// The caller of the line is connected.
    fn connect(&mut self) {
        self.line.hears("S", 1, 0, b"").unwrap();
        self.line.says("SA", 900, 2, b"").unwrap();
        self.line.hears("A", 2, 901, b"").unwrap();
    }
}

#[test]
fn a_flood_of_one_port_neither_closes_the_others_nor_keeps_their_client_in() {
    for mut here in Flooded::both() {
        here.flood(200);
        here.connect();
        let mut answers = Vec::new();
        for n in 1..=10 {
            here.flood(200);
            let server = Endpoint::new(address("192.0.2.77"), n);
            let query = here.line.world.send(udp(at("10.66.77.2:5000"), server, b"")).unwrap();
            here.line.world.send(tcp(at("10.66.77.2:5001"), server, "S", 100, 0, b"")).unwrap();
            answers.push(udp(server, source(&query), b""));
        }
        here.flood(200);
        for answer in answers {
            assert!(here.line.world.receive(answer).is_ok(), "what the client has opened is not ended");
        }
        here.line.assert_stands(2, 901);
    }
}

#[test]
fn visitors_of_one_port_that_have_gone_close_no_other() {
    for mut here in Flooded::both() {
        let world = &mut here.line.world;
        let service = at("10.66.77.2:80");
        let visitors = (2_000..2_050).map(|port| Endpoint::new(address("198.51.100.1"), port));
        for visitor in visitors.clone() {
            world.receive(tcp(visitor, here.flooded, "S", 1, 0, b"")).unwrap();
            world.send(tcp(service, visitor, "SA", 1, 2, b"")).unwrap();
            world.receive(tcp(visitor, here.flooded, "A", 2, 2, b"")).unwrap();
        }
        for n in 0..20 {
            let query = udp(at("10.66.77.2:5000"), Endpoint::new(address("192.0.2.77"), n), b"");
            let expected = if n < 14 { Ok(()) } else { Err(DropReason::SessionLimit) };
            assert_eq!(
                world.send(query).map(drop),
                expected,
                "visitors whose connection stands make no room"
            );
        }
        for visitor in visitors {
            world.receive(tcp(visitor, here.flooded, "FA", 2, 2, b"")).unwrap();
            world.send(tcp(service, visitor, "FA", 2, 3, b"")).unwrap();
        }
        here.connect();
        here.line.assert_stands(2, 901);
    }
}

#[test]
fn a_flood_of_a_port_does_not_keep_its_client_from_calling_from_there() {
    let mut world = World::with(NatConfig { max_sessions_per_mapping: 8, ..NatConfig::default() });
    let external = Endpoint::new(EXTERNAL, 443);
    world.nat.publish(Proto::Tcp, external, at(CLIENT), world.now).unwrap();
    let mut line = Line { world, external };
    for n in 0..20 {
        line.world.receive(tcp(Endpoint::new(address("192.0.2.77"), n), external, "S", 1, 0, b"")).unwrap();
    }
    line.says("S", 100, 0, b"").unwrap();
    for n in 20..40 {
        line.world.receive(tcp(Endpoint::new(address("192.0.2.77"), n), external, "S", 1, 0, b"")).unwrap();
    }
    assert_eq!(line.world.nat.counts().sessions, 8);
    line.hears("SA", 900, 101, b"").unwrap();
    line.says("A", 101, 901, b"").unwrap();
    line.assert_stands(901, 101);
}

#[test]
fn a_call_that_has_become_the_clients_own_makes_no_room() {
    for was_answered in [true, false] {
        for mut here in Flooded::both() {
            here.line.hears("S", 1, 0, b"").unwrap();
            if was_answered {
                here.line.says("SA", 900, 2, b"").unwrap();
            }
            here.line.says("S", 7_000, 0, b"").unwrap();
            here.flood(200);
            here.line.hears("SA", 1, 7_001, b"").unwrap();
            here.line.says("A", 7_001, 2, b"").unwrap();
            here.line.assert_stands(2, 7_001);
        }
    }
}

#[test]
fn a_call_that_was_the_clients_own_for_a_while_makes_room_again() {
    for mut here in Flooded::both() {
        for n in 0..64 {
            let caller = Endpoint::new(address("198.51.100.7"), 3_000 + n);
            let world = &mut here.line.world;
            world.receive(tcp(caller, here.line.external, "S", 1, 0, b"")).unwrap();
            world.send(tcp(at(CLIENT), caller, "S", 7_000, 0, b"")).unwrap();
            here.flood(200); // meanwhile somebody looks for calls
            // The client has begun anew, and answers the caller: with another number.
            here.line.world.send(tcp(at(CLIENT), caller, "SA", 900, 2, b"")).unwrap();
        }
        here.flood(1);
        let query = udp(at("10.66.77.2:5000"), at("192.0.2.77:53"), b"");
        assert_eq!(here.line.world.send(query).map(drop), Ok(()));
        here.connect();
        here.line.assert_stands(2, 901);
    }
}

#[test]
fn a_mapping_that_only_a_call_has_kept_ends_with_it() {
    let filtering = Filtering::EndpointIndependent;
    let config = NatConfig { filtering, max_mappings_per_client: 16, ..NatConfig::default() };
    let mut here = Flooded::with(config);
    let (client, server) = (at("10.66.77.2:5000"), at("192.0.2.77:80"));
    let external = source(&here.line.world.send(tcp(client, server, "S", 100, 0, b"")).unwrap());
    here.line.world.pass(200);
    here.line.world.receive(tcp(at(CALLER), external, "S", 1, 0, b"")).unwrap();
    here.line.world.pass(42);
    assert_eq!(here.line.world.mapping(client).map(|mapping| mapping.sessions), Some(1), "the call's");
    here.flood(200);
    assert_eq!(here.line.world.mapping(client), None);
    assert_eq!(here.line.world.nat.free_ports(Proto::Tcp, EXTERNAL, PortClass::Unprivileged), 2_000);
}
