//! Compiles `shim.c` where the library's header and its static archive are installed (Debian: `libipsec-mb-dev`, of
//! amd64 alone). Elsewhere the crate is built without it, and says of every key that it cannot be had.

use std::env;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

const SHIM: &str = "src/shim.c";
const ARCHIVE: &str = "libIPSec_MB.a";
/// Set to anything but nothing, it leaves the library out: for packagers, and to see that the engine does without.
const OFF: &str = "TIDEGATE_WITHOUT_IPSEC_MB";
/// What `scripts/bootstrap` found of the library. Where that changes, it is looked for again. It stands in the
/// workspace wherever cargo's own target directory may be, as the script does not ask for that.
const FOUND: &str = "../target/ipsec-mb-found";

fn main() {
    println!("cargo:rustc-check-cfg=cfg(ipsec_mb)");
    println!("cargo:rerun-if-changed={SHIM}");
    println!("cargo:rerun-if-env-changed={OFF}");
    note_that_nobody_has_looked().ok(); // an error: it is there, or the sources are read-only, also for the script
    if Path::new(FOUND).exists() {
        println!("cargo:rerun-if-changed={FOUND}"); // cargo takes what is not there for changed, each time
    }
    let is_off = env::var_os(OFF).is_some_and(|value| !value.is_empty());
    if is_off || env::var("CARGO_CFG_TARGET_ARCH").as_deref() != Ok("x86_64") {
        return;
    }
    let mut shim = cc::Build::new();
    shim.file(SHIM).std("c11").warnings(true).extra_warnings(true).cargo_warnings(false);
    let Some(archive) = linkable_archive(&shim) else { return };
    if let (Some(folder), true) = (archive.parent(), shim.try_compile("tidegate_ipsec_mb").is_ok()) {
        println!("cargo:rustc-link-search=native={}", folder.display());
        println!("cargo:rustc-link-lib=static:-bundle=IPSec_MB");
        println!("cargo:rustc-cfg=ipsec_mb");
        println!("cargo:rerun-if-changed={}", archive.display());
    }
}

/// Makes the file where `scripts/bootstrap` has not run yet, so that cargo notices when it has.
fn note_that_nobody_has_looked() -> io::Result<()> {
    let found = Path::new(FOUND);
    if let Some(folder) = found.parent() {
        fs::create_dir_all(folder)?;
    }
    let mut file = File::create_new(found)?;
    file.write_all(b"unknown\n")?;
    file.set_modified(SystemTime::UNIX_EPOCH) // not now, during the build: cargo would build once more
}

/// The static archive that the C compiler finds, if shim and archive make a shared object together, as they will have
/// to: linked statically, the extension needs nothing more on the machine that it runs on.
fn linkable_archive(shim: &cc::Build) -> Option<PathBuf> {
    let compiler = shim.try_get_compiler().ok()?;
    let asked = compiler.to_command().arg(format!("-print-file-name={ARCHIVE}")).output().ok()?;
    let archive = Path::new(String::from_utf8(asked.stdout).ok()?.trim()).to_owned();
    if !archive.is_absolute() {
        return None;
    }
    let linked = Path::new(&env::var_os("OUT_DIR")?).join("probe.so");
    let tried = compiler
        .to_command()
        .args(["-shared", "-fPIC", "-Wl,-z,defs", "-o"])
        .args([&linked, Path::new(SHIM), &archive])
        .output()
        .ok()?;
    tried.status.success().then_some(archive)
}
