//! From the API's types to ours. What is wrong is named by its field path.

use std::{net::IpAddr, sync::Arc};

use ipnet::IpNet;
use k8s_openapi::{
    api::{core::v1 as core, discovery::v1 as discovery},
    apimachinery::pkg::{
        apis::meta::v1::{ObjectMeta, Time},
        util::intstr::IntOrString,
    },
};

use super::{
    objects::{
        ContainerPort, EndpointSlice, Namespace, Node, Phase, Pod, Service, ServicePort, SlicePort,
        TargetPort,
    },
    workload::workload_of,
};
use crate::{endpoint, record::Protocol, time::Timestamp};

/// A field of an object that cannot be what it says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: `{value}` is not {expected}")]
pub struct FieldError {
    /// The field's path.
    pub field: String,
    /// What stands there.
    pub value: String,
    /// What may stand there.
    pub expected: &'static str,
}

/// Annotations in which CNIs note the addresses of their own interfaces on a node.
const INTERFACE_ANNOTATIONS: [&str; 7] = [
    "projectcalico.org/IPv4IPIPTunnelAddr",
    "projectcalico.org/IPv4VXLANTunnelAddr",
    "projectcalico.org/IPv6VXLANTunnelAddr",
    "projectcalico.org/IPv4WireguardInterfaceAddr",
    "projectcalico.org/IPv6WireguardInterfaceAddr",
    "network.cilium.io/ipv4-cilium-host",
    "network.cilium.io/ipv6-cilium-host",
];

impl TryFrom<core::Namespace> for Namespace {
    type Error = FieldError;

    fn try_from(object: core::Namespace) -> Result<Self, FieldError> {
        Ok(Self {
            name: name(&object.metadata)?,
            labels: object.metadata.labels.unwrap_or_default(),
        })
    }
}

impl TryFrom<core::Node> for Node {
    type Error = FieldError;

    fn try_from(object: core::Node) -> Result<Self, FieldError> {
        let metadata = object.metadata;
        let status = object.status.unwrap_or_default();
        let mut addresses = Vec::new();
        for (i, entry) in status.addresses.unwrap_or_default().iter().enumerate() {
            if matches!(entry.type_.as_str(), "InternalIP" | "ExternalIP") {
                let address = address(&entry.address, || format!("status.addresses[{i}].address"))?;
                push_new(&mut addresses, address);
            }
        }
        let spec = object.spec.unwrap_or_default();
        let mut pod_cidrs = Vec::new();
        for (field, cidr) in plural_and_single(&spec.pod_cidrs, &spec.pod_cidr, "spec.podCIDR") {
            let net: IpNet = cidr.parse().map_err(|_unspecific| FieldError {
                field,
                value: cidr.clone(),
                expected: "an address range",
            })?;
            push_new(&mut pod_cidrs, net.trunc());
        }
        let annotations = metadata.annotations.clone().unwrap_or_default();
        let interfaces = INTERFACE_ANNOTATIONS
            .iter()
            .filter_map(|key| annotations.get(*key)?.parse::<IpAddr>().ok())
            .map(|address| address.to_canonical())
            .filter(|address| !addresses.contains(address))
            .collect();
        Ok(Self {
            identity: Arc::new(endpoint::Node {
                name: name(&metadata)?,
                addresses,
            }),
            interfaces,
            pod_cidrs,
            created: metadata.creation_timestamp.as_ref().and_then(timestamp),
        })
    }
}

impl TryFrom<core::Service> for Service {
    type Error = FieldError;

    fn try_from(object: core::Service) -> Result<Self, FieldError> {
        let metadata = object.metadata;
        let mut spec = object.spec.unwrap_or_default();
        let created = metadata.creation_timestamp.as_ref().and_then(timestamp);
        let (namespace, name) = namespace_and_name(&metadata)?;
        let uid = uid(&metadata, &namespace, &name);
        // An alias in DNS: it has no addresses of its own, and its selector is ignored.
        let is_alias = spec.type_.as_deref() == Some("ExternalName");
        let selector = spec.selector.take().filter(|_| !is_alias);
        let mut service = Self {
            identity: Arc::new(endpoint::Service {
                uid,
                namespace,
                name,
                labels: metadata.labels.unwrap_or_default(),
                selector: selector.unwrap_or_default(),
                backends: Vec::new(),
            }),
            cluster_addresses: Vec::new(),
            external_addresses: Vec::new(),
            ports: Vec::new(),
            created,
        };
        if is_alias {
            return Ok(service);
        }
        for (field, text) in
            plural_and_single(&spec.cluster_ips, &spec.cluster_ip, "spec.clusterIP")
        {
            if !matches!(text.as_str(), "" | "None") {
                push_new(&mut service.cluster_addresses, address(text, || field)?);
            }
        }
        for (i, text) in spec.external_ips.iter().flatten().enumerate() {
            let address = address(text, || format!("spec.externalIPs[{i}]"))?;
            push_new(&mut service.external_addresses, address);
        }
        let balancer = object.status.and_then(|status| status.load_balancer);
        for (i, ingress) in balancer
            .and_then(|balancer| balancer.ingress)
            .iter()
            .flatten()
            .enumerate()
        {
            // With the mode `Proxy` the nodes leave the address alone: the packets do go out to the load balancer.
            if let (Some(text), true) = (&ingress.ip, ingress.ip_mode.as_deref() != Some("Proxy")) {
                let address = address(text, || format!("status.loadBalancer.ingress[{i}].ip"))?;
                push_new(&mut service.external_addresses, address);
            }
        }
        for (i, entry) in spec.ports.iter().flatten().enumerate() {
            service.ports.push(service_port(entry, i)?);
        }
        Ok(service)
    }
}

fn service_port(entry: &core::ServicePort, i: usize) -> Result<ServicePort, FieldError> {
    let number = port(entry.port, || format!("spec.ports[{i}].port"))?;
    let target = match &entry.target_port {
        None | Some(IntOrString::Int(0)) => TargetPort::Number(number),
        Some(IntOrString::Int(target)) => {
            TargetPort::Number(port(*target, || format!("spec.ports[{i}].targetPort"))?)
        }
        Some(IntOrString::String(name)) => TargetPort::Name(name.clone()),
    };
    let node_port = entry.node_port.filter(|port| *port != 0);
    Ok(ServicePort {
        name: entry.name.clone().unwrap_or_default(),
        protocol: protocol(entry.protocol.as_deref(), || {
            format!("spec.ports[{i}].protocol")
        })?,
        port: number,
        target,
        node_port: node_port
            .map(|node_port| port(node_port, || format!("spec.ports[{i}].nodePort")))
            .transpose()?,
    })
}

impl TryFrom<discovery::EndpointSlice> for EndpointSlice {
    type Error = FieldError;

    fn try_from(object: discovery::EndpointSlice) -> Result<Self, FieldError> {
        let (namespace, name) = namespace_and_name(&object.metadata)?;
        let mut labels = object.metadata.labels.unwrap_or_default();
        let from_selector = labels
            .get("endpointslice.kubernetes.io/managed-by")
            .is_some_and(|manager| manager == "endpointslice-controller.k8s.io");
        let endpoints = object.endpoints.unwrap_or_default();
        let mut addresses = Vec::new();
        if !from_selector && object.address_type != "FQDN" {
            for (i, endpoint) in endpoints.iter().enumerate() {
                for (j, text) in endpoint.addresses.iter().enumerate() {
                    let field = || format!("endpoints[{i}].addresses[{j}]");
                    addresses.push(address(text, field)?);
                }
            }
            addresses.sort_unstable();
            addresses.dedup();
        }
        let mut ports = Vec::new();
        for (i, entry) in object.ports.iter().flatten().enumerate() {
            if let Some(number) = entry.port {
                ports.push(SlicePort {
                    name: entry.name.clone().unwrap_or_default(),
                    protocol: protocol(entry.protocol.as_deref(), || {
                        format!("ports[{i}].protocol")
                    })?,
                    port: port(number, || format!("ports[{i}].port"))?,
                });
            }
        }
        Ok(Self {
            namespace,
            name,
            service: labels.remove("kubernetes.io/service-name"),
            addresses,
            endpoints: u32::try_from(endpoints.len()).unwrap_or(u32::MAX),
            ports,
        })
    }
}

impl TryFrom<core::Pod> for Pod {
    type Error = FieldError;

    fn try_from(object: core::Pod) -> Result<Self, FieldError> {
        let metadata = object.metadata;
        let spec = object.spec.unwrap_or_default();
        let status = object.status.unwrap_or_default();
        let (namespace, name) = namespace_and_name(&metadata)?;
        let uid = uid(&metadata, &namespace, &name);
        let mut annotations = metadata.annotations.unwrap_or_default();
        let labels = metadata.labels.unwrap_or_default();

        let listed = status.pod_ips.as_ref().map(|entries| {
            let texts = entries.iter().map(|entry| entry.ip.clone());
            texts.collect::<Vec<String>>()
        });
        let mut addresses = Vec::new();
        for (field, text) in plural_and_single(&listed, &status.pod_ip, "status.podIP") {
            if !text.is_empty() {
                push_new(&mut addresses, address(text, || field)?);
            }
        }
        addresses.shrink_to_fit();
        let started = status
            .start_time
            .as_ref()
            .or(metadata.creation_timestamp.as_ref())
            .and_then(timestamp);
        Ok(Self {
            phase: phase(&status),
            started,
            ports: container_ports(&spec)?,
            // The annotation is kubelet's, on the mirror only: its value is the static pod's uid.
            static_uid: annotations.remove("kubernetes.io/config.mirror"),
            identity: endpoint::Pod {
                uid,
                namespace,
                name,
                workload: workload_of(
                    metadata.owner_references.as_deref().unwrap_or_default(),
                    &labels,
                )
                .map(Arc::new),
                labels: Arc::new(labels),
                node: spec
                    .node_name
                    .filter(|node| !node.is_empty())
                    .map(Arc::from),
                host_network: spec.host_network.unwrap_or_default(),
                addresses,
                services: Arc::default(),
            },
        })
    }
}

fn phase(status: &core::PodStatus) -> Phase {
    match status.phase.as_deref() {
        Some("Pending") => Phase::Pending,
        Some("Succeeded" | "Failed") => {
            let containers = status.container_statuses.iter().flatten();
            let states = containers.filter_map(|container| container.state.as_ref());
            Phase::Finished {
                at: states.filter_map(finished).max(),
            }
        }
        _ => Phase::Running,
    }
}

/// When the last process of a deleted pod ended, if its last status tells it of all containers.
///
/// `metadata.deletionTimestamp` does not: while the pod ends that is when it has to be gone at the latest, and in the event
/// that tells of its end it is when the deletion was asked for, because kubelet's own request without grace period sets
/// it back (`BeforeDelete` in `k8s.io/apiserver/pkg/registry/rest/delete.go`). Until then the pod may have spoken for as
/// long as its grace period.
#[cfg(feature = "source")]
pub(crate) fn end_of_pod(status: &core::PodStatus) -> Option<Timestamp> {
    let lists = [
        &status.container_statuses,
        &status.init_container_statuses,
        &status.ephemeral_container_statuses,
    ];
    let mut end = None;
    for container in lists.into_iter().flatten().flatten() {
        let state = container.state.as_ref()?;
        if state.terminated.is_some() {
            end = end.max(Some(finished(state)?));
        } else if state.running.is_some() {
            return None;
        } else if let Some(last) = &container.last_state {
            end = end.max(finished(last));
        }
    }
    end
}

/// When a container ended, in whole seconds, rounded down.
fn finished(state: &core::ContainerState) -> Option<Timestamp> {
    timestamp(state.terminated.as_ref()?.finished_at.as_ref()?)
}

/// The ports of the containers and of the sidecars (init containers that go on running) that have a name or a port of
/// the node, each name and protocol once: the first, as the endpoints controller takes it (`FindPort` in
/// `pkg/api/v1/pod/util.go`).
fn container_ports(spec: &core::PodSpec) -> Result<Arc<[ContainerPort]>, FieldError> {
    let containers = spec.containers.iter().enumerate();
    let sidecars = spec.init_containers.iter().flatten().enumerate();
    let sidecars = sidecars
        .filter(|(_, container)| container.restart_policy.as_deref() == Some("Always"))
        .map(|(i, container)| ("initContainers", i, container));
    let mut ports: Vec<ContainerPort> = Vec::new();
    for (list, i, container) in containers
        .map(|(i, container)| ("containers", i, container))
        .chain(sidecars)
    {
        for (j, entry) in container.ports.iter().flatten().enumerate() {
            let field = |name: &str| format!("spec.{list}[{i}].ports[{j}].{name}");
            // On the host's network the node's port is the container's own, and no other node sees a loopback address.
            let host_ip = entry.host_ip.as_deref().and_then(|ip| ip.parse().ok());
            let forwarded = spec.host_network != Some(true)
                && !host_ip.is_some_and(|ip: IpAddr| ip.is_loopback());
            let host_port = entry.host_port.filter(|port| *port != 0 && forwarded);
            let mut found = ContainerPort {
                name: entry.name.clone().unwrap_or_default(),
                protocol: protocol(entry.protocol.as_deref(), || field("protocol"))?,
                port: port(entry.container_port, || field("containerPort"))?,
                host_port: host_port
                    .map(|number| port(number, || field("hostPort")))
                    .transpose()?,
            };
            let named_before = ports
                .iter()
                .any(|other| other.name == found.name && other.protocol == found.protocol);
            if named_before {
                found.name.clear();
            }
            if !found.name.is_empty() || found.host_port.is_some() {
                ports.push(found);
            }
        }
    }
    Ok(ports.into())
}

fn name(metadata: &ObjectMeta) -> Result<String, FieldError> {
    match &metadata.name {
        Some(name) if !name.is_empty() => Ok(name.clone()),
        _ => Err(FieldError {
            field: "metadata.name".to_owned(),
            value: String::new(),
            expected: "a name",
        }),
    }
}

/// A manifest written by hand may leave the namespace out.
fn namespace_and_name(metadata: &ObjectMeta) -> Result<(String, String), FieldError> {
    let namespace = metadata.namespace.clone().filter(|name| !name.is_empty());
    Ok((
        namespace.unwrap_or_else(|| "default".to_owned()),
        name(metadata)?,
    ))
}

/// A manifest written by hand has no uid: its name must do.
fn uid(metadata: &ObjectMeta, namespace: &str, name: &str) -> String {
    let uid = metadata.uid.clone().filter(|uid| !uid.is_empty());
    uid.unwrap_or_else(|| format!("{namespace}/{name}"))
}

fn address(text: &str, field: impl FnOnce() -> String) -> Result<IpAddr, FieldError> {
    let parsed: Result<IpAddr, _> = text.parse();
    parsed
        .map(|address| address.to_canonical())
        .map_err(|_unspecific| FieldError {
            field: field(),
            value: text.to_owned(),
            expected: "an IP address",
        })
}

fn port(number: i32, field: impl FnOnce() -> String) -> Result<u16, FieldError> {
    u16::try_from(number)
        .ok()
        .filter(|port| *port != 0)
        .ok_or_else(|| FieldError {
            field: field(),
            value: number.to_string(),
            expected: "a port from 1 to 65535",
        })
}

fn protocol(name: Option<&str>, field: impl FnOnce() -> String) -> Result<Protocol, FieldError> {
    match name {
        None | Some("" | "TCP") => Ok(Protocol::Tcp),
        Some("UDP") => Ok(Protocol::Udp),
        Some("SCTP") => Ok(Protocol::Sctp),
        Some(other) => Err(FieldError {
            field: field(),
            value: other.to_owned(),
            expected: "TCP, UDP or SCTP",
        }),
    }
}

fn timestamp(time: &Time) -> Option<Timestamp> {
    let nanos = u64::try_from(time.0.as_nanosecond()).ok()?;
    Some(Timestamp::from_nanos(nanos))
}

/// The values of a list `FIELDs` and of the older `FIELD`, which repeats its first one or stands alone.
fn plural_and_single<'a>(
    plural: &'a Option<Vec<String>>,
    single: &'a Option<String>,
    field: &str,
) -> impl Iterator<Item = (String, &'a String)> {
    let listed = plural.iter().flatten().enumerate();
    listed
        .map(move |(i, text)| (format!("{field}s[{i}]"), text))
        .chain(single.iter().map(move |text| (field.to_owned(), text)))
}

fn push_new<T: PartialEq>(list: &mut Vec<T>, value: T) {
    if !list.contains(&value) {
        list.push(value);
    }
}
