//! What the edges tell about the cluster's pods, workloads and services.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    sync::Arc,
};

use flow::{
    endpoint::{Endpoint, Labels, Pod, Service},
    observations::PodId,
};

use super::{
    labels::{STATEFULSET_POD, selects, stable},
    manifest::are_of_dns,
    target::Target,
};
use crate::{label_index::LabelIndex, ledger::Edge};

/// Namespace, kind and name of a controller.
pub(super) type WorkloadKey = (String, String, String);

/// The pods, workloads and services that are ends of edges.
pub(super) struct Cluster<'a> {
    pods: BTreeSet<PodId>,
    /// Of each workload the stable labels that all its pods have.
    workloads: BTreeMap<WorkloadKey, Labels>,
    services: BTreeMap<(&'a str, &'a str), &'a Service>,
    /// Namespace and labels of what answers for the cluster's DNS: pods, and selectors of services.
    dns: BTreeSet<(&'a str, &'a Labels)>,
    /// The pods with addresses of their own, by their labels.
    labelled: LabelIndex,
    by_number: Vec<&'a Pod>,
}

impl<'a> Cluster<'a> {
    pub(super) fn new(edges: &'a [Edge]) -> Self {
        let mut cluster = Self {
            pods: BTreeSet::new(),
            workloads: BTreeMap::new(),
            services: BTreeMap::new(),
            dns: BTreeSet::new(),
            labelled: LabelIndex::default(),
            by_number: Vec::new(),
        };
        for edge in edges {
            for endpoint in [&edge.client, &edge.server] {
                match endpoint {
                    Endpoint::Pod { pod, service } => {
                        cluster.add_pod(pod);
                        cluster.add_service(service.as_ref());
                    }
                    Endpoint::Service(service) => cluster.add_service(Some(service)),
                    Endpoint::Node(_) | Endpoint::External(_) => {}
                }
            }
        }
        cluster
    }

    fn add_pod(&mut self, pod: &'a Pod) {
        if !self.pods.insert(PodId::of(pod)) {
            return;
        }
        if !pod.host_network {
            self.labelled.add(self.by_number.len(), &pod.labels);
            self.by_number.push(pod);
        }
        if are_of_dns(&pod.labels) && !pod.host_network {
            self.dns.insert((&pod.namespace, &pod.labels));
        }
        match self.workloads.entry(workload(pod)) {
            Entry::Vacant(entry) => {
                entry.insert(stable(&pod.labels));
            }
            Entry::Occupied(mut entry) => entry
                .get_mut()
                .retain(|key, value| pod.labels.get(key) == Some(value)),
        }
    }

    fn add_service(&mut self, service: Option<&'a Arc<Service>>) {
        if let Some(service) = service {
            self.services
                .insert((&service.namespace, &service.name), service);
            if are_of_dns(&service.selector) {
                self.dns.insert((&service.namespace, &service.selector));
            }
        }
    }

    /// The service of an endpoint, and the stable part of its selector: the named one, or else the first of the others
    /// that selects the pod.
    pub(super) fn service_of(
        &self,
        pod: &Pod,
        named: Option<&Arc<Service>>,
    ) -> Option<(String, Labels)> {
        let others = pod
            .services
            .iter()
            .filter_map(|name| self.services.get(&(pod.namespace.as_str(), name.as_str())))
            .copied();
        named
            .map(Arc::as_ref)
            .filter(|service| service.namespace == pod.namespace)
            .into_iter()
            .chain(others)
            .map(|service| (service.name.clone(), stable(&service.selector)))
            .find(|(_, selector)| !selector.is_empty() && selects(selector, &pod.labels))
    }

    /// The stable labels that all pods of the pod's workload have; `None` where they have none in common.
    pub(super) fn workload_of(&self, pod: &Pod) -> Option<(WorkloadKey, Labels)> {
        let key = workload(pod);
        let labels = self.workloads.get(&key)?.clone();
        (!labels.is_empty()).then_some((key, labels))
    }

    /// Whether the cluster's DNS is among the pods that the target governs, as far as they were seen.
    pub(super) fn has_dns_in(&self, target: &Target) -> bool {
        are_of_dns(&target.selector)
            || self.dns.iter().any(|(namespace, labels)| {
                *namespace == target.id.namespace && selects(&target.selector, labels)
            })
    }

    /// The pods with addresses of their own that a service selects; none if it has no selector.
    pub(super) fn pods_of<'s>(
        &'s self,
        service: &'s Service,
    ) -> impl Iterator<Item = &'a Pod> + 's {
        let pairs = service
            .selector
            .iter()
            .map(|(key, value)| (&**key, &**value));
        let candidates = self.labelled.rarest(pairs).unwrap_or_default();
        candidates
            .iter()
            .map(|number| self.by_number[*number])
            .filter(|pod| {
                pod.namespace == service.namespace && selects(&service.selector, &pod.labels)
            })
    }
}

/// The controller of a pod. Records of MicroShield do not name it: there it is taken from the names and labels that
/// controllers give to their pods.
pub(super) fn workload(pod: &Pod) -> WorkloadKey {
    let (kind, name) = match &pod.workload {
        Some(workload) => (workload.kind.as_str(), workload.name.as_str()),
        None => inferred(pod).unwrap_or(("Pod", &pod.name)),
    };
    (pod.namespace.clone(), kind.to_owned(), name.to_owned())
}

fn inferred(pod: &Pod) -> Option<(&'static str, &str)> {
    let (owner, suffix) = pod.name.rsplit_once('-')?;
    if let Some(hash) = pod.labels.get("pod-template-hash") {
        let name = owner.strip_suffix(hash.as_str())?.strip_suffix('-')?;
        return Some(("Deployment", name));
    }
    if pod.labels.contains_key(STATEFULSET_POD) {
        return Some(("StatefulSet", owner));
    }
    // Kubernetes appends five random characters to the names of a DaemonSet's pods.
    let is_daemon = pod.labels.contains_key("pod-template-generation") && suffix.len() == 5;
    is_daemon.then_some(("DaemonSet", owner))
}
