//! What the fuzzers do with their bytes: one module and one function for each target.
//!
//! An input is a *script* ([`script::Script`]): arbitrary bytes that say what happens, in which order, to how much of
//! which packet. The functions are called from two places: from `fuzz_targets/`, by libFuzzer (`make fuzz`),
//! and from `engine/tests/fuzz_corpus.rs`, which replays the committed corpus with every `cargo test`.
//!
//! Nothing here asks for more than "no panic" alone: each module's text says what else must hold.

pub mod gateway;
pub mod nat;
pub mod packets;
pub mod reassembly;
pub mod script;
pub mod tunnel;
pub mod wire;

/// The name of a target and its corpus, and what is done with an input.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: [Target; 5] = [
    ("wire", wire::run),
    ("reassembly", reassembly::run),
    ("nat", nat::run),
    ("tunnel", tunnel::run),
    ("gateway", gateway::run),
];
