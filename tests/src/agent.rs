//! The real agent, started beside a lab.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use flow::{record::FlowRecord, wire::UDP_OPEN_BEFORE_UNKNOWN};
use nix::sys::signal::Signal;

use crate::{
    container::Container,
    generator::Generator,
    lab::Lab,
    pace,
    process::{Process, binary, patience},
    rights::Rights,
    truth,
};

/// A running `microshield-agent`, which is one node's.
#[derive(Debug)]
pub struct Agent {
    process: Process,
}

/// How an agent is started.
#[derive(Clone, Debug)]
pub struct AgentOptions {
    node: String,
    /// Else the lab's file.
    topology: Option<String>,
    args: Vec<String>,
    hidden: Option<&'static str>,
    whole_machine: bool,
    cgroup_root: Option<PathBuf>,
    /// Else that of this workspace.
    program: Option<PathBuf>,
}

/// The form of an agent's kernel hooks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hooks {
    /// BTF tracepoints.
    Btf,
    /// Classic tracepoints.
    Classic,
    /// Classic tracepoints on a kernel that does not describe its types.
    ClassicWithoutTypes,
}

/// Where the kernel describes its types.
const TYPES: &str = "/sys/kernel/btf";

/// The reason of runs that the kernel left out.
const SKIPPED: &str = "runs_skipped";

/// What an agent reported from its start to its end.
#[derive(Debug)]
pub struct Capture {
    /// The records that it printed.
    pub records: Vec<FlowRecord>,
    /// What it says it lost, by reason.
    pub losses: BTreeMap<String, u64>,
}

impl Capture {
    /// How many runs of its program the kernel left out.
    #[must_use]
    pub fn skipped(&self) -> u64 {
        self.losses.get(SKIPPED).copied().unwrap_or(0)
    }

    /// Whether nothing else was lost, but for what this kernel cannot tell.
    #[must_use]
    pub fn lost_nothing(&self) -> bool {
        let is_none = |reason: &String| reason == SKIPPED || reason == UDP_OPEN_BEFORE_UNKNOWN;
        self.losses.keys().all(is_none)
    }
}

impl fmt::Display for Hooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Btf => "btf",
            Self::Classic => "classic",
            Self::ClassicWithoutTypes => "classic without types",
        })
    }
}

impl AgentOptions {
    /// An agent for a node that prints its records.
    #[must_use]
    pub fn stdout(node: &str) -> Self {
        Self {
            node: node.to_owned(),
            topology: None,
            args: vec!["--stdout".into()],
            hidden: None,
            whole_machine: false,
            cgroup_root: None,
            program: None,
        }
    }

    /// An agent for a node that streams to whoever is at this URL.
    #[must_use]
    pub fn to(node: &str, url: &str) -> Self {
        Self {
            args: vec!["--generator".into(), url.to_owned()],
            ..Self::stdout(node)
        }
    }

    /// An agent for a node that streams to a generator.
    #[must_use]
    pub fn streaming(node: &str, generator: &Generator) -> Self {
        Self::to(node, &generator.agents_url())
    }

    /// Chooses the form of its kernel hooks.
    #[must_use]
    pub fn hooks(mut self, hooks: Hooks) -> Self {
        self.hidden = (hooks == Hooks::ClassicWithoutTypes).then_some(TYPES);
        self.arg(
            "--hooks",
            match hooks {
                Hooks::Btf => "btf",
                Hooks::Classic | Hooks::ClassicWithoutTypes => "classic",
            },
        )
    }

    /// Watches all processes of this machine, and not only those in its node's cgroups.
    #[must_use]
    pub fn whole_machine(self) -> Self {
        Self {
            whole_machine: true,
            ..self
        }
    }

    /// Gives it another folder of cgroups than its node's.
    #[must_use]
    pub fn cgroup_root(mut self, root: &Path) -> Self {
        self.cgroup_root = Some(root.to_owned());
        self
    }

    /// Takes another agent than that of this workspace.
    #[must_use]
    pub fn program(mut self, program: &Path) -> Self {
        self.program = Some(program.to_owned());
        self
    }

    /// Has it learn the cluster's objects from the API server of this kubeconfig.
    #[must_use]
    pub fn kube(mut self, kubeconfig: &Path) -> Self {
        self.topology = Some("kube".to_owned());
        self.arg("--kubeconfig", &kubeconfig.display().to_string())
    }

    /// Has it learn the cluster's objects from somewhere else.
    #[must_use]
    pub fn topology(mut self, source: &str) -> Self {
        self.topology = Some(source.to_owned());
        self
    }

    fn prints(&self) -> bool {
        self.args.iter().any(|arg| arg == "--stdout")
    }

    /// Adds an argument and its value.
    #[must_use]
    pub fn arg(mut self, flag: &str, value: &str) -> Self {
        self.args.extend([flag.to_owned(), value.to_owned()]);
        self
    }
}

impl Agent {
    /// Starts it and waits until it captures.
    ///
    /// # Errors
    /// If it does not come to that.
    pub fn start(lab: &Lab, options: &AgentOptions) -> Result<Self> {
        let agent = Self::spawn(lab, options)?;
        agent
            .process
            .wait_stderr(|line| line.contains("capturing"))?;
        Ok(agent)
    }

    /// Starts it and waits for nothing.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn spawn(lab: &Lab, options: &AgentOptions) -> Result<Self> {
        let own = lab.cgroup_root(&options.node);
        let root = options.cgroup_root.as_ref().unwrap_or(&own);
        std::fs::create_dir_all(root).with_context(|| root.display().to_string())?;
        let topology = options.topology.clone();
        let topology = topology.unwrap_or_else(|| format!("file={}", lab.topology().display()));
        let mut args = vec![
            "--node-name".to_owned(),
            options.node.clone(),
            "--topology".to_owned(),
            topology,
        ];
        if !options.whole_machine {
            args.extend(["--cgroup-root".to_owned(), root.display().to_string()]);
        }
        const MAP_ENTRIES: &str = "--map-entries";
        if let Some(entries) = pace::map_entries()
            && !options.args.iter().any(|arg| arg == MAP_ENTRIES)
        {
            args.extend([MAP_ENTRIES, entries].map(str::to_owned));
        }
        let args = args.iter().chain(&options.args);
        let program = match &options.program {
            Some(program) => program.clone(),
            None => binary("microshield-agent")?,
        };
        let hidden = options.hidden.map(Path::new);
        let process = match Rights::current() {
            None => lab.host().exec_without(hidden, &program, args)?,
            Some(rights) => {
                let mut container = Container::of_program(&program, rights)
                    .file(lab.folder())
                    .hide(hidden);
                if !options.prints() {
                    container = container.in_the_machine_s_network();
                }
                container.start(lab, args)?
            }
        };
        Ok(Self { process })
    }

    /// The program.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Lets it drain a last time and end.
    ///
    /// # Errors
    /// If it does not end well, or prints what is no flow record.
    pub fn stop(mut self) -> Result<Capture> {
        self.process.signal(Signal::SIGTERM)?;
        let status = self.process.wait(patience())?;
        let log = self.process.stderr();
        ensure!(status.success(), "the agent: {status}\n{}", log.join("\n"));
        let end = log
            .iter()
            .find(|line| line.contains("capture ended"))
            .context("the agent did not log `capture ended`")?;
        let (_, losses) = end
            .split_once("losses=")
            .with_context(|| format!("no losses in {end}"))?;
        let losses = serde_json::Deserializer::from_str(losses)
            .into_iter()
            .next()
            .context("empty losses")?
            .with_context(|| end.clone())?;
        let records = truth::records(self.process.stdout().iter().map(String::as_bytes))?;
        Ok(Capture { records, losses })
    }
}
