//! What the kernel side lost: the programs' own counters, and the runs that the kernel skipped.

use std::{collections::BTreeMap, fs, os::fd::RawFd};

use agent_common::loss::{LOSSES, Loss};
use aya::maps::{MapData, MapError, PerCpuArray};

/// Losses by reason; only reasons with a count above 0.
pub type Losses = BTreeMap<String, u64>;

/// The reason for runs that the kernel skipped: a program does not run while it is running on the same CPU already, which
/// an interrupt that completes another handshake can ask for. An upper bound of connections lost, because most state
/// changes are of no interest.
const RUNS_SKIPPED: &str = "runs_skipped";

/// Turns the kernel's ever-growing counters into what was added since the last look.
pub(super) struct LossCounters {
    map: PerCpuArray<MapData, u64>,
    seen: [u64; LOSSES as usize],
    program: RawFd,
    skipped: u64,
}

impl LossCounters {
    /// `program` is the attached program's descriptor, which stays open as long as this is used.
    pub(super) fn new(map: PerCpuArray<MapData, u64>, program: RawFd) -> Self {
        Self {
            map,
            seen: [0; LOSSES as usize],
            program,
            skipped: skipped_runs(program),
        }
    }

    pub(super) fn since_last(&mut self) -> Result<Losses, MapError> {
        let mut losses = Losses::new();
        for loss in Loss::ALL {
            let total: u64 = self.map.get(&(loss as u32), 0)?.iter().sum();
            let seen = &mut self.seen[loss as usize];
            let added = total.saturating_sub(*seen);
            *seen = total;
            if added > 0 {
                losses.insert(loss.name().to_owned(), added);
            }
        }
        let skipped = skipped_runs(self.program);
        if skipped > self.skipped {
            losses.insert(RUNS_SKIPPED.to_owned(), skipped - self.skipped);
            self.skipped = skipped;
        }
        Ok(losses)
    }
}

/// How often the kernel skipped the program (`bpf_prog_show_fdinfo` in `kernel/bpf/syscall.c`, since 5.12); 0 where it does
/// not say.
fn skipped_runs(program: RawFd) -> u64 {
    fs::read_to_string(format!("/proc/self/fdinfo/{program}"))
        .ok()
        .and_then(|info| {
            info.lines()
                .find_map(|line| line.strip_prefix("recursion_misses:"))
                .and_then(|count| count.trim().parse().ok())
        })
        .unwrap_or(0)
}
