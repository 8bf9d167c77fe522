//! The pods that the index knows.

use std::{
    borrow::Borrow,
    collections::HashMap,
    hash::{Hash, Hasher},
    sync::Arc,
};

use slab::Slab;

use super::{objects::ContainerPort, service::ServiceId};
use crate::{endpoint, time::Timestamp};

/// Index of a pod in the index's store.
pub(super) type PodId = usize;

/// A pod as the index keeps it.
#[derive(Debug)]
pub(super) struct PodEntry {
    /// What records say of it; they share it.
    pub(super) pod: Arc<endpoint::Pod>,
    /// The services that select it, by name. All pods of one group share the list.
    pub(super) services: Arc<[ServiceId]>,
    /// Shared likewise by all pods that declare the same.
    pub(super) ports: Arc<[ContainerPort]>,
    pub(super) static_uid: Option<Box<str>>,
    /// Succeeded or failed: it holds no address and backs no service.
    pub(super) finished: bool,
    /// When it was deleted.
    pub(super) ended: Option<Timestamp>,
}

impl PodEntry {
    /// Whether it can hold an address and back a service.
    pub(super) fn is_backend(&self) -> bool {
        self.ended.is_none() && !self.finished
    }
}

/// The pods by id and by uid.
#[derive(Debug, Default)]
pub(super) struct Pods {
    entries: Slab<PodEntry>,
    by_uid: HashMap<ByUid, PodId>,
    by_static_uid: HashMap<Box<str>, PodId>,
}

/// A pod as a key that looks like its uid, so that the uid is stored once.
#[derive(Debug)]
struct ByUid(Arc<endpoint::Pod>);

impl Borrow<str> for ByUid {
    fn borrow(&self) -> &str {
        &self.0.uid
    }
}

impl Hash for ByUid {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.uid.hash(state);
    }
}

impl PartialEq for ByUid {
    fn eq(&self, other: &Self) -> bool {
        self.0.uid == other.0.uid
    }
}

impl Eq for ByUid {}

impl Pods {
    /// The pod with this uid, which may have ended.
    pub(super) fn id(&self, uid: &str) -> Option<PodId> {
        self.by_uid.get(uid).copied()
    }

    /// The pod with this uid, or the mirror of the static pod with this uid.
    pub(super) fn by_any_uid(&self, uid: &str) -> Option<&PodEntry> {
        let id = self.by_uid.get(uid).or_else(|| self.by_static_uid.get(uid));
        self.get(*id?)
    }

    pub(super) fn get(&self, id: PodId) -> Option<&PodEntry> {
        self.entries.get(id)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &PodEntry> {
        self.entries.iter().map(|(_, entry)| entry)
    }

    pub(super) fn iter_with_ids(&self) -> impl Iterator<Item = (PodId, &PodEntry)> {
        self.entries.iter()
    }

    /// The id that the next new pod gets.
    pub(super) fn next_id(&self) -> PodId {
        self.entries.vacant_key()
    }

    /// Adds or replaces a pod; its uid stays.
    pub(super) fn set(&mut self, id: PodId, entry: PodEntry) {
        if let Some(uid) = &entry.static_uid {
            self.by_static_uid.insert(uid.clone(), id);
        }
        let key = ByUid(Arc::clone(&entry.pod));
        match self.entries.get_mut(id) {
            Some(old) if Arc::ptr_eq(&old.pod, &entry.pod) => *old = entry,
            Some(old) => {
                // Inserting alone would keep the old key, and with it the old pod.
                self.by_uid.remove(old.pod.uid.as_str());
                self.by_uid.insert(key, id);
                *old = entry;
            }
            None => {
                let inserted = self.entries.insert(entry);
                self.by_uid.insert(key, inserted);
            }
        }
    }

    pub(super) fn get_mut(&mut self, id: PodId) -> Option<&mut PodEntry> {
        self.entries.get_mut(id)
    }

    /// Replaces what records say of a pod; its uid stays.
    pub(super) fn set_identity(&mut self, id: PodId, pod: endpoint::Pod) {
        if let Some(entry) = self.entries.get_mut(id) {
            let pod = Arc::new(pod);
            self.by_uid.remove(entry.pod.uid.as_str());
            self.by_uid.insert(ByUid(Arc::clone(&pod)), id);
            entry.pod = pod;
        }
    }

    /// Forgets a pod.
    pub(super) fn remove(&mut self, id: PodId) {
        let Some(entry) = self.entries.try_remove(id) else {
            return;
        };
        self.by_uid.remove(entry.pod.uid.as_str());
        if let Some(uid) = &entry.static_uid
            && self.by_static_uid.get(uid) == Some(&id)
        {
            self.by_static_uid.remove(uid);
        }
    }
}
