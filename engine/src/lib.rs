//! The engine of Tidegate: it moves packets, and nothing else.
pub mod arena;
pub mod bpf;
pub mod clock;
pub mod drop_reason;
pub mod external;
pub mod mss;
pub mod prefix;
pub mod rate_limit;
pub mod router;
pub mod sys;
pub mod transport;
pub mod tun;
pub mod tunnel;
pub mod wake;
pub mod wire;
