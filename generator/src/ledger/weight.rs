//! What parts of the ledger take in memory, about. It is what a bound is set on, so it errs on the side of too much.

use std::{collections::BTreeMap, net::IpAddr};

use flow::{
    endpoint::{Pod, Service},
    observations::{Identity, ObservationKey, PodId},
    record::FlowRecord,
};

/// What the allocator and the tree add to an entry: nodes of a tree are between half and entirely full.
const ENTRY: usize = 160;

/// Strings of a record that are its own: the node, the process and its container.
const OWN_STRINGS: usize = 192;

/// An observation, which is held with two copies of its key's strings: in the key, and about as many bytes in the record.
pub(super) fn of_observation(key: &ObservationKey) -> usize {
    size_of::<ObservationKey>()
        + size_of::<FlowRecord>()
        + ENTRY
        + OWN_STRINGS
        + 2 * (of_identity(&key.client) + of_identity(&key.server))
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

fn of_identity(identity: &Identity) -> usize {
    let of_pod = |id: &PodId| match id {
        PodId::Uid(uid) => uid.len(),
        PodId::Name { namespace, name } => namespace.len() + name.len(),
    };
    match identity {
        Identity::Pod(id) | Identity::HostPod(id, _) => of_pod(id),
        Identity::Service { namespace, name } => namespace.len() + name.len(),
        Identity::Node { name, .. } => name.len(),
        Identity::External(_) => 0,
    }
}

fn of_labels(labels: &BTreeMap<String, String>) -> usize {
    labels
        .iter()
        .map(|(key, value)| 2 * size_of::<String>() + 16 + key.len() + value.len())
        .sum()
}
