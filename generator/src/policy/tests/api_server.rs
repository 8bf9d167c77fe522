//! What the API server checks before it takes a NetworkPolicy, written anew from `pkg/apis/networking/validation` and
//! `k8s.io/apimachinery/pkg/util/validation`, apart from the evaluator's own checks.

use std::net::IpAddr;

use k8s_openapi::{
    api::networking::v1::{IPBlock, NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort},
    apimachinery::pkg::{apis::meta::v1::LabelSelector, util::intstr::IntOrString},
};

/// What the API server would complain of.
pub(crate) fn complaints(policy: &NetworkPolicy) -> Vec<String> {
    let mut found = Vec::new();
    let mut check = |is_right: bool, what: String| {
        if !is_right {
            found.push(what);
        }
    };
    let metadata = &policy.metadata;
    let name = metadata.name.as_deref().unwrap_or_default();
    check(is_subdomain(name), format!("metadata.name: {name}"));
    let namespace = metadata.namespace.as_deref().unwrap_or_default();
    check(
        is_dns_label(namespace, 63),
        format!("metadata.namespace: {namespace}"),
    );
    for (key, value) in metadata.labels.iter().flatten() {
        check(
            is_label(key, value),
            format!("metadata.labels: {key}={value}"),
        );
    }
    let Some(spec) = &policy.spec else {
        return found;
    };
    if let Some(pods) = &spec.pod_selector {
        selector(pods, &mut check);
    }
    let ingress = spec.ingress.iter().flatten();
    let ingress = ingress.map(|rule| (&rule.from, &rule.ports));
    let egress = spec.egress.iter().flatten();
    let egress = egress.map(|rule| (&rule.to, &rule.ports));
    for (peers, ports) in ingress.chain(egress) {
        for peer in peers.iter().flatten() {
            check_peer(peer, &mut check);
        }
        for port in ports.iter().flatten() {
            check_port(port, &mut check);
        }
    }
    let types = spec.policy_types.as_deref().unwrap_or_default();
    check(types.len() <= 2, format!("policyTypes: {types:?}"));
    for name in types {
        let is_known = ["Ingress", "Egress"].contains(&name.as_str());
        check(is_known, format!("policyTypes: {name}"));
    }
    found
}

type Check<'a> = &'a mut dyn FnMut(bool, String);

fn check_peer(peer: &NetworkPolicyPeer, check: Check<'_>) {
    let selectors = [&peer.namespace_selector, &peer.pod_selector];
    let has_selectors = selectors.iter().any(|selector| selector.is_some());
    check(
        has_selectors != peer.ip_block.is_some(),
        format!("neither selectors nor ipBlock, or both: {peer:?}"),
    );
    for of in selectors.into_iter().flatten() {
        selector(of, check);
    }
    if let Some(block) = &peer.ip_block {
        check_block(block, check);
    }
}

fn check_block(block: &IPBlock, check: Check<'_>) {
    let Some((address, prefix)) = cidr(&block.cidr) else {
        check(false, format!("cidr: {}", block.cidr));
        return;
    };
    for except in block.except.iter().flatten() {
        let is_inside = cidr(except).is_some_and(|(inner, length)| {
            length > prefix
                && inner.is_ipv4() == address.is_ipv4()
                && masked(inner, prefix) == masked(address, prefix)
        });
        check(is_inside, format!("except: {except} in {}", block.cidr));
    }
}

fn check_port(port: &NetworkPolicyPort, check: Check<'_>) {
    let protocol = port.protocol.as_deref().unwrap_or("TCP");
    let is_known = ["TCP", "UDP", "SCTP"].contains(&protocol);
    check(is_known, format!("protocol: {protocol}"));
    let is_number = |number: i32| (1..=65535).contains(&number);
    let is_port = match &port.port {
        None => port.end_port.is_none(),
        Some(IntOrString::Int(number)) => {
            is_number(*number)
                && port
                    .end_port
                    .is_none_or(|end| is_number(end) && end >= *number)
        }
        Some(IntOrString::String(name)) => port.end_port.is_none() && is_port_name(name),
    };
    check(is_port, format!("port: {port:?}"));
}

fn selector(selector: &LabelSelector, check: Check<'_>) {
    for (key, value) in selector.match_labels.iter().flatten() {
        check(is_label(key, value), format!("matchLabels: {key}={value}"));
    }
    for expression in selector.match_expressions.iter().flatten() {
        let values = expression.values.as_deref().unwrap_or_default();
        let is_right = match expression.operator.as_str() {
            "In" | "NotIn" => !values.is_empty(),
            "Exists" | "DoesNotExist" => values.is_empty(),
            _ => false,
        };
        let are_labels = if values.is_empty() {
            is_label(&expression.key, "")
        } else {
            values.iter().all(|value| is_label(&expression.key, value))
        };
        check(
            is_right && are_labels,
            format!("matchExpressions: {expression:?}"),
        );
    }
}

/// As strictly as since 1.36: no leading zeros, no bits beyond the prefix, IPv6 in its own notation.
fn cidr(text: &str) -> Option<(IpAddr, u8)> {
    let (address, prefix) = text.split_once('/')?;
    let address: IpAddr = address.parse().ok()?;
    let length: u8 = prefix.parse().ok()?;
    let is_canonical =
        format!("{address}/{length}") == text && masked(address, length) == bits(address);
    let longest = if address.is_ipv4() { 32 } else { 128 };
    let is_mapped = matches!(address, IpAddr::V6(address) if address.to_ipv4_mapped().is_some());
    (is_canonical && length <= longest && !is_mapped).then_some((address, length))
}

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(u32::from(address)) << 96,
        IpAddr::V6(address) => u128::from(address),
    }
}

fn masked(address: IpAddr, prefix: u8) -> u128 {
    let mask = u128::MAX.checked_shl(128 - u32::from(prefix.min(128)));
    bits(address) & mask.unwrap_or_default()
}

fn is_label(key: &str, value: &str) -> bool {
    let name = match key.split_once('/') {
        Some((prefix, name)) => Some(name).filter(|_| is_subdomain(prefix)),
        None => Some(key),
    };
    name.is_some_and(|name| !name.is_empty() && is_label_text(name)) && is_label_text(value)
}

/// `(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?`, 63 at most.
fn is_label_text(text: &str) -> bool {
    let is_inner = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_' || c == '.';
    text.len() <= 63
        && text.chars().all(is_inner)
        && !text.starts_with(['-', '_', '.'])
        && !text.ends_with(['-', '_', '.'])
}

/// `[a-z0-9]([-a-z0-9]*[a-z0-9])?`, with dots between such, 253 at most.
fn is_subdomain(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(|part| is_dns_label(part, 253))
}

fn is_dns_label(text: &str, longest: usize) -> bool {
    let is_inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    (1..=longest).contains(&text.len())
        && text.chars().all(is_inner)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

fn is_port_name(text: &str) -> bool {
    is_dns_label(text, 15)
        && !text.contains("--")
        && text.contains(|c: char| c.is_ascii_lowercase())
}

/// A judge that lets everything pass would be of no use.
#[test]
fn what_the_api_server_refuses_is_complained_of() {
    let right = serde_json::json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "a.b", "namespace": "n", "labels": {"x.y/z": "V_1"}},
        "spec": {
            "podSelector": {"matchLabels": {"a": "b"}, "matchExpressions": [{"key": "k", "operator": "In", "values": ["v"]}]},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [{"namespaceSelector": {}}], "ports": [{"port": 1, "endPort": 2, "protocol": "TCP"}]}],
            "egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}], "ports": [{"port": "http"}]}],
        },
    });
    let found = |policy: &serde_json::Value| {
        complaints(&serde_json::from_value::<NetworkPolicy>(policy.clone()).unwrap())
    };
    assert_eq!(found(&right), [""; 0]);
    let long = "x".repeat(254);
    for (field, wrong) in [
        ("/metadata/name", serde_json::json!("A")),
        ("/metadata/name", serde_json::json!(long)),
        ("/metadata/namespace", serde_json::json!("a.b")),
        ("/metadata/labels", serde_json::json!({"a/b/c": "x"})),
        ("/spec/podSelector/matchLabels/a", serde_json::json!("-")),
        (
            "/spec/podSelector/matchExpressions/0/operator",
            serde_json::json!("Exists"),
        ),
        (
            "/spec/podSelector/matchExpressions/0/operator",
            serde_json::json!("Gt"),
        ),
        (
            "/spec/podSelector/matchExpressions/0/values",
            serde_json::json!([]),
        ),
        ("/spec/policyTypes", serde_json::json!(["ingress"])),
        (
            "/spec/policyTypes",
            serde_json::json!(["Ingress", "Egress", "Egress"]),
        ),
        ("/spec/ingress/0/from/0", serde_json::json!({})),
        (
            "/spec/ingress/0/from/0",
            serde_json::json!({"podSelector": {}, "ipBlock": {"cidr": "::/0"}}),
        ),
        ("/spec/ingress/0/ports/0/port", serde_json::json!(0)),
        ("/spec/ingress/0/ports/0/port", serde_json::json!(3)),
        ("/spec/ingress/0/ports/0/port", serde_json::json!("http")),
        ("/spec/ingress/0/ports/0/endPort", serde_json::json!(65536)),
        ("/spec/ingress/0/ports/0/protocol", serde_json::json!("tcp")),
        ("/spec/egress/0/ports/0/port", serde_json::json!("80")),
        (
            "/spec/egress/0/to/0/ipBlock/cidr",
            serde_json::json!("10.0.0.1/8"),
        ),
        (
            "/spec/egress/0/to/0/ipBlock/cidr",
            serde_json::json!("10.0.0.0"),
        ),
        (
            "/spec/egress/0/to/0/ipBlock/cidr",
            serde_json::json!("::ffff:10.0.0.0/104"),
        ),
        (
            "/spec/egress/0/to/0/ipBlock/except/0",
            serde_json::json!("11.0.0.0/16"),
        ),
        (
            "/spec/egress/0/to/0/ipBlock/except/0",
            serde_json::json!("10.0.0.0/8"),
        ),
        (
            "/spec/egress/0/to/0/ipBlock/except/0",
            serde_json::json!("fd00::/16"),
        ),
    ] {
        let mut policy = right.clone();
        *policy.pointer_mut(field).unwrap() = wrong.clone();
        assert_eq!(
            found(&policy).len(),
            1,
            "{field}: {wrong}: {:?}",
            found(&policy)
        );
    }
}
