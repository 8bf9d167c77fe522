//! The generator as users run it, on a free port of loopback.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result};
use tempfile::TempDir;

/// Clock ticks a second, in which `/proc` counts processor time: the same on every Linux of today.
const TICKS: u64 = 100;

/// A running `microshield serve`, which ends with this.
pub(crate) struct Generator {
    child: Child,
    address: SocketAddr,
    _data: TempDir,
}

impl Generator {
    pub(crate) fn start() -> Result<Self> {
        let data = tempfile::tempdir()?;
        let mut child = Command::new(lab::binary("microshield")?)
            .args(["serve", "--listen", "127.0.0.1:0", "--data-dir"])
            .arg(data.path())
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let stderr = child.stderr.take().context("no standard error")?;
        let mut lines = BufReader::new(stderr).lines();
        let address = loop {
            let line = lines.next().context("it ended")??;
            if let Some((_, address)) = line.split_once("listening address=") {
                break address.trim().parse()?;
            }
        };
        // It must not wait for somebody to read what it says.
        std::thread::spawn(move || lines.for_each(drop));
        Ok(Self {
            child,
            address,
            _data: data,
        })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Of all its threads, in user and kernel mode.
    pub(crate) fn processor_time(&self) -> Result<Duration> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        // The name, in parentheses, may have spaces.
        let (_, fields) = stat.rsplit_once(')').context("no name")?;
        let ticks: u64 = fields
            .split_whitespace()
            .skip(11)
            .take(2)
            .map(str::parse::<u64>)
            .sum::<Result<u64, _>>()?;
        Ok(Duration::from_millis(ticks * 1_000 / TICKS))
    }

    /// The most memory that it had so far, in KiB.
    pub(crate) fn most_resident(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let mark = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let mark = mark.and_then(|mark| mark.trim().strip_suffix(" kB"));
        Ok(mark.context("no high-water mark")?.parse()?)
    }
}

impl Drop for Generator {
    fn drop(&mut self) {
        if self.child.kill().is_ok() {
            drop(self.child.wait());
        }
    }
}
