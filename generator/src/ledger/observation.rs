//! One entry of the ledger.

use std::{
    collections::BTreeSet,
    hash::{Hash, Hasher},
    net::SocketAddr,
    sync::Arc,
};

use flow::{
    observations::Identity,
    record::{Direction, FlowRecord, Outcome, Process, Protocol, Source, Tuple},
    time::Timestamp,
    wire::End,
};

use super::ends::{EndId, Ends, IdentityId};

/// What stays the same over all that one entry counts: an
/// [`ObservationKey`](flow::observations::ObservationKey) in numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Key {
    pub(super) client: IdentityId,
    pub(super) server: IdentityId,
    pub(super) port: u16,
    pub(super) protocol: Protocol,
    pub(super) direction: Direction,
    pub(super) outcome: Outcome,
}

/// In two words: it is done for every flow.
impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(u64::from(self.client) << 32 | u64::from(self.server));
        let kind = (self.protocol as u32) << 2 | (self.direction as u32) << 1 | self.outcome as u32;
        state.write_u32(u32::from(self.port) << 8 | kind);
    }
}

impl Key {
    /// What the other end's agent would count it under.
    pub(super) fn of_the_other_side(self) -> Self {
        Self {
            direction: match self.direction {
                Direction::Egress => Direction::Ingress,
                Direction::Ingress => Direction::Egress,
            },
            ..self
        }
    }
}

/// How an entry differs from what is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Change {
    Nothing,
    /// Its count and times.
    Count,
    /// Anything.
    All,
}

/// An entry: everything that was counted under one key. What two records of one key need not have in common is that of the
/// newest.
#[derive(Clone, Debug)]
pub(super) struct Observation {
    /// Its row in the store.
    pub(super) row: i64,
    pub(super) key: Key,
    pub(super) count: u64,
    pub(super) first_seen: Timestamp,
    pub(super) last_seen: Timestamp,
    pub(super) timestamp: Timestamp,
    pub(super) sources: Sources,
    pub(super) names: Names,
    pub(super) change: Change,
}

/// What is that of the newest record.
#[derive(Clone, Debug)]
pub(super) struct Names {
    pub(super) client: EndId,
    pub(super) server: EndId,
    pub(super) hostname: Arc<str>,
    pub(super) process: Option<Arc<Process>>,
    pub(super) via: Option<SocketAddr>,
}

/// A set of sources.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sources(u8);

/// An entry with its ends, for looking at.
#[derive(Clone, Copy)]
pub(super) struct Sighting<'a> {
    pub(super) observation: &'a Observation,
    pub(super) client: &'a Identity,
    pub(super) server: &'a Identity,
    pub(super) src: &'a End,
    pub(super) dst: &'a End,
}

impl Observation {
    /// Counts another record of the same key. A newer one than all before tells the names, and of two that are as new it does
    /// not matter which came first. Returns the names if others have taken their place.
    pub(super) fn add(&mut self, new: Self, ends: &Ends) -> Option<Names> {
        let mut replaced = None;
        let mut change = Change::Count;
        if self.sources != self.sources.union(new.sources) {
            self.sources = self.sources.union(new.sources);
            change = Change::All;
        }
        let time = |it: &Self| (it.last_seen, it.timestamp);
        let newer = time(&new).cmp(&time(self)).then_with(|| {
            if new.names == self.names {
                std::cmp::Ordering::Equal
            } else {
                new.details(ends).cmp(&self.details(ends))
            }
        });
        self.count = self.count.saturating_add(new.count);
        self.first_seen = self.first_seen.min(new.first_seen);
        if newer.is_gt() {
            self.last_seen = new.last_seen;
            self.timestamp = new.timestamp;
            if self.names != new.names {
                replaced = Some(std::mem::replace(&mut self.names, new.names));
                change = Change::All;
            }
        }
        self.change = self.change.max(change);
        replaced
    }

    pub(super) fn sighting<'a>(&'a self, ends: &'a Ends) -> Sighting<'a> {
        Sighting {
            observation: self,
            client: ends.identity(self.key.client),
            server: ends.identity(self.key.server),
            src: &ends.get(self.names.client).end,
            dst: &ends.get(self.names.server).end,
        }
    }

    /// A text that is the same for equal names only.
    fn details(&self, ends: &Ends) -> Option<String> {
        let mut record = self.sighting(ends).record();
        record.count = 0;
        record.first_seen = record.last_seen;
        record.sources.clear();
        // Records of flows have a form in JSON: no map has a key that is not a string.
        serde_json::to_string(&record).ok()
    }
}

impl Names {
    /// Both of them.
    pub(super) fn ends(&self) -> [EndId; 2] {
        [self.client, self.server]
    }
}

impl PartialEq for Names {
    fn eq(&self, other: &Self) -> bool {
        // What came in one batch, or was taken over from an earlier one, is the same allocation.
        let same_process = match (&self.process, &other.process) {
            (Some(one), Some(other)) => Arc::ptr_eq(one, other) || one == other,
            (one, other) => one == other,
        };
        (self.client, self.server) == (other.client, other.server)
            && same_process
            && self.via == other.via
            && self.hostname == other.hostname
    }
}

impl Sources {
    const ALL: [Source; 2] = [Source::Ebpf, Source::Scope];

    fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl From<&BTreeSet<Source>> for Sources {
    fn from(sources: &BTreeSet<Source>) -> Self {
        Self(
            sources
                .iter()
                .fold(0, |set, source| set | 1 << *source as u8),
        )
    }
}

impl From<Sources> for BTreeSet<Source> {
    fn from(sources: Sources) -> Self {
        let all = Sources::ALL.into_iter();
        all.filter(|source| sources.0 & 1 << *source as u8 != 0)
            .collect()
    }
}

impl Sighting<'_> {
    /// Everything that it says.
    pub(super) fn record(self) -> FlowRecord {
        let observation = self.observation;
        let Key {
            port,
            protocol,
            direction,
            outcome,
            ..
        } = observation.key;
        let names = &observation.names;
        FlowRecord {
            timestamp: observation.timestamp,
            hostname: names.hostname.to_string(),
            tuple: Tuple {
                src_addr: self.src.address,
                src_port: 0,
                dst_addr: self.dst.address,
                dst_port: port,
            },
            src: self.src.endpoint.clone(),
            dst: self.dst.endpoint.clone(),
            protocol,
            direction,
            outcome,
            count: observation.count,
            first_seen: observation.first_seen,
            last_seen: observation.last_seen,
            process: names.process.as_deref().cloned(),
            sources: observation.sources.into(),
            via: names.via,
            connection: None,
        }
    }
}
