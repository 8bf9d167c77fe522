//! The time-versioned index: what the cluster's objects say, and said a while ago.
//!
//! It is changed in [`update`](super::update) and asked in [`resolve`](super::resolve).

use std::{
    collections::{HashMap, VecDeque},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use super::{
    common::Common,
    history::History,
    objects::{Namespace, Node},
    pod::{Life, PodId, Pods},
    ranges::Ranges,
    selection::Selection,
    service::{ServiceEntry, ServiceId},
    slices::Slices,
    store::{Id, Store},
};
use crate::{
    endpoint::{self, Labels},
    record::Protocol,
    time::Timestamp,
};

/// How long what has ended stays known.
pub const RETENTION: Duration = Duration::from_secs(600);

/// The cluster's objects, and who held which address when.
///
/// # When an address is a pod's
///
/// *From* the pod's start, as [`Pod::started`](super::Pod::started) tells it: kubelet sets the address some time after
/// that, and flows are often captured before the API tells of it. But not before another pod gave the address up; and if
/// another pod is thought to hold it still when an event tells of the new holder, from that event on. So it is too for a
/// pod whose address changes. An event may be late, as when a watch was away: then all that counts is until when nothing
/// can have changed, and from there on the new holder's own start. Two living pods of one *list* may claim an address: each has it from its start, so the
/// younger one wins.
///
/// *Until* the pod is deleted or has finished: as far as its containers' status tells the time then, else when the index
/// learns it.
///
/// Where nobody held the address, [`GRACE`](super::GRACE) applies: a time shortly after an end means the pod that ended,
/// else a time shortly before a start the pod that starts. The addresses of services and nodes follow the same rules.
#[derive(Debug, Default)]
pub struct Index {
    pub(super) pods: Pods,
    pub(super) common: Common,
    pub(super) services: Store<ServiceEntry>,
    pub(super) nodes: Store<NodeEntry>,
    pub(super) node_ids: HashMap<String, NodeId>,
    pub(super) namespaces: HashMap<String, NamespaceEntry>,
    pub(super) addresses: History<IpAddr, Owner>,
    pub(super) node_ports: History<(Protocol, u16), ServiceId>,
    pub(super) host_ports: History<HostPort, PodId>,
    pub(super) pod_ranges: Ranges<NodeId>,
    /// What has ended, in the order in which it was learnt.
    pub(super) ended: VecDeque<(Timestamp, Ended)>,
}

/// Number of a node in the index's store; stays the same while a node of that name comes and goes.
pub(super) type NodeId = Id;

/// A port of a node that its CNI forwards to a pod: the node's name, the protocol, the port.
pub(super) type HostPort = (Arc<str>, Protocol, u16);

/// Whose an address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    Pod(PodId),
    /// A cluster IP: whatever its port, nothing but the service is there.
    ClusterAddress(ServiceId),
    /// An external or load-balancer address: only the service's ports are the service's.
    ExternalAddress(ServiceId),
    Node(NodeId),
}

/// A node as the index keeps it.
#[derive(Debug)]
pub(super) struct NodeEntry {
    /// What records say of it.
    pub(super) node: Arc<endpoint::Node>,
    pub(super) spec: Node,
    /// When it was deleted.
    pub(super) ended: Option<Timestamp>,
}

/// What belongs to one namespace.
#[derive(Debug, Default)]
pub(super) struct NamespaceEntry {
    pub(super) object: Option<Namespace>,
    /// By name, those that have ended included.
    pub(super) services: HashMap<String, ServiceId>,
    pub(super) selection: Selection,
    pub(super) slices: Slices,
}

impl NamespaceEntry {
    pub(super) fn is_empty(&self) -> bool {
        self.object.is_none()
            && self.services.is_empty()
            && self.selection.is_empty()
            && self.slices.is_empty()
    }
}

/// Something that is to be forgotten.
#[derive(Debug)]
pub(super) enum Ended {
    Address(IpAddr, Owner),
    NodePort((Protocol, u16), ServiceId),
    HostPort(HostPort, PodId),
    ServiceVersion(ServiceId),
    Service(ServiceId),
    Node(NodeId),
    Pod(PodId),
}

/// How many objects of each kind there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Namespaces.
    pub namespaces: usize,
    /// Nodes.
    pub nodes: usize,
    /// Services.
    pub services: usize,
    /// Endpoint slices.
    pub endpoint_slices: usize,
    /// Pods, those that have finished included.
    pub pods: usize,
}

impl Index {
    /// How many living objects there are. It counts them, so it is not for every flow.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let nodes = self.nodes.iter().filter(|(_, node)| node.ended.is_none());
        let mut counts = Counts {
            nodes: nodes.count(),
            services: self.services().count(),
            pods: self.pods().count(),
            ..Counts::default()
        };
        for namespace in self.namespaces.values() {
            counts.namespaces += usize::from(namespace.object.is_some());
            counts.endpoint_slices += namespace.slices.len();
        }
        counts
    }

    /// How many objects take memory: those that have ended and are not forgotten yet, too.
    #[must_use]
    pub fn held(&self) -> Counts {
        let slices = self.namespaces.values().map(|entry| entry.slices.len());
        Counts {
            namespaces: self.namespaces.len(),
            nodes: self.nodes.len(),
            services: self.services.len(),
            endpoint_slices: slices.sum(),
            pods: self.pods.len(),
        }
    }

    /// All living pods, those that have finished included, in no particular order.
    pub fn pods(&self) -> impl Iterator<Item = &Arc<endpoint::Pod>> {
        let living = self.pods.iter().filter(|(_, pod)| !pod.has_ended());
        living.map(|(_, pod)| &pod.pod)
    }

    /// All living services, in no particular order.
    pub fn services(&self) -> impl Iterator<Item = &Arc<endpoint::Service>> {
        let living = self.services.iter().filter(|(_, s)| s.ended.is_none());
        living.map(|(_, service)| service.latest())
    }

    /// The names and labels of all namespaces, in no particular order.
    pub fn namespaces(&self) -> impl Iterator<Item = (&str, &Labels)> {
        let objects = self.namespaces.values();
        objects
            .filter_map(|entry| entry.object.as_ref())
            .map(|namespace| (namespace.name.as_str(), &namespace.labels))
    }

    /// Forgets what ended more than [`RETENTION`] ago. Costs nothing when there is nothing to forget.
    pub fn expire(&mut self, now: Timestamp) {
        while let Some((learnt, _)) = self.ended.front()
            && learnt.saturating_add(RETENTION) < now
            && let Some((learnt, ended)) = self.ended.pop_front()
        {
            self.forget(learnt, ended);
        }
    }

    fn forget(&mut self, learnt: Timestamp, ended: Ended) {
        // What came back since is not forgotten: if it has ended again that stands further back in the queue.
        let is_due = |ended: Option<Timestamp>| ended == Some(learnt);
        match ended {
            Ended::Address(address, owner) => self.addresses.forget(&address, owner),
            Ended::NodePort(port, service) => self.node_ports.forget(&port, service),
            Ended::HostPort(port, pod) => self.host_ports.forget(&port, pod),
            Ended::ServiceVersion(id) => {
                if let Some(service) = self.services.get_mut(id) {
                    service.forget_version();
                }
            }
            Ended::Service(id) => {
                let due = self.services.get(id).is_some_and(|s| is_due(s.ended));
                if let Some(service) = due.then(|| self.services.remove(id)).flatten() {
                    let identity = service.spec.identity;
                    if let Some(namespace) = self.namespaces.get_mut(&identity.namespace) {
                        namespace.services.remove(&identity.name);
                    }
                    self.tidy(&identity.namespace);
                }
            }
            Ended::Node(id) => {
                let due = self.nodes.get(id).is_some_and(|node| is_due(node.ended));
                if let Some(node) = due.then(|| self.nodes.remove(id)).flatten() {
                    self.node_ids.remove(&node.node.name);
                }
            }
            Ended::Pod(id) => {
                let pod = self.pods.get(id);
                if pod.is_some_and(|pod| pod.life == Life::Ended(learnt)) {
                    self.pods.remove(id);
                }
            }
        }
    }

    /// Forgets a namespace in which nothing is left.
    pub(super) fn tidy(&mut self, name: &str) {
        let entry = self.namespaces.get(name);
        if entry.is_some_and(NamespaceEntry::is_empty) {
            self.namespaces.remove(name);
        }
    }
}
