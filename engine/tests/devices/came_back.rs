//! An interface that is taken away from under a whole engine, and comes back.

use tidegate_engine::messages::EventKind;

use super::*;
use crate::engine::{engine, wait_until};

/// Which packet sockets of this namespace receive IPv4 frames of an interface: their inodes (/proc/net/packet).
fn receiving_on(index: u32) -> Vec<String> {
    let list = std::fs::read_to_string("/proc/thread-self/net/packet").unwrap();
    let rows = list.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let ours = rows.filter(|row| row[3..6] == ["0800", &index.to_string(), "1"]); // protocol, interface, running
    ours.map(|row| row[8].to_string()).collect()
}

/// From now on no descriptor is added to an epoll instance by this thread, nor by those that it starts: `ENOSPC`, as
/// where the user watches too many (`/proc/sys/fs/epoll/max_user_watches`, which is the whole machine's).
fn refuse_to_watch() {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const UNLESS: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const GIVE: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let step = |code, k, jf| libc::sock_filter { code, jt: 0, jf, k };
    let mut program = [
        step(LOAD, 0, 0), // seccomp_data.nr
        step(UNLESS, libc::SYS_epoll_ctl as u32, 1),
        step(GIVE, libc::SECCOMP_RET_ERRNO | libc::ENOSPC as u32, 0),
        step(GIVE, libc::SECCOMP_RET_ALLOW, 0),
    ];
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the kernel reads the program, which outlives both calls, and keeps a copy of it.
    let result = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            | libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program)
    };
    assert_eq!(result, 0, "seccomp: {}", std::io::Error::last_os_error());
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

#[test]
fn sockets_that_cannot_be_watched_end_the_engine_by_name() {
    if !privileged() {
        return;
    }
    let ((gateway, _neighbor), elsewhere) = (pair(), Namespace::new());
    let (mut engine, link) = gateway.run(|| {
        let mut engine = engine();
        refuse_to_watch();
        engine.start().unwrap();
        (engine, external_link())
    });
    gateway.give("g0", &elsewhere);
    elsewhere.give("g0", &gateway);
    gateway.run(move || {
        ip(&["link", "set", "g0", "up"]);
        engine.set_external(link, vec![GATEWAY]).unwrap();
        let mut failed = None;
        wait_until("a shard to say so", || {
            failed = engine.events().take().into_iter().find(|event| event.kind == EventKind::ShardFailed);
            failed.is_some()
        });
        assert!(failed.unwrap().detail.contains("No space left on device"));
    });
}
