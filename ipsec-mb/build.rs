//! Compiles `shim.c` where the library's header and its static archive are installed (Debian: `libipsec-mb-dev`, of
//! amd64 alone). Elsewhere the crate is built without it, and says of every key that it cannot be had.

use std::env;
use std::path::{Path, PathBuf};

const ARCHIVE: &str = "libIPSec_MB.a";
/// Set to anything, it leaves the library out: for packagers, and to see that the engine does without.
const OFF: &str = "TIDEGATE_WITHOUT_IPSEC_MB";

fn main() {
    println!("cargo:rustc-check-cfg=cfg(ipsec_mb)");
    println!("cargo:rerun-if-changed=src/shim.c");
    println!("cargo:rerun-if-env-changed={OFF}");
    if env::var_os(OFF).is_some() || env::var("CARGO_CFG_TARGET_ARCH").as_deref() != Ok("x86_64") {
        return;
    }
    let mut shim = cc::Build::new();
    shim.file("src/shim.c").std("c11").warnings(true).extra_warnings(true).cargo_warnings(false);
    let Some(folder) = folder_of_the_archive(&shim) else { return };
    if shim.try_compile("tidegate_ipsec_mb").is_ok() {
        println!("cargo:rustc-link-search=native={}", folder.display());
        println!("cargo:rustc-link-lib=static:-bundle=IPSec_MB");
        println!("cargo:rustc-cfg=ipsec_mb");
        println!("cargo:rerun-if-changed={}", folder.join(ARCHIVE).display());
    }
}

/// Where the C compiler finds the static archive, if it does: linked statically, the extension needs nothing more on the
/// machine that it runs on.
fn folder_of_the_archive(compiler: &cc::Build) -> Option<PathBuf> {
    let asked =
        compiler.try_get_compiler().ok()?.to_command().arg(format!("-print-file-name={ARCHIVE}")).output();
    let answer = String::from_utf8(asked.ok()?.stdout).ok()?;
    let archive = Path::new(answer.trim());
    archive.is_absolute().then(|| archive.parent().map(Path::to_owned))?
}
