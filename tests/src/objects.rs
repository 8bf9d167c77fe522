//! The cluster's objects, as `kubectl get namespaces,pods,services,endpointslices,nodes -A -o yaml` prints them.

use std::{net::IpAddr, time::SystemTime};

use anyhow::{Context, Result};
use k8s_openapi::{
    api::{
        core::v1::{
            Container, ContainerPort, HostIP, Namespace, Node as NodeObject, NodeAddress, NodeSpec,
            NodeStatus, ObjectReference, Pod as PodObject, PodCondition, PodIP, PodSpec, PodStatus,
            Service as ServiceObject, ServicePort as ServicePortObject, ServiceSpec,
        },
        discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice},
    },
    apimachinery::pkg::{
        apis::meta::v1::{ObjectMeta, OwnerReference, Time},
        util::intstr::IntOrString,
    },
    jiff::Timestamp,
};
use serde::Serialize;
use serde_yaml::{Mapping, Value};

use crate::{
    cluster::{Cluster, Labels, Node, Pod, Service, ServicePort, TargetPort},
    names::uid,
};

/// The list of all objects. `now` is when the pods started.
pub(crate) fn list(cluster: &Cluster, now: SystemTime) -> Result<String> {
    // Whole seconds, rounded down, as the API server writes them.
    let seconds = now.duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
    let now = Timestamp::from_second(i64::try_from(seconds)?)
        .ok()
        .context("the clock is out of range")?;
    let mut items = Vec::new();
    for name in cluster.namespaces() {
        items.push(value(&namespace(name))?);
    }
    for pod in &cluster.pods {
        items.push(value(&pod_object(cluster, pod, now))?);
    }
    for service in &cluster.services {
        items.push(value(&service_object(service))?);
    }
    for service in &cluster.services {
        for (family, name) in ["IPv4", "IPv6"].into_iter().enumerate() {
            for slice in slices(cluster, service, family, name) {
                items.push(value(&slice)?);
            }
        }
    }
    for node in &cluster.nodes {
        items.push(value(&node_object(node))?);
    }
    let list: Mapping = [
        ("apiVersion", "v1".into()),
        ("kind", "List".into()),
        ("metadata", Value::Mapping(Mapping::new())),
        ("items", Value::Sequence(items)),
    ]
    .into_iter()
    .map(|(key, value)| (Value::from(key), value))
    .collect();
    serde_yaml::to_string(&list).context("the topology file")
}

fn value(object: &impl Serialize) -> Result<Value> {
    serde_yaml::to_value(object).context("an object of the topology file")
}

fn metadata(namespace: Option<&str>, name: &str, uid: String, labels: Labels) -> ObjectMeta {
    ObjectMeta {
        namespace: namespace.map(str::to_owned),
        name: Some(name.to_owned()),
        uid: Some(uid),
        labels: (!labels.is_empty()).then_some(labels),
        ..ObjectMeta::default()
    }
}

fn namespace(name: &str) -> Namespace {
    let labels = Labels::from([("kubernetes.io/metadata.name".to_owned(), name.to_owned())]);
    Namespace {
        metadata: metadata(None, name, uid(&format!("namespace {name}")), labels),
        ..Namespace::default()
    }
}

fn pod_object(cluster: &Cluster, pod: &Pod, now: Timestamp) -> PodObject {
    let mut labels = pod.labels.clone();
    labels.extend(
        pod.template_hash()
            .map(|hash| ("pod-template-hash".to_owned(), hash)),
    );
    let mut metadata = metadata(Some(&pod.namespace), &pod.name(), pod.uid(), labels);
    metadata.creation_timestamp = Some(Time(now));
    metadata.owner_references = pod.replica_set().map(|name| {
        vec![OwnerReference {
            api_version: "apps/v1".into(),
            kind: "ReplicaSet".into(),
            uid: uid(&format!("replicaset {}/{name}", pod.namespace)),
            name,
            controller: Some(true),
            block_owner_deletion: Some(true),
        }]
    });
    let node = cluster.nodes.iter().find(|node| node.name == pod.node);
    let addresses = cluster.addresses(pod).map(|address| address.to_string());
    let hosts: Vec<String> = node.map_or_else(Vec::new, |node| {
        node.addresses().map(|address| address.to_string()).to_vec()
    });
    PodObject {
        metadata,
        spec: Some(PodSpec {
            containers: vec![Container {
                name: pod.key.clone(),
                image: Some("lab-pod".into()),
                ports: Some(container_ports(pod)),
                ..Container::default()
            }],
            host_network: pod.host_network.then_some(true),
            node_name: Some(pod.node.clone()),
            ..PodSpec::default()
        }),
        status: Some(PodStatus {
            phase: Some("Running".into()),
            conditions: Some(vec![PodCondition {
                type_: "Ready".into(),
                status: "True".into(),
                ..PodCondition::default()
            }]),
            host_ip: hosts.first().cloned(),
            host_ips: Some(hosts.into_iter().map(|ip| HostIP { ip }).collect()),
            pod_ip: addresses.first().cloned(),
            pod_ips: Some(addresses.into_iter().map(|ip| PodIP { ip }).collect()),
            start_time: Some(Time(now)),
            ..PodStatus::default()
        }),
    }
}

fn container_ports(pod: &Pod) -> Vec<ContainerPort> {
    pod.ports
        .iter()
        .map(|(name, port)| ContainerPort {
            name: Some(name.clone()),
            container_port: i32::from(*port),
            protocol: Some("TCP".into()),
            ..ContainerPort::default()
        })
        .collect()
}

fn service_object(service: &Service) -> ServiceObject {
    let addresses = service.addresses().map(|address| address.to_string());
    let node_port = service.ports.iter().any(|port| port.node_port.is_some());
    ServiceObject {
        metadata: metadata(
            Some(&service.namespace),
            &service.name,
            service.uid(),
            service.selector.clone(),
        ),
        spec: Some(ServiceSpec {
            type_: Some(if node_port { "NodePort" } else { "ClusterIP" }.into()),
            cluster_ip: addresses.first().cloned(),
            cluster_ips: Some(addresses.to_vec()),
            ip_families: Some(vec!["IPv4".into(), "IPv6".into()]),
            ip_family_policy: Some("PreferDualStack".into()),
            selector: (!service.selector.is_empty()).then(|| service.selector.clone()),
            ports: Some(service.ports.iter().map(service_port).collect()),
            ..ServiceSpec::default()
        }),
        ..ServiceObject::default()
    }
}

fn service_port(port: &ServicePort) -> ServicePortObject {
    ServicePortObject {
        name: Some(port.name.clone()),
        protocol: Some(port.protocol.into()),
        port: i32::from(port.port),
        target_port: Some(match &port.target {
            TargetPort::Number(number) => IntOrString::Int(i32::from(*number)),
            TargetPort::Name(name) => IntOrString::String(name.clone()),
        }),
        node_port: port.node_port.map(i32::from),
        ..ServicePortObject::default()
    }
}

/// A slice for each set of backends that agree on the numbers of the service's ports, as Kubernetes makes them.
fn slices(
    cluster: &Cluster,
    service: &Service,
    family: usize,
    family_name: &str,
) -> Vec<EndpointSlice> {
    let numbers = |pod: &Pod| -> Vec<Option<u16>> {
        let ports = service.ports.iter();
        ports.map(|port| port.target.at(pod)).collect()
    };
    let mut kinds: Vec<_> = cluster.backends(service).map(numbers).collect();
    kinds.sort();
    kinds.dedup();
    kinds
        .into_iter()
        .enumerate()
        .map(|(index, kind)| {
            let name = format!("{}-{}-{index}", service.name, family_name.to_lowercase());
            let labels = [
                (
                    "endpointslice.kubernetes.io/managed-by",
                    "endpointslice-controller.k8s.io",
                ),
                ("kubernetes.io/service-name", &service.name),
            ];
            let labels = labels.map(|(key, value)| (key.to_owned(), value.to_owned()));
            EndpointSlice {
                metadata: metadata(
                    Some(&service.namespace),
                    &name,
                    uid(&format!("slice {}/{name}", service.namespace)),
                    labels.into(),
                ),
                address_type: family_name.to_owned(),
                endpoints: Some(
                    cluster
                        .backends(service)
                        .filter(|pod| numbers(pod) == kind)
                        .map(|pod| endpoint(pod, cluster.addresses(pod)[family]))
                        .collect(),
                ),
                ports: Some(
                    std::iter::zip(&service.ports, &kind)
                        .filter_map(|(port, number)| {
                            Some(EndpointPort {
                                name: Some(port.name.clone()),
                                protocol: Some(port.protocol.into()),
                                port: Some(i32::from((*number)?)),
                                ..EndpointPort::default()
                            })
                        })
                        .collect(),
                ),
            }
        })
        .collect()
}

fn endpoint(pod: &Pod, address: IpAddr) -> Endpoint {
    Endpoint {
        addresses: vec![address.to_string()],
        conditions: Some(EndpointConditions {
            ready: Some(true),
            ..EndpointConditions::default()
        }),
        node_name: Some(pod.node.clone()),
        target_ref: Some(ObjectReference {
            kind: Some("Pod".into()),
            namespace: Some(pod.namespace.clone()),
            name: Some(pod.name()),
            uid: Some(pod.uid()),
            ..ObjectReference::default()
        }),
        ..Endpoint::default()
    }
}

fn node_object(node: &Node) -> NodeObject {
    let labels = Labels::from([("kubernetes.io/hostname".to_owned(), node.name.clone())]);
    let cidrs = node.pod_cidrs();
    let internal = node.addresses().map(|address| NodeAddress {
        type_: "InternalIP".into(),
        address: address.to_string(),
    });
    let host_name = NodeAddress {
        type_: "Hostname".into(),
        address: node.name.clone(),
    };
    NodeObject {
        metadata: metadata(
            None,
            &node.name,
            uid(&format!("node {}", node.name)),
            labels,
        ),
        spec: Some(NodeSpec {
            pod_cidr: cidrs.first().cloned(),
            pod_cidrs: Some(cidrs.to_vec()),
            ..NodeSpec::default()
        }),
        status: Some(NodeStatus {
            addresses: Some(internal.into_iter().chain([host_name]).collect()),
            ..NodeStatus::default()
        }),
    }
}
