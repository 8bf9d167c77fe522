//! Proofs and diffs of small cases, and of what is synthesised for random ledgers.

use std::sync::Arc;

use flow::record::{
    Direction::{Egress, Ingress},
    FlowRecord,
};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use proptest::prelude::*;

use super::*;
use crate::{
    ledger::Edge,
    policy::{Granularity, Namespaces, Options, Reason},
    samples::{
        address, any_records, bare, host_pod, ledger, node, pod, record, served, service,
        synthesise,
    },
};

fn policies(specs: &[(&str, &str)]) -> Policies {
    let policies: Vec<NetworkPolicy> = specs
        .iter()
        .map(|(name, spec)| {
            let text = format!("metadata: {{namespace: shop, name: {name}}}\nspec: {spec}");
            serde_yaml::from_str(&text).unwrap()
        })
        .collect();
    Policies::compile(&policies).unwrap()
}

fn edges(records: impl IntoIterator<Item = FlowRecord>) -> Vec<Edge> {
    ledger(records).edges()
}

fn app(name: &str) -> String {
    format!("{{matchLabels: {{app: {name}}}}}")
}

/// `web` calls `db` and something outside; `db` lets only `web` through, to one port more than was used.
#[test]
fn a_proof_counts_flows_and_pairs() {
    let (web, db) = (
        served("shop", "web", "node-1"),
        served("shop", "db", "node-2"),
    );
    let outside = flow::endpoint::Endpoint::External(address("192.0.2.1"));
    let edges = edges([
        record(Egress, web.clone(), db.clone(), 3306, 2),
        record(Egress, web.clone(), outside, 443, 1),
        record(Ingress, node("node-2"), db.clone(), 3306, 5),
        record(Ingress, node("node-1"), db, 3306, 7),
    ]);
    let policies = policies(&[(
        "db",
        &format!(
            "{{podSelector: {}, ingress: [{{from: [{{podSelector: {}}}], ports: [{{port: 3306, endPort: 3307}}]}}]}}",
            app("db"),
            app("web")
        ),
    )]);
    let proof = prove(&edges, &policies, &World::of_edges(&edges));
    assert_eq!(proof.allowed, 3);
    let [denied] = proof.denied.as_slice() else {
        panic!("{:?}", proof.denied);
    };
    assert_eq!(denied.client, "node node-1");
    assert_eq!(denied.count, 7);
    let denial = Denial {
        direction: Ingress,
        policies: vec!["shop/db".to_owned()],
    };
    assert_eq!(denied.denials, [denial]);
    // Among web, db, two nodes and the outside, but not among the last three.
    assert_eq!(proof.reachable_before, 5 * 4 - 3 * 2);
    // Neither node-1 nor the outside reaches db any longer; its own node does.
    assert_eq!(proof.reachable_after, 14 - 2);
    assert_eq!(proof.unrestricted, 11);
    assert_eq!(proof.never_seen, 1);
    let [rule] = proof.never_seen_by_rule.as_slice() else {
        panic!("{:?}", proof.never_seen_by_rule);
    };
    assert_eq!(rule.rule.to_string(), "ingress[0] of shop/db");
    assert_eq!(
        rule.examples[0].to_string(),
        "shop/web -> shop/db 3306-3307/TCP"
    );
}

#[test]
fn pods_with_the_same_labels_are_one_endpoint_that_can_reach_itself() {
    let [one, other] = ["node-1", "node-2"].map(|node| served("shop", "web", node));
    let edges = edges([record(Egress, one, other, 80, 1)]);
    let world = World::of_edges(&edges);
    // The nodes of the pods are known, but no address of them.
    let proof = prove(&edges, &Policies::default(), &world);
    assert_eq!((proof.reachable_before, proof.reachable_after), (1, 1));
    let closed = policies(&[("web", "{}")]);
    let proof = prove(&edges, &closed, &world);
    assert_eq!((proof.reachable_before, proof.reachable_after), (1, 0));
}

#[test]
fn an_edge_to_a_service_needs_every_backend() {
    let called = flow::endpoint::Endpoint::Service(service("shop", "db"));
    let web = served("shop", "web", "node-1");
    let mut odd = pod("shop", "db", "node-3");
    Arc::make_mut(&mut odd.labels).insert("role".to_owned(), "odd".to_owned());
    let edges = edges([
        record(Egress, web.clone(), called, 3306, 1),
        record(Ingress, web.clone(), served("shop", "db", "node-2"), 80, 1),
        record(Ingress, web, bare(odd), 80, 1),
    ]);
    let world = World::of_edges(&edges);
    let denied = |spec: &str| {
        prove(&edges, &policies(&[("p", spec)]), &world)
            .denied
            .len()
    };
    let on_port = |port: u16| format!("[{{ports: [{{port: 80}}, {{port: {port}}}]}}]");
    let odd = "podSelector: {matchLabels: {role: odd}}";
    assert_eq!(denied(&format!("{{{odd}, ingress: {}}}", on_port(81))), 1);
    assert_eq!(denied(&format!("{{{odd}, ingress: {}}}", on_port(3306))), 0);
}

#[test]
fn a_service_without_known_pods_is_judged_by_its_selector() {
    let called = flow::endpoint::Endpoint::Service(service("shop", "db"));
    let edges = edges([record(
        Egress,
        served("shop", "web", "node-1"),
        called,
        3306,
        1,
    )]);
    let world = World::of_edges(&edges);
    for (spec, denied) in [
        (format!("{{podSelector: {}}}", app("db")), 1),
        (format!("{{podSelector: {}}}", app("cache")), 0),
        (
            format!(
                "{{policyTypes: [Egress], egress: [{{to: [{{podSelector: {}}}]}}]}}",
                app("db")
            ),
            0,
        ),
        (
            format!(
                "{{policyTypes: [Egress], egress: [{{to: [{{podSelector: {}}}]}}]}}",
                app("web")
            ),
            1,
        ),
    ] {
        let proof = prove(&edges, &policies(&[("p", &spec)]), &world);
        assert_eq!(proof.denied.len(), denied, "{spec}");
    }
}

#[test]
fn all_rules_that_let_a_connection_through_are_found_and_the_first_is_named() {
    let edges = edges([record(
        Ingress,
        served("shop", "web", "node-1"),
        served("shop", "db", "node-2"),
        3306,
        1,
    )]);
    let world = World::of_edges(&edges);
    let rule = "{from: [{podSelector: {}}]}";
    let policies = policies(&[
        (
            "b",
            &format!("{{ingress: [{{ports: [{{port: 80}}]}}, {rule}, {{}}, {rule}]}}"),
        ),
        (
            "a",
            "{ingress: [{from: [{ipBlock: {cidr: 192.0.2.0/24}}]}]}",
        ),
    ]);
    let judge = Judge::new(&world, &policies);
    let connection = connections(&world, &edges[0]).next().unwrap();
    let rules = judge.rules(&connection, Ingress);
    let names: Vec<String> = rules
        .iter()
        .map(|rule| RuleName::new(*rule, &policies).to_string())
        .collect();
    assert_eq!(
        names,
        [
            "ingress[1] of shop/b",
            "ingress[2] of shop/b",
            "ingress[3] of shop/b"
        ]
    );
    assert_eq!(
        judge.verdict(&connection).ingress,
        Ruling::Allowed(rules[0])
    );
    assert_eq!(judge.verdict(&connection).egress, Ruling::NotIsolated);
    assert_eq!(judge.rules(&connection, Egress), []);
}

#[test]
fn a_pod_that_the_cluster_knows_to_be_in_its_nodes_network_is_its_node() {
    let scope = pod("weave", "scope", "node-2");
    let mut known = pod("weave", "scope", "node-2");
    known.host_network = true;
    let db = served("shop", "db", "node-2");
    let edges = edges([record(Ingress, bare(scope), db, 3306, 1)]);
    let policies = policies(&[("db", "{}")]);
    assert_eq!(
        prove(&edges, &policies, &World::of_edges(&edges))
            .denied
            .len(),
        1
    );
    let mut world = World::default();
    let id = (&*known.uid, "weave", &*known.name);
    world.add_host_pod(id, &known.labels, "node-2", &[]);
    world.add_edges(&edges);
    assert_eq!(prove(&edges, &policies, &world).denied, []);

    let said = [record(
        Ingress,
        host_pod("weave", "scope", "node-2"),
        served("shop", "db", "node-2"),
        3306,
        1,
    )];
    let edges = ledger(said).edges();
    assert_eq!(
        prove(&edges, &policies, &World::of_edges(&edges)).denied,
        []
    );
}

/// Compares two policies over a world that is made up from both.
fn changes(before: &str, after: &str) -> Vec<String> {
    let [before, after] = [before, after].map(|spec| policies(&[("p", spec)]));
    let world = Symbolic::new(&[&before, &after]).world;
    diff(&world, &before, &after)
        .changes
        .iter()
        .map(|change| {
            let sign = match change.effect {
                Effect::Opened => '+',
                Effect::Closed => '-',
            };
            let ports: Vec<String> = change.ports.iter().map(ToString::to_string).collect();
            let ends = format!("{} -> {}", change.source, change.destination);
            format!("{sign} {ends} {}", ports.join(" "))
        })
        .collect()
}

/// A policy for `db` with one rule.
fn for_db(from: &str, ports: &str) -> String {
    format!(
        "{{podSelector: {}, ingress: [{{from: [{from}], ports: [{ports}]}}]}}",
        app("db")
    )
}

#[test]
fn different_texts_of_one_meaning_do_not_differ() {
    let web = for_db(
        &format!("{{podSelector: {}}}", app("web")),
        "{port: 80}, {port: 81}",
    );
    for other in [
        for_db(
            "{podSelector: {matchExpressions: [{key: app, operator: In, values: [web]}]}}",
            "{port: 80, endPort: 81, protocol: TCP}",
        ),
        for_db(
            &format!(
                "{{namespaceSelector: {{matchLabels: {{{NAMESPACE_NAME}: shop}}}}, podSelector: {}}}",
                app("web")
            ),
            "{port: 81}, {port: 80, endPort: 80}",
        ),
    ] {
        assert_eq!(changes(&web, &other), [""; 0], "{other}");
    }
    let block = |block: &str| for_db(&format!("{{ipBlock: {block}}}"), "");
    let halves = for_db(
        "{ipBlock: {cidr: 10.0.0.0/9}}, {ipBlock: {cidr: 10.128.0.0/9}}",
        "",
    );
    assert_eq!(changes(&block("{cidr: 10.0.0.0/8}"), &halves), [""; 0]);
}

#[test]
fn what_a_policy_opens_and_closes_is_found_without_a_cluster() {
    let web = format!("{{podSelector: {}}}", app("web"));
    let (one, other) = (
        for_db(&web, "{port: 80}"),
        for_db(&web, "{port: 80, endPort: 82}"),
    );
    let opened = "shop/(app=web) -> shop/(app=db) 81-82/TCP";
    assert_eq!(changes(&one, &other), [format!("+ {opened}")]);
    assert_eq!(changes(&other, &one), [format!("- {opened}")]);

    let named = for_db(&web, "{port: http}");
    assert_eq!(
        changes(&one, &named),
        [
            "+ shop/(app=web) -> shop/(app=db) 65535/TCP",
            "- shop/(app=web) -> shop/(app=db) 80/TCP",
        ]
    );

    // An absent key matches NotIn and DoesNotExist; another value only the former.
    let absent = |operator: &str| {
        for_db(
            &format!("{{podSelector: {{matchExpressions: [{{key: tier, {operator}}}]}}}}"),
            "{port: 80}",
        )
    };
    assert_eq!(
        changes(
            &absent("operator: NotIn, values: [x]"),
            &absent("operator: DoesNotExist")
        ),
        ["- shop/(tier=any-other) -> shop/(app=db) 80/TCP"]
    );

    // Only the ends of the blocks tell them apart.
    let block = |block: &str| for_db(&format!("{{ipBlock: {block}}}"), "{port: 80}");
    assert_eq!(
        changes(
            &block("{cidr: 10.0.0.0/8}"),
            &block("{cidr: 10.0.0.0/8, except: [10.1.2.0/24]}")
        ),
        ["- 10.1.2.0 and 1 more addresses -> shop/(app=db) 80/TCP"]
    );

    let everywhere = for_db(
        &format!("{{namespaceSelector: {{}}, podSelector: {}}}", app("web")),
        "{port: 80}",
    );
    assert_eq!(
        changes(&one, &everywhere),
        ["+ (other namespaces)/(app=web) -> shop/(app=db) 80/TCP"]
    );
}

fn any_granularity() -> impl Strategy<Value = Granularity> {
    prop::sample::select(vec![
        Granularity::Namespace,
        Granularity::Service,
        Granularity::Workload,
        Granularity::Pod,
    ])
}

proptest! {
    #[test]
    fn what_is_synthesised_allows_every_edge_or_says_why_not(
        records in any_records(),
        granularity in any_granularity(),
        allow_dns in any::<bool>(),
    ) {
        let edges = ledger(records).edges();
        let options = Options {
            granularity,
            allow_dns,
            ..Options::new(Namespaces::All)
        };
        let synthesis = synthesise(&edges, &options);
        let policies = Policies::compile(&synthesis.policies).unwrap();
        let proof = prove(&edges, &policies, &World::of_edges(&edges));
        for denied in &proof.denied {
            let edge = &edges[denied.edge];
            let is_noticed = synthesis.notices.iter().any(|notice| {
                notice.client == denied.client
                    && notice.server == denied.server
                    && (notice.protocol, notice.port) == (edge.protocol, edge.port)
                    && matches!(notice.reason, Reason::Stranger | Reason::Unlabelled | Reason::NoBackends | Reason::InvalidNamespace)
            });
            prop_assert!(is_noticed, "{denied:?}\n{edge:?}\n{:?}", synthesis.policies);
        }
        prop_assert_eq!(proof.allowed + proof.denied.len(), edges.len());
    }
}
