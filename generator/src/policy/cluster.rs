//! What the edges tell about the cluster's pods, workloads and services.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    net::IpAddr,
    sync::Arc,
};

use flow::{
    endpoint::{Endpoint, Labels, Pod, Service},
    observations::PodId,
};

use super::{
    labels::{STATEFULSET_POD, selects, stable},
    manifest::{DNS_NAMESPACE, are_of_dns},
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
    /// The pods in their node's network likewise, each with its addresses.
    host_labelled: LabelIndex,
    host_by_number: Vec<(&'a Pod, BTreeSet<IpAddr>)>,
    host_numbers: BTreeMap<PodId, usize>,
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
            host_labelled: LabelIndex::default(),
            host_by_number: Vec::new(),
            host_numbers: BTreeMap::new(),
        };
        for edge in edges {
            for (endpoint, address) in [
                (&edge.client, edge.client_address),
                (&edge.server, edge.server_address),
            ] {
                match endpoint {
                    Endpoint::Pod { pod, service } => {
                        cluster.add_pod(pod);
                        if pod.host_network {
                            cluster.add_host_pod(pod, address);
                        }
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

    /// Services lead to the addresses that the API gives; where these are not known, to those that were seen.
    fn add_host_pod(&mut self, pod: &'a Pod, seen: IpAddr) {
        let next = self.host_by_number.len();
        let number = *self.host_numbers.entry(PodId::of(pod)).or_insert(next);
        if number == next {
            self.host_labelled.add(number, &pod.labels);
            let known = pod.addresses.iter().map(IpAddr::to_canonical).collect();
            self.host_by_number.push((pod, known));
        }
        if pod.addresses.is_empty() {
            self.host_by_number[number].1.insert(seen.to_canonical());
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

    /// Whether the cluster's DNS is among the pods that the target governs: as far as they were seen, and wherever the
    /// target is all pods of the namespace in which it is by convention. There it may be unseen, as what asks it is where
    /// UDP is not captured, and closing it would stop the whole cluster.
    pub(super) fn has_dns_in(&self, target: &Target) -> bool {
        let is_all_of_its_namespace =
            target.selector.is_empty() && target.id.namespace == DNS_NAMESPACE;
        is_all_of_its_namespace
            || are_of_dns(&target.selector)
            || self.dns.iter().any(|(namespace, labels)| {
                *namespace == target.id.namespace && selects(&target.selector, labels)
            })
    }

    /// The pods with addresses of their own that a service selects; none if it has no selector.
    pub(super) fn pods_of<'s>(
        &'s self,
        service: &'s Service,
    ) -> impl Iterator<Item = &'a Pod> + 's {
        candidates(&self.labelled, service)
            .map(|number| self.by_number[number])
            .filter(|pod| is_of(pod, service))
    }

    /// The addresses of the pods in their node's network that a service selects, each once.
    pub(super) fn host_addresses_of(&self, service: &Service) -> BTreeSet<IpAddr> {
        candidates(&self.host_labelled, service)
            .map(|number| &self.host_by_number[number])
            .filter(|(pod, _)| is_of(pod, service))
            .flat_map(|(_, addresses)| addresses)
            .copied()
            .collect()
    }
}

/// What has the rarest of the labels that a service selects by.
fn candidates<'s>(index: &'s LabelIndex, service: &'s Service) -> impl Iterator<Item = usize> + 's {
    let pairs = service.selector.iter();
    let pairs = pairs.map(|(key, value)| (&**key, &**value));
    index.rarest(pairs).unwrap_or_default().iter().copied()
}

fn is_of(pod: &Pod, service: &Service) -> bool {
    pod.namespace == service.namespace && selects(&service.selector, &pod.labels)
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
