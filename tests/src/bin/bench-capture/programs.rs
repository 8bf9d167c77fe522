//! What the kernel says of its programs.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use anyhow::{Context as _, Result};
use serde::Serialize;

const STATS: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// Where a program sits, by its type in `enum bpf_prog_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Hook {
    /// On a tracepoint: state changes of TCP sockets.
    States,
    /// At a cgroup, on packets that leave and arrive.
    Packets,
    /// At a cgroup, on calls of processes.
    Calls,
}

impl Hook {
    fn of(program_type: u32) -> Self {
        const CGROUP_SKB: u32 = 8;
        const CGROUP_SOCK: u32 = 9;
        const CGROUP_SOCK_ADDR: u32 = 18;
        match program_type {
            CGROUP_SKB => Self::Packets,
            CGROUP_SOCK | CGROUP_SOCK_ADDR => Self::Calls,
            _ => Self::States,
        }
    }
}

/// How often programs ran and how long that took.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Runs {
    pub(crate) count: u64,
    pub(crate) ns: u64,
}

/// The runs so far of all programs that a process holds.
pub(crate) fn runs(pid: u32) -> Result<BTreeMap<Hook, Runs>> {
    let folder = format!("/proc/{pid}/fdinfo");
    let mut runs: BTreeMap<Hook, Runs> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    for entry in fs::read_dir(&folder).with_context(|| folder.clone())? {
        // A descriptor may be closed meanwhile.
        let Ok(info) = fs::read_to_string(entry?.path()) else {
            continue;
        };
        let field = |name: &str| {
            info.lines()
                .find_map(|line| line.strip_prefix(name))
                .and_then(|value| value.trim().parse::<u64>().ok())
        };
        let (Some(id), Some(ns), Some(count), Some(kind)) = (
            field("prog_id:"),
            field("run_time_ns:"),
            field("run_cnt:"),
            field("prog_type:"),
        ) else {
            continue;
        };
        if seen.insert(id) {
            let hook = runs.entry(Hook::of(u32::try_from(kind)?)).or_default();
            hook.count += count;
            hook.ns += ns;
        }
    }
    Ok(runs)
}

/// The kernel's accounting of programs, on while this lives.
pub(crate) struct Accounting {
    before: String,
}

impl Accounting {
    pub(crate) fn enable() -> Result<Self> {
        let before = fs::read_to_string(STATS).context(STATS)?;
        fs::write(STATS, "1").context(STATS)?;
        Ok(Self { before })
    }
}

impl Drop for Accounting {
    fn drop(&mut self) {
        if let Err(error) = fs::write(STATS, &self.before) {
            eprintln!("{STATS}: {error}");
        }
    }
}
