//! Where programs run: in a pod, beside the pods on a node, outside, or on the machine itself.

use std::{
    env,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::PoisonError,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::{
    network, pace,
    process::{Process, binary},
    remains,
};

/// How long a program that makes connections may take.
fn call_patience() -> Duration {
    pace::patience(Duration::from_secs(120))
}

/// A network namespace and a cgroup.
#[derive(Clone, Debug)]
pub struct Place {
    pub(crate) name: String,
    pub(crate) namespace: Option<PathBuf>,
    pub(crate) cgroup: PathBuf,
    /// Another in a v1 hierarchy.
    pub(crate) v1_cgroup: Option<PathBuf>,
    /// The only one that programs run on.
    pub(crate) processor: Option<usize>,
}

/// What became of the calls of `lab-pod call`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Calls {
    /// Answered.
    pub answered: u64,
    /// Refused: nobody listens, or a firewall says so.
    pub refused: u64,
    /// Neither accepted nor refused within the time limit.
    pub timed_out: u64,
    /// Accepted, and reset before the answer.
    pub reset: u64,
    /// Anything else, such as no route.
    pub failed: u64,
}

impl Place {
    /// The cgroup that programs run in.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// The same place, with one processor for what is started in it.
    #[must_use]
    pub fn on_processor(self, processor: usize) -> Self {
        Self {
            processor: Some(processor),
            ..self
        }
    }

    /// Starts `lab-pod serve` and waits until it listens.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn serve<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Result<Process> {
        self.start("serve", args)
    }

    /// Runs `lab-pod call` to its end.
    ///
    /// # Errors
    /// If it cannot be run; calls that fail are no error.
    pub fn call<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Result<Calls> {
        Calls::of(&mut self.start("call", args)?)
    }

    /// Runs `lab-pod call` to its end; every call must be answered.
    ///
    /// # Errors
    /// If one is not.
    pub fn call_all<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Result<u64> {
        let calls = self.call(args)?;
        ensure!(
            calls
                == Calls {
                    answered: calls.answered,
                    ..Calls::default()
                },
            "{}: not every call was answered: {calls:?}",
            self.name
        );
        Ok(calls.answered)
    }

    /// Starts `lab-pod hold` and waits until its connections are open.
    ///
    /// # Errors
    /// If one does not come about.
    pub fn hold<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Result<Process> {
        let process = self.start("hold", args)?;
        process.wait_stdout(|line| line == "held")?;
        Ok(process)
    }

    /// Runs `lab-pod play` to its end.
    ///
    /// # Errors
    /// If a step fails.
    pub fn play<S: AsRef<OsStr>>(&self, steps: impl IntoIterator<Item = S>) -> Result<()> {
        let mut process = self.spawn("play", steps)?;
        let status = process.wait(call_patience())?;
        ensure!(
            status.success(),
            "{}: {}",
            self.name,
            process.stderr().join("\n")
        );
        Ok(())
    }

    /// Starts `lab-pod WORD` and waits until it is ready.
    ///
    /// # Errors
    /// If it does not become so.
    pub fn start<S: AsRef<OsStr>>(
        &self,
        word: &str,
        args: impl IntoIterator<Item = S>,
    ) -> Result<Process> {
        let process = self.spawn(word, args)?;
        process.wait_stdout(|line| line == "ready")?;
        Ok(process)
    }

    /// Starts another program; it finds a tracefs at `/sys/kernel/tracing`.
    ///
    /// # Errors
    /// If that fails.
    pub fn exec<S: AsRef<OsStr>>(
        &self,
        program: &Path,
        args: impl IntoIterator<Item = S>,
    ) -> Result<Process> {
        self.exec_without(None, program, args)
    }

    /// As [`Self::exec`]; the program finds the folder `hidden` empty.
    pub(crate) fn exec_without<S: AsRef<OsStr>>(
        &self,
        hidden: Option<&Path>,
        program: &Path,
        args: impl IntoIterator<Item = S>,
    ) -> Result<Process> {
        let hide = hidden.map(|folder| ["--hide".as_ref(), folder.as_os_str()]);
        let own = hide.into_iter().flatten().chain([program.as_os_str()]);
        let args = args.into_iter().map(|arg| arg.as_ref().to_owned());
        self.spawn("exec", own.map(OsStr::to_owned).chain(args))
    }

    /// Adds nftables rules to the place's network, such as a firewall. They go with the lab.
    ///
    /// # Errors
    /// What `nft` says.
    pub fn nft(&self, ruleset: &str) -> Result<()> {
        match &self.namespace {
            Some(namespace) => network::nft(namespace, ruleset),
            None => bail!("{} is the machine itself", self.name),
        }
    }

    /// Has `ip` carry out commands in the place's network, one a line. What they make goes with the lab.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn ip(&self, commands: &str) -> Result<()> {
        match &self.namespace {
            Some(namespace) => network::inside(namespace, || network::ip(None, commands)),
            None => bail!("{} is the machine itself", self.name),
        }
    }

    /// Has a processor handle all packets that arrive in this pod: receive packet steering, as of
    /// `Documentation/networking/scaling.rst` of the kernel.
    ///
    /// # Errors
    /// If the kernel cannot, or this is no pod.
    pub fn steer_packets_to(&self, processor: usize) -> Result<()> {
        match &self.namespace {
            Some(namespace) => network::steer_packets(namespace, processor),
            None => bail!("{} is the machine itself", self.name),
        }
    }

    fn spawn<S: AsRef<OsStr>>(
        &self,
        word: &str,
        args: impl IntoIterator<Item = S>,
    ) -> Result<Process> {
        let _open = remains::GATE.read().unwrap_or_else(PoisonError::into_inner);
        let mut command = Command::new(binary("lab-pod")?);
        for cgroup in [&self.cgroup].into_iter().chain(&self.v1_cgroup) {
            fs::create_dir_all(cgroup).with_context(|| cgroup.display().to_string())?;
            command.arg("--cgroup").arg(cgroup);
        }
        if let Some(namespace) = &self.namespace {
            command.arg("--netns").arg(namespace);
        }
        if let Some(processor) = self.processor {
            command.arg("--processor").arg(processor.to_string());
        }
        command
            .arg("--parent")
            .arg(std::process::id().to_string())
            .arg(word)
            .args(args);
        // Lines that the lab waits for must be logged, whatever the caller wants of its own programs.
        for (variable, _) in env::vars_os() {
            let name = variable.to_string_lossy();
            if name == "RUST_LOG" || name.starts_with("MICROSHIELD_") {
                command.env_remove(variable);
            }
        }
        Process::spawn(format!("{word} in {}", self.name), command)
    }
}

impl Calls {
    /// Waits for `lab-pod call` to end and reads its report.
    ///
    /// # Errors
    /// If it ends otherwise.
    pub fn of(process: &mut Process) -> Result<Self> {
        let status = process.wait(call_patience())?;
        let report = process.stdout().pop().unwrap_or_default();
        serde_json::from_str(&report).with_context(|| {
            format!(
                "lab-pod call: {status}, {report:?}, {}",
                process.stderr().join("\n")
            )
        })
    }
}

impl std::ops::AddAssign for Calls {
    fn add_assign(&mut self, other: Self) {
        self.answered += other.answered;
        self.refused += other.refused;
        self.timed_out += other.timed_out;
        self.reset += other.reset;
        self.failed += other.failed;
    }
}
