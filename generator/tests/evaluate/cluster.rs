//! A cluster as the API lists it.

use std::net::IpAddr;

use flow::{endpoint::Labels, record::Protocol};
use generator::evaluate::{Connection, Judge, NamedPort, Pod, Policies, World};
use k8s_openapi::{
    api::{
        core::v1::{Namespace, Node, Pod as ApiPod},
        networking::v1::NetworkPolicy,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

#[derive(Clone, Debug, Default)]
pub(crate) struct Cluster {
    pub(crate) namespaces: Vec<Namespace>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) pods: Vec<ApiPod>,
    pub(crate) policies: Vec<NetworkPolicy>,
}

/// A question to an engine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Query {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) protocol: Protocol,
    pub(crate) port: u16,
}

impl Cluster {
    pub(crate) fn world(&self) -> World {
        let mut world = World::default();
        for namespace in &self.namespaces {
            world.add_namespace(name(&namespace.metadata), labels(&namespace.metadata));
        }
        for node in &self.nodes {
            world.add_node(name(&node.metadata), node_addresses(node));
        }
        for pod in &self.pods {
            let spec = pod.spec.as_ref().unwrap();
            if spec.host_network == Some(true) {
                let namespace = pod.metadata.namespace.as_deref().unwrap();
                let node = spec.node_name.as_ref().unwrap();
                let id = ("", namespace, name(&pod.metadata));
                world.add_host_pod(id, &labels(&pod.metadata), node, &pod_addresses(pod));
                continue;
            }
            let ports = spec
                .containers
                .iter()
                .flat_map(|c| c.ports.iter().flatten());
            world.add_pod(Pod {
                uid: String::new(),
                namespace: pod.metadata.namespace.clone().unwrap(),
                name: name(&pod.metadata).to_owned(),
                known_as: name(&pod.metadata).to_owned(),
                labels: labels(&pod.metadata),
                addresses: pod_addresses(pod),
                ports: ports
                    .filter_map(|port| {
                        Some(NamedPort {
                            name: port.name.clone()?,
                            protocol: protocol(port.protocol.as_deref().unwrap_or("TCP")),
                            port: u16::try_from(port.container_port).unwrap(),
                        })
                    })
                    .collect(),
                node: spec.node_name.clone(),
            });
        }
        world
    }

    pub(crate) fn answers(&self, queries: &[Query]) -> Vec<bool> {
        let world = self.world();
        let policies = Policies::compile(&self.policies).unwrap();
        let judge = Judge::new(&world, &policies);
        queries
            .iter()
            .map(|query| {
                let verdict = judge.verdict(&Connection {
                    source: world.end_at(query.source),
                    destination: world.end_at(query.destination),
                    protocol: query.protocol,
                    port: query.port,
                });
                verdict.is_allowed()
            })
            .collect()
    }
}

pub(crate) fn protocol(name: &str) -> Protocol {
    match name {
        "TCP" => Protocol::Tcp,
        "UDP" => Protocol::Udp,
        "SCTP" => Protocol::Sctp,
        other => panic!("{other}"),
    }
}

pub(crate) fn pod_addresses(pod: &ApiPod) -> Vec<IpAddr> {
    let status = pod.status.as_ref().unwrap();
    let addresses = status.pod_ips.iter().flatten();
    addresses
        .map(|address| address.ip.parse().unwrap())
        .collect()
}

pub(crate) fn node_addresses(node: &Node) -> Vec<IpAddr> {
    let addresses = node.status.as_ref().unwrap().addresses.iter().flatten();
    addresses
        .map(|address| address.address.parse().unwrap())
        .collect()
}

fn name(metadata: &ObjectMeta) -> &str {
    metadata.name.as_deref().unwrap()
}

fn labels(metadata: &ObjectMeta) -> Labels {
    metadata.labels.clone().unwrap_or_default()
}
