//! Benchmarks: figures for people, never part of a test.

use std::{os::unix::process::CommandExt, process::Command};

use anyhow::{Context, Result, bail};
use clap::Subcommand;

use crate::{
    ebpf,
    proc::{self, Unmet, line, target_dir},
    setup::{self, Scope},
};

/// What is measured.
#[derive(Subcommand)]
pub(crate) enum Bench {
    /// Connections a second with and without an agent, and what the kernel programs and the agent cost (root).
    Capture {
        /// Passed on, such as `--connections 100000 --rounds 9 --json`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
}

/// Builds what is measured, and becomes the program that measures.
///
/// # Errors
/// [`Unmet`] without root, before anything is built.
pub(crate) fn run(bench: &Bench) -> Result<()> {
    let Bench::Capture { args } = bench;
    if !nix::unistd::geteuid().is_root() {
        bail!(Unmet(
            "the benchmark needs root: it makes network namespaces and loads kernel programs"
                .into()
        ));
    }
    setup::run(Scope::Everything)?;
    ebpf::build()?;
    proc::build_release()?;
    let mut bench = Command::new(target_dir().join("release/bench-capture"));
    bench.args(args);
    let error = bench.exec();
    Err(error).with_context(|| line(&bench))
}
