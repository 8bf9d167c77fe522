//! The processes of a test.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{feeder, truth::Counts};

/// Far longer than anything takes on the slowest machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// Lines that a process has written.
#[derive(Default)]
struct Lines {
    lines: Mutex<Vec<String>>,
    grown: Condvar,
}

/// A process, killed when it is dropped.
pub(crate) struct Program {
    child: Child,
    lines: Arc<Lines>,
}

impl Program {
    /// `errors`: whether the lines are those of standard error, not output.
    fn start(command: &mut Command, errors: bool) -> Result<Self> {
        let name = format!("{command:?}");
        if errors {
            command.stderr(Stdio::piped());
        } else {
            command.stdout(Stdio::piped());
        }
        let mut child = command.spawn().context(name)?;
        let lines = Arc::new(Lines::default());
        let written = Arc::clone(&lines);
        let read = move |reader: &mut dyn std::io::BufRead| {
            for line in reader.lines().map_while(Result::ok) {
                let mut lines = written.lines.lock().unwrap_or_else(PoisonError::into_inner);
                lines.push(line);
                written.grown.notify_all();
            }
        };
        let (output, error) = (child.stdout.take(), child.stderr.take());
        thread::spawn(move || match (output, error) {
            (Some(output), _) if !errors => read(&mut BufReader::new(output)),
            (_, Some(error)) => read(&mut BufReader::new(error)),
            _ => {}
        });
        Ok(Self { child, lines })
    }

    /// Waits for a line.
    pub(crate) fn wait_for<T>(&self, find: impl Fn(&str) -> Option<T>) -> Result<T> {
        let lines = self
            .lines
            .lines
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let found = |lines: &[String]| lines.iter().rev().find_map(|line| find(line));
        let (lines, _) = self
            .lines
            .grown
            .wait_timeout_while(lines, PATIENCE, |lines| found(lines).is_none())
            .unwrap_or_else(PoisonError::into_inner);
        found(&lines).with_context(|| format!("not said in:\n{}", lines.join("\n")))
    }

    /// The largest number after `word`, if any was said.
    fn number(&self, word: &str) -> u64 {
        let lines = self
            .lines
            .lines
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        lines
            .iter()
            .filter_map(|line| line.strip_prefix(word)?.trim().parse().ok())
            .max()
            .unwrap_or(0)
    }

    /// Resident memory, in bytes.
    pub(crate) fn resident(&self) -> Result<u64> {
        let statm = std::fs::read_to_string(format!("/proc/{}/statm", self.child.id()))?;
        let pages = statm.split(' ').nth(1).context("statm")?;
        Ok(pages.parse::<u64>()? * 4_096)
    }

    pub(crate) fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    pub(crate) fn terminate(mut self) -> Result<()> {
        kill(Pid::from_raw(self.child.id().try_into()?), Signal::SIGTERM)?;
        let status = self.child.wait()?;
        ensure!(status.success(), "{status}");
        Ok(())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Starts `microshield serve` on a free port of loopback.
pub(crate) fn generator(args: &[&str]) -> Result<(Program, SocketAddr)> {
    let mut command = Command::new(lab::binary("microshield")?);
    command
        .env_clear()
        .args(["serve", "--listen", "127.0.0.1:0"])
        .args(args)
        .stdin(Stdio::null());
    let program = Program::start(&mut command, true)?;
    let address = program.wait_for(|line| {
        let (_, address) = line.split_once("listening address=")?;
        address.trim().parse().ok()
    })?;
    Ok((program, address))
}

/// A feeder, and what it was given.
pub(crate) struct Feeder {
    program: Program,
    input: ChildStdin,
    fed: Vec<u64>,
}

impl Feeder {
    pub(crate) fn start(url: &str, spool: &Path, token: &Path, ca: &Path) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .arg(feeder::WORD)
            .arg(url)
            .args([spool, token, ca])
            .stdin(Stdio::piped())
            .stderr(Stdio::null());
        let mut program = Program::start(&mut command, false)?;
        let input = program.child.stdin.take().context("no standard input")?;
        Ok(Self {
            program,
            input,
            fed: Vec::new(),
        })
    }

    pub(crate) fn feed(&mut self, number: u64) -> Result<()> {
        writeln!(self.input, "{number}")?;
        self.fed.push(number);
        Ok(())
    }

    /// Kills it. Returns the drains that are in the spool for sure.
    pub(crate) fn kill(self) -> Result<Vec<u64>> {
        let Self { program, fed, .. } = self;
        let mut child = program;
        child.child.kill()?;
        child.child.wait()?;
        // What it has said before its end is read to the end.
        thread::sleep(Duration::from_millis(5));
        let taken = usize::try_from(child.number("taken ")).unwrap_or(0);
        Ok(fed[..fed.len().min(taken)].to_vec())
    }

    /// Lets it deliver what it can; returns the drains that it took, what it lost, and how many batches it leaves.
    pub(crate) fn finish(self) -> Result<(Vec<u64>, u64, u64)> {
        let Self {
            program,
            input,
            fed,
        } = self;
        drop(input);
        let (lost, spooled) = program.wait_for(|line| {
            let (lost, spooled) = line.strip_prefix("left ")?.split_once(' ')?;
            Some((lost.parse().ok()?, spooled.parse().ok()?))
        })?;
        ensure!(program.number("taken ") == fed.len() as u64);
        Ok((fed, lost, spooled))
    }
}

/// What a ledger has, by server port, and what it says is lost.
pub(crate) fn export(data_dir: &Path) -> Result<(Counts, String)> {
    let output = Command::new(lab::binary("microshield")?)
        .env_clear()
        .args(["export", "--data-dir"])
        .arg(data_dir)
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{said}");
    let mut counts = Counts::new();
    for record in lab::truth::records(output.stdout.split(|byte| *byte == b'\n'))? {
        *counts.entry(record.tuple.dst_port).or_default() += record.count;
    }
    Ok((counts, said))
}
