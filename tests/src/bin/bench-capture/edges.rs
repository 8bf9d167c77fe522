//! The agent's memory, by how many distinct edges it sees.

use std::{thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use lab::{Agent, AgentOptions, Calls, Generator, GeneratorOptions};
use serde::Serialize;

use crate::{
    NODE, PORTS, Stage,
    usage::{self, Resident},
};

/// Callers at the same time.
const CALLERS: u32 = 4;

/// Server addresses that a caller goes through before it starts anew: some seconds' work.
const PORTION: u32 = 50;

/// How long it takes until what was seen last is named, sent and acknowledged, and its memory given back.
const SETTLED: Duration = Duration::from_secs(12);

/// What the agent used.
#[derive(Serialize)]
pub(crate) struct EdgesRow {
    /// Connections made, each to another address or port of a server.
    edges: u64,
    seconds: f64,
    cpu_seconds_per_million_connections: f64,
    before: Resident,
    after: Resident,
    losses: std::collections::BTreeMap<String, u64>,
}

impl EdgesRow {
    pub(crate) fn columns(&self) -> [String; 6] {
        [
            self.edges.to_string(),
            format!("{:.0}", self.edges as f64 / self.seconds),
            format!("{:.2}", self.cpu_seconds_per_million_connections),
            format!("{:.1}", self.before.now_mib),
            format!("{:.1}", self.after.now_mib),
            format!("{:.1}", self.after.most_mib),
        ]
    }

    pub(crate) fn losses(&self) -> &std::collections::BTreeMap<String, u64> {
        &self.losses
    }
}

/// A number of edges; nothing for the empty word.
pub(crate) fn parse(text: &str) -> Result<Option<u32>, std::num::ParseIntError> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some)
}

/// Makes a connection for each of about `count` edges while an agent streams to a generator.
///
/// The server's network takes all of 10.200.0.0/16 for itself, so there are as many server addresses as one likes.
pub(crate) fn measure(stage: &Stage, count: u32) -> Result<EdgesRow> {
    let ports = u32::from(PORTS.end - PORTS.start);
    let addresses = count.div_ceil(ports);
    ensure!(addresses <= 1 << 16, "at most {} edges", ports << 16);
    let server = stage.lab.pod("bench/server")?;
    server.ip("route replace local 10.200.0.0/16 dev lo")?;
    let node = stage.lab.node(NODE);
    node.ip(&format!("route replace 10.200.0.0/16 via {}", stage.server))?;

    let mut generator = Generator::start(&stage.lab, &GeneratorOptions::default())?;
    let options = AgentOptions::streaming(NODE, &generator);
    let mut agent = Agent::start(&stage.lab, &options)?;
    let pid = agent.process().pid();
    let (before, cpu) = (usage::resident(pid)?, usage::cpu_seconds(pid)?);
    let start = std::time::Instant::now();
    let mut edges = 0;
    for first in (0..addresses).step_by((CALLERS * PORTION) as usize) {
        edges += call(stage, first..addresses.min(first + CALLERS * PORTION))?;
    }
    let seconds = start.elapsed().as_secs_f64();
    thread::sleep(SETTLED);
    let after = usage::resident(pid)?;
    let cpu = usage::cpu_seconds(pid)? - cpu;
    let losses = agent.stop()?.losses;
    generator.stop()?;
    std::fs::remove_dir_all(generator.data()).context("the generator's data")?;
    Ok(EdgesRow {
        edges,
        seconds,
        cpu_seconds_per_million_connections: cpu * 1e6 / edges as f64,
        before,
        after,
        losses,
    })
}

/// Calls each port of these addresses once.
fn call(stage: &Stage, addresses: std::ops::Range<u32>) -> Result<u64> {
    let mut callers = Vec::new();
    for caller in 0..CALLERS {
        let share = addresses
            .clone()
            .skip(caller as usize)
            .step_by(CALLERS as usize);
        let args: Vec<String> = share
            .map(|address| {
                let [_, _, high, low] = address.to_be_bytes();
                format!("tcp://10.200.{high}.{low}:{}", PORTS.start)
            })
            .collect();
        if !args.is_empty() {
            let ports = (PORTS.end - PORTS.start).to_string();
            let flags = ["--abort", "--ports", &ports].map(str::to_owned);
            callers.push(stage.client.start("call", flags.into_iter().chain(args))?);
        }
    }
    let mut answered = 0;
    for caller in &mut callers {
        let calls = Calls::of(caller)?;
        let wanted = Calls {
            answered: calls.answered,
            ..Calls::default()
        };
        ensure!(calls == wanted, "not every call was answered: {calls:?}");
        answered += calls.answered;
    }
    Ok(answered)
}
