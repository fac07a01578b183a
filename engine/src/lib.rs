//! The engine of Tidegate: it moves packets, and nothing else.
//!
//! One packet's way from a client to the internet and back, in the order of the files: [`tun`] → [`client`] →
//! [`outbox`] (split and seal, [`wire::split`], [`tunnel`]) → [`transport`] → [`shard`] → [`intake`] → [`gateway`]
//! (open, gather, [`wire::coalesce`]) → [`router`] → [`nat`] → [`external`] → the internet → [`external`] → [`nat`] →
//! [`gateway`] → [`outbox`] → [`transport`] → [`client`] → [`tun`]. `docs/architecture.md` tells it in prose.

// The shell: devices, threads, system calls. Of `external`, the files `neighbor` and `next_hop` are core.
pub mod external;
pub mod intake;
pub mod poll_window;
pub mod pool;
pub mod shard;
pub mod sys;
pub mod time_slice;
pub mod transport;
pub mod tun;
pub mod wake;

// The core: packets and times come in as arguments, and nothing else.
pub mod access_policy;
pub mod client;
pub mod core;
pub mod fair_queue;
pub mod fragment;
pub mod gateway;
pub mod handoffs;
pub mod icmp_error;
pub mod mss;
pub mod nat;
pub mod outbox;
pub mod rate_limit;
pub mod router;
pub mod source_route;
pub mod tcp_reset;
pub mod traffic;
pub mod tunnel;
pub mod wire;

// What all of them speak of.
pub mod arena;
pub mod bpf;
pub mod clock;
pub mod drop_reason;
pub mod path;
pub mod prefix;

// The border to Python.
pub mod engine;
pub mod messages;
#[cfg(feature = "python")]
mod python;
