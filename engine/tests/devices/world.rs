//! Network namespaces, each a thread of its own, and what tests do in them.

use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::process::Command;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use tidegate_engine::external::next_hop::ExternalLink;
use tidegate_engine::wake::{Epoll, Readiness};

use crate::packets::{GATEWAY, NEIGHBOR};

/// Whether the tests may create namespaces.
pub fn privileged() -> bool {
    // SAFETY: geteuid(2) has no preconditions.
    let root = unsafe { libc::geteuid() } == 0;
    assert!(root || std::env::var_os("CI").is_none(), "the device tests need root, and CI must run them");
    if !root {
        eprintln!("skipped: the device tests need root");
    }
    root
}

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace: it lives as long as its thread, and with it go its devices.
pub struct Namespace {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    id: libc::pid_t,
}

impl Namespace {
    pub fn new() -> Self {
        let (jobs, work) = channel::<Job>();
        let (ready, id) = channel();
        let thread = std::thread::spawn(move || {
            // SAFETY: neither call takes pointers; the new namespace is this thread's alone.
            let (result, id) = unsafe { (libc::unshare(libc::CLONE_NEWNET), libc::gettid()) };
            assert_eq!(result, 0, "unshare: {}", std::io::Error::last_os_error());
            ready.send(id).unwrap();
            work.into_iter().for_each(|job| job());
        });
        let id = id.recv().unwrap();
        Self { jobs: Some(jobs), thread: Some(thread), id }
    }

    /// Runs `job` inside, and returns (or panics with) what it does.
    pub fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = channel();
        let job = move || done.send(catch_unwind(AssertUnwindSafe(job))).unwrap();
        self.jobs.as_ref().unwrap().send(Box::new(job)).unwrap();
        result.recv().unwrap().unwrap_or_else(|panic| resume_unwind(panic))
    }
}

impl Namespace {
    /// Moves an interface of this namespace to another one, which leaves it without addresses, and down.
    pub fn give(&self, interface: &'static str, to: &Self) {
        let there = to.id.to_string();
        self.run(move || ip(&["link", "set", interface, "netns", &there]));
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The topology of the head of the file: gateway and neighbour, joined by a veth pair.
pub fn pair() -> (Namespace, Namespace) {
    let (gateway, neighbor) = (Namespace::new(), Namespace::new());
    let there = neighbor.id.to_string();
    let ready = |name: &'static str, address: Ipv4Addr| {
        move || {
            std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap();
            ip(&["link", "set", "lo", "up"]);
            ip(&["address", "add", &format!("{address}/24"), "dev", name]);
            ip(&["link", "set", name, "up"]);
        }
    };
    gateway.run(move || {
        ip(&["link", "add", "g0", "type", "veth", "peer", "name", "n0", "netns", &there]);
    });
    gateway.run(ready("g0", GATEWAY));
    neighbor.run(ready("n0", NEIGHBOR));
    (gateway, neighbor)
}

/// `g0`, as the gateway is told of it.
pub fn external_link() -> ExternalLink {
    ExternalLink {
        interface: "g0".into(),
        index: interface_index("g0"),
        mac: interface_mac("g0"),
        mtu: 1_500,
        addresses: vec![GATEWAY],
        on_link: vec!["192.0.2.0/24".parse().unwrap()],
        router: Some(NEIGHBOR),
    }
}

pub fn ip(arguments: &[&str]) {
    run("ip", arguments);
}

/// A TAP device: what is written to it, behind a virtio-net header, arrives as if from a wire.
pub fn tap(name: &str) -> File {
    let device = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    let mut request = [0u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as u16;
    request[libc::IFNAMSIZ..][..2].copy_from_slice(&flags.to_ne_bytes());
    // SAFETY: `request` has the size and layout of `struct ifreq`, which the kernel reads and writes.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF as _, request.as_mut_ptr()) };
    assert_eq!(result, 0, "TUNSETIFF: {}", std::io::Error::last_os_error());
    device
}

pub fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {error}");
}

pub fn interface_index(name: &str) -> u32 {
    let name = std::ffi::CString::new(name).unwrap();
    // SAFETY: the name is a C string, which is only read.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    assert_ne!(index, 0, "no interface {name:?}");
    index
}

pub fn interface_mac(name: &str) -> [u8; 6] {
    // /sys is mounted in the first namespace, so ask `ip`, which asks the kernel.
    let output = Command::new("ip").args(["-o", "link", "show", name]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mac = text.split_whitespace().skip_while(|word| *word != "link/ether").nth(1).unwrap();
    let bytes: Vec<_> = mac.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
    bytes.try_into().unwrap()
}

/// Waits until there is something to read, at most for a few seconds.
pub fn readable(fd: impl AsFd) -> bool {
    let epoll = Epoll::new().unwrap();
    epoll.add(fd, 0).unwrap();
    let mut events = Readiness::with_capacity(1);
    epoll.wait(&mut events, Some(Duration::from_secs(5))).unwrap();
    events.tokens().count() > 0
}
