//! Sightings that wait for their lines, and leave in the order of their drains.

use std::collections::VecDeque;

use super::{account::Place, merge::FromLog};
use crate::resolve::Sighting;

/// How many drains a sighting waits for its lines. The probe writes them within some hundred milliseconds.
pub(super) const ROUNDS: u64 = 2;

/// Sightings that may wait. When there are more the oldest drains leave sooner; their lines are late then.
const MAX_WAITING: usize = 65_536;

/// The sightings of some drains.
#[derive(Debug, Default)]
pub(super) struct Queue {
    /// One for each drain, in a row.
    batches: VecDeque<Batch>,
    waiting: usize,
}

#[derive(Debug)]
struct Batch {
    round: u64,
    seen: Vec<Seen>,
    /// What only the log tells, and what it tells late.
    told: Vec<Sighting>,
}

/// A sighting of the kernel programs.
#[derive(Debug)]
struct Seen {
    sighting: Sighting,
    /// How many lines were set against it, by the server that they name.
    shares: Vec<(FromLog, u64)>,
}

impl Queue {
    /// Takes in a drain.
    pub(super) fn push(&mut self, round: u64, sightings: Vec<Sighting>) {
        self.waiting += sightings.len();
        let seen = sightings.into_iter().map(|sighting| Seen {
            sighting,
            shares: Vec::new(),
        });
        self.batches.push_back(Batch {
            round,
            seen: seen.collect(),
            told: Vec::new(),
        });
    }

    /// Sets a line against one connection of a sighting; `false` if that has left.
    pub(super) fn share(&mut self, place: Place, from_log: &FromLog) -> bool {
        let seen = self
            .index(place.round)
            .and_then(|index| self.batches.get_mut(index)?.seen.get_mut(place.index));
        let Some(seen) = seen else {
            return false;
        };
        let same = |(known, _): &&mut (FromLog, u64)| known.backend == from_log.backend;
        match seen.shares.iter_mut().find(same) {
            Some((_, count)) => *count += 1,
            None => seen.shares.push((from_log.clone(), 1)),
        }
        true
    }

    /// Adds sightings that were made of lines, to leave with a drain; with the oldest if that has left.
    pub(super) fn add(&mut self, round: u64, told: impl Iterator<Item = Sighting>) {
        let index = self.index(round).unwrap_or(0);
        let Some(batch) = self.batches.get_mut(index) else {
            return;
        };
        let before = batch.told.len();
        batch.told.extend(told);
        let new = &mut batch.told[before..];
        new.sort_by_key(|sighting| sighting.observation.last_seen);
        for sighting in new.iter_mut() {
            sighting.round = batch.round;
        }
        self.waiting += new.len();
    }

    /// What has waited for long enough.
    pub(super) fn release(&mut self, round: u64, is_last: bool) -> Vec<Sighting> {
        let mut released = Vec::new();
        let is_due = |batch: &Batch| is_last || round >= batch.round + ROUNDS;
        while let Some(batch) = self
            .batches
            .pop_front_if(|batch| is_due(batch) || self.waiting > MAX_WAITING)
        {
            self.waiting -= batch.seen.len() + batch.told.len();
            for seen in batch.seen {
                seen.leave(&mut released);
            }
            released.extend(batch.told);
        }
        released
    }

    /// The earliest drain of which something waits.
    pub(super) fn oldest(&self) -> Option<u64> {
        self.batches.front().map(|batch| batch.round)
    }

    fn index(&self, round: u64) -> Option<usize> {
        let after = round.checked_sub(self.oldest()?)?;
        let index = usize::try_from(after).ok()?;
        (index < self.batches.len()).then_some(index)
    }
}

impl Seen {
    /// One sighting for each server that lines name, and one for the rest.
    fn leave(mut self, released: &mut Vec<Sighting>) {
        let all = self.sighting.observation.count;
        for (from_log, count) in self.shares {
            let left = self.sighting.observation.count;
            if from_log.backend.is_none() {
                self.sighting.log = Some(Box::new(from_log));
                continue;
            }
            let mut part = self.sighting.clone();
            part.observation.count = count.min(left);
            part.log = Some(Box::new(from_log));
            self.sighting.observation.count = left.saturating_sub(count);
            released.push(part);
        }
        // The end of a connection counts nothing from the start.
        if all == 0 || self.sighting.observation.count > 0 {
            released.push(self.sighting);
        }
    }
}
