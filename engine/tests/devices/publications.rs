//! Ports that a whole engine publishes, while those of its NAT come and go.

use tidegate_engine::nat::{Endpoint, NatConfig, Proto};

use super::*;
use crate::engine::{CLIENT, engine, wait_until};

fn is_reserved(port: u16) -> bool {
    TcpListener::bind((GATEWAY, port)).is_err()
}

#[test]
fn a_port_that_is_published_while_the_nat_returns_ports_is_reserved() {
    if !privileged() {
        return;
    }
    let (gateway, _neighbor) = pair();
    gateway.run(|| {
        const AGAIN: u16 = 1_080;
        let mut engine = engine();
        engine.publish(Proto::Tcp, AGAIN, Endpoint::new(CLIENT, AGAIN)).unwrap();
        engine.start().unwrap();
        wait_until("the first ports", || engine.reserved_ports()[0] > 1_000);
        let of_the_nat: Vec<u16> = (10_000..20_000).filter(|&port| is_reserved(port)).take(20).collect();
        assert_eq!(of_the_nat.len(), 20);

        // The NAT returns all that it does not lend: for a while the reserver closes sockets.
        engine.set_nat(NatConfig::default(), (60_000, 60_001));
        let before = engine.reserved_ports()[0];
        wait_until("the reserver to begin", || engine.reserved_ports()[0] < before);
        assert!(engine.unpublish(Proto::Tcp, AGAIN));
        let published: Vec<u16> = [AGAIN].into_iter().chain(of_the_nat).collect();
        for &port in &published {
            // A child that another test has forked may hold a closed socket until it execs.
            let mut publish = || engine.publish(Proto::Tcp, port, Endpoint::new(CLIENT, port));
            wait_until("a port that was returned", || publish().is_ok());
        }
        wait_until("the reserver to end", || engine.reserved_ports()[0] < 100);
        // Answered when everything before it is done.
        engine.publish(Proto::Tcp, 1_081, Endpoint::new(CLIENT, 1_081)).unwrap();
        let lost: Vec<u16> = published.into_iter().filter(|&port| !is_reserved(port)).collect();
        assert_eq!(lost, [] as [u16; 0], "published, and the host's");
    });
}
