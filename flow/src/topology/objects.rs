//! The cluster's objects, cut to the fields that naming uses. They are made from the API's types in [`convert`].
//!
//! [`convert`]: super::convert

use std::{net::IpAddr, sync::Arc};

use ipnet::IpNet;

use crate::{
    endpoint::{self, Labels},
    record::Protocol,
    time::Timestamp,
};

/// All objects of a cluster, as one list of every kind gives them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Objects {
    /// Namespaces.
    pub namespaces: Vec<Namespace>,
    /// Nodes.
    pub nodes: Vec<Node>,
    /// Services.
    pub services: Vec<Service>,
    /// Endpoint slices.
    pub endpoint_slices: Vec<EndpointSlice>,
    /// Pods.
    pub pods: Vec<Pod>,
}

impl Objects {
    /// Adds an object to the list of its kind.
    pub fn push(&mut self, object: Object) {
        match object {
            Object::Namespace(namespace) => self.namespaces.push(namespace),
            Object::Node(node) => self.nodes.push(node),
            Object::Service(service) => self.services.push(service),
            Object::EndpointSlice(slice) => self.endpoint_slices.push(slice),
            Object::Pod(pod) => self.pods.push(pod),
        }
    }

    /// Adds all objects of another set.
    pub fn append(&mut self, other: Self) {
        self.namespaces.extend(other.namespaces);
        self.nodes.extend(other.nodes);
        self.services.extend(other.services);
        self.endpoint_slices.extend(other.endpoint_slices);
        self.pods.extend(other.pods);
    }

    /// How many objects there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.namespaces.len()
            + self.nodes.len()
            + self.services.len()
            + self.endpoint_slices.len()
            + self.pods.len()
    }

    /// Whether there is no object at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// One object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    /// A namespace.
    Namespace(Namespace),
    /// A node.
    Node(Node),
    /// A service.
    Service(Service),
    /// Some of a service's endpoints.
    EndpointSlice(EndpointSlice),
    /// A pod.
    Pod(Pod),
}

/// What tells one object from another.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ObjectKey {
    /// A namespace.
    Namespace {
        /// `metadata.name`.
        name: String,
    },
    /// A node.
    Node {
        /// `metadata.name`.
        name: String,
    },
    /// A service.
    Service {
        /// `metadata.namespace`.
        namespace: String,
        /// `metadata.name`.
        name: String,
    },
    /// An endpoint slice.
    EndpointSlice {
        /// `metadata.namespace`.
        namespace: String,
        /// `metadata.name`.
        name: String,
    },
    /// A pod. Pods of one StatefulSet bear the same name one after the other, so the uid tells.
    Pod {
        /// `metadata.uid`.
        uid: String,
    },
}

impl Object {
    /// The object's key.
    #[must_use]
    pub fn key(&self) -> ObjectKey {
        match self {
            Self::Namespace(namespace) => ObjectKey::Namespace {
                name: namespace.name.clone(),
            },
            Self::Node(node) => ObjectKey::Node {
                name: node.identity.name.clone(),
            },
            Self::Service(service) => ObjectKey::Service {
                namespace: service.identity.namespace.clone(),
                name: service.identity.name.clone(),
            },
            Self::EndpointSlice(slice) => ObjectKey::EndpointSlice {
                namespace: slice.namespace.clone(),
                name: slice.name.clone(),
            },
            Self::Pod(pod) => ObjectKey::Pod {
                uid: pod.identity.uid.clone(),
            },
        }
    }
}

/// What happened to an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// It was made, or is now this.
    Upsert(Object),
    /// It is gone.
    Delete {
        /// What is.
        key: ObjectKey,
        /// When the last process of a pod ended, if its status tells; in whole seconds, rounded down.
        ended: Option<Timestamp>,
    },
}

/// A namespace.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Namespace {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.labels`.
    pub labels: Labels,
}

/// A node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Node {
    /// The name, and the addresses of type `InternalIP` and `ExternalIP`.
    pub identity: Arc<endpoint::Node>,
    /// Addresses of the CNI's own interfaces that CNIs note on the node, inside or outside its pod CIDRs.
    pub interfaces: Vec<IpAddr>,
    /// `spec.podCIDRs`.
    pub pod_cidrs: Vec<IpNet>,
    /// `metadata.creationTimestamp`.
    pub created: Option<Timestamp>,
}

/// A service.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Service {
    /// What records say of it. `backends` is empty: the index fills it in from the endpoint slices.
    pub identity: Arc<endpoint::Service>,
    /// `spec.clusterIPs`; none for a headless service.
    pub cluster_addresses: Vec<IpAddr>,
    /// `spec.externalIPs`, and those of `status.loadBalancer.ingress` that the nodes translate themselves.
    pub external_addresses: Vec<IpAddr>,
    /// `spec.ports`.
    pub ports: Vec<ServicePort>,
    /// `metadata.creationTimestamp`.
    pub created: Option<Timestamp>,
}

/// A port of a service.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ServicePort {
    /// Empty if the service has but one, unnamed port.
    pub name: String,
    /// The transport protocol.
    pub protocol: Protocol,
    /// The port at the service's addresses.
    pub port: u16,
    /// The port of the pods.
    pub target: TargetPort,
    /// The port at every node's addresses.
    pub node_port: Option<u16>,
}

/// Where a service port leads.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum TargetPort {
    /// The same port of every pod.
    Number(u16),
    /// Each pod's container port of this name and of the service port's protocol.
    Name(String),
}

/// Some of a service's endpoints.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct EndpointSlice {
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// The label `kubernetes.io/service-name`; a slice without it belongs to no service.
    pub service: Option<String>,
    /// The endpoints' addresses. They are left out where the control plane made the slice from a selector: there the
    /// pods tell more, and the addresses of all pods a second time would be a large part of the index's memory.
    pub addresses: Vec<IpAddr>,
    /// How many endpoints the slice lists.
    pub endpoints: u32,
    /// The ports; those without number, which mean all ports, are left out.
    pub ports: Vec<SlicePort>,
}

/// A port of the endpoints of a slice.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SlicePort {
    /// The name of the service's port that leads here.
    pub name: String,
    /// The transport protocol.
    pub protocol: Protocol,
    /// The endpoints' port.
    pub port: u16,
}

/// A pod.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Pod {
    /// What records say of it. `services` is empty: the index fills it in.
    pub identity: endpoint::Pod,
    /// For the mirror of a static pod the uid that kubelet gave the static pod: its cgroup bears this one.
    pub static_uid: Option<String>,
    /// The ports of its containers that have a name or a port of the node.
    pub ports: Arc<[ContainerPort]>,
    /// Where it is in its life.
    pub phase: Phase,
    /// When kubelet took the pod up, or failing that when it was created: it had no address before. Whole seconds,
    /// rounded down.
    pub started: Option<Timestamp>,
}

/// A port that a container declares.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ContainerPort {
    /// Empty if it has none.
    pub name: String,
    /// The transport protocol.
    pub protocol: Protocol,
    /// The port in the pod.
    pub port: u16,
    /// The port of the node that the CNI forwards here.
    pub host_port: Option<u16>,
}

/// Where a pod is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Before all containers were started.
    Pending,
    /// Living.
    Running,
    /// `Succeeded` or `Failed`: all processes have ended, and the address in its status may be another pod's.
    Finished {
        /// When the last container ended, if its status says so: whole seconds, rounded down.
        at: Option<Timestamp>,
    },
}
