//! The ends of all observations, each held once, and by number.
//!
//! A cluster has some thousand ends and its agents name them again and again. An end is looked at when it is met for the
//! first time: who it is, and which identity that makes. After that it is a number, and so are identities, so that adding a
//! flow compares integers.

use std::{collections::HashMap, net::IpAddr, sync::Arc};

use flow::{
    observations::{Identity, translated},
    wire::End,
};
use fnv::FnvHashMap;
use slab::Slab;

use super::{shared::Shared, weight};

/// The place of an end.
pub(super) type EndId = u32;

/// The place of an identity.
pub(super) type IdentityId = u32;

/// Fewer ends than this are not worth a sweep.
const SWEEP_FROM: usize = 1 << 10;

/// Nor is less than this, in bytes.
const SWEEP_FROM_BYTES: usize = 64 << 20;

/// Where there is no room, the ends are swept as soon as this part of all that is held may be of no use: seldom enough that what
/// is refused is cheap.
const SWEEP_OF_FULL: usize = 64;

/// How many serials are remembered; then all are forgotten, which costs a look at each end.
const MAX_SERIALS: usize = 1 << 18;

/// An end that was decoded once for all the batches that it is in: equal serials are equal ends.
#[derive(Clone, Debug)]
pub struct KnownEnd {
    /// Given to no other end; 0 if it was given none.
    pub serial: u64,
    /// What it says.
    pub end: Arc<End>,
}

impl KnownEnd {
    /// An end that was made of one that came with a batch. It is looked at in each batch anew: what it was made by changes.
    #[must_use]
    pub fn made(end: End) -> Self {
        Self {
            serial: Self::NONE,
            end: Arc::new(end),
        }
    }

    /// No serial: ends that came with batches begin with 1.
    const NONE: u64 = 0;

    /// What it takes in memory, about, in bytes.
    #[must_use]
    pub fn weight(&self) -> usize {
        weight::of_whole_end(&self.end)
    }
}

/// All ends.
#[derive(Clone, Debug)]
pub(super) struct Ends {
    entries: Slab<Entry>,
    by_end: HashMap<Arc<End>, EndId>,
    by_serial: FnvHashMap<u64, EndId>,
    identities: Slab<Identity>,
    by_identity: HashMap<Identity, IdentityId>,
    shared: Shared,
    next_row: i64,
    sweep_at: usize,
    sweep_at_bytes: usize,
    /// What they took after the last sweep.
    swept_bytes: usize,
    weight: usize,
}

/// An end, and who it is.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    /// Its row in the store, once it is there: when an observation is that has it.
    pub(super) row: i64,
    pub(super) is_stored: bool,
    pub(super) end: Arc<End>,
    /// As it was seen.
    pub(super) own: IdentityId,
    /// As a server that was called at a virtual address, the one that was seen.
    pub(super) behind: IdentityId,
}

impl Ends {
    pub(super) fn get(&self, id: EndId) -> &Entry {
        &self.entries[id as usize]
    }

    pub(super) fn identity(&self, id: IdentityId) -> &Identity {
        &self.identities[id as usize]
    }

    /// The number of an end that came with a batch.
    pub(super) fn known(&mut self, known: &KnownEnd) -> EndId {
        if known.serial == KnownEnd::NONE {
            return self.intern(End::clone(&known.end));
        }
        if let Some(&id) = self.by_serial.get(&known.serial) {
            return id;
        }
        let id = self.intern(End::clone(&known.end));
        if self.by_serial.len() >= MAX_SERIALS {
            self.by_serial.clear();
        }
        self.by_serial.insert(known.serial, id);
        id
    }

    /// The number of an end.
    pub(super) fn intern(&mut self, end: End) -> EndId {
        if let Some(&id) = self.by_end.get(&end) {
            return id;
        }
        let row = self.next_row;
        self.insert(row, false, end)
    }

    /// An end that the store has; `None` if it has it twice.
    pub(super) fn restore(&mut self, row: i64, end: End) -> Option<EndId> {
        (!self.by_end.contains_key(&end)).then(|| self.insert(row, true, end))
    }

    fn insert(&mut self, row: i64, is_stored: bool, mut end: End) -> EndId {
        self.next_row = self.next_row.max(row.saturating_add(1));
        self.shared.share(&mut end.endpoint);
        let own = self.identify(&end, end.address);
        let behind = self.identify(&end, translated(&end.endpoint, end.address));
        let end = Arc::new(end);
        self.weight += weight::of_end(&end);
        let id = self.entries.insert(Entry {
            row,
            is_stored,
            end: Arc::clone(&end),
            own,
            behind,
        }) as EndId;
        self.by_end.insert(end, id);
        id
    }

    fn identify(&mut self, end: &End, address: IpAddr) -> IdentityId {
        let identity = Identity::of(&end.endpoint, address);
        if let Some(&id) = self.by_identity.get(&identity) {
            return id;
        }
        self.weight += weight::of_identity(&identity);
        let id = self.identities.insert(identity.clone()) as IdentityId;
        self.by_identity.insert(identity, id);
        id
    }

    /// Whether there are so many that those which nobody uses should be looked for.
    pub(super) fn is_due(&self) -> bool {
        self.entries.len() >= self.sweep_at || self.weight() >= self.sweep_at_bytes
    }

    /// Whether a sweep may free something, of a ledger that takes `all` bytes and has no room. What nobody uses came, or lost
    /// its use to what came, after the last sweep.
    pub(super) fn is_worth_a_sweep(&self, all: usize) -> bool {
        self.weight().saturating_sub(self.swept_bytes) > all / SWEEP_OF_FULL
    }

    /// Forgets all but these; returns the rows of those that the store is to forget.
    pub(super) fn retain(&mut self, used: impl Iterator<Item = EndId>) -> Vec<i64> {
        let mut wanted = vec![false; self.entries.capacity()];
        used.for_each(|id| wanted[id as usize] = true);
        let mut forgotten = Vec::new();
        let by_end = &mut self.by_end;
        self.entries.retain(|id, entry| {
            if !wanted[id] {
                by_end.remove(&entry.end);
                forgotten.extend(entry.is_stored.then_some(entry.row));
            }
            wanted[id]
        });
        self.by_serial.clear();

        let mut wanted = vec![false; self.identities.capacity()];
        for (_, entry) in &self.entries {
            wanted[entry.own as usize] = true;
            wanted[entry.behind as usize] = true;
        }
        let by_identity = &mut self.by_identity;
        self.identities.retain(|id, identity| {
            if !wanted[id] {
                by_identity.remove(identity);
            }
            wanted[id]
        });
        self.shared.sweep();
        let identities = self.identities.iter();
        let entries = self.entries.iter();
        self.weight = entries
            .map(|(_, entry)| weight::of_end(&entry.end))
            .chain(identities.map(|(_, identity)| weight::of_identity(identity)))
            .sum();
        self.sweep_at = SWEEP_FROM.max(2 * self.entries.len());
        self.sweep_at_bytes = self.weight() + SWEEP_FROM_BYTES.max(self.weight() / 4);
        self.swept_bytes = self.weight();
        forgotten
    }

    /// The store has this one.
    pub(super) fn stored(&mut self, id: EndId) {
        self.entries[id as usize].is_stored = true;
    }

    /// What they take, about, in bytes.
    pub(super) fn weight(&self) -> usize {
        self.weight + self.shared.weight()
    }
}

impl Default for Ends {
    fn default() -> Self {
        Self {
            entries: Slab::new(),
            by_end: HashMap::new(),
            by_serial: FnvHashMap::default(),
            identities: Slab::new(),
            by_identity: HashMap::new(),
            shared: Shared::default(),
            next_row: 1,
            sweep_at: SWEEP_FROM,
            sweep_at_bytes: SWEEP_FROM_BYTES,
            swept_bytes: 0,
            weight: 0,
        }
    }
}
