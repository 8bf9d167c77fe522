//! The demonstration: a two-node bookinfo, two agents, one generator.

use std::{os::unix::process::CommandExt, process::Command};

use anyhow::{Context, Result, bail};

use crate::{
    ebpf,
    proc::{self, Unmet, line, target_dir},
    setup::{self, Scope},
};

/// Builds what the demonstration shows, and becomes it: an interrupt then reaches the program that has to clean up,
/// and nothing waits above it.
///
/// # Errors
/// [`Unmet`] without root, before anything is built.
pub(crate) fn run() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!(Unmet(
            "the demonstration needs root: it makes network namespaces and loads kernel programs"
                .into()
        ));
    }
    setup::run(Scope::Everything)?;
    ebpf::build()?;
    proc::build_release()?;
    let mut demo = Command::new(target_dir().join("release/demo"));
    let error = demo.exec();
    Err(error).with_context(|| line(&demo))
}
