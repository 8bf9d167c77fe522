//! Policies as text: what each selects, and what each lets through.

mod addresses;
mod api_server;
mod golden;
mod minimal;
mod properties;

use std::{collections::BTreeMap, sync::Arc};

use flow::{
    endpoint::{Endpoint, Labels, Pod, Workload},
    record::{
        Direction::{Egress, Ingress},
        FlowRecord, Protocol,
    },
    time::Timestamp,
};
use k8s_openapi::{
    api::networking::v1::{NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort},
    apimachinery::pkg::{apis::meta::v1::LabelSelector, util::intstr::IntOrString},
};

use super::*;
use crate::ledger::Edge;
use crate::samples::{
    address, at, bare, host_pod, labels, ledger, node, pod, record, served, service, synthesise,
    unlabelled, without_selector,
};

fn options(namespace: &str, granularity: Granularity) -> Options {
    Options {
        granularity,
        allow_dns: false,
        ..Options::new(Namespaces::Only([namespace.to_owned()].into()))
    }
}

/// The policies and notices for the namespace `shop`, per service and without the rule for DNS.
fn check(records: impl IntoIterator<Item = FlowRecord>, expected: &[&str]) {
    check_with(records, &options("shop", Granularity::Service), expected);
}

fn check_with(records: impl IntoIterator<Item = FlowRecord>, options: &Options, expected: &[&str]) {
    let synthesis = synthesise(&ledger(records).edges(), options);
    let mut lines: Vec<String> = synthesis.policies.iter().flat_map(describe).collect();
    lines.extend(synthesis.notices.iter().map(|notice| {
        format!(
            "{:?}: {} -> {}:{}",
            notice.reason, notice.client, notice.server, notice.port
        )
    }));
    assert_eq!(lines, expected, "\n{}", lines.join("\n"));
}

/// `NAME {selector}`, then one line a rule: `NAME < peer ports` for ingress, `NAME > peer ports` for egress.
fn describe(policy: &NetworkPolicy) -> Vec<String> {
    let spec = policy.spec.as_ref().unwrap();
    let name = policy.metadata.name.as_deref().unwrap();
    let mut lines = vec![format!("{name} {}", selector(spec.pod_selector.as_ref()))];
    for rule in spec.ingress.iter().flatten() {
        let (peers, ports) = (rule.from.as_ref().unwrap(), rule.ports.as_ref().unwrap());
        lines.push(format!("{name} < {} {}", peer(peers), ports_text(ports)));
    }
    for rule in spec.egress.iter().flatten() {
        let (peers, ports) = (rule.to.as_ref().unwrap(), rule.ports.as_ref().unwrap());
        lines.push(format!("{name} > {} {}", peer(peers), ports_text(ports)));
    }
    lines
}

fn peer(peers: &[NetworkPolicyPeer]) -> String {
    let [peer] = peers else {
        panic!("one peer a rule: {peers:?}");
    };
    match &peer.ip_block {
        Some(block) => block.cidr.clone(),
        None => format!(
            "{}{}",
            selector(peer.namespace_selector.as_ref()).replace("kubernetes.io/metadata.name=", ""),
            peer.pod_selector
                .as_ref()
                .map_or_else(String::new, |pods| selector(Some(pods)))
        ),
    }
}

fn selector(selector: Option<&LabelSelector>) -> String {
    let labels = selector.unwrap().match_labels.clone().unwrap_or_default();
    let pairs: Vec<String> = labels
        .iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    format!("{{{}}}", pairs.join(","))
}

fn ports_text(ports: &[NetworkPolicyPort]) -> String {
    let ports: Vec<String> = ports
        .iter()
        .map(|port| match port.port {
            Some(IntOrString::Int(number)) => {
                let protocol = port.protocol.as_deref().unwrap();
                match port.end_port {
                    Some(end) => format!("{number}-{end}/{protocol}"),
                    None => format!("{number}/{protocol}"),
                }
            }
            _ => panic!("{port:?}"),
        })
        .collect();
    ports.join(" ")
}

fn web() -> Endpoint {
    served("shop", "web", "node-1")
}

fn db() -> Endpoint {
    served("shop", "db", "node-2")
}

fn with_labels(name: &str, pairs: &[(&str, &str)]) -> Pod {
    Pod {
        labels: labels(pairs).into(),
        ..pod("shop", name, "node-1")
    }
}

#[test]
fn what_two_policies_would_allow_stands_in_one() {
    let selected_by = |service_name: &str, selector: &[(&str, &str)], pods: &[(&str, &str)]| {
        let mut service = (*service("shop", service_name)).clone();
        service.selector = labels(selector);
        let mut pod = with_labels(service_name, pods);
        pod.services = vec![service_name.to_owned()].into();
        Endpoint::Pod {
            pod: Arc::new(pod),
            service: Some(Arc::new(service)),
        }
    };
    // Two services with one selector, as a headless one beside an ordinary one, and one of some of the pods.
    let app = [("app", "db")];
    let primary = [("app", "db"), ("role", "primary")];
    check(
        [
            record(Ingress, web(), selected_by("db", &app, &app), 3306, 1),
            record(
                Ingress,
                web(),
                selected_by("db-headless", &app, &app),
                3306,
                1,
            ),
            record(
                Ingress,
                web(),
                selected_by("db-primary", &primary, &primary),
                3306,
                1,
            ),
            record(
                Ingress,
                web(),
                selected_by("db-primary", &primary, &primary),
                3307,
                1,
            ),
        ],
        &[
            "policy-db {app=db}",
            "policy-db < {shop}{app=web} 3306/TCP",
            "policy-db-primary {app=db,role=primary}",
            "policy-db-primary < {shop}{app=web} 3307/TCP",
            "policy-web {app=web}",
            "policy-web > {shop}{app=db} 3306/TCP",
            "policy-web > {shop}{app=db,role=primary} 3307/TCP",
        ],
    );
}

#[test]
fn both_ends_get_a_rule_with_every_port() {
    let mut udp = record(Ingress, web(), db(), 53, 1);
    udp.protocol = Protocol::Udp;
    check(
        [
            record(Ingress, web(), db(), 9104, 1),
            record(Ingress, web(), db(), 3306, 1),
            udp,
        ],
        &[
            "policy-db {app=db}",
            "policy-db < {shop}{app=web} 3306/TCP 9104/TCP 53/UDP",
            "policy-web {app=web}",
            "policy-web > {shop}{app=db} 3306/TCP 9104/TCP 53/UDP",
        ],
    );
}

#[test]
fn only_chosen_namespaces_get_policies() {
    check(
        [
            record(Ingress, served("bank", "web", "node-1"), db(), 3306, 1),
            record(
                Ingress,
                served("bank", "web", "node-1"),
                served("bank", "db", "node-1"),
                3306,
                1,
            ),
        ],
        &["policy-db {app=db}", "policy-db < {bank}{app=web} 3306/TCP"],
    );
}

#[test]
fn a_pod_without_a_service_is_selected_by_its_workloads_stable_labels() {
    check(
        [record(
            Ingress,
            bare(pod("shop", "batch", "node-1")),
            db(),
            3306,
            1,
        )],
        &[
            "policy-batch {app=batch}",
            "policy-batch > {shop}{app=db} 3306/TCP",
            "policy-db {app=db}",
            "policy-db < {shop}{app=batch} 3306/TCP",
        ],
    );
}

#[test]
fn a_workload_is_selected_by_what_all_its_pods_have_in_common() {
    let replica = |uid: &str, build: &str| {
        let mut pod = pod("shop", "batch", "node-1");
        pod.uid = uid.to_owned();
        Arc::make_mut(&mut pod.labels).insert("build".to_owned(), build.to_owned());
        bare(pod)
    };
    check(
        [
            record(Ingress, replica("a", "1"), db(), 3306, 1),
            record(Ingress, replica("b", "2"), db(), 3306, 1),
        ],
        &[
            "policy-batch {app=batch}",
            "policy-batch > {shop}{app=db} 3306/TCP",
            "policy-db {app=db}",
            "policy-db < {shop}{app=batch} 3306/TCP",
        ],
    );
}

/// A pod of a deployment, first seen at this second.
fn of_deployment(name: &str, uid: &str, pairs: &[(&str, &str)], second: u64) -> (Endpoint, u64) {
    let mut pod = with_labels(name, pairs);
    pod.uid = uid.to_owned();
    pod.name = format!("{name}-{uid}");
    (bare(pod), second)
}

fn call_of_db((client, second): (Endpoint, u64)) -> FlowRecord {
    let mut record = record(Ingress, client, db(), 3306, 1);
    record.first_seen = Timestamp::from_nanos(second * 1_000_000_000);
    record
}

#[test]
fn a_workload_that_was_given_other_labels_does_not_select_what_it_shares_with_others() {
    let (team, other) = (("team", "shop"), [("app", "other"), ("team", "shop")]);
    let old = [("app", "web"), team, ("version", "7")];
    let new = [("app.kubernetes.io/name", "web"), team];
    let records = [
        call_of_db(of_deployment("web", "a", &old, 10)),
        call_of_db(of_deployment("web", "b", &[("app", "web"), team], 20)),
        call_of_db(of_deployment("web", "c", &new, 30)),
        call_of_db(of_deployment("other", "d", &other, 5)),
    ];
    for granularity in [Granularity::Service, Granularity::Workload] {
        check_with(
            records.clone(),
            &options("shop", granularity),
            &[
                "policy-db {app=db}",
                "policy-db < {shop}{app=other,team=shop} 3306/TCP",
                "policy-db < {shop}{app=web,team=shop} 3306/TCP",
                "policy-db < {shop}{app.kubernetes.io/name=web,team=shop} 3306/TCP",
                "policy-other {app=other,team=shop}",
                "policy-other > {shop}{app=db} 3306/TCP",
                "policy-web {app.kubernetes.io/name=web,team=shop}",
                "policy-web > {shop}{app=db} 3306/TCP",
                "policy-web-06df427a {app=web,team=shop}",
                "policy-web-06df427a > {shop}{app=db} 3306/TCP",
            ],
        );
    }
}

const DAY: u64 = 24 * 60 * 60;

/// A call of a pod that is there from one day to another.
fn call_in_days(name: &str, pairs: &[(&str, &str)], days: (u64, u64)) -> FlowRecord {
    let uid = days.0.to_string();
    let mut record = call_of_db(of_deployment(name, &uid, pairs, days.0 * DAY));
    record.last_seen = Timestamp::from_nanos(days.1 * DAY * 1_000_000_000);
    record
}

#[test]
fn a_workload_that_has_gone_is_not_told_apart_from_the_one_in_its_place() {
    let (app, front, back) = (("app", "web"), ("tier", "front"), ("tier", "back"));
    let records = |gone: u64| {
        [
            call_in_days("web", &[app, back], (1, gone)),
            call_in_days("shop-web", &[app, back], (5, 9)),
            call_in_days("shop-web", &[app, front], (20, 22)),
        ]
    };
    check(
        records(5),
        &[
            "policy-db {app=db}",
            "policy-db < {shop}{app=web} 3306/TCP",
            "policy-shop-web {app=web}",
            "policy-shop-web > {shop}{app=db} 3306/TCP",
        ],
    );
    let told_apart = |records: Vec<FlowRecord>| {
        let edges = ledger(records).edges();
        let synthesis = synthesise(&edges, &options("shop", Granularity::Service));
        let lines: Vec<String> = synthesis.policies.iter().flat_map(describe).collect();
        let selector = "policy-shop-web {app=web,tier=front}".to_owned();
        assert!(lines.contains(&selector), "{lines:?}");
    };
    // One that lives, or was there within a week, is.
    for gone in [13, 22] {
        told_apart(records(gone).into());
    }
    // And what runs now and then, whenever that was.
    let mut records = records(2);
    records[0] = run_of_cron_job("web", &[app, back], (1, 2));
    told_apart(records.into());
}

fn run_of_cron_job(name: &str, pairs: &[(&str, &str)], days: (u64, u64)) -> FlowRecord {
    let mut record = call_in_days(name, pairs, days);
    if let Endpoint::Pod { pod, .. } = &mut record.src {
        Arc::make_mut(pod).workload = Some(Arc::new(Workload {
            kind: "CronJob".to_owned(),
            name: name.to_owned(),
        }));
    }
    record
}

#[test]
fn a_release_does_not_tell_a_workload_from_one_beside_it() {
    let app = ("app", "web");
    check(
        [
            call_in_days("web", &[app, ("version", "7")], (1, 9)),
            call_in_days("web", &[app, ("version", "8")], (9, 12)),
            call_in_days("web-canary", &[app, ("version", "9")], (11, 12)),
        ],
        &[
            "policy-db {app=db}",
            "policy-db < {shop}{app=web} 3306/TCP",
            "policy-web {app=web}",
            "policy-web > {shop}{app=db} 3306/TCP",
            "Shared: shop/web-1 -> shop/db-node-2:3306",
            "Shared: shop/web-9 -> shop/db-node-2:3306",
        ],
    );
}

#[test]
fn labels_of_what_has_gone_or_has_no_controller_are_not_shared() {
    let app = [("app", "web")];
    let runner = |uid: &str| {
        let mut pod = with_labels("runner", &[("app", "runner")]);
        pod.uid = uid.to_owned();
        pod.name = format!("runner.{uid}");
        pod.workload = None;
        record(Ingress, bare(pod), db(), 3306, 1)
    };
    let notices = |records: &[FlowRecord]| {
        let edges = ledger(records.iter().cloned()).edges();
        synthesise(&edges, &options("shop", Granularity::Service)).notices
    };
    assert_eq!(notices(&[runner("a"), runner("b")]), []);
    let new = call_in_days("shop-web", &app, (14, 16));
    let old = [
        (call_in_days("web", &app, (1, 5)), 0),
        (call_in_days("web", &app, (1, 6)), 2),
        (run_of_cron_job("web", &app, (1, 2)), 2),
    ];
    for (old, expected) in old {
        assert_eq!(notices(&[old, new.clone()]).len(), expected);
    }
}

#[test]
fn labels_that_several_workloads_have_are_said_to_be_shared() {
    let team = [("team", "shop")];
    check(
        [
            call_of_db(of_deployment("web", "a", &team, 10)),
            call_of_db(of_deployment(
                "other",
                "b",
                &[("app", "other"), team[0]],
                10,
            )),
        ],
        &[
            "policy-db {app=db}",
            "policy-db < {shop}{team=shop} 3306/TCP",
            "policy-web {team=shop}",
            "policy-web > {shop}{app=db} 3306/TCP",
            "Shared: shop/web-a -> shop/db-node-2:3306",
        ],
    );
}

#[test]
fn an_empty_selector_is_never_written_for_a_pod_without_labels() {
    let address = match ledger([record(
        Ingress,
        unlabelled("shop", "job", "node-1"),
        db(),
        1,
        1,
    )])
    .edges()
    .as_slice()
    {
        [edge] => edge.client_address,
        edges => panic!("{edges:?}"),
    };
    let rule = format!("policy-db < {address}/32 3306/TCP");
    check(
        [record(
            Ingress,
            unlabelled("shop", "job", "node-1"),
            db(),
            3306,
            1,
        )],
        &[
            "policy-db {app=db}",
            &rule,
            "Unlabelled: shop/job-node-1-unlabelled -> shop/db-node-2:3306",
            "ByAddress: shop/job-node-1-unlabelled -> shop/db-node-2:3306",
        ],
    );
}

#[test]
fn the_own_node_needs_no_rule_and_other_addresses_are_exact() {
    let probe = |client| record(Ingress, client, db(), 8080, 1);
    let from = |mut record: FlowRecord, text: &str| {
        record.tuple.src_addr = address(text);
        record
    };
    let records = [
        from(probe(node("node-2")), "192.0.2.2"),
        from(
            probe(host_pod("kube-system", "agent", "node-2")),
            "192.0.2.2",
        ),
        from(probe(node("node-1")), "192.0.2.1"),
        from(probe(host_pod("kube-system", "agent", "node-1")), "fd00::1"),
        probe(Endpoint::External(address("::ffff:198.51.100.7"))),
    ];
    check(
        records.clone(),
        &[
            "policy-db {app=db}",
            "policy-db < 192.0.2.1/32 8080/TCP",
            "policy-db < 198.51.100.7/32 8080/TCP",
            "policy-db < fd00::1/128 8080/TCP",
            "OwnNode: kube-system/agent-node-2 -> shop/db-node-2:8080",
            "OwnNode: node node-2 -> shop/db-node-2:8080",
            "NodeAddress: kube-system/agent-node-1 -> shop/db-node-2:8080",
            "NodeAddress: node node-1 -> shop/db-node-2:8080",
        ],
    );
    let mut options = options("shop", Granularity::Service);
    options.own_node = OwnNode::Allow;
    check_with(
        records,
        &options,
        &[
            "policy-db {app=db}",
            "policy-db < 192.0.2.1/32 8080/TCP",
            "policy-db < 192.0.2.2/32 8080/TCP",
            "policy-db < 198.51.100.7/32 8080/TCP",
            "policy-db < fd00::1/128 8080/TCP",
            "NodeAddress: kube-system/agent-node-1 -> shop/db-node-2:8080",
            "NodeAddress: kube-system/agent-node-2 -> shop/db-node-2:8080",
            "NodeAddress: node node-1 -> shop/db-node-2:8080",
            "NodeAddress: node node-2 -> shop/db-node-2:8080",
        ],
    );
}

#[test]
fn nobody_is_let_in_by_the_word_of_one_who_cannot_say_who_it_is() {
    let outside = || Endpoint::External(address("203.0.113.9"));
    check(
        [
            record(Egress, outside(), db(), 3306, 1),
            record(Ingress, web(), outside(), 443, 1),
        ],
        &[
            "Stranger: 203.0.113.9 -> shop/db-node-2:3306",
            "Stranger: shop/web-node-1 -> 203.0.113.9:443",
        ],
    );
    // What the other end's agent saw is a rule, whoever saw it besides.
    check(
        [
            record(Egress, outside(), db(), 3306, 2),
            record(Ingress, outside(), db(), 3306, 1),
            record(Egress, web(), outside(), 443, 1),
        ],
        &[
            "policy-db {app=db}",
            "policy-db < 203.0.113.9/32 3306/TCP",
            "policy-web {app=web}",
            "policy-web > 203.0.113.9/32 443/TCP",
        ],
    );
    // Those who are known are believed: what is said of a node is said of it, and what its pods say is theirs.
    let of_node = record(Egress, node("node-1"), db(), 3306, 1);
    let rule = format!("policy-db < {}/32 3306/TCP", of_node.tuple.src_addr);
    let notice = "NodeAddress: node node-1 -> shop/db-node-2:3306";
    check([of_node], &["policy-db {app=db}", &rule, notice]);
}

#[test]
fn the_address_of_a_pod_without_labels_takes_more_than_its_own_agents_word() {
    let job = || unlabelled("bank", "job", "node-1");
    check(
        [
            at(
                ("203.0.113.9", "10.0.0.2"),
                record(Egress, job(), db(), 3306, 1),
            ),
            at(
                ("10.0.0.1", "203.0.113.9"),
                record(Ingress, web(), job(), 443, 1),
            ),
        ],
        &[
            "Stranger: bank/job-node-1-unlabelled -> shop/db-node-2:3306",
            "Stranger: shop/web-node-1 -> bank/job-node-1-unlabelled:443",
        ],
    );
    check(
        [
            at(
                ("10.0.0.9", "10.0.0.2"),
                record(Egress, job(), db(), 3306, 1),
            ),
            at(
                ("10.0.0.9", "10.0.0.2"),
                record(Ingress, job(), db(), 3306, 1),
            ),
        ],
        &[
            "policy-db {app=db}",
            "policy-db < 10.0.0.9/32 3306/TCP",
            "ByAddress: bank/job-node-1-unlabelled -> shop/db-node-2:3306",
        ],
    );
}

#[test]
fn a_pod_in_its_nodes_network_is_a_peer_but_has_no_policy() {
    let mut call = record(Ingress, web(), host_pod("shop", "proxy", "node-2"), 443, 1);
    call.tuple.dst_addr = address("192.0.2.2");
    check(
        [call],
        &[
            "policy-web {app=web}",
            "policy-web > 192.0.2.2/32 443/TCP",
            "HostNetwork: shop/web-node-1 -> shop/proxy-node-2:443",
            "NodeAddress: shop/web-node-1 -> shop/proxy-node-2:443",
        ],
    );
}

#[test]
fn a_service_stands_for_its_pods_or_its_backends() {
    let mut unknown = (*without_selector("shop", "unknown")).clone();
    unknown.backends.clear();
    let to = |service| record(Ingress, web(), Endpoint::Service(service), 443, 1);
    check(
        [
            to(service("shop", "queue")),
            to(without_selector("default", "kubernetes")),
            to(Arc::new(unknown)),
        ],
        &[
            "policy-queue {app=queue}",
            "policy-queue < {shop}{app=web} 443/TCP",
            "policy-web {app=web}",
            "policy-web > {shop}{app=queue} 443/TCP",
            "policy-web > 198.51.100.1/32 443/TCP",
            "policy-web > 2001:db8::2/128 443/TCP",
            "NoBackends: shop/web-node-1 -> service shop/unknown:443",
            "NodeAddress: shop/web-node-1 -> service default/kubernetes:443",
        ],
    );
}

#[test]
fn a_selector_that_does_not_select_the_pod_is_not_used() {
    let mut stale = (*service("shop", "stale")).clone();
    stale.selector = labels(&[("app", "other")]);
    let mut volatile = (*service("shop", "volatile")).clone();
    volatile.selector = labels(&[("pod-template-hash", "5f495f9cf8")]);
    let client = |service: Arc<_>, services: &[&str]| {
        let mut pod = pod("shop", "web", "node-1");
        pod.services = services.iter().map(|name| (*name).to_owned()).collect();
        Endpoint::Pod {
            pod: Arc::new(pod),
            service: Some(service),
        }
    };
    let named_elsewhere = record(
        Ingress,
        db(),
        Endpoint::Service(service("shop", "web")),
        80,
        1,
    );
    check(
        [
            record(
                Ingress,
                client(Arc::new(stale), &["stale", "web"]),
                db(),
                1,
                1,
            ),
            named_elsewhere,
        ],
        &[
            "policy-db {app=db}",
            "policy-db < {shop}{app=web} 1/TCP",
            "policy-db > {shop}{app=web} 80/TCP",
            "policy-web {app=web}",
            "policy-web < {shop}{app=db} 80/TCP",
            "policy-web > {shop}{app=db} 1/TCP",
        ],
    );
    check(
        [record(Ingress, client(Arc::new(volatile), &[]), db(), 1, 1)],
        &[
            "policy-db {app=db}",
            "policy-db < {shop}{app=web} 1/TCP",
            "policy-web {app=web}",
            "policy-web > {shop}{app=db} 1/TCP",
        ],
    );
}

#[test]
fn granularities_decide_which_pods_share_a_policy() {
    let mut frontend = pod("shop", "web", "node-1");
    Arc::make_mut(&mut frontend.labels).insert("track".to_owned(), "canary".to_owned());
    frontend.workload = Some(Arc::new(Workload {
        kind: "Deployment".to_owned(),
        name: "web-canary".to_owned(),
    }));
    let frontend = Endpoint::Pod {
        pod: Arc::new(frontend),
        service: Some(service("shop", "web")),
    };
    let mut replica = with_labels(
        "db",
        &[
            ("app", "db"),
            ("statefulset.kubernetes.io/pod-name", "db-0"),
        ],
    );
    replica.name = "db-0".to_owned();
    replica.workload = Some(Arc::new(Workload {
        kind: "StatefulSet".to_owned(),
        name: "db".to_owned(),
    }));
    let records = [record(Ingress, frontend, bare(replica), 3306, 1)];
    for (granularity, expected) in [
        (
            Granularity::Namespace,
            [
                "policy-shop {}",
                "policy-shop < {shop}{app=web} 3306/TCP",
                "policy-shop > {shop}{app=db} 3306/TCP",
            ]
            .as_slice(),
        ),
        (
            Granularity::Service,
            &[
                "policy-db {app=db}",
                "policy-db < {shop}{app=web} 3306/TCP",
                "policy-web {app=web}",
                "policy-web > {shop}{app=db} 3306/TCP",
            ],
        ),
        (
            Granularity::Workload,
            &[
                "policy-db {app=db}",
                "policy-db < {shop}{app=web,track=canary} 3306/TCP",
                "policy-web-canary {app=web,track=canary}",
                "policy-web-canary > {shop}{app=db} 3306/TCP",
            ],
        ),
        (
            Granularity::Pod,
            &[
                "policy-db-0 {app=db,statefulset.kubernetes.io/pod-name=db-0}",
                "policy-db-0 < {shop}{app=web,track=canary} 3306/TCP",
                "policy-web-canary {app=web,track=canary}",
                "policy-web-canary > {shop}{app=db,statefulset.kubernetes.io/pod-name=db-0} 3306/TCP",
            ],
        ),
    ] {
        check_with(records.clone(), &options("shop", granularity), expected);
    }
}

#[test]
fn the_rule_for_dns_stands_first_and_covers_what_was_seen() {
    let mut dns = pod("kube-system", "coredns", "node-2");
    dns.labels = labels(&[("k8s-app", "kube-dns")]).into();
    let mut query = record(Ingress, web(), bare(dns.clone()), 53, 1);
    query.protocol = Protocol::Udp;
    let records = [query, record(Ingress, web(), bare(dns), 9153, 1)];
    let mut options = options("shop", Granularity::Service);
    check_with(
        records.clone(),
        &options,
        &[
            "policy-web {app=web}",
            "policy-web > {kube-system}{k8s-app=kube-dns} 9153/TCP 53/UDP",
        ],
    );
    options.allow_dns = true;
    check_with(
        records,
        &options,
        &[
            "policy-web {app=web}",
            "policy-web > {}{k8s-app=kube-dns} 53/TCP 53/UDP",
            "policy-web > {kube-system}{k8s-app=kube-dns} 9153/TCP",
        ],
    );
}

#[test]
fn the_clusters_dns_answers_all_pods() {
    let mut dns = pod("kube-system", "coredns", "node-2");
    dns.labels = labels(&[("k8s-app", "kube-dns"), ("app", "coredns")]).into();
    let records = [
        record(Ingress, web(), bare(dns.clone()), 53, 1),
        record(Ingress, web(), bare(dns), 9153, 1),
        record(
            Ingress,
            web(),
            served("kube-system", "api", "node-1"),
            53,
            1,
        ),
    ];
    let policies = |granularity, allow_dns| {
        let mut options = options("kube-system", granularity);
        options.allow_dns = allow_dns;
        let synthesis = synthesise(&ledger(records.clone()).edges(), &options);
        let ingress = |line: &String| line.contains(" < ");
        let lines = synthesis.policies.iter().flat_map(describe);
        lines.filter(ingress).collect::<Vec<_>>()
    };
    assert_eq!(
        policies(Granularity::Service, true),
        [
            "policy-api < {shop}{app=web} 53/TCP",
            "policy-coredns < {} 53/TCP 53/UDP",
            "policy-coredns < {shop}{app=web} 9153/TCP",
        ]
    );
    assert_eq!(
        policies(Granularity::Namespace, true),
        [
            "policy-kube-system < {} 53/TCP 53/UDP",
            "policy-kube-system < {shop}{app=web} 9153/TCP",
        ]
    );
    assert_eq!(
        policies(Granularity::Service, false),
        [
            "policy-api < {shop}{app=web} 53/TCP",
            "policy-coredns < {shop}{app=web} 53/TCP 9153/TCP",
        ]
    );
}

/// Queries over UDP are not captured, so no DNS pod need be in the records of a cluster that depends on it.
#[test]
fn the_namespace_of_the_clusters_dns_answers_all_pods_though_no_query_was_seen() {
    let to = |namespace| record(Ingress, web(), served(namespace, "ms", "node-2"), 443, 1);
    let policies = |namespace, granularity, allow_dns| {
        let mut options = options(namespace, granularity);
        options.allow_dns = allow_dns;
        let synthesis = synthesise(&ledger([to(namespace)]).edges(), &options);
        let ingress = |line: &String| line.contains(" < ");
        let lines = synthesis.policies.iter().flat_map(describe);
        lines.filter(ingress).collect::<Vec<_>>()
    };
    assert_eq!(
        policies("kube-system", Granularity::Namespace, true),
        [
            "policy-kube-system < {} 53/TCP 53/UDP",
            "policy-kube-system < {shop}{app=web} 443/TCP",
        ]
    );
    let closed = ["policy-kube-system < {shop}{app=web} 443/TCP"];
    assert_eq!(
        policies("kube-system", Granularity::Namespace, false),
        closed
    );
    assert_eq!(
        policies("kube-system", Granularity::Service, true),
        ["policy-ms < {shop}{app=web} 443/TCP"]
    );
    assert_eq!(
        policies("bank", Granularity::Namespace, true),
        ["policy-bank < {shop}{app=web} 443/TCP"]
    );
}

#[test]
fn a_query_that_the_rules_for_dns_allow_is_not_said_to_be_left_out() {
    let mut dns = pod("kube-system", "coredns", "node-2");
    dns.labels = labels(&[("k8s-app", "kube-dns")]).into();
    let from = |client, server: &Pod| record(Ingress, client, bare(server.clone()), 53, 1);
    let records = [
        record(Ingress, web(), db(), 3306, 5),
        from(web(), &dns),
        from(web(), &pod("shop", "own-dns", "node-1")),
        from(node("node-1"), &dns),
    ];
    let options = Options {
        allow_dns: true,
        min_count: 2,
        namespaces: Namespaces::All,
        ..options("shop", Granularity::Service)
    };
    let notices = |options: &Options| {
        let notices = synthesise(&ledger(records.clone()).edges(), options).notices;
        let notices = notices.iter();
        notices
            .map(|notice| format!("{} -> {}", notice.client, notice.server))
            .collect::<Vec<_>>()
    };
    let left_out = [
        "node node-1 -> kube-system/coredns-node-2",
        "shop/web-node-1 -> shop/own-dns-node-1",
    ];
    assert_eq!(notices(&options), left_out);
    let options = Options {
        allow_dns: false,
        ..options
    };
    assert_eq!(notices(&options).len(), 3);
}

/// The hashes are those of FNV-1a over the targets' texts: names must not change between versions.
#[test]
fn names_are_valid_and_do_not_collide() {
    let named = |name: &str, kind: &str, app: &str| {
        let mut pod = with_labels(app, &[("app", app)]);
        pod.workload = Some(Arc::new(Workload {
            kind: kind.to_owned(),
            name: name.to_owned(),
        }));
        bare(pod)
    };
    let long = "x".repeat(200);
    let records = [
        record(Ingress, named("db", "DaemonSet", "a"), db(), 1, 1),
        record(Ingress, named("db", "StatefulSet", "b"), db(), 1, 1),
        record(Ingress, named(&long, "Deployment", "c"), db(), 1, 1),
        record(Ingress, named("../Ä", "Deployment", "d"), db(), 1, 1),
    ];
    let synthesis = synthesise(
        &ledger(records).edges(),
        &options("shop", Granularity::Service),
    );
    let names: Vec<&str> = synthesis
        .policies
        .iter()
        .map(|policy| policy.metadata.name.as_deref().unwrap())
        .collect();
    let shortened = format!("policy-{}-f1875b35", "x".repeat(164));
    assert_eq!(
        names,
        [
            "policy-56e920c3",
            "policy-db",
            "policy-db-4a8109c7",
            "policy-db-bab3ef5b",
            &shortened,
        ]
    );
    assert!(names.iter().all(|name| crate::syntax::is_subdomain(name)));
}

#[test]
fn a_name_that_is_none_for_a_namespace_is_left_out() {
    let record = record(Ingress, served("../etc", "web", "node-1"), db(), 3306, 1);
    let mut all = options("shop", Granularity::Service);
    all.namespaces = Namespaces::All;
    check_with(
        [record],
        &all,
        &["InvalidNamespace: ../etc/web-node-1 -> shop/db-node-2:3306"],
    );
}

#[test]
fn files_of_several_namespaces_lie_side_by_side() {
    let edges = ledger([record(
        Ingress,
        served("bank", "db", "node-1"),
        db(),
        3306,
        1,
    )])
    .edges();
    let mut all = options("shop", Granularity::Service);
    all.namespaces = Namespaces::All;
    let files = synthesise(&edges, &all).files;
    assert_eq!(
        files.keys().collect::<Vec<_>>(),
        ["bank.policy-db.yaml", "shop.policy-db.yaml"]
    );
    let one = options("shop", Granularity::Service);
    let files = synthesise(&edges, &one).files;
    assert_eq!(files.keys().collect::<Vec<_>>(), ["policy-db.yaml"]);
}

#[test]
fn a_policy_is_written_as_kubectl_prints_it() {
    let mut options = options("shop", Granularity::Service);
    options.allow_dns = true;
    let edges = ledger([record(
        Ingress,
        served("bank", "yes", "node-1"),
        db(),
        3306,
        1,
    )])
    .edges();
    let files = synthesise(&edges, &options).files;
    let expected = r#"apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  labels:
    app.kubernetes.io/managed-by: microshield
  name: policy-db
  namespace: shop
spec:
  egress:
  - ports:
    - port: 53
      protocol: TCP
    - port: 53
      protocol: UDP
    to:
    - namespaceSelector: {}
      podSelector:
        matchLabels:
          k8s-app: kube-dns
  ingress:
  - from:
    - namespaceSelector:
        matchLabels:
          kubernetes.io/metadata.name: bank
      podSelector:
        matchLabels:
          app: "yes"
    ports:
    - port: 3306
      protocol: TCP
  podSelector:
    matchLabels:
      app: db
  policyTypes:
  - Ingress
  - Egress
"#;
    assert_eq!(files["policy-db.yaml"], expected);
}

#[test]
fn runs_of_ports_that_were_all_seen_become_ranges() {
    let mut udp = record(Ingress, web(), db(), 82, 1);
    udp.protocol = Protocol::Udp;
    let ports = [80, 81, 82, 84, 65_534, 65_535];
    let mut records: Vec<FlowRecord> = ports
        .map(|port| record(Ingress, web(), db(), port, 1))
        .into();
    records.push(udp);
    let options = Options {
        ports: PortForm::Ranges,
        ..options("shop", Granularity::Service)
    };
    check_with(
        records,
        &options,
        &[
            "policy-db {app=db}",
            "policy-db < {shop}{app=web} 80-82/TCP 84/TCP 65534-65535/TCP 82/UDP",
            "policy-web {app=web}",
            "policy-web > {shop}{app=db} 80-82/TCP 84/TCP 65534-65535/TCP 82/UDP",
        ],
    );
}

#[test]
fn external_addresses_are_merged_as_far_as_asked_but_no_nodes() {
    let external = |text| Endpoint::External(address(text));
    let records = [
        record(Ingress, external("192.0.2.1"), db(), 3306, 1),
        record(Ingress, external("192.0.2.9"), db(), 3306, 1),
        record(Ingress, external("192.0.2.200"), db(), 443, 1),
        record(
            Ingress,
            host_pod("kube-system", "agent", "node-1"),
            db(),
            3306,
            1,
        ),
    ];
    let mut options = options("shop", Granularity::Service);
    options.blocks.max_prefix4 = 28;
    let node = ledger([records[3].clone()]).edges()[0].client_address;
    let mut expected = [
        "policy-db {app=db}".to_owned(),
        format!("policy-db < {node}/32 3306/TCP"),
        "policy-db < 192.0.2.0/28 3306/TCP".to_owned(),
        "policy-db < 192.0.2.192/28 443/TCP".to_owned(),
    ];
    expected[1..].sort();
    let edges = ledger(records).edges();
    let plan = plan(&edges, &options);
    let mut lines: Vec<String> = plan
        .manifests(&plan.all())
        .flat_map(|policy| describe(&policy))
        .collect();
    lines[1..].sort();
    assert_eq!(lines, expected);
    assert_eq!(plan.added_addresses(&plan.all()), 14 + 15);
    let chosen = |port| {
        let rules = plan.rules().iter();
        rules.map(|rule| rule.port == port).collect::<Vec<_>>()
    };
    assert_eq!(plan.added_addresses(&chosen(3306)), 14);
    assert_eq!(plan.added_addresses(&chosen(443)), 15);
    assert_eq!(plan.added_addresses(&chosen(80)), 0);
}

#[test]
fn replicas_do_not_make_a_connection_rare() {
    let replica = |node| served("shop", "web", node);
    let records = [
        record(Ingress, replica("node-1"), db(), 3306, 2),
        record(Ingress, replica("node-2"), db(), 3306, 2),
        record(Ingress, replica("node-2"), db(), 443, 3),
    ];
    let options = Options {
        min_count: 4,
        ..options("shop", Granularity::Service)
    };
    check_with(
        records,
        &options,
        &[
            "policy-db {app=db}",
            "policy-db < {shop}{app=web} 3306/TCP",
            "policy-web {app=web}",
            "policy-web > {shop}{app=db} 3306/TCP",
            "Rare: shop/web-node-2 -> shop/db-node-2:443",
        ],
    );
}

#[test]
fn evidence_tells_how_often_when_and_by_whose_word() {
    let at = |mut record: FlowRecord, first: u64, last: u64| {
        record.first_seen = flow::time::Timestamp::from_nanos(first);
        record.last_seen = flow::time::Timestamp::from_nanos(last);
        record
    };
    let replica = |node| served("shop", "web", node);
    let egress = flow::record::Direction::Egress;
    let edges = ledger([
        at(record(Ingress, replica("node-1"), db(), 3306, 2), 10, 20),
        at(record(egress, replica("node-2"), db(), 3306, 3), 5, 15),
        at(record(Ingress, db(), replica("node-3"), 80, 1), 30, 70),
    ])
    .edges();
    let options = options("shop", Granularity::Service);
    let plan = plan(&edges, &options);
    let rule = &plan.rules()[plan
        .rules()
        .iter()
        .position(|rule| rule.port == 3306)
        .unwrap()];
    let of_web = plan
        .rules()
        .iter()
        .find(|rule| rule.port == 3306 && rule.direction == egress);
    assert_eq!(rule.evidence.count, 5);
    let evidence = of_web.unwrap().evidence;
    assert_eq!((evidence.count, evidence.pods, evidence.of_pods), (5, 2, 3));
    assert_eq!(
        (
            evidence.first_seen.as_nanos(),
            evidence.last_seen.as_nanos()
        ),
        (5, 20)
    );
    assert_eq!(evidence.seen_by, SeenBy::Both);
    let newest: Vec<u64> = plan
        .policies()
        .iter()
        .map(|draft| draft.newest.as_nanos())
        .collect();
    assert_eq!(newest, [30, 30]);
    assert_eq!(plan.until.as_nanos(), 70);
}

/// A pod on a node without an agent is told of by the agents of others only, and what it does besides is not known.
#[test]
fn pods_that_nobody_watches_are_named() {
    let records = [
        record(Egress, web(), db(), 3306, 1),
        record(Ingress, web(), served("shop", "api", "node-1"), 80, 1),
    ];
    let (edges, options) = (
        ledger(records).edges(),
        options("shop", Granularity::Service),
    );
    let plan = plan(&edges, &options);
    let named = |chosen: &[bool]| -> Vec<String> {
        let unwatched = plan.unwatched(chosen).into_iter();
        unwatched.map(|policy| policy.policy).collect()
    };
    // `web` was seen by its own agent when it called `db`, and `api` when it was called.
    assert_eq!(named(&plan.all()), ["policy-db"]);
    let of_db: Vec<bool> = (plan.rules().iter())
        .map(|rule| plan.policies()[rule.policy].name == "policy-db")
        .collect();
    let of_others: Vec<bool> = of_db.iter().map(|chosen| !chosen).collect();
    assert_eq!(named(&of_db), ["policy-db"]);
    assert_eq!(named(&of_others), [""; 0]);
}
