//! Whole journeys, in memory and without root: what an application sends, and what arrives at the other end.
//!
//! See `journeys/world.rs` for the topology.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on fails; the helpers are tests, too"
)]

#[path = "journeys/access.rs"]
mod access;
#[path = "journeys/congestion.rs"]
mod congestion;
#[path = "journeys/errors.rs"]
mod errors;
#[path = "journeys/faults.rs"]
mod faults;
#[path = "journeys/faulty.rs"]
mod faulty;
#[path = "journeys/flow.rs"]
mod flow;
#[path = "journeys/fragments.rs"]
mod fragments;
#[path = "journeys/fuzz.rs"]
mod fuzz;
#[path = "journeys/kernel.rs"]
mod kernel;
#[path = "journeys/life.rs"]
mod life;
#[path = "journeys/link.rs"]
mod link;
#[path = "journeys/packets.rs"]
mod packets;
#[path = "journeys/published.rs"]
mod published;
#[path = "journeys/silence.rs"]
mod silence;
#[path = "journeys/walks.rs"]
mod walks;
#[path = "journeys/world.rs"]
mod world;
