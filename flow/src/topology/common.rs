//! What pods have in common, stored once.
//!
//! A cluster has many more pods than templates: pods of one template have the same labels, workload, ports and services.
//! Shared, they are a small part of a pod's memory; each pod with its own, they would be most of it.

use std::{collections::HashSet, hash::Hash, sync::Arc};

use super::objects::{ContainerPort, Pod};
use crate::endpoint::{Labels, Workload};

/// Below this many values nobody looks for those that are no longer used.
const FEW: usize = 64;

/// What pods have in common.
#[derive(Debug, Default)]
pub struct Common {
    labels: Shared<Labels>,
    workloads: Shared<Workload>,
    nodes: Shared<str>,
    services: Shared<[String]>,
    ports: Shared<[ContainerPort]>,
}

impl Common {
    /// From now on the pod shares what it has in common with the pods before it.
    pub fn share(&mut self, pod: &mut Pod) {
        let identity = &mut pod.identity;
        self.labels.share(&mut identity.labels);
        if let Some(workload) = &mut identity.workload {
            self.workloads.share(workload);
        }
        if let Some(node) = &mut identity.node {
            self.nodes.share(node);
        }
        self.ports.share(&mut pod.ports);
    }

    /// The same for the names of the services that select a pod.
    pub(super) fn services(&mut self, mut names: Arc<[String]>) -> Arc<[String]> {
        self.services.share(&mut names);
        names
    }
}

/// Values of one type. Those that nobody else uses any more are dropped whenever the set would double.
#[derive(Debug)]
struct Shared<T: ?Sized> {
    known: HashSet<Arc<T>>,
    limit: usize,
}

impl<T: ?Sized> Default for Shared<T> {
    fn default() -> Self {
        Self {
            known: HashSet::new(),
            limit: FEW,
        }
    }
}

impl<T: Eq + Hash + ?Sized> Shared<T> {
    fn share(&mut self, value: &mut Arc<T>) {
        if let Some(known) = self.known.get(&**value) {
            *value = Arc::clone(known);
            return;
        }
        if self.known.len() >= self.limit {
            self.known.retain(|known| Arc::strong_count(known) > 1);
            self.limit = (2 * self.known.len()).max(FEW);
        }
        self.known.insert(Arc::clone(value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_values_are_one_and_unused_ones_are_dropped() {
        let mut shared = Shared::<str>::default();
        let mut kept: Arc<str> = "kept".into();
        shared.share(&mut kept);
        for number in 0..10 * FEW {
            shared.share(&mut number.to_string().into());
        }
        assert!(shared.known.len() <= FEW, "{}", shared.known.len());
        let mut same: Arc<str> = "kept".into();
        shared.share(&mut same);
        assert!(Arc::ptr_eq(&kept, &same));
    }
}
