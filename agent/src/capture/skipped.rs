//! Runs of the tracepoint program that the kernel skipped.
//!
//! A BTF tracepoint's program is skipped while it is running on the same CPU, which a softirq that completes a handshake may
//! interrupt (`__bpf_trace_run` in `kernel/trace/bpf_trace.c`, since 6.1; before, it runs again). The kernel counts that, and it
//! is an upper bound of what is missing, because most state changes are of no interest.
//!
//! A classic tracepoint's program is skipped while anything of BPF is at work there, and reading a map from user space is, so
//! the agent's own drains are (`trace_call_bpf`, `bpf_disable_instrumentation`). A raw tracepoint beside it counts the
//! state changes that matter, and what the program has not seen of them was skipped.

use std::{fs, os::fd::RawFd};

use agent_common::types::Changes;
use aya::maps::{MapData, MapError, PerCpuArray};

/// Where to read how many runs were skipped.
pub(super) struct SkippedRuns {
    /// Of the classic hook; with the other it stays empty.
    changes: PerCpuArray<MapData, Changes>,
    /// The program whose skipped runs the kernel counts: that of a BTF tracepoint, or the raw one beside the classic.
    program: RawFd,
    /// The largest total so far. What the classic program saw before there was a counter beside it makes the first one
    /// negative.
    total: i64,
}

impl SkippedRuns {
    /// To be called as soon as the programs are attached; `program` stays open as long as this is used.
    ///
    /// # Errors
    /// If the map cannot be read.
    pub(super) fn new(
        changes: PerCpuArray<MapData, Changes>,
        program: RawFd,
    ) -> Result<Self, MapError> {
        let mut skipped = Self {
            changes,
            program,
            total: i64::MIN,
        };
        skipped.total = skipped.read()?;
        Ok(skipped)
    }

    /// How many since the last look, or since the start.
    ///
    /// # Errors
    /// If the map cannot be read.
    pub(super) fn since_last(&mut self) -> Result<u64, MapError> {
        let total = self.read()?;
        // What is seen but not counted yet at this moment makes it smaller, never larger.
        let added = u64::try_from(total.saturating_sub(self.total)).unwrap_or(0);
        self.total = self.total.max(total);
        Ok(added)
    }

    fn read(&self) -> Result<i64, MapError> {
        let changes = self.changes.get(&0, 0)?;
        Ok(missing(changes.iter()) + runs_missed(self.program))
    }
}

/// State changes that there were and that were not seen; negative by those that were seen before any were counted.
fn missing<'a>(changes: impl Iterator<Item = &'a Changes>) -> i64 {
    changes
        .map(|changes| changes.made.wrapping_sub(changes.seen).cast_signed())
        .sum()
}

/// How often the kernel skipped a program (`bpf_prog_show_fdinfo` in `kernel/bpf/syscall.c`, since 5.12); 0 where it does
/// not say.
fn runs_missed(program: RawFd) -> i64 {
    fs::read_to_string(format!("/proc/self/fdinfo/{program}"))
        .ok()
        .and_then(|info| {
            info.lines()
                .find_map(|line| line.strip_prefix("recursion_misses:"))
                .and_then(|count| count.trim().parse().ok())
        })
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_made_and_not_seen_on_any_cpu() {
        let changes = |made, seen| Changes { made, seen };
        // On the first, three were seen before there was a counter.
        for (of_cpus, wanted) in [
            ([changes(0, 3), changes(0, 0)], -3),
            ([changes(7, 10), changes(5, 5)], -3),
            ([changes(8, 10), changes(7, 5)], 0),
        ] {
            assert_eq!(missing(of_cpus.iter()), wanted, "{of_cpus:?}");
        }
    }
}
