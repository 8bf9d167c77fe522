//! Embeds the kernel object that `cargo xtask build-ebpf` made; where there is none yet, an empty one stands in, so that
//! the workspace builds on a machine without bpf-linker.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
    time::SystemTime,
};

fn main() -> io::Result<()> {
    let manifest = PathBuf::from(required("CARGO_MANIFEST_DIR")?);
    let workspace = manifest
        .parent()
        .ok_or_else(|| io::Error::other("the agent's folder has no parent"))?;
    let built = workspace.join("target/bpf/microshield.bpf.o");
    let embedded = PathBuf::from(required("OUT_DIR")?).join("microshield.bpf.o");

    println!("cargo:rerun-if-changed=build.rs");
    // Relative to the manifest, so that a copy of the workspace with its target folder looks at its own files. A path that does
    // not exist makes cargo run this again each time, which is what is wanted then.
    println!("cargo:rerun-if-changed=../target/bpf/microshield.bpf.o");
    for sources in ["agent-ebpf/src", "agent-common/src"] {
        println!("cargo:rerun-if-changed=../{sources}");
    }

    let object = match fs::read(&built) {
        Ok(object) => object,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error),
    };
    if !object.is_empty() {
        let made = fs::metadata(&built)?.modified()?;
        for sources in ["agent-ebpf/src", "agent-common/src"] {
            if newest(&workspace.join(sources))? > made {
                println!(
                    "cargo:warning=the embedded kernel object is older than {sources}: run `cargo xtask build-ebpf`"
                );
            }
        }
    }
    fs::write(embedded, object)
}

fn required(variable: &str) -> io::Result<String> {
    env::var(variable).map_err(|error| io::Error::other(format!("{variable}: {error}")))
}

/// When the newest file in `folder` was changed.
fn newest(folder: &Path) -> io::Result<SystemTime> {
    let mut newest = SystemTime::UNIX_EPOCH;
    for entry in fs::read_dir(folder)? {
        newest = newest.max(entry?.metadata()?.modified()?);
    }
    Ok(newest)
}
