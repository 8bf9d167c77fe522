//! What a process uses.

use std::fs;

use anyhow::{Context as _, Result};
use serde::Serialize;

/// Processor time of all threads of a process that has lost none so far.
///
/// `schedstat` has nanoseconds; `stat` has ticks of the clock, of which an agent needs two a round.
pub(crate) fn cpu_seconds(pid: u32) -> Result<f64> {
    let folder = format!("/proc/{pid}/task");
    let mut ns = 0;
    for task in fs::read_dir(&folder).with_context(|| folder.clone())? {
        let file = task?.path().join("schedstat");
        let name = || file.display().to_string();
        let text = fs::read_to_string(&file).with_context(name)?;
        let running = text.split_whitespace().next().with_context(name)?;
        ns += running.parse::<u64>().with_context(name)?;
    }
    Ok(ns as f64 / 1e9)
}

/// Resident memory.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Resident {
    pub(crate) now_mib: f64,
    pub(crate) most_mib: f64,
}

pub(crate) fn resident(pid: u32) -> Result<Resident> {
    let file = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&file).with_context(|| file.clone())?;
    let mib = |name: &str| -> Result<f64> {
        let value = status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .and_then(|rest| rest.trim().strip_suffix(" kB"))
            .with_context(|| format!("{file} has no {name}"))?;
        Ok(value.trim().parse::<u64>()? as f64 / 1024.0)
    };
    Ok(Resident {
        now_mib: mib("VmRSS:")?,
        most_mib: mib("VmHWM:")?,
    })
}
