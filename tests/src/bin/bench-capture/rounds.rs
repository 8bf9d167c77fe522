//! The rounds, and the medians over them.

use std::{
    collections::BTreeMap,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;

use crate::{
    Cli, PORTS, Stage,
    beside::{Beside, Running},
    programs::{self, Accounting, Hook},
    usage::{self, Resident},
};

/// From one drain of the agent to the next, and a bit more.
const DRAIN: Duration = Duration::from_millis(1_200);

/// Medians over the rounds of one kind.
#[derive(Serialize)]
pub(crate) struct Row {
    pub(crate) beside: Beside,
    /// Why there are none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) missing: Option<String>,
    pub(crate) connections_per_second: f64,
    /// To the speed with nothing beside, of the same round.
    pub(crate) ratio_to_nothing: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cpu_seconds_per_million_connections: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) resident: Option<Resident>,
    pub(crate) programs: BTreeMap<Hook, ProgramCost>,
}

/// What the programs of one hook cost.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct ProgramCost {
    pub(crate) runs_per_connection: f64,
    pub(crate) ns_per_run: f64,
    pub(crate) ns_per_connection: f64,
}

/// What was seen in the rounds of one kind.
#[derive(Default)]
struct Seen {
    missing: Option<String>,
    /// By round.
    speeds: Vec<f64>,
    cpu: Vec<f64>,
    resident: Option<Resident>,
    programs: BTreeMap<Hook, Vec<[f64; 2]>>,
}

pub(crate) fn run(stage: &Stage, cli: &Cli) -> Result<Vec<Row>> {
    let kinds = Beside::wanted(cli);
    let mut seen: Vec<Seen> = kinds.iter().map(|_| Seen::default()).collect();
    // The first round warms up.
    for round in 0..=cli.rounds {
        each(stage, cli, &kinds, &mut seen, round, |seen, running| {
            let pid = running.pid();
            let cpu = pid.map(usage::cpu_seconds).transpose()?;
            let seconds = connect(stage, cli.connections)?.as_secs_f64();
            if let (Some(pid), Some(before)) = (pid, cpu) {
                thread::sleep(DRAIN);
                if round > 0 {
                    seen.cpu.push(usage::cpu_seconds(pid)? - before);
                    seen.resident = Some(usage::resident(pid)?);
                }
            }
            if round > 0 {
                seen.speeds.push(cli.connections as f64 / seconds);
            }
            Ok(())
        })?;
    }
    let _accounting = Accounting::enable()?;
    for round in 0..cli.rounds {
        each(stage, cli, &kinds, &mut seen, round, |seen, running| {
            let Some(pid) = running.pid() else {
                return Ok(());
            };
            let before = programs::runs(pid)?;
            connect(stage, cli.connections)?;
            for (hook, after) in programs::runs(pid)? {
                let before = before.get(&hook).copied().unwrap_or_default();
                let runs = (after.count - before.count) as f64;
                if runs > 0.0 {
                    let cost = [runs, (after.ns - before.ns) as f64];
                    seen.programs.entry(hook).or_default().push(cost);
                }
            }
            Ok(())
        })?;
    }
    let nothing = seen[0].speeds.clone();
    Ok(kinds
        .into_iter()
        .zip(seen)
        .map(|(beside, seen)| seen.row(beside, &nothing, cli.connections as f64))
        .collect())
}

/// A round of each kind that can be had, in an order that turns from round to round.
fn each(
    stage: &Stage,
    cli: &Cli,
    kinds: &[Beside],
    seen: &mut [Seen],
    round: usize,
    mut measure: impl FnMut(&mut Seen, &mut Running) -> Result<()>,
) -> Result<()> {
    for turn in 0..kinds.len() {
        let at = (turn + round) % kinds.len();
        if seen[at].missing.is_some() {
            continue;
        }
        let mut running = match kinds[at].start(stage, cli) {
            Ok(running) => running,
            Err(error) if !kinds[at].is_ours() => {
                seen[at].missing = Some(format!("{error:#}"));
                continue;
            }
            Err(error) => return Err(error),
        };
        measure(&mut seen[at], &mut running)?;
        running.stop().with_context(|| format!("{:?}", kinds[at]))?;
    }
    Ok(())
}

fn connect(stage: &Stage, connections: u64) -> Result<Duration> {
    let target = format!("tcp://{}:{}", stage.server, PORTS.start);
    let count = connections.to_string();
    let start = Instant::now();
    let args = [&target, "--count", &count, "--parallel", "4", "--abort"];
    let answered = stage.client.call_all(args)?;
    ensure!(
        answered == connections,
        "{answered} of {connections} connections"
    );
    Ok(start.elapsed())
}

impl Seen {
    fn row(self, beside: Beside, nothing: &[f64], connections: f64) -> Row {
        let ratios = self
            .speeds
            .iter()
            .zip(nothing)
            .map(|(own, nothing)| own / nothing);
        let programs = self.programs.into_iter().map(|(hook, rounds)| {
            let all = |of: fn(&[f64; 2]) -> f64| median(rounds.iter().map(of));
            let cost = ProgramCost {
                runs_per_connection: all(|[runs, _]| *runs) / connections,
                ns_per_run: all(|[runs, ns]| ns / runs),
                ns_per_connection: all(|[_, ns]| *ns) / connections,
            };
            (hook, cost)
        });
        Row {
            beside,
            ratio_to_nothing: median(ratios),
            connections_per_second: median(self.speeds.iter().copied()),
            cpu_seconds_per_million_connections: self
                .resident
                .map(|_| median(self.cpu.iter().copied()) * 1e6 / connections),
            resident: self.resident,
            programs: programs.collect(),
            missing: self.missing,
        }
    }
}

/// 0 of nothing.
fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}
