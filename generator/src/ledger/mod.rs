//! The ledger: every observation, counted once, and the edges that they add up to.
//!
//! Both ends of a connection are observed, each by its own node's agent. [`Ledger::observe`] keeps the observations of
//! both sides apart and sums them by [`ObservationKey`]; [`Ledger::edges`] joins the sides.

mod edge;
mod join;
mod shared;
mod weight;

use flow::{
    observations::{ObservationKey, Observations},
    record::FlowRecord,
    time::Timestamp,
};

pub use self::edge::Edge;
use self::shared::Shared;

/// All observations, and what they say together.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    observations: Observations,
    shared: Shared,
    /// What the observations take, without the pods and services that they share.
    weight: usize,
}

/// A place between two records. It stays one when records come and go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cursor(ObservationKey);

impl Ledger {
    /// Adds a record to what is known under its key, which is returned.
    pub fn observe(&mut self, mut record: FlowRecord) -> ObservationKey {
        self.shared.share(&mut record.src);
        self.shared.share(&mut record.dst);
        let known = self.observations.len();
        let key = self.observations.observe(record);
        if self.observations.len() > known {
            self.weight += weight::of_observation(&key);
        }
        key
    }

    /// Removes the observations of which the last was made before `time`; returns their keys.
    pub fn forget_before(&mut self, time: Timestamp) -> Vec<ObservationKey> {
        let forgotten = self.observations.forget_before(time);
        for key in &forgotten {
            self.weight -= weight::of_observation(key);
        }
        if !forgotten.is_empty() {
            self.shared.sweep();
        }
        forgotten
    }

    /// The aggregated record under a key.
    #[must_use]
    pub fn get(&self, key: &ObservationKey) -> Option<&FlowRecord> {
        self.observations.get(key)
    }

    /// All aggregated records, in the order of their keys.
    pub fn records(&self) -> impl Iterator<Item = &FlowRecord> {
        self.observations.records()
    }

    /// The aggregated records after a place, or from the first on, and the place of each.
    pub fn after<'a>(
        &'a self,
        place: Option<&Cursor>,
    ) -> impl Iterator<Item = (Cursor, &'a FlowRecord)> + use<'a> {
        self.observations
            .after(place.map(|Cursor(key)| key))
            .map(|(key, record)| (Cursor(key.clone()), record))
    }

    /// How many keys there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.observations.len()
    }

    /// What it takes in memory, about, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.weight + self.shared.weight()
    }

    /// Whether nothing was observed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.observations.is_empty()
    }

    /// The established connections, the observations of both ends joined; sorted by the names of client and server,
    /// then by port. Failed attempts are no edges.
    #[must_use]
    pub fn edges(&self) -> Vec<Edge> {
        join::edges(&self.observations)
    }
}

/// Ledgers are equal if their records are.
impl PartialEq for Ledger {
    fn eq(&self, other: &Self) -> bool {
        self.observations == other.observations
    }
}

#[cfg(test)]
mod tests;
