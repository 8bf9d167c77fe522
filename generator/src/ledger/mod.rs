//! The ledger: every observation, counted once, and the edges that they add up to.
//!
//! Both ends of a connection are observed, each by its own node's agent. The ledger keeps the observations of both sides
//! apart and sums them by [`ObservationKey`](flow::observations::ObservationKey); [`Ledger::edges`] joins the sides. What
//! it holds does not depend on the order in which records came. It grows with distinct edges, not with connections.

mod edge;
mod ends;
mod join;
mod observation;
mod rows;
mod shared;
mod weight;

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use flow::{
    endpoint::Endpoint,
    record::{FlowRecord, Outcome},
    time::Timestamp,
    wire::{End, Packed},
};
use fnv::FnvHashMap;
use slab::Slab;

pub use self::{
    edge::Edge,
    ends::KnownEnd,
    rows::{CountRow, Details, EndRow, NameRow, Rows},
};
use self::{
    ends::{EndId, Ends},
    observation::{Change, Key, Names, Observation, Sighting, Sources},
};

/// All observations, and what they say together.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    ends: Ends,
    observations: Slab<Observation>,
    places: FnvHashMap<Key, u32>,
    /// Established connections, those that both sides saw alike counted once.
    edges: usize,
    /// What the observations take, about, in bytes.
    weight: usize,
    next_row: i64,
    /// Places of what has changed since the store was told.
    touched: Vec<u32>,
    /// Rows of what was forgotten since then.
    forgotten: Vec<i64>,
    /// The same of ends.
    forgotten_ends: Vec<i64>,
}

/// A place between two records. It stays one when records come and go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor(usize);

/// How large a ledger may become.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// The most observations.
    pub observations: usize,
    /// The most memory, in bytes, about.
    pub bytes: usize,
}

/// The ledger has no room for what is new.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

impl Ledger {
    /// Counts a record.
    pub fn observe(&mut self, record: FlowRecord) {
        let new = self.new_observation(record);
        self.add(new);
    }

    /// Counts a record if its key is known.
    ///
    /// # Errors
    /// If it is not.
    pub fn observe_known(&mut self, record: FlowRecord) -> Result<(), Full> {
        let new = self.new_observation(record);
        if self.places.contains_key(&new.key) {
            self.add(new);
            Ok(())
        } else {
            Err(Full)
        }
    }

    /// Whether there is room for another observation.
    pub fn has_room(&mut self, bounds: Bounds) -> bool {
        self.has_room_beside(bounds, &[])
    }

    /// The same while these ends are about to be used. Ends that nobody uses do not keep out what is new.
    fn has_room_beside(&mut self, bounds: Bounds, ends: &[EndId]) -> bool {
        if self.len() >= bounds.observations {
            return false;
        }
        if self.bytes() >= bounds.bytes && self.ends.is_worth_a_sweep(self.bytes()) {
            self.sweep(ends);
        }
        self.bytes() < bounds.bytes
    }

    /// Counts the flows of a batch, but for new ones for which there is no room: their connections are returned.
    ///
    /// The flows refer to what there is: [`Packed::check`] was asked.
    pub fn deliver(&mut self, batch: &Packed<KnownEnd>, bounds: Bounds) -> Vec<u64> {
        if self.ends.is_due() {
            self.sweep(&[]);
        }
        let ends: Vec<EndId> = batch.ends.iter().map(|end| self.ends.known(end)).collect();
        let hostname: Arc<str> = batch.hostname.as_str().into();
        let sources = Sources::from(&batch.sources);
        let mut refused = Vec::new();
        for flow in &batch.flows {
            let names = Names {
                client: ends[flow.src as usize],
                server: ends[flow.dst as usize],
                hostname: match &flow.hostname {
                    Some(hostname) => Arc::from(&**hostname),
                    None => Arc::clone(&hostname),
                },
                process: flow
                    .process
                    .map(|place| Arc::clone(&batch.processes[place as usize])),
                via: flow.via,
            };
            let client = self.ends.get(names.client).own;
            let key = Key {
                client,
                server: self.server(&names),
                port: flow.port,
                protocol: flow.protocol,
                direction: flow.direction,
                outcome: flow.outcome,
            };
            let new = Observation {
                row: 0,
                key,
                count: flow.count,
                first_seen: flow.first_seen(),
                last_seen: flow.last_seen,
                timestamp: flow.timestamp(),
                sources: flow.sources.as_ref().map_or(sources, Sources::from),
                names,
                change: Change::All,
            };
            let is_known = self.places.contains_key(&key);
            if is_known || flow.count > 0 && self.has_room_beside(bounds, &ends) {
                self.add(new);
            } else {
                refused.push(flow.count);
            }
        }
        refused
    }

    /// Removes the observations of which the last was made before `time`; returns how many.
    pub fn forget_before(&mut self, time: Timestamp) -> usize {
        let old: Vec<usize> = self
            .observations
            .iter()
            .filter(|(_, observation)| observation.last_seen < time)
            .map(|(place, _)| place)
            .collect();
        for &place in &old {
            let Observation {
                row, key, names, ..
            } = self.observations.remove(place);
            self.weight -= weight::of_observation(&names);
            self.places.remove(&key);
            self.forgotten.push(row);
            if self.is_alone(key) {
                self.edges -= 1;
            }
        }
        if !old.is_empty() {
            self.sweep(&[]);
        }
        old.len()
    }

    /// The aggregated records, in the order of their keys.
    pub fn records(&self) -> impl Iterator<Item = FlowRecord> {
        self.sightings().into_iter().map(Sighting::record)
    }

    /// The aggregated records after a place, or from the first on, and the place of each; in no particular order.
    pub fn after(&self, place: Option<Cursor>) -> impl Iterator<Item = (Cursor, FlowRecord)> {
        let first = place.map_or(0, |Cursor(place)| place + 1);
        let places = first..self.observations.capacity().max(first);
        places.filter_map(|place| {
            let observation = self.observations.get(place)?;
            Some((Cursor(place), observation.sighting(&self.ends).record()))
        })
    }

    /// How many observations there are: an edge that both ends' agents saw has two.
    #[must_use]
    pub fn len(&self) -> usize {
        self.observations.len()
    }

    /// What it takes in memory, about, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.weight + self.ends.weight()
    }

    /// Whether nothing was observed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.observations.is_empty()
    }

    /// When the last of the observations was made.
    #[must_use]
    pub fn last_seen(&self) -> Option<Timestamp> {
        let all = self.observations.iter();
        all.map(|(_, observation)| observation.last_seen).max()
    }

    /// How many established connections there are, those that both sides name alike once. What [`Ledger::edges`] joins
    /// besides is not joined here.
    #[must_use]
    pub fn count_edges(&self) -> usize {
        self.edges
    }

    /// The established connections, the observations of both ends joined; sorted by the names of client and server,
    /// then by port. Failed attempts are no edges.
    #[must_use]
    pub fn edges(&self) -> Vec<Edge> {
        join::edges(&self.sightings())
    }

    /// All entries, in the order of their keys.
    fn sightings(&self) -> Vec<Sighting<'_>> {
        let all = self.observations.iter();
        let mut sightings: Vec<Sighting<'_>> = all
            .map(|(_, observation)| observation.sighting(&self.ends))
            .collect();
        sightings.sort_unstable_by(|one, other| {
            let order = |it: &Sighting<'_>| {
                let key = it.observation.key;
                (key.protocol, key.port, key.direction, key.outcome)
            };
            (one.client, one.server, order(one)).cmp(&(other.client, other.server, order(other)))
        });
        sightings
    }

    fn new_observation(&mut self, record: FlowRecord) -> Observation {
        if self.ends.is_due() {
            self.sweep(&[]);
        }
        let names = Names {
            client: self.ends.intern(end(record.src, record.tuple.src_addr)),
            server: self.ends.intern(end(record.dst, record.tuple.dst_addr)),
            hostname: record.hostname.into(),
            process: record.process.map(Arc::new),
            via: record.via,
        };
        Observation {
            row: 0,
            key: Key {
                client: self.ends.get(names.client).own,
                server: self.server(&names),
                port: record.tuple.dst_port,
                protocol: record.protocol,
                direction: record.direction,
                outcome: record.outcome,
            },
            count: record.count,
            first_seen: record.first_seen,
            last_seen: record.last_seen,
            timestamp: record.timestamp,
            sources: Sources::from(&record.sources),
            names,
            change: Change::All,
        }
    }

    /// Who the server is: what was called at a virtual address is not known by that.
    fn server(&self, names: &Names) -> ends::IdentityId {
        let server = self.ends.get(names.server);
        if names.via.as_ref().map(SocketAddr::ip) == Some(server.end.address) {
            server.behind
        } else {
            server.own
        }
    }

    fn add(&mut self, new: Observation) {
        match self.places.get(&new.key) {
            Some(&place) => {
                let known = &mut self.observations[place as usize];
                if known.change == Change::Nothing {
                    self.touched.push(place);
                }
                if let Some(old) = known.add(new, &self.ends) {
                    self.weight += weight::of_observation(&known.names);
                    self.weight -= weight::of_observation(&old);
                }
            }
            None => {
                self.next_row += 1;
                let place = self.insert(Observation {
                    row: self.next_row,
                    ..new
                });
                self.touched.push(place);
            }
        }
    }

    fn insert(&mut self, new: Observation) -> u32 {
        let key = new.key;
        self.weight += weight::of_observation(&new.names);
        if self.is_alone(key) {
            self.edges += 1;
        }
        // The keeper's bounds are far below four billion.
        let place = self.observations.insert(new) as u32;
        self.places.insert(key, place);
        place
    }

    /// Whether it is an edge, and the other side's observation of it is not here.
    fn is_alone(&self, key: Key) -> bool {
        key.outcome == Outcome::Established && !self.places.contains_key(&key.of_the_other_side())
    }

    /// Forgets the ends that no observation has, but for these.
    fn sweep(&mut self, wanted: &[EndId]) {
        let used = self.observations.iter();
        let used = used.flat_map(|(_, it)| it.names.ends());
        let used = used.chain(wanted.iter().copied());
        self.forgotten_ends.extend(self.ends.retain(used));
    }
}

/// An external end is nothing but its address.
fn end(endpoint: Endpoint, seen: IpAddr) -> End {
    let address = match endpoint {
        Endpoint::External(address) => address,
        _ => seen,
    };
    End { address, endpoint }
}

/// Ledgers are equal if their records are.
impl PartialEq for Ledger {
    fn eq(&self, other: &Self) -> bool {
        self.len() == other.len() && self.records().eq(other.records())
    }
}

#[cfg(test)]
mod tests;
