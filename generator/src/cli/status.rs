//! `microshield status`: how a running generator is, and its agents.

use std::{
    fmt::Write as _,
    io::{self, Read as _, Write as _},
};

use anyhow::Context as _;
use comfy_table::{Table, presets::NOTHING};
use flow::{time::Timestamp, wire::Health};

use super::{Failure, remote::Remote};
use crate::status::{STATUS_PATH, Status};

/// The largest answer: a thousand agents take half a MiB.
const MAX_ANSWER: u64 = 256 << 20;

/// Show how a running generator is: its agents, when they were last seen, and what was lost
///
/// If none is named, it is the one on this machine.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    remote: Remote,

    /// As JSON
    #[arg(long, env = "MICROSHIELD_STATUS_JSON")]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let mut answer = Vec::new();
    args.remote
        .get(STATUS_PATH)
        .map_err(Failure::other)?
        .take(MAX_ANSWER)
        .read_to_end(&mut answer)
        .with_context(|| args.remote.place())
        .map_err(Failure::other)?;
    let shown = if args.json {
        String::from_utf8_lossy(&answer).into_owned() + "\n"
    } else {
        let status = serde_json::from_slice(&answer)
            .context("the answer is no status")
            .map_err(Failure::other)?;
        table(&status).map_err(Failure::other)?
    };
    io::stdout()
        .lock()
        .write_all(shown.as_bytes())
        .context("standard output")
        .map_err(Failure::other)
}

fn table(status: &Status) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
    let connected = status.agents.iter().filter(|agent| agent.connected).count();
    let ledger = &status.ledger;
    writeln!(
        text,
        "generator {}, up {}: {} edges, {} observations, {} in memory, {} on disk; {connected} agents connected",
        status.version,
        age(status.now, status.started),
        ledger.edges,
        ledger.observations,
        mib(ledger.bytes),
        mib(ledger.database_bytes),
    )?;
    if let Some(topology) = &status.topology {
        let words = match (topology.ready, topology.stale_seconds) {
            (false, _) => "not known yet".to_owned(),
            (true, 0) => "current".to_owned(),
            (true, seconds) => format!("not current for {seconds} s"),
        };
        writeln!(text, "the cluster's objects: {words}")?;
    }
    let mut table = columns([
        "NODE",
        "AGENT",
        "CONNECTED",
        "LAST SEEN",
        "BEHIND",
        "CLOCK",
        "WAITING",
        "LOST",
        "INSTANCE",
        "CAPTURES",
    ]);
    for agent in &status.agents {
        let ago = |time: Option<Timestamp>| {
            time.map_or_else(|| "never".to_owned(), |time| age(status.now, time))
        };
        table.add_row([
            agent.node.clone(),
            agent.version.clone(),
            if agent.connected { "yes" } else { "no" }.to_owned(),
            ago(agent.last_seen),
            agent
                .reported_until
                .map_or_else(String::new, |until| age(status.now, until)),
            agent
                .clock_ahead_seconds
                .map_or_else(String::new, |seconds| format!("{seconds:+.1} s")),
            agent.health.map_or_else(String::new, waiting),
            agent.lost.to_string(),
            agent.instance.clone(),
            agent.capabilities.join(","),
        ]);
    }
    writeln!(text, "\n{}", table.trim_fmt())?;
    if !status.losses.is_empty() {
        let mut table = columns(["NODE", "LOST", "REASON"]);
        for loss in &status.losses {
            table.add_row([
                loss.node.clone(),
                loss.count.to_string(),
                loss.reason.clone(),
            ]);
        }
        writeln!(text, "\n{}", table.trim_fmt())?;
    }
    Ok(text)
}

/// A table without lines, the first column at the margin.
fn columns<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(header);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
}

/// What an agent had not delivered when it made its last batch.
fn waiting(health: Health) -> String {
    match health.spool_batches {
        0 => format!("{} flows", health.pending),
        batches => format!("{batches} batches, {}", mib(health.spool_bytes)),
    }
}

fn age(now: Timestamp, then: Timestamp) -> String {
    let seconds = now.as_nanos().saturating_sub(then.as_nanos()) / 1_000_000_000;
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7_200 => format!("{} min", seconds / 60),
        7_200..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} d", seconds / 86_400),
    }
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}
