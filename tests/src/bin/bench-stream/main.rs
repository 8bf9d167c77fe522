//! `cargo xtask bench stream`: what it takes to bring flows into the ledger, on this machine.
//!
//! The generator is the real program with its ledger on disk; the agents are simulated, each with a connection of its own
//! over loopback. They send the same edges again and again, as agents do, each time a little later. Both share the
//! machine's processors, so the generator's own processor time is told apart.
#![forbid(unsafe_code)]

use std::{
    io::Write as _,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use clap::Parser;
use flow::wire::{self, AgentMessage, Encoding, MAX_BATCH_FLOWS};
use serde::Serialize;

mod agents;
mod full;
mod program;
mod workload;

use self::{agents::Crew, full::Full, program::Generator, workload::Cluster};

/// Measures the stream from the agents into the ledger.
#[derive(Parser)]
struct Cli {
    /// How many agents, round by round.
    #[arg(long, value_delimiter = ',', default_value = "10,100,1000")]
    agents: Vec<usize>,
    /// Edges of the cluster; both ends' agents report each.
    #[arg(long, default_value_t = 25_000)]
    edges: usize,
    /// Edges of the round that is for the memory, with as many agents as the last.
    #[arg(long, default_value_t = 100_000)]
    most_edges: usize,
    /// For how long the agents send as fast as they are acknowledged, in seconds.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Flows a second of the node whose spool of an hour is delivered.
    #[arg(long, default_value_t = 200)]
    spooled: usize,
    /// Nothing but this (root): what a generator with a full ledger takes, as the container of the manifest; with as many agents
    /// as the last round, and as many edges as are needed to fill it.
    #[arg(long, value_name = "EDGES")]
    full: Option<usize>,
    /// The bound of that ledger, as the manifest has it.
    #[arg(long, value_name = "BYTES", default_value_t = 256 << 20)]
    ledger_bytes: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// An encoding of a batch of ordinary flows.
#[derive(Serialize)]
struct Codec {
    encoding: &'static str,
    bytes_per_flow: f64,
    encode_ns_per_flow: f64,
    decode_ns_per_flow: f64,
}

/// The ledger while agents send.
#[derive(Serialize)]
struct Race {
    what: String,
    agents: usize,
    edges: usize,
    flows: u64,
    seconds: f64,
    flows_per_second: f64,
    batches_per_second: f64,
    /// Of the generator, per flow.
    processor_us_per_flow: f64,
    resident_mib: f64,
}

#[derive(Serialize)]
struct Report {
    codecs: Vec<Codec>,
    races: Vec<Race>,
}

fn main() -> ExitCode {
    lab::exit_code("bench stream", run(&Cli::parse()))
}

fn run(cli: &Cli) -> Result<()> {
    ensure!(
        cli.edges > 0 && cli.agents.iter().all(|agents| *agents > 1),
        "an edge has two ends: at least one edge and two agents"
    );
    if let (Some(edges), Some(&agents)) = (cli.full, cli.agents.last()) {
        let rows = full::measure(agents, edges, cli.ledger_bytes, cli.seconds)?;
        return print_full(cli, &rows);
    }
    let codecs = vec![
        codec("MessagePack", Encoding::MessagePack)?,
        codec("JSON", Encoding::Json)?,
    ];
    let mut races = Vec::new();
    for &agents in &cli.agents {
        races.extend(race(agents, cli.edges, cli.seconds)?);
    }
    if let Some(&agents) = cli.agents.last() {
        races.extend(race(agents, cli.most_edges, cli.seconds)?);
    }
    races.push(drain(cli.spooled)?);
    print(cli, &Report { codecs, races })
}

/// Encodes and decodes one batch, over and over.
fn codec(name: &'static str, encoding: Encoding) -> Result<Codec> {
    const TIMES: u32 = 50;
    let batches = Cluster::new(10, 5_000).batches(0);
    let batch = AgentMessage::Batch(batches[0].clone());
    let bytes = wire::encode(&batch, encoding)?;
    let per_flow = |start: Instant| {
        let nanos = start.elapsed().as_nanos() as f64;
        nanos / f64::from(TIMES) / MAX_BATCH_FLOWS as f64
    };
    let start = Instant::now();
    for _ in 0..TIMES {
        ensure!(wire::encode(&batch, encoding)?.len() == bytes.len());
    }
    let encode_ns_per_flow = per_flow(start);
    let start = Instant::now();
    for _ in 0..TIMES {
        ensure!(wire::decode::<AgentMessage>(&bytes, encoding)? == batch);
    }
    Ok(Codec {
        encoding: name,
        bytes_per_flow: bytes.len() as f64 / MAX_BATCH_FLOWS as f64,
        encode_ns_per_flow,
        decode_ns_per_flow: per_flow(start),
    })
}

/// All edges once, which are new to the ledger, and then for a while as fast as it goes.
fn race(agents: usize, edges: usize, seconds: u64) -> Result<[Race; 2]> {
    let generator = Generator::start()?;
    let mut crew = Crew::connect(generator.address(), &Cluster::new(agents, edges))?;
    let row = |what: &str, lap: Lap| Race {
        what: what.to_owned(),
        agents,
        edges,
        flows: lap.flows,
        seconds: lap.seconds,
        flows_per_second: lap.flows as f64 / lap.seconds,
        batches_per_second: lap.batches as f64 / lap.seconds,
        processor_us_per_flow: lap.processor.as_secs_f64() * 1e6 / lap.flows as f64,
        resident_mib: lap.resident as f64 / 1024.0,
    };
    let new = lap(&generator, || crew.send_all_once())?;
    let known = lap(&generator, || crew.send_for(Duration::from_secs(seconds)))?;
    Ok([row("new edges", new), row("known edges", known)])
}

/// An hour of one node, a batch a second, as it comes out of its spool: one connection, a few batches under way.
fn drain(flows: usize) -> Result<Race> {
    let generator = Generator::start()?;
    let cluster = Cluster::new(2, flows);
    let mut crew = Crew::connect(generator.address(), &cluster)?;
    let lap = lap(&generator, || crew.send_hour())?;
    Ok(Race {
        what: "an hour's spool".to_owned(),
        agents: 1,
        edges: flows,
        flows: lap.flows,
        seconds: lap.seconds,
        flows_per_second: lap.flows as f64 / lap.seconds,
        batches_per_second: lap.batches as f64 / lap.seconds,
        processor_us_per_flow: lap.processor.as_secs_f64() * 1e6 / lap.flows as f64,
        resident_mib: lap.resident as f64 / 1024.0,
    })
}

/// What was delivered and acknowledged.
#[derive(Clone, Copy, Default)]
struct Delivered {
    flows: u64,
    batches: u64,
}

struct Lap {
    flows: u64,
    batches: u64,
    seconds: f64,
    processor: Duration,
    /// KiB.
    resident: u64,
}

fn lap(generator: &Generator, work: impl FnOnce() -> Result<Delivered>) -> Result<Lap> {
    let before = generator.processor_time()?;
    let start = Instant::now();
    let delivered = work()?;
    Ok(Lap {
        flows: delivered.flows,
        batches: delivered.batches,
        seconds: start.elapsed().as_secs_f64(),
        processor: generator.processor_time()?.saturating_sub(before),
        resident: generator.most_resident()?,
    })
}

fn print(cli: &Cli, report: &Report) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    if cli.json {
        serde_json::to_writer(&mut stdout, report)?;
        writeln!(stdout)?;
        return Ok(());
    }
    writeln!(
        stdout,
        "{:12} {:>11} {:>10} {:>10}",
        "", "BYTES/FLOW", "ENCODE ns", "DECODE ns"
    )?;
    for codec in &report.codecs {
        writeln!(
            stdout,
            "{:12} {:>11.0} {:>10.0} {:>10.0}",
            codec.encoding,
            codec.bytes_per_flow,
            codec.encode_ns_per_flow,
            codec.decode_ns_per_flow
        )?;
    }
    writeln!(
        stdout,
        "\n{:16} {:>6} {:>7} {:>9} {:>7} {:>9} {:>9} {:>11} {:>8}",
        "", "AGENTS", "EDGES", "FLOWS", "SECONDS", "FLOWS/S", "BATCHES/S", "CPU us/FLOW", "MAX MIB"
    )?;
    for race in &report.races {
        writeln!(
            stdout,
            "{:16} {:>6} {:>7} {:>9} {:>7.2} {:>9.0} {:>9.0} {:>11.2} {:>8.1}",
            race.what,
            race.agents,
            race.edges,
            race.flows,
            race.seconds,
            race.flows_per_second,
            race.batches_per_second,
            race.processor_us_per_flow,
            race.resident_mib
        )?;
    }
    Ok(())
}

fn print_full(cli: &Cli, rows: &[Full]) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    if cli.json {
        serde_json::to_writer(&mut stdout, rows)?;
        writeln!(stdout)?;
        return Ok(());
    }
    writeln!(
        stdout,
        "{:24} {:>12} {:>8} {:>8} {:>8} {:>8} {:>8}",
        "MIB", "OBSERVATIONS", "EDGES", "LEDGER", "RSS", "COUNTED", "LIMIT"
    )?;
    for row in rows {
        writeln!(
            stdout,
            "{:24} {:>12} {:>8} {:>8.1} {:>8.1} {:>8.1} {:>8.0}",
            row.what,
            row.observations,
            row.edges,
            row.ledger_mib,
            row.resident_mib,
            row.most_mib,
            row.limit_mib
        )?;
    }
    Ok(())
}
