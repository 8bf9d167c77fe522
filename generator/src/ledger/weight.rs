//! What parts of the ledger take in memory, about. It is what a bound is set on, so it errs on the side of too much.

use std::{collections::BTreeMap, net::IpAddr};

use flow::{
    endpoint::{Pod, Service},
    observations::{Identity, PodId},
    wire::End,
};

use super::{
    ends::Entry,
    observation::{Key, Observation},
};

/// What the allocator and a table add to an entry: tables are between half and entirely full.
const ENTRY: usize = 160;

/// An observation: its entry, its place under its key, and what it may have for itself, its process.
pub(super) const OF_OBSERVATION: usize = size_of::<Observation>() + 4 * size_of::<Key>() + PROCESS;

/// Strings and counts of a process; most observations of one batch share them.
const PROCESS: usize = 96;

/// An end, without the pod and the service that it shares with others.
pub(super) const OF_END: usize = size_of::<Entry>() + size_of::<End>() + ENTRY;

/// An identity, which is held twice: by number and for its number.
pub(super) fn of_identity(identity: &Identity) -> usize {
    let of_pod = |id: &PodId| match id {
        PodId::Uid(uid) => uid.len(),
        PodId::Name { namespace, name } => namespace.len() + name.len(),
    };
    let strings = match identity {
        Identity::Pod(id) | Identity::HostPod(id, _) => of_pod(id),
        Identity::Service { namespace, name } => namespace.len() + name.len(),
        Identity::Node { name, .. } => name.len(),
        Identity::External(_) => 0,
    };
    2 * (size_of::<Identity>() + strings) + ENTRY
}

pub(super) fn of_pod(pod: &Pod) -> usize {
    size_of::<Pod>()
        + ENTRY
        + pod.uid.len()
        + pod.namespace.len()
        + pod.name.len()
        + pod.node.as_ref().map_or(0, |node| node.len())
        + pod
            .workload
            .as_ref()
            .map_or(0, |workload| workload.kind.len() + workload.name.len())
        + of_labels(&pod.labels)
        + pod.addresses.len() * size_of::<IpAddr>()
        + pod
            .services
            .iter()
            .map(|name| size_of::<String>() + name.len())
            .sum::<usize>()
}

pub(super) fn of_service(service: &Service) -> usize {
    size_of::<Service>()
        + ENTRY
        + service.uid.len()
        + service.namespace.len()
        + service.name.len()
        + of_labels(&service.labels)
        + of_labels(&service.selector)
        + service.backends.len() * size_of::<IpAddr>()
}

fn of_labels(labels: &BTreeMap<String, String>) -> usize {
    labels
        .iter()
        .map(|(key, value)| 2 * size_of::<String>() + 16 + key.len() + value.len())
        .sum()
}
