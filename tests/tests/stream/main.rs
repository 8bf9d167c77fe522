//! The stream between real processes: faults in between, either side killed, a thousand agents, a full disk.
//!
//! The agents' side is the real uplink and spool in a process of its own, fed with made-up drains (`feeder`): kernel
//! programs lose what they hold when their agent is killed, so only from there on can counts be compared exactly. The
//! generator is the real program.
#![forbid(unsafe_code)]

mod chaos;
mod crowd;
mod feeder;
mod full_disk;
mod programs;
mod proxy;
mod truth;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some(feeder::WORD) {
        return feeder::main();
    }
    let arguments = Arguments::from_args();
    let missing = lab::root_or_reason().err();
    let test = |name: &str, run: fn() -> anyhow::Result<()>| {
        Trial::test(name, move || {
            run().map_err(|error| Failed::from(format!("{error:#}")))
        })
    };
    let trials = vec![
        test("counts_are_exact_over_faults_and_kills", chaos::run),
        test("a_thousand_agents_are_served_alike", crowd::run),
        test("a_full_disk_loses_nothing", full_disk::run).with_ignored_flag(missing.is_some()),
        test(
            "a_full_disk_of_an_agent_holds_nothing_back",
            full_disk::run_of_an_agent,
        )
        .with_ignored_flag(missing.is_some()),
    ];
    let conclusion = libtest_mimic::run(&arguments, trials);
    if let Some(reason) = missing {
        eprintln!("2 tests that mount a small file system were SKIPPED: {reason}");
    }
    conclusion.exit_code()
}
