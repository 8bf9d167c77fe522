//! What the edges tell about the cluster's pods, workloads and services.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use flow::{
    endpoint::{Endpoint, Labels, Pod, Service},
    observations::PodId,
    time::Timestamp,
};

use super::{
    labels::{STATEFULSET_POD, selects, stable},
    manifest::{DNS_NAMESPACE, are_of_dns},
    target::Target,
    variants::Variants,
};
use crate::{label_index::LabelIndex, ledger::Edge};

/// For how long a workload may be unseen and still be taken to live: some are used once a week, and clocks of nodes differ.
const QUIET: Duration = Duration::from_secs(8 * 24 * 60 * 60);

/// The kind of what rests between its runs, be it for a month: from when it was seen it is taken to live for as long as
/// anything is known of it.
const CRON_JOB: &str = "CronJob";

const FOREVER: Timestamp = Timestamp::from_nanos(u64::MAX);

/// The kind of what no controller made: each such pod is a workload of its own.
const BARE: &str = "Pod";

/// Namespace, kind and name of a controller.
pub(super) type WorkloadKey = (String, String, String);

/// When a pod was seen.
struct Seen {
    first: Timestamp,
    last: Timestamp,
}

/// When the pods of a workload were seen. What the ledger remembers of it may be long gone.
#[derive(Clone, Copy, Default)]
struct Life {
    /// When the newest of them appeared.
    newest: Timestamp,
    /// Until when it is taken to have lived: when any of them was there the last time.
    last: Timestamp,
}

/// The pods, workloads and services that are ends of edges.
pub(super) struct Cluster<'a> {
    pods: BTreeMap<PodId, (&'a Pod, Seen)>,
    /// Of each workload the labels by which its pods are selected.
    workloads: BTreeMap<WorkloadKey, Labels>,
    services: BTreeMap<(&'a str, &'a str), &'a Service>,
    /// Namespace and labels of what answers for the cluster's DNS: pods, and selectors of services.
    dns: BTreeSet<(&'a str, &'a Labels)>,
    /// The pods with addresses of their own, by their labels.
    labelled: LabelIndex,
    by_number: Vec<&'a Pod>,
    /// Of each of them the place of its kin's life.
    kin: Vec<usize>,
    lives: Vec<Life>,
    /// The pods in their node's network likewise, each with its addresses.
    host_labelled: LabelIndex,
    host_by_number: Vec<(&'a Pod, BTreeSet<IpAddr>)>,
    host_numbers: BTreeMap<PodId, usize>,
}

impl<'a> Cluster<'a> {
    pub(super) fn new(edges: &'a [Edge]) -> Self {
        let mut cluster = Self {
            pods: BTreeMap::new(),
            workloads: BTreeMap::new(),
            services: BTreeMap::new(),
            dns: BTreeSet::new(),
            labelled: LabelIndex::default(),
            by_number: Vec::new(),
            kin: Vec::new(),
            lives: Vec::new(),
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
                        cluster.add_pod(pod, edge);
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
        cluster.add_lives();
        cluster.workloads = cluster.labels_of_workloads();
        cluster
    }

    fn add_pod(&mut self, pod: &'a Pod, edge: &Edge) {
        let (first, last) = (edge.first_seen, edge.last_seen);
        match self.pods.entry(PodId::of(pod)) {
            Entry::Vacant(entry) => {
                entry.insert((pod, Seen { first, last }));
            }
            Entry::Occupied(mut entry) => {
                let (_, seen) = entry.get_mut();
                seen.first = first.min(seen.first);
                seen.last = last.max(seen.last);
                return;
            }
        }
        if !pod.host_network {
            self.labelled.add(self.by_number.len(), &pod.labels);
            self.by_number.push(pod);
        }
        if are_of_dns(&pod.labels) && !pod.host_network {
            self.dns.insert((&pod.namespace, &pod.labels));
        }
    }

    fn add_lives(&mut self) {
        let mut places = BTreeMap::<(WorkloadKey, Labels), usize>::new();
        for (pod, seen) in self.pods.values() {
            let kin = kin(pod);
            let rests = kin.0.1 == CRON_JOB;
            let place = *places.entry(kin).or_insert(self.lives.len());
            if place == self.lives.len() {
                self.lives.push(Life::default());
            }
            let life = &mut self.lives[place];
            life.newest = seen.first.max(life.newest);
            let last = if rests { FOREVER } else { seen.last };
            life.last = last.max(life.last);
        }
        self.kin = self.by_number.iter().map(|pod| places[&kin(pod)]).collect();
    }

    fn labels_of_workloads(&self) -> BTreeMap<WorkloadKey, Labels> {
        let mut variants = BTreeMap::<WorkloadKey, Variants>::new();
        for (pod, seen) in self.pods.values() {
            let variants = variants.entry(workload(pod)).or_default();
            variants.add(stable(&pod.labels), seen.first);
        }
        let selected = variants.into_iter().map(|(key, variants)| {
            // What had gone before the newest pods came is no reason to tell them apart from it.
            let since = variants.newest().saturating_sub(QUIET);
            let strangers = |labels: &Labels| {
                let numbers = self.selected_numbers(&key.0, labels);
                let strangers = numbers.filter(|number| {
                    self.life(*number).last >= since && workload(self.by_number[*number]) != key
                });
                strangers.count()
            };
            let labels = variants.common(strangers);
            (key, labels)
        });
        selected.collect()
    }

    /// The pods with addresses of their own that have these labels, of which there is at least one.
    fn selected<'s>(
        &'s self,
        namespace: &'s str,
        labels: &'s Labels,
    ) -> impl Iterator<Item = &'a Pod> + 's {
        self.selected_numbers(namespace, labels)
            .map(|number| self.by_number[number])
    }

    fn selected_numbers<'s>(
        &'s self,
        namespace: &'s str,
        labels: &'s Labels,
    ) -> impl Iterator<Item = usize> + 's {
        candidates(&self.labelled, labels).filter(move |number| {
            let pod = self.by_number[*number];
            pod.namespace == namespace && selects(labels, &pod.labels)
        })
    }

    fn life(&self, number: usize) -> Life {
        self.lives[self.kin[number]]
    }

    /// Whether pods of more than one workload have these labels, of workloads that lived at the same time: one that took
    /// the place of another shares nothing with it.
    pub(super) fn is_shared(&self, namespace: &str, labels: &Labels) -> bool {
        let numbers = self.selected_numbers(namespace, labels);
        let kin: BTreeSet<usize> = numbers.map(|number| self.kin[number]).collect();
        let mut lives: Vec<Life> = kin.into_iter().map(|place| self.lives[place]).collect();
        lives.sort_unstable_by_key(|life| life.newest);
        let mut last = None;
        for life in lives {
            if last >= Some(life.newest.saturating_sub(QUIET)) {
                return true;
            }
            last = last.max(Some(life.last));
        }
        false
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

    /// The pod's workload, and the labels by which its pods are selected; `None` if they do not select this one, or are none.
    pub(super) fn workload_of(&self, pod: &Pod) -> Option<(WorkloadKey, Labels)> {
        let key = workload(pod);
        let labels = self.workloads.get(&key)?;
        let labels = (!labels.is_empty() && selects(labels, &pod.labels)).then(|| labels.clone());
        labels.map(|labels| (key, labels))
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
        self.selected(&service.namespace, &service.selector)
    }

    /// The addresses of the pods in their node's network that a service selects, each once.
    pub(super) fn host_addresses_of(&self, service: &Service) -> BTreeSet<IpAddr> {
        candidates(&self.host_labelled, &service.selector)
            .map(|number| &self.host_by_number[number])
            .filter(|(pod, _)| is_of(pod, service))
            .flat_map(|(_, addresses)| addresses)
            .copied()
            .collect()
    }
}

/// What has the rarest of these labels.
fn candidates<'s>(index: &'s LabelIndex, labels: &'s Labels) -> impl Iterator<Item = usize> + 's {
    let pairs = labels.iter();
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
        None => inferred(pod).unwrap_or((BARE, &pod.name)),
    };
    (pod.namespace.clone(), kind.to_owned(), name.to_owned())
}

/// The pods that need not be told apart: those of one controller, and those without one that have the same labels, as what
/// runs builds starts them one after another.
fn kin(pod: &Pod) -> (WorkloadKey, Labels) {
    let (namespace, kind, name) = workload(pod);
    if kind == BARE {
        ((namespace, kind, String::new()), stable(&pod.labels))
    } else {
        ((namespace, kind, name), Labels::new())
    }
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
