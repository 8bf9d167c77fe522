//! The programs of an image: static, stripped, and without a word on the machine that built them.
//!
//! They are linked to a static glibc: its allocator is the one that the agent's memory was measured with, Debian has it for
//! both architectures, and since 2.34 it resolves names by files and DNS without loading anything at run time.

use std::path::PathBuf;

use anyhow::Result;

use super::Arch;
use crate::{
    ebpf,
    proc::{self, cargo, run, target_dir},
    setup::{self, Scope},
};

/// mimalloc puts into the generator when it was compiled. By flags and not by `SOURCE_DATE_EPOCH`, whose change would leave as
/// it is what was compiled before.
const NO_TIMES: [&str; 3] = [
    "-Wno-builtin-macro-redefined",
    "-D__DATE__=\"\"",
    "-D__TIME__=\"\"",
];

impl Arch {
    pub(crate) const fn of_this_machine() -> Option<Self> {
        if cfg!(target_arch = "x86_64") {
            Some(Self::Amd64)
        } else if cfg!(target_arch = "aarch64") {
            Some(Self::Arm64)
        } else {
            None
        }
    }

    /// rustc's name for it.
    pub(crate) const fn triple(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-unknown-linux-gnu",
            Self::Arm64 => "aarch64-unknown-linux-gnu",
        }
    }

    /// The C compiler that makes programs for it on another machine.
    pub(crate) const fn cross_compiler(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-linux-gnu-gcc",
            Self::Arm64 => "aarch64-linux-gnu-gcc",
        }
    }

    /// The Debian package of that compiler.
    pub(crate) const fn cross_package(self) -> &'static str {
        match self {
            Self::Amd64 => "gcc-x86-64-linux-gnu",
            Self::Arm64 => "gcc-aarch64-linux-gnu",
        }
    }

    /// The Debian package of the C library for it.
    pub(crate) const fn cross_library(self) -> &'static str {
        match self {
            Self::Amd64 => "libc6-dev-amd64-cross",
            Self::Arm64 => "libc6-dev-arm64-cross",
        }
    }
}

/// Builds both programs and returns the folder that they are in.
///
/// The kernel programs are the same for both architectures: they read nothing of the processor's registers, and both have
/// the same byte order.
pub(super) fn build(arch: Arch) -> Result<PathBuf> {
    setup::run(Scope::Build)?;
    setup::cross(arch)?;
    ebpf::build()?;
    // Apart from other builds, whose flags are not these.
    let target_dir = target_dir().join("image");
    let remap = proc::remapped_prefixes("")?;
    let rust_flags = remap
        .iter()
        .map(|remap| format!("--remap-path-prefix={remap}"))
        .chain(["-Ctarget-feature=+crt-static".to_owned()])
        .collect::<Vec<_>>();
    let c_flags = remap
        .iter()
        .map(|remap| format!("-ffile-prefix-map={remap}"))
        .chain(NO_TIMES.map(str::to_owned))
        .collect::<Vec<_>>();
    let triple = arch.triple();
    let variable = triple.to_uppercase().replace('-', "_");
    let mut command = cargo();
    command
        .args(["build", "--release", "--locked", "--target", triple])
        .args(["-p", "agent", "-p", "generator", "--bins", "--target-dir"])
        .arg(&target_dir)
        .env("CARGO_ENCODED_RUSTFLAGS", rust_flags.join("\x1f"))
        .env("CARGO_INCREMENTAL", "0")
        // A node pulls them: as small as optimising all at once makes them, whatever time that takes.
        .env("CARGO_PROFILE_RELEASE_LTO", "fat")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
        .env(
            format!("CFLAGS_{}", triple.replace('-', "_")),
            c_flags.join(" "),
        );
    if Arch::of_this_machine() != Some(arch) {
        command.env(
            format!("CARGO_TARGET_{variable}_LINKER"),
            arch.cross_compiler(),
        );
    }
    run(&mut command)?;
    Ok(target_dir.join(triple).join("release"))
}
