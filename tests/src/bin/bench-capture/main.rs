//! `cargo xtask bench capture`: what capturing costs, on this machine, in one run.
//!
//! Connections go from one pod of the lab to another, each with a byte there and back. Rounds with nothing beside them, with an
//! agent in each mode, and with what else people would use, take turns, and medians of what they say are compared: absolute
//! figures of a shared machine mean little, the ratios of neighbours do. Times of kernel programs come from the kernel's own
//! accounting (`kernel.bpf_stats_enabled`), in rounds of their own, because the accounting itself costs something; how much,
//! says a program that does nothing.
#![forbid(unsafe_code)]

mod beside;
mod edges;
mod programs;
mod report;
mod rounds;
mod usage;

use std::{net::IpAddr, path::PathBuf, process::ExitCode};

use anyhow::{Result, ensure};
use clap::Parser;
use lab::{Cluster, Lab, Place, Process};

const NODE: &str = "node-1";

/// The ports that the server listens on.
const PORTS: std::ops::Range<u16> = 9_000..9_500;

/// Measures what capturing costs.
#[derive(Parser)]
struct Cli {
    /// Connections a round.
    #[arg(long, default_value_t = 40_000)]
    connections: u64,
    /// Rounds of each kind, of each of the two sorts.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Another `microshield-agent`, such as one of an older revision, to be compared in the same rounds.
    #[arg(long, value_name = "PROGRAM")]
    against: Option<PathBuf>,
    /// Leave out tcpdump and bpftrace.
    #[arg(long)]
    only_agents: bool,
    /// How many distinct edges to make, for the agent's memory; `--edges ''` leaves that out.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1000,50000,500000",
        value_parser = edges::parse
    )]
    edges: Vec<Option<u32>>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    if let Err(reason) = lab::root_or_reason() {
        eprintln!("bench capture loads kernel programs: {reason}");
        return ExitCode::from(2);
    }
    lab::exit_code(
        "bench capture",
        lab::signals::remove_labs_on_interrupt().and_then(|()| run(&Cli::parse())),
    )
}

fn run(cli: &Cli) -> Result<()> {
    ensure!(cli.rounds > 0, "--rounds must be at least 1");
    let stage = Stage::build()?;
    let rows = rounds::run(&stage, cli)?;
    let edges = cli.edges.iter().flatten();
    let edges = edges
        .map(|count| edges::measure(&stage, *count))
        .collect::<Result<Vec<_>>>()?;
    report::Report::new(cli, rows, edges).print(cli.json)
}

/// Two pods on one node; one of them serves.
struct Stage {
    lab: Lab,
    client: Place,
    server: IpAddr,
    _serving: Process,
}

impl Stage {
    fn build() -> Result<Self> {
        let mut cluster = Cluster::default();
        cluster.node(NODE);
        for pod in ["server", "client"] {
            cluster.pod("bench", pod).on(NODE).label("app", pod);
        }
        let lab = Lab::start(cluster)?;
        let ports = PORTS.map(|port| port.to_string()).collect::<Vec<_>>();
        let serving = lab
            .pod("bench/server")?
            .serve(["--tcp", &ports.join(",")])?;
        let [server, _] = lab.cluster().addresses(lab.spec("bench/server")?);
        Ok(Self {
            client: lab.pod("bench/client")?,
            server,
            lab,
            _serving: serving,
        })
    }
}
