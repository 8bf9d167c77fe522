//! What the kernel side lost: the programs' own counters, and the runs that the kernel skipped.

use std::collections::BTreeMap;

use agent_common::loss::{LOSSES, Loss};
use aya::maps::{MapData, MapError, PerCpuArray};

use super::skipped::SkippedRuns;

/// Losses by reason; only reasons with a count above 0.
pub type Losses = BTreeMap<String, u64>;

/// Adds what was lost for a reason, if anything was.
pub(crate) fn lose(losses: &mut Losses, reason: &str, count: u64) {
    if count > 0 {
        *losses.entry(reason.to_owned()).or_default() += count;
    }
}

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

    /// # Errors
    /// If a counter cannot be read. What it and the others have counted is then in the next look's.
    pub(super) fn since_last(&mut self) -> Result<Losses, MapError> {
        let (map, skipped) = (&self.map, &mut self.skipped);
        added(
            &mut self.seen,
            |loss| Ok(map.get(&(loss as u32), 0)?.iter().sum()),
            || skipped.since_last(),
        )
    }
}

/// What `total` has grown by beyond `seen`, which follows once everything is read; and what was skipped.
fn added<E>(
    seen: &mut [u64; LOSSES as usize],
    total: impl Fn(Loss) -> Result<u64, E>,
    skipped: impl FnOnce() -> Result<u64, E>,
) -> Result<Losses, E> {
    let mut totals = *seen;
    let mut losses = Losses::new();
    for loss in Loss::ALL {
        let index = loss as usize;
        totals[index] = total(loss)?;
        let added = totals[index].saturating_sub(seen[index]);
        lose(&mut losses, loss.name(), added);
    }
    // It forgets what it has told, so it comes last.
    lose(&mut losses, RUNS_SKIPPED, skipped()?);
    *seen = totals;
    Ok(losses)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_not_be_told_is_told_next_time() {
        let mut seen = [0; LOSSES as usize];
        let total = |loss| Ok(u64::from(loss == Loss::FlowsAndRingFull) * 5);
        let unreadable = |loss| match loss {
            Loss::UdpPeersFull => Err(()),
            _ => total(loss),
        };
        assert_eq!(added(&mut seen, unreadable, || Ok(0)), Err(()));
        assert_eq!(added(&mut seen, total, || Err(())), Err(()));
        let told = [("flows_and_ring_full", 5), (RUNS_SKIPPED, 2)];
        let told = told.map(|(reason, count)| (reason.to_owned(), count));
        assert_eq!(added(&mut seen, total, || Ok(2)), Ok(Losses::from(told)));
        assert_eq!(added(&mut seen, total, || Ok(0)), Ok(Losses::new()));
    }
}
