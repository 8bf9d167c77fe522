//! What MicroShield's own pods may send and receive, judged by the evaluator that judges everybody's policies.

use std::collections::BTreeSet;

use k8s_openapi::{
    api::{
        core::v1::PodTemplateSpec,
        networking::v1::{NetworkPolicy, NetworkPolicyPort},
    },
    apimachinery::pkg::util::intstr::IntOrString,
};

use crate::{
    load::{Manifests, load, with},
    references::{port_numbers, select_only, selects_pairs},
};

fn policy<'a>(manifests: &'a Manifests, name: &str) -> &'a NetworkPolicy {
    let mut policies = manifests.network_policies.iter();
    policies
        .find(|policy| policy.metadata.name.as_deref() == Some(name))
        .unwrap_or_else(|| panic!("no NetworkPolicy {name}"))
}

fn numbers(ports: &Option<Vec<NetworkPolicyPort>>) -> BTreeSet<(String, i32)> {
    let ports = ports.iter().flatten().map(|port| match port.port {
        Some(IntOrString::Int(number)) => (port.protocol.clone().unwrap(), number),
        _ => panic!("some network plugins know numbers only"),
    });
    ports.collect()
}

fn tcp<const N: usize>(ports: [i32; N]) -> BTreeSet<(String, i32)> {
    ports.map(|port| ("TCP".to_owned(), port)).into()
}

#[test]
fn what_is_not_allowed_is_denied_to_every_pod() {
    let manifests = load();
    let deny = policy(&manifests, "microshield-default-deny");
    let spec = deny.spec.as_ref().unwrap();
    assert_eq!(spec.pod_selector, Some(Default::default()));
    assert_eq!((&spec.ingress, &spec.egress), (&None, &None));
    assert_eq!(spec.policy_types.as_deref().unwrap(), ["Ingress", "Egress"]);
    assert_eq!(manifests.network_policies.len(), 3);
}

#[test]
fn only_agents_reach_the_generator() {
    let manifests = load();
    let (agent, generator) = (manifests.agent(), manifests.generator());
    let spec = policy(&manifests, "microshield-generator")
        .spec
        .clone()
        .unwrap();
    let own = spec.pod_selector.unwrap().match_labels.unwrap();
    select_only(&own, generator, agent);
    let [rule] = spec.ingress.as_deref().unwrap() else {
        panic!("one rule is expected");
    };
    let [peer] = rule.from.as_deref().unwrap() else {
        panic!("one peer is expected");
    };
    assert!(peer.ip_block.is_none() && peer.namespace_selector.is_none());
    let peers = peer.pod_selector.as_ref().unwrap();
    select_only(peers.match_labels.as_ref().unwrap(), agent, generator);
    assert_eq!(
        numbers(&rule.ports),
        tcp([port_numbers(generator)["agents"]])
    );
}

#[test]
fn what_the_programs_call_is_allowed() {
    let manifests = load();
    let (agent, generator) = (manifests.agent(), manifests.generator());
    let api_server = tcp([443, 6443, 8443]);

    let spec = policy(&manifests, "microshield-agent")
        .spec
        .clone()
        .unwrap();
    let own = spec.pod_selector.unwrap().match_labels.unwrap();
    select_only(&own, agent, generator);
    assert_eq!(spec.ingress, None);
    let [to_generator, dns, api] = spec.egress.as_deref().unwrap() else {
        panic!("three rules are expected");
    };
    let [peer] = to_generator.to.as_deref().unwrap() else {
        panic!("one peer is expected");
    };
    let peers = peer.pod_selector.as_ref().unwrap();
    select_only(peers.match_labels.as_ref().unwrap(), generator, agent);
    assert_eq!(
        numbers(&to_generator.ports),
        tcp([port_numbers(generator)["agents"]])
    );
    assert!(numbers(&dns.ports).contains(&("UDP".to_owned(), 53)));
    assert_eq!(numbers(&api.ports), api_server);

    let spec = policy(&manifests, "microshield-generator")
        .spec
        .clone()
        .unwrap();
    let [api] = spec.egress.as_deref().unwrap() else {
        panic!("one rule is expected");
    };
    assert_eq!(numbers(&api.ports), api_server);
}

#[test]
fn prometheus_reaches_the_metrics_and_nothing_else() {
    let all = with("prometheus");
    let spec = policy(&all, "microshield-metrics").spec.clone().unwrap();
    let own = spec.pod_selector.unwrap().match_labels.unwrap();
    let both: [&PodTemplateSpec; 2] = [all.agent(), all.generator()];
    for template in both {
        assert!(selects_pairs(&own, template));
    }
    let [rule] = spec.ingress.as_deref().unwrap() else {
        panic!("one rule is expected");
    };
    let metrics = both.map(|template| port_numbers(template)["metrics"]);
    assert_eq!(numbers(&rule.ports), tcp(metrics));
    assert_eq!(spec.egress, None);
}
