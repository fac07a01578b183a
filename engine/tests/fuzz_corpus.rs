//! The fuzzers' corpus, replayed: what libFuzzer once found interesting must still hold, with every
//! `cargo test`. A crash that was found and mended belongs to the corpus, too.
//!
//! `engine/fuzz/src/lib.rs` has the targets, `make fuzz` looks for more.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on fails; the targets are tests, too"
)]

use std::fs;
use std::path::Path;

#[path = "../fuzz/src/lib.rs"]
mod targets;

/// Replays every input of a target, and says which one failed.
fn replay(target: &str) {
    let (_, run) = targets::TARGETS.iter().find(|(name, _)| *name == target).unwrap();
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut inputs = 0;
    for entry in fs::read_dir(&corpus).unwrap() {
        let path = entry.unwrap().path();
        let input = fs::read(&path).unwrap();
        inputs += 1;
        if std::panic::catch_unwind(|| run(&input)).is_err() {
            panic!("{target} fails for {}", path.display());
        }
    }
    assert!(inputs > 0, "a corpus in {}", corpus.display());
}

#[test]
fn the_corpus_of_the_wire_still_holds() {
    replay("wire");
}

#[test]
fn the_corpus_of_reassembly_still_holds() {
    replay("reassembly");
}

#[test]
fn the_corpus_of_the_nat_still_holds() {
    replay("nat");
}

#[test]
fn the_corpus_of_the_tunnel_still_holds() {
    replay("tunnel");
}

#[test]
fn the_corpus_of_the_gateway_still_holds() {
    replay("gateway");
}

#[test]
fn every_target_has_its_program() {
    for (name, _) in targets::TARGETS {
        let program = format!("{}/fuzz/fuzz_targets/{name}.rs", env!("CARGO_MANIFEST_DIR"));
        assert!(fs::read_to_string(&program).unwrap().contains(&format!("tidegate_fuzz::{name}::run")));
    }
}
