//! MicroShield's development commands; `cargo xtask --help` lists them.
#![forbid(unsafe_code)]

mod bench;
mod demo;
mod ebpf;
mod proc;
mod setup;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::{proc::Unmet, setup::Scope};

/// MicroShield's development commands.
#[derive(Parser)]
#[command(bin_name = "cargo xtask", version)]
struct Cli {
    #[command(subcommand)]
    word: Word,
}

#[derive(Subcommand)]
enum Word {
    /// Install what is missing to build the kernel programs and to run the lab.
    Setup,
    /// Build the kernel programs and put the object where the agent's build embeds it.
    BuildEbpf,
    /// Show capture, stream and policies on a two-node bookinfo of network namespaces (root).
    Demo,
    /// Measure.
    #[command(subcommand)]
    Bench(bench::Bench),
    /// Run every check: formatting, clippy, unit tests, lab tests.
    Test {
        /// Passed on to the tests, such as a filter.
        #[arg(last = true)]
        filter: Vec<String>,
    },
}

fn main() -> ExitCode {
    let result = match Cli::parse().word {
        Word::Setup => setup::run(Scope::Everything),
        Word::BuildEbpf => setup::run(Scope::Build).and_then(|()| ebpf::build()),
        Word::Demo => demo::run(),
        Word::Bench(bench) => bench::run(&bench),
        Word::Test { filter } => test::run(&filter),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::from(if error.is::<Unmet>() { 2 } else { 1 })
        }
    }
}
