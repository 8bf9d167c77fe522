//! Benchmarks: figures for people, never part of a test.

use std::{os::unix::process::CommandExt, process::Command};

use anyhow::{Context, Result, bail};
use clap::Subcommand;

use crate::{
    ebpf,
    proc::{self, Unmet, cargo, line, target_dir},
    setup::{self, Scope},
};

/// What is measured.
#[derive(Subcommand)]
pub(crate) enum Bench {
    /// Connections a second with and without an agent, tcpdump and bpftrace, and what programs and agent cost (root).
    Capture {
        /// Passed on, such as `--connections 100000 --rounds 9 --against OTHER-AGENT --json`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Memory, seconds, lookups and traffic that it takes to know a cluster of 1,000, 10,000 and 100,000 pods.
    Topology {
        /// Passed on, such as `--pods 5000,20000 --changes 100 --json`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Flows a second into the ledger, with 10, 100 and 1,000 agents; bytes and time per flow of each encoding.
    Stream {
        /// Passed on, such as `--agents 10,100 --edges 50000 --json`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Memory and processor time that it takes to read a report of Weave Scope of 10 and 100 MiB, in each of its forms.
    ScopeReport {
        /// Passed on, such as `--mib 200 --rounds 9 --json`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Lines a second and instructions a line of the parser of the Scope probe's log, and what following it costs the agent
    /// (root).
    ScopeLog {
        /// Passed on, such as `--rate 10000 --seconds 60 --json`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Lines a second and memory of `microshield link` and `generate`.
    Generator {
        /// Passed on, such as `--times 50 --rounds 9 --json`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
}

/// Builds what is measured, and becomes the program that measures.
///
/// # Errors
/// [`Unmet`] without root where it is needed, before anything is built.
pub(crate) fn run(bench: &Bench) -> Result<()> {
    match bench {
        Bench::Capture { args } => capture(args),
        Bench::Topology { args } => {
            proc::run(
                cargo()
                    .args(["build", "--release", "-p", "tests"])
                    .args(["--bin", "bench-topology"]),
            )?;
            become_program("bench-topology", args)
        }
        Bench::ScopeReport { args } => {
            proc::run(
                cargo()
                    .args(["build", "--release", "-p", "tests"])
                    .args(["--bin", "bench-scope-report"]),
            )?;
            become_program("bench-scope-report", args)
        }
        Bench::ScopeLog { args } => {
            as_root()?;
            setup::run(Scope::Bench)?;
            ebpf::build()?;
            proc::build_release()?;
            become_program("bench-scope-log", args)
        }
        Bench::Stream { args } => generator("bench-stream", args),
        Bench::Generator { args } => generator("bench-generator", args),
    }
}

/// A program that measures the generator.
fn generator(name: &str, args: &[String]) -> Result<()> {
    proc::run(
        cargo()
            .args(["build", "--release"])
            .args(["--bin", "microshield", "--bin", name]),
    )?;
    become_program(name, args)
}

fn as_root() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!(Unmet(
            "the benchmark needs root: it makes network namespaces or loads kernel programs".into()
        ));
    }
    Ok(())
}

fn capture(args: &[String]) -> Result<()> {
    as_root()?;
    setup::run(Scope::Bench)?;
    ebpf::build()?;
    proc::build_release()?;
    become_program("bench-capture", args)
}

/// An interrupt then reaches the program that has to clean up, and nothing waits above it.
fn become_program(name: &str, args: &[String]) -> Result<()> {
    let mut bench = Command::new(target_dir().join("release").join(name));
    bench.args(args);
    let error = bench.exec();
    Err(error).with_context(|| line(&bench))
}
