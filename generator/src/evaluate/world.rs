//! What policies are judged against: namespaces, pods, nodes and addresses.

mod edges;
mod objects;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use flow::{endpoint::Labels, observations::PodId as PodKey};

pub use self::edges::known_as;
use super::ports::NamedPort;
use crate::label_index::LabelIndex;

/// The label that the API server sets on every namespace since Kubernetes 1.21.
pub const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";

/// A cluster as far as it is known.
#[derive(Clone, Debug, Default)]
pub struct World {
    namespaces: BTreeMap<String, Labels>,
    pods: Vec<Pod>,
    pods_by_key: HashMap<PodKey, PodId>,
    pods_by_label: LabelIndex,
    /// The pods that are in the network of a node.
    host_pods: HashMap<PodKey, NodeId>,
    /// What services need to know of them, whether their node is known or not.
    host_backends: Vec<HostBackend>,
    host_backends_by_key: HashMap<PodKey, usize>,
    host_backends_by_label: LabelIndex,
    nodes: Vec<Node>,
    nodes_by_name: HashMap<String, NodeId>,
    owners: HashMap<IpAddr, Owner>,
    /// Addresses outside of the cluster.
    externals: BTreeSet<IpAddr>,
}

/// A pod that policies apply to: it is not in its node's network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// `metadata.uid`; empty if it is not known.
    pub uid: String,
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// What people call it: the name of its service, else of its workload, else its own.
    pub known_as: String,
    /// `metadata.labels`.
    pub labels: Labels,
    /// `status.podIPs`; empty if no address is known, and then no `ipBlock` matches the pod.
    pub addresses: Vec<IpAddr>,
    /// The ports that its containers declare by name.
    pub ports: Vec<NamedPort>,
    /// `spec.nodeName`.
    pub node: Option<String>,
}

/// A pod in its node's network, as one that a service leads to.
#[derive(Clone, Debug)]
struct HostBackend {
    namespace: String,
    labels: Labels,
    /// `status.podIPs`, or where these are not known the addresses that were seen.
    addresses: BTreeSet<IpAddr>,
}

/// A node, with the pods in its network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// `metadata.name`.
    pub name: String,
    /// Every address that traffic from it may carry.
    pub addresses: Vec<IpAddr>,
}

/// A pod of a [`World`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodId(pub(super) usize);

/// A node of a [`World`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub(super) usize);

/// One end of a connection, as policies see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum End {
    /// A pod, and the one of its addresses that the traffic carries, if it is known.
    Pod(PodId, Option<IpAddr>),
    /// A node or a pod in its network.
    Node(NodeId, IpAddr),
    /// Any other address.
    External(IpAddr),
}

impl End {
    /// The address that the traffic carries, if it is known.
    #[must_use]
    pub const fn address(&self) -> Option<IpAddr> {
        match self {
            Self::Pod(_, address) => *address,
            Self::Node(_, address) | Self::External(address) => Some(*address),
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Owner {
    Pod(PodId),
    Node(NodeId),
}

impl World {
    /// Adds a namespace. The API server gives each its own name as a label, so it is set here too.
    pub fn add_namespace(&mut self, name: &str, mut labels: Labels) {
        labels.insert(NAMESPACE_NAME.to_owned(), name.to_owned());
        self.namespaces.insert(name.to_owned(), labels);
    }

    /// Adds a node, or further addresses of it.
    pub fn add_node(&mut self, name: &str, addresses: impl IntoIterator<Item = IpAddr>) -> NodeId {
        let id = match self.nodes_by_name.get(name) {
            Some(id) => *id,
            None => {
                let id = NodeId(self.nodes.len());
                self.nodes_by_name.insert(name.to_owned(), id);
                self.nodes.push(Node {
                    name: name.to_owned(),
                    addresses: Vec::new(),
                });
                id
            }
        };
        for address in addresses {
            let address = address.to_canonical();
            let known = &mut self.nodes[id.0].addresses;
            if !known.contains(&address) {
                known.push(address);
            }
            self.owners.entry(address).or_insert(Owner::Node(id));
        }
        id
    }

    /// Adds a pod in a node's network: to policies it is the node. It is known as such also where a flow record does not say so.
    pub fn add_host_pod(
        &mut self,
        (uid, namespace, name): (&str, &str, &str),
        labels: &Labels,
        node: &str,
        addresses: &[IpAddr],
    ) {
        let node = self.add_node(node, addresses.iter().copied());
        for key in [key(uid, namespace, name), key_of_name(namespace, name)] {
            self.host_pods.insert(key, node);
        }
        let key = key(uid, namespace, name);
        self.add_host_backend(key, namespace, labels, addresses);
    }

    /// Adds a pod in a node's network to those that services lead to, or further addresses of it.
    fn add_host_backend(
        &mut self,
        key: PodKey,
        namespace: &str,
        labels: &Labels,
        addresses: &[IpAddr],
    ) {
        let number = match self.host_backends_by_key.get(&key) {
            Some(number) => *number,
            None => {
                let number = self.host_backends.len();
                self.host_backends_by_key.insert(key, number);
                self.host_backends_by_label.add(number, labels);
                self.host_backends.push(HostBackend {
                    namespace: namespace.to_owned(),
                    labels: labels.clone(),
                    addresses: BTreeSet::new(),
                });
                number
            }
        };
        let known = &mut self.host_backends[number].addresses;
        known.extend(addresses.iter().map(IpAddr::to_canonical));
    }

    /// Adds a pod with addresses of its own. A pod of the same uid, or without uid of the same name, is the same pod: it
    /// stays as it is and gets the new one's addresses too.
    pub fn add_pod(&mut self, mut pod: Pod) -> PodId {
        let addresses = std::mem::take(&mut pod.addresses);
        let key = key(&pod.uid, &pod.namespace, &pod.name);
        let id = match self.pods_by_key.get(&key) {
            Some(id) => *id,
            None => {
                let named = key_of_name(&pod.namespace, &pod.name);
                let id = self.insert_pod(key, pod);
                self.pods_by_key.entry(named).or_insert(id);
                id
            }
        };
        self.add_addresses(id, addresses);
        id
    }

    /// Adds an address outside of the cluster.
    pub fn add_external(&mut self, address: IpAddr) {
        self.externals.insert(address.to_canonical());
    }

    /// Whose address it is.
    #[must_use]
    pub fn end_at(&self, address: IpAddr) -> End {
        let address = address.to_canonical();
        match self.owners.get(&address) {
            Some(Owner::Pod(id)) => End::Pod(*id, Some(address)),
            Some(Owner::Node(id)) => End::Node(*id, address),
            None => End::External(address),
        }
    }

    /// A pod of this world.
    ///
    /// # Panics
    /// If the id is of another world.
    #[must_use]
    pub fn pod(&self, id: PodId) -> &Pod {
        &self.pods[id.0]
    }

    /// A node of this world.
    ///
    /// # Panics
    /// If the id is of another world.
    #[must_use]
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0]
    }

    /// The node of this name.
    #[must_use]
    pub fn find_node(&self, name: &str) -> Option<NodeId> {
        self.nodes_by_name.get(name).copied()
    }

    /// All pods.
    pub fn pods(&self) -> impl Iterator<Item = (PodId, &Pod)> {
        (0..).map(PodId).zip(&self.pods)
    }

    /// All nodes.
    pub fn nodes(&self) -> impl Iterator<Item = (NodeId, &Node)> {
        (0..).map(NodeId).zip(&self.nodes)
    }

    /// All addresses outside of the cluster, sorted.
    pub fn externals(&self) -> impl Iterator<Item = IpAddr> {
        self.externals.iter().copied()
    }

    /// All namespaces with their labels, by name.
    pub fn namespaces(&self) -> impl Iterator<Item = (&str, &Labels)> {
        self.namespaces
            .iter()
            .map(|(name, labels)| (name.as_str(), labels))
    }

    fn add_addresses(&mut self, id: PodId, addresses: impl IntoIterator<Item = IpAddr>) {
        for address in addresses {
            let address = address.to_canonical();
            let known = &mut self.pods[id.0].addresses;
            if !known.contains(&address) {
                known.push(address);
                self.owners.insert(address, Owner::Pod(id));
            }
        }
    }

    fn insert_pod(&mut self, key: PodKey, pod: Pod) -> PodId {
        let id = PodId(self.pods.len());
        if !self.namespaces.contains_key(&pod.namespace) {
            self.add_namespace(&pod.namespace, Labels::new());
        }
        if let Some(node) = &pod.node {
            self.add_node(node, []);
        }
        self.pods_by_label.add(id.0, &pod.labels);
        self.pods_by_key.insert(key, id);
        self.pods.push(pod);
        id
    }
}

fn key(uid: &str, namespace: &str, name: &str) -> PodKey {
    if uid.is_empty() {
        key_of_name(namespace, name)
    } else {
        PodKey::Uid(uid.to_owned())
    }
}

fn key_of_name(namespace: &str, name: &str) -> PodKey {
    PodKey::Name {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    }
}
