//! Every check, in the order in which a mistake is found soonest.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::{
    ebpf, fuzz, kubectl, proc,
    setup::{self, Scope},
    vm,
};

/// A step that may be left out.
const OTHER_KERNELS: &str = "other kernels";

/// Runs every check and prints how long each took.
///
/// Every build is of the whole workspace with the same profile, so that cargo resolves the same features each time and
/// compiles nothing twice. What takes root runs for root only: the lab's tests, and those on other kernels, which can be left
/// out.
///
/// # Errors
/// The first check that fails; those after it do not run.
pub(crate) fn run(with_vm: bool, filter: &[String]) -> Result<()> {
    let root = nix::unistd::geteuid().is_root();
    let with_vm = with_vm && root;
    let scope = if root {
        Scope::Everything
    } else {
        Scope::Build
    };
    let tests = |which| move || words("test --workspace", which, filter);
    let steps: &[(&str, &dyn Fn() -> Result<()>)] = &[
        ("setup", &|| {
            setup::run(scope)?;
            if with_vm {
                setup::run(Scope::Machines)?;
            }
            if root { kubectl::ensure() } else { Ok(()) }
        }),
        ("formatting", &|| words("fmt", "--all --check", &[])),
        ("kernel programs", &ebpf::build),
        ("clippy", &|| {
            words("clippy", "--workspace --all-targets -- -D warnings", &[])
        }),
        ("clippy of the kernel programs", &ebpf::clippy),
        ("build", &|| {
            words("build", "--workspace --all-targets", &[])
        }),
        ("unit tests", &tests("--lib --bins --")),
        ("integration and lab tests", &tests("--test * --")),
        ("documentation tests", &tests("--doc --")),
        (OTHER_KERNELS, &|| {
            vm::run(vm::Set::Core, &[], &[]).context(
                "the tests on other kernels; `cargo xtask test --without-vm` leaves them out",
            )
        }),
        ("fuzzing", &|| fuzz::run(fuzz::SECONDS, &[])),
    ];
    let mut times = Vec::new();
    let mut result = Ok(());
    for (name, step) in steps {
        if *name == OTHER_KERNELS && !with_vm {
            eprintln!("── {name}: left out; `cargo xtask test --vm` is for them");
            continue;
        }
        eprintln!("── {name}");
        let start = Instant::now();
        result = step();
        times.push((*name, start.elapsed()));
        if result.is_err() {
            break;
        }
    }
    summary(&times, result.is_ok());
    result
}

/// Runs `cargo COMMAND OPTIONS REST`, the first two split at blanks.
fn words(command: &str, options: &str, rest: &[String]) -> Result<()> {
    let split = command.split(' ').chain(options.split(' '));
    let mut command = proc::cargo();
    command.args(split).args(rest);
    if let Some(kubectl) = kubectl::program() {
        command.env("KUBECTL", kubectl);
    }
    proc::run(&mut command)
}

fn summary(times: &[(&str, Duration)], passed: bool) {
    eprintln!("── seconds");
    for (index, (name, time)) in times.iter().enumerate() {
        let failed = !passed && index + 1 == times.len();
        eprintln!(
            "{:8.1}  {name}{}",
            time.as_secs_f32(),
            if failed { ": FAILED" } else { "" }
        );
    }
    let total: Duration = times.iter().map(|(_, time)| *time).sum();
    eprintln!("{:8.1}  in all", total.as_secs_f32());
}
