//! A small cluster for tests: builders for endpoints and records, and random ledgers over it.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use flow::{
    endpoint::{Endpoint, Labels, Node, Pod, Service, Workload},
    record::{Direction, FlowRecord, Outcome, Protocol, Source, Tuple},
    time::Timestamp,
};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use proptest::prelude::*;

use crate::{
    ledger::{Edge, Ledger},
    policy::{Notice, Options, plan},
};

/// A plan, all of which is chosen.
#[derive(Debug, PartialEq)]
pub(crate) struct Synthesis {
    pub(crate) policies: Vec<NetworkPolicy>,
    pub(crate) files: BTreeMap<String, String>,
    pub(crate) notices: Vec<Notice>,
}

pub(crate) fn synthesise(edges: &[Edge], options: &Options) -> Synthesis {
    let plan = plan(edges, options);
    let all = plan.all();
    Synthesis {
        policies: plan.manifests(&all).collect(),
        files: plan.files(&all).unwrap(),
        notices: plan.notices,
    }
}

pub(crate) fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

/// The pod `NAME-1` of the deployment `NAME`, with the labels `app: NAME` and one of its template, without a service.
pub(crate) fn pod(namespace: &str, app: &str, node: &str) -> Pod {
    Pod {
        uid: format!("uid-{namespace}-{app}-{node}"),
        namespace: namespace.to_owned(),
        name: format!("{app}-{node}"),
        labels: labels(&[("app", app), ("pod-template-hash", "5f495f9cf8")]).into(),
        workload: Some(Arc::new(Workload {
            kind: "Deployment".to_owned(),
            name: app.to_owned(),
        })),
        node: Some(node.into()),
        host_network: false,
        addresses: Vec::new(),
        services: Arc::default(),
    }
}

/// The service `NAME`, which selects `app: NAME`.
pub(crate) fn service(namespace: &str, app: &str) -> Arc<Service> {
    Arc::new(Service {
        uid: format!("uid-service-{namespace}-{app}"),
        namespace: namespace.to_owned(),
        name: app.to_owned(),
        labels: Labels::new(),
        selector: labels(&[("app", app)]),
        backends: Vec::new(),
    })
}

pub(crate) fn bare(pod: Pod) -> Endpoint {
    Endpoint::Pod {
        pod: Arc::new(pod),
        service: None,
    }
}

/// A pod of [`pod`], selected by its [`service`].
pub(crate) fn served(namespace: &str, app: &str, node: &str) -> Endpoint {
    let mut pod = pod(namespace, app, node);
    pod.services = [app.to_owned()].into();
    Endpoint::Pod {
        pod: Arc::new(pod),
        service: Some(service(namespace, app)),
    }
}

pub(crate) fn host_pod(namespace: &str, app: &str, node: &str) -> Endpoint {
    let mut pod = pod(namespace, app, node);
    pod.host_network = true;
    bare(pod)
}

/// A pod without a label that outlives a rollout.
pub(crate) fn unlabelled(namespace: &str, app: &str, node: &str) -> Endpoint {
    let mut pod = pod(namespace, app, node);
    pod.uid.push_str("-unlabelled");
    pod.name.push_str("-unlabelled");
    pod.workload = None;
    Arc::make_mut(&mut pod.labels).remove("app");
    bare(pod)
}

/// The pod with these addresses.
pub(crate) fn dual_stack(endpoint: Endpoint, addresses: &[&str]) -> Endpoint {
    let Endpoint::Pod { mut pod, service } = endpoint else {
        panic!("{endpoint} is no pod");
    };
    Arc::make_mut(&mut pod).addresses = addresses.iter().map(|text| address(text)).collect();
    Endpoint::Pod { pod, service }
}

/// The record with these addresses of client and server.
pub(crate) fn at((client, server): (&str, &str), mut record: FlowRecord) -> FlowRecord {
    record.tuple.src_addr = address(client);
    record.tuple.dst_addr = address(server);
    record
}

/// A pod that two services select, here reached through the one that selects pods of other applications too.
pub(crate) fn in_front(namespace: &str, app: &str, node: &str) -> Endpoint {
    let mut pod = pod(namespace, app, node);
    pod.uid.push_str("-front");
    pod.name.push_str("-front");
    Arc::make_mut(&mut pod.labels).insert("tier".to_owned(), "front".to_owned());
    pod.services = vec!["front".to_owned(), app.to_owned()].into();
    let mut front = (*service(namespace, "front")).clone();
    front.selector = labels(&[("tier", "front")]);
    Endpoint::Pod {
        pod: Arc::new(pod),
        service: Some(Arc::new(front)),
    }
}

/// A service whose endpoints are set by hand.
pub(crate) fn without_selector(namespace: &str, name: &str) -> Arc<Service> {
    let mut service = (*service(namespace, name)).clone();
    service.selector.clear();
    service.backends = vec![address("198.51.100.1"), address("2001:db8::2")];
    Arc::new(service)
}

pub(crate) fn node(name: &str) -> Endpoint {
    Endpoint::Node(Arc::new(Node {
        name: name.to_owned(),
        addresses: Vec::new(),
    }))
}

pub(crate) fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Established TCP connections, last seen at second 100. Every end has an address that follows from its name.
pub(crate) fn record(
    direction: Direction,
    src: Endpoint,
    dst: Endpoint,
    port: u16,
    count: u64,
) -> FlowRecord {
    let observed = match direction {
        Direction::Egress => &src,
        Direction::Ingress => &dst,
    };
    let hostname = match observed {
        Endpoint::Pod { pod, .. } => pod.node.as_deref().unwrap_or_default().to_owned(),
        Endpoint::Node(node) => node.name.clone(),
        Endpoint::Service(_) | Endpoint::External(_) => "node-1".to_owned(),
    };
    let time = Timestamp::from_nanos(100_000_000_000);
    FlowRecord {
        timestamp: time,
        hostname,
        tuple: Tuple {
            src_addr: address_of(&src),
            src_port: 40_000,
            dst_addr: address_of(&dst),
            dst_port: port,
        },
        src,
        dst,
        protocol: Protocol::Tcp,
        direction,
        outcome: Outcome::Established,
        count,
        first_seen: time,
        last_seen: time,
        process: None,
        sources: [Source::Ebpf].into(),
        via: None,
        connection: None,
    }
}

fn address_of(endpoint: &Endpoint) -> IpAddr {
    let name = match endpoint {
        Endpoint::External(address) => return *address,
        // A pod in the node's network has the node's address.
        Endpoint::Pod { pod, .. } if pod.host_network => {
            format!("node {}", pod.node.as_deref().unwrap_or_default())
        }
        other => other.to_string(),
    };
    let sum = name.bytes().fold(7_u32, |sum, byte| {
        sum.wrapping_mul(31).wrapping_add(u32::from(byte))
    });
    let [_, b, c, d] = sum.to_be_bytes();
    IpAddr::from([10, b, c, d])
}

/// Any endpoint of a cluster of two nodes, two namespaces and three applications.
fn any_endpoint() -> impl Strategy<Value = Endpoint> {
    let namespace = prop::sample::select(vec!["shop", "bank"]);
    let app = prop::sample::select(vec!["web", "db", "queue"]);
    let on = prop::sample::select(vec!["node-1", "node-2"]);
    (0..9_u8, namespace, app, on).prop_map(|(kind, namespace, app, on)| match kind {
        0 | 1 => served(namespace, app, on),
        2 => bare(pod(namespace, app, on)),
        3 => host_pod("kube-system", app, on),
        4 => Endpoint::Service(service(namespace, app)),
        5 => node(on),
        6 => unlabelled(namespace, app, on),
        7 => Endpoint::Service(without_selector(namespace, "api")),
        _ => Endpoint::External(address(match (app, on) {
            ("web", "node-1") => "192.0.2.1",
            ("web", _) => "192.0.2.9",
            ("db", "node-1") => "2001:db8::1",
            ("db", _) => "2001:db8::2:1",
            _ => "198.51.100.7",
        })),
    })
}

/// Also pods that several services select, pods with addresses of both families, and services of pods in their nodes'
/// networks.
fn any_overlapping_endpoint() -> impl Strategy<Value = Endpoint> {
    let app = prop::sample::select(vec!["web", "db"]);
    let on = prop::sample::select(vec!["node-1", "node-2"]);
    let special = (0..5_u8, app, on).prop_map(|(kind, app, on)| {
        let with_both = |mut pod: Pod| {
            pod.uid.push_str("-both");
            pod.name.push_str("-both");
            let sum = pod
                .name
                .bytes()
                .fold(0_u16, |sum, byte| sum * 2 % 4_093 + u16::from(byte));
            let [a, b] = sum.to_be_bytes();
            let addresses = [format!("10.255.{a}.{b}"), format!("2001:db8:1::{sum:x}")];
            dual_stack(bare(pod), &addresses.each_ref().map(String::as_str))
        };
        match kind {
            0 | 1 => in_front("shop", app, on),
            2 => with_both(pod("shop", app, on)),
            3 => {
                let mut pod = pod("bank", app, on);
                pod.workload = None;
                Arc::make_mut(&mut pod.labels).remove("app");
                with_both(pod)
            }
            _ => Endpoint::Service(service("kube-system", app)),
        }
    });
    prop_oneof![1 => special, 3 => any_endpoint()]
}

pub(crate) fn any_record() -> impl Strategy<Value = FlowRecord> {
    any_record_between(any_endpoint(), any_endpoint())
}

fn any_record_between(
    src: impl Strategy<Value = Endpoint>,
    dst: impl Strategy<Value = Endpoint>,
) -> impl Strategy<Value = FlowRecord> {
    (
        src,
        dst,
        prop::sample::select(vec![80_u16, 81, 443]),
        prop::sample::select(vec![Direction::Egress, Direction::Ingress]),
        prop::sample::select(vec![Protocol::Tcp, Protocol::Udp]),
        prop::bool::weighted(0.1),
        1..20_u64,
        (0..5_u64, 0..5_u64, 0..3_u16),
    )
        .prop_map(
            |(src, dst, port, direction, protocol, failed, count, (start, length, host))| {
                let mut record = record(direction, src, dst, port, count);
                record.protocol = protocol;
                if failed {
                    record.outcome = Outcome::Failed;
                }
                record.first_seen = Timestamp::from_nanos(start);
                record.last_seen = Timestamp::from_nanos(start + length);
                record.timestamp = record.last_seen;
                record.hostname = format!("node-{host}");
                record
            },
        )
}

pub(crate) fn ledger(records: impl IntoIterator<Item = FlowRecord>) -> Ledger {
    let mut ledger = Ledger::default();
    for record in records {
        ledger.observe(record);
    }
    ledger
}

pub(crate) fn any_records() -> impl Strategy<Value = Vec<FlowRecord>> {
    prop::collection::vec(any_record(), 0..60)
}

pub(crate) fn any_overlapping_records() -> impl Strategy<Value = Vec<FlowRecord>> {
    let record = any_record_between(any_overlapping_endpoint(), any_overlapping_endpoint());
    prop::collection::vec(record, 0..60)
}
