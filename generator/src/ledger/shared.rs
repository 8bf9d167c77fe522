//! One copy of each pod and service.
//!
//! Every record comes with its own copy of both ends. A pod has many edges: without sharing, the ledger would hold its
//! labels once for each of them.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::Arc,
};

use flow::{
    endpoint::{Endpoint, Pod, Service},
    observations::PodId,
};

use super::weight;

/// Fewer entries than this are not worth a sweep.
const SWEEP_FROM: usize = 1 << 10;

/// The latest observed details of each pod and service.
///
/// A record that was observed last may have taken the place of the only one that used a copy. Such copies are swept
/// out whenever their table has doubled, so a table has at most twice as many entries as the ledger uses.
#[derive(Clone, Debug, Default)]
pub(super) struct Shared {
    pods: Table<PodId, Pod>,
    services: Table<(String, String), Service>,
}

#[derive(Clone, Debug)]
struct Table<K, T> {
    copies: BTreeMap<K, Arc<T>>,
    sweep_at: usize,
    /// What the copies take that came since the last sweep or were there then; those that were replaced since then may
    /// still be in use, and are among them.
    weight: usize,
}

/// Something whose size in memory is known, about.
trait Weighed {
    fn weight(&self) -> usize;
}

impl Weighed for Pod {
    fn weight(&self) -> usize {
        weight::of_pod(self)
    }
}

impl Weighed for Service {
    fn weight(&self) -> usize {
        weight::of_service(self)
    }
}

impl Shared {
    /// Replaces what the endpoint refers to by the shared copy, if that is equal; else it becomes the shared copy.
    pub(super) fn share(&mut self, endpoint: &mut Endpoint) {
        match endpoint {
            Endpoint::Pod { pod, service } => {
                self.pods.share(PodId::of(pod), pod);
                if let Some(service) = service {
                    self.share_service(service);
                }
            }
            Endpoint::Service(service) => self.share_service(service),
            Endpoint::Node(_) | Endpoint::External(_) => {}
        }
    }

    /// Removes the copies that nobody uses any more.
    pub(super) fn sweep(&mut self) {
        self.pods.sweep();
        self.services.sweep();
    }

    /// What the copies take, about, in bytes.
    pub(super) fn weight(&self) -> usize {
        self.pods.weight + self.services.weight
    }

    fn share_service(&mut self, service: &mut Arc<Service>) {
        let name = (service.namespace.clone(), service.name.clone());
        self.services.share(name, service);
    }
}

impl<K: Ord, T: PartialEq + Weighed> Table<K, T> {
    fn share(&mut self, key: K, value: &mut Arc<T>) {
        match self.copies.entry(key) {
            Entry::Vacant(entry) => {
                self.weight += value.weight();
                entry.insert(Arc::clone(value));
            }
            Entry::Occupied(entry) if entry.get() == value => {
                *value = Arc::clone(entry.get());
            }
            Entry::Occupied(mut entry) => {
                self.weight += value.weight();
                entry.insert(Arc::clone(value));
            }
        }
        if self.copies.len() >= self.sweep_at {
            self.sweep();
        }
    }

    fn sweep(&mut self) {
        self.copies.retain(|_, copy| Arc::strong_count(copy) > 1);
        self.sweep_at = SWEEP_FROM.max(2 * self.copies.len());
        self.weight = self.copies.values().map(|copy| copy.weight()).sum();
    }
}

impl<K, T> Default for Table<K, T> {
    fn default() -> Self {
        Self {
            copies: BTreeMap::new(),
            sweep_at: SWEEP_FROM,
            weight: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::service;

    #[test]
    fn copies_that_nobody_uses_are_swept_out() {
        let mut shared = Shared::default();
        let mut used = Vec::new();
        for number in 0..10 * SWEEP_FROM {
            let mut endpoint = Endpoint::Service(service("shop", &number.to_string()));
            shared.share(&mut endpoint);
            if number < 5 {
                used.push(endpoint);
            }
            assert!(shared.services.copies.len() <= SWEEP_FROM);
        }
        for end in used {
            let mut equal = match &end {
                Endpoint::Service(service) => Endpoint::Service(Arc::new((**service).clone())),
                other => panic!("{other:?}"),
            };
            shared.share(&mut equal);
            let (Endpoint::Service(one), Endpoint::Service(other)) = (&end, &equal) else {
                panic!("{equal:?}");
            };
            assert!(Arc::ptr_eq(one, other));
        }
    }
}
