//! An interface that is taken away from under a whole engine, and comes back.

use super::*;
use crate::engine::{engine, wait_until};

/// Which packet sockets of this namespace receive IPv4 frames of an interface: their inodes (/proc/net/packet).
fn receiving_on(index: u32) -> Vec<String> {
    let list = std::fs::read_to_string("/proc/thread-self/net/packet").unwrap();
    let rows = list.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let ours = rows.filter(|row| row[3..6] == ["0800", &index.to_string(), "1"]); // protocol, interface, running
    ours.map(|row| row[8].to_string()).collect()
}

#[test]
fn an_interface_that_comes_back_with_its_index_gets_new_sockets() {
    if !privileged() {
        return;
    }
    let ((gateway, _neighbor), elsewhere) = (pair(), Namespace::new());
    let (mut engine, link) = gateway.run(|| {
        let mut engine = engine();
        engine.start().unwrap();
        (engine, external_link())
    });
    let index = link.index;
    gateway.run(move || assert_eq!(receiving_on(index).len(), 2));
    gateway.give("g0", &elsewhere);
    elsewhere.give("g0", &gateway);
    gateway.run(move || {
        ip(&["link", "set", "g0", "up"]);
        assert_eq!(interface_index("g0"), index);
        assert!(receiving_on(index).is_empty(), "the kernel unbinds them for ever");
        engine.set_external(link.clone(), vec![GATEWAY]).unwrap();
        wait_until("new sockets", || receiving_on(index).len() == 2);

        // As long as nothing happens to it, they are kept.
        let sockets = receiving_on(index);
        engine.set_external(link, vec![GATEWAY]).unwrap();
        engine.status().unwrap(); // which the shards are asked for after that
        assert_eq!(receiving_on(index), sockets);
    });
}
