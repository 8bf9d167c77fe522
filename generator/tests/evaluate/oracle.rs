//! A second evaluator, sentence by sentence after the field documentation of networking.k8s.io/v1. It works on the API's
//! objects alone, shares nothing with the first one and prepares nothing.

use std::{collections::BTreeMap, net::IpAddr};

use k8s_openapi::{
    api::{
        core::v1::{Node, Pod},
        networking::v1::{IPBlock, NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort},
    },
    apimachinery::pkg::{apis::meta::v1::LabelSelector, util::intstr::IntOrString},
};

use crate::cluster::{Cluster, Query, node_addresses, pod_addresses};

pub(crate) fn allows(cluster: &Cluster, query: &Query) -> bool {
    egress_allows(cluster, query) && ingress_allows(cluster, query)
}

/// "Outgoing traffic is allowed if there are no NetworkPolicies selecting the pod, OR if the traffic matches at least one
/// egress rule across all of the NetworkPolicy objects whose podSelector matches the pod."
fn egress_allows(cluster: &Cluster, query: &Query) -> bool {
    let Some(pod) = pod_at(cluster, query.source) else {
        return true;
    };
    let mut isolated = false;
    for policy in selecting(cluster, pod, "Egress") {
        isolated = true;
        for rule in policy
            .spec
            .iter()
            .flat_map(|spec| spec.egress.iter().flatten())
        {
            if any_peer(cluster, policy, rule.to.as_deref(), query.destination)
                && any_port(cluster, rule.ports.as_deref(), query)
            {
                return true;
            }
        }
    }
    !isolated
}

/// "Traffic is allowed to a pod if there are no NetworkPolicies selecting the pod, OR if the traffic source is the pod's local
/// node, OR if the traffic matches at least one ingress rule across all of the NetworkPolicy objects whose podSelector
/// matches the pod."
fn ingress_allows(cluster: &Cluster, query: &Query) -> bool {
    let Some(pod) = pod_at(cluster, query.destination) else {
        return true;
    };
    let mut isolated = false;
    for policy in selecting(cluster, pod, "Ingress") {
        isolated = true;
        for rule in policy
            .spec
            .iter()
            .flat_map(|spec| spec.ingress.iter().flatten())
        {
            if any_peer(cluster, policy, rule.from.as_deref(), query.source)
                && any_port(cluster, rule.ports.as_deref(), query)
            {
                return true;
            }
        }
    }
    !isolated
        || local_node(cluster, pod).is_some_and(|node| node_addresses(node).contains(&query.source))
}

fn local_node<'a>(cluster: &'a Cluster, pod: &Pod) -> Option<&'a Node> {
    let name = pod.spec.as_ref().unwrap().node_name.as_ref()?;
    cluster
        .nodes
        .iter()
        .find(|node| node.metadata.name.as_ref() == Some(name))
}

/// Policies do not see pods in their node's network.
fn pod_at(cluster: &Cluster, address: IpAddr) -> Option<&Pod> {
    cluster.pods.iter().find(|pod| {
        pod.spec.as_ref().unwrap().host_network != Some(true)
            && pod_addresses(pod).contains(&address)
    })
}

fn selecting<'a>(
    cluster: &'a Cluster,
    pod: &'a Pod,
    policy_type: &'a str,
) -> impl Iterator<Item = &'a NetworkPolicy> {
    cluster.policies.iter().filter(move |policy| {
        let spec = policy.spec.as_ref().unwrap();
        let types = match spec.policy_types.as_deref() {
            // "policies that contain an egress section are assumed to affect egress, and all policies are assumed to
            // affect ingress"
            None | Some([]) => match spec.egress.as_deref() {
                None | Some([]) => vec!["Ingress"],
                Some(_) => vec!["Ingress", "Egress"],
            },
            Some(types) => types.iter().map(String::as_str).collect(),
        };
        types.contains(&policy_type)
            && policy.metadata.namespace == pod.metadata.namespace
            // "If it is not specified, it defaults to an empty selector."
            && spec
                .pod_selector
                .as_ref()
                .is_none_or(|selector| selects(selector, pod.metadata.labels.as_ref()))
    })
}

/// "If this field is empty or missing, this rule matches all sources."
fn any_peer(
    cluster: &Cluster,
    policy: &NetworkPolicy,
    peers: Option<&[NetworkPolicyPeer]>,
    address: IpAddr,
) -> bool {
    let peers = peers.unwrap_or_default();
    peers.is_empty()
        || peers
            .iter()
            .any(|peer| is_peer(cluster, policy, peer, address))
}

fn is_peer(
    cluster: &Cluster,
    policy: &NetworkPolicy,
    peer: &NetworkPolicyPeer,
    address: IpAddr,
) -> bool {
    if let Some(block) = &peer.ip_block {
        return in_block(block, address);
    }
    let Some(pod) = pod_at(cluster, address) else {
        return false;
    };
    let namespace = pod.metadata.namespace.as_ref();
    let in_namespace = match &peer.namespace_selector {
        // "Otherwise it selects the pods matching podSelector in the policy's own namespace."
        None => namespace == policy.metadata.namespace.as_ref(),
        Some(selector) => cluster
            .namespaces
            .iter()
            .find(|object| object.metadata.name.as_ref() == namespace)
            .is_some_and(|object| selects(selector, object.metadata.labels.as_ref())),
    };
    // "Otherwise it selects all pods in the namespaces selected by namespaceSelector."
    in_namespace
        && peer
            .pod_selector
            .as_ref()
            .is_none_or(|selector| selects(selector, pod.metadata.labels.as_ref()))
}

/// "The result of matchLabels and matchExpressions are ANDed. An empty label selector matches all objects."
fn selects(selector: &LabelSelector, labels: Option<&BTreeMap<String, String>>) -> bool {
    let value = |key: &str| labels.and_then(|labels| labels.get(key));
    for (key, wanted) in selector.match_labels.iter().flatten() {
        if value(key) != Some(wanted) {
            return false;
        }
    }
    for expression in selector.match_expressions.iter().flatten() {
        let values = expression.values.clone().unwrap_or_default();
        let value = value(&expression.key);
        let holds = match expression.operator.as_str() {
            "In" => value.is_some() && values.contains(value.unwrap()),
            "NotIn" => value.is_none() || !values.contains(value.unwrap()),
            "Exists" => value.is_some(),
            "DoesNotExist" => value.is_none(),
            other => panic!("{other}"),
        };
        if !holds {
            return false;
        }
    }
    true
}

/// "If this field is empty or missing, this rule matches all ports."
fn any_port(cluster: &Cluster, ports: Option<&[NetworkPolicyPort]>, query: &Query) -> bool {
    let ports = ports.unwrap_or_default();
    ports.is_empty() || ports.iter().any(|port| is_port(cluster, port, query))
}

fn is_port(cluster: &Cluster, port: &NetworkPolicyPort, query: &Query) -> bool {
    // "If not specified, this field defaults to TCP."
    let protocol = port.protocol.as_deref().unwrap_or("TCP");
    if protocol != query.protocol.name() {
        return false;
    }
    match &port.port {
        // "If this field is not provided, this matches all port names and numbers."
        None => true,
        // "If set, indicates that the range of ports from port to endPort, inclusive, should be allowed."
        Some(IntOrString::Int(first)) => {
            let last = port.end_port.unwrap_or(*first);
            *first <= i32::from(query.port) && i32::from(query.port) <= last
        }
        // "This can either be a numerical or named port on a pod."
        Some(IntOrString::String(name)) => pod_at(cluster, query.destination).is_some_and(|pod| {
            let containers = &pod.spec.as_ref().unwrap().containers;
            containers
                .iter()
                .flat_map(|container| container.ports.iter().flatten())
                .any(|declared| {
                    declared.name.as_ref() == Some(name)
                        && declared.protocol.as_deref().unwrap_or("TCP") == protocol
                        && declared.container_port == i32::from(query.port)
                })
        }),
    }
}

pub(crate) fn in_block(block: &IPBlock, address: IpAddr) -> bool {
    in_cidr(&block.cidr, address)
        && !block
            .except
            .iter()
            .flatten()
            .any(|except| in_cidr(except, address))
}

fn in_cidr(cidr: &str, address: IpAddr) -> bool {
    let (network, prefix) = cidr.split_once('/').unwrap();
    let network: IpAddr = network.parse().unwrap();
    let prefix: usize = prefix.parse().unwrap();
    let bits = |address: IpAddr| -> String {
        let octets = match address {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        };
        octets.iter().map(|octet| format!("{octet:08b}")).collect()
    };
    network.is_ipv4() == address.is_ipv4() && bits(network)[..prefix] == bits(address)[..prefix]
}
