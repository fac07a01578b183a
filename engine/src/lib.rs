//! The engine of Tidegate: it moves packets, and nothing else.
pub mod arena;
pub mod clock;
pub mod drop_reason;
pub mod fragment;
pub mod icmp_error;
pub mod mss;
pub mod prefix;
pub mod rate_limit;
pub mod router;
pub mod wire;
