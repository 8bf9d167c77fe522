//! Benchmarks: figures for people, never part of a test.

use anyhow::{Result, bail};
use clap::Subcommand;

use crate::{
    ebpf,
    proc::{self, Unmet},
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
        /// Passed on, such as `--agents 10,100 --edges 50000 --json`, or `--full 600000` for the memory of a full ledger (root).
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
        Bench::Capture { args } => {
            in_lab()?;
            let beside = ["lab-pod", "microshield", "microshield-agent"];
            proc::become_program("bench-capture", &beside, args)
        }
        Bench::ScopeLog { args } => {
            in_lab()?;
            let beside = ["lab-pod", "microshield-agent"];
            proc::become_program("bench-scope-log", &beside, args)
        }
        Bench::Topology { args } => proc::become_program("bench-topology", &[], args),
        Bench::ScopeReport { args } => proc::become_program("bench-scope-report", &[], args),
        Bench::Stream { args } => {
            if args.iter().any(|arg| arg.starts_with("--full")) {
                in_lab()?;
            }
            proc::become_program("bench-stream", &["microshield"], args)
        }
        Bench::Generator { args } => {
            proc::become_program("bench-generator", &["microshield"], args)
        }
    }
}

/// What is measured runs in the lab, on the kernel programs as they are.
fn in_lab() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!(Unmet(
            "the benchmark needs root: it makes network namespaces or loads kernel programs".into()
        ));
    }
    setup::run(Scope::Bench)?;
    ebpf::build()
}
