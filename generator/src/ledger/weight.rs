//! What parts of the ledger take in memory, about. It is what a bound is set on, so it errs on the side of too much.

use std::{collections::BTreeMap, net::IpAddr};

use flow::{
    endpoint::{Endpoint, Node, Pod, Service},
    observations::{Identity, PodId},
    record::Process,
    wire::End,
};

use super::{
    ends::Entry,
    observation::{Key, Names, Observation},
};

/// What the allocator and a table add to an entry: tables are between half and entirely full.
const ENTRY: usize = 160;

/// What the allocator adds to a piece of memory, which has a header and is rounded up.
const ALLOCATION: usize = 24;

/// The two counters of what is shared.
const SHARED: usize = 16 + ALLOCATION;

/// A label but for its text: two strings, in the nodes of a tree that are little more than half full.
const LABEL: usize = 4 * size_of::<String>() + 2 * ALLOCATION;

/// The first node of a tree of labels, which has room for eleven.
const LABELS: usize = 11 * 2 * size_of::<String>();

/// An observation: its entry, and its place under its key.
const OF_OBSERVATION: usize = size_of::<Observation>() + 4 * size_of::<Key>();

/// An observation. The strings of its names are weighed as if it had them for itself, though many observations of one batch
/// share them: whoever sends the batches decides whether they do.
pub(super) fn of_observation(names: &Names) -> usize {
    let process = names.process.as_deref();
    OF_OBSERVATION + SHARED + names.hostname.len() + process.map_or(0, of_process)
}

fn of_process(process: &Process) -> usize {
    let container = process.container.as_ref();
    SHARED
        + size_of::<Process>()
        + ALLOCATION
        + process.comm.len()
        + container.map_or(0, |container| ALLOCATION + container.len())
}

/// An end, without the pod and the service that it shares with others.
pub(super) fn of_end(end: &End) -> usize {
    let node = match &end.endpoint {
        Endpoint::Node(node) => of_node(node),
        Endpoint::Pod { .. } | Endpoint::Service(_) | Endpoint::External(_) => 0,
    };
    size_of::<Entry>() + size_of::<End>() + ENTRY + node
}

/// An end with everything that it refers to.
pub(super) fn of_whole_end(end: &End) -> usize {
    let shared = match &end.endpoint {
        Endpoint::Pod { pod, service } => of_pod(pod) + service.as_deref().map_or(0, of_service),
        Endpoint::Service(service) => of_service(service),
        Endpoint::Node(_) | Endpoint::External(_) => 0,
    };
    of_end(end) + shared
}

fn of_node(node: &Node) -> usize {
    SHARED
        + size_of::<Node>()
        + 2 * ALLOCATION
        + node.name.len()
        + node.addresses.len() * size_of::<IpAddr>()
}

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
            .map(|name| size_of::<String>() + ALLOCATION + name.len())
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
    if labels.is_empty() {
        return 0;
    }
    let labels = labels.iter();
    LABELS
        + labels
            .map(|(key, value)| LABEL + key.len() + value.len())
            .sum::<usize>()
}
