//! The ledger as rows of a store: what has changed, and what is restored.
//!
//! An observation has two rows: its names, which seldom change, and its count and times, which change with every batch. Ends
//! have rows of their own, to which names refer.

use std::{collections::BTreeSet, net::SocketAddr, sync::Arc};

use flow::{
    record::{Direction, Outcome, Process, Protocol, Source},
    time::Timestamp,
    wire::End,
};
use fnv::FnvHashSet;
use serde::{Deserialize, Serialize};

use super::{
    Ledger,
    ends::EndId,
    observation::{Change, Key, Names, Observation, Sources},
};

/// What has changed since the store was told the last time.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a>(&'a Ledger);

/// An end.
#[derive(Clone, Debug)]
pub struct EndRow<'a> {
    /// Its number.
    pub row: i64,
    /// The end.
    pub end: &'a End,
}

/// What an observation is of.
#[derive(Clone, Debug)]
pub struct NameRow {
    /// Its number.
    pub row: i64,
    /// The client's end.
    pub client: i64,
    /// The server's.
    pub server: i64,
    /// As in a record.
    pub protocol: Protocol,
    /// The server's own port.
    pub port: u16,
    /// As in a record.
    pub direction: Direction,
    /// The rest of it.
    pub details: Details,
}

/// What else is that of the newest record.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Details {
    pub(super) outcome: Outcome,
    pub(super) hostname: Arc<str>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) process: Option<Arc<Process>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) via: Option<SocketAddr>,
    #[serde(default)]
    pub(super) sources: BTreeSet<Source>,
}

/// How often it was observed, and when.
#[derive(Clone, Copy, Debug)]
pub struct CountRow {
    /// The observation's number.
    pub row: i64,
    /// Connections.
    pub count: u64,
    /// When the first of them was seen.
    pub first_seen: Timestamp,
    /// When the last of them was seen.
    pub last_seen: Timestamp,
    /// The time of the newest record.
    pub timestamp: Timestamp,
}

impl<'a> Rows<'a> {
    /// The ends of these observations that the store does not have. Of what came with no observation it is told nothing.
    pub fn ends(self) -> impl Iterator<Item = EndRow<'a>> {
        let mut met = FnvHashSet::default();
        let ends = self.renamed().flat_map(|it| it.names.ends());
        let new = ends.filter_map(move |id| {
            let entry = self.0.ends.get(id);
            (!entry.is_stored && met.insert(id)).then_some(entry)
        });
        new.map(|entry| EndRow {
            row: entry.row,
            end: &entry.end,
        })
    }

    /// The names of observations that are new or have others.
    pub fn names(self) -> impl Iterator<Item = NameRow> + use<'a> {
        self.renamed().map(move |it| NameRow {
            row: it.row,
            client: self.0.ends.get(it.names.client).row,
            server: self.0.ends.get(it.names.server).row,
            protocol: it.key.protocol,
            port: it.key.port,
            direction: it.key.direction,
            details: Details {
                outcome: it.key.outcome,
                hostname: Arc::clone(&it.names.hostname),
                process: it.names.process.clone(),
                via: it.names.via,
                sources: it.sources.into(),
            },
        })
    }

    /// The counts and times of all observations that were made.
    pub fn counts(self) -> impl Iterator<Item = CountRow> + use<'a> {
        self.touched().map(|it| CountRow {
            row: it.row,
            count: it.count,
            first_seen: it.first_seen,
            last_seen: it.last_seen,
            timestamp: it.timestamp,
        })
    }

    /// Observations that are forgotten.
    #[must_use]
    pub fn forgotten(self) -> &'a [i64] {
        &self.0.forgotten
    }

    /// Ends that are.
    #[must_use]
    pub fn forgotten_ends(self) -> &'a [i64] {
        &self.0.forgotten_ends
    }

    /// Whether nothing has changed.
    #[must_use]
    pub fn is_empty(self) -> bool {
        let ledger = self.0;
        ledger.touched.is_empty() && ledger.forgotten.is_empty() && ledger.forgotten_ends.is_empty()
    }

    fn renamed(self) -> impl Iterator<Item = &'a Observation> + use<'a> {
        self.touched().filter(|it| it.change == Change::All)
    }

    fn touched(self) -> impl Iterator<Item = &'a Observation> + use<'a> {
        let ledger = self.0;
        let touched = ledger.touched.iter();
        // What was touched and then forgotten is not there; its place may have been taken since.
        touched.filter_map(|&place| ledger.observations.get(place as usize))
    }
}

impl Ledger {
    /// What a store must be told.
    #[must_use]
    pub fn rows(&self) -> Rows<'_> {
        Rows(self)
    }

    /// The store has been told.
    pub fn stored(&mut self) {
        for place in self.touched.drain(..) {
            if let Some(observation) = self.observations.get_mut(place as usize) {
                observation.change = Change::Nothing;
                for end in observation.names.ends() {
                    self.ends.stored(end);
                }
            }
        }
        self.forgotten.clear();
        self.forgotten_ends.clear();
    }

    /// Takes in an end that the store has. `None` if it has it twice.
    pub(crate) fn restore_end(&mut self, row: i64, end: End) -> Option<EndId> {
        self.ends.restore(row, end)
    }

    /// Takes in an observation that the store has, between ends that it has. `None` if it has it twice.
    pub(crate) fn restore(
        &mut self,
        names: NameRow,
        count: CountRow,
        client: EndId,
        server: EndId,
    ) -> Option<()> {
        let details = names.details;
        let its = Names {
            client,
            server,
            hostname: details.hostname,
            process: details.process,
            via: details.via,
        };
        let key = Key {
            client: self.ends.get(client).own,
            server: self.server(&its),
            port: names.port,
            protocol: names.protocol,
            direction: names.direction,
            outcome: details.outcome,
        };
        if self.places.contains_key(&key) {
            return None;
        }
        self.next_row = self.next_row.max(names.row);
        self.insert(Observation {
            row: names.row,
            key,
            count: count.count,
            first_seen: count.first_seen,
            last_seen: count.last_seen,
            timestamp: count.timestamp,
            sources: Sources::from(&details.sources),
            names: its,
            change: Change::Nothing,
        });
        Some(())
    }
}
