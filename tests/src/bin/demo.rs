//! The demonstration: bookinfo on two nodes of network namespaces, an agent on each, one generator, and the policies
//! that come of it.
#![forbid(unsafe_code)]

use std::{
    fs,
    io::{IsTerminal as _, Write as _},
    path::Path,
    process::{Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lab::{Agent, AgentOptions, Cluster, Generator, GeneratorOptions, Lab, binary, bookinfo};

/// Where the policies are written, below the current folder.
const FOLDER: &str = "policies/bookinfo";

/// The file that is shown.
const SHOWN: &str = "policy-reviews.yaml";

/// How long traffic flows.
const TRAFFIC: Duration = Duration::from_secs(8);

fn main() -> ExitCode {
    if let Err(reason) = lab::root_or_reason() {
        eprintln!("the demonstration makes network namespaces and loads kernel programs: {reason}");
        return ExitCode::from(2);
    }
    let result = lab::signals::remove_labs_on_interrupt().and_then(|()| run());
    lab::signals::wait_if_interrupted();
    lab::exit_code("demo", result)
}

fn run() -> Result<()> {
    let progress = Progress::start();
    progress.say("building two nodes and six pods");
    let lab = Lab::start(bookinfo::cluster(Cluster::default()))?;
    let folder = Path::new(FOLDER);
    fs::create_dir_all(folder).context(FOLDER)?;

    progress.say("starting the generator and an agent on each node");
    let options = GeneratorOptions::default().output(folder, bookinfo::NAMESPACE, "svc");
    let mut generator = Generator::start(&lab, &options)?;
    let mut agents = Vec::new();
    for node in &lab.cluster().nodes {
        let options = AgentOptions::streaming(&node.name, &generator);
        let mut agent = Agent::start(&lab, &options)?;
        agent.process().wait_stderr(|line| {
            line.contains("connected to the generator") && !line.contains("not connected")
        })?;
        agents.push((node.name.clone(), agent));
    }

    progress.say("starting bookinfo");
    let programs = bookinfo::start(&lab)?;
    for left in (1..=TRAFFIC.as_secs()).rev() {
        progress.say(&format!("watching its traffic, {left} s to go"));
        thread::sleep(Duration::from_secs(1));
    }
    drop(programs);

    let mut memory = Vec::new();
    for (node, mut agent) in agents {
        memory.push((node, agent.process().resident_bytes()?));
        agent.stop()?;
    }
    generator.stop()?;
    progress.say("done");

    show(&generator, folder)?;
    let mut out = std::io::stdout().lock();
    for (node, bytes) in memory {
        writeln!(
            out,
            "agent on {node}: {:.1} MiB resident",
            bytes as f64 / f64::from(1 << 20)
        )?;
    }
    Ok(())
}

/// Prints the connections, the policy files' names and one of the files.
fn show(generator: &Generator, folder: &Path) -> Result<()> {
    let status = Command::new(binary("microshield")?)
        .args(["export", "--edges", "--data-dir"])
        .arg(generator.data())
        .stdin(Stdio::null())
        .status()
        .context("microshield export")?;
    ensure!(status.success(), "microshield export: {status}");

    let mut out = std::io::stdout().lock();
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).context(FOLDER)? {
        files.push(entry?.path().display().to_string());
    }
    files.sort();
    writeln!(out)?;
    for file in files {
        writeln!(out, "{file}")?;
    }
    let shown = folder.join(SHOWN);
    let text = fs::read_to_string(&shown).with_context(|| shown.display().to_string())?;
    writeln!(out, "\n# {}\n{text}", shown.display())?;
    Ok(())
}

/// Lines for somebody who waits; a script gets none.
struct Progress {
    start: Instant,
    wanted: bool,
}

impl Progress {
    fn start() -> Self {
        Self {
            start: Instant::now(),
            wanted: std::io::stderr().is_terminal(),
        }
    }

    fn say(&self, what: &str) {
        if self.wanted {
            eprintln!("{:5.1} s  {what}", self.start.elapsed().as_secs_f32());
        }
    }
}
