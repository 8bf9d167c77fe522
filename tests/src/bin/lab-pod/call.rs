//! The calling side.

use std::{
    io::Write,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};
use clap::Args;
use lab::{Calls, pace::patience};

use crate::target::{Failure, Target};

#[derive(Args)]
pub(crate) struct Options {
    /// What to call, such as `tcp://10.96.0.10:80`.
    #[arg(required = true)]
    targets: Vec<Target>,
    /// How often to call each target.
    #[arg(long, default_value_t = 1)]
    count: u64,
    /// So many ports of each target, from its own on.
    #[arg(long, default_value_t = 1)]
    ports: u16,
    /// Milliseconds until a call counts as timed out.
    #[arg(long, default_value_t = 5_000)]
    timeout: u64,
    /// Never stop.
    #[arg(long, conflicts_with = "count")]
    forever: bool,
    /// Milliseconds between the starts of two rounds of calls.
    #[arg(long, default_value_t = 0)]
    interval: u64,
    /// How many callers share the count.
    #[arg(long, default_value_t = 1)]
    parallel: u64,
    /// Close TCP connections by a reset: their ports are free at once, as it takes for many thousands of them.
    #[arg(long)]
    abort: bool,
}

/// Makes the calls and prints what became of them.
pub(crate) fn run(options: Options) -> Result<()> {
    announce()?;
    let callers = options.parallel.max(1);
    let calls = thread::scope(|scope| {
        let share = |caller| {
            let count = options.count;
            count / callers + u64::from(caller < count % callers)
        };
        let options = &options;
        let threads: Vec<_> = (0..callers)
            .map(|caller| {
                let rounds = if options.forever {
                    u64::MAX
                } else {
                    share(caller)
                };
                scope.spawn(move || rounds_of_calls(options, rounds))
            })
            .collect();
        let mut sum = Calls::default();
        for thread in threads {
            sum += thread
                .join()
                .map_err(|_panic| anyhow!("a caller panicked"))?;
        }
        anyhow::Ok(sum)
    })?;
    let mut stdout = std::io::stdout().lock();
    serde_json::to_writer(&mut stdout, &calls)?;
    writeln!(stdout)?;
    Ok(())
}

/// Tells the lab that there is nothing more to wait for.
pub(crate) fn announce() -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "ready").context("standard output")?;
    stdout.flush().context("standard output")
}

fn rounds_of_calls(options: &Options, rounds: u64) -> Calls {
    let patience = patience(Duration::from_millis(options.timeout));
    let interval = Duration::from_millis(options.interval);
    let mut calls = Calls::default();
    let targets: Vec<Target> = options
        .targets
        .iter()
        .flat_map(|target| (0..options.ports).map(|port| target.ports_further(port)))
        .collect();
    for _ in 0..rounds {
        let start = Instant::now();
        for target in &targets {
            let counter = match target.call(patience, options.abort) {
                Ok(()) => &mut calls.answered,
                Err(Failure::Refused) => &mut calls.refused,
                Err(Failure::TimedOut) => &mut calls.timed_out,
                Err(Failure::Reset) => &mut calls.reset,
                Err(Failure::Other) => &mut calls.failed,
            };
            *counter += 1;
        }
        thread::sleep(interval.saturating_sub(start.elapsed()));
    }
    calls
}
