//! The engine of Tidegate: it moves packets, and nothing else.
//!
//! One packet's way from a client to the internet and back, in the order of the files: [`tun`] → [`client`] →
//! [`outbox`] (split and seal, [`wire::split`], [`tunnel`]) → [`transport`] → [`shard`] → [`intake`] → [`gateway`] (open, gather,
//! [`wire::coalesce`]) → [`router`] → [`nat`] → [`external`] → the internet → [`external`] → [`nat`] → [`gateway`] →
//! [`outbox`] → [`transport`] → [`client`] → [`tun`]. `docs/architecture.md` tells it in prose.

pub mod arena;
pub mod bpf;
pub mod client;
pub mod clock;
pub mod core;
pub mod crossings;
pub mod drop_reason;
pub mod engine;
pub mod external;
pub mod fair_queue;
pub mod fragment;
pub mod gateway;
pub mod icmp_error;
pub mod intake;
pub mod messages;
pub mod mss;
pub mod nat;
pub mod outbox;
pub mod path;
pub mod poll_window;
pub mod pool;
pub mod prefix;
#[cfg(feature = "python")]
mod python;
pub mod rate_limit;
pub mod router;
pub mod shard;
pub mod sys;
pub mod tcp_reset;
pub mod time_slice;
pub mod traffic;
pub mod transport;
pub mod tun;
pub mod tunnel;
pub mod wake;
pub mod wire;
