//! What a lab's cluster consists of: nodes, pods, services, and the addresses and names that they get.
//!
//! Everything here is a pure function of what was asked for: the same cluster has the same addresses, UIDs and pod
//! names every time, so what is derived from it can be compared with a file.

mod service;

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::atomic::{AtomicU32, Ordering},
};

use crate::{
    cgroup::{Driver, Runtime},
    names::{hash, letters, uid},
    ranges::Ranges,
};

pub use self::service::{Service, ServicePort, TargetPort};

/// Labels or a selector.
pub type Labels = BTreeMap<String, String>;

/// Addresses of a host outside of the cluster; the fabric between the nodes carries them.
pub const OUTSIDE: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(203, 0, 113, 10)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x10)),
];

/// A cluster to be built, or built.
#[derive(Clone, Debug, Default)]
pub struct Cluster {
    /// Below 1024; tells its addresses from those of other labs. 0 has the ranges that Kubernetes' tools default to.
    pub number: u16,
    /// The nodes, in the order in which they were asked for.
    pub nodes: Vec<Node>,
    /// The pods, likewise.
    pub pods: Vec<Pod>,
    /// The services, likewise.
    pub services: Vec<Service>,
}

/// A node.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Counts from 1; every address of the node and of its pods contains it.
    pub number: u8,
    ranges: Ranges,
    /// How its kubelet names the cgroups of pods.
    pub driver: Driver,
    /// How its container runtime names the cgroups of containers.
    pub runtime: Runtime,
    /// Whether its pods' cgroups are in a v1 hierarchy, and their v2 cgroup is that of the runtime.
    pub v1: bool,
}

/// A pod.
#[derive(Clone, Debug)]
pub struct Pod {
    /// Its namespace.
    pub namespace: String,
    /// What the lab calls it: unique in its namespace, and its name if it has no owner.
    pub key: String,
    /// The name of its node.
    pub node: String,
    /// Its labels, without those that its owner adds.
    pub labels: Labels,
    /// The Deployment that made it.
    pub deployment: Option<String>,
    /// The names of its container ports.
    pub ports: BTreeMap<String, u16>,
    /// Whether it uses its node's network.
    pub host_network: bool,
    /// Counts from 1 among the pods.
    number: u8,
}

impl Cluster {
    /// One whose addresses differ from those of other labs that run at the same time. Agents see all of a kernel, and
    /// a process that is gone with its cgroup is known by its address only.
    #[must_use]
    pub fn apart() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let drawn = std::process::id().wrapping_mul(32) + NEXT.fetch_add(1, Ordering::Relaxed);
        Self {
            number: 1 + (drawn % 1023) as u16,
            ..Self::default()
        }
    }

    /// Adds a node.
    pub fn node(&mut self, name: &str) -> &mut Node {
        let ranges = Ranges(self.number);
        let number = number(self.nodes.len());
        push(
            &mut self.nodes,
            Node {
                name: name.to_owned(),
                number,
                ranges,
                driver: Driver::default(),
                runtime: Runtime::default(),
                v1: false,
            },
        )
    }

    /// Adds a pod to the first node; `key` is its name unless [`Pod::deployment`] is called.
    pub fn pod(&mut self, namespace: &str, key: &str) -> &mut Pod {
        let number = number(self.pods.len());
        push(
            &mut self.pods,
            Pod {
                namespace: namespace.to_owned(),
                key: key.to_owned(),
                node: self
                    .nodes
                    .first()
                    .map(|node| node.name.clone())
                    .unwrap_or_default(),
                labels: Labels::new(),
                deployment: None,
                ports: BTreeMap::new(),
                host_network: false,
                number,
            },
        )
    }

    /// Adds a service.
    pub fn service(&mut self, namespace: &str, name: &str) -> &mut Service {
        let ranges = Ranges(self.number);
        let number = number(self.services.len());
        push(
            &mut self.services,
            Service {
                namespace: namespace.to_owned(),
                name: name.to_owned(),
                selector: Labels::new(),
                ports: Vec::new(),
                number,
                ranges,
            },
        )
    }

    /// The namespaces of all pods and services, sorted.
    #[must_use]
    pub fn namespaces(&self) -> Vec<&str> {
        let pods = self.pods.iter().map(|pod| pod.namespace.as_str());
        let services = self
            .services
            .iter()
            .map(|service| service.namespace.as_str());
        let mut names: Vec<&str> = pods.chain(services).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// The addresses of a pod, IPv4 first: its node's if it uses the node's network.
    #[must_use]
    pub fn addresses(&self, pod: &Pod) -> [IpAddr; 2] {
        let node = self.nodes.iter().find(|node| node.name == pod.node);
        let number = node.map_or(0, |node| node.number);
        match node {
            Some(node) if pod.host_network => node.addresses(),
            _ => Ranges(self.number).pod(number, pod.number.saturating_add(9)),
        }
    }

    /// The addresses of the way to the outside, IPv4 first.
    #[must_use]
    pub fn exit(&self) -> [IpAddr; 2] {
        Ranges(self.number).fabric(1)
    }

    /// The ranges that the addresses of all pods are from, IPv4 first.
    #[must_use]
    pub fn pod_cidrs(&self) -> [String; 2] {
        let [v4, v6] = Ranges(self.number).pod(0, 0);
        [format!("{v4}/20"), format!("{v6}/48")]
    }

    /// The pods behind a service.
    pub fn backends<'a>(&'a self, service: &'a Service) -> impl Iterator<Item = &'a Pod> + Clone {
        self.pods.iter().filter(|pod| service.selects(pod))
    }
}

impl Node {
    /// Chooses how its cgroups are named.
    pub fn cgroups(&mut self, driver: Driver, runtime: Runtime) -> &mut Self {
        self.driver = driver;
        self.runtime = runtime;
        self
    }

    /// Puts its pods into cgroups of a v1 hierarchy, as hybrid systems do.
    pub fn v1_cgroups(&mut self) -> &mut Self {
        self.v1 = true;
        self
    }

    /// Its addresses on the network between the nodes, IPv4 first.
    #[must_use]
    pub fn addresses(&self) -> [IpAddr; 2] {
        self.ranges.fabric(10 + self.number)
    }

    /// The addresses of its bridge, IPv4 first: its pods' gateway, and what its own processes send to its pods from.
    #[must_use]
    pub fn gateway(&self) -> [IpAddr; 2] {
        self.ranges.pod(self.number, 1)
    }

    /// The ranges that its pods' addresses are from, IPv4 first.
    #[must_use]
    pub fn pod_cidrs(&self) -> [String; 2] {
        let [v4, v6] = self.ranges.pod(self.number, 0);
        [format!("{v4}/24"), format!("{v6}/64")]
    }
}

impl Pod {
    /// Puts it on another node.
    pub fn on(&mut self, node: &str) -> &mut Self {
        node.clone_into(&mut self.node);
        self
    }

    /// Adds a label.
    pub fn label(&mut self, key: &str, value: &str) -> &mut Self {
        self.labels.insert(key.to_owned(), value.to_owned());
        self
    }

    /// Makes it a replica of a Deployment, named as Kubernetes names those.
    pub fn deployment(&mut self, name: &str) -> &mut Self {
        self.deployment = Some(name.to_owned());
        self
    }

    /// Names a container port.
    pub fn port(&mut self, name: &str, port: u16) -> &mut Self {
        self.ports.insert(name.to_owned(), port);
        self
    }

    /// Lets it use its node's network.
    pub fn host_network(&mut self) -> &mut Self {
        self.host_network = true;
        self
    }

    /// `metadata.name`.
    #[must_use]
    pub fn name(&self) -> String {
        match self.replica_set() {
            Some(set) => format!("{set}-{}", letters(&format!("pod {}", self.path()), 5)),
            None => self.key.clone(),
        }
    }

    /// `metadata.uid`.
    #[must_use]
    pub fn uid(&self) -> String {
        uid(&format!("pod {}", self.path()))
    }

    /// The id of its only container.
    #[must_use]
    pub fn container(&self) -> String {
        (0..4)
            .map(|part| format!("{:016x}", hash(&format!("{part} {}", self.path()))))
            .collect()
    }

    /// The value of the label `pod-template-hash`, if it belongs to a Deployment.
    #[must_use]
    pub fn template_hash(&self) -> Option<String> {
        let deployment = self.deployment.as_ref()?;
        Some(letters(&format!("{}/{deployment}", self.namespace), 10))
    }

    /// The name of its ReplicaSet, if it belongs to a Deployment.
    #[must_use]
    pub fn replica_set(&self) -> Option<String> {
        let deployment = self.deployment.as_ref()?;
        Some(format!("{deployment}-{}", self.template_hash()?))
    }

    /// `namespace/key`, which is how a lab is asked for it.
    #[must_use]
    pub fn path(&self) -> String {
        format!("{}/{}", self.namespace, self.key)
    }
}

fn number(present: usize) -> u8 {
    u8::try_from(present + 1).unwrap_or(u8::MAX)
}

fn push<T>(list: &mut Vec<T>, item: T) -> &mut T {
    let at = list.len();
    list.push(item);
    &mut list[at]
}
