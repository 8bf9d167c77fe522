//! `cargo xtask bench capture`: what capturing costs, on this machine, in one run.
//!
//! Connections go from one pod of the lab to another, each with a byte there and back. Rounds without an agent, with one in
//! either form and with one that tells connections apart are interleaved, and their medians compared: absolute figures of a shared machine mean little, the
//! ratios do. Times of the kernel programs come from the kernel's own accounting (`kernel.bpf_stats_enabled`), in rounds
//! of their own, because the accounting itself costs something.
#![forbid(unsafe_code)]

use std::{
    fs,
    io::Write as _,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use lab::{Agent, AgentOptions, Cluster, Lab, Place};
use nix::unistd::{SysconfVar, sysconf};
use serde::Serialize;

const NODE: &str = "node-1";
const PORT: u16 = 9000;
const STATS: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// Measures what capturing costs.
#[derive(Parser)]
struct Cli {
    /// Connections a round.
    #[arg(long, default_value_t = 40_000)]
    connections: u64,
    /// Rounds of each kind.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What runs beside the connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Beside {
    Nothing,
    Btf,
    Classic,
    Connections,
}

/// Medians over the rounds of one kind.
#[derive(Serialize)]
struct Row {
    beside: Beside,
    connections_per_second: f64,
    /// In the same run's rounds without an agent these are 1.
    ratio_to_nothing: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    agent: Option<AgentCost>,
}

#[derive(Clone, Copy, Serialize)]
struct AgentCost {
    program_runs_per_connection: f64,
    ns_per_program_run: f64,
    ns_per_connection: f64,
    agent_cpu_seconds_per_million_connections: f64,
    agent_resident_mib: f64,
}

fn main() -> ExitCode {
    if let Err(reason) = lab::root_or_reason() {
        eprintln!("bench capture loads kernel programs: {reason}");
        return ExitCode::from(2);
    }
    match lab::signals::remove_labs_on_interrupt().and_then(|()| run(&Cli::parse())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench capture: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    ensure!(cli.rounds > 0, "--rounds must be at least 1");
    let lab = Lab::start(cluster())?;
    let server = lab.pod("bench/server")?;
    let client = lab.pod("bench/client")?;
    let target = format!("tcp://{}:{PORT}", address(&lab)?);
    let _serving = server.serve(["--tcp", &PORT.to_string()])?;

    let kinds = [
        Beside::Nothing,
        Beside::Btf,
        Beside::Classic,
        Beside::Connections,
    ];
    let mut speeds: [Vec<f64>; 4] = Default::default();
    for round in 0..=cli.rounds {
        for (kind, speeds) in kinds.into_iter().zip(&mut speeds) {
            let agent = start(&lab, kind)?;
            let seconds = connect(&client, &target, cli.connections)?.as_secs_f64();
            if let Some(agent) = agent {
                ensure!(agent.stop()?.losses.is_empty(), "connections were lost");
            }
            // The first round warms up.
            if round > 0 {
                speeds.push(cli.connections as f64 / seconds);
            }
        }
    }
    let _stats = ProgramStats::enable()?;
    let mut rows = Vec::new();
    let nothing = median(&mut speeds[0]);
    for (kind, speeds) in kinds.into_iter().zip(&mut speeds) {
        let speed = median(speeds);
        rows.push(Row {
            beside: kind,
            connections_per_second: speed,
            ratio_to_nothing: speed / nothing,
            agent: cost(&lab, kind, &client, &target, cli)?,
        });
    }
    print(&rows, cli)
}

fn cluster() -> Cluster {
    let mut cluster = Cluster::default();
    cluster.node(NODE);
    for pod in ["server", "client"] {
        cluster.pod("bench", pod).on(NODE).label("app", pod);
    }
    cluster
}

fn address(lab: &Lab) -> Result<std::net::IpAddr> {
    Ok(lab.cluster().addresses(lab.spec("bench/server")?)[0])
}

fn start(lab: &Lab, kind: Beside) -> Result<Option<Agent>> {
    let options = AgentOptions::stdout(NODE);
    let options = match kind {
        Beside::Nothing => return Ok(None),
        Beside::Btf => options.arg("--hooks", "btf"),
        Beside::Classic => options.arg("--hooks", "classic"),
        // Room for all connections that this machine makes in a second.
        Beside::Connections => options
            .arg("--hooks", "btf")
            .arg("--mode", "connections")
            .arg("--ring-bytes", &(64 << 20).to_string()),
    };
    Agent::start(lab, &options).map(Some)
}

fn connect(client: &Place, target: &str, connections: u64) -> Result<Duration> {
    let start = Instant::now();
    let answered = client.call_all([
        target,
        "--count",
        &connections.to_string(),
        "--parallel",
        "4",
        "--abort",
    ])?;
    ensure!(
        answered == connections,
        "{answered} of {connections} connections"
    );
    Ok(start.elapsed())
}

/// What the agent and its programs cost, with the kernel's accounting on.
fn cost(
    lab: &Lab,
    kind: Beside,
    client: &Place,
    target: &str,
    cli: &Cli,
) -> Result<Option<AgentCost>> {
    let Some(mut agent) = start(lab, kind)? else {
        return Ok(None);
    };
    let pid = agent.process().pid();
    let (ns_before, runs_before) = program_time(pid)?;
    let cpu_before = cpu_seconds(pid)?;
    connect(client, target, cli.connections)?;
    let (ns, runs) = program_time(pid)?;
    // The last drain belongs to the cost.
    std::thread::sleep(Duration::from_secs(1));
    let cpu = cpu_seconds(pid)? - cpu_before;
    let resident = agent.process().resident_bytes()?;
    agent.stop()?;
    let connections = cli.connections as f64;
    let (ns, runs) = ((ns - ns_before) as f64, (runs - runs_before) as f64);
    Ok(Some(AgentCost {
        program_runs_per_connection: runs / connections,
        ns_per_program_run: ns / runs,
        ns_per_connection: ns / connections,
        agent_cpu_seconds_per_million_connections: cpu * 1e6 / connections,
        agent_resident_mib: resident as f64 / f64::from(1 << 20),
    }))
}

/// Nanoseconds and runs of all programs that the process holds.
fn program_time(pid: u32) -> Result<(u64, u64)> {
    let folder = format!("/proc/{pid}/fdinfo");
    let (mut ns, mut runs) = (0, 0);
    for entry in fs::read_dir(&folder).with_context(|| folder.clone())? {
        // A descriptor may be closed meanwhile.
        let Ok(info) = fs::read_to_string(entry?.path()) else {
            continue;
        };
        let field = |name: &str| {
            info.lines()
                .find_map(|line| line.strip_prefix(name))
                .and_then(|value| value.trim().parse::<u64>().ok())
        };
        ns += field("run_time_ns:").unwrap_or(0);
        runs += field("run_cnt:").unwrap_or(0);
    }
    Ok((ns, runs))
}

/// User and system time of the process so far.
fn cpu_seconds(pid: u32) -> Result<f64> {
    let file = format!("/proc/{pid}/stat");
    let stat = fs::read_to_string(&file).with_context(|| file.clone())?;
    // The name before it is in parentheses and may hold spaces.
    let (_, fields) = stat.rsplit_once(')').with_context(|| file.clone())?;
    let ticks = fields
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(str::parse::<u64>)
        .sum::<Result<u64, _>>()?;
    let per_second = sysconf(SysconfVar::CLK_TCK)?.context("no clock tick")?;
    Ok(ticks as f64 / per_second as f64)
}

/// The kernel's accounting of programs, on while this lives.
struct ProgramStats {
    before: String,
}

impl ProgramStats {
    fn enable() -> Result<Self> {
        let before = fs::read_to_string(STATS).context(STATS)?;
        fs::write(STATS, "1").context(STATS)?;
        Ok(Self { before })
    }
}

impl Drop for ProgramStats {
    fn drop(&mut self) {
        if let Err(error) = fs::write(STATS, &self.before) {
            eprintln!("{STATS}: {error}");
        }
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn print(rows: &[Row], cli: &Cli) -> Result<()> {
    let mut out = std::io::stdout().lock();
    if cli.json {
        serde_json::to_writer_pretty(&mut out, rows)?;
        writeln!(out)?;
        return Ok(());
    }
    writeln!(
        out,
        "{} connections a round, medians of {} interleaved rounds\n",
        cli.connections, cli.rounds
    )?;
    writeln!(
        out,
        "{:<11} {:>12} {:>6} {:>10} {:>8} {:>8} {:>12} {:>9}",
        "BESIDE",
        "CONNECTIONS/S",
        "RATIO",
        "RUNS/CONN",
        "NS/RUN",
        "NS/CONN",
        "CPU S/M CONN",
        "RSS MIB"
    )?;
    for row in rows {
        let beside = format!("{:?}", row.beside).to_lowercase();
        write!(
            out,
            "{beside:<11} {:>13.0} {:>6.3}",
            row.connections_per_second, row.ratio_to_nothing
        )?;
        if let Some(cost) = row.agent {
            write!(
                out,
                " {:>10.1} {:>8.0} {:>8.0} {:>12.2} {:>9.1}",
                cost.program_runs_per_connection,
                cost.ns_per_program_run,
                cost.ns_per_connection,
                cost.agent_cpu_seconds_per_million_connections,
                cost.agent_resident_mib
            )?;
        }
        writeln!(out)?;
    }
    Ok(())
}
