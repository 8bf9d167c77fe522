//! A world from edges, and the ends of edges in a world.

use std::{collections::BTreeMap, net::IpAddr};

use flow::{
    endpoint::{self, Endpoint, Labels, Service},
    observations::PodId as PodKey,
};

use super::{End, Pod, PodId, World, key};
use crate::{label_index::LabelIndex, ledger::Edge};

impl World {
    /// What the edges tell of a cluster: their ends, with the labels that were on the pods. Of a namespace nothing is
    /// known but its name.
    #[must_use]
    pub fn of_edges<'a>(edges: impl IntoIterator<Item = &'a Edge>) -> Self {
        let mut world = Self::default();
        world.add_edges(edges);
        world
    }

    /// Adds what edges tell to what is known; of a pod that is known already only an address is new.
    pub fn add_edges<'a>(&mut self, edges: impl IntoIterator<Item = &'a Edge>) {
        let mut services = BTreeMap::<(&str, &str), &Service>::new();
        for edge in edges {
            let server = (&edge.server, edge.server_address);
            // Who calls itself through its service may come with its node's address.
            let client =
                (edge.client != edge.server).then_some((&edge.client, edge.client_address));
            for (endpoint, address) in client.into_iter().chain([server]) {
                match endpoint {
                    Endpoint::Service(service) => {
                        services.insert((&service.namespace, &service.name), service);
                    }
                    _ => self.add_endpoint(endpoint, address),
                }
            }
        }
        // Last, because only now it is known whether any of its pods is.
        for service in services.into_values() {
            self.add_service(service);
        }
    }

    /// The ends that an endpoint stands for when its traffic carries this address: one, or several for a service, whose
    /// backends each may answer.
    #[must_use]
    pub fn ends(&self, endpoint: &Endpoint, address: IpAddr) -> Vec<End> {
        let address = address.to_canonical();
        match endpoint {
            Endpoint::Pod { pod, .. } => {
                let key = key(&pod.uid, &pod.namespace, &pod.name);
                if let Some(node) = self.host_pods.get(&key) {
                    vec![End::Node(*node, address)]
                } else if pod.host_network {
                    vec![self.end_of_host(pod.node.as_deref(), address)]
                } else if let Some(id) = self.pods_by_key.get(&key) {
                    vec![End::Pod(*id, Some(address))]
                } else {
                    vec![self.end_at(address)]
                }
            }
            Endpoint::Node(node) => vec![self.end_of_host(Some(&node.name), address)],
            Endpoint::External(_) => vec![self.end_at(address)],
            Endpoint::Service(service) => {
                let ends: Vec<End> = if service.selector.is_empty() {
                    let backends = service.backends.iter();
                    backends.map(|backend| self.end_at(*backend)).collect()
                } else {
                    let pods = self
                        .backends(service)
                        .map(|id| self.end_of_pod(id, address.is_ipv4()));
                    pods.chain(self.host_backends(service)).collect()
                };
                if ends.is_empty() {
                    vec![End::External(address)]
                } else {
                    ends
                }
            }
        }
    }

    fn add_endpoint(&mut self, endpoint: &Endpoint, address: IpAddr) {
        match endpoint {
            Endpoint::Pod { pod, service } => {
                let key = key(&pod.uid, &pod.namespace, &pod.name);
                if let Some(node) = self.host_pods.get(&key) {
                    let node = self.node(*node).name.clone();
                    self.add_node(&node, [address]);
                    return;
                }
                if pod.host_network {
                    let seen = [address];
                    let known = pod.addresses.as_slice();
                    let addresses = if known.is_empty() { &seen } else { known };
                    match &pod.node {
                        Some(node) => {
                            self.add_node(node, addresses.iter().copied().chain(seen));
                        }
                        None => self.add_external(address),
                    }
                    self.add_host_backend(key, &pod.namespace, &pod.labels, addresses);
                    return;
                }
                let addresses = pod.addresses.iter().copied().chain([address]);
                if let Some(id) = self.pods_by_key.get(&key) {
                    self.add_addresses(*id, addresses);
                    return;
                }
                self.add_pod(Pod {
                    uid: pod.uid.clone(),
                    namespace: pod.namespace.clone(),
                    name: pod.name.clone(),
                    known_as: known_as(pod, service.as_deref()).to_owned(),
                    labels: Labels::clone(&pod.labels),
                    addresses: addresses.collect(),
                    ports: Vec::new(),
                    node: pod.node.as_deref().map(str::to_owned),
                });
            }
            Endpoint::Node(node) => {
                let addresses = node.addresses.iter().copied().chain([address]);
                self.add_node(&node.name, addresses);
            }
            Endpoint::External(address) => self.add_external(*address),
            Endpoint::Service(_) => {}
        }
    }

    /// A service none of whose pods is known gets one that has just the labels which the service selects.
    fn add_service(&mut self, service: &Service) {
        if service.selector.is_empty() {
            for backend in &service.backends {
                if matches!(self.end_at(*backend), End::External(_)) {
                    self.add_external(*backend);
                }
            }
        } else if self.backends(service).next().is_none()
            && self.host_backends(service).next().is_none()
        {
            // Known by a uid that no pod has, and not by name: a pod may bear the service's.
            let key = PodKey::Uid(format!("service {}/{}", service.namespace, service.name));
            if !self.pods_by_key.contains_key(&key) {
                let pod = Pod {
                    namespace: service.namespace.clone(),
                    name: service.name.clone(),
                    known_as: service.name.clone(),
                    labels: service.selector.clone(),
                    ..Pod::default()
                };
                self.insert_pod(key, pod);
            }
        }
    }

    /// The pods with addresses of their own that a service with a selector selects.
    fn backends<'a>(&'a self, service: &'a Service) -> impl Iterator<Item = PodId> + 'a {
        candidates(&self.pods_by_label, service)
            .map(PodId)
            .filter(|id| {
                let pod = self.pod(*id);
                selects(service, &pod.namespace, &pod.labels)
            })
    }

    /// The pods in their node's network that a service with a selector selects: their nodes, at each of their addresses.
    fn host_backends<'a>(&'a self, service: &'a Service) -> impl Iterator<Item = End> + 'a {
        candidates(&self.host_backends_by_label, service)
            .map(|number| &self.host_backends[number])
            .filter(|pod| selects(service, &pod.namespace, &pod.labels))
            .flat_map(|pod| &pod.addresses)
            .map(|address| self.end_at(*address))
    }

    /// A pod that is called at an address of this family.
    fn end_of_pod(&self, id: PodId, ipv4: bool) -> End {
        let mut addresses = self.pods[id.0].addresses.iter().copied();
        End::Pod(id, addresses.find(|address| address.is_ipv4() == ipv4))
    }

    fn end_of_host(&self, node: Option<&str>, address: IpAddr) -> End {
        match node.and_then(|node| self.find_node(node)) {
            Some(node) => End::Node(node, address),
            None => End::External(address),
        }
    }
}

/// What has the rarest of the labels that a service selects by.
fn candidates<'a>(index: &'a LabelIndex, service: &'a Service) -> impl Iterator<Item = usize> + 'a {
    let pairs = service.selector.iter();
    let pairs = pairs.map(|(key, value)| (&**key, &**value));
    index.rarest(pairs).unwrap_or_default().iter().copied()
}

fn selects(service: &Service, namespace: &str, labels: &Labels) -> bool {
    let mut pairs = service.selector.iter();
    namespace == service.namespace && pairs.all(|(key, value)| labels.get(key) == Some(value))
}

/// The name of the service through which a pod is reached, else of its workload, else its own.
#[must_use]
pub fn known_as<'a>(pod: &'a endpoint::Pod, service: Option<&'a Service>) -> &'a str {
    match (service, &pod.workload) {
        (Some(service), _) => &service.name,
        (None, Some(workload)) => &workload.name,
        (None, None) => &pod.name,
    }
}
