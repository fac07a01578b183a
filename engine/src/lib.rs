//! The engine of Tidegate: it moves packets, and nothing else.
pub mod arena;
pub mod bpf;
pub mod clock;
pub mod drop_reason;
pub mod external;
pub mod sys;
pub mod transport;
pub mod tun;
pub mod wake;
pub mod wire;
