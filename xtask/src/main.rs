//! MicroShield's development commands; `cargo xtask --help` lists them.
#![forbid(unsafe_code)]

mod apt;
mod bench;
mod demo;
mod ebpf;
mod fuzz;
mod image;
mod kubectl;
mod proc;
mod setup;
mod test;
mod vm;

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
    /// Run the fuzz targets in `flow/fuzz`.
    Fuzz {
        /// How long each runs.
        #[arg(long, default_value_t = fuzz::SECONDS)]
        seconds: u64,
        /// Only these.
        targets: Vec<String>,
    },
    /// Build the programs' images as OCI image layouts.
    Image(image::Args),
    /// Run every check: formatting, clippy, unit tests, lab tests, those on other kernels, fuzzing.
    Test {
        /// Run the lab's tests of capturing, and nothing else, on other kernels: Debian's, in qemu. `--vm` runs what every
        /// change has to pass, `--vm=all` more tests on more kernels.
        #[arg(
            long,
            value_name = "SET",
            num_args = 0..=1,
            require_equals = true,
            default_missing_value = "core"
        )]
        vm: Option<vm::Set>,
        /// Leave out the tests on other kernels, which come from Debian's mirrors when they run for the first time.
        #[arg(long, conflicts_with = "vm")]
        without_vm: bool,
        /// With --vm: only on this kernel, such as 6.1; may be given more than once.
        #[arg(long, requires = "vm", value_name = "SERIES")]
        kernel: Vec<String>,
        /// Passed on to the tests, such as a filter.
        #[arg(last = true)]
        filter: Vec<String>,
    },
}

/// The kernel programs are embedded in what runs there.
fn ebpf_and_vm(set: vm::Set, kernels: &[String], filter: &[String]) -> anyhow::Result<()> {
    setup::run(Scope::Machines)?;
    ebpf::build()?;
    vm::run(set, kernels, filter)
}

fn main() -> ExitCode {
    let result = match Cli::parse().word {
        Word::Setup => setup::run(Scope::Everything)
            .and_then(|()| setup::run(Scope::Machines))
            .and_then(|()| kubectl::ensure()),
        Word::BuildEbpf => setup::run(Scope::Build).and_then(|()| ebpf::build()),
        Word::Demo => demo::run(),
        Word::Bench(bench) => bench::run(&bench),
        Word::Fuzz { seconds, targets } => fuzz::run(seconds, &targets),
        Word::Image(args) => image::run(&args),
        Word::Test {
            vm: Some(set),
            kernel,
            filter,
            ..
        } => ebpf_and_vm(set, &kernel, &filter),
        Word::Test {
            without_vm, filter, ..
        } => test::run(!without_vm, &filter),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::from(if error.is::<Unmet>() { 2 } else { 1 })
        }
    }
}
