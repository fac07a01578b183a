//! The engine of Tidegate: it moves packets, and nothing else.
pub mod arena;
pub mod clock;
pub mod drop_reason;
pub mod nat;
pub mod wire;
