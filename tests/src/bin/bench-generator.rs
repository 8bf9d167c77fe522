//! `cargo xtask bench generator`: how fast and how large `microshield link` and `generate` are, on this machine.
//!
//! The log is MicroShield's own, so many times over; the large clusters are made up. Each figure is the median of some rounds,
//! and comes from the program as users run it: from its start to its end, files and all. With a copy of the original at hand
//! (`--original`), it is measured in the same run.
#![forbid(unsafe_code)]

use std::{
    fs::{self, File},
    io::{BufWriter, Write as _},
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use flow::{
    endpoint::{Endpoint, Pod, Service, Workload},
    record::{Direction, FlowRecord, Outcome, Protocol, Source, Tuple},
    time::Timestamp,
};
use serde::Serialize;

/// Measures the generator.
#[derive(Parser)]
struct Cli {
    /// How many times over the log is read: once are 4,801 lines.
    #[arg(long, default_value_t = 500)]
    times: u64,
    /// Services of the large cluster.
    #[arg(long, default_value_t = 5_000)]
    services: u32,
    /// Services that each of them calls.
    #[arg(long, default_value_t = 20)]
    calls: u32,
    /// Services that one client calls, all on one port and without knowing the pods behind them.
    #[arg(long, default_value_t = 20_000)]
    hub: u32,
    /// Folder of the original, with `client-cap/linker.py` and `policy-generator/generator.py`: these are measured too.
    #[arg(long, value_name = "DIR")]
    original: Option<PathBuf>,
    /// How many times over the original reads the log: its memory grows with it.
    #[arg(long, default_value_t = 50)]
    original_times: u64,
    /// Rounds of each kind.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Row {
    what: String,
    /// Lines or records that went in.
    count: u64,
    seconds: f64,
    per_second: f64,
    resident_mib: f64,
}

fn main() -> ExitCode {
    lab::exit_code("bench generator", run(&Cli::parse()))
}

fn run(cli: &Cli) -> Result<()> {
    ensure!(cli.rounds > 0, "at least one round");
    ensure!(
        u64::from(cli.calls).pow(2) < u64::from(cli.services),
        "so many calls of so few services would repeat"
    );
    let dir = tempfile::tempdir()?;
    let path = |name: &str| dir.path().join(name);
    let mut rows = Vec::new();

    let (log, records) = (path("flows.log"), path("flows.json"));
    let lines = write_log(&log, cli.times)?;
    let report = format!("scope={}", fixture("report.json").display());
    for (what, threads) in [("link, one thread", Some("1")), ("link, all threads", None)] {
        let row = measure(cli, what, lines, || {
            let mut link = microshield(&["link", "--topology", &report, "--log"])?;
            link.arg(&log).stdout(File::create(&records)?);
            link.args(threads.iter().flat_map(|threads| ["--threads", threads]));
            Ok(link)
        })?;
        rows.push(row);
    }
    let count = count_lines(&records)?;
    rows.push(measure(cli, "generate of these records", count, || {
        generate(&records, &path("policies"), &[])
    })?);
    if let Some(original) = &cli.original {
        rows.extend(measure_original(cli, original, dir.path())?);
    }
    fs::remove_file(&log)?;
    fs::remove_file(&records)?;

    let large = path("large.json");
    let count = write_large_cluster(&large, cli.services, cli.calls)?;
    let name = |what: &str| format!("{what}, {} services", cli.services);
    rows.push(measure(cli, &name("generate"), count, || {
        let folder = path("large");
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        generate(&large, &folder, &[])
    })?);
    rows.push(measure(cli, &name("generate again"), count, || {
        generate(&large, &path("large"), &[])
    })?);
    rows.push(measure(cli, &name("generate again --json"), count, || {
        generate(&large, &path("large"), &["--json"])
    })?);
    fs::remove_file(&large)?;

    let hub = path("hub.json");
    let count = write_hub(&hub, cli.hub)?;
    let what = format!("generate, one client of {} services", cli.hub);
    rows.push(measure(cli, &what, count, || {
        generate(&hub, &path("hub"), &["-g", "workload"])
    })?);
    print(cli, &rows)
}

/// The original's two programs, on a part of the same log and on what comes of it.
fn measure_original(cli: &Cli, original: &Path, dir: &Path) -> Result<Vec<Row>> {
    // They find their input, and write their output, beside where they are.
    for (folder, name) in [
        ("client-cap", "linker.py"),
        ("policy-generator", "generator.py"),
        ("policy-generator", "templates.py"),
    ] {
        fs::create_dir_all(dir.join(folder))?;
        let from = original.join(folder).join(name);
        fs::copy(&from, dir.join(folder).join(name)).with_context(|| from.display().to_string())?;
    }
    let data = dir.join("data");
    fs::create_dir_all(&data)?;
    fs::copy(fixture("report.json"), data.join("report.json"))?;
    let lines = write_log(&data.join("flows.log"), cli.original_times)?;
    let records = data.join("flows.json");
    let python = |program: &str, folder: &str| {
        let mut python = Command::new("python3");
        python.arg(program).current_dir(dir.join(folder));
        python.stdin(Stdio::null()).stderr(Stdio::null());
        python
    };
    let linker = measure(cli, "linker.py, the original", lines, || {
        let mut linker = python("linker.py", "client-cap");
        linker.stdout(File::create(&records)?);
        Ok(linker)
    })?;
    let count = count_lines(&records)?;
    let generator = measure(cli, "generator.py, the original", count, || {
        let mut generator = python("generator.py", "policy-generator");
        generator.args(["-n", "sock-shop", "-g", "svc", "-a", "-o", "original", "-f"]);
        generator.arg(&records).stdout(Stdio::null());
        Ok(generator)
    })?;
    Ok(vec![linker, generator])
}

fn print(cli: &Cli, rows: &[Row]) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    if cli.json {
        serde_json::to_writer(&mut stdout, rows)?;
        writeln!(stdout)?;
        return Ok(());
    }
    writeln!(
        stdout,
        "{:40} {:>10} {:>9} {:>12} {:>8}",
        "", "LINES", "SECONDS", "LINES/S", "MIB"
    )?;
    for row in rows {
        writeln!(
            stdout,
            "{:40} {:>10} {:>9.3} {:>12.0} {:>8.1}",
            row.what, row.count, row.seconds, row.per_second, row.resident_mib
        )?;
    }
    Ok(())
}

fn generate(records: &Path, folder: &Path, more: &[&str]) -> Result<Command> {
    let mut generate = microshield(&["generate", "-A", "-a"])?;
    generate
        .args(more)
        .arg("-f")
        .arg(records)
        .arg("-o")
        .arg(folder);
    generate.stdout(Stdio::null());
    Ok(generate)
}

fn microshield(args: &[&str]) -> Result<Command> {
    let mut command = Command::new(lab::binary("microshield")?);
    command
        .args(args)
        .stdin(Stdio::null())
        .stderr(Stdio::null());
    Ok(command)
}

/// The median of some rounds, by time.
fn measure(
    cli: &Cli,
    what: &str,
    count: u64,
    command: impl Fn() -> Result<Command>,
) -> Result<Row> {
    let mut rounds = Vec::new();
    for _ in 0..cli.rounds {
        let mut command = command()?;
        let start = Instant::now();
        let child = command.spawn().with_context(|| what.to_owned())?;
        let resident = wait(child, what)?;
        rounds.push((start.elapsed(), resident));
    }
    rounds.sort_unstable();
    let (time, resident) = rounds[rounds.len() / 2];
    Ok(Row {
        what: what.to_owned(),
        count,
        seconds: time.as_secs_f64(),
        per_second: count as f64 / time.as_secs_f64(),
        resident_mib: resident as f64 / 1024.0,
    })
}

/// Waits for the end of a program; the most memory that it was seen to have, in KiB.
fn wait(mut child: Child, what: &str) -> Result<u64> {
    let status = PathBuf::from(format!("/proc/{}/status", child.id()));
    let mut most = 0;
    loop {
        if let Some(status) = child.try_wait()? {
            ensure!(status.success(), "{what}: {status}");
            return Ok(most);
        }
        // The high-water mark: it only grows, and is gone once the program has ended.
        let text = fs::read_to_string(&status).unwrap_or_default();
        let mark = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let mark = mark.and_then(|mark| mark.trim().strip_suffix(" kB")?.parse().ok());
        most = mark.unwrap_or(most).max(most);
        thread::sleep(Duration::from_millis(2));
    }
}

fn fixture(name: &str) -> PathBuf {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    root.join("fixtures/microshield").join(name)
}

fn count_lines(path: &Path) -> Result<u64> {
    let text = fs::read(path)?;
    Ok(text.iter().filter(|byte| **byte == b'\n').count() as u64)
}

/// Writes the log so many times over; how many lines that are.
fn write_log(path: &Path, times: u64) -> Result<u64> {
    let log = fs::read(fixture("flows.log"))?;
    let mut file = BufWriter::new(File::create(path)?);
    for _ in 0..times {
        file.write_all(&log)?;
    }
    file.flush()?;
    Ok(times * log.iter().filter(|byte| **byte == b'\n').count() as u64)
}

/// Writes the records of a cluster in which each service has one pod and calls the next ones; how many there are.
fn write_large_cluster(path: &Path, services: u32, calls: u32) -> Result<u64> {
    let ends: Vec<Endpoint> = (0..services).map(end).collect();
    let mut file = BufWriter::new(File::create(path)?);
    for client in 0..services {
        for step in 1..=calls {
            let server = (client + step * step) % services;
            let time =
                Timestamp::from_nanos(1_700_000_000_000_000_000 + u64::from(client) * 1_000_000);
            let record = record(
                (&ends[client as usize], address(client)),
                (&ends[server as usize], address(server)),
                Direction::Ingress,
                time,
            );
            serde_json::to_writer(&mut file, &record)?;
            file.write_all(b"\n")?;
        }
    }
    file.flush()?;
    Ok(u64::from(services) * u64::from(calls))
}

/// Writes the records of one client that calls every service: what it saw, and what their pods saw. How many there are.
fn write_hub(path: &Path, services: u32) -> Result<u64> {
    let mut file = BufWriter::new(File::create(path)?);
    let client = end(services);
    let time = Timestamp::from_nanos(1_700_000_000_000_000_000);
    for number in 0..services {
        let server = end(number);
        let called = match &server {
            Endpoint::Pod {
                service: Some(service),
                ..
            } => Endpoint::Service(Arc::clone(service)),
            other => other.clone(),
        };
        let from = (&client, address(services));
        for record in [
            record(from, (&called, address(number)), Direction::Egress, time),
            record(from, (&server, address(number)), Direction::Ingress, time),
        ] {
            serde_json::to_writer(&mut file, &record)?;
            file.write_all(b"\n")?;
        }
    }
    file.flush()?;
    Ok(2 * u64::from(services))
}

fn address(number: u32) -> IpAddr {
    Ipv4Addr::from(0x0a00_0000 + number).into()
}

fn record(
    (src, src_addr): (&Endpoint, IpAddr),
    (dst, dst_addr): (&Endpoint, IpAddr),
    direction: Direction,
    time: Timestamp,
) -> FlowRecord {
    FlowRecord {
        timestamp: time,
        hostname: "node-0".to_owned(),
        tuple: Tuple {
            src_addr,
            src_port: 0,
            dst_addr,
            dst_port: 8080,
        },
        src: src.clone(),
        dst: dst.clone(),
        protocol: Protocol::Tcp,
        direction,
        outcome: Outcome::Established,
        count: 1,
        first_seen: time,
        last_seen: time,
        process: None,
        sources: [Source::Ebpf].into(),
        via: None,
        connection: None,
    }
}

fn end(number: u32) -> Endpoint {
    let (namespace, name) = (
        format!("team-{}", number % 100),
        format!("service-{number}"),
    );
    let labels: flow::endpoint::Labels = [("app".to_owned(), name.clone())].into();
    Endpoint::Pod {
        pod: Arc::new(Pod {
            uid: format!("pod-{number}"),
            namespace: namespace.clone(),
            name: format!("{name}-5f495f9cf8-68w5j"),
            labels: labels.clone().into(),
            workload: Some(Arc::new(Workload {
                kind: "Deployment".to_owned(),
                name: name.clone(),
            })),
            node: Some(format!("node-{}", number % 50).into()),
            host_network: false,
            addresses: vec![address(number)],
            services: vec![name.clone()].into(),
        }),
        service: Some(Arc::new(Service {
            uid: format!("service-{number}"),
            namespace,
            name,
            labels: labels.clone(),
            selector: labels,
            backends: Vec::new(),
        })),
    }
}
