//! Observations, added up.

mod key;

use std::collections::{BTreeMap, btree_map::Entry};

pub use self::key::{Identity, ObservationKey, PodId, client_address, server_address, translated};
use crate::record::FlowRecord;

/// Observations by key, each aggregated into one record. It grows with distinct edges, not with connections.
///
/// What it holds does not depend on the order in which records were observed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observations {
    records: BTreeMap<ObservationKey, FlowRecord>,
}

impl Observations {
    /// Adds a record to what is known under its key.
    ///
    /// Counts are summed and saturate, the span of time is widened, sources are united; names, addresses and the process
    /// are those of the newest record. The client's port is dropped.
    pub fn observe(&mut self, mut record: FlowRecord) {
        record.tuple.src_port = 0;
        match self.records.entry(ObservationKey::of(&record)) {
            Entry::Vacant(entry) => {
                entry.insert(record);
            }
            Entry::Occupied(mut entry) => merge(entry.get_mut(), record),
        }
    }

    /// Whether there is a record under this one's key.
    #[must_use]
    pub fn knows(&self, record: &FlowRecord) -> bool {
        self.records.contains_key(&ObservationKey::of(record))
    }

    /// All aggregated records, in the order of their keys.
    pub fn records(&self) -> impl Iterator<Item = &FlowRecord> {
        self.records.values()
    }

    /// Takes out the first records by key, at most `most` of them.
    pub fn take(&mut self, most: usize) -> Vec<FlowRecord> {
        let taken = self.records.len().min(most);
        (0..taken)
            .filter_map(|_| self.records.pop_first())
            .map(|(_, record)| record)
            .collect()
    }

    /// How many keys there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether nothing was observed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }
}

fn merge(known: &mut FlowRecord, new: FlowRecord) {
    let count = known.count.saturating_add(new.count);
    let first_seen = known.first_seen.min(new.first_seen);
    let sources = &known.sources | &new.sources;
    if is_newer(&new, known) {
        *known = new;
    }
    known.count = count;
    known.first_seen = first_seen;
    known.sources = sources;
}

/// A total order on all that is not summed up, so that the newest does not depend on which came first.
fn is_newer(new: &FlowRecord, known: &FlowRecord) -> bool {
    let time = |record: &FlowRecord| (record.last_seen, record.timestamp);
    time(new)
        .cmp(&time(known))
        .then_with(|| details(new).cmp(&details(known)))
        .is_gt()
}

/// Only asked for when two records of one key were last seen in the same nanosecond.
fn details(record: &FlowRecord) -> Option<String> {
    let mut record = record.clone();
    record.count = 0;
    record.first_seen = record.last_seen;
    record.sources.clear();
    // Records of flows have a form in JSON: no map has a key that is not a string.
    serde_json::to_string(&record).ok()
}
