//! What a group of batches does to the state.

use std::collections::{BTreeMap, BTreeSet};

use flow::{
    record::FlowRecord,
    time::Timestamp,
    wire::{Hello, Packed, Window},
};

use crate::{
    ledger::{Bounds, KnownEnd, Ledger},
    store::{Changes, Standing, State},
};

/// The most observations that the ledger holds: what a cluster of ten thousand pods makes, each with fifty peers, seen
/// from both ends. A new one beyond it is counted as lost; the known ones go on.
pub const MAX_OBSERVATIONS: usize = 1_000_000;

/// What the ledger may take in memory by default, in bytes, about. A new observation beyond it is counted as lost likewise.
pub const MAX_LEDGER_BYTES: usize = 1 << 30;

impl Default for Bounds {
    fn default() -> Self {
        Self {
            observations: MAX_OBSERVATIONS,
            bytes: MAX_LEDGER_BYTES,
        }
    }
}

/// The reason under which it is counted.
const LEDGER_FULL: &str = "ledger_full";

/// The reason that is counted once for an instance whose first batches were acknowledged by some other ledger: one that
/// was in memory, before the generator started again. How many observations were in them nobody knows.
const BATCHES_BEFORE: &str = "batches_before_this_ledger";

/// What became of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is part of the state now.
    Applied,
    /// It was before.
    Known,
    /// It must not be, for this reason.
    Refused(String),
}

/// Names the ends of records that came without.
pub(super) type Naming<'a> = &'a dyn Fn(&mut FlowRecord);

/// The entries of the state that batches have changed since the last commit; of the ledger, it knows that itself.
#[derive(Debug)]
pub(super) struct Round {
    bounds: Bounds,
    agents: BTreeSet<String>,
    /// By node and reason, what this round adds.
    losses: BTreeMap<(String, String), u64>,
    forgotten: Vec<String>,
    forgotten_losses: Vec<(String, String)>,
}

impl Round {
    pub(super) fn new(bounds: Bounds) -> Self {
        Self {
            bounds,
            agents: BTreeSet::new(),
            losses: BTreeMap::new(),
            forgotten: Vec::new(),
            forgotten_losses: Vec::new(),
        }
    }

    /// Adds a batch to the state, if it is its turn. Without `naming` its ends are named.
    pub(super) fn apply(
        &mut self,
        state: &mut State,
        hello: &Hello,
        batch: &Packed<KnownEnd>,
        naming: Option<Naming<'_>>,
        now: Timestamp,
    ) -> Verdict {
        let sequence = batch.sequence;
        match state.agents.standing(&hello.instance, sequence) {
            Standing::Known => return Verdict::Known,
            Standing::Gap { expected } => {
                return Verdict::Refused(format!(
                    "batch {sequence} leaves a gap: batch {expected} is the next of this instance"
                ));
            }
            Standing::Late => self.lose(state, hello, BATCHES_BEFORE, 1, batch.window),
            Standing::Next => {}
        }
        for (reason, &count) in &batch.losses {
            self.lose(state, hello, reason, count, batch.window);
        }
        let refused = match naming {
            None => state.ledger.deliver(batch, self.bounds),
            Some(name) => deliver_unnamed(&mut state.ledger, batch, name, self.bounds),
        };
        let refused = refused.into_iter().fold(0, u64::saturating_add);
        self.lose(state, hello, LEDGER_FULL, refused, batch.window);
        state.agents.advance(hello, sequence, now);
        self.agents.insert(hello.instance.clone());
        Verdict::Applied
    }

    /// By node and reason, how many observations the batches of this round said to be lost, or lost here.
    pub(super) fn losses(&self) -> impl Iterator<Item = (&str, &str, u64)> {
        self.losses
            .iter()
            .map(|((node, reason), count)| (node.as_str(), reason.as_str(), *count))
    }

    /// Forgets other instances if there are too many, of the node or of all, but not those that `keep` wants.
    pub(super) fn make_room_for(
        &mut self,
        state: &mut State,
        hello: &Hello,
        keep: impl Fn(&str) -> bool,
    ) {
        let agents = &mut state.agents;
        self.forgotten
            .extend(agents.make_room_for(&hello.instance, &hello.node, keep));
    }

    /// Forgets the instances that were last seen before `time`, but for those that `keep` wants.
    pub(super) fn forget_before(
        &mut self,
        state: &mut State,
        time: Timestamp,
        keep: impl Fn(&str) -> bool,
    ) {
        self.forgotten
            .extend(state.agents.forget_before(time, keep));
    }

    /// Forgets what was last seen, or lost, before `time`. Returns how many observations that were.
    pub(super) fn retire(&mut self, state: &mut State, time: Timestamp) -> usize {
        self.forgotten_losses = state.losses.forget_before(time);
        state.ledger.forget_before(time)
    }

    /// What is to be written.
    pub(super) fn changes<'a>(&'a self, state: &'a State) -> Changes<'a> {
        Changes {
            ledger: state.ledger.rows(),
            agents: self
                .agents
                .iter()
                .filter_map(|instance| Some((instance.as_str(), state.agents.get(instance)?)))
                .collect(),
            losses: self
                .losses
                .keys()
                .filter_map(|kind| {
                    Some((kind.0.as_str(), kind.1.as_str(), state.losses.get(kind)?))
                })
                .collect(),
            forgotten: &self.forgotten,
            forgotten_losses: &self.forgotten_losses,
        }
    }

    fn lose(&mut self, state: &mut State, hello: &Hello, reason: &str, count: u64, window: Window) {
        if count > 0 {
            let kind = state.losses.add(&hello.node, reason, count, window);
            let lost = self.losses.entry(kind).or_default();
            *lost = lost.saturating_add(count);
        }
    }
}

/// As [`Ledger::deliver`], for a batch whose records are to be named one by one: who an address was depends on the time.
fn deliver_unnamed(
    ledger: &mut Ledger,
    batch: &Packed<KnownEnd>,
    name: Naming<'_>,
    bounds: Bounds,
) -> Vec<u64> {
    let end = |place: u32| &*batch.ends[place as usize].end;
    let mut refused = Vec::new();
    for flow in &batch.flows {
        let mut record = batch.record(flow, end(flow.src), end(flow.dst));
        name(&mut record);
        if flow.count > 0 && ledger.has_room(bounds) {
            ledger.observe(record);
        } else if ledger.observe_known(record).is_err() {
            refused.push(flow.count);
        }
    }
    refused
}

#[cfg(test)]
mod tests;
