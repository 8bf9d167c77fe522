//! `cargo xtask bench scope-log`: what it takes to read the Scope probe's log, on this machine.
//!
//! Lines are MicroShield's own recorded log, over and over. Lines a second are of one thread that does nothing else;
//! instructions a line, which no other program disturbs, are counted by valgrind, as the difference between a longer and a
//! shorter run. Following is the real agent (root): its processor time while lines are written at a steady rate, less that of
//! an agent for which none are.
#![forbid(unsafe_code)]

use std::{
    env,
    fs::{self, File, OpenOptions},
    hint::black_box,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, Subcommand};
use flow::scope_log::{self, Ends, frame::Assembler};
use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, SysconfVar, sysconf},
};
use serde::Serialize;

/// Measures what it takes to read the Scope probe's log.
#[derive(Parser)]
struct Cli {
    /// How many times over the recorded log is parsed: once are 4,801 lines.
    #[arg(long, default_value_t = 200)]
    times: usize,
    /// Rounds; the median counts.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Lines that are written in a second to the log that an agent follows.
    #[arg(long, default_value_t = 5_000)]
    rate: usize,
    /// For how many seconds.
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    part: Option<Part>,
}

#[derive(Subcommand)]
enum Part {
    /// Parse so many times over, and nothing else.
    #[command(hide = true)]
    Parse { form: String, times: usize },
}

#[derive(Serialize)]
struct Row {
    what: String,
    value: f64,
    unit: &'static str,
}

/// The forms of a line, and what each is made of: the record.
const FORMS: [&str; 3] = ["plain", "cri", "docker"];

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match &cli.part {
        Some(Part::Parse { form, times }) => log(form).map(|log| {
            black_box(parse(&log, *times));
        }),
        None => run(&cli),
    };
    lab::exit_code("bench scope-log", result)
}

fn run(cli: &Cli) -> Result<()> {
    ensure!(
        cli.rounds > 0 && cli.times > 0 && cli.seconds > 0,
        "at least one of each"
    );
    let mut rows = Vec::new();
    for form in FORMS {
        let log = log(form)?;
        let lines = (bytes_count(&log) * cli.times) as f64;
        let rounds = (0..cli.rounds).map(|_| {
            let start = Instant::now();
            black_box(parse(&log, cli.times));
            lines / start.elapsed().as_secs_f64()
        });
        rows.push(Row {
            what: format!("{form}: parsed"),
            value: median(rounds.collect()),
            unit: "lines/s",
        });
        rows.push(Row {
            what: format!("{form}: instructions"),
            value: instructions(form)?,
            unit: "a line",
        });
    }
    let idle = follow(cli, 0)?;
    let busy = follow(cli, cli.rate)?;
    rows.push(Row {
        what: format!("following {} lines/s", cli.rate),
        value: (busy.cpu_percent - idle.cpu_percent).max(0.0),
        unit: "% of a processor",
    });
    for (what, agent) in [("without lines", &idle), ("with lines", &busy)] {
        rows.push(Row {
            what: format!("agent's resident memory, {what}"),
            value: agent.resident_mib,
            unit: "MiB",
        });
    }
    print(cli, &rows)
}

/// The recorded log in one of its forms.
fn log(form: &str) -> Result<Vec<u8>> {
    let text = fs::read_to_string(fixture("flows.log"))?;
    let mut log = Vec::new();
    for line in text.lines() {
        match form {
            "cri" => writeln!(log, "2022-08-18T03:24:11.696728123Z stderr F {line}")?,
            "docker" => {
                let entry = serde_json::json!({"log": format!("{line}\n"), "stream": "stderr"});
                // As Go writes it.
                let entry = entry
                    .to_string()
                    .replace('<', "\\u003c")
                    .replace('>', "\\u003e");
                writeln!(log, "{entry}")?;
            }
            _ => writeln!(log, "{line}")?,
        }
    }
    Ok(log)
}

fn bytes_count(log: &[u8]) -> usize {
    log.iter().filter(|byte| **byte == b'\n').count()
}

fn parse(log: &[u8], times: usize) -> usize {
    let mut assembler = Assembler::default();
    let mut parser = scope_log::Parser::new(Ends::Both);
    let mut connections = 0;
    for _ in 0..times {
        for line in log.split(|byte| *byte == b'\n') {
            if let Ok(Some(line)) = assembler.push(line) {
                connections += usize::from(matches!(parser.parse(&line), Ok(Some(_))));
            }
        }
    }
    connections
}

/// Instructions a line.
fn instructions(form: &str) -> Result<f64> {
    let lines = bytes_count(&log(form)?);
    let (short, long) = (1, 11);
    let difference = collected(form, long)?.saturating_sub(collected(form, short)?);
    Ok(difference as f64 / (lines * (long - short)) as f64)
}

/// All instructions of a run.
fn collected(form: &str, times: usize) -> Result<u64> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(env::current_exe()?)
        .args(["parse", form, &times.to_string()])
        .output()
        .context("valgrind")?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        output.status.success(),
        "valgrind: {}\n{text}",
        output.status
    );
    let count = text.split("Collected : ").nth(1).map(|rest| {
        let digits = rest.trim_start();
        let end = digits.find(|letter: char| !letter.is_ascii_digit());
        digits[..end.unwrap_or(digits.len())].parse::<u64>()
    });
    count
        .context("valgrind says no count")?
        .context("valgrind's count")
}

/// What an agent took.
struct Took {
    cpu_percent: f64,
    resident_mib: f64,
}

/// An agent that follows a log; it is ended when this is dropped.
struct Agent(Child);

impl Drop for Agent {
    fn drop(&mut self) {
        let ended = self.0.kill().and_then(|()| self.0.wait());
        if let Err(error) = ended {
            eprintln!("the agent: {error}");
        }
    }
}

fn follow(cli: &Cli, rate: usize) -> Result<Took> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("probe.log");
    let mut file = OpenOptions::new().create(true).append(true).open(&path)?;
    let own = env::current_exe()?;
    let topology = format!("file={}", fixture("cluster.yaml").display());
    let mut agent = Command::new(own.with_file_name("microshield-agent"));
    agent
        .args(["--stdout", "--node-name", "node-1", "--topology", &topology])
        .arg("--scope-log")
        .arg(&path)
        .stdout(Stdio::null())
        .stderr(File::create(folder.path().join("stderr"))?);
    let agent = Agent(agent.spawn().context("microshield-agent")?);
    let pid = agent.0.id();
    // It has started, and read what was there before.
    thread::sleep(Duration::from_secs(5));

    let log = log("cri")?;
    let lines: Vec<&[u8]> = log.split_inclusive(|byte| *byte == b'\n').collect();
    let mut next = lines.iter().cycle();
    let (before, start) = (cpu_seconds(pid)?, Instant::now());
    for tenth in 1..=cli.seconds * 10 {
        for line in next.by_ref().take(rate / 10) {
            file.write_all(line)?;
        }
        let until = start + Duration::from_millis(100) * u32::try_from(tenth)?;
        thread::sleep(until.saturating_duration_since(Instant::now()));
    }
    let (after, time) = (cpu_seconds(pid)?, start.elapsed());
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let resident = resident.context("no VmRSS")?.trim().trim_end_matches(" kB");
    let took = Took {
        cpu_percent: 100.0 * (after - before) / time.as_secs_f64(),
        resident_mib: resident.trim().parse::<f64>()? / 1024.0,
    };
    kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGTERM)?;
    Ok(took)
}

/// Seconds of processor time that a process has taken.
fn cpu_seconds(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).context("the agent has ended")?;
    let (_, fields) = stat.rsplit_once(')').context("/proc/PID/stat")?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let ticks = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    let per_second = sysconf(SysconfVar::CLK_TCK)?.context("no CLK_TCK")?;
    Ok(ticks as f64 / per_second as f64)
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures/microshield")
        .join(name)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[expect(clippy::print_stdout, reason = "this is what the program is for")]
fn print(cli: &Cli, rows: &[Row]) -> Result<()> {
    if cli.json {
        println!("{}", serde_json::to_string_pretty(rows)?);
        return Ok(());
    }
    for Row { what, value, unit } in rows {
        println!("{what:40} {value:14.1} {unit}");
    }
    Ok(())
}
