//! The index as its readers and its writers share it, and how much it knows.

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use tokio::sync::watch;

use super::api::Kind;
use crate::{time::Timestamp, topology::Index};

/// What is known of the objects of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Knowledge {
    /// Nothing yet.
    Awaited,
    /// Nothing, and it is not worth waiting for, but for pods: the API server does not allow it, or does not have the kind.
    Refused,
    /// Everything.
    Current,
    /// What there was at this time; the API server has not been heard since.
    Stale {
        /// The time.
        since: Timestamp,
    },
}

/// By kind; empty for a file, which is known when it is read.
type ByKind = BTreeMap<Kind, Knowledge>;

/// The writers' side.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    index: Arc<RwLock<Index>>,
    knowledge: Arc<watch::Sender<ByKind>>,
}

/// The readers' side; clones see the same.
#[derive(Clone, Debug)]
pub struct View {
    index: Arc<RwLock<Index>>,
    knowledge: watch::Receiver<ByKind>,
}

/// Both sides of a new index.
pub(super) fn new() -> (Shared, View) {
    let index = Arc::new(RwLock::new(Index::default()));
    let (sender, receiver) = watch::channel(ByKind::new());
    let shared = Shared {
        index: Arc::clone(&index),
        knowledge: Arc::new(sender),
    };
    let view = View {
        index,
        knowledge: receiver,
    };
    (shared, view)
}

impl Shared {
    /// A writer that panicked may have left a kind half written; it is listed anew then.
    pub(super) fn write(&self) -> RwLockWriteGuard<'_, Index> {
        self.index.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn knowledge(&self, kind: Kind) -> Knowledge {
        let known = self.knowledge.borrow().get(&kind).copied();
        known.unwrap_or(Knowledge::Awaited)
    }

    pub(super) fn set_knowledge(&self, kind: Kind, knowledge: Knowledge) {
        self.knowledge
            .send_if_modified(|kinds| kinds.insert(kind, knowledge) != Some(knowledge));
    }

    /// At once, so that nobody finds the view ready in between.
    pub(super) fn set_all_knowledge(&self, all: impl IntoIterator<Item = (Kind, Knowledge)>) {
        self.knowledge.send_if_modified(|kinds| {
            let mut modified = false;
            for (kind, knowledge) in all {
                modified |= kinds.insert(kind, knowledge) != Some(knowledge);
            }
            modified
        });
    }

    pub(super) fn view(&self) -> View {
        View {
            index: Arc::clone(&self.index),
            knowledge: self.knowledge.subscribe(),
        }
    }
}

impl View {
    /// The index. Whoever holds this keeps changes out, so it is not to be held for long.
    pub fn index(&self) -> RwLockReadGuard<'_, Index> {
        self.index.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the first list of every kind is in that the API server allows to list, and in any case that of the pods.
    /// Before that names would be wrong, not only missing: an address that is no pod's yet looks like an external one.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        all_heard_of(&self.knowledge.borrow())
    }

    /// Returns when [`Self::is_ready`], or when nothing more will be learnt.
    pub async fn ready(&mut self) {
        // An error says that the writers are gone.
        self.knowledge.wait_for(all_heard_of).await.ok();
    }

    /// Returns when [`Self::knowledge`] has changed, or never if nothing more will be learnt.
    pub async fn changed(&mut self) {
        if self.knowledge.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// What is known by kind; empty if the source is a file.
    #[must_use]
    pub fn knowledge(&self) -> BTreeMap<Kind, Knowledge> {
        self.knowledge.borrow().clone()
    }

    /// The time of the oldest knowledge in use, if that is not current.
    #[must_use]
    pub fn stale_since(&self) -> Option<Timestamp> {
        let kinds = self.knowledge.borrow();
        let stale = kinds.values().filter_map(|knowledge| match knowledge {
            Knowledge::Stale { since } => Some(*since),
            Knowledge::Awaited | Knowledge::Refused | Knowledge::Current => None,
        });
        stale.min()
    }
}

fn all_heard_of(kinds: &ByKind) -> bool {
    let is_missing = |(kind, known): (&Kind, &Knowledge)| match known {
        Knowledge::Awaited => true,
        Knowledge::Refused => *kind == Kind::Pods,
        Knowledge::Current | Knowledge::Stale { .. } => false,
    };
    !kinds.iter().any(is_missing)
}
