//! The pods that the index knows.

use std::{
    borrow::Borrow,
    collections::HashMap,
    hash::{Hash, Hasher},
    sync::Arc,
};

use smallvec::SmallVec;

use super::{
    objects::ContainerPort,
    service::ServiceId,
    store::{Id, Store},
};
use crate::{endpoint, time::Timestamp};

/// Number of a pod in the index's store.
pub(super) type PodId = Id;

/// Services by name. Nearly all pods have at most one, and find it here without another look into memory.
pub(super) type ServiceIds = SmallVec<[ServiceId; 4]>;

/// A pod as the index keeps it: one line of the processor's cache, which is what a lookup in a large cluster costs.
#[derive(Debug)]
#[repr(align(64))]
pub(super) struct PodEntry {
    /// What records say of it; they share it.
    pub(super) pod: Arc<endpoint::Pod>,
    /// The services that select it.
    pub(super) services: ServiceIds,
    pub(super) ports: Arc<[ContainerPort]>,
    pub(super) life: Life,
}

const _: () = assert!(size_of::<Option<PodEntry>>() == 64);

/// What became of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    Living,
    /// Succeeded or failed: it holds no address and backs no service.
    Finished,
    /// It was deleted, as was learnt at this time.
    Ended(Timestamp),
}

impl PodEntry {
    /// Whether it was deleted.
    pub(super) fn has_ended(&self) -> bool {
        matches!(self.life, Life::Ended(_))
    }

    /// Whether it can hold an address and back a service.
    pub(super) fn is_backend(&self) -> bool {
        self.life == Life::Living
    }
}

/// The pods by number and by uid.
#[derive(Debug, Default)]
pub(super) struct Pods {
    entries: Store<PodEntry>,
    by_uid: HashMap<ByUid, PodId>,
    /// Only the mirrors of static pods have two uids: those that kubelet gave the static pods.
    by_static_uid: HashMap<Box<str>, PodId>,
    static_uids: HashMap<PodId, Box<str>>,
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

    pub(super) fn get_mut(&mut self, id: PodId) -> Option<&mut PodEntry> {
        self.entries.get_mut(id)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (PodId, &PodEntry)> {
        self.entries.iter()
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// The number that the next new pod gets.
    pub(super) fn next_id(&self) -> PodId {
        self.entries.next_id()
    }

    /// Adds or replaces a pod; its uid stays.
    pub(super) fn set(&mut self, id: PodId, entry: PodEntry, static_uid: Option<String>) {
        self.set_static_uid(id, static_uid.map(String::into_boxed_str));
        match self.entries.get_mut(id) {
            Some(known) => {
                let pod = Arc::clone(&entry.pod);
                let before = std::mem::replace(known, entry);
                self.rekey(id, &before.pod, pod);
            }
            None => {
                let key = ByUid(Arc::clone(&entry.pod));
                let inserted = self.entries.insert(entry);
                self.by_uid.insert(key, inserted);
            }
        }
    }

    /// Replaces what records say of a pod; its uid stays.
    pub(super) fn set_identity(&mut self, id: PodId, pod: Arc<endpoint::Pod>) {
        if let Some(entry) = self.entries.get_mut(id) {
            let before = std::mem::replace(&mut entry.pod, Arc::clone(&pod));
            self.rekey(id, &before, pod);
        }
    }

    /// Forgets a pod.
    pub(super) fn remove(&mut self, id: PodId) {
        if let Some(entry) = self.entries.remove(id) {
            self.by_uid.remove(entry.pod.uid.as_str());
            self.set_static_uid(id, None);
        }
    }

    fn rekey(&mut self, id: PodId, before: &Arc<endpoint::Pod>, pod: Arc<endpoint::Pod>) {
        if !Arc::ptr_eq(before, &pod) {
            // Inserting alone would keep the old key, and with it the old pod.
            self.by_uid.remove(before.uid.as_str());
            self.by_uid.insert(ByUid(pod), id);
        }
    }

    fn set_static_uid(&mut self, id: PodId, uid: Option<Box<str>>) {
        if self.static_uids.get(&id) == uid.as_ref() {
            return;
        }
        if let Some(old) = self.static_uids.remove(&id)
            && self.by_static_uid.get(&old) == Some(&id)
        {
            self.by_static_uid.remove(&old);
        }
        if let Some(uid) = uid {
            self.by_static_uid.insert(uid.clone(), id);
            self.static_uids.insert(id, uid);
        }
    }
}
