//! Against what MicroShield itself makes of its own data (`tests/fixtures/microshield`).
//!
//! Ours differ as intended, and nowhere else:
//!
//! * a port's protocol is written, where MicroShield leaves it to the default;
//! * the rule for DNS allows TCP besides UDP;
//! * policies carry the label `app.kubernetes.io/managed-by`;
//! * endpoints without a service have rules. In this data these are the pods `weave-scope-agent`, for which MicroShield
//!   took the addresses of nodes: the extra rules are listed here one by one.

use std::{collections::BTreeSet, fs, path::PathBuf};

use super::*;
use crate::{
    flows::{self, Input, OnBadLine},
    ledger::Ledger,
};

const AGENT: &str = "{weave}{app=weave-scope,name=weave-scope-agent,weave-cloud-component=scope,weave-scope-component=agent}";

fn fixtures() -> PathBuf {
    [
        env!("CARGO_MANIFEST_DIR"),
        "..",
        "tests",
        "fixtures",
        "microshield",
    ]
    .iter()
    .collect()
}

fn edges() -> Vec<Edge> {
    let mut ledger = Ledger::default();
    let input = Input::File(fixtures().join("linked.json"));
    let summary = flows::read(&input, OnBadLine::Refuse, |record| {
        ledger.observe(record);
    })
    .unwrap();
    assert_eq!(summary.records, 725);
    ledger.edges()
}

/// Everything that the policies in `files` say, one statement a line: a policy's selector, or one port of one rule.
fn statements(files: &BTreeMap<String, String>) -> BTreeSet<String> {
    let mut statements = BTreeSet::new();
    for (name, text) in files {
        let mut policy: NetworkPolicy = serde_yaml::from_str(text).unwrap();
        assert_eq!(
            *name,
            format!("{}.yaml", policy.metadata.name.as_deref().unwrap())
        );
        let spec = policy.spec.as_mut().unwrap();
        let ingress = spec
            .ingress
            .iter_mut()
            .flatten()
            .map(|rule| &mut rule.ports);
        let egress = spec.egress.iter_mut().flatten().map(|rule| &mut rule.ports);
        for port in ingress.chain(egress).flatten().flatten() {
            port.protocol.get_or_insert_with(|| "TCP".to_owned());
        }
        let namespace = policy.metadata.namespace.clone().unwrap();
        for line in describe(&policy) {
            let words: Vec<&str> = line.split(' ').collect();
            let (head, ports) = words.split_at(words.len().min(3));
            if ports.is_empty() {
                statements.insert(format!("{namespace}: {}", head.join(" ")));
            }
            for port in ports {
                statements.insert(format!("{namespace}: {} {port}", head.join(" ")));
            }
        }
    }
    statements
}

fn check_golden(namespace: &str, granularity: Granularity, case: &str, extra: &[&str]) {
    let golden: BTreeMap<String, String> = fs::read_dir(fixtures().join("golden").join(case))
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| {
            (
                entry.file_name().into_string().unwrap(),
                fs::read_to_string(entry.path()).unwrap(),
            )
        })
        .collect();
    assert!(!golden.is_empty());
    let mut options = options(namespace, granularity);
    options.allow_dns = true;
    let ours = synthesise(&edges(), &options).files;

    let mut expected = statements(&golden);
    let dns_over_tcp: Vec<String> = expected
        .iter()
        .filter_map(|statement| statement.strip_suffix("53/UDP"))
        .map(|rule| format!("{rule}53/TCP"))
        .collect();
    assert_eq!(dns_over_tcp.len(), golden.len());
    expected.extend(dns_over_tcp);
    for statement in extra {
        let new = expected.insert(format!(
            "{namespace}: {}",
            statement.replace("AGENT", AGENT)
        ));
        assert!(new, "{statement} is in {case}");
    }
    assert_eq!(statements(&ours), expected, "{case}");
}

#[test]
fn bookinfo_by_service() {
    check_golden(
        "default",
        Granularity::Service,
        "default-svc",
        &["policy-productpage < AGENT 9080/TCP"],
    );
}

#[test]
fn bookinfo_by_namespace() {
    check_golden(
        "default",
        Granularity::Namespace,
        "default-ns",
        &["policy-default < AGENT 9080/TCP"],
    );
}

#[test]
fn sock_shop_by_service() {
    check_golden(
        "sock-shop",
        Granularity::Service,
        "sock-shop-svc",
        &[
            "policy-catalogue < AGENT 80/TCP",
            "policy-front-end < AGENT 8079/TCP",
            "policy-user < AGENT 80/TCP",
        ],
    );
}

#[test]
fn sock_shop_by_namespace() {
    check_golden(
        "sock-shop",
        Granularity::Namespace,
        "sock-shop-ns",
        &[
            "policy-sock-shop < AGENT 80/TCP",
            "policy-sock-shop < AGENT 8079/TCP",
        ],
    );
}

#[test]
fn pods_without_a_service_are_named_after_their_controllers() {
    let synthesis = synthesise(&edges(), &options("weave", Granularity::Service));
    let names: Vec<&str> = synthesis
        .policies
        .iter()
        .map(|policy| policy.metadata.name.as_deref().unwrap())
        .collect();
    assert_eq!(
        names,
        [
            "policy-weave-scope-agent",
            "policy-weave-scope-app",
            "policy-weave-scope-cluster-agent",
        ]
    );
}
