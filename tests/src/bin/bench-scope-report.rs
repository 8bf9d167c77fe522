//! `cargo xtask bench scope-report`: what it takes to read a report of Weave Scope, on this machine.
//!
//! A made-up report, of which Endpoint, Process and Container nodes are most as in a real one, is written in both forms, plain and
//! compressed; each file is read by this program, started again so that its memory is its own.
#![forbid(unsafe_code)]

use std::{
    env,
    fs::{self, File},
    hint::black_box,
    io::{self, BufWriter, Read, Write},
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::{Instant, SystemTime},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Parser, Subcommand};
use flate2::{Compression, read::GzDecoder, write::GzEncoder};
use flow::{
    time::Timestamp,
    topology::{Index, scope},
};
use nix::sys::time::TimeValLike as _;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Measures what it takes to read a report of Weave Scope.
#[derive(Parser)]
struct Cli {
    /// Sizes of reports, in MiB of JSON.
    #[arg(long, value_delimiter = ',', default_values_t = [10, 100])]
    mib: Vec<usize>,
    /// Another report: files with the same one as JSON and as MessagePack.
    #[arg(long, num_args = 2)]
    files: Vec<PathBuf>,
    /// How often each is read; the fastest counts.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    part: Option<Part>,
}

#[derive(Subcommand)]
enum Part {
    /// The part of the program that reads.
    #[command(hide = true)]
    Read { file: PathBuf },
}

/// What reading one file took.
#[derive(Clone, Debug, Deserialize, Serialize)]
struct Cost {
    pods: usize,
    cpu_seconds: f64,
    index_seconds: f64,
    before_kib: u64,
    peak_kib: u64,
    after_kib: u64,
}

#[derive(Debug, Serialize)]
struct Row {
    form: String,
    bytes: u64,
    #[serde(flatten)]
    cost: Cost,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match &cli.part {
        Some(Part::Read { file }) => read(file),
        None => compare(&cli),
    };
    lab::exit_code("bench scope-report", result)
}

fn compare(cli: &Cli) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut rows = Vec::new();
    if let [json, message_pack] = &cli.files[..] {
        rows.extend(measure(cli, folder.path(), "", json, message_pack)?);
    } else {
        for mib in &cli.mib {
            let (json, message_pack) = (folder.path().join("json"), folder.path().join("msgpack"));
            let units = units(mib << 20)?;
            write_json(&json, units)?;
            write_message_pack(&message_pack, units)?;
            let name = format!("{mib} MiB, ");
            rows.extend(measure(cli, folder.path(), &name, &json, &message_pack)?);
        }
    }
    let mut out = io::stdout().lock();
    if cli.json {
        serde_json::to_writer_pretty(&mut out, &rows)?;
        return Ok(writeln!(out)?);
    }
    writeln!(
        out,
        "{:<24}{:>14}{:>9}{:>9}{:>9}{:>12}{:>12}{:>12}",
        "report", "bytes", "pods", "CPU s", "index s", "before KiB", "peak KiB", "after KiB"
    )?;
    for Row { form, bytes, cost } in &rows {
        writeln!(
            out,
            "{form:<24}{bytes:>14}{:>9}{:>9.3}{:>9.3}{:>12}{:>12}{:>12}",
            cost.pods,
            cost.cpu_seconds,
            cost.index_seconds,
            cost.before_kib,
            cost.peak_kib,
            cost.after_kib
        )?;
    }
    Ok(())
}

fn measure(
    cli: &Cli,
    folder: &Path,
    name: &str,
    json: &Path,
    message_pack: &Path,
) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (form, file) in [("JSON", json), ("MessagePack", message_pack)] {
        let compressed = folder.join("compressed.gz");
        let mut encoder = GzEncoder::new(File::create(&compressed)?, Compression::default());
        io::copy(&mut File::open(file)?, &mut encoder)?;
        encoder.finish()?;
        for (form, file) in [
            (form.to_owned(), file),
            (format!("{form}, gzip"), compressed.as_path()),
        ] {
            eprintln!("{name}{form} …");
            let mut best: Option<Cost> = None;
            for _ in 0..cli.rounds.max(1) {
                let output = Command::new(env::current_exe()?)
                    .arg("read")
                    .arg(file)
                    .output()?;
                let problem = String::from_utf8_lossy(&output.stderr);
                ensure!(output.status.success(), "{}: {problem}", output.status);
                let cost: Cost = serde_json::from_slice(&output.stdout)?;
                if best
                    .as_ref()
                    .is_none_or(|best| cost.cpu_seconds < best.cpu_seconds)
                {
                    best = Some(cost);
                }
            }
            rows.push(Row {
                form: format!("{name}{form}"),
                bytes: fs::metadata(file)?.len(),
                cost: best.context("no round")?,
            });
        }
    }
    Ok(rows)
}

fn read(path: &Path) -> Result<()> {
    let before_kib = status_kib("VmRSS:")?;
    let begun = cpu_seconds()?;
    let file = File::open(path)?;
    let compressed = path.extension().is_some_and(|name| name == "gz");
    let text: Box<dyn Read> = match compressed {
        true => Box::new(GzDecoder::new(file)),
        false => Box::new(file),
    };
    let report = scope::read(text)?;
    ensure!(report.warnings.is_empty(), "{:?}", report.warnings);
    let cpu_seconds = cpu_seconds()? - begun;
    let peak_kib = status_kib("VmHWM:")?;
    let start = Instant::now();
    let mut index = Index::default();
    index.replace(report.objects, Timestamp::from(SystemTime::now()));
    let cost = Cost {
        pods: black_box(&index).counts().pods,
        cpu_seconds,
        index_seconds: start.elapsed().as_secs_f64(),
        before_kib,
        peak_kib,
        after_kib: status_kib("VmRSS:")?,
    };
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, &cost)?;
    Ok(writeln!(out)?)
}

fn cpu_seconds() -> Result<f64> {
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF)?;
    let micros = (usage.user_time() + usage.system_time()).num_microseconds();
    Ok(micros as f64 / 1_000_000.0)
}

fn status_kib(key: &str) -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with(key));
    let number = line.and_then(|line| line.split_whitespace().nth(1));
    Ok(number.with_context(|| format!("no {key}"))?.parse()?)
}

/// How many pods, each with what belongs to it, make a report of this size.
fn units(bytes: usize) -> Result<usize> {
    let mut counter = Counter(0);
    for topology in TOPOLOGIES {
        for (id, node) in nodes(topology, 1_000_000, 1_000_001) {
            serde_json::to_writer(&mut counter, &json!({id: node}))?;
        }
    }
    match bytes / counter.0 {
        0 => bail!("a report has at least {} bytes", counter.0),
        units => Ok(units),
    }
}

struct Counter(usize);

impl Write for Counter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// In the order in which the app writes them.
const TOPOLOGIES: [&str; 5] = ["Endpoint", "Process", "Container", "Pod", "Deployment"];

fn write_json(path: &Path, units: usize) -> Result<()> {
    let mut out = BufWriter::new(File::create(path)?);
    write!(out, "{{\"TS\":\"2026-11-21T20:16:26.391731312Z\"")?;
    for topology in TOPOLOGIES {
        write!(out, ",\"{topology}\":{{\"shape\":\"square\",\"nodes\":{{")?;
        for (number, (id, node)) in nodes(topology, 0, units).enumerate() {
            let comma = if number > 0 { "," } else { "" };
            write!(out, "{comma}\"{id}\":{node}")?;
        }
        write!(out, "}}}}")?;
    }
    write!(out, "}}")?;
    Ok(out.flush()?)
}

fn write_message_pack(path: &Path, units: usize) -> Result<()> {
    let mut out = BufWriter::new(File::create(path)?);
    out.write_all(&[0x80 + 5])?;
    for topology in TOPOLOGIES {
        rmp_serde::encode::write(&mut out, topology)?;
        out.write_all(&[0x80 + 2])?;
        rmp_serde::encode::write(&mut out, "shape")?;
        rmp_serde::encode::write(&mut out, "square")?;
        rmp_serde::encode::write(&mut out, "nodes")?;
        out.write_all(&[0xdf])?;
        let count = u32::try_from(nodes(topology, 0, units).count())?;
        out.write_all(&count.to_be_bytes())?;
        for (id, node) in nodes(topology, 0, units) {
            rmp_serde::encode::write(&mut out, &id)?;
            rmp_serde::encode::write(&mut out, &node)?;
        }
    }
    Ok(out.flush()?)
}

/// What belongs to the pods of these numbers: 30 endpoints, six processes and two containers each, and a Deployment to ten.
fn nodes(topology: &str, from: usize, to: usize) -> impl Iterator<Item = (String, Value)> {
    let each = match topology {
        "Endpoint" => 30,
        "Process" => 6,
        "Container" => 2,
        _ => 1,
    };
    let topology = topology.to_owned();
    (from..to)
        .filter({
            let of_ten = topology == "Deployment";
            move |pod| !of_ten || pod.is_multiple_of(10) || from == 1_000_000
        })
        .flat_map(move |pod| (0..each).map(move |number| (pod, number)))
        .map(move |(pod, number)| node(&topology, pod, number))
}

fn node(topology: &str, pod: usize, number: usize) -> (String, Value) {
    let uid = format!("{pod:08x}-9017-4e5c-8352-2dc0a9ae8f7f");
    let host = format!("node-{};<host>", pod / 100);
    let container = format!("{pod:032x}{number:032x};<container>");
    let address = |pod: usize| {
        let [_, a, b, c] = u32::try_from(pod).unwrap_or(u32::MAX).to_be_bytes();
        format!("10.{a}.{b}.{c}")
    };
    let mut latest = Vec::new();
    let (id, adjacency, parents) = match topology {
        "Endpoint" => {
            latest.push(("host_node_id".to_owned(), host));
            latest.push(("pid".to_owned(), (pod * 6).to_string()));
            let server = format!(";{};8080", address(pod + 1 + number % 5));
            (
                format!(";{};{}", address(pod), 40_000 + number),
                json!([server]),
                Value::Null,
            )
        }
        "Process" => {
            for (key, value) in [
                ("cmdline", "/usr/bin/server --port 8080"),
                ("name", "server"),
                ("threads", "12"),
            ] {
                latest.push((key.to_owned(), value.to_owned()));
            }
            latest.push(("host_node_id".to_owned(), host.clone()));
            let parents = json!({"container": [container], "host": [host.clone()]});
            (
                format!("node-{};{}", pod / 100, pod * 6 + number),
                Value::Null,
                parents,
            )
        }
        "Container" => {
            for label in 0..20 {
                latest.push((
                    format!("docker_label_io.example/label-{label}"),
                    format!("value-{label}-{pod}"),
                ));
            }
            latest.push(("host_node_id".to_owned(), host.clone()));
            let parents = json!({"pod": [format!("{uid};<pod>")], "host": [host]});
            (container, Value::Null, parents)
        }
        "Pod" => {
            for (key, value) in [
                (
                    "kubernetes_name",
                    format!("app-{}-56c994bcff-{pod:05x}", pod / 10),
                ),
                ("kubernetes_namespace", format!("namespace-{}", pod / 200)),
                ("kubernetes_ip", address(pod)),
                ("kubernetes_state", "Running".to_owned()),
                ("kubernetes_created", "2026-11-21T20:12:36Z".to_owned()),
                ("kubernetes_labels_app", format!("app-{}", pod / 10)),
                (
                    "kubernetes_labels_pod-template-hash",
                    "56c994bcff".to_owned(),
                ),
                ("kubernetes_restart_count", "0".to_owned()),
            ] {
                latest.push((key.to_owned(), value));
            }
            let parents = json!({"deployment": [format!("{};<deployment>", pod / 10)]});
            (format!("{uid};<pod>"), Value::Null, parents)
        }
        _ => {
            latest.push(("kubernetes_name".to_owned(), format!("app-{}", pod / 10)));
            (
                format!("{};<deployment>", pod / 10),
                Value::Null,
                Value::Null,
            )
        }
    };
    let latest: serde_json::Map<String, Value> = latest
        .into_iter()
        .map(|(key, value)| {
            (
                key,
                json!({"timestamp": "2026-11-21T20:16:37.392264672Z", "value": value}),
            )
        })
        .collect();
    let topology = topology.to_lowercase();
    let node = json!({"id": id, "topology": topology, "sets": null, "adjacency": adjacency, "latest": latest,
        "parents": parents, "children": null});
    (id, node)
}
