//! What the kernel side lost: the programs' own counters, and the runs that the kernel skipped.

use std::collections::BTreeMap;

use agent_common::loss::{LOSSES, Loss};
use aya::maps::{MapData, MapError, PerCpuArray};

use super::skipped::SkippedRuns;

/// Losses by reason; only reasons with a count above 0.
pub type Losses = BTreeMap<String, u64>;

/// The reason for runs that the kernel skipped, see [`SkippedRuns`].
const RUNS_SKIPPED: &str = "runs_skipped";

/// Turns the kernel's ever-growing counters into what was added since the last look.
pub(super) struct LossCounters {
    map: PerCpuArray<MapData, u64>,
    seen: [u64; LOSSES as usize],
    skipped: SkippedRuns,
}

impl LossCounters {
    pub(super) fn new(map: PerCpuArray<MapData, u64>, skipped: SkippedRuns) -> Self {
        Self {
            map,
            seen: [0; LOSSES as usize],
            skipped,
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
        let skipped = self.skipped.since_last()?;
        if skipped > 0 {
            losses.insert(RUNS_SKIPPED.to_owned(), skipped);
        }
        Ok(losses)
    }
}
