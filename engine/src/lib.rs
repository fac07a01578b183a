//! The engine of Tidegate: it moves packets, and nothing else.
pub mod arena;
pub mod clock;
pub mod drop_reason;
pub mod mss;
pub mod prefix;
pub mod rate_limit;
pub mod router;
pub mod tunnel;
pub mod wire;
