//! The real generator, started beside a lab.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use flow::record::FlowRecord;
use nix::sys::signal::Signal;

use crate::{
    lab::Lab,
    process::{Process, binary},
    truth,
};

/// A running `microshield serve`.
#[derive(Debug)]
pub struct Generator {
    process: Process,
    data: PathBuf,
    port: u16,
}

/// How a generator is started.
#[derive(Clone, Debug, Default)]
pub struct GeneratorOptions {
    args: Vec<String>,
}

impl GeneratorOptions {
    /// Keeps a policy folder for a namespace up to date.
    #[must_use]
    pub fn output(mut self, folder: &Path, namespace: &str, granularity: &str) -> Self {
        let folder = folder.display().to_string();
        let args = ["--output", &folder, "-n", namespace, "-g", granularity];
        self.args.extend(args.map(str::to_owned));
        self
    }

    /// Has it learn the cluster's objects from the API server of this kubeconfig.
    #[must_use]
    pub fn kube(mut self, kubeconfig: &Path) -> Self {
        let kubeconfig = kubeconfig.display().to_string();
        let args = ["--topology", "kube", "--kubeconfig", &kubeconfig];
        self.args.extend(args.map(str::to_owned));
        self
    }

    /// Adds an argument and its value.
    #[must_use]
    pub fn arg(mut self, flag: &str, value: &str) -> Self {
        self.args.extend([flag.to_owned(), value.to_owned()]);
        self
    }
}

impl Generator {
    /// Starts it with its data in the lab's folder, on a port that is free, and waits until it listens.
    ///
    /// # Errors
    /// If it does not come to that.
    pub fn start(lab: &Lab, options: &GeneratorOptions) -> Result<Self> {
        let data = lab.folder().join("generator");
        let own = [
            "serve".to_owned(),
            "--listen".to_owned(),
            "127.0.0.1:0".to_owned(),
            "--data-dir".to_owned(),
            data.display().to_string(),
        ];
        let process = lab
            .host()
            .exec(&binary("microshield")?, own.iter().chain(&options.args))?;
        let line = process.wait_stderr(|line| line.contains("listening"))?;
        let port = port_in(&line).with_context(|| format!("no port in `{line}`"))?;
        Ok(Self {
            process,
            data,
            port,
        })
    }

    /// Where agents connect to.
    #[must_use]
    pub fn agents_url(&self) -> String {
        format!("ws://127.0.0.1:{}/agents", self.port)
    }

    /// Its data folder.
    #[must_use]
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// The program.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// What its ledger holds, by `microshield export`.
    ///
    /// # Errors
    /// If that fails, or prints what is no flow record.
    pub fn export(&self) -> Result<Vec<FlowRecord>> {
        let mut command = Command::new(binary("microshield")?);
        let printed = output(command.args(["export", "--data-dir"]).arg(&self.data))?;
        truth::records(printed.split(|byte| *byte == b'\n')).context("microshield export")
    }

    /// Lets it write what it has and end.
    ///
    /// # Errors
    /// If it does not end well.
    pub fn stop(&mut self) -> Result<()> {
        let status = self.process.stop(Signal::SIGTERM)?;
        let log = self.process.stderr().join("\n");
        ensure!(status.success(), "the generator: {status}\n{log}");
        Ok(())
    }
}

/// Has `microshield generate` write the policies for one namespace's part of some flows.
///
/// # Errors
/// What it says.
pub fn generate(flows: &Path, namespace: &str, granularity: &str, folder: &Path) -> Result<()> {
    let mut command = Command::new(binary("microshield")?);
    command.arg("generate").arg("-f").arg(flows);
    command.args(["-n", namespace, "-g", granularity, "-a", "-o"]);
    output(command.arg(folder)).map(drop)
}

fn output(command: &mut Command) -> Result<Vec<u8>> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?}: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(output.stdout)
}

/// The number after `127.0.0.1:`.
fn port_in(line: &str) -> Option<u16> {
    let (_, rest) = line.split_once("127.0.0.1:")?;
    let digits = rest.split(|letter: char| !letter.is_ascii_digit()).next()?;
    digits.parse().ok()
}
