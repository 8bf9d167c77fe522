//! What pods have in common, stored once.
//!
//! A cluster has many more pods than templates: pods of one template have the same labels, workload, ports and services.
//! Shared, they are a small part of a pod's memory; each pod with its own, they would be most of it.

use std::{collections::HashSet, hash::Hash, sync::Arc};

use super::objects::{ContainerPort, Pod};
use crate::endpoint::{self, Endpoint, Labels, Service, Workload};

/// Below this many values nobody looks for those that are no longer used.
const FEW: usize = 64;

/// What pods have in common.
#[derive(Debug, Default)]
pub struct Common {
    labels: Shared<Labels>,
    workloads: Shared<Workload>,
    nodes: Shared<str>,
    service_names: Shared<[String]>,
    services: Shared<Service>,
    ports: Shared<[ContainerPort]>,
}

impl Common {
    /// From now on the pod shares what it has in common with the pods before it.
    pub fn share(&mut self, pod: &mut Pod) {
        self.share_identity(&mut pod.identity);
        self.ports.share(&mut pod.ports);
    }

    /// The same for the pod and the service of an end that nobody else has yet.
    pub fn share_end(&mut self, end: &mut Endpoint) {
        match end {
            Endpoint::Pod { pod, service } => {
                if let Some(pod) = Arc::get_mut(pod) {
                    self.share_identity(pod);
                    self.service_names.share(&mut pod.services);
                }
                if let Some(service) = service {
                    self.services.share(service);
                }
            }
            Endpoint::Service(service) => self.services.share(service),
            Endpoint::Node(_) | Endpoint::External(_) => {}
        }
    }

    fn share_identity(&mut self, pod: &mut endpoint::Pod) {
        self.labels.share(&mut pod.labels);
        if let Some(workload) = &mut pod.workload {
            self.workloads.share(workload);
        }
        if let Some(node) = &mut pod.node {
            self.nodes.share(node);
        }
    }

    /// The same for the names of the services that select a pod.
    pub(super) fn services(&mut self, mut names: Arc<[String]>) -> Arc<[String]> {
        self.service_names.share(&mut names);
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

    #[test]
    fn ends_share_what_they_have_in_common() {
        let mut common = Common::default();
        let mut end = |name: &str| {
            let end: crate::wire::End = serde_json::from_value(serde_json::json!({
                "address": "10.0.0.1",
                "pod": {"id": name, "namespace": "shop", "name": name, "labels": {"app": "web"}, "node": "node-1",
                        "workload": {"kind": "Deployment", "name": "web"}, "services": ["web"]},
                "service": {"id": "s", "namespace": "shop", "name": "web", "selector": "app=web"},
            }))
            .unwrap();
            let mut end = end.endpoint;
            common.share_end(&mut end);
            match end {
                Endpoint::Pod {
                    pod,
                    service: Some(service),
                } => (pod, service),
                other => panic!("{other:?}"),
            }
        };
        let ((one, service), (other, same)) = (end("web-1"), end("web-2"));
        assert_eq!((one.name.as_str(), other.name.as_str()), ("web-1", "web-2"));
        assert!(Arc::ptr_eq(&one.labels, &other.labels));
        assert!(Arc::ptr_eq(&one.services, &other.services));
        assert!(Arc::ptr_eq(&service, &same));
        let nodes = (one.node.as_ref().unwrap(), other.node.as_ref().unwrap());
        assert!(Arc::ptr_eq(nodes.0, nodes.1));
        let workloads = (
            one.workload.as_ref().unwrap(),
            other.workload.as_ref().unwrap(),
        );
        assert!(Arc::ptr_eq(workloads.0, workloads.1));
    }
}
