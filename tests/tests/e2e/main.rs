//! End to end: real programs in the lab, the real agent and generator beside it.
//!
//! Most tests need root. Without it they are shown as ignored and the reason is printed; as root none may be.

mod agent_lifecycle;
mod before;
mod bookinfo;
mod capture;
mod churn;
mod connections;
mod edge_cases;
mod failures;
mod identity;
mod images;
mod lab_itself;
mod manners;
mod memory;
mod pairs;
mod plugin;
mod rights;
mod scope_log;
mod scope_tracked;
mod sctp;
mod stage;
mod stored;
mod udp;

use std::{
    collections::BTreeMap,
    env,
    process::ExitCode,
    sync::{PoisonError, RwLock},
};

use anyhow::{Result, ensure};
use lab::{Capture, Hooks, truth::Edge};
use libtest_mimic::{Arguments, Failed, Trial};

/// A test that needs root.
struct Test {
    name: String,
    alone: bool,
    run: Box<dyn FnOnce() -> Result<()> + Send>,
}

/// All tests share one kernel, and agents see all of it. Held for writing by tests that need it for themselves.
static KERNEL: RwLock<()> = RwLock::new(());

impl Test {
    fn new(name: impl Into<String>, run: impl FnOnce() -> Result<()> + Send + 'static) -> Self {
        Self {
            name: name.into(),
            alone: false,
            run: Box::new(run),
        }
    }

    /// One that no other may disturb with its connections.
    fn alone(name: impl Into<String>, run: impl FnOnce() -> Result<()> + Send + 'static) -> Self {
        Self {
            alone: true,
            ..Self::new(name, run)
        }
    }

    fn run(self) -> Result<()> {
        let _shared;
        let _exclusive;
        if self.alone {
            _exclusive = KERNEL.write().unwrap_or_else(PoisonError::into_inner);
        } else {
            _shared = KERNEL.read().unwrap_or_else(PoisonError::into_inner);
        }
        (self.run)()
    }
}

/// The forms of kernel hooks; whatever captures is tested with each.
const HOOKS: [Hooks; 2] = [Hooks::Btf, Hooks::Classic];

/// Parts of tests' names, separated by commas: only these run, and none with a part that follows `!`. The command line takes one
/// only.
const ONLY: &str = "LAB_TESTS";

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let missing = lab::root_or_reason().err();
    let is_root = nix::unistd::geteuid().is_root();
    if let Some(reason) = missing.as_ref().filter(|_| is_root) {
        eprintln!("root, and yet the lab tests cannot run: {reason}");
        return ExitCode::FAILURE;
    }
    if let Err(error) = lab::signals::remove_labs_on_interrupt() {
        eprintln!("{error:#}");
        return ExitCode::FAILURE;
    }
    let only = env::var(ONLY).unwrap_or_default();
    let (without, only): (Vec<_>, Vec<_>) = only.split(',').partition(|part| part.starts_with('!'));
    let is_wanted = |name: &str| {
        only.iter().any(|part| name.contains(part))
            && !without.iter().any(|part| name.contains(&part[1..]))
    };
    let trials = tests()
        .filter(|test| is_wanted(&test.name))
        .map(|test| {
            let name = test.name.clone();
            let run = || {
                test.run()
                    .map_err(|error| Failed::from(format!("{error:#}")))
            };
            Trial::test(name, run).with_ignored_flag(missing.is_some())
        })
        .collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    lab::signals::wait_if_interrupted();
    if let Some(reason) = missing {
        eprintln!(
            "{} lab tests were skipped: {reason}",
            conclusion.num_ignored
        );
    }
    conclusion.exit_code()
}

fn tests() -> impl Iterator<Item = Test> {
    [
        lab_itself::tests(),
        capture::tests(),
        connections::tests(),
        edge_cases::tests(),
        before::tests(),
        failures::tests(),
        identity::tests(),
        pairs::tests(),
        plugin::tests(),
        scope_log::tests(),
        scope_tracked::tests(),
        sctp::tests(),
        udp::tests(),
        agent_lifecycle::tests(),
        bookinfo::tests(),
        rights::tests(),
        manners::tests(),
        images::tests(),
        stored::tests(),
        churn::tests(),
        memory::tests(),
    ]
    .into_iter()
    .flatten()
}

/// A check of what was lost to the last one.
///
/// The kernel programs see every connection of this machine: what others make meanwhile may be among the lost. If it comes
/// out even when it is tried again, nothing was miscounted; what is miscounted never does.
fn exactly(check: impl Fn() -> Result<()>) -> Result<()> {
    for _ in 0..2 {
        match check() {
            Ok(()) => return Ok(()),
            Err(error) => eprintln!("again, as others may have disturbed it: {error:#}"),
        }
    }
    check()
}

/// Nothing was lost, and exactly these connections were seen.
///
/// The kernel may leave runs of a program out, for which no size or speed of ours is a remedy. Then the agent says how many, and
/// no more connections than that are missing.
fn expect(captures: &[Capture], wanted: BTreeMap<Edge, u64>) -> Result<()> {
    let mut skipped = 0;
    for capture in captures {
        ensure!(capture.lost_nothing(), "lost: {:?}", capture.losses);
        skipped += capture.skipped();
    }
    let seen = lab::truth::edges(captures.iter().flat_map(|capture| &capture.records));
    if skipped > 0 {
        eprintln!("the kernel left out {skipped} runs");
        let missing: u64 = wanted
            .iter()
            .map(|(edge, count)| count.saturating_sub(seen.get(edge).copied().unwrap_or(0)))
            .sum();
        let is_wanted =
            |(edge, count): (&Edge, &u64)| wanted.get(edge).is_some_and(|wanted| count <= wanted);
        ensure!(
            missing <= skipped && seen.iter().all(is_wanted),
            "{missing} are missing: {seen:?}\nof {wanted:?}"
        );
        return Ok(());
    }
    let different = |left: &BTreeMap<Edge, u64>, right: &BTreeMap<Edge, u64>| -> String {
        left.iter()
            .filter(|(edge, count)| right.get(edge) != Some(count))
            .map(|(edge, count)| format!("\n    {count} of {edge:?}"))
            .collect()
    };
    ensure!(
        seen == wanted,
        "seen and not made:{}\nmade and not seen:{}",
        different(&seen, &wanted),
        different(&wanted, &seen)
    );
    Ok(())
}
