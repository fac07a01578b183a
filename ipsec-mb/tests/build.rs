//! What the build leaves behind.

use std::path::Path;

#[test]
fn cargo_is_told_of_the_file_that_says_whether_the_library_has_come() {
    // It is told of nothing that is not there. Without it, a build before scripts/bootstrap would stay without the
    // library.
    assert!(Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/ipsec-mb-found").is_file());
}
