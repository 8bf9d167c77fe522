//! Every check, in the order in which a mistake is found soonest.

use std::time::{Duration, Instant};

use anyhow::Result;

use crate::{
    ebpf, fuzz, proc,
    setup::{self, Scope},
};

/// Runs every check and prints how long each took.
///
/// Every build is of the whole workspace with the same profile, so that cargo resolves the same features each time and
/// compiles nothing twice.
///
/// # Errors
/// The first check that fails; those after it do not run.
pub(crate) fn run(filter: &[String]) -> Result<()> {
    let root = nix::unistd::geteuid().is_root();
    let scope = if root {
        Scope::Everything
    } else {
        Scope::Build
    };
    let tests = |which| move || words("test --workspace", which, filter);
    let steps: &[(&str, &dyn Fn() -> Result<()>)] = &[
        ("setup", &|| setup::run(scope)),
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
        ("fuzzing", &|| fuzz::run(fuzz::SECONDS, &[])),
    ];
    let mut times = Vec::new();
    let mut result = Ok(());
    for (name, step) in steps {
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
    proc::run(proc::cargo().args(split).args(rest))
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
