//! A world from the cluster's objects.

use flow::{
    endpoint::{self, Labels},
    topology::{Objects, Phase},
};

use super::{Pod, World};
use crate::evaluate::ports::NamedPort;

impl World {
    /// What the API says of a cluster. Pods that have finished are left out: their addresses may be other pods'.
    #[must_use]
    pub fn of_objects(objects: &Objects) -> Self {
        let mut world = Self::default();
        for namespace in &objects.namespaces {
            world.add_namespace(&namespace.name, namespace.labels.clone());
        }
        for node in &objects.nodes {
            let addresses = node.identity.addresses.iter().chain(&node.interfaces);
            world.add_node(&node.identity.name, addresses.copied());
        }
        for pod in &objects.pods {
            let endpoint::Pod {
                uid,
                namespace,
                name,
                labels,
                workload,
                node,
                host_network,
                addresses,
                services: _,
            } = &pod.identity;
            if matches!(pod.phase, Phase::Finished { .. }) {
                continue;
            }
            if *host_network {
                if let Some(node) = node {
                    world.add_host_pod((uid, namespace, name), labels, node, addresses);
                }
                continue;
            }
            let named = pod.ports.iter().filter(|port| !port.name.is_empty());
            world.add_pod(Pod {
                uid: uid.clone(),
                namespace: namespace.clone(),
                name: name.clone(),
                known_as: workload.as_ref().map_or(name, |of| &of.name).clone(),
                labels: Labels::clone(labels),
                addresses: addresses.clone(),
                ports: named
                    .map(|port| NamedPort {
                        name: port.name.clone(),
                        protocol: port.protocol,
                        port: port.port,
                    })
                    .collect(),
                node: node.as_deref().map(str::to_owned),
            });
        }
        world
    }
}
