//! What runs beside the connections.

use std::{
    env,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use lab::{Agent, AgentOptions, Process};
use nix::sys::signal::Signal;
use serde::Serialize;

use crate::{Cli, NODE, Stage};

/// Where connections are told apart, those that exceed the ring are counted by flow, and their ends are not reported.
const NOT_TOLD_APART: [&str; 2] = ["connections_added_up", "closes_lost"];

/// How long bpftrace takes from what it says to what it does.
const BPFTRACE_ATTACHES: Duration = Duration::from_secs(2);

/// What runs beside the connections of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Beside {
    Nothing,
    /// The agent as it is by default.
    Flows,
    /// The agent of `--against`, likewise.
    Against,
    /// With the classic tracepoint.
    Classic,
    /// With `--mode connections`.
    Connections,
    /// tcpdump writing SYNs to a file.
    Tcpdump,
    /// bpftrace counting what the tracepoint reports, by both states.
    Bpftrace,
    /// bpftrace with a program that does nothing, on the same tracepoint: what the kernel's accounting sees of itself.
    Empty,
}

impl Beside {
    /// Those that `cli` asks for.
    pub(crate) fn wanted(cli: &Cli) -> Vec<Self> {
        let against = cli.against.as_ref().map(|_| Self::Against);
        let others = [Self::Tcpdump, Self::Bpftrace].into_iter();
        [Self::Nothing, Self::Flows]
            .into_iter()
            .chain(against)
            .chain([Self::Classic, Self::Connections])
            .chain(others.filter(|_| !cli.only_agents))
            .chain([Self::Empty])
            .collect()
    }

    /// Whether it must not fail.
    pub(crate) fn is_ours(self) -> bool {
        !matches!(self, Self::Tcpdump | Self::Bpftrace | Self::Empty)
    }

    pub(crate) fn start(self, stage: &Stage, cli: &Cli) -> Result<Running> {
        let options = AgentOptions::stdout(NODE).arg("--hooks", "btf");
        let options = match self {
            Self::Nothing => return Ok(Running::Nothing),
            Self::Tcpdump => return tcpdump(stage),
            Self::Bpftrace => {
                return bpftrace(stage, "{ @[args->oldstate, args->newstate] = count(); }");
            }
            Self::Empty => return bpftrace(stage, "{ }"),
            Self::Flows => options,
            Self::Against => options.program(cli.against.as_deref().context("--against")?),
            Self::Classic => AgentOptions::stdout(NODE).arg("--hooks", "classic"),
            Self::Connections => options.arg("--mode", "connections"),
        };
        Agent::start(&stage.lab, &options).map(Running::Agent)
    }
}

/// What was started.
pub(crate) enum Running {
    Nothing,
    Agent(Agent),
    Program(Process),
}

impl Running {
    pub(crate) fn pid(&mut self) -> Option<u32> {
        match self {
            Self::Nothing => None,
            Self::Agent(agent) => Some(agent.process().pid()),
            Self::Program(program) => Some(program.pid()),
        }
    }

    /// Ends it; an agent must have lost no connection.
    pub(crate) fn stop(self) -> Result<()> {
        match self {
            Self::Nothing => {}
            Self::Agent(agent) => {
                let losses = agent.stop()?.losses;
                let is_counted = |reason: &String| NOT_TOLD_APART.contains(&reason.as_str());
                ensure!(losses.keys().all(is_counted), "the agent lost: {losses:?}");
                if !losses.is_empty() {
                    eprintln!("not told apart: {losses:?}");
                }
            }
            Self::Program(mut program) => {
                program.stop(Signal::SIGKILL)?;
            }
        }
        Ok(())
    }
}

/// As one would run it on a node.
fn tcpdump(stage: &Stage) -> Result<Running> {
    let file = stage.lab.folder().join("syns.pcap");
    let file = file.to_str().context("a path that is text")?;
    let filter = "tcp[tcpflags] & tcp-syn != 0";
    let program = stage.lab.node(NODE).exec(
        &find("tcpdump")?,
        ["-i", "any", "-n", "-Z", "root", "-w", file, filter],
    )?;
    program.wait_stderr(|line| line.contains("listening on"))?;
    Ok(Running::Program(program))
}

fn bpftrace(stage: &Stage, action: &str) -> Result<Running> {
    let script = format!("tracepoint:sock:inet_sock_set_state {action}");
    let program = stage.lab.host().exec(&find("bpftrace")?, ["-e", &script])?;
    program.wait_stdout(|line| line.contains("Attaching 1 probe"))?;
    thread::sleep(BPFTRACE_ATTACHES);
    Ok(Running::Program(program))
}

fn find(program: &str) -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|file: &PathBuf| Path::is_file(file))
        .with_context(|| format!("{program} is not installed"))
}
