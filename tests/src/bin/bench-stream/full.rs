//! A generator whose ledger is full, as the container that the manifest makes of it.

use std::{
    fs::{self, File},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use lab::{Container, Lab, Memory, Process, Rights};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use crate::{agents::Crew, workload::Cluster};

/// How long policies of a whole ledger may take to be made, beside everything else that goes on.
const PATIENCE: Duration = Duration::from_secs(900);

/// A ledger takes nothing new for this reason.
const FULL: &str = "ledger_full";

/// Where the manifest has the ledger and the policies.
const SERVE: [&str; 7] = [
    "serve",
    "--listen=127.0.0.1:0",
    "--data-dir=/var/lib/microshield/ledger",
    "--output=/var/lib/microshield/policies",
    "--all-namespaces",
    "--granularity=svc",
    "--insecure",
];

/// What is used of what a generator says of itself.
#[derive(Deserialize)]
struct Status {
    ledger: Ledger,
    losses: Vec<Loss>,
}

#[derive(Deserialize)]
struct Ledger {
    observations: u64,
    edges: u64,
    bytes: u64,
}

#[derive(Deserialize)]
struct Loss {
    reason: String,
}

/// What the kernel counts as the container's memory, in MiB.
#[derive(Serialize)]
pub(crate) struct Full {
    pub(crate) what: &'static str,
    pub(crate) observations: u64,
    pub(crate) edges: u64,
    /// The ledger's own estimate of what it takes.
    pub(crate) ledger_mib: f64,
    /// What the container may take.
    pub(crate) limit_mib: f64,
    /// With the files that were read and written, which the kernel takes back when it needs the room.
    pub(crate) most_mib: f64,
    /// Of the program alone.
    pub(crate) resident_mib: f64,
}

/// Agents fill the ledger until it takes nothing new; then they go on sending while policies are written and readers export and
/// generate. At last the generator starts again, and reads what it had.
pub(crate) fn measure(agents: usize, edges: usize, bytes: u64, seconds: u64) -> Result<Vec<Full>> {
    let mut cluster = lab::Cluster::apart();
    cluster.node("node-1");
    let lab = Lab::start(cluster)?;
    let volumes = lab.folder().join("volumes");
    let container = Container::of_program(&lab::binary("microshield")?, Rights::of_generator()?)
        .volumes(&volumes)
        .in_the_machine_s_network();
    let bound = format!("--ledger-bytes={bytes}");
    let words = SERVE.into_iter().chain([bound.as_str()]);
    let mut serving = container.start(&lab, words.clone())?;
    let address = address(&serving)?;
    let url = format!("http://{address}");

    let mut crew = Crew::connect(address.parse()?, &Cluster::new(agents, edges))?;
    crew.send_all_once()?;
    let status = status(&url)?;
    ensure!(
        status.losses.iter().any(|loss| loss.reason == FULL),
        "{edges} edges take {} bytes and do not fill the ledger: more of them",
        status.ledger.bytes
    );
    let mut rows = vec![row("full", &lab, &serving, &status)?];

    let folder = lab.folder().join("generated");
    let mut readers = vec![
        reader(&url, &["export"], &lab.folder().join("export-1"))?,
        reader(&url, &["export"], &lab.folder().join("export-2"))?,
        reader(
            &url,
            &["generate", "-A", "-a", "-o", &folder.display().to_string()],
            &lab.folder().join("summary"),
        )?,
    ];
    crew.send_for(Duration::from_secs(seconds))?;
    published(&serving, status.ledger.edges)?;
    for reader in &mut readers {
        let ended = reader.wait()?;
        ensure!(ended.success(), "a reader: {ended}");
    }
    rows.push(row("read, policies written", &lab, &serving, &status)?);
    drop(crew);
    let ended = serving.stop(Signal::SIGTERM)?;
    ensure!(ended.success(), "{ended}");

    let again = container.start(&lab, words)?;
    self::address(&again)?;
    rows.push(row("started again", &lab, &again, &status)?);
    Ok(rows)
}

fn row(what: &'static str, lab: &Lab, serving: &Process, status: &Status) -> Result<Full> {
    let memory = Memory::of_the_container(lab)?;
    ensure!(memory.kills == 0, "killed: {memory:?}");
    Ok(Full {
        what,
        observations: status.ledger.observations,
        edges: status.ledger.edges,
        ledger_mib: mebibytes(status.ledger.bytes),
        limit_mib: mebibytes(memory.limit),
        most_mib: mebibytes(memory.most),
        resident_mib: mebibytes(most_resident(serving)?),
    })
}

/// The most memory that the program itself had so far; it is the only child of runc.
fn most_resident(serving: &Process) -> Result<u64> {
    let mut children = String::new();
    for thread in fs::read_dir(format!("/proc/{}/task", serving.pid()))? {
        children += &fs::read_to_string(thread?.path().join("children"))?;
    }
    let child = children.split_whitespace().next().context("no child")?;
    let path = format!("/proc/{child}/status");
    let text = fs::read_to_string(&path).context(path)?;
    let mark = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let mark = mark.and_then(|mark| mark.trim().strip_suffix(" kB"));
    let kib: u64 = mark.context("no high-water mark")?.parse()?;
    Ok(kib << 10)
}

/// Where it listens, which it does when the ledger is read.
fn address(serving: &Process) -> Result<String> {
    let line = said(serving, |line| {
        line.contains("listening address=").then_some(())
    })?;
    let (_, address) = line.split_once("listening address=").unwrap_or_default();
    Ok(address.trim().to_owned())
}

/// Waits until there are policies of as many edges as were in the ledger when it was full.
fn published(serving: &Process, edges: u64) -> Result<()> {
    said(serving, |line| {
        line.contains("policy folder is up to date").then_some(())?;
        let mut words = line.split_whitespace();
        let number = words.find_map(|word| word.strip_prefix("edges="))?;
        (number.parse::<u64>().ok()? >= edges).then_some(())
    })
    .map(drop)
}

fn said(serving: &Process, wanted: impl Fn(&str) -> Option<()>) -> Result<String> {
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        let mut lines = serving.stderr().into_iter();
        if let Some(line) = lines.find(|line| wanted(line).is_some()) {
            return Ok(line);
        }
        thread::sleep(Duration::from_millis(100));
    }
    bail!("it does not say so: {}", serving.stderr().join("\n"))
}

fn status(url: &str) -> Result<Status> {
    let output = Command::new(lab::binary("microshield")?)
        .args(["status", "--json", "--url", url])
        .output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{error}");
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn reader(url: &str, words: &[&str], to: &Path) -> Result<Child> {
    Ok(Command::new(lab::binary("microshield")?)
        .args(words)
        .args(["--url", url])
        .stdout(File::create(to)?)
        .stderr(Stdio::null())
        .spawn()?)
}

#[expect(clippy::cast_precision_loss, reason = "it is rounded for a reader")]
fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
