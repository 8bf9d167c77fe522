use k8s_openapi::api::networking::v1::NetworkPolicy;

use super::*;
use crate::evaluate::error::Problem;

fn policy(spec: &str) -> NetworkPolicy {
    let text = format!("metadata: {{namespace: shop, name: web}}\nspec: {spec}");
    serde_yaml::from_str(&text).unwrap()
}

/// The API server refuses the policy, and says what we say of it.
fn refused(spec: &str, expected: &str) {
    let error = Policies::compile([&policy(spec)]).unwrap_err().to_string();
    assert_eq!(
        error,
        format!("NetworkPolicy shop/web: {expected}"),
        "{spec}"
    );
}

#[test]
fn what_the_api_server_refuses_is_refused_with_its_field() {
    refused(
        "{podSelector: {matchLabels: {a/b/c: x}}}",
        "spec.podSelector.matchLabels[a/b/c]: `a/b/c` is not the key of a label",
    );
    refused(
        "{podSelector: {matchLabels: {app.kubernetes.io/name: -x}}}",
        "spec.podSelector.matchLabels[app.kubernetes.io/name]: `-x` is not the value of a label",
    );
    refused(
        "{podSelector: {matchExpressions: [{key: app, operator: in, values: [x]}]}}",
        "spec.podSelector.matchExpressions[0].operator: `in` is not an operator: `In`, `NotIn`, `Exists` or `DoesNotExist`",
    );
    refused(
        "{podSelector: {matchExpressions: [{key: app, operator: NotIn}]}}",
        "spec.podSelector.matchExpressions[0].values: operator `NotIn` needs at least one value",
    );
    refused(
        "{podSelector: {matchExpressions: [{key: app, operator: Exists, values: [x]}]}}",
        "spec.podSelector.matchExpressions[0].values: operator `Exists` takes no values",
    );
    refused(
        "{podSelector: {matchExpressions: [{key: app, operator: In, values: [x, 'y z']}]}}",
        "spec.podSelector.matchExpressions[0].values[1]: `y z` is not the value of a label",
    );
    refused(
        "{podSelector: {}, policyTypes: [Ingress, egress]}",
        "spec.policyTypes[1]: `egress` is not a policy type: `Ingress` or `Egress`",
    );
    refused(
        "{podSelector: {}, policyTypes: [Ingress, Egress, Ingress]}",
        "spec.policyTypes: more than two policy types",
    );
    assert!(Policies::compile([&policy("{policyTypes: [Ingress, Ingress]}")]).is_ok());
    refused(
        "{ingress: [{from: [{podSelector: {}}, {}]}]}",
        "spec.ingress[0].from[1]: has none of `podSelector`, `namespaceSelector` and `ipBlock`",
    );
    refused(
        "{egress: [{to: [{podSelector: {}, ipBlock: {cidr: 10.0.0.0/8}}]}]}",
        "spec.egress[0].to[0].ipBlock: `ipBlock` stands beside a selector",
    );
    refused(
        "{egress: [{}, {to: [{namespaceSelector: {matchLabels: {'': x}}}]}]}",
        "spec.egress[1].to[0].namespaceSelector.matchLabels[]: `` is not the key of a label",
    );
}

#[test]
fn blocks_are_checked() {
    let block = |block: &str, expected: &str| {
        refused(
            &format!("{{egress: [{{to: [{{ipBlock: {block}}}]}}]}}"),
            &format!("spec.egress[0].to[0].ipBlock.{expected}"),
        );
    };
    block("{cidr: 10.0.0.0}", "cidr: `10.0.0.0` is not a CIDR");
    block("{cidr: 10.0.0.0/33}", "cidr: `10.0.0.0/33` is not a CIDR");
    block("{cidr: ''}", "cidr: `` is not a CIDR");
    block(
        "{cidr: 10.0.0.0/8, except: [10.1.0.0/16, 10.2.0.0/x]}",
        "except[1]: `10.2.0.0/x` is not a CIDR",
    );
    for except in ["11.0.0.0/16", "10.0.0.0/8", "10.0.0.0/7", "fd00::/64"] {
        block(
            &format!("{{cidr: 10.0.0.0/8, except: ['{except}']}}"),
            &format!("except[0]: `{except}` is not a part of `10.0.0.0/8`"),
        );
    }
}

#[test]
fn ports_are_checked() {
    let port = |port: &str, expected: &str| {
        // Also where the policy type leaves the rule without effect.
        for types in ["[Ingress, Egress]", "[Egress]"] {
            refused(
                &format!("{{policyTypes: {types}, ingress: [{{ports: [{{port: 80}}, {port}]}}]}}"),
                &format!("spec.ingress[0].ports[1].{expected}"),
            );
        }
    };
    port(
        "{protocol: tcp}",
        "protocol: `tcp` is not a protocol: `TCP`, `UDP` or `SCTP`",
    );
    port("{port: 0}", "port: 0 is not a port: 1 to 65535");
    port("{port: -1}", "port: -1 is not a port: 1 to 65535");
    port("{port: 65536}", "port: 65536 is not a port: 1 to 65535");
    port(
        "{port: '80'}",
        "port: `80` is not the name of a port: at most 15 lower case letters, digits and `-`, at least one letter",
    );
    port("{endPort: 80}", "endPort: stands without a `port`");
    port(
        "{port: http, endPort: 80}",
        "endPort: stands beside a `port` that is a name",
    );
    port(
        "{port: 80, endPort: 79}",
        "endPort: 79 is less than `port`, 80",
    );
    port(
        "{port: 80, endPort: 65536}",
        "endPort: 65536 is not a port: 1 to 65535",
    );
}

#[test]
fn names_are_checked() {
    for (metadata, expected) in [
        ("{name: web}", "?/web: metadata.namespace: is missing"),
        ("{namespace: shop}", "shop/?: metadata.name: is missing"),
        (
            "{namespace: Shop, name: web}",
            "Shop/web: metadata.namespace: `Shop` is not a name that Kubernetes accepts",
        ),
        (
            "{namespace: shop, name: a_b}",
            "shop/a_b: metadata.name: `a_b` is not a name that Kubernetes accepts",
        ),
    ] {
        let policy = serde_yaml::from_str(&format!("metadata: {metadata}")).unwrap();
        let error = Policies::compile([&policy]).unwrap_err().to_string();
        assert_eq!(error, format!("NetworkPolicy {expected}"));
    }
}

#[test]
fn a_second_policy_of_one_name_is_refused_and_the_first_stays() {
    let mut compiler = Compiler::default();
    compiler.add(&policy("{ingress: [{}]}")).unwrap();
    let error = compiler.add(&policy("{}")).unwrap_err();
    assert_eq!(error.problem, Problem::Duplicate);
    let policies = compiler.finish();
    let id = policies.find("shop", "web").unwrap();
    assert_eq!(policies.get(id).rules_for(Direction::Ingress), Some(1));
    assert_eq!(policies.len(), 1);
}

#[test]
fn a_policy_concerns_what_it_says_and_else_what_it_has() {
    use Direction::{Egress, Ingress};
    for (spec, ingress, egress) in [
        ("{}", Some(0), None),
        ("{egress: []}", Some(0), None),
        ("{egress: [{}]}", Some(0), Some(1)),
        ("{policyTypes: [], egress: [{}]}", Some(0), Some(1)),
        ("{policyTypes: [Ingress], egress: [{}]}", Some(0), None),
        ("{policyTypes: [Egress], ingress: [{}]}", None, Some(0)),
        ("{policyTypes: [Egress, Ingress]}", Some(0), Some(0)),
    ] {
        let policies = Policies::compile([&policy(spec)]).unwrap();
        let policy = policies.get(policies.find("shop", "web").unwrap());
        assert_eq!(policy.rules_for(Ingress), ingress, "{spec}");
        assert_eq!(policy.rules_for(Egress), egress, "{spec}");
    }
}

#[test]
fn ipv4_written_as_ipv6_is_ipv4_and_bits_behind_the_prefix_are_ignored() {
    let policies = Policies::compile([&policy(
        "{egress: [{to: [{ipBlock: {cidr: '::ffff:10.0.0.7/120'}}, {ipBlock: {cidr: 192.0.2.1/32}}]}]}",
    )])
    .unwrap();
    for (address, blocks) in [
        ("10.0.0.1", 1),
        ("::ffff:10.0.0.255", 1),
        ("10.0.1.0", 0),
        ("192.0.2.1", 1),
        ("::ffff:192.0.2.1", 1),
        ("192.0.2.2", 0),
    ] {
        let found = policies.blocks_of(address.parse().unwrap());
        assert_eq!(found.len(), blocks, "{address}");
    }
}
