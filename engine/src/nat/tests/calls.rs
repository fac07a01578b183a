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
